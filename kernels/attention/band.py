"""Attention under a mask of short reach, in plain XLA: a band of keys moves along with the queries.

Queries come block by block. The keys and values that a block may see, those of its own rows and of the blocks before,
lie in a band of their own, in which each step puts one block of keys in the place of the oldest. So a key is copied
once, and a block of queries takes one product with all that it sees and a softmax without corrections. In which order
the keys lie does not matter: each brings its index, which the mask judges. Keys further on are looked at only where
the mask says that they live. The backward pass moves the same band, with sums of dk and dv beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import masks
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
from jaxrl.kernels.attention.reference import SEEN
from jaxrl.kernels.varying import vary_alike


class Keys(NamedTuple):
    """Some keys in any order."""

    k: jax.Array  # [keys, D]
    v: jax.Array  # [keys, Dv]
    index: jax.Array  # int32 [keys], of the mask; k_length where there is no key


class Pairs(NamedTuple):
    """Some queries against some keys, each with its own index (a `masks.Rectangle`), of one row and query head."""

    q: jax.Array  # int32 [1, 1, queries, 1]
    k: jax.Array  # int32 [1, 1, 1, keys]
    k_length: int
    row: Any
    head: Any

    @property
    def q_first(self):
        return jnp.min(self.q)

    @property
    def q_last(self):
        return jnp.max(self.q)

    @property
    def k_first(self):
        return jnp.min(self.k)

    @property
    def k_last(self):
        return jnp.max(self.k)

    def of_query(self, values):
        return jnp.take(_pick(values, self.row, 0), self.q.ravel(), axis=1, mode="clip")[:, None, :, None]

    def of_key(self, values):
        return jnp.take(_pick(values, self.row, 0), self.k.ravel(), axis=1, mode="clip")[:, None, None]

    def of_row(self, values):
        return _pick(values, self.row, 0)[:, None, None, None]

    def of_pair(self, values):
        values = _pick(_pick(values, self.row, 0), self.head, 1)
        values = jnp.take(values, self.q.ravel(), axis=2, mode="clip")
        return jnp.take(values, self.k.ravel(), axis=3, mode="clip")


def _pick(values, index, axis: int):
    return values if values.shape[axis] == 1 else lax.dynamic_index_in_dim(values, index, axis)


class Walk(NamedTuple):
    """One head's way over blocks of `side` queries; block b of keys stands at the rows of block b of queries."""

    settings: Settings
    mask: masks.Mask
    k: jax.Array  # [B, S, K, D]
    v: jax.Array
    q_offset: Any
    row: Any
    head: Any  # of the queries
    group: int
    acc: Any

    @property
    def side(self) -> int:
        return self.settings.band

    @property
    def behind(self) -> int:
        """Blocks of keys that a block of queries may see before its own."""
        return -(-((self.mask.reach() or 0) - 1) // self.side)

    def first(self, b):
        """Where block b of keys is read: no further out than there are keys."""
        return jnp.clip(self.q_offset + b * self.side, 0, self.k.shape[1] - self.side)

    def slot(self, b):
        """Where in the band block b lies, b >= -(behind + 1)."""
        return lax.rem(b + 2 * self.behind + 1, self.behind + 1) * self.side

    def keys(self, b) -> Keys:
        """Block b."""
        wanted, first = self.q_offset + b * self.side, self.first(b)
        index = first + jnp.arange(self.side, dtype=jnp.int32)
        own = (index >= wanted) & (index < wanted + self.side)
        k, v = (
            _rows(x, self.row, self.head // self.group, first, self.side).astype(self.acc) for x in (self.k, self.v)
        )
        return Keys(k, v, jnp.where(own, index, self.k.shape[1]))

    def moved(self, band: Keys, b) -> Keys:
        """The band with block b in the place of the oldest."""
        put = lambda x, y: lax.dynamic_update_slice(x, y, (self.slot(b),) + (0,) * (x.ndim - 1))
        return jax.tree.map(put, band, self.keys(b))

    def start(self) -> Keys:
        """The band before the first block of queries."""
        size = (self.behind + 1) * self.side
        k, v = (jnp.zeros((size, x.shape[3]), self.acc) for x in (self.k, self.v))
        *empty, _, _ = vary_alike(k, v, jnp.full(size, self.k.shape[1], jnp.int32), self.k, self.q_offset)
        return lax.fori_loop(-self.behind, 0, lambda b, band: self.moved(band, b), Keys(*empty))

    def pairs(self, i, keys: Keys) -> Pairs:
        """Block i of queries against keys."""
        q = self.q_offset + i * self.side + jnp.arange(self.side, dtype=jnp.int32)
        return Pairs(q.reshape(1, 1, -1, 1), keys.index.reshape(1, 1, 1, -1), self.k.shape[1], self.row, self.head)

    def logits(self, i, q, keys: Keys, alibi, seed):
        """Of queries [side, D], scaled, and keys: logits, slope of the soft cap, and what dropout leaves."""
        pairs = self.pairs(i, keys)
        logits, slope = logits_of(self.settings, q, keys.k, pairs, masks.Exists() & self.mask, alibi)
        return logits, slope, kept_of(self.settings, seed, pairs)

    def further(self, i, visit, carry):
        """carry -> visit(b, carry) over the blocks of keys after block i that any of its queries may see."""
        first, s = self.q_offset + i * self.side, self.k.shape[1]
        tile = masks.Tile(first, self.side, first + self.side, max(self.behind, 1) * self.side, s, self.row, self.head)
        live = jnp.asarray((masks.Exists() & self.mask).live(tile), jnp.int32)
        return lax.fori_loop(i + 1, i + 1 + self.behind * live, visit, carry)


def _rows(x, row, head, first, count: int):
    """x[row, first : first + count, head]."""
    return lax.dynamic_slice(x, (row, first, head, 0), (1, count, 1, x.shape[3])).reshape(count, x.shape[3])


def _with_rows(x, y, row, head, first):
    """x with y in the place of x[row, first : first + len(y), head]."""
    return lax.dynamic_update_slice(x, y.astype(x.dtype)[None, :, None], (row, first, head, 0))


def _whole(settings: Settings, x: jax.Array) -> jax.Array:
    """[B, T, ...] with T rounded up to whole blocks, zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % settings.band)) + ((0, 0),) * (x.ndim - 2))


def band_forward(settings: Settings, q, k, v, sinks, mask, q_offset, alibi, seed):
    """o [B, T, H, Dv] and lse [B, H, T]."""
    (b, t, h, _), dv, side = q.shape, v.shape[3], settings.band
    acc = jnp.promote_types(q.dtype, jnp.float32)
    queries = _whole(settings, q)

    def one_head(n, results):
        walk = Walk(settings, mask, k, v, q_offset, n // h, n % h, h // k.shape[2], acc)
        sink = None if sinks is None else sinks[walk.head].astype(acc)

        def step(i, carry):
            band, o, lse = carry
            band = walk.moved(band, i)
            qi = _rows(queries, walk.row, walk.head, i * side, side).astype(acc) * settings.scale

            def visit(keys, carry):
                logits, _, kept = walk.logits(i, qi, keys, alibi, seed)
                return absorb(carry, logits, keys.v, kept)

            *empty, _ = vary_alike(*nothing(side, dv, acc), (qi, band))
            carry = visit(band, tuple(empty))
            oi, lse_i = finish(walk.further(i, lambda b, carry: visit(walk.keys(b), carry), carry), sink)
            o = _with_rows(o, oi, walk.row, walk.head, i * side)
            return band, o, lax.dynamic_update_slice(lse, lse_i[None, None], (walk.row, walk.head, i * side))

        return lax.fori_loop(0, queries.shape[1] // side, step, (walk.start(), *results))[1:]

    o, lse = jnp.zeros((*queries.shape[:3], dv), q.dtype), jnp.zeros((b, h, queries.shape[1]), acc)
    *results, _ = vary_alike(o, lse, (q, k, v, sinks, mask, q_offset, alibi, seed))
    o, lse = lax.fori_loop(0, b * h, one_head, tuple(results))
    return o[:, :t], lse[:, :, :t]


def band_gradients(settings: Settings, residuals: Residuals, do, delta):
    """dq, dk and dv by the formulas of `blocked._gradients`; delta [B, H, T]."""
    q, k, v, _, _, mask, q_offset, _, lse, alibi, seed = residuals
    (b, t, h, d), (_, s, heads, dv_size), side, acc = q.shape, v.shape, settings.band, lse.dtype
    group, per_query = h // heads, lambda x: _whole(settings, jnp.swapaxes(x, 1, 2))[..., None]
    queries, dos, deltas = _whole(settings, q), _whole(settings, do), per_query(delta)
    lses = per_query(jnp.where(lse < SEEN, 0.0, lse))
    blocks = queries.shape[1] // side

    def one_group(n):  # one key head and the query heads that share it
        def one_head(sums, g):
            walk = Walk(settings, mask, k, v, q_offset, n // heads, n % heads * group + g, group, acc)
            size = (walk.behind + 1) * side
            of_block = lambda x, i: _rows(x, walk.row, walk.head, i * side, side).astype(acc)

            def add(sums, b, parts):  # parts [D, side], [Dv, side]: what block b of keys gets
                put = lambda x, y: _add(x, y.T, walk.first(b))
                return jax.tree.map(put, sums, parts)

            def leave(b, carry):  # the band's own sums of block b
                sums, parts = carry
                cut = lambda x: lax.dynamic_slice(x, (0, walk.slot(b)), (x.shape[0], side))
                empty = lambda x: lax.dynamic_update_slice(x, jnp.zeros_like(cut(x)), (0, walk.slot(b)))
                return add(sums, b, jax.tree.map(cut, parts)), jax.tree.map(empty, parts)

            def step(carry, i):
                band, sums, parts = carry
                sums, parts = leave(i - walk.behind - 1, (sums, parts))
                band = walk.moved(band, i)
                qi, doi, lse_i, delta_i = (of_block(x, i) for x in (queries, dos, lses, deltas))
                qi = qi * settings.scale

                def visit(keys):
                    logits, slope, kept = walk.logits(i, qi, keys, alibi, seed)
                    passed, _, ds = slopes_of(logits, slope, lse_i, delta_i, doi @ keys.v.T, kept)
                    return ds @ keys.k, (qi.T @ ds, doi.T @ passed)

                def visit_further(b, carry):
                    dq, sums = carry
                    more, parts = visit(walk.keys(b))
                    return dq + more, add(sums, b, parts)

                dq, more = visit(band)
                dq, sums = walk.further(i, visit_further, (dq, sums))
                return (band, sums, jax.tree.map(jnp.add, parts, more)), (dq * settings.scale).astype(q.dtype)

            band = walk.start()
            parts = jnp.zeros((d, size), acc), jnp.zeros((dv_size, size), acc)
            *parts, _ = vary_alike(*parts, (band, q, do))
            (_, sums, parts), dq = lax.scan(step, (band, sums, tuple(parts)), jnp.arange(blocks))
            sums, _ = lax.fori_loop(blocks - walk.behind - 1, blocks, leave, (sums, parts))
            return sums, dq.reshape(-1, d)[:t]

        *sums, _ = vary_alike(jnp.zeros((s, d), acc), jnp.zeros((s, dv_size), acc), (q, k, v, do, q_offset))
        (dk, dv), dq = lax.scan(one_head, tuple(sums), jnp.arange(group))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    dq, dk, dv = lax.map(one_group, jnp.arange(b * heads))
    heads_last = lambda x, length: jnp.swapaxes(x.reshape(b, -1, length, x.shape[-1]), 1, 2)
    return heads_last(dq, t), heads_last(dk, s), heads_last(dv, s)


def _add(x, y, first):
    """x with y added to its rows from `first` on."""
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, (first, 0), y.shape) + y, (first, 0))
