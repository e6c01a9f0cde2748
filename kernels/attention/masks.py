"""Masks as small values: which key may a query see.

A mask is one predicate, `allowed(tile)`, over a rectangle of (query, key) pairs, and one conservative
test, `live(tile)`, that says whether the rectangle may hold any allowed pair at all. The dense form is the
predicate on the whole rectangle; blocked kernels ask for one tile at a time and skip those that are not
live. The formula therefore stands once.

Masks are frozen dataclasses registered as pytrees: arrays inside are leaves (they may be traced, sharded,
vmapped over), plain integers are static. `a & b` allows what both allow, `a | b` what either allows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Index = int | jax.Array

AXIS_OF_FIELD = {"q_ids": "q", "start": "q", "stop": "q", "kv_ids": "k", "end": "k", "lengths": "row"}
"""Along what the arrays of masks lie, by field: queries, keys, or one value for each batch row."""


class Rectangle(Protocol):
    """What a predicate may ask about the pairs it is evaluated on; the values broadcast together."""

    @property
    def q_first(self) -> Any: ...  # index of the first query of the rectangle
    @property
    def q_last(self) -> Any: ...
    @property
    def k_first(self) -> Any: ...
    @property
    def k_last(self) -> Any: ...
    @property
    def k_length(self) -> int: ...  # number of keys in the whole mask
    @property
    def q(self) -> jax.Array: ...  # query indices, as a column
    @property
    def k(self) -> jax.Array: ...  # key indices, as a row
    def of_query(self, values: jax.Array) -> jax.Array: ...  # [B, Q] -> the values of these queries
    def of_key(self, values: jax.Array) -> jax.Array: ...  # [B, S] -> the values of these keys
    def of_row(self, values: jax.Array) -> jax.Array: ...  # [B] -> the values of these batch rows
    def of_pair(self, values: jax.Array) -> jax.Array: ...  # [B|1, H|1, Q, S] -> the values of these pairs


class Tile(NamedTuple):
    """q_size queries from q_first on against k_size keys from k_first on, as [B|1, H|1, q_size, k_size].

    `row` and `head` pick one batch row and one query head; None keeps them all. Indices past the end of an
    array read its last element: whoever makes tiles that overhang must mask the tail.
    """

    q_first: Index
    q_size: int
    k_first: Index
    k_size: int
    k_length: int
    row: Index | None = None
    head: Index | None = None

    @property
    def q_last(self) -> Index:
        return self.q_first + (self.q_size - 1)

    @property
    def k_last(self) -> Index:
        return self.k_first + (self.k_size - 1)

    @property
    def q(self) -> jax.Array:
        return (self.q_first + jnp.arange(self.q_size, dtype=jnp.int32)).reshape(1, 1, -1, 1)

    @property
    def k(self) -> jax.Array:
        return (self.k_first + jnp.arange(self.k_size, dtype=jnp.int32)).reshape(1, 1, 1, -1)

    def of_query(self, values: jax.Array) -> jax.Array:
        return _span(_pick(values, self.row, 0), self.q_first, self.q_size, 1)[:, None, :, None]

    def of_key(self, values: jax.Array) -> jax.Array:
        return _span(_pick(values, self.row, 0), self.k_first, self.k_size, 1)[:, None, None, :]

    def of_row(self, values: jax.Array) -> jax.Array:
        return _pick(values, self.row, 0)[:, None, None, None]

    def of_pair(self, values: jax.Array) -> jax.Array:
        values = _pick(_pick(values, self.row, 0), self.head, 1)
        return _span(_span(values, self.q_first, self.q_size, 2), self.k_first, self.k_size, 3)


def _pick(values: jax.Array, index: Index | None, axis: int) -> jax.Array:
    if index is None or values.shape[axis] == 1:
        return values
    return lax.dynamic_index_in_dim(values, index, axis, keepdims=True)


def _span(values: jax.Array, first: Index, size: int, axis: int) -> jax.Array:
    if isinstance(first, int) and first + size <= values.shape[axis]:
        return lax.slice_in_dim(values, first, first + size, axis=axis)
    return jnp.take(values, first + jnp.arange(size), axis=axis, mode="clip")


class Mask:
    """Base of all masks: supplies `&`, `|` and the pytree methods.

    A mask of your own is a frozen dataclass under `jax.tree_util.register_pytree_with_keys_class`, with `allowed`,
    `live` and `check`. (Not under `register_dataclass`: in jaxlib 0.10 the structures of two such classes with
    the same static values are equal, and `jit` may serve `Causal()` with the program traced for `Full()`.)
    """

    def allowed(self, tile: Rectangle) -> jax.Array:
        """Bool for every pair of the tile, broadcastable to it."""
        raise NotImplementedError

    def live(self, tile: Rectangle) -> Any:
        """Scalar bool: False only if no pair of the tile is allowed."""
        raise NotImplementedError

    def full(self, tile: Rectangle) -> Any:
        """Scalar bool: True only if every pair of the tile is allowed."""
        return False

    def reach(self) -> int | None:
        """r such that no query sees a key r or more away from it, |q - k| >= r; None if there is none."""
        return None

    def check(self, shape: tuple[int, int, int, int], q_offset: Index) -> None:
        """Raise ValueError if the mask's arrays cannot serve attention of `shape` (B, H, T, S)."""

    def tree_flatten_with_keys(self):
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        leaves = tuple(f.name for f in fields if "static" not in f.metadata)
        static = tuple((f.name, getattr(self, f.name)) for f in fields if "static" in f.metadata)
        keyed = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves)
        return keyed, (leaves, static)

    @classmethod
    def tree_unflatten(cls, structure, values):
        self = object.__new__(cls)  # as a pytree's values may be anything, __post_init__ does not judge them
        leaves, static = structure
        for name, value in (*zip(leaves, values, strict=True), *static):
            object.__setattr__(self, name, value)
        return self

    def __and__(self, other: Mask) -> And:
        return And(self, other)

    def __or__(self, other: Mask) -> Or:
        return Or(self, other)


