"""What only concerns the TPU kernel: strict interpretation, and compilation for TPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # whether races were found is private
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.kernels import aot
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.kernels.log_probs.reference import dense_statistics
from jaxrl.kernels.log_probs.tpu import pallas_statistics

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
GENERATIONS = ["v5e", "v5p", "v6e", "tpu7x"]
CALLS = {  # tokens, D, V, dtype, knobs
    "qwen": (2048, 1024, 151936, jnp.bfloat16, {}),
    "smollm": (512, 576, 49152, jnp.float32, {"temperature": True}),
    "wide": (4096, 4096, 151936, jnp.bfloat16, {"temperature": True}),
    "gemma": (1024, 2304, 256000, jnp.bfloat16, {"soft_cap": 30.0}),
    "small": (17, 64, 1000, jnp.float32, {"soft_cap": 5.0}),
}


def loss_and_shapes(tokens, d, vocabulary, dtype, knobs):
    def loss(h, w, y, t):
        options = {"soft_cap": knobs.get("soft_cap"), "temperature": t if knobs.get("temperature") else 1.0}
        out = token_log_probs(h, w, y, implementation="pallas", return_lse=True, **options)
        return sum(jnp.sum(jnp.sin(x)) for x in out)

    shape = jax.ShapeDtypeStruct
    y, t = shape((1, tokens), jnp.int32), shape((), jnp.float32)
    return loss, (shape((1, tokens, d), dtype), shape((d, vocabulary), dtype), y, t)


def kernels(text):
    return text.count('custom_call_target="tpu_custom_call"')


@needs_compiler
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("call", ["smollm", "small"])
def test_compiles(generation, call):
    loss, shapes = loss_and_shapes(*CALLS[call])
    program = aot.compile_for(aot.tpu_mesh(generation), jax.grad(loss, (0, 1, 3)), *shapes)
    assert kernels(program.as_text()) == 3  # forward, and the gradients of hidden and unembedding


@needs_compiler
def test_compiles_for_a_large_vocabulary():
    loss, shapes = loss_and_shapes(*CALLS["qwen"])
    program = aot.compile_for(aot.tpu_mesh("v5e"), jax.grad(loss, (0, 1)), *shapes)
    assert program.memory_analysis().temp_size_in_bytes < 2048 * 151936 // 8


@needs_compiler
@pytest.mark.parametrize("check_vma", [True, False])
def test_compiles_for_a_sharded_vocabulary(check_vma):
    mesh = aot.tpu_mesh("v5e", (2, 2), ("data", "model"))
    rows, columns = P("data"), P(None, "model")
    call = functools.partial(token_log_probs, axis_name="model", implementation="pallas")
    specs = {"in_specs": (rows, columns, rows), "out_specs": (rows, rows), "check_vma": check_vma}
    f = jax.shard_map(call, mesh=mesh, **specs)
    loss = lambda h, w, y: sum(jnp.sum(x) for x in f(h, w, y))

    def shape(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    h, w = shape((2, 128, 128), jnp.bfloat16, rows), shape((128, 2048), jnp.bfloat16, columns)
    program = aot.compile_for(mesh, jax.grad(loss, (0, 1)), h, w, shape((2, 128), jnp.int32, rows))
    assert kernels(program.as_text()) == 3


@pytest.mark.parametrize("call", CALLS)
def test_lowers_for_tpu(call):
    loss, shapes = loss_and_shapes(*CALLS[call])
    exported = export.export(jax.jit(jax.grad(loss, (0, 1, 3))), platforms=["tpu"])(*shapes)
    assert exported.mlir_module().count("tpu_custom_call") == 3


@pytest.mark.parametrize(("n", "vocabulary", "soft_cap"), [(24, 300, 2.0), (16, 128, None)])
def test_strict_interpretation(n, vocabulary, soft_cap):
    """Two cores, poisoned memory, and a watch for races."""
    strict = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True, random_seed=1)
    rng = np.random.default_rng(0)
    h, w = (rng.normal(size=s).astype(np.float32) for s in ((n, 24), (24, vocabulary)))
    y, t, ct = rng.integers(0, vocabulary, n), rng.uniform(0.5, 2, n), rng.normal(size=(3, n)).astype(np.float32)
    y, t = y.astype(np.int32), t.astype(np.float32)

    def run(form):
        out, vjp = jax.vjp(lambda h, w, t: form(h, w, y, t, soft_cap=soft_cap), h, w, t)
        return out, vjp(tuple(ct))

    try:
        got = run(functools.partial(pallas_statistics, tokens=16, vocabulary=128, interpret=strict))
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(dense_statistics)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [{"tokens": 8}, {"vocabulary": 64}])
def test_blocks_must_be_multiples_of_the_tiling(blocks):
    with pytest.raises(ValueError, match="expected multiples of 16 and 128"):
        pallas_statistics(jnp.ones((3, 2)), jnp.ones((2, 300)), jnp.zeros(3, jnp.int32), jnp.ones(3), **blocks)


def test_one_program_runs_on_cpu_too():
    h, w, y = jnp.ones((1, 8, 4)), jnp.ones((4, 12)), jnp.zeros((1, 8), jnp.int32)
    lowered = jax.jit(functools.partial(token_log_probs, implementation="pallas")).lower(h, w, y)
    assert "tpu_custom_call" not in lowered.as_text()
    for a, b in zip(lowered.compile()(h, w, y), token_log_probs(h, w, y), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
