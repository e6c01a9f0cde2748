"""The contract between language models and everything that uses them: four pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets.transformer import Transformer, TransformerConfig, init_cache


class LanguageModel(NamedTuple):
    """Four pure functions; whatever offers them plugs into every loss and loop.

    init: (key) -> params, a plain nested dict of arrays. Consumes the key. Wrap it in jax.jit: it is one program.
    apply: (params, tokens [B, T], *, positions [B, T] = None, mask = Causal(), cache = None)
      -> (hidden [B, T, D], cache). Without a cache: one pass over whole sequences. With one: the T columns are
      written at [cache.length, cache.length + T), attention is over all S columns with q_offset = cache.length, and
      the advanced cache is returned. Positions default to arange(T) (+ cache.length). The mask is given over cache
      columns: batches of unequal prompts are padded on the left, the caller adds `Segments` to hide the padding and
      gives positions that start at 0 at the first real token. A cursor that is only known at run time cannot be
      checked: writing past the last column would overwrite it, so size the cache for the whole generation.
    unembedding: (params) -> [D, V]; logits are hidden @ unembedding(params) (see `logits`).
    init_cache: (batch, length) -> Cache, empty.
    """

    init: Callable
    apply: Callable
    unembedding: Callable
    init_cache: Callable


def language_model(config: TransformerConfig) -> LanguageModel:
    """The decoder of `jaxrl.nets.transformer` as a LanguageModel."""
    model = Transformer(config)

    def init(key):
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(params, tokens, *, positions=None, mask=None, cache=None):
        return model.apply({"params": params}, tokens, positions=positions, mask=mask, cache=cache)

    def unembedding(params):
        kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["unembed"]["kernel"]
        return kernel.astype(config.dtype)

    def empty(batch, length):
        return init_cache(config, batch, length)

    return LanguageModel(init, apply, unembedding, empty)


def logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden [..., D] under unembedding [D, V], accumulated in float32."""
    return jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
