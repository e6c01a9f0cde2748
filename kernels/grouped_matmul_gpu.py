"""The products of `grouped_matmul` on Hopper GPUs, as Pallas Mosaic GPU kernels.

Each multiprocessor goes through its share of the tiles of the result, 128 rows by 256 columns. Two warpgroups
multiply, 64 rows each; a third copies their factors into shared memory (TMA), as far ahead as there are buffers, into
the next tile too. A tile's rows belong to one group: a group's first tile starts at its first row, rounded down to 8
as TMA wants it, and every tile stores the rows of its own group only, in copies of 64, 32, .. 1 rows. Neighbouring
multiprocessors work at the same time on the same rows or the same matrix, which they find in the L2 cache. Nothing is
added atomically: the same call gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrl.kernels.attention.gpu import DTYPES, _barriers, _pad, _shared
from jaxrl.kernels.attention.gpu_kernels import ACC, GROUPS, REGISTERS, TILE, WGMMA, _load, _turned
from jaxrl.kernels.varying import vary_alike

BLOCKS = 132  # multiprocessors of an H100
ROWS, COLUMNS = GROUPS * TILE, 256  # of a tile of the result
STEP = 64  # of the summed dimension, for each pair of tiles of the factors
STAGES = 4  # such pairs in shared memory
PIECE = 64  # columns that are stored at once
PIECES = 2  # of them in shared memory, for each warpgroup
ALIGNED = 8  # rows: where tiles of x may start


def refusal(x_dtype, w_dtype, dtype, k: int, n: int) -> str | None:
    """Why the kernels cannot serve a product of rows [M, K] and matrices [E, K, N], or None if they can."""
    other = 'use implementation="ragged_dot" or None'
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != "9.0":
            return f"the Mosaic GPU kernel is for Hopper, compute capability 9.0, not {capability}; {other}"
    elif jax.default_backend() != "cpu":  # from where it may be compiled ahead of time
        return f"the Mosaic GPU kernel is for Hopper GPUs, not {jax.default_backend()}; {other}"
    dtypes = [jnp.dtype(d) for d in (x_dtype, w_dtype, dtype)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        names = ", ".join(map(str, dtypes))
        return f"the Mosaic GPU kernel takes and gives bfloat16, or float16, not x, w and dtype {names}; {other}"
    if k % 64 or n % 64 or not k * n:
        return f"the Mosaic GPU kernel takes K and N that are multiples of 64, not {k} and {n}; {other}"
    return None


def rows(x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool, dtype: Any) -> jax.Array:
    """y_i = x_i @ w[g(i)], or x_i @ w[g(i)]^T; zeros after the last group.

    Args:
      x: [M, K], or [M, N] if transposed. w: [E, K, N]. sizes: int32 [E], with a sum of at most M.

    Returns:
      [M, N], or [M, K] if transposed.
    """
    (m, depth), experts, columns = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    if m == 0:
        return jnp.zeros((0, columns), dtype)
    *table, count = visits(
        jnp.append(sizes, m - jnp.sum(sizes)), m
    )  # what no group has is one more group, without a matrix
    across = -(-columns // COLUMNS)

    def tile(entry, nth, refs, wg, buffers):
        (group, first, start, stop), (x, w, y) = entry, refs
        first, column = pl.multiple_of(first, ALIGNED), nth * COLUMNS

        def copy(n, slot):
            ready = buffers["ready"].at[slot]
            part, there = pl.ds(n * STEP, STEP), pl.ds(column, COLUMNS)
            for half in range(GROUPS):
                source = x.at[pl.ds(first + half * TILE, TILE), part]
                plgpu.copy_gmem_to_smem(source, buffers["a_tiles"].at[slot, half], ready)
            source = w.at[group, there, part] if transposed else w.at[group, part, there]
            plgpu.copy_gmem_to_smem(source, buffers["b_tiles"].at[slot], ready)

        def factors(slot):
            b = buffers["b_tiles"].at[slot]
            return buffers["a_tiles"].at[slot, wg], _turned(b) if transposed else b

        def target(row, size, piece):
            return y.at[pl.ds(first + row, size), pl.ds(column + piece * PIECE, PIECE)]

        steps = jnp.where(group < experts, depth // STEP, 0)
        return Tile(steps, steps, copy, factors, None, start, stop, target)

    b_tile = (COLUMNS, STEP) if transposed else (STEP, COLUMNS)
    x, out = _pad(x, 0, ALIGNED), jax.ShapeDtypeStruct((m, columns), dtype)
    return _call("rows", tile, across, table, count, (x, w), b_tile, out)


def outer(x: jax.Array, y: jax.Array, sizes: jax.Array, *, dtype: Any) -> jax.Array:
    """The sum of x_i^T y_i over the rows of each group.

    Args:
      x: [M, K]. y: [M, N]. sizes: int32 [E], with a sum of at most M.

    Returns:
      [E, K, N], zeros for empty groups.
    """
    (m, k), n, experts = x.shape, y.shape[1], sizes.shape[0]
    if m == 0:
        return jnp.zeros((experts, k, n), dtype)
    down, across = -(-k // ROWS), -(-n // COLUMNS)
    stops = jnp.cumsum(sizes)

    def tile(entry, nth, refs, wg, buffers):
        (group, start, stop), (x, y, out) = entry, refs
        row, column = lax.div(nth, across) * ROWS, lax.rem(nth, across) * COLUMNS
        first = start & -ALIGNED
        steps = jnp.where(stop > start, lax.div(stop - first + STEP - 1, STEP), 0)
        begun = (first < start).astype(jnp.int32)  # the first step reaches into the group before
        ended = (stop < first + steps * STEP).astype(jnp.int32)
        full = jnp.maximum(steps - begun - ended, 0)

        def place(n):
            """The rows of the n-th step: those that need no mask are first."""
            return pl.multiple_of(first + lax.rem(n + begun, steps) * STEP, ALIGNED)

        def copy(n, slot):
            ready, there = buffers["ready"].at[slot], pl.ds(place(n), STEP)
            for half in range(GROUPS):
                source = x.at[there, pl.ds(row + half * TILE, TILE)]
                plgpu.copy_gmem_to_smem(source, buffers["a_tiles"].at[slot, half], ready)
            plgpu.copy_gmem_to_smem(y.at[there, pl.ds(column, COLUMNS)], buffers["b_tiles"].at[slot], ready)

        def clear(n, slot):
            """Zeros for the rows of other groups: each warpgroup clears half of both factors."""
            half = pl.ds(wg * (COLUMNS // GROUPS), COLUMNS // GROUPS)
            for ref in buffers["a_tiles"].at[slot, wg], buffers["b_tiles"].at[slot, :, half]:
                index = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, ref.shape, 0), WGMMA) + place(n)
                values = _load(ref, WGMMA)
                ref[...] = jnp.where((index >= start) & (index < stop), values, jnp.zeros_like(values))
            plgpu.commit_smem()
            plgpu.barrier_arrive(buffers["cleared"])
            plgpu.barrier_wait(buffers["cleared"])

        def factors(slot):
            return _turned(buffers["a_tiles"].at[slot, wg]), buffers["b_tiles"].at[slot]

        def target(more, size, piece):
            return out.at[group, pl.ds(row + more, size), pl.ds(column + piece * PIECE, PIECE)]

        return Tile(steps, full, copy, factors, clear, 0, jnp.minimum(k - row, ROWS), target)

    x, y = (_pad(rows, 0, ALIGNED) for rows in (x, y))
    result, groups = jax.ShapeDtypeStruct((experts, k, n), dtype), jnp.arange(experts, dtype=jnp.int32)
    count, table = jnp.full(1, experts, jnp.int32), (groups, stops - sizes, stops)
    return _call("outer", tile, down * across, table, count, (x, y), (STEP, COLUMNS), result)


def visits(sizes: jax.Array, m: int) -> tuple[jax.Array, ...]:
    """The tiles of rows of each group, one after another, for groups that are together all M rows.

    Returns:
      The group, the first row, and which of the tile's rows are the group's, from where to where: int32 [V] each, of
      which the first `count`, int32 [1], are tiles.
    """
    stops = jnp.cumsum(sizes)
    starts = stops - sizes
    firsts = starts & -ALIGNED
    counts = jnp.where(sizes > 0, -(-(stops - firsts) // ROWS), 0)
    ends = jnp.cumsum(counts)
    most = (m + (ALIGNED + ROWS - 2) * sizes.shape[0]) // ROWS
    visit = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(ends, visit, side="right", method="compare_all")  # one GPU kernel, where a scan is many
    group = jnp.minimum(group, sizes.shape[0] - 1).astype(jnp.int32)
    row = firsts[group] + (visit - ends[group] + counts[group]) * ROWS
    return group, row, jnp.maximum(starts[group] - row, 0), jnp.minimum(stops[group] - row, ROWS), ends[-1:]


class Tile(NamedTuple):
    """One tile of the result."""

    steps: Any  # pairs of tiles of the factors
    full: Any  # of them that need not be cleared; they are the first
    copy: Callable  # (step, slot): starts the copies of a pair
    factors: Callable  # (slot) -> a, b
    clear: Callable | None  # (step, slot)
    start: Any  # the tile's rows that are stored ..
    stop: Any
    target: Callable  # (first row, rows, piece): .. and where


def _call(name: str, tile: Callable, each: int, table, count, inputs, b_tile, result):
    """Goes through tile(entry, nth, refs, warpgroup, buffers), nth < each, for the first `count` entries of the table.

    The table is int32 [V] for each number of an entry.
    """
    most = table[0].shape[0] * each
    blocks = min(BLOCKS, most)

    def kernel(count, *refs, **buffers):
        table_refs, refs = refs[: len(table)], refs[len(table) :]
        block, wg = lax.axis_index("block"), lax.axis_index("warpgroup")
        tiles = lax.div(count[0] * each - block + blocks - 1, blocks)

        def entry(unit):
            return tuple(ref[lax.div(unit, each)] for ref in table_refs)

        def over_tiles(visit):
            """Folds the number of steps that are done over visit(tile, done)."""

            def one(i, carry):
                done, now = carry
                unit = block + i * blocks
                after = entry(jnp.minimum(unit + blocks, most - 1))  # it will have come by then
                this = tile(now, lax.rem(unit, each), refs, wg, buffers)
                visit(this, done)
                return done + this.steps, after

            lax.fori_loop(0, tiles, one, (jnp.int32(0), entry(block)))

        @pl.when(wg < GROUPS)
        def _():
            plgpu.set_max_registers(REGISTERS["compute"], action="increase")
            over_tiles(functools.partial(_compute, wg, buffers))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == GROUPS)
        def _():
            plgpu.set_max_registers(REGISTERS["memory"], action="decrease")
            over_tiles(functools.partial(_feed, buffers))

    dtype = inputs[0].dtype
    pieces = plgpu.SMEM((GROUPS, PIECES, TILE, PIECE), result.dtype, transforms=(plgpu.SwizzleTransform(128),))
    made = plgpu.kernel(
        kernel,
        out_type=result,
        scratch_types={
            "a_tiles": _shared((STAGES, GROUPS, TILE, TILE), dtype),
            "b_tiles": _shared((STAGES, *b_tile), dtype),
            "pieces": pieces,  # not tiled: copies out of it start at any row
            "ready": _barriers(STAGES, GROUPS + 1),
            "free": _barriers(STAGES, GROUPS),
            "cleared": _barriers(1, GROUPS),
        },
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"grouped_matmul_{name}",
    )(count, *table, *inputs)
    return vary_alike(made, *inputs)[0]


def _feed(buffers, tile: Tile, done):
    """The memory warpgroup's part of a tile."""

    @pl.loop(0, tile.steps)
    def _(n):
        slot = lax.rem(done + n, STAGES)
        pl.when(done + n >= STAGES)(lambda: plgpu.barrier_wait(buffers["free"].at[slot]))
        tile.copy(n, slot)


