"""One tiny model and one tiny task for the tests of post-training; compiled once for each process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.types import Prompts

EOS, PAD, VOCABULARY = 1, 0, 13


@pytest.fixture(scope="session")
def model():
    config = TransformerConfig(
        vocab_size=VOCABULARY, width=16, layers=2, heads=2, kv_heads=1, ffn=32, max_length=64, tie_embeddings=False
    )
    return language_model(config)


@pytest.fixture(scope="session")
def params(model):
    """Random, and scaled up so that the next-token distribution is far from uniform."""
    fresh = jax.jit(model.init)(jax.random.key(3))
    return {**fresh, "unembed": jax.tree.map(lambda w: 40.0 * w, fresh["unembed"])}


@pytest.fixture(scope="session")
def prompts():
    """Four prompts of 1, 2, 4 and 4 tokens, padded on the left."""
    rows = [[5], [6, 7], [2, 3, 4, 5], [9, 8, 7, 6]]
    tokens = np.zeros((4, 4), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[4 - len(ids) :] = ids
    return Prompts(jnp.asarray(tokens), jnp.asarray([len(ids) for ids in rows]))
