"""Programs compiled for TPUs that are not there.

The compiler of a TPU is a library (`libtpu`, the extra `aot`) that runs on any x86-64 Linux machine: it refuses what a
TPU would refuse (tiling, unsupported primitives, too much VMEM), says how much memory a program takes, and writes down
the instruction schedule of every kernel. Nothing can be executed.

    mesh = tpu_mesh("v5e")
    program = compile_for(mesh, f, jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16))
    program.memory_analysis()

Schedules: `Schedule` says how many instruction bundles a kernel has, and which units they keep busy. A TPU
issues one bundle per clock, so that bundles x grid steps / clock estimates the time of a kernel (but for waits).
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest topology of each generation."""

_ENVIRONMENT = {  # read when libtpu is loaded: do not look for a TPU, nor for one's metadata server
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def missing() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "the TPU compiler is missing: pip install 'jaxrl[aot]'"
    return None


def tpu_mesh(topology: str, shape: Sequence[int] = (1,), axes: Sequence[str] = ("x",), **options: Any) -> Mesh:
    """A mesh of TPUs that need not exist.

    Args:
      topology: a generation ("v4", "v5e", "v5p", "v6e", "tpu7x") or a slice of one ("v5e:16x16", "v5p:8x8x8").
      shape, axes: of the mesh; it takes the first devices of the slice.
      options: passed to `jax.experimental.topologies.get_topology_desc` (num_slices, chip_config_name, ...).

    Raises:
      ImportError: libtpu is not installed.
      ValueError: the slice has fewer devices than the mesh.
    """
    reason = missing()
    if reason:
        raise ImportError(reason)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = TOPOLOGIES.get(topology, topology)
    devices = list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    count = int(np.prod(shape))
    if count > len(devices):
        raise ValueError(f"tpu_mesh: {name} has {len(devices)} devices, the mesh {tuple(shape)} needs {count}.")
    if count == 1:
        return Mesh(np.array(devices[:1]).reshape(shape), axes)
    return Mesh(mesh_utils.create_device_mesh(shape, devices=devices[:count], allow_split_physical_axes=True), axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def compile_for(mesh: Mesh, f: Callable, *args: Any, **jit_options: Any) -> jax.stages.Compiled:
    """`f` compiled for the devices of a mesh.

    Args:
      mesh: see `tpu_mesh`.
      f: a function of arrays, jitted or not.
      args: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are replicated.
      jit_options: of `jax.jit`.
    """
    everywhere = replicated(mesh)

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or everywhere)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # lowering rules ask for the kind of TPU
        return jax.jit(f, **jit_options).lower(*jax.tree.map(placed, args)).compile()


class Schedule(NamedTuple):
    """What the compiler's schedule says about one kernel."""

    bundles: int  # in all
    hot: int  # from the first to the last use of the matrix units
    mxu: float  # share of the slots of the matrix units that are used in the hot part
    spills: float  # stores to spilled registers for each bundle of the hot part


def kernel_vmem(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of VMEM that each Pallas kernel of a program allocates, by kernel name."""
    found = {}
    for line in (program.as_text() or "").splitlines():
        kernel = re.match(r"\s*(?:ROOT )?%([\w.-]+?)(?:\.\d+)? = .*tpu_custom_call", line)
        if kernel:
            used = re.search(r'"used_scoped_memory_configs":\[([^]]*)\]', line)
            found[kernel[1]] = sum(int(n) for n in re.findall(r'"size":"(\d+)"', used[1])) if used else 0
    return found


def dump_options(directory: str | Path) -> dict[str, str]:
    """Environment in which libtpu writes schedules to `directory`; it must be set before libtpu is loaded."""
    flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false"
    return {**_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}


def schedules(directory: str | Path) -> dict[str, Schedule]:
    """The schedules of the kernels that were compiled under `dump_options(directory)`, by kernel name."""
    found = {}
    for path in sorted(Path(directory).glob("*-final_hlo-static-per-bundle-utilization.txt")):
        name = re.sub(r"(\.\d+)?-\d+-final_hlo.*", "", re.sub(r"^\d+-", "", path.name))
        lines = path.read_text().splitlines()
        slots = [x.strip() for x in lines[1].split(",")]
        capacity = [int(x) for x in lines[2].split()]
        rows = np.array([[int(x) for x in line.split()] for line in lines[4:] if line.strip()])
        used = np.flatnonzero(rows[:, slots.index("MXU")])
        if not used.size:
            continue
        hot = rows[used[0] : used[-1] + 1]
        mxu, spill = slots.index("MXU"), slots.index("VSTORE:SPILL")
        share = hot[:, mxu].sum() / (len(hot) * capacity[mxu])
        found[name] = Schedule(len(rows), len(hot), round(float(share), 3), round(float(hot[:, spill].mean()), 3))
    return found