def _compute(wg, buffers, tile: Tile, done):
    """A compute warpgroup's part: one product is in flight while the next is awaited."""
    slot_of = lambda n: lax.rem(done + n, STAGES)  # noqa: E731
    release = lambda n: plgpu.barrier_arrive(buffers["free"].at[slot_of(n)])  # noqa: E731

    def multiply(accumulator):
        def step(n, clear):
            slot = slot_of(n)
            plgpu.barrier_wait(buffers["ready"].at[slot])
            if clear is not None:
                clear(n, slot)
            plgpu.wgmma(accumulator, *tile.factors(slot))
            plgpu.wgmma_wait(1)
            pl.when(n > 0)(lambda: release(n - 1))

        pl.loop(0, tile.full)(functools.partial(step, clear=None))
        if tile.clear is not None:
            pl.loop(tile.full, tile.steps)(functools.partial(step, clear=tile.clear))
        return accumulator[...]

    values = pl.run_scoped(multiply, ACC((TILE, COLUMNS), jnp.float32))
    pl.when(tile.steps > 0)(lambda: release(tile.steps - 1))
    pieces = buffers["pieces"]
    start, stop = (jnp.clip(row - wg * TILE, 0, TILE) for row in (tile.start, tile.stop))
    for first in range(0, COLUMNS // PIECE, PIECES):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for n in range(PIECES):
            column = (first + n) * PIECE
            pieces[wg, n] = values[:, column : column + PIECE].astype(pieces.dtype)
        plgpu.commit_smem()
        row, size = start, TILE
        while size:
            here = (stop - start) & size

            @pl.when(here > 0)
            def _(row=row, size=size, first=first):
                for n in range(PIECES):
                    source = pieces.at[wg, n, pl.ds(row, size)]
                    plgpu.copy_smem_to_gmem(source, tile.target(wg * TILE + row, size, first + n))

            row, size = row + here, size // 2
