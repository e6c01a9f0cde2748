"""Scalar models on rollouts: a critic's values before each token, a reward model's after each."""

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.scalar_model import scalar_model
from jaxrl.types import Rollout


def token_scalars(model: LanguageModel, params, completions: Rollout) -> jax.Array:
    """What a scalar model says of each state of a completion: after its prompt, after one token, ..., `[B, 1 + C]`.

    Args:
      model: what the scalar model is built on; see `scalar_model`.
      params: of `scalar_model(model)`.
      completions: `B` completions of width `C`. Columns after the end hold values of padding.
    """
    columns = jnp.arange(completions.tokens.shape[1])[None]
    padding = (completions.prompt_width - completions.prompt_lengths)[:, None]
    scalars = scalar_model(model).apply(
        params,
        completions.tokens,
        positions=jnp.maximum(columns - padding, 0),
        mask=Causal() & Segments((columns >= padding).astype(jnp.int32)),
    )
    return scalars[:, completions.prompt_width - 1 :]
