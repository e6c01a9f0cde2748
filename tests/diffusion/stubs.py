"""Language models whose answers are known: hidden states are logits, the unembedding is the identity."""

import itertools

import jax.numpy as jnp
import numpy as np

from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig

TINY = TransformerConfig(vocab_size=9, width=16, layers=2, heads=2, kv_heads=1, ffn=24, max_length=64)
tiny = language_model(TINY)


def stub(logits_of) -> LanguageModel:
    """`logits_of(params, tokens) -> [B, T, V]`, whatever the mask."""

    def apply(params, tokens, *, positions=None, mask=None, cache=None):
        del positions, mask
        return logits_of(params, tokens), cache

    unembedding = lambda params: jnp.eye(logits_of(params, jnp.zeros((1, 3), jnp.int32)).shape[-1])
    return LanguageModel(lambda key: None, apply, unembedding, lambda batch, length: None)


def joint(seed: int, symbols: int, length: int) -> np.ndarray:
    """A random distribution over sequences, `[symbols] * length`."""
    p = np.random.default_rng(seed).gamma(0.7, size=(symbols,) * length)
    return p / p.sum()


def exact(p: np.ndarray) -> LanguageModel:
    """The model of `p` whose conditionals are all right; the mask token is `symbols`."""
    symbols, length = p.shape[0], p.ndim
    table = np.full((symbols + 1,) * length + (length, symbols), 1.0 / symbols)
    for seen in itertools.product(range(symbols + 1), repeat=length):
        where = tuple(slice(None) if token == symbols else slice(token, token + 1) for token in seen)
        for i in range(length):
            if seen[i] == symbols:
                rest = p[where].sum(axis=tuple(j for j in range(length) if j != i))
                table[seen][i] = rest / rest.sum()
    logits = jnp.pad(jnp.float32(np.log(table)), ((0, 0),) * (length + 1) + ((0, 1),), constant_values=3.0)
    behind = lambda tokens: jnp.pad(
        logits[tuple(tokens[:, -length:].T)], ((0, 0), (tokens.shape[1] - length, 0), (0, 0))
    )
    unembedding = lambda params: jnp.eye(symbols + 1)
    return stub(lambda params, tokens: behind(tokens))._replace(unembedding=unembedding)
