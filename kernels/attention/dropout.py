"""Dropout of attention weights without a stored mask: whether a pair is kept follows from its position."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Dropout(NamedTuple):
    """A share `rate` of the weights is dropped, the rest divided by 1 - rate."""

    rate: float
    seed: jax.Array  # uint32 [2]


def dropout_of(rate: float, key: jax.Array | None) -> Dropout | None:
    """None for rate 0; consumes the key otherwise.

    Raises:
      ValueError: a rate outside [0, 1), or a rate without a key.
    """
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"attention: dropout = {rate!r}, expected a number in [0, 1).")
    if rate == 0:
        return None
    if key is None:
        raise ValueError(f"attention: dropout = {rate} needs dropout_key, a key of jax.random.key.")
    return Dropout(float(rate), jax.random.bits(key, (2,), jnp.uint32))


def keep_factor(rate: float, seed: Any, row: Any, head: Any, q: Any, k: Any) -> jax.Array:
    """0 or 1 / (1 - rate) for each pair: what its weight is multiplied with.

    Every implementation and every tile finds the same bits again: they are a hash of seed, batch row, head,
    query and key (Murmur3's 32-bit finaliser, once for each query and once more for each pair).

    Args:
      seed: two uint32 scalars.
      row, head, q, k: int32, broadcastable to each other; q and k as rows of the mask.
    """
    u32 = lambda x: lax.convert_element_type(x, jnp.uint32)
    stream = _mix(seed[0] ^ (u32(row) * jnp.uint32(0x9E3779B1)))
    stream = _mix(stream ^ (seed[1] + u32(head) * jnp.uint32(0x85EBCA77)))
    stream = _mix(stream + u32(q) * jnp.uint32(0xC2B2AE3D))
    bits = _mix(stream + u32(k) * jnp.uint32(0x27D4EB2F))
    # compared as int32, which every unit can: the top 31 bits
    kept = lax.convert_element_type(bits >> 1, jnp.int32) >= jnp.int32(min(round(rate * 2**31), 2**31 - 1))
    return jnp.where(kept, 1.0 / (1.0 - rate), 0.0)


def _mix(x):
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
