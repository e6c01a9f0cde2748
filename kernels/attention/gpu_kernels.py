"""What runs on a Hopper multiprocessor: the kernels of `gpu`, and the mathematics of a tile.

Each kernel runs in three warpgroups. Two compute; each keeps 64 rows of one side (queries, or keys in `dkv`) and goes
through tiles of the other side. The third copies these tiles into shared memory with the tensor memory
accelerator (TMA), as far ahead as there are buffers. "ready" barriers say that a tile has come, "free" barriers
that both have done with it. Registers are what is short: 240 of them hold a thread's share of the sums (128 for
dk and dv of 128 columns), of a tile's weights, and little else. Hence the order in which things are computed.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrl.kernels.attention.reference import MASKED

TILE = 64  # rows of one warpgroup's tile: the height of a wgmma
GROUPS = 2  # compute warpgroups
BLOCK = GROUPS * TILE
REGISTERS = {"compute": 240, "memory": 24}  # 2 * 240 + 24 a thread of each warpgroup are all there are
LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
ACC = plgpu.WGMMAAccumulatorRef
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


class Settings(NamedTuple):
    """What is static about a call, and the tiles of one of its kernels."""

    scale: float
    soft_cap: float | None
    t: int
    s: int
    group: int  # query heads for each key head
    block_q: int
    block_k: int
    stages: int  # tiles in shared memory

    @property
    def unit(self) -> float:
        """Base-2 logits are `unit` times what `bend` returns."""
        return LOG2E * (self.scale if self.soft_cap is None else self.soft_cap)


def bend(products: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array | None]:
    """Logits in units of `settings.unit` from q k^T, and the slope of the soft cap, if there is one."""
    if settings.soft_cap is None:
        return products, None
    bent = jnp.tanh(products * (settings.scale / settings.soft_cap))
    return bent, 1.0 - bent * bent


def softmax_step(x: jax.Array, unit: float, m: jax.Array, total: jax.Array):
    """One step of the online softmax in base 2: logits unit * x [rows, keys], -inf where masked; m is never -inf.

    Returns p = 2^(unit x - m'), the decay 2^(m - m') of what was summed before, and the new m and total.
    """
    m_new = jnp.maximum(m, jnp.max(x, axis=1) * unit)
    p = jnp.exp2(x * unit - lax.broadcast_in_dim(m_new, x.shape, [0]))
    decay = jnp.exp2(m - m_new)
    return p, decay, m_new, total * decay + jnp.sum(p, axis=1)


def softmax_end(m: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 / total and the natural log-sum-exp; 0 and MASKED for rows that have seen no key."""
    seen = total > 0.0
    safe = jnp.where(seen, total, 1.0)
    return jnp.where(seen, 1.0 / safe, 0.0), jnp.where(seen, m / LOG2E + jnp.log(safe), MASKED)


