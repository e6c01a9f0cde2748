"""The TPU compiler's word on our kernels: they compile for every generation, and their schedules stay short."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.kernels import aot
from jaxrl.kernels.attention import BlockDiffusion, Causal, Chunked, Prefix, Segments, Tree, Window, tpu
from jaxrl.kernels.attention.dropout import Dropout
from jaxrl.kernels.attention.tpu import pallas_attention
from jaxrl.kernels.shapes import SHAPES

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
HERE = pathlib.Path(__file__)


def program(
    chip, *, t=384, s=None, b=2, heads=4, key_heads=2, d=128, dv=None, dtype=jnp.bfloat16, mask=None, **options
):
    """Attention and its gradients, compiled."""
    s, dv, mask = s or t, dv or d, mask or (lambda ids: Causal())
    struct = jax.ShapeDtypeStruct
    arrays = struct((b, t, heads, d), dtype), struct((b, s, key_heads, d), dtype), struct((b, s, key_heads, dv), dtype)

    def loss(q, k, v, ids, seed):
        more = options | ({"dropout": Dropout(options["dropout"], seed)} if "dropout" in options else {})
        o, lse = pallas_attention(q, k, v, mask=mask(ids), scale=d**-0.5, **more)
        return o.astype(jnp.float32).sum() + lse.sum()

    ids, seed = struct((b, s), jnp.int32), struct((2,), jnp.uint32)
    return aot.compile_for(aot.tpu_mesh(chip), jax.grad(loss, (0, 1, 2)), *arrays, ids, seed)


@needs_compiler
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles_for_every_generation(chip):
    assert set(aot.kernel_vmem(program(chip))) == {"attention_forward", "attention_backward"}


@needs_compiler
@pytest.mark.parametrize("check_vma", [True, False])
def test_compiles_inside_shard_map(check_vma):
    mesh, rows = aot.tpu_mesh("v5e", (2,), ("data",)), P("data")
    x = jax.ShapeDtypeStruct((4, 256, 2, 128), jnp.bfloat16, sharding=NamedSharding(mesh, rows))
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=NamedSharding(mesh, rows))

    def loss(x, ids):
        o, _ = pallas_attention(x, x, x, mask=Causal() & Segments(ids), scale=0.1)
        return jnp.sum(o.astype(jnp.float32))

    f = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=check_vma)
    assert set(aot.kernel_vmem(aot.compile_for(mesh, f, x, ids))) == {"attention_forward", "attention_backward"}


CASES = {
    "one token": {"t": 1},
    "17 tokens": {"t": 17},
    "no multiple of a block": {"t": 130, "s": 300},
    "float32": {"dtype": jnp.float32},
    "two backward kernels": {"fused": False},
    "packed": {"mask": lambda ids: Causal() & Segments(ids)},
    "tree": {"mask": lambda ids: Tree(ids) & Window(100)},
    "prefix": {"mask": lambda ids: Causal() | Prefix(ids[:, 0])},
    "block diffusion": {"mask": lambda ids: BlockDiffusion(16) & Chunked(200)},
    "dropout": {"dropout": 0.1},
    "ALiBi and a soft cap": {"alibi": jnp.ones(4), "soft_cap": 30.0},
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_compiles_with_every_option(name):
    program("v5e", **CASES[name])


@needs_compiler
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_the_shapes_of_published_models(name):
    shape = SHAPES[name]
    program(
        "v6e",
        b=1,
        heads=shape.heads // shape.key_heads,
        key_heads=1,
        d=shape.size,
        dv=shape.value_size,
        soft_cap=shape.soft_cap,
        sinks=jnp.ones(shape.heads // shape.key_heads) if shape.sinks else None,
        mask=(lambda ids: Window(shape.window)) if shape.window else None,
    )


@needs_compiler
def test_long_contexts_of_many_heads_take_two_backward_kernels():
    struct = jax.ShapeDtypeStruct
    shape = struct((1, 65536, 8, 128), jnp.bfloat16), struct((1, 65536, 1, 128), jnp.bfloat16)
    f = functools.partial(pallas_attention, mask=Causal(), scale=0.1)
    loss = lambda q, k: f(q, k, k)[0].astype(jnp.float32).sum()
    mesh = aot.tpu_mesh("v5e")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # lowered, not compiled
        text = jax.jit(jax.grad(loss, (0, 1))).trace(*shape).lower(lowering_platforms=("tpu",)).as_text()
    assert [name in text for name in ("attention_dq", "attention_dkv", "attention_backward")] == [True, True, False]


@needs_compiler
def test_the_longest_fused_backward_pass_fits_into_vmem():
    """dq of eight heads takes all that is left to it: a block more, and there would be two kernels."""
    budget, heads, size = int(tpu.VMEM["v5e"] * 2**20 * tpu.USABLE) // 2, 8, 128
    longest = budget // (4 * heads * size) // 1024 * 1024
    mask = lambda ids: Causal() & Segments(ids)
    vmem = aot.kernel_vmem(program("v5e", t=longest, b=1, heads=heads, key_heads=1, d=size, mask=mask))
    assert 4 * heads * size * longest < vmem["attention_backward"] < tpu.VMEM["v5e"] * 2**20


@needs_compiler
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_schedules_stay_within_a_tenth_of_the_recorded_ones(chip):
    table = json.loads((HERE.parents[2] / "benchmarks/attention/tpu.json").read_text())
    recorded = {
        row["pass"]: row["schedules"]["full"]["hot"]
        for row in table
        if (row["chip"], row["library"], row["size"], row["value_size"]) == (chip, "ours", 128, 128)
    }
    script = HERE.parents[2] / "benchmarks/attention/schedule.py"
    command = [sys.executable, str(script), chip, "ours", "--mask", "full"]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    now = {row["pass"]: row["hot"] for row in map(json.loads, done.stdout.splitlines()) if "pass" in row}
    assert set(now) == set(recorded) == {"forward", "backward"}
    for which, hot in now.items():
        assert hot <= 1.1 * recorded[which], which


@needs_compiler
@pytest.mark.parametrize("name", ["decode", "decode, pages of 16", "log-probs"])
def test_schedules_of_the_other_kernels_stay_within_a_tenth_of_the_recorded_ones(name):
    folder = HERE.parents[2] / "benchmarks/attention"
    table = json.loads((folder / "others.json").read_text())
    recorded = {row["kernel"]: row for row in table if (row["chip"], row["case"]) == ("v5e", name)}
    command = [sys.executable, str(folder / "others.py"), "--one", "v5e", name]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for row in map(json.loads, done.stdout.splitlines()) if row["vmem"] is not None]
    now = {row["kernel"]: row for row in rows}
    kernels = {"log_probs_forward", "log_probs_dh", "log_probs_dw"} if name == "log-probs" else {"decode_attention"}
    assert set(now) == set(recorded) == kernels
    for kernel, row in now.items():
        for figure in ("bundles", "hot", "vmem"):
            assert row[figure] <= 1.1 * recorded[kernel][figure], (kernel, figure)


def test_the_reader_of_schedules(tmp_path):
    header = "static per-bundle utilization\nMXU, XLU, VSTORE:SPILL\n2 1 1\nslots\n"
    rows = "0 1 0\n2 0 1\n1 1 0\n0 0 1\n1 0 0\n0 0 0\n"
    (tmp_path / "17-kernel_name.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(header + rows)
    (tmp_path / "18-copy-70-final_hlo-static-per-bundle-utilization.txt").write_text(header + "0 1 0\n")
    assert aot.schedules(tmp_path) == {"kernel_name": aot.Schedule(bundles=6, hot=4, mxu=0.5, spills=0.5)}


def test_a_slice_too_small_for_the_mesh():
    if aot.missing():
        with pytest.raises(ImportError, match=r"pip install 'jaxrl\[aot\]'"):
            aot.tpu_mesh("v5e")
    else:
        with pytest.raises(ValueError, match=r"v5e:2x2 has 4 devices, the mesh \(8,\) needs 8"):
            aot.tpu_mesh("v5e", (8,))
