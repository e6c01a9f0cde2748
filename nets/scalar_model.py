"""A language model with one number for each token in place of logits: reward models and critics."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets.language_model import LanguageModel


class ScalarModel(NamedTuple):
    """Two pure functions over parameters {"model": those of a language model, "head": {"kernel": [D], "bias": []}}.

    init(key) -> params; consumes the key.

    apply(params, tokens [B, T], *, positions [B, T] = None, mask = Causal()) -> float32 [B, T].
    """

    init: Callable
    apply: Callable


def scalar_model(model: LanguageModel) -> ScalarModel:
    """A value for every token, linear in the last hidden state: a critic's, or, read at the last token, a reward."""

    def init(key):
        return with_head(model, model.init(key))

    def apply(params, tokens, *, positions=None, mask=None):
        hidden, _ = model.apply(params["model"], tokens, positions=positions, mask=mask)
        head = params["head"]
        return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]

    return ScalarModel(init, apply)


def with_head(model: LanguageModel, params) -> dict:
    """A language model's parameters with a head that says 0 of everything."""
    width = jax.eval_shape(model.unembedding, params).shape[0]
    return {"model": params, "head": {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}}
