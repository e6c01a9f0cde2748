"""The ring: `slots` moments of `streams` parallel streams, the oldest moment overwritten first.

A slot holds what all streams did in one step, so a stream's items lie one slot apart and sequences stay contiguous
however often the ring has gone round. Items are any pytree; types are kept (uint8 images stay uint8). Store each
transition's successor in it: the next slot's observation is another episode's first where one has ended.

`init`, `add` and the samplers are pure. Under `jit`, donate the buffer (or carry it through a scan) and `add` writes in
place; else XLA copies the whole memory at each call.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ring(NamedTuple):
    """`items`: pytree of [slots, streams, ...]. `cursor`: int32 [], the slot written next. `size`: int32 [], slots
    filled."""

    items: Any
    cursor: jax.Array
    size: jax.Array


def init(item: Any, *, slots: int, streams: int = 1) -> Ring:
    """An empty ring.

    Args:
      item: one stream's item, a pytree of arrays or `jax.ShapeDtypeStruct`; only shapes and types are read.
      slots: moments to keep.
      streams: parallel streams, such as environments. The capacity is slots x streams items.

    Raises:
      ValueError: without room for one item.
    """
    if slots < 1 or streams < 1:
        raise ValueError(f"a ring of {slots} slots x {streams} streams was asked for; expected at least 1 of each")
    zeros = lambda leaf: jnp.zeros((slots, streams, *leaf.shape), leaf.dtype)
    return Ring(jax.tree.map(zeros, item), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(ring: Ring, items: Any) -> Ring:
    """Writes one moment over the oldest.

    Args:
      ring: the memory; donate it.
      items: pytree like the ring's, leaves [streams, ...], one item of each stream.

    Raises:
      ValueError: another structure, or shapes other than the ring's.
    """
    _check(ring, items)
    slots, _ = shape(ring)
    write = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), ring.cursor, 0)
    return Ring(jax.tree.map(write, ring.items, items), (ring.cursor + 1) % slots, jnp.minimum(ring.size + 1, slots))


def extend(ring: Ring, items: Any) -> Ring:
    """Adds T moments one after the other: leaves [T, streams, ...]."""
    ring, _ = jax.lax.scan(lambda ring, moment: (add(ring, moment), None), ring, items)
    return ring


def sample(ring: Ring, key: jax.Array, n: int) -> Any:
    """`n` items, uniform and with replacement; leaves [n, ...].

    The key is consumed. Of an empty ring, zeros.
    """
    _, streams = shape(ring)
    return take(ring, below(key, n, jnp.maximum(ring.size * streams, 1)))


def sample_sequences(ring: Ring, key: jax.Array, n: int, *, length: int) -> Any:
    """`n` runs of `length` consecutive items of one stream, uniform and with replacement; leaves [n, length, ...].

    No run crosses the point of writing, where the newest item meets the oldest. Episodes may end inside a run.

    Args:
      ring: holds at least `length` moments; before that, runs begin with the oldest and end in zeros.
      key: consumed.
      n, length: sizes.

    Raises:
      ValueError: `length` outside 1 .. slots.
    """
    slots, streams = shape(ring)
    if not 1 <= length <= slots:
        raise ValueError(f"sequences of length {length} were asked of a ring of {slots} slots; expected 1 to {slots}")
    starts = jnp.maximum(ring.size - length + 1, 1) * streams
    oldest = jnp.where(ring.size == slots, ring.cursor, 0) * streams
    after_oldest = below(key, n, starts)
    return take_sequences(ring, (oldest + after_oldest) % (slots * streams), length=length)


def below(key: jax.Array, n: int, limit: jax.Array) -> jax.Array:
    """`n` numbers from 0 to `limit` - 1, int32 [n], at a third of `jax.random.randint`'s price; the key is consumed.

    The remainder of 32 random bits: no number is more frequent than another by more than limit / 2^32.
    """
    return (jax.random.bits(key, (n,), jnp.uint32) % limit.astype(jnp.uint32)).astype(jnp.int32)


def take(ring: Ring, index: jax.Array) -> Any:
    """The items at flat positions slot x streams + stream: int32 [n] -> leaves [n, ...]."""
    slots, streams = shape(ring)
    gather = lambda leaf: leaf.reshape(slots * streams, *leaf.shape[2:]).at[index].get(mode="clip")
    return jax.tree.map(gather, ring.items)


def take_sequences(ring: Ring, index: jax.Array, *, length: int) -> Any:
    """The items at flat positions `index` [n] and the `length` - 1 after each, in time; leaves [n, length, ...]."""
    slots, streams = shape(ring)
    steps = jnp.arange(length, dtype=jnp.int32) * streams
    return take(ring, (index[:, None] + steps[None, :]) % (slots * streams))


def shape(ring: Ring) -> tuple[int, int]:
    """(slots, streams)."""
    slots, streams = jax.tree.leaves(ring.items)[0].shape[:2]
    return slots, streams


def _check(ring: Ring, items: Any) -> None:
    expected, given = jax.tree.structure(ring.items), jax.tree.structure(items)
    if expected != given:
        raise ValueError(f"items have the structure {given}, the ring holds {expected}: add what it was made for")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(ring.items), jax.tree.leaves(items), strict=True):
        if jnp.shape(new) != old.shape[1:]:
            raise ValueError(
                f"item{jax.tree_util.keystr(path)} has shape {jnp.shape(new)}, expected [streams, ...] = "
                f"{old.shape[1:]}: one item of every stream, as in init"
            )
