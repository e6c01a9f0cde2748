"""A tiny decoder, its parameters and adapters with values of their own, for the tests of adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.nets import adapters
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig

SIZES = {"vocab_size": 16, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24, "max_length": 64}


@functools.cache
def network(**changes):
    """(config, model, params), kernels spread out so that attention is far from uniform."""
    config = TransformerConfig(**(SIZES | {"tie_embeddings": True} | changes))
    model = language_model(config)
    draw = np.random.default_rng(0)

    def leaf(path, x):
        name = path[-1].key
        std = 0.25 if name in ("kernel", "embedding") else 0.1
        return jnp.asarray((name == "scale") + draw.normal(0, std, x.shape), x.dtype)

    return config, model, jax.tree.map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0)))


def stirred(params, seed=1, std=0.2):
    """The parameters with noise on all of them."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(draw.normal(0, std, x.shape), x.dtype), params)


def tokens(batch=2, length=10, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 16, (batch, length)), jnp.int32)


def forward(model, adapter):
    """The adapted model's hidden states, jitted: (base, params, tokens, **rest) -> [B, T, D]."""
    return jax.jit(lambda base, params, ids, **rest: adapters.adapt(model, base, adapter).apply(params, ids, **rest)[0])


def layer(tree, path, n):
    """Layer n of a stacked leaf, as float64."""
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree[n], np.float64)
