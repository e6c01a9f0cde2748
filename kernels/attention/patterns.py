"""Sparse attention as masks: the patterns of published networks. Frozen, hashable, made of numbers only.

Each is one predicate with its tests for a tile, as the masks of `masks`, and combines with them by `&` and `|`. On
tiles of consecutive queries and keys `live` is exact: the tiles that a kernel visits are those with an allowed pair.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention.dropout import _mix
from jaxrl.kernels.attention.masks import Chunked, Mask, _div, _positive, _static


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """The last `stride` keys, and before them every stride-th: 0 <= q - k <= stride or (q - k) mod stride = 0.

    Causal already. The union of both heads of the strided pattern (Child et al. 2019, arXiv:1904.10509, section 4.2).
    """

    stride: int = _static()

    def __post_init__(self):
        _positive("Strided", "stride", self.stride)

    def allowed(self, tile):
        distance = tile.q - tile.k
        return (distance >= 0) & ((distance <= self.stride) | (_rem(jnp.abs(distance), self.stride) == 0))

    def live(self, tile):
        near, far = _at_least_0(tile.q_first - tile.k_last), tile.q_last - tile.k_first
        multiple = _div(near + (self.stride - 1), self.stride) * self.stride  # the first one at or past `near`
        return (far >= 0) & ((near <= self.stride) | (multiple <= far))

    def full(self, tile):
        near, far = tile.q_first - tile.k_last, tile.q_last - tile.k_first
        one = (near == far) & (_rem(_at_least_0(near), self.stride) == 0)
        return (near >= 0) & ((far <= self.stride) | one | (self.stride == 1))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Fixed(Mask):
    """Keys of the query's own block, and the last `summary` ones of every block before it.

    Causal already: k <= q and (q // block = k // block or k mod block >= block - summary). The union of both heads of
    the fixed pattern (Child et al. 2019, arXiv:1904.10509, section 4.2).
    """

    block: int = _static()
    summary: int = _static()

    def __post_init__(self):
        _positive("Fixed", "block", self.block)
        _positive("Fixed", "summary", self.summary)
        if self.summary > self.block:
            raise ValueError(f"Fixed: summary = {self.summary}, expected at most block = {self.block}.")

    def allowed(self, tile):
        own = _div(tile.q, self.block) == _div(tile.k, self.block)
        return (tile.k <= tile.q) & (own | (_rem(tile.k, self.block) >= self.block - self.summary))

    def live(self, tile):
        start = self.block - self.summary
        into = _rem(tile.k_first, self.block)
        seen = tile.k_first + _at_least_0(start - into)  # the first of the keys that all later queries see
        last = jnp.minimum(tile.k_last, tile.q_last)
        return (tile.k_first <= tile.q_last) & (Chunked(self.block).live(tile) | (seen <= last))

    def full(self, tile):
        one = _div(tile.k_first, self.block) == _div(tile.k_last, self.block)
        seen = (one & (_rem(tile.k_first, self.block) >= self.block - self.summary)) | (self.summary == self.block)
        return (tile.k_last <= tile.q_first) & (Chunked(self.block).full(tile) | seen)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Longformer(Mask):
    """Keys at most `near` away on either side; the `first` tokens see all and are seen by all.

    (Beltagy et al. 2020, arXiv:2004.05150, whose window w is near = w / 2; global tokens stand at the front here.)
    """

    near: int = _static()
    first: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self):
        _positive("Longformer", "near", self.near)
        _natural("Longformer", "first", self.first)

    def allowed(self, tile):
        return (jnp.abs(tile.q - tile.k) <= self.near) | (tile.q < self.first) | (tile.k < self.first)

    def live(self, tile):
        close = (tile.k_first <= tile.q_last + self.near) & (tile.q_first <= tile.k_last + self.near)
        return close | (tile.q_first < self.first) | (tile.k_first < self.first)

    def full(self, tile):
        close = (tile.k_last <= tile.q_first + self.near) & (tile.q_last <= tile.k_first + self.near)
        return close | (tile.q_last < self.first) | (tile.k_last < self.first)

    def reach(self):
        return None if self.first else self.near + 1


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class BigBird(Mask):
    """By blocks of tokens: `window` blocks around the query's own, `ends` at either end, `random` drawn ones.

    The blocks at the ends also see everything. (Zaheer et al. 2020, arXiv:2007.14062, the form that is built inside the
    sequence.) A query's random blocks are a hash of its block, the draw's number and the seed, taken modulo the number
    of blocks of all keys: draws may repeat each other and what is seen anyway, and they depend on S, so that a cache
    with room for more keys has other ones. Meant for encoders; not causal.
    """

    block: int = _static()
    window: int = dataclasses.field(default=3, metadata={"static": True})
    ends: int = dataclasses.field(default=1, metadata={"static": True})
    random: int = dataclasses.field(default=3, metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self):
        for name in ("block", "window"):
            _positive("BigBird", name, getattr(self, name))
        for name in ("ends", "random", "seed"):
            _natural("BigBird", name, getattr(self, name))
        if self.window % 2 == 0:
            raise ValueError(f"BigBird: window = {self.window} blocks, expected an odd number: as many on either side.")

    def allowed(self, tile):
        q, k, blocks = _div(tile.q, self.block), _div(tile.k, self.block), self._blocks(tile)
        seen = (jnp.abs(q - k) <= self.window // 2) | self._end(q, blocks) | self._end(k, blocks)
        for draw in self._draws(q, blocks):
            seen = seen | (k == draw)
        return seen

    def live(self, tile):
        (q, k), blocks = self._spans(tile), self._blocks(tile)
        half = self.window // 2
        close = (k[0] <= q[1] + half) & (q[0] <= k[1] + half)
        at_end = [(span[0] < self.ends) | (span[1] >= blocks - self.ends) for span in (q, k)]
        seen = close | at_end[0] | at_end[1]
        for draw in self._draws(_div(tile.q, self.block), blocks):
            seen = seen | jnp.any((k[0] <= draw) & (draw <= k[1]))
        return seen

    def full(self, tile):
        (q, k), blocks = self._spans(tile), self._blocks(tile)
        half = self.window // 2
        close = (k[1] <= q[0] + half) & (q[1] <= k[0] + half)
        ends = [(span[1] < self.ends) | (span[0] >= blocks - self.ends) for span in (q, k)]
        seen = close | ends[0] | ends[1]
        for draw in self._draws(_div(tile.q, self.block), blocks):
            seen = seen | jnp.all((k[0] == draw) & (k[1] == draw))
        return seen

    def _blocks(self, tile) -> int:
        return -(-tile.k_length // self.block)

    def _spans(self, tile):
        """First and last block of the tile's queries, and of its keys."""
        of = lambda first, last: (_div(first, self.block), _div(last, self.block))
        return of(tile.q_first, tile.q_last), of(tile.k_first, tile.k_last)

    def _end(self, block, blocks: int):
        return (block < self.ends) | (block >= blocks - self.ends)

    def _draws(self, block, blocks: int):
        """The random blocks of each query's block."""
        words = lax.convert_element_type(block, jnp.uint32) * jnp.uint32(0x9E3779B1)
        for number in range(self.random):
            bits = _mix(_mix(words + jnp.uint32(self.seed % 2**32)) + jnp.uint32(number * 0x85EBCA77 % 2**32))
            yield _rem(lax.convert_element_type(bits >> 1, jnp.int32), max(blocks, 1))


Pattern = Chunked | Strided | Fixed | Longformer | BigBird
"""What a network's config may hold as its pattern; their fields tell them apart."""


def _rem(x, n: int):
    """x mod n for x >= 0."""
    return x - _div(x, n) * n


def _at_least_0(x):
    return max(x, 0) if isinstance(x, int) else jnp.maximum(x, 0)


def _natural(name: str, field: str, n: int) -> None:
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"{name}: {field} = {n!r}, expected an int of at least 0.")
