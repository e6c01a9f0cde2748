"""Prioritised replay: the ring, sampled in proportion to priorities kept in a sum tree.

Schaul et al. 2016, arXiv 1511.05952, the proportional variant. The tree is one array in heap order: node 1 is the root,
node i has the children 2i and 2i + 1, and every inner node is the sum of its two children, computed anew from them at
each change, so that no rounding error builds up. Sampling and updating are O(log capacity) for each item.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.buffers import ring as rings
from jaxrl.buffers.ring import Ring


class Prioritised(NamedTuple):
    """`ring`: the items. `tree`: float32 [2 leaves], sums of priorities. `largest`: float32 [], the largest priority
    given so far; new items get it, so that each is replayed soon."""

    ring: Ring
    tree: jax.Array
    largest: jax.Array


class Sample(NamedTuple):
    """`items`: leaves [n, length, ...]. `weights`: float32 [n], importance weights, the largest of them 1. `index`:
    int32 [n], what `update` takes."""

    items: Any
    weights: jax.Array
    index: jax.Array


def init(item: Any, *, slots: int, streams: int = 1) -> Prioritised:
    """An empty buffer; arguments as `ring.init`."""
    leaves = 1 << (slots * streams - 1).bit_length()
    return Prioritised(rings.init(item, slots=slots, streams=streams), jnp.zeros(2 * leaves), jnp.ones(()))


def add(buffer: Prioritised, items: Any, *, length: int = 1) -> Prioritised:
    """Writes one moment, leaves [streams, ...], over the oldest; donate the buffer.

    With `length` > 1 an item may be drawn only once the `length` - 1 items that follow it are there, and no longer when
    they are being overwritten. Give `sample` the same length.
    """
    slots, streams = rings.shape(buffer.ring)
    cursor = buffer.ring.cursor
    ring = rings.add(buffer.ring, items)
    stream = jnp.arange(streams, dtype=jnp.int32)
    tree = _write(buffer.tree, cursor * streams + stream, jnp.zeros(streams))
    complete = (cursor - (length - 1)) % slots * streams + stream
    enough = jnp.where(ring.size >= length, buffer.largest, 0.0)
    return Prioritised(ring, _write(tree, complete, jnp.broadcast_to(enough, (streams,))), buffer.largest)


def sample(buffer: Prioritised, key: jax.Array, n: int, *, beta: jax.Array | float, length: int = 1) -> Sample:
    """`n` sequences of `length` items, each start drawn with P(i) = p_i / sum p.

        w_i = (N P(i))^-beta / max_j w_j,     N the number of items, the maximum over the sample

    The draws are stratified as in the paper: one from each n-th part of the total priority.

    Args:
      buffer: holds at least `length` moments.
      key: consumed.
      n: number of draws.
      beta: 0 for no correction, 1 for all of it.
      length: as in `add`.
    """
    _, streams = rings.shape(buffer.ring)
    total = buffer.tree[1]
    places = (jnp.arange(n) + jax.random.uniform(key, (n,))) / n * total
    index = _find(buffer.tree, places)
    probability = priorities(buffer, index) / total
    weights = (buffer.ring.size * streams * probability) ** -jnp.asarray(beta, jnp.float32)
    return Sample(rings.take_sequences(buffer.ring, index, length=length), weights / weights.max(), index)


def priorities(buffer: Prioritised, index: jax.Array) -> jax.Array:
    """The priorities [n] of the items at `index` [n]."""
    return buffer.tree[buffer.tree.shape[0] // 2 + index]


def update(buffer: Prioritised, index: jax.Array, values: jax.Array) -> Prioritised:
    """Gives the items at `index` [n] the priorities `values` [n], positive: usually (|TD error| + epsilon)^alpha.

    Where an index comes twice, one of its priorities is taken.
    """
    values = jnp.asarray(values, jnp.float32)
    return buffer._replace(tree=_write(buffer.tree, index, values), largest=jnp.maximum(buffer.largest, values.max()))


def _write(tree: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Sets leaves [n] and all sums above them."""
    leaves = tree.shape[0] // 2

    def level(_, carry):
        tree, node = carry
        node = node // 2
        return tree.at[node].set(tree[2 * node] + tree[2 * node + 1]), node

    node = leaves + index
    tree, _ = jax.lax.fori_loop(0, leaves.bit_length() - 1, level, (tree.at[node].set(values), node))
    return tree


def _find(tree: jax.Array, places: jax.Array) -> jax.Array:
    """The leaf in which each place [n] of the total lies; never one of priority zero unless all are."""
    leaves = tree.shape[0] // 2

    def level(_, carry):
        place, node = carry
        left = tree[2 * node]
        right = (place >= left) & (tree[2 * node + 1] > 0)  # rounding may lead past the last positive leaf
        return jnp.where(right, place - left, place), 2 * node + right

    start = (places, jnp.ones(places.shape, jnp.int32))
    _, node = jax.lax.fori_loop(0, leaves.bit_length() - 1, level, start)
    return node - leaves
