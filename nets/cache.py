"""Keys and values of a decoder's past: the whole cache, one layer's place in it, and 8-bit numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.kernels.quantised import Quantised, dequantise, quantise

if TYPE_CHECKING:
    from jaxrl.nets.config import TransformerConfig


class Int8(NamedTuple):
    """Keys or values of a cache in 8 bits: x is about values * scales, one scale for each token and kv head.

    values: int8 [..., Dh]. scales: float32 [...]; an axis of one number more would be padded to a tile on a TPU.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values: [L, B, K, S, Dh] of a whole cache."""
        return self.values.shape


def pack(x: jax.Array) -> Int8:
    """x [..., S, Dh] as `Int8`, symmetric: 127 steps to either side, each (max |x| of the token and head) / 127."""
    values, scales = quantise(x, dtype=jnp.int8, block=(1, None))
    return Int8(values, scales[..., 0])


def unpack(x: jax.Array | Int8, dtype: str) -> jax.Array:
    """Keys or values of a cache as floats, [..., S, Dh]."""
    if isinstance(x, Int8):
        return dequantise(Quantised(x.values, x.scales[..., None]), block=(1, None), dtype=dtype)
    return x.astype(dtype)


class Slot(NamedTuple):
    """Where one layer keeps its keys and values.

    k, v: the whole cache, [L, B, K, S, Dh], each an array or an `Int8`, v None where values are made from k; layer:
    its row of axis L; length: the first free column of axis S.
    """

    k: jax.Array | Int8
    v: jax.Array | Int8 | None
    layer: jax.Array
    length: jax.Array


def store(slot: Slot, k: jax.Array, v: jax.Array | None) -> Slot:
    """Write k and v [B, T, K, Dh] at columns [length, length + T) of the slot's layer, in place under jit."""
    start = (slot.layer, 0, 0, slot.length, 0)

    def put(cache, x):
        return jax.lax.dynamic_update_slice(cache, x.astype(cache.dtype), start[: cache.ndim])

    def write(cache, x):
        x = jnp.swapaxes(x, 1, 2)[None]
        return jax.tree.map(put, cache, pack(x) if isinstance(cache, Int8) else x)

    return slot._replace(k=write(slot.k, k), v=None if v is None else write(slot.v, v))


def load(slot: Slot, dtype: str) -> tuple[jax.Array, Any]:
    """All columns of the slot's layer, as keys and values [B, S, K, Dh]; values None where the cache has none."""

    def read(cache):
        layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot.layer, keepdims=False), cache)
        return jnp.swapaxes(unpack(layer, dtype), 1, 2)

    return read(slot.k), None if slot.v is None else read(slot.v)


class Layered(NamedTuple):
    """k of a cache of which some layers, or all, are linear: those keep a state instead of keys and values.

    keys: as `Cache.k`, of the layers that attend, in their order; None where there are none. states: float32
    [L', B, H, 1, D, Dv] of the linear layers: one column, however many tokens it has seen.
    """

    keys: jax.Array | Int8 | None
    states: jax.Array


def read_state(slot: Slot) -> jax.Array:
    """The state of the slot's layer, float32 [B, H, D, Dv]; slot.k holds the states."""
    return jax.lax.dynamic_index_in_dim(slot.k, slot.layer, keepdims=False)[:, :, 0]


def write_state(slot: Slot, state: jax.Array) -> Slot:
    """Put a state into the slot's layer, in place under jit."""
    return slot._replace(k=jax.lax.dynamic_update_index_in_dim(slot.k, state[:, :, None], slot.layer, 0))


class Cache(NamedTuple):
    """Keys and values of the columns written so far; all rows share the column cursor.

    k, v: [L, B, K, S, Dh]: heads before columns, the order in which attention reads them, so that a decode
    step copies nothing. Each is an array or, with cache_dtype "int8", an `Int8`: code that moves rows or
    columns goes through `jax.tree.map`. With latent attention K is 1, k holds latents and rotated keys, and v is None.
    With linear layers k is `Layered`, and keys and values have as many rows of axis L as layers attend.
    length: int32 scalar, columns written. Batches of unequal prompts are padded on the left, and the caller's mask
    hides the padding (`Segments`).
    """

    k: jax.Array | Int8 | Layered
    v: jax.Array | Int8 | None
    length: jax.Array

    @property
    def columns(self) -> int | None:
        """S; None where no layer keeps columns."""
        keys = self.k.keys if isinstance(self.k, Layered) else self.k
        return None if keys is None else keys.shape[3]


def init_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` columns for `batch` rows, in the config's cache_dtype.

    In 8 bits a token and kv head take Dh + 4 bytes, for keys and values each. Attention sees the rounded keys and
    values from the first call on, a prompt's own included; they are turned into the compute dtype layer by layer.

    Raises:
      ValueError: if `length` exceeds `config.max_length`.
    """
    if length > config.max_length:
        raise ValueError(
            f"a cache of {length} columns was asked for, but the config's max_length is {config.max_length}: "
            "shorten the prompts, generate fewer tokens, or raise max_length"
        )
    return empty_cache(config, batch, length)


def empty_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """As `init_cache`, of any length: where columns are used again there may be more of them than positions."""
    latent = config.latent
    heads, size = (config.kv_heads, config.head_size) if latent is None else (1, latent.cached)
    attending = sum(not kind.linear for kind in config.kinds)
    shape = (attending, batch, heads, length, size)

    def empty():
        if config.cache_dtype == "int8":
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, config.cache_dtype or config.dtype)

    keys: Any = empty() if attending else None
    values = empty() if attending and latent is None else None
    if config.linear is None:
        return Cache(keys, values, jnp.int32(0))
    heads, *sizes = config.linear.state(config.heads, config.kv_heads, config.head_size)
    states = jnp.zeros((config.layers - attending, batch, heads, 1, *sizes), jnp.float32)
    return Cache(Layered(keys, states), values, jnp.int32(0))