def dense(mask: Mask, shape: tuple[int, int, int, int], q_offset: Index = 0) -> jax.Array:
    """The mask as an array.

    Args:
      mask: the mask.
      shape: (B, H, T, S).
      q_offset: row of the mask at which query 0 stands; may be traced.

    Returns:
      bool [B|1, H|1, T|1, S|1]: axes along which the mask is constant may have length 1.
    """
    return mask.allowed(Tile(q_offset, shape[2], 0, shape[3], shape[3]))


def with_explicit_keys(mask: Mask) -> Mask:
    """The same mask with the key ids of every `Segments` filled in, so that each array belongs to one axis."""
    is_segments = lambda x: isinstance(x, Segments)
    fill = lambda x: Segments(x.q_ids, x.keys()) if is_segments(x) else x
    return jax.tree.map(fill, mask, is_leaf=is_segments)


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


def _expect(name: str, what: str, shape: tuple[int, ...], expected: tuple[tuple[int, ...], ...], axes: str):
    """Each entry of `expected` lists the lengths an axis may have; (-n,) means n or more."""
    fits = len(shape) == len(expected) and all(
        any(n == e or (e < 0 and n >= -e) for e in es) for n, es in zip(shape, expected, strict=True)
    )
    if not fits:
        lengths = ", ".join(
            " or ".join(f"at least {-e}" if e < 0 else str(e) for e in dict.fromkeys(es)) for es in expected
        )
        raise ValueError(f"{name}: {what} has shape {shape}, expected {axes} = [{lengths}].")


