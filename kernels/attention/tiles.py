"""The tiles that a kernel has to visit, as a list: what a mask empties is not in it.

A kernel's grid runs over the list; its index maps read from it which blocks to fetch. Empty tiles thus cost no
compute, no copy and no grid step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import masks

FIRST, LAST, LIVE, FULL = 1, 2, 4, 8
LIMIT = 1 << 14  # blocks along either axis: an entry is one int32


class Tiles(NamedTuple):
    """For each batch row of the mask (one, where all are alike) the tiles in the order of the visit.

    An entry holds the major block (whose result is being summed up), the minor block and four flags: the first
    and the last tile of its major block; any pair allowed; every pair allowed. A major block without a live
    tile has one entry that is not live, so that its result is written all the same. Rows with fewer
    tiles than the longest repeat their last blocks without a flag.
    """

    entries: jax.Array  # int32 [B|1, tiles at most]
    count: jax.Array  # int32 [], tiles of the longest row


def major(entry: Any) -> Any:
    """Block whose result the tile adds to."""
    return lax.shift_right_logical(entry, 18)


def minor(entry: Any) -> Any:
    """Block that is gone through."""
    return lax.shift_right_logical(entry, 4) & (LIMIT - 1)


def tile_list(kinds: jax.Array) -> Tiles:
    """The list of what `tile_kinds` found; its second axis is the major one. [B|1, major, minor] -> Tiles."""
    rows, n_major, n_minor = kinds.shape
    live = kinds > 0
    first_column = jnp.arange(n_minor).reshape(1, 1, -1) == 0
    wanted = live | (first_column & ~jnp.any(live, axis=2, keepdims=True))
    wanted, kinds = wanted.reshape(rows, -1), kinds.reshape(rows, -1)
    count = jnp.sum(wanted, axis=1, dtype=jnp.int32, keepdims=True)
    order = jnp.argsort(~wanted, axis=1, stable=True).astype(jnp.int32)
    slot = jnp.arange(order.shape[1], dtype=jnp.int32)[None]
    index = jnp.take_along_axis(order, jnp.minimum(slot, count - 1), axis=1)
    block, other = index // n_minor, index % n_minor
    step = block[:, 1:] != block[:, :-1]
    first = jnp.pad(step, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(step, ((0, 0), (0, 1)), constant_values=True) | (slot == count - 1)
    flags = jnp.take_along_axis(kinds, index, axis=1) + FIRST * first + LAST * last
    entries = (block << 18) + (other << 4) + jnp.where(slot < count, flags, 0)
    return Tiles(entries, jnp.max(count))


def tile_kinds(
    mask: masks.Mask,
    shape: tuple[int, int, int],
    blocks: tuple[int, int],
    q_offset,
    *,
    k_offset=0,
    k_length: int | None = None,
) -> jax.Array:
    """What the mask says of each tile: 0, LIVE or LIVE + FULL, int32 [B|1, query blocks, key blocks].

    Args:
      mask: without dense arrays.
      shape: (B, T, S).
      blocks: sides of a tile, (queries, keys); the last tiles may overhang.
      q_offset: as in `attention`.
      k_offset, k_length: where the S keys stand in a mask of how many; default all of them.
    """
    batch, t, s = shape
    bq, bk = blocks
    alike = all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(mask))

    def kind(row, i, j):
        tile = masks.Tile(q_offset + i * bq, bq, k_offset + j * bk, bk, s if k_length is None else k_length, row)
        live, full = (jnp.asarray(f(tile), jnp.int32) for f in (mask.live, mask.full))
        return live * (LIVE + FULL * full)

    over = jax.vmap(jax.vmap(jax.vmap(kind, (None, None, 0)), (None, 0, None)), (0, None, None))
    return over(jnp.arange(1 if alike else batch), jnp.arange(-(-t // bq)), jnp.arange(-(-s // bk)))
