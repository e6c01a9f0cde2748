"""Attention as the formula reads: dense, float32. The oracle of the other implementations, and the fastest
form for short sequences."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # a logit that is as good as -inf, but whose differences are numbers
SEEN = -1e29  # a row maximum below this means that the row has seen no key


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    allowed: jax.Array | None,
    scale: float,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    kept: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(scale * q k^T) + bias) v over the allowed keys; O(T S) memory.

    Args:
      q: [B, T, H, D]. k: [B, S, K, D]. v: [B, S, K, Dv].
      allowed: bool, broadcastable to [B, H, T, S], or None for all.
      scale, soft_cap, bias, sinks: as in `attention`.
      kept: what dropout multiplies the weights with, broadcastable to [B, H, T, S], or None.

    Returns:
      o [B, T, H, Dv] in the dtype of q, and lse [B, H, T] in float32 (about -1e30 where nothing is seen).
    """
    b, t, h, d = q.shape
    s, heads = k.shape[1], k.shape[2]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    # the queries of one key head are the rows of one matrix: a few long products, not many small ones
    grouped = jnp.swapaxes(q, 1, 2).reshape(b, heads, h // heads * t, d)
    logits = jnp.einsum("bknd,bskd->bkns", grouped, k, preferred_element_type=acc).reshape(b, h, t, s)
    logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias.astype(acc)
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=MASKED)
    if sinks is not None:
        sink = sinks.astype(acc).reshape(1, h, 1, 1)
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(top < SEEN, 0.0, top))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(total), MASKED)[..., 0]
    weights = weights / total
    if kept is not None:
        weights = weights * kept
    weights = weights.reshape(b, heads, h // heads * t, s)
    o = jnp.einsum("bkns,bskd->bknd", weights, v.astype(acc)).reshape(b, h, t, v.shape[-1])
    return jnp.swapaxes(o, 1, 2).astype(q.dtype), lse


def with_sinks(o: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] and lse [B, T, H] with a sink for each head: a key without a value, that only takes its share."""
    if sinks is None:
        return o, lse
    total = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, None])
    return (o * jnp.exp(lse - total)[..., None]).astype(o.dtype), total
