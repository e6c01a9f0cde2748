"""What blocked attention computes on one block of queries against some keys: the formulas of `blocked` and `band`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import masks
from jaxrl.kernels.attention.alibi import alibi_bias
from jaxrl.kernels.attention.dropout import keep_factor
from jaxrl.kernels.attention.reference import MASKED, SEEN


class Settings(NamedTuple):
    """What is static about a call."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    dropout: float = 0.0  # rate
    band: int = 0  # queries of a block where a band of keys moves along with them; 0 for tiles


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    sinks: jax.Array | None
    mask: masks.Mask
    q_offset: jax.Array
    o: jax.Array
    lse: jax.Array
    alibi: jax.Array | None = None
    seed: jax.Array | None = None


def held(x: jax.Array) -> jax.Array:
    """x in memory, computed once: XLA's CPU backend would compute an exp again inside a sum, element by element."""
    return lax.optimization_barrier(x)


def logits_of(settings: Settings, a, b, tile, mask, alibi, bias=None, *, transposed=False) -> tuple[jax.Array, Any]:
    """The masked logits of one tile, a b^T, and the slope of the soft cap (1.0 without).

    [bq, bk] from queries (scaled) and keys; transposed, [bk, bq] from keys and queries. bias: the tile's part of it.
    """
    turned = (lambda x: x.T) if transposed else (lambda x: x)
    logits, slope = a @ b.T, 1.0
    if settings.soft_cap is not None:
        bent = jnp.tanh(logits / settings.soft_cap)
        logits, slope = settings.soft_cap * bent, 1.0 - bent * bent
    if bias is not None:
        logits = logits + turned(bias)
    if alibi is not None:
        logits = logits + turned(alibi_bias(alibi[tile.head], tile.q, tile.k)[0, 0])
    if mask is not None:
        logits = jnp.where(turned(mask.allowed(tile)[0, 0]), logits, MASKED)
    return logits, slope


def kept_of(settings: Settings, seed, tile) -> jax.Array | None:
    """What dropout multiplies the weights of a tile with, [bq, bk]."""
    return None if seed is None else keep_factor(settings.dropout, seed, tile.row, tile.head, tile.q, tile.k)[0, 0]


def nothing(rows: int, size: int, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The maximum, sum and weighted values of queries that have seen no key."""
    return jnp.full((rows,), MASKED, dtype), jnp.zeros((rows,), dtype), jnp.zeros((rows, size), dtype)


def absorb(carry, logits: jax.Array, v: jax.Array, kept: jax.Array | None):
    """Maximum, sum and weighted values [rows], [rows], [rows, Dv] after more keys; logits [rows, keys]."""
    m, total, o = carry
    logits = held(logits)
    m_new = jnp.maximum(m, jnp.max(logits, axis=-1))
    safe = jnp.where(m_new < SEEN, 0.0, m_new)
    p = held(jnp.exp(logits - safe[:, None]))
    decay = jnp.exp(m - safe)
    total = total * decay + jnp.sum(p, axis=-1)
    p = p if kept is None else p * kept
    return m_new, total, o * decay[:, None] + p @ v


def finish(carry, sink: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """o [rows, Dv] and lse [rows] when all keys, and the sink, have been seen."""
    m, total, o = carry
    if sink is not None:
        top = jnp.maximum(m, sink)
        decay = jnp.exp(m - top)
        o, total, m = o * decay[:, None], total * decay + jnp.exp(sink - top), top
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return o / total[:, None], jnp.where(seen, m + jnp.log(total), MASKED)


def slopes_of(logits, slope, lse, delta, dp, kept) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p = exp(s - lse);  ds = p (do v^T - delta): what a weight passes on to v, d loss / d capped logit and / d logit.

    dp is do v^T; queries lie along either axis, lse and delta broadcast along the other.
    """
    p = held(jnp.exp(logits - lse))
    passed = p
    if kept is not None:
        dp, passed = dp * kept, p * kept
    ds = p * (dp - delta)
    return passed, ds, held(ds * slope)
