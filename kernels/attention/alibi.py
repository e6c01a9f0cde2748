"""Attention with linear biases: a query sees a key the less, the farther away it stands."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def alibi_slopes(heads: int) -> jax.Array:
    """The slopes of Press, Smith and Lewis (2021, arXiv:2108.12409), [heads].

    2^(-8 i / n), i = 1 .. n for n heads, a power of two; other numbers take the slopes of the power of two below, and
    then every second of the next one's.

    Raises:
      ValueError: heads below 1.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads = {heads}, expected at least 1.")
    below = 2 ** math.floor(math.log2(heads))
    series = lambda n: [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    return jnp.array(series(below) + series(2 * below)[::2][: heads - below], jnp.float32)


def alibi_bias(slope: Any, q: Any, k: Any) -> jax.Array:
    """-slope |q - k| for queries and keys by their rows and columns of the mask; float32, all broadcast together."""
    return -slope * jnp.abs(q - k).astype(jnp.float32)
