"""What only concerns the TPU kernel: it lowers for TPU on a machine without one, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxrl.kernels.attention import BlockDiffusion, Causal, Chunked, Prefix, Segments, Tree, Window, attention
from jaxrl.kernels.attention.tpu import blocks_of, pallas_attention

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