def weights(x: jax.Array, slope: jax.Array | None, lse: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """p = 2^(unit x - lse), and p times the slope of the soft cap; lse in base 2 and as wide as x."""
    p = jnp.exp2(x * settings.unit - lse)
    return p, p if slope is None else p * slope


class WarpgroupTile(NamedTuple):
    """A tile in the layout of wgmma's accumulators (a `masks.Rectangle`, as far as `allowed` asks): the side that the
    warpgroup keeps is down, the one it goes through is across."""

    q_index: jax.Array  # int32 [queries]
    k_index: jax.Array  # int32 [keys]
    k_length: int
    queries_across: bool

    @property
    def q(self):
        return self.of_query(self.q_index)

    @property
    def k(self):
        return self.of_key(self.k_index)

    def of_query(self, values):
        return self._along(int(self.queries_across), values)

    def of_key(self, values):
        return self._along(int(not self.queries_across), values)

    def of_row(self, values):
        return values

    def _along(self, axis: int, values):
        shape = self.q_index.shape + self.k_index.shape
        return lax.broadcast_in_dim(values, shape[::-1] if self.queries_across else shape, [axis])


class Masking(NamedTuple):
    """The mask inside a kernel. What it knows of the side that a warpgroup keeps is held in registers, what it knows of
    the other side travels with the tiles: as vectors, of indices first, then of the mask's own arrays."""

    structure: Any
    axes: tuple[str, ...]  # of the mask's arrays: "q", "k" or "row"
    kept: Any  # int32 [B, vectors, length] in global memory; None where no tile is ever masked
    moving: Any
    rows: tuple[Any, ...]  # int32 [B]
    k_length: int
    queries_across: bool

    def keep(self, b, first) -> list[Any]:
        """The vectors of the side that is kept, from its index `first` on."""
        n = 0 if self.kept is None else self.kept.shape[1]
        return [_row(self.kept, b, m, pl.ds(first, TILE)) for m in range(n)]

    def hide(self, x, b, kept, moving):
        """x with -inf where the mask forbids; `moving` is the tile's part of the vectors, in shared memory."""
        moved = [_load(moving.at[m], COLUMN) for m in range(moving.shape[0])]
        (q, *q_leaves), (k, *k_leaves) = (moved, kept) if self.queries_across else (kept, moved)
        leaves = {"q": iter(q_leaves), "k": iter(k_leaves), "row": (ref[b] for ref in self.rows)}
        mask = jax.tree.unflatten(self.structure, [next(leaves[axis]) for axis in self.axes])
        allowed = mask.allowed(WarpgroupTile(q, k, self.k_length, self.queries_across))
        return lax.optimization_barrier(jnp.where(allowed, x, -jnp.inf))  # predicates are short, too: use them now


class Visit(NamedTuple):
    """The tiles that a block goes through: `order[n]` for n < live, of which the first `full` need no mask."""

    order: Any
    full: Any
    live: Any
    pages: Any = None  # int32 [B, N]: keys lie in pages, and these are those of each row

    def places(self, b, tile, size: int, page: int):
        """Where a tile of `size` keys lies: (row, or page; first key in it) of each piece, one after another."""
        piece = size if self.pages is None else min(page, size)
        for n in range(size // piece):
            first = tile * size + n * piece
            yield (b, first) if self.pages is None else (self.pages[b, lax.div(first, page)], lax.rem(first, page))

    def fold(self, step, masking: Masking, carry, repeats: int = 1):
        """Folds `step(n, carry, masked)` over all of them."""
        full, live = repeats * self.full, repeats * self.live
        carry = lax.fori_loop(0, full, functools.partial(step, masked=False), carry)
        if masking.kept is not None:
            carry = lax.fori_loop(full, live, functools.partial(step, masked=True), carry)
        return carry


def _load(ref, layout, **options):
    unindexed = () if jax.__version_info__ >= (0, 11) else (None,)  # jax 0.10 asks for an index, 0.11 warns of it
    return plgpu.load(ref, *unindexed, layout=layout, **options)


def _row(ref, *index):
    """A vector of global memory as the rows of a tile."""
    return _load(ref.at[index], ROW, optimized=False)


def _zeros(shape: tuple[int, ...], value: float = 0.0):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), WGMMA if len(shape) == 2 else ROW)


def _down(values, shape: tuple[int, int]):
    return lax.broadcast_in_dim(values, shape, [0])


def _across(values, shape: tuple[int, int]):
    return lax.broadcast_in_dim(values, shape, [1])


def _turned(ref):
    return ref.transpose((1, 0))


def _anew(index):
    """The index, in a way that keeps the compiler from holding the addresses that follow from it across a loop."""
    return lax.optimization_barrier(index)


