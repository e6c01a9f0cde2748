"""What the TPU kernels of attention compute on one tile. Everything is transposed: keys down, queries across.

So the statistics of a query lie along lanes, where a TPU broadcasts and reduces them cheaply. Logits are in base 2:
log2(e) is folded into the queries. A tile is worked on in pieces, whose first products are begun some pieces ahead: the
matrix units then have work while the vector units are at the softmax of the piece before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrl.kernels.attention import tiles
from jaxrl.kernels.attention.alibi import alibi_bias
from jaxrl.kernels.attention.dropout import keep_factor
from jaxrl.kernels.attention.reference import MASKED, SEEN

LOG2E = math.log2(math.e)
_NT, _TN = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


class Pieces(NamedTuple):
    """How a kernel goes through a tile."""

    q: int
    k: int
    ahead: int
    """Pieces whose products are begun before they are needed."""


class Settings(NamedTuple):
    """What is static about a call."""

    scale: float
    soft_cap: float | None
    alibi: bool
    dropout: float  # rate
    k_length: int  # keys of the whole mask
    group: int  # query heads of one key head
    block_q: int
    block_k: int
    forward: Pieces
    backward: Pieces
    dq_across: bool  # sum dq up as [D, queries], else as [queries, D]
    dkv_across: bool  # sum dk and dv up as [D, keys], else as [keys, D]
    unmasked: bool  # the mask allows all
    structure: Any  # of the mask
    kinds: tuple[str, ...]  # of its leaves: "q", "k", "row"

    @property
    def query_factor(self) -> float:
        """What queries are multiplied with beforehand."""
        return self.scale * LOG2E if self.soft_cap is None else self.scale / self.soft_cap

    @property
    def slope(self) -> float:
        """d logit (in base e, before the soft cap's bend) / d (product of such a query and a key)."""
        return self.scale / self.query_factor


class Scalars(NamedTuple):
    """What lies in scalar memory."""

    entries: Any  # int32 [B|1, n], see `tiles.Tiles`
    numbers: Any  # int32 [4]: where query 0 and key 0 stand in the mask, seed of the dropout
    slopes: Any  # float32 [H]
    rows: Any  # the mask's int32 [B]


class Place(NamedTuple):
    """Where a step of the grid stands."""

    row: Any
    head: Any
    entry: Any
    i: Any  # block of queries
    j: Any  # block of keys


class KernelTile(NamedTuple):
    """A tile with the mask's arrays already cut to it (a `masks.Rectangle`)."""

    q_first: Any
    k_first: Any
    q_size: int
    k_size: int
    k_length: int

    @property
    def q_last(self):
        return self.q_first + (self.q_size - 1)

    @property
    def k_last(self):
        return self.k_first + (self.k_size - 1)

    @property
    def q(self):
        return self.q_first + lax.broadcasted_iota(jnp.int32, (self.k_size, self.q_size), 1)

    @property
    def k(self):
        return self.k_first + lax.broadcasted_iota(jnp.int32, (self.k_size, self.q_size), 0)

    def of_query(self, values):
        return values

    of_key = of_row = of_query

    def of_pair(self, values):
        raise ValueError("the Pallas kernel does not take dense masks")


def _dot(a, b, dims):
    """A product with float32 sums; of float32 factors in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _each_piece(settings: Settings, pieces: Pieces, entry, begin, finish):
    """finish(masked, queries, keys, begin(queries, keys)) for each piece of a tile, in the form that the tile needs."""
    queries = [pl.ds(n, pieces.q) for n in range(0, settings.block_q, pieces.q)]
    keys = [pl.ds(n, pieces.k) for n in range(0, settings.block_k, pieces.k)]
    order = [(q, k) for k in keys for q in queries]

    def all_pieces(masked):
        begun = [begin(*piece) for piece in order[: pieces.ahead]]
        for n, piece in enumerate(order):
            begun += [begin(*piece) for piece in order[n + pieces.ahead : n + pieces.ahead + 1]]
            finish(masked, *piece, begun.pop(0))

    is_full = (entry & tiles.FULL) != 0
    pl.when(is_full)(lambda: all_pieces(False))
    if not settings.unmasked:
        pl.when(((entry & tiles.LIVE) != 0) & ~is_full)(lambda: all_pieces(True))


def _logits(product, masked, queries, keys, mask_refs, settings: Settings, scalars: Scalars, place: Place):
    """Base-2 logits [keys, queries], the slope of the soft cap, and what dropout multiplies the weights with."""
    q_first = scalars.numbers[0] + place.i * settings.block_q + queries.start
    k_first = scalars.numbers[1] + place.j * settings.block_k + keys.start
    tile = KernelTile(q_first, k_first, queries.size, keys.size, settings.k_length)
    logits, slope, kept = product, None, None
    if settings.soft_cap is not None:
        bent = jnp.tanh(logits)
        logits, slope = bent * (settings.soft_cap * LOG2E), 1.0 - bent * bent
    if settings.alibi:
        logits = logits + alibi_bias(scalars.slopes[place.head] * LOG2E, tile.q, tile.k)
    if masked:
        blocks, rows = iter(mask_refs), iter(scalars.rows)
        cut = {"q": lambda ref: ref[0, :, queries], "k": lambda ref: ref[0, keys]}
        leaves = [next(rows)[place.row] if kind == "row" else cut[kind](next(blocks)) for kind in settings.kinds]
        allowed = jax.tree.unflatten(settings.structure, leaves).allowed(tile)
        logits = jnp.where(allowed, logits, MASKED)
    if settings.dropout:
        seed = [lax.convert_element_type(scalars.numbers[n], jnp.uint32) for n in (2, 3)]
        kept = keep_factor(settings.dropout, seed, place.row, place.head, tile.q, tile.k)
    return logits, slope, kept


def forward(settings: Settings, scalars: Scalars, place: Place, step, inputs, mask_refs, outputs, scratch):
    """Online softmax; o and lse (in base e) are written with the last tile of a block of queries."""
    q, k, v = inputs
    o, lse = outputs
    top, total, acc = scratch  # [1, queries], [1, queries], [Dv, queries]

    @pl.when((place.entry & tiles.FIRST) != 0)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def begin(queries, keys):
        return _dot(k[0, 0, keys], q[0, 0, queries], _NT)

    def finish(masked, queries, keys, product):
        logits, _, kept = _logits(product, masked, queries, keys, mask_refs, settings, scalars, place)
        before = top[:, queries]
        after = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
        origin = jnp.where(after < SEEN, 0.0, after) if masked else after
        p = jnp.exp2(logits - origin)
        decay = jnp.exp2(before - origin)
        total[:, queries] = total[:, queries] * decay + jnp.sum(p, axis=0, keepdims=True)
        if kept is not None:
            p = p * kept
        acc[:, queries] = acc[:, queries] * decay + _dot(v[0, 0, keys], p.astype(v.dtype), _TN)
        top[:, queries] = after

    _each_piece(settings, settings.forward, place.entry, begin, finish)

    @pl.when((place.entry & tiles.LAST) != 0)
    def _():
        seen = total[...] > 0
        safe = jnp.where(seen, total[...], 1.0)
        o[0, 0] = (acc[...] * (1.0 / safe)).T.astype(o.dtype)
        lse[0, 0] = jnp.where(seen, (top[...] + jnp.log2(safe)) * (1.0 / LOG2E), MASKED)


def _backward_pieces(settings, scalars, place, inputs, mask_refs, use):
    """use(queries, keys, passed, ds) for each piece: what a weight passes on to v, and d loss / d logit."""
    q, k, v, do, lse, delta = inputs

    def begin(queries, keys):
        return _dot(k[0, 0, keys], q[0, 0, queries], _NT), _dot(v[0, 0, keys], do[0, 0, queries], _NT)

    def finish(masked, queries, keys, begun):
        product, dp = begun
        logits, slope, kept = _logits(product, masked, queries, keys, mask_refs, settings, scalars, place)
        passed = p = jnp.exp2(logits - lse[0, 0, :, queries])
        if kept is not None:
            passed, dp = p * kept, dp * kept
        ds = p * (dp - delta[0, 0, :, queries])
        ds = ds if slope is None else ds * slope
        use(queries, keys, passed.astype(do.dtype), ds.astype(q.dtype))

    _each_piece(settings, settings.backward, place.entry, begin, finish)


def _add(across, acc, rows, weights, axis, x):
    """acc, [D, rows] or [rows, D] by `across`, grows by the product of weights and x over an axis of the weights."""
    if across:
        acc[:, rows] += _dot(x, weights, (((0,), (axis,)), ((), ())))
    else:
        acc[rows] += _dot(weights, x, (((axis,), (0,)), ((), ())))


def _sum_of(across, acc, dtype, factor=1.0):
    total = acc if factor == 1.0 else acc * factor
    return (total.T if across else total).astype(dtype)


def dq_only(settings: Settings, scalars: Scalars, place: Place, step, inputs, mask_refs, outputs, scratch):
    """dq of a block of queries, over its keys."""
    k = inputs[1]
    (dq,), (acc,) = outputs, scratch

    @pl.when((place.entry & tiles.FIRST) != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def use(queries, keys, _, ds):
        _add(settings.dq_across, acc, queries, ds, 0, k[0, 0, keys])

    _backward_pieces(settings, scalars, place, inputs, mask_refs, use)

    @pl.when((place.entry & tiles.LAST) != 0)
    def _():
        dq[0, 0] = _sum_of(settings.dq_across, acc[...], dq.dtype, settings.slope)


def dk_dv(settings: Settings, scalars: Scalars, place: Place, step, inputs, mask_refs, outputs, scratch):
    """dk and dv of a block of keys, over the queries of all heads that share it; and, fused, dq of a whole head."""
    q, k, _, do, _, _ = inputs
    dk, dv, *dq = outputs
    dk_acc, dv_acc, *dq_acc = scratch  # of a block of keys, and dq of [group, query blocks]

    @pl.when(((place.entry & tiles.FIRST) != 0) & (step.g == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    if dq:

        @pl.when(step.first)
        def _():
            dq_acc[0][...] = jnp.zeros_like(dq_acc[0])

    def use(queries, keys, passed, ds):
        _add(settings.dkv_across, dv_acc, keys, passed, 1, do[0, 0, queries])
        _add(settings.dkv_across, dk_acc, keys, ds, 1, q[0, 0, queries])
        if dq:
            _add(settings.dq_across, dq_acc[0].at[step.g, place.i], queries, ds, 0, k[0, 0, keys])

    _backward_pieces(settings, scalars, place, inputs, mask_refs, use)

    @pl.when(((place.entry & tiles.LAST) != 0) & (step.g == settings.group - 1))
    def _():
        dk[0, 0] = _sum_of(settings.dkv_across, dk_acc[...], dk.dtype, settings.slope)
        dv[0, 0] = _sum_of(settings.dkv_across, dv_acc[...], dv.dtype)

    if dq:

        @pl.when(step.dq_done)
        def _():
            dq[0][0, 0] = _sum_of(settings.dq_across, dq_acc[0][step.g, place.i], dq[0].dtype, settings.slope)
