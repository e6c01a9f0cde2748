"""Attention by tiles with an online softmax, in plain XLA: O(T) memory forward and backward.

One head at a time, one block of queries against one block of keys at a time. The forward pass keeps a running
maximum m, sum l and weighted values acc per query; the backward pass computes each tile's weights anew from
the saved log-sum-exp, keys down and queries across, so that no product has a transposed factor but one. Tiles that
the mask empties are not visited, and tiles in which it allows every pair are not masked.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import masks
from jaxrl.kernels.attention.band import band_forward, band_gradients
from jaxrl.kernels.attention.blocked_tile import (
    Residuals,
    Settings,
    absorb,
    finish,
    kept_of,
    logits_of,
    nothing,
    slopes_of,
)
from jaxrl.kernels.attention.dropout import Dropout
from jaxrl.kernels.attention.reference import SEEN
from jaxrl.kernels.platform import platform
from jaxrl.kernels.varying import vary_alike

BLOCK = {"cpu": 256}  # tile side by platform; on CPU 256 takes the least processor time of 64 .. 2048
LEAST = {"cpu": 64}  # where the mask has a short reach: a quarter of it, but no less than this
BAND = {"cpu": 64}  # queries at a time where a band of keys moves along with them; elsewhere always tiles
BAND_REACH = 1024  # up to which reach a band stays in the cache


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: masks.Mask,
    q_offset: int | jax.Array = 0,
    scale: float,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout: Dropout | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    band: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`dense_attention` with O(T) memory (and that of the bias, where one is given).

    (Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.)

    Args:
      q: [B, T, H, D]. k: [B, S, K, D]. v: [B, S, K, Dv].
      mask, q_offset, scale, soft_cap, bias, alibi, sinks: as in `attention`; scale and soft_cap are Python numbers.
      dropout: rate and seed, or None.
      block_q, block_k: upper bounds on the tile's sides; default by platform and the mask's reach.
      band: queries at a time where a band of keys moves along with them (see `band`), for masks with a reach and
        without a bias; 0 for tiles; default by platform, lengths and the mask's reach.

    Returns:
      o [B, T, H, Dv] in the dtype of q, and lse [B, H, T] in float32.

    Raises:
      ValueError: scale or soft_cap traced, or a band that does not serve the call.
    """
    for name, value in (("scale", scale), ("soft_cap", soft_cap)):
        if not isinstance(value, int | float | None):
            raise ValueError(
                f'attention: implementation="xla" needs {name} as a Python number, got '
                f'{type(value).__name__}; use implementation="reference".'
            )
    if band is None:
        band = 0 if block_q or block_k else _band(mask, bias, q.shape[1], k.shape[1])
    if band and (mask.reach() is None or bias is not None or k.shape[1] < band):
        raise ValueError(
            f"attention: a band of {band} needs a mask with a reach (such as Window), no bias, and at least {band} "
            f"keys, got {type(mask).__name__} and S = {k.shape[1]}; use band=0."
        )
    block = _side(mask)
    sides = _block(q.shape[1], block_q or block), _block(k.shape[1], block_k or block)
    rate, seed = (0.0, None) if dropout is None else dropout
    settings = Settings(scale, soft_cap, *sides, rate, band)
    arrays = (q, k, v, bias, sinks, mask, jnp.asarray(q_offset, jnp.int32), alibi, seed)
    leaves, structure = jax.tree.flatten(arrays)
    # outside of the custom derivative: what comes back to an array that shards share is then summed over them
    return _attention(settings, *jax.tree.unflatten(structure, vary_alike(*leaves)))


