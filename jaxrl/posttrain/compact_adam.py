"""Adam whose two moments are kept in 16 or 8 bits between updates; each update computes in float32, by optax.

The moments of p parameters take 8 p bytes in float32, 4 p in bfloat16 and, in rows of 2048 or more, 2.03 p in int8.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

BLOCK = 256
"""Entries that share a scale, at most."""
SHARDS = 8
"""The last axis is cut into a multiple of so many blocks: scales divide over the devices that the parameter lies on."""
SMALL = 4096
"""Parameters with fewer entries, and vectors, keep moments in float32."""


def magnitudes(cells: int) -> np.ndarray:
    """The positive half of dynamic tree quantisation: 0, the middles of ever finer cells, 1; ascending, float32.

    Decade e = 0 .. 6, from 10^(e - 7) to 10^(e - 6), is cut into `cells` 2^e equal cells: smaller numbers have more
    bits for the exponent, fewer for the fraction. With a sign `cells` is 1, without one 2. (Dettmers 2015, arXiv
    1511.04561; as in the released code of Dettmers et al. 2021, arXiv 2110.02861.)
    """
    borders = [10.0 ** (e - 6) * np.linspace(0.1, 1.0, cells * 2**e + 1) for e in range(7)]
    return np.concatenate([[0.0], *((b[1:] + b[:-1]) / 2 for b in borders), [1.0]]).astype(np.float32)


class Book(NamedTuple):
    """256 values in [-1, 1]; a code is the place of a value.

    values: [256], ascending. zero: code of 0; the values from there on are `magnitudes`.
    """

    values: np.ndarray
    zero: int


def _book(signed: bool) -> Book:
    half = magnitudes(1 if signed else 2)
    return Book(np.concatenate([-half[-2:0:-1], half]), 127) if signed else Book(half, 0)


SIGNED, UNSIGNED = _book(True), _book(False)


def _steps(book: Book) -> tuple[np.ndarray, np.ndarray]:
    """(place of each float32 in [0, 2) whose lower 16 bits are 0, borders between the magnitudes).

    Floats with the same upper 16 bits have one border between them at most: one comparison from the first of them on.
    """
    half = book.values[book.zero :]
    borders = (half[1:] + half[:-1]) / 2
    first = np.searchsorted(borders, (np.arange(2**14, dtype=np.uint32) << 16).view(np.float32))
    return first.astype(np.int32), np.append(borders, np.float32(np.inf))


class Coded(NamedTuple):
    """What `quantise` makes. codes: uint8, as the array; scales: float32 [..., blocks]."""

    codes: jax.Array
    scales: Any


def blocks(length: int) -> tuple[int, int]:
    """Number of blocks of an axis, the least multiple of `SHARDS` that will do, and their length, at most `BLOCK`."""
    number = -(-max(length, 1) // (BLOCK * SHARDS)) * SHARDS
    return number, -(-length // number)


def quantise(x: jax.Array, book: Book) -> Coded:
    """The nearest value of the book to x / max |x| of its block.

    Blocks lie along the last axis, so none spans two rows; the last may be shorter, or empty, with a scale of 0. Of two
    values as near, the smaller in size. Deviations from the paper: -max |x| becomes -0.993 max |x| as in its code (the
    signed book has no -1), and without a sign only 0 becomes 0: a second moment that is not zero never divides by zero.

    Args:
      x: [..., D]; not negative where the book has no sign.
      book: `SIGNED` or `UNSIGNED`.
    """
    tiles = _tiles(x.astype(jnp.float32))
    scales = jnp.abs(tiles).max(-1, initial=0.0)
    size = jnp.abs(tiles) / jnp.where(scales == 0, 1.0, scales)[..., None]
    first, borders = _steps(book)
    place = jnp.asarray(first)[lax.bitcast_convert_type(size, jnp.uint32) >> 16]
    place += size > jnp.asarray(borders)[place]
    if book.zero == 0:
        codes = jnp.maximum(place, size > 0)
    else:
        codes = book.zero + jnp.where(tiles < 0, -jnp.minimum(place, book.zero), place)
    return Coded(_flat(codes.astype(jnp.uint8), x.shape), scales)


def dequantise(coded: Coded, book: Book) -> jax.Array:
    """float32 [..., D]: value of the code times scale of the block."""
    values = jnp.asarray(book.values)[coded.codes]
    return _flat(_tiles(values) * coded.scales[..., None], values.shape)


def _tiles(x: jax.Array) -> jax.Array:
    """[..., D] -> [..., blocks, length], padded with zeros."""
    number, length = blocks(x.shape[-1])
    pad = [(0, 0)] * (x.ndim - 1) + [(0, number * length - x.shape[-1])]
    return jnp.pad(x, pad).reshape(*x.shape[:-1], number, length)


def _flat(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return tiles.reshape(*shape[:-1], -1)[..., : shape[-1]]


class EightBitState(NamedTuple):
    """Moments in 8 bits. The trees are as the parameters', so sharding rules by path fit each of their leaves.

    count: updates done. mu, nu: codes, or float32 where the parameter is small. mu_scales, nu_scales: [..., blocks],
    None where the parameter is small.
    """

    count: Any
    mu: Any
    nu: Any
    mu_scales: Any
    nu_scales: Any


def _to_int8(state: Any) -> EightBitState:
    def pack(moments, book):
        coded = jax.tree.map(lambda x: quantise(x, book) if x.ndim > 1 and x.size >= SMALL else Coded(x, None), moments)
        take = lambda name: jax.tree.map(lambda c: getattr(c, name), coded, is_leaf=lambda c: isinstance(c, Coded))
        return take("codes"), take("scales")

    (mu, mu_scales), (nu, nu_scales) = pack(state.mu, SIGNED), pack(state.nu, UNSIGNED)
    return EightBitState(state.count, mu, nu, mu_scales, nu_scales)


def _from_int8(state: EightBitState) -> optax.ScaleByAdamState:
    def unpack(codes, scales, book):
        one = lambda c, s: c if s is None else dequantise(Coded(c, s), book)
        return jax.tree.map(one, codes, scales)

    mu, nu = unpack(state.mu, state.mu_scales, SIGNED), unpack(state.nu, state.nu_scales, UNSIGNED)
    return optax.ScaleByAdamState(state.count, mu, nu)


def stochastic_bfloat16(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds up or down with the probability that leaves the mean as it is."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _to_bfloat16(state: Any, *, noise: bool) -> optax.ScaleByAdamState:
    half = lambda tree: optax.tree.cast(tree, jnp.bfloat16)
    if not noise:
        return state._replace(mu=half(state.mu), nu=half(state.nu))
    leaves, structure = jax.tree.flatten(state.nu)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count), max(len(leaves), 1))
    nu = jax.tree.unflatten(structure, list(map(stochastic_bfloat16, keys, leaves)))
    return state._replace(mu=half(state.mu), nu=nu)


def _from_bfloat16(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    return state._replace(mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32))


STATES = ("float32", "bfloat16", "int8")


def scale_by_compact_adam(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, state: str = "float32"
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments kept in fewer bits. The update is computed before they are rounded.

    float32: optax's own, in the type of the parameters.

    bfloat16: to the nearest; but the second moment stochastically where 1 - b2 < 2^-7. Half a step of bfloat16 is up to
    2^-8 of a number, and a smaller decay is lost: with b2 = 0.999 the root of the second moment ended 1.2 times too
    large. The noise is drawn from the update count alone, so a resumed run is the same to the bit.

    int8: block-wise dynamic quantisation (Dettmers et al. 2021, arXiv 2110.02861), to the nearest as there; see
    `quantise`. Small parameters and vectors keep float32.

    Args:
      b1, b2, eps: see `optax.scale_by_adam`.
      state: float32, bfloat16 or int8.

    Raises:
      ValueError: another state.
    """
    if state not in STATES:
        raise ValueError(f"optimizer state is {state!r}; expected {', '.join(STATES[:-1])} or {STATES[-1]}")
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if state == "float32":
        return adam
    pack: Callable = _to_int8 if state == "int8" else partial(_to_bfloat16, noise=1 - b2 < 2**-7)
    unpack: Callable = _from_int8 if state == "int8" else _from_bfloat16

    def init(params):
        return pack(lax.optimization_barrier(adam.init(params)))  # or XLA rounds the zeros while it compiles, slowly

    def update(updates, state: Any, params=None):
        updates, after = adam.update(updates, unpack(state), params)
        return updates, pack(after)

    return optax.GradientTransformation(init, update)
