"""Rewards for length, in tokens."""

import jax
import jax.numpy as jnp


def soft_overlong(lengths: jax.Array, *, limit: int, buffer: int) -> jax.Array:
    """DAPO's punishment of completions that come near the limit (Yu et al. 2025, arXiv 2503.14476, equation 13).

        0 up to limit - buffer tokens; then ((limit - buffer) - length) / buffer; -1 beyond the limit

    Args:
      lengths: `[...]` tokens, the EOS included.
      limit: tokens at most.
      buffer: tokens before the limit in which the punishment rises.

    Returns:
      float32 in [-1, 0].
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong buffer is {buffer} tokens; expected 1 to the limit of {limit}")
    return jnp.clip((limit - buffer - lengths.astype(jnp.float32)) / buffer, -1.0, 0.0)


def relative_length(lengths: jax.Array, correct: jax.Array) -> jax.Array:
    """Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3): short answers of a group are better.

        l = 1/2 - (length - shortest) / (longest - shortest);  l if correct, min(0, l) if not; 0 where all are as long

    Args:
      lengths: `[P, G]` tokens.
      correct: `[P, G]` bool.

    Returns:
      `[P, G]` float32 in [-1/2, 1/2], to be added to the reward with a weight.
    """
    lengths = lengths.astype(jnp.float32)
    shortest, longest = lengths.min(1, keepdims=True), lengths.max(1, keepdims=True)
    spread = longest - shortest
    value = 0.5 - (lengths - shortest) / jnp.maximum(spread, 1.0)
    return jnp.where(spread > 0, jnp.where(correct, value, jnp.minimum(value, 0.0)), 0.0)