def _product(a, b, shape: tuple[int, int]):
    """a b in float32, of factors in shared memory."""

    def compute(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(compute, ACC(shape, jnp.float32))


def _add_products(sums, *factors) -> Any:
    """sums[n] + a b for each (a, b) of factors, all in flight at once."""

    def compute(accumulators):
        for accumulator, (a, b) in zip(accumulators, factors, strict=True):
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(compute)(tuple(ACC.init(x) for x in sums))


def _store(pairs):
    """Copies written shared memory to global memory."""
    plgpu.commit_smem()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def _feed(settings: Settings, count, copies, free):
    """The memory warpgroup: `copies(n, slot)` are functions that start the copies of tile n, `free` their barriers."""
    plgpu.set_max_registers(REGISTERS["memory"], action="decrease")

    @pl.loop(0, count)
    def _(n):
        slot = lax.rem(n, settings.stages)
        for copy, barrier in zip(copies(n, slot), free, strict=True):
            pl.when(n >= settings.stages)(lambda barrier=barrier: plgpu.barrier_wait(barrier.at[slot]))
            copy()


def _feed_keys(settings: Settings, at, visit: Visit, masking: Masking, sources, buffers, ready, free):
    """The memory warpgroup where tiles of keys, of values and of what the mask knows of them are gone through."""
    (b, h), (k, v), (k_tiles, v_tiles, mask_tiles) = at, sources, buffers
    block = settings.block_k

    def copies(n, slot):
        tile = visit.order[n]
        places = list(visit.places(b, tile, block, k.shape[1]))
        size = block // len(places)

        def copy(source, target, barrier):
            for m, (row, first) in enumerate(places):
                piece = target.at[slot, pl.ds(m * size, size)]
                plgpu.copy_gmem_to_smem(source.at[row, pl.ds(first, size), lax.div(h, settings.group)], piece, barrier)

        def keys():
            copy(k, k_tiles, ready[0].at[slot])
            if masking.kept is not None:
                span = pl.ds(tile * block, block)
                plgpu.copy_gmem_to_smem(masking.moving.at[b, :, span], mask_tiles.at[slot], ready[0].at[slot])

        yield keys
        yield lambda: copy(v, v_tiles, ready[1].at[slot])

    _feed(settings, visit.live, copies, free)


def forward(
    settings: Settings, at, visit: Visit, masking: Masking, q, k, v, o, lse, *,
    q_tile, o_tile: Any = None, lse_tile, k_tiles, v_tiles, mask_tiles: Any = None,
    own_ready, k_ready, v_ready, k_free, v_free, turn,
):  # fmt: skip
    """o and lse. The two warpgroups take turns: while one multiplies, the other computes its softmax."""
    b, h, i, wg = at
    o_tile = q_tile if o_tile is None else o_tile
    shape = (TILE, settings.block_k)

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS["compute"], action="increase")
        first = i * BLOCK + wg * TILE
        rows = pl.ds(first, TILE)
        plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_tile.at[wg], own_ready.at[wg])
        kept = masking.keep(b, first)
        plgpu.barrier_wait(own_ready.at[wg])
        pl.when(visit.live > 0)(lambda: plgpu.barrier_wait(k_ready.at[0]))
        pl.when(wg == 1)(take_turns)

        def step(n, carry, masked: bool):
            acc, m, total = carry
            slot = lax.rem(n, settings.stages)

            def scores(accumulator):
                plgpu.wgmma(accumulator, q_tile.at[wg], _turned(k_tiles.at[slot]))
                take_turns()
                return accumulator[...]

            x, _ = bend(pl.run_scoped(scores, ACC(shape, jnp.float32)), settings)
            if masked:
                x = masking.hide(x, b, kept, mask_tiles.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            p, decay, m, total = softmax_step(x, settings.unit, m, total)
            acc = acc * _down(decay, acc.shape)
            acc, m, total, p = lax.optimization_barrier((acc, m, total, p.astype(v.dtype)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)

            def values(accumulator):
                plgpu.wgmma(accumulator, p, v_tiles.at[slot])
                after = lax.rem(n + 1, settings.stages)
                pl.when(n + 1 < visit.live)(lambda: plgpu.barrier_wait(k_ready.at[after]))

            acc = pl.run_state(values)(ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, m, total

        carry = _zeros((TILE, v.shape[3])), _zeros((TILE,), MASKED), _zeros((TILE,))
        acc, m, total = visit.fold(step, masking, carry)
        pl.when(wg == 0)(take_turns)
        inverse, row_lse = softmax_end(m, total)
        o_tile[wg] = (acc * _down(inverse, acc.shape)).astype(o.dtype)
        lse_tile[wg] = row_lse
        _store([(o_tile.at[wg], o.at[b, rows, h]), (lse_tile.at[wg], lse.at[b, h, rows])])

    @pl.when(wg == GROUPS)
    def _():
        buffers, ready, free = (k_tiles, v_tiles, mask_tiles), (k_ready, v_ready), (k_free, v_free)
        _feed_keys(settings, (b, h), visit, masking, (k, v), buffers, ready, free)


def dq(
    settings: Settings, at, visit: Visit, masking: Masking, q, k, v, do, stats, dq, *,
    q_tile, do_tile, k_tiles, v_tiles, mask_tiles: Any = None, own_ready, k_ready, v_ready, k_free, v_free,
):  # fmt: skip
    """dq = scale ds k; stats [B, H, 2, T] holds lse in base 2, and delta."""
    b, h, i, wg = at
    shape = (TILE, settings.block_k)

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS["compute"], action="increase")
        first = i * BLOCK + wg * TILE
        rows = pl.ds(first, TILE)
        plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_tile.at[wg], own_ready.at[wg])
        plgpu.copy_gmem_to_smem(do.at[b, rows, h], do_tile.at[wg], own_ready.at[wg])
        kept = masking.keep(b, first)
        lse, delta = (_row(stats, b, h, m, rows) for m in range(2))
        plgpu.barrier_wait(own_ready.at[wg])

        def step(n, acc, masked: bool):
            slot, own = lax.rem(n, settings.stages), _anew(wg)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])

            def gradient(x_acc, dp_acc):  # the weights are computed while dp is still in flight
                plgpu.wgmma(x_acc, q_tile.at[own], _turned(k_tiles.at[slot]))
                plgpu.wgmma(dp_acc, do_tile.at[own], _turned(v_tiles.at[slot]))
                x, slope = bend(plgpu.wgmma_accumulator_load(x_acc, wait_n=1), settings)
                if masked:
                    x = masking.hide(x, b, kept, mask_tiles.at[slot])
                _, w = weights(x, slope, _down(lse, shape), settings)
                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                return (w * (dp - _down(delta, shape))).astype(k.dtype)

            ds = pl.run_scoped(gradient, *2 * (ACC(shape, jnp.float32),))
            plgpu.barrier_arrive(v_free.at[slot])
            (acc,) = _add_products((acc,), (ds, k_tiles.at[slot]))
            plgpu.barrier_arrive(k_free.at[slot])
            return acc

        acc = visit.fold(step, masking, _zeros((TILE, q.shape[3])))
        q_tile[wg] = (acc * settings.scale).astype(dq.dtype)
        _store([(q_tile.at[wg], dq.at[b, rows, h])])

    @pl.when(wg == GROUPS)
    def _():
        buffers, ready, free = (k_tiles, v_tiles, mask_tiles), (k_ready, v_ready), (k_free, v_free)
        _feed_keys(settings, (b, h), visit, masking, (k, v), buffers, ready, free)


