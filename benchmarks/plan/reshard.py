"""Bytes that laying parameters out anew sends, from the training mesh to the sampler's on the same chips.

    python benchmarks/plan/reshard.py     # writes reshard.md beside this file; two minutes on two cores

The parameters of Llama 3.1 8B in bfloat16, on 64 chips of a v5p slice that are not there. Least: what a device must
hold afterwards and does not hold before, mean over devices. Compiled: read from the programs of `parallel.relaid` and
of a plain `jax.device_put`.
"""

import math
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import numpy as np
from jax.sharding import Mesh

from jaxrl import parallel
from jaxrl.kernels import aot
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.parallel import relayout
from jaxrl.parallel.mesh import mesh_sizes
from jaxrl.plan import chips, compiled, hlo

CASES = [("fsdp=64", "data=64"), ("fsdp=64", "data=8,tensor=8"), ("fsdp=16,tensor=4", "data=16,tensor=4"),
         ("fsdp=16,tensor=4", "data=64"), ("data=4,fsdp=16", "data=16,tensor=4")]  # fmt: skip


def corners(sharding, shape) -> np.ndarray:
    """First and last index of each device's part along every axis, [devices, axes, 2]."""
    parts = sharding.devices_indices_map(shape)
    order = sorted(parts, key=lambda device: device.id)
    ends = [
        [(s.start or 0, n if s.stop is None else s.stop) for s, n in zip(parts[d], shape, strict=True)] for d in order
    ]
    return np.array(ends).reshape(len(order), len(shape), 2)


def least(shape, before, after) -> float:
    """Entries that a device must receive, mean over devices."""
    a, b = corners(before, shape), corners(after, shape)
    both = np.clip(np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]), 0, None).prod(-1)
    return float(((b[..., 1] - b[..., 0]).prod(-1) - both).mean())


def row(training: str, sampling: str) -> str:
    place = chips.topology("v5p:4x4x4")
    mesh = compiled.mesh_on(place, mesh_sizes(training, place.devices))
    other = mesh_sizes(sampling, place.devices)
    meshes = mesh, Mesh(mesh.devices.reshape(tuple(other.values())), tuple(other), axis_types=mesh.axis_types)
    config = presets.llama31_8b(param_dtype="bfloat16")
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    before, after = (parallel.state_shardings(shapes, mesh) for mesh in meshes)
    given = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, before)
    leaves, sources, places = (jax.tree.leaves(tree) for tree in (shapes, before, after))
    halfway = [relayout.between(x.shape, a, b) for x, a, b in zip(leaves, sources, places, strict=True)]
    sent = []
    for layout in (halfway, places):
        lay = lambda arrays, layout=layout: jax.lax.with_sharding_constraint(arrays, layout)
        program = aot.compile_for(mesh, lay, jax.tree.leaves(given), out_shardings=places)
        sent.append(sum(x.bytes for x in hlo.count(program.as_text(), dict(mesh.shape)).traffic))
    needed = sum(2 * least(x.shape, a, b) for x, a, b in zip(leaves, sources, places, strict=True))
    share = 2 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(given)) / 1e6
    ours, plain = (f"{bytes_ / needed:.3f} x" for bytes_ in sent)
    return f"| {training} | {sampling} | {share:,.0f} | {needed / 1e6:,.0f} | {ours} | {plain} |"


if __name__ == "__main__":
    lines = ["| training | sampling | MB held before | MB to receive, least | relaid | device_put |", "|" + "---|" * 6]
    for case in CASES:
        lines.append(row(*case))
        print(lines[-1], flush=True)
    Path(__file__).with_name("reshard.md").write_text("\n".join(lines) + "\n")
