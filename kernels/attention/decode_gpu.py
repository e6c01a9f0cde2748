"""Decoding on Hopper GPUs with the kernel of `gpu`: what is wanted is that the cache streams in once, at full speed.

The queries that share a key head are rows of one tile, each with its own span of keys. Where rows and key heads are
fewer than multiprocessors, each row's cache is cut into parts that are worked on at once, and their results are merged
by their log-sum-exp (Flash-Decoding). Pages are fetched where they lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import gpu, masks
from jaxrl.kernels.attention.gpu_kernels import BLOCK, Settings
from jaxrl.kernels.attention.reference import MASKED, SEEN

BLOCKS = 2 * 132  # thread blocks that keep an H100 busy
PART = 512  # keys in a part, at least


def refusal(q, k, v, block_table) -> str | None:
    """Why the kernel cannot serve a call, or None if it can."""
    b, t, h, d = q.shape
    page, heads = k.shape[1:3]
    if t * (h // max(heads, 1)) > BLOCK:
        return f"the Mosaic GPU kernel takes up to {BLOCK} queries for each key head, not {t} x {h // heads}"
    if block_table is not None and (page % 8 or BLOCK // 2 % page and page % BLOCK):
        return f"the Mosaic GPU kernel takes pages of 8, 16, 32, 64 or a multiple of {BLOCK} tokens, not {page}"
    if block_table is None and page % 8:
        return f"the Mosaic GPU kernel would copy a cache whose S is no multiple of 8, as {page}"
    if d % 64 or v.shape[3] % 64:
        return f"the Mosaic GPU kernel would copy a cache whose D or Dv is no multiple of 64, as {d} and {v.shape[3]}"
    return gpu.refusal(q, k, v, masks.Full(), 1.0, None, None, None, None)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    block_table: jax.Array | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of few queries over a cache; what no query sees in it must be finite.

    Args:
      q: [B, T, H, D]. k: [B, S, K, D] or [P, page, K, D]. v: [B, S, K, Dv] or [P, page, K, Dv].
      start, stop: int32 [B, T]: query i of row b sees the keys start[b, i] <= s < stop[b, i].
      block_table: int32 [B, N] or None, as in `decode_attention`.
      scale, soft_cap: as in `attention`; Python numbers.

    Returns:
      o [B, T, H, Dv] in the dtype of q, lse [B, T, H] float32.
    """
    b, t, h, d = q.shape
    heads, dv = k.shape[2], v.shape[3]
    keys = k.shape[1] if block_table is None else k.shape[1] * block_table.shape[1]
    parts = _parts(b * heads, keys, 1 if block_table is None else k.shape[1])
    size, group = keys // parts, h // heads
    if block_table is None:
        k, v = (x.reshape(b * parts, size, heads, -1) for x in (k, v))
    else:
        block_table = block_table.reshape(b * parts, -1)
        block_table = jnp.pad(block_table, ((0, 0), (0, -size % BLOCK // k.shape[1])))
    rows = q.reshape(b, t, heads, group, d).swapaxes(2, 3).reshape(b, t * group, heads, d)
    rows = jnp.pad(rows, ((0, 0), (0, -t * group % 8), (0, 0), (0, 0)))  # as TMA wants them
    first = size * jnp.arange(parts, dtype=jnp.int32).reshape(1, parts, 1)
    spans = (jnp.clip(jnp.repeat(x, group, axis=1)[:, None] - first, 0, size) for x in (start, stop))
    mask = masks.Span(*(x.reshape(b * parts, t * group) for x in spans))
    settings = Settings(scale, soft_cap, rows.shape[1], size, 1, BLOCK, BLOCK, gpu.STAGES)
    zero = jnp.zeros((), jnp.int32)
    o, lse = gpu.run_forward(settings, jnp.repeat(rows, parts, axis=0), k, v, mask, zero, block_table)
    o, lse = o[:, : t * group], lse[:, :, : t * group]
    o, lse = _merged(o.reshape(b, parts, t * group, heads, dv), lse.reshape(b, parts, heads, t * group))
    o = o.reshape(b, t, group, heads, dv).swapaxes(2, 3).reshape(b, t, h, dv)
    return o.astype(q.dtype), lse.reshape(b, heads, t, group).transpose(0, 2, 1, 3).reshape(b, t, h)


def _parts(blocks: int, keys: int, page: int) -> int:
    """Into how many parts each row's keys are cut: a power of two."""
    parts = 1
    while blocks * parts < BLOCKS and keys % (2 * parts * max(page, BLOCK)) == 0 and keys >= 2 * parts * PART:
        parts *= 2
    return parts


def _merged(o, lse):
    """o [B, P, rows, K, Dv] and lse [B, P, K, rows] of P parts of the keys, as if of all of them, in float32."""
    top = jnp.max(lse, axis=1, keepdims=True)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=1, keepdims=True)
    shares = jnp.swapaxes(weights / total, 2, 3)[..., None]
    total_lse = jnp.where(top < SEEN, MASKED, top + jnp.log(total))
    return jnp.sum(shares * o, axis=1), lax.squeeze(total_lse, (1,))