def dkv(
    settings: Settings, at, visit: Visit, masking: Masking, q, k, v, do, stats, *results, wanted: str,
    k_tile, v_tile, q_tiles, do_tiles, stat_tiles, mask_tiles: Any = None, own_ready, ready, free,
):  # fmt: skip
    """dv = p^T do and dk = scale ds^T q, or one of them, summed over the query heads of a key head.

    `wanted` names what is computed, "k", "v" or "kv", in the order of `results`.
    """
    b, kv_head, j, wg = at
    bq, shape = settings.block_q, (TILE, settings.block_q)

    def visited(n):
        """Query head and block of the n-th tile: first those of all heads that need no mask, then the others."""
        rest = n - settings.group * visit.full
        m, size = jnp.where(rest < 0, n, rest), jnp.where(rest < 0, visit.full, visit.live - visit.full)
        size = jnp.maximum(size, 1)
        first = jnp.where(rest < 0, 0, visit.full)
        return kv_head * settings.group + lax.div(m, size), visit.order[first + lax.rem(m, size)]

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS["compute"], action="increase")
        first = j * BLOCK + wg * TILE
        keys = b, pl.ds(first, TILE), kv_head
        plgpu.copy_gmem_to_smem(k.at[keys], k_tile.at[wg], own_ready.at[wg])
        plgpu.copy_gmem_to_smem(v.at[keys], v_tile.at[wg], own_ready.at[wg])
        kept = masking.keep(b, first)
        plgpu.barrier_wait(own_ready.at[wg])

        def step(n, sums, masked: bool):
            slot, own = lax.rem(n, settings.stages), _anew(wg)
            plgpu.barrier_wait(ready.at[slot])
            x, slope = bend(_product(k_tile.at[own], _turned(q_tiles.at[slot]), shape), settings)
            if masked:
                x = masking.hide(x, b, kept, mask_tiles.at[slot])
            lse = _load(stat_tiles.at[slot, 0], COLUMN)
            p, w = weights(x, slope, _across(lse, shape), settings)
            w, p = lax.optimization_barrier((w, p.astype(do.dtype)))
            sums, products = list(sums), [(p, do_tiles.at[slot])] if "v" in wanted else []
            if "k" in wanted:
                products.append((v_tile.at[own], _turned(do_tiles.at[slot])))
                *sums[1:], dp = _add_products((*sums[1:], _zeros(shape)), *products)
                delta = _load(stat_tiles.at[slot, 1], COLUMN)
                ds = (w * (dp - _across(delta, shape))).astype(q.dtype)
                sums[:1] = _add_products(sums[:1], (ds, q_tiles.at[slot]))
            else:
                sums = _add_products(sums, *products)
            plgpu.barrier_arrive(free.at[slot])
            return tuple(sums)

        tiles = {"k": (k_tile, settings.scale), "v": (v_tile, 1.0)}
        sums = tuple(_zeros((TILE, tiles[x][0].shape[2])) for x in wanted)
        sums = visit.fold(step, masking, sums, repeats=settings.group)
        for x, total in zip(wanted, sums, strict=True):
            tile, factor = tiles[x]
            tile[wg] = (total * factor).astype(tile.dtype)
        _store([(tiles[x][0].at[wg], result.at[keys]) for x, result in zip(wanted, results, strict=True)])

    @pl.when(wg == GROUPS)
    def _():
        def copies(n, slot):
            head, i = visited(n)
            rows = pl.ds(i * bq, bq)

            def copy():
                plgpu.copy_gmem_to_smem(q.at[b, rows, head], q_tiles.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(do.at[b, rows, head], do_tiles.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(stats.at[b, head, :, rows], stat_tiles.at[slot], ready.at[slot])
                if masking.kept is not None:
                    plgpu.copy_gmem_to_smem(masking.moving.at[b, :, rows], mask_tiles.at[slot], ready.at[slot])

            yield copy

        _feed(settings, settings.group * visit.live, copies, (free,))