def _side(mask) -> int:
    """The upper bound on the tile's sides: small tiles waste less where few of them live."""
    target, reach = platform(), mask.reach()
    most = BLOCK.get(target, 512)
    return most if reach is None else min(most, max(LEAST.get(target, most), reach // 4))


def _band(mask, bias, t: int, s: int) -> int:
    """Queries at a time in the band form where it pays, else 0."""
    side, reach = BAND.get(platform(), 0), mask.reach()
    pays = side and reach is not None and bias is None and reach <= BAND_REACH and t >= side and s >= 2 * (reach + side)
    return side if pays else 0


def _block(length: int, limit: int) -> int:
    """The side of equal blocks that cover `length` with little overhang: at most `limit`, a multiple of 8."""
    count = -(-length // limit)
    return -(-length // (count * 8)) * 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, v, bias, sinks, mask, q_offset, alibi, seed):
    return _either_forward(settings, q, k, v, bias, sinks, mask, q_offset, alibi, seed)[0]


def _either_forward(settings, q, k, v, bias, sinks, mask, q_offset, alibi, seed):
    if not settings.band:
        return _forward(settings, q, k, v, bias, sinks, mask, q_offset, alibi, seed)
    o, lse = band_forward(settings, q, k, v, sinks, mask, q_offset, alibi, seed)
    return (o, lse), Residuals(q, k, v, bias, sinks, mask, q_offset, o, lse, alibi, seed)


def _forward(settings, q, k, v, bias, sinks, mask, q_offset, alibi=None, seed=None):
    b, t, h, _ = q.shape
    s, heads = k.shape[1], k.shape[2]
    group = h // heads
    bq, bk = settings.block_q, settings.block_k
    nq, nk = -(-t // bq), -(-s // bk)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    bias_tiles = _pad_bias(bias, t, s, nq * bq, nk * bk)

    def one_group(n):  # one key head and the query heads that share it
        row = n // heads
        qh = _heads(q, row, n % heads * group, group, nq * bq)
        kh, vh = (_heads(x, row, n % heads, 1, nk * bk) for x in (k, v))

        def one_block(gi):
            g, i = gi // nq, gi % nq
            head = n % heads * group + g
            qi = _slice(qh, g, i, bq).astype(acc) * settings.scale
            tile_of = lambda j: _tile(i, j, settings, row, head, q_offset, s)

            def visit(mask, j, carry):
                kj, vj = _slice(kh, 0, j, bk).astype(acc), _slice(vh, 0, j, bk).astype(acc)
                tile = tile_of(j)
                logits, _ = logits_of(settings, qi, kj, tile, mask, alibi, _part(bias_tiles, tile, i))
                return absorb(carry, logits, vj, kept_of(settings, seed, tile))

            *empty, _ = vary_alike(*nothing(bq, v.shape[-1], acc), qi)
            carry = _over_tiles(mask, tile_of, nk, visit, tuple(empty))
            o, lse = finish(carry, None if sinks is None else sinks[head].astype(acc))
            return o.astype(q.dtype), lse

        o, lse = lax.map(one_block, jnp.arange(group * nq))
        return o.reshape(group, nq * bq, -1)[:, :t], lse.reshape(group, nq * bq)[:, :t]

    o, lse = lax.map(one_group, jnp.arange(b * heads))
    o = jnp.swapaxes(o.reshape(b, h, t, -1), 1, 2)
    lse = lse.reshape(b, h, t)
    return (o, lse), Residuals(q, k, v, bias, sinks, mask, q_offset, o, lse, alibi, seed)


def _backward(settings, residuals, cotangents):
    return _gradients(settings, residuals, cotangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(settings, residuals, cotangents):
    """With delta = rowsum(do * o):  p = exp(s - lse);  dv = p^T do;  ds = p (do v^T - delta + dlse);
    dq = scale ds k;  dk = scale ds^T q;  dsink = sum exp(sink - lse) (dlse - delta).
    """
    residuals, (do, dlse) = Residuals(*residuals), cotangents
    sinks, o, lse = residuals.sinks, residuals.o, residuals.lse
    acc = lse.dtype
    delta = jnp.einsum("bthd,bthd->bht", do.astype(acc), o.astype(acc)) - dlse
    if settings.band:
        (dq, dk, dv), dbias = band_gradients(settings, residuals, do, delta), None
    else:
        dq, dk, dv, dbias = _tile_gradients(settings, residuals, do, delta)
    dsinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(acc)[None, :, None] - lse)
        dsinks = -jnp.sum(weight * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, dbias, dsinks, None, None, None, None


def _tile_gradients(settings, residuals, do, delta):
    q, k, v, bias, _, mask, q_offset, _, lse, alibi, seed = residuals
    acc = lse.dtype
    b, t, h, d = q.shape
    s, heads = k.shape[1], k.shape[2]
    group = h // heads
    bq, bk = settings.block_q, settings.block_k
    nq, nk = -(-t // bq), -(-s // bk)
    qh, kh, vh = _by_head(q, nq * bq), _by_head(k, nk * bk), _by_head(v, nk * bk)
    kt, doh = jnp.swapaxes(kh, 1, 2), _by_head(do, nq * bq)
    pad = ((0, 0), (0, nq * bq - t))
    delta_h = jnp.pad(delta.reshape(b * h, t), pad)
    lse_h = jnp.pad(jnp.where(lse < SEEN, 0.0, lse).reshape(b * h, t), pad)
    bias_tiles = _pad_bias(bias, t, s, nq * bq, nk * bk)

    def one_group(dbias, n):  # one key head and the query heads that share it
        row = n // heads

        def one_block(carry, j):
            kj, vj = _slice(kh, n, j, bk).astype(acc), _slice(vh, n, j, bk).astype(acc)
            kjt = lax.dynamic_slice(kt, (n, 0, j * bk), (1, d, bk))[0].astype(acc) * settings.scale

            def tile_of(gi):
                return _tile(gi % nq, j, settings, row, (n % heads) * group + gi // nq, q_offset, s)

            def visit(mask, gi, carry):
                dqt, dbias, dk, dv = carry
                g, i, tile = gi // nq, gi % nq, tile_of(gi)
                m = row * h + (n % heads) * group + g
                qi, doi = _slice(qh, m, i, bq).astype(acc) * settings.scale, _slice(doh, m, i, bq).astype(acc)
                bias_part, kept = _part(bias_tiles, tile, i), kept_of(settings, seed, tile)
                logits, slope = logits_of(settings, kj, qi, tile, mask, alibi, bias_part, transposed=True)
                lse_i, delta_i = (_slice(x, m, i, bq)[None] for x in (lse_h, delta_h))
                passed, dcapped, ds = slopes_of(
                    logits, slope, lse_i, delta_i, vj @ doi.T, None if kept is None else kept.T
                )
                if dbias is not None:
                    dbias = _add_to_bias(dbias, dcapped.T, tile, i * bq)
                at = (g, 0, i * bq)
                dqi = lax.dynamic_slice(dqt, at, (1, d, bq)) + (kjt @ ds)[None]
                return lax.dynamic_update_slice(dqt, dqi, at), dbias, dk + ds @ qi, dv + passed @ doi

            zeros = jnp.zeros_like(kj), jnp.zeros_like(vj)
            dqt, dbias, dk, dv = _over_tiles(mask, tile_of, group * nq, visit, (*carry, *zeros))
            return (dqt, dbias), (dk.astype(k.dtype), dv.astype(v.dtype))

        dqt, _ = vary_alike(jnp.zeros((group, d, nq * bq), acc), q)
        (dqt, dbias), (dk, dv) = lax.scan(one_block, (dqt, dbias), jnp.arange(nk))
        dq = jnp.swapaxes(dqt[:, :, :t], 1, 2).astype(q.dtype)
        return dbias, (dq, dk.reshape(nk * bk, -1)[:s], dv.reshape(nk * bk, -1)[:s])

    dbias = None if bias_tiles is None else vary_alike(jnp.zeros(bias_tiles.shape, acc), q)[0]
    dbias, (dq, dk, dv) = lax.scan(one_group, dbias, jnp.arange(b * heads))
    dq = jnp.swapaxes(dq.reshape(b, h, t, d), 1, 2)
    dk = jnp.swapaxes(dk.reshape(b, heads, s, d), 1, 2)
    dv = jnp.swapaxes(dv.reshape(b, heads, s, -1), 1, 2)
    if bias is not None and dbias is not None:
        dbias = lax.slice(dbias, (0, 0, 0, 0), bias.shape).astype(bias.dtype)
    return dq, dk, dv, dbias


_attention.defvjp(_either_forward, _backward)


@_gradients.defjvp
def _second_derivatives(settings, primals, tangents):
    raise ValueError(
        'attention: implementation="xla" has no second derivatives; use implementation="reference", which has all.'
    )


def _over_tiles(mask, tile_of, count, visit, carry):
    """Visits the tiles 0 .. count - 1 that the mask does not empty, first those in which it allows every pair.

    Args:
      tile_of: (index) -> Tile.
      visit: (mask, index, carry) -> carry; the mask is None where nothing is masked.
    """
    if isinstance(mask, masks.Full):
        mask = None
    first = tile_of(0)
    if first.k_length % first.k_size:
        mask = masks.Exists() if mask is None else masks.Exists() & mask
    if mask is None:
        return lax.fori_loop(0, count, functools.partial(visit, None), carry)

    def kind(index):
        live, full = (jnp.asarray(f(tile_of(index)), jnp.int32) for f in (mask.live, mask.full))
        return live * (1 + full)

    kinds = lax.map(kind, jnp.arange(count))
    order = jnp.argsort(kinds, descending=True, stable=True)
    full, live = jnp.sum(kinds == 2), jnp.sum(kinds > 0)
    carry = lax.fori_loop(0, full, lambda n, carry: visit(None, order[n], carry), carry)
    return lax.fori_loop(full, live, lambda n, carry: visit(mask, order[n], carry), carry)


def _tile(i, j, settings, row, head, q_offset, s) -> masks.Tile:
    bq, bk = settings.block_q, settings.block_k
    return masks.Tile(q_offset + i * bq, bq, j * bk, bk, s, row, head)


def _by_head(x: jax.Array, length: int) -> jax.Array:
    """[B, T, H, D] -> [B * H, length, D], zeros at the end."""
    b, t, h, d = x.shape
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - t), (0, 0))).reshape(b * h, length, d)


def _heads(x: jax.Array, row, first, count: int, length: int) -> jax.Array:
    """`_by_head` of `count` heads of one row: in loops over heads it spares copies of the whole."""
    return _by_head(lax.dynamic_slice(x, (row, 0, first, 0), (1, x.shape[1], count, x.shape[3])), length)


def _slice(x: jax.Array, n, i, size: int) -> jax.Array:
    """x[n, i * size : (i + 1) * size]."""
    start, sizes = (n, i * size) + (0,) * (x.ndim - 2), (1, size) + x.shape[2:]
    return lax.dynamic_slice(x, start, sizes)[0]


def _pad_bias(bias, t: int, s: int, t_padded: int, s_padded: int):
    if bias is None:
        return None
    pad_t = 0 if bias.shape[2] == 1 else t_padded - t
    pad_s = 0 if bias.shape[3] == 1 else s_padded - s
    return jnp.pad(bias, ((0, 0), (0, 0), (0, pad_t), (0, pad_s)))


def _part(bias, tile, i):
    """The tile's part of the bias, or None."""
    if bias is None:
        return None
    return lax.dynamic_slice(bias, *_bias_window(bias, tile, i * tile.q_size))[0, 0]


def _bias_window(bias, tile, q_first) -> tuple[tuple, tuple[int, ...]]:
    """Start and sizes of the tile's part of the bias; broadcast axes keep length 1."""
    full = (tile.row, tile.head, q_first, tile.k_first)
    sizes = (1, 1, tile.q_size, tile.k_size)
    wide = [n > 1 for n in bias.shape]
    return (
        tuple(f if w else 0 for f, w in zip(full, wide, strict=True)),
        tuple(n if w else 1 for n, w in zip(sizes, wide, strict=True)),
    )


def _add_to_bias(dbias, ds, tile, q_first):
    start, sizes = _bias_window(dbias, tile, q_first)
    summed = tuple(axis for axis, n in enumerate(sizes[2:]) if n == 1)
    ds = jnp.sum(ds, axis=summed, keepdims=True)[None, None]
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, start, sizes) + ds, start)