def _rows(t: int, q_offset: Index) -> tuple[int, ...]:
    return (-(q_offset + t if isinstance(q_offset, int) else t),)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def allowed(self, tile):
        return jnp.ones((1,) * jnp.ndim(tile.q), bool)

    def live(self, tile):
        return True

    def full(self, tile):
        return True


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Exists(Mask):
    """Every query sees every key that there is: for tiles that overhang."""

    def allowed(self, tile):
        return tile.k < tile.k_length

    def live(self, tile):
        return tile.k_first < tile.k_length

    def full(self, tile):
        return tile.k_last < tile.k_length


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what came before: k <= q."""

    def allowed(self, tile):
        return tile.k <= tile.q

    def live(self, tile):
        return tile.k_first <= tile.q_last

    def full(self, tile):
        return tile.k_last <= tile.q_first


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A query sees itself and the n - 1 keys before it: 0 <= q - k < n. (Causal already.)"""

    n: int = _static()

    def __post_init__(self):
        _positive("Window", "n", self.n)

    def allowed(self, tile):
        return (tile.k <= tile.q) & (tile.k > tile.q - self.n)

    def live(self, tile):
        return (tile.k_first <= tile.q_last) & (tile.k_last > tile.q_first - self.n)

    def full(self, tile):
        return (tile.k_last <= tile.q_first) & (tile.k_first > tile.q_last - self.n)

    def reach(self):
        return self.n


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Chunked(Mask):
    """Queries see keys of their own chunk of n: q // n == k // n. (Llama 4's local layers, with Causal.)"""

    n: int = _static()

    def __post_init__(self):
        _positive("Chunked", "n", self.n)

    def allowed(self, tile):
        return _div(tile.q, self.n) == _div(tile.k, self.n)

    def live(self, tile):
        q_first, q_last = _div(tile.q_first, self.n), _div(tile.q_last, self.n)
        k_first, k_last = _div(tile.k_first, self.n), _div(tile.k_last, self.n)
        return (q_first <= k_last) & (k_first <= q_last)

    def full(self, tile):
        q_first, q_last = _div(tile.q_first, self.n), _div(tile.q_last, self.n)
        k_first, k_last = _div(tile.k_first, self.n), _div(tile.k_last, self.n)
        return (q_first == q_last) & (k_first == k_last) & (q_first == k_first)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Every query sees the first lengths[b] keys, lengths int [B]. (Prefix-LM: `Causal() | Prefix(n)`.)"""

    lengths: jax.Array

    def allowed(self, tile):
        return tile.k < tile.of_row(self.lengths)

    def live(self, tile):
        return tile.k_first < jnp.max(tile.of_row(self.lengths))

    def full(self, tile):
        return tile.k_last < jnp.min(tile.of_row(self.lengths))

    def check(self, shape, q_offset):
        _expect("Prefix", "lengths", jnp.shape(self.lengths), ((shape[0], 1),), "[B]")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Queries see keys with the same id (packed documents, padding).

    q_ids int [B, Q] are the ids of the mask's rows; kv_ids int [B, S] those of the keys, by default q_ids.
    """

    q_ids: jax.Array
    kv_ids: jax.Array | None = None

    def keys(self) -> jax.Array:
        """The ids of the keys, [B, S]."""
        return self.q_ids if self.kv_ids is None else self.kv_ids

    def allowed(self, tile):
        return tile.of_query(self.q_ids) == tile.of_key(self.keys())

    def live(self, tile):
        q, k = tile.of_query(self.q_ids), tile.of_key(self.keys())
        return (jnp.min(q) <= jnp.max(k)) & (jnp.min(k) <= jnp.max(q))

    def full(self, tile):
        q, k = tile.of_query(self.q_ids), tile.of_key(self.keys())
        return (jnp.min(q) == jnp.max(k)) & (jnp.min(k) == jnp.max(q))

    def check(self, shape, q_offset):
        b, _, t, s = shape
        _expect("Segments", "q_ids", jnp.shape(self.q_ids), ((b, 1), _rows(t, q_offset)), "[B, q_offset + T]")
        what = "q_ids, which also serves as kv_ids," if self.kv_ids is None else "kv_ids"
        _expect("Segments", what, jnp.shape(self.keys()), ((b, 1), (s,)), "[B, S]")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Tree(Mask):
    """A key is seen from its own position to the end of its subtree: k <= q < end[k], end int [B, S].

    With the tokens of a tree in depth-first order this one vector expresses causal attention (end = S),
    packed documents (end of the document), and completions that share a prompt (the prompt's end covers
    them all).
    """

    end: jax.Array

    def allowed(self, tile):
        return (tile.k <= tile.q) & (tile.q < tile.of_key(self.end))

    def live(self, tile):
        return (tile.k_first <= tile.q_last) & (tile.q_first < jnp.max(tile.of_key(self.end)))

    def full(self, tile):
        return (tile.k_last <= tile.q_first) & (tile.q_last < jnp.min(tile.of_key(self.end)))

    def check(self, shape, q_offset):
        _expect("Tree", "end", jnp.shape(self.end), ((shape[0], 1), (shape[3],)), "[B, S]")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Span(Mask):
    """Every query has its own span of keys: start[q] <= k < stop[q], both int [B, Q]; empty where stop <= start."""

    start: jax.Array
    stop: jax.Array

    def allowed(self, tile):
        return (tile.of_query(self.start) <= tile.k) & (tile.k < tile.of_query(self.stop))

    def live(self, tile):
        start, stop = tile.of_query(self.start), tile.of_query(self.stop)
        return (jnp.min(start) <= tile.k_last) & (tile.k_first < jnp.max(stop))

    def full(self, tile):
        start, stop = tile.of_query(self.start), tile.of_query(self.stop)
        return (jnp.max(start) <= tile.k_first) & (tile.k_last < jnp.min(stop))

    def check(self, shape, q_offset):
        for name in ("start", "stop"):
            expected = ((shape[0], 1), _rows(shape[2], q_offset))
            _expect("Span", name, jnp.shape(getattr(self, name)), expected, "[B, q_offset + T]")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class BlockDiffusion(Mask):
    """Training mask of block diffusion: the sequence is [x_t ; x_0], 2 L tokens, both halves cut into blocks.

    A noisy token sees its own noisy block and the clean tokens of earlier blocks; a clean token sees the
    clean tokens of its own and earlier blocks. (Arriola et al. 2025, arXiv:2503.09573.)
    """

    block: int = _static()

    def __post_init__(self):
        _positive("BlockDiffusion", "block", self.block)

    def allowed(self, tile):
        half = tile.k_length // 2
        (q_noisy, q_clean), (k_noisy, k_clean) = ((x < half, x >= half) for x in (tile.q, tile.k))
        q_block, k_block = (_div(jnp.where(x < half, x, x - half), self.block) for x in (tile.q, tile.k))
        own_noisy = q_noisy & k_noisy & (q_block == k_block)
        earlier = k_clean & (k_block < q_block)
        own_clean = q_clean & k_clean & (q_block == k_block)
        return own_noisy | earlier | own_clean

    def live(self, tile):
        half = tile.k_length // 2
        q, k = (tile.q_first, tile.q_last), (tile.k_first, tile.k_last)
        (q_noisy, qn_first, qn_last), (q_clean, _, qc_last) = self._halves(q, half)
        (k_noisy, kn_first, kn_last), (k_clean, kc_first, _) = self._halves(k, half)
        own_noisy = q_noisy & k_noisy & (qn_first <= kn_last) & (kn_first <= qn_last)
        earlier = q_noisy & k_clean & (kc_first < qn_last)
        clean = q_clean & k_clean & (kc_first <= qc_last)
        return own_noisy | earlier | clean

    def full(self, tile):
        half = tile.k_length // 2
        block = lambda index: _div(jnp.maximum(index, 0), self.block)
        q_noisy, q_clean = tile.q_last < half, tile.q_first >= half
        k_noisy, k_clean = tile.k_last < half, tile.k_first >= half
        last_clean = block(tile.k_last - half)
        q, k = (block(tile.q_first), block(tile.q_last)), (block(tile.k_first), block(tile.k_last))
        own_noisy = q_noisy & k_noisy & (q[0] == q[1]) & (k[0] == k[1]) & (q[0] == k[0])
        earlier = q_noisy & k_clean & (last_clean < q[0])
        clean = q_clean & k_clean & (last_clean <= block(tile.q_first - half))
        return own_noisy | earlier | clean

    def _halves(self, span, half):
        """(any noisy, first noisy block, last noisy block), (the same for clean) of a span of indices."""
        first, last = span
        noisy = (first < half, _div(first, self.block), _div(jnp.minimum(last, half - 1), self.block))
        clean = (last >= half, _div(jnp.maximum(first - half, 0), self.block), _div(last - half, self.block))
        return noisy, clean

    def check(self, shape, q_offset):
        if shape[3] % 2:
            raise ValueError(f"BlockDiffusion: S = {shape[3]} keys, expected an even number: [x_t ; x_0].")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A mask given as an array: bool [B|1, H|1, Q, S], True where the query sees the key."""

    array: jax.Array

    def allowed(self, tile):
        return tile.of_pair(self.array)

    def live(self, tile):
        return jnp.any(tile.of_pair(self.array))

    def full(self, tile):
        return jnp.all(tile.of_pair(self.array))

    def check(self, shape, q_offset):
        b, h, t, s = shape
        expected = ((b, 1), (h, 1), _rows(t, q_offset), (s,))
        _expect("Dense", "array", jnp.shape(self.array), expected, "[B, H, q_offset + T, S]")
        if jnp.result_type(self.array) != jnp.bool_:
            raise ValueError(f"Dense: array has dtype {jnp.result_type(self.array)}, expected bool.")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class And(Mask):
    """What both masks allow."""

    a: Mask
    b: Mask

    def allowed(self, tile):
        return self.a.allowed(tile) & self.b.allowed(tile)

    def live(self, tile):
        return self.a.live(tile) & self.b.live(tile)

    def full(self, tile):
        return self.a.full(tile) & self.b.full(tile)

    def reach(self):
        return min((n for n in (self.a.reach(), self.b.reach()) if n is not None), default=None)

    def check(self, shape, q_offset):
        self.a.check(shape, q_offset)
        self.b.check(shape, q_offset)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Or(Mask):
    """What either mask allows."""

    a: Mask
    b: Mask

    def allowed(self, tile):
        return self.a.allowed(tile) | self.b.allowed(tile)

    def live(self, tile):
        return self.a.live(tile) | self.b.live(tile)

    def full(self, tile):
        return self.a.full(tile) | self.b.full(tile)

    def check(self, shape, q_offset):
        self.a.check(shape, q_offset)
        self.b.check(shape, q_offset)


def _div(x: Any, n: int) -> Any:
    """x // n for x >= 0. (`lax.div` truncates; floor division of traced values lowers to more.)"""
    return x // n if isinstance(x, int) else lax.div(x, jnp.full_like(x, n))


def _positive(name: str, field: str, n: int) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: {field} = {n!r}, expected an int of at least 1.")
