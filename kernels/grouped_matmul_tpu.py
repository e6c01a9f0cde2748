"""The sums of x_i^T y_i over groups, of `grouped_matmul`'s backward pass, as a Pallas kernel for TPU.

XLA has a kernel for rows times the matrix of their group; what is summed over groups of rows it makes of E dense
products. Here the innermost axis of the grid goes through visits, a tile of rows for one group: a group's visits follow
each other, so that its sum stays in scratch memory and is written once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl.kernels.varying import shape_like

LANES = 128
ROWS, COLUMNS = 512, 1024  # of a tile of the factors, and of the result, at most


def refusal(x_dtype, y_dtype) -> str | None:
    """Why the kernel cannot serve a call, or None if it can."""
    if jnp.promote_types(x_dtype, y_dtype) in (jnp.bfloat16, jnp.float32):
        return None
    return f'the Pallas kernel takes bfloat16 or float32, not {x_dtype} and {y_dtype}; use "ragged_dot" or None'


def outer(x: jax.Array, y: jax.Array, sizes: jax.Array, *, dtype: Any, interpret: Any = False) -> jax.Array:
    """The sum of x_i^T y_i over the rows of each group.

    Args:
      x: [M, K]. y: [M, N]. sizes: int32 [E], with a sum of at most M.
      dtype: of the result.
      interpret: how the kernel runs where there is no TPU, as in `pl.pallas_call`.

    Returns:
      [E, K, N], zeros for empty groups.
    """
    (m, k), n, groups = x.shape, y.shape[1], sizes.shape[0]
    if 0 in (m, k, n):
        return jnp.zeros((groups, k, n), dtype)
    common = jnp.promote_types(x.dtype, y.dtype)
    rows, down, across = min(ROWS, m), _tile(k), _tile(n)
    table = visits(sizes, m, rows)
    grid = pl.cdiv(k, down), pl.cdiv(n, across), table[0].shape[0]
    return pl.pallas_call(
        functools.partial(_kernel, rows),
        out_shape=shape_like(x, (groups, k, n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=grid,
            in_specs=[
                pl.BlockSpec((rows, down), lambda i, j, v, group, tile, *_: (tile[v], i)),
                pl.BlockSpec((rows, across), lambda i, j, v, group, tile, *_: (tile[v], j)),
            ],
            out_specs=pl.BlockSpec((None, down, across), lambda i, j, v, group, *_: (group[v], i, j)),
            scratch_shapes=[pltpu.VMEM((down, across), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(*table, x.astype(common), y.astype(common))


def visits(sizes: jax.Array, m: int, rows: int) -> tuple[jax.Array, ...]:
    """The tiles of rows of each group, one group after another; an empty group has one, of which no row is its own.

    Returns:
      The group, the tile, and the group's rows, from where to where: int32 [V] each. What is left at the end belongs
      to the last group and has no rows.
    """
    stops = jnp.cumsum(sizes)
    starts = stops - sizes
    firsts = jnp.minimum(starts // rows, (m - 1) // rows)
    counts = jnp.where(sizes > 0, -(-stops // rows) - firsts, 1)
    ends = jnp.cumsum(counts)
    visit = jnp.arange(pl.cdiv(m, rows) + sizes.shape[0], dtype=jnp.int32)
    group = jnp.searchsorted(ends, visit, side="right", method="compare_all")
    group = jnp.minimum(group, sizes.shape[0] - 1).astype(jnp.int32)
    nth = visit - (ends - counts)[group]
    tile = firsts[group] + jnp.minimum(nth, counts[group] - 1)
    return group, tile, starts[group], jnp.where(nth < counts[group], stops[group], 0)


def _tile(columns: int) -> int:
    """Columns of a tile: all, or of as few alike as there must be."""
    if columns <= COLUMNS:
        return columns
    return pl.cdiv(pl.cdiv(columns, pl.cdiv(columns, COLUMNS)), LANES) * LANES


def _kernel(rows, group, tile, start, stop, x, y, out, total):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)]))
    def _():
        total[...] = jnp.zeros_like(total)

    first = tile[visit] * rows

    @pl.when((start[visit] < stop[visit]) & (first < stop[visit]))
    def _():
        index = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        own = (index >= start[visit]) & (index < stop[visit])
        a, b = (jnp.where(own, ref[...], jnp.zeros_like(ref)) for ref in (x, y))  # both: others may be no numbers
        total[...] += lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when((visit == last) | (group[visit] != group[jnp.minimum(visit + 1, last)]))
    def _():
        out[...] = total[...].astype(out.dtype)
