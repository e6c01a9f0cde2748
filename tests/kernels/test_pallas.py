"""What only concerns the TPU kernel: it lowers for TPU on a machine without one, and its refusals."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # whether races were found is private
from jax.experimental.pallas import tpu as pltpu

from jaxrl.kernels.attention import BlockDiffusion, Causal, Chunked, Prefix, Segments, Tree, Window, attention
from jaxrl.kernels.attention.tpu import Blocks, Pieces, blocks_of, pallas_attention

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
IDS = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
MASKS = {
    "packed_window": lambda ids: Window(300) & Segments(ids),
    "prefix": lambda ids: Causal() | Prefix(ids[:, 0]),
    "tree": lambda ids: Tree(ids),
    "chunked": lambda ids: Causal() & Chunked(100),
    "block_diffusion": lambda ids: BlockDiffusion(16),
}


@pytest.mark.parametrize("mask", MASKS)
def test_lowers_for_tpu(mask):
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, mask=MASKS[mask](ids), implementation="pallas").astype(jnp.float32))

    exported = export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(q, k, k, IDS)
    assert exported.mlir_module().count("tpu_custom_call") == 2  # forward, and one backward


def test_blocks_must_be_multiples_of_the_lanes():
    x = jnp.ones((1, 256, 1, 8))
    with pytest.raises(ValueError, match="blocks that are multiples of 128, got 64"):
        pallas_attention(x, x, x, mask=Causal(), scale=1.0, blocks=blocks_of("v5e", 2)._replace(q=64))


def test_one_program_runs_on_cpu_too():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 2, 8)), jnp.float32)
    lowered = jax.jit(lambda x: attention(x, x, x, implementation="pallas")).lower(x)
    assert "tpu_custom_call" not in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(x), attention(x, x, x), atol=1e-6)


STRICT = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True, random_seed=1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mask", ["packed", "tree"])
def test_the_strict_interpreter_finds_no_race(mask, fused):
    """Parallel axes in any order on two cores, reads out of bounds refused, memory that nobody wrote full of NaN."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 260, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (1, 260))), jnp.int32)
    masks = {"packed": Causal() & Segments(ids), "tree": Tree(jnp.full_like(ids, 200).at[:, :50].set(260))}
    blocks = Blocks(128, 128, Pieces(128, 128, 1), Pieces(128, 128, 1))

    def run(interpret):
        options = {"mask": masks[mask], "scale": 0.3, "blocks": blocks, "fused": fused, "interpret": interpret}

        def loss(q, k, v):
            o, lse = pallas_attention(q, k, v, **options)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(lse < -1e29, 0.0, lse))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    strict = run(STRICT)
    assert not interpret_pallas_call.races.races_found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), strict, run(True))


@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(
    t=st.integers(1, 290),
    s=st.integers(1, 290),
    group=st.integers(1, 3),
    size=st.sampled_from([1, 8, 24]),
    q_offset=st.integers(0, 100),
    fused=st.booleans(),
    n=st.integers(1, 300),
)
def test_any_shape_agrees_with_the_reference(t, s, group, size, q_offset, fused, n):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, t, 2 * group, size)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, s, 2, d)), jnp.float32) for d in (size, size + 3))
    blocks = Blocks(128, 128, Pieces(128, 128, 2), Pieces(128, 128, 1))
    options = {"mask": Window(n) | Chunked(n), "q_offset": q_offset, "soft_cap": 2.0}

    def value_and_grads(f):
        loss = lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v)))
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=QUICK)(q, k, v)

    ours = lambda q, k, v: pallas_attention(q, k, v, scale=size**-0.5, blocks=blocks, fused=fused, **options)[0]
    reference = lambda q, k, v: attention(q, k, v, implementation="reference", **options)
    got, want = value_and_grads(ours), value_and_grads(reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
