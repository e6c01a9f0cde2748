"""Self-attention of a decoder layer: projections, QK-norm, rotary positions, cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Full, Window, attention
from jaxrl.kernels.quantised import Quantised, dequantise, quantise
from jaxrl.nets.layers import Linear, RMSNorm, normal
from jaxrl.nets.rope import rotate


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

    k, v: the whole cache, [L, B, K, S, Dh], each an array or an `Int8`; layer: its row of axis L; length: the
    first free column of axis S.
    """

    k: jax.Array | Int8
    v: jax.Array | Int8
    layer: jax.Array
    length: jax.Array


def store(slot: Slot, k: jax.Array, v: jax.Array) -> Slot:
    """Write k and v [B, T, K, Dh] at columns [length, length + T) of the slot's layer, in place under jit."""
    start = (slot.layer, 0, 0, slot.length, 0)

    def put(cache, x):
        return jax.lax.dynamic_update_slice(cache, x.astype(cache.dtype), start[: cache.ndim])

    def write(cache, x):
        x = jnp.swapaxes(x, 1, 2)[None]
        return jax.tree.map(put, cache, pack(x) if isinstance(cache, Int8) else x)

    return slot._replace(k=write(slot.k, k), v=write(slot.v, v))


def load(slot: Slot, dtype: str) -> tuple[jax.Array, jax.Array]:
    """All columns of the slot's layer, as keys and values [B, S, K, Dh]."""

    def read(cache):
        layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot.layer, keepdims=False), cache)
        return jnp.swapaxes(unpack(layer, dtype), 1, 2)

    return read(slot.k), read(slot.v)


def with_prefix(q, prefix, y, lse):
    """Attention as if keys and values that every query sees stood before those that were attended to.

    With o', lse' of attention to the prefix alone:  y = (exp(lse) o + exp(lse') o') / (exp(lse) + exp(lse')).

    Args:
      q: [B, T, H, Dh].
      prefix: {"k", "v"}, each [P, K, Dh], the keys rotated already or not to be rotated.
      y, lse: [B, T, H, Dh] and float32 [B, T, H], of attention without the prefix.
    """
    whole = (q.shape[0], *prefix["k"].shape)
    k, v = (jnp.broadcast_to(prefix[name][None].astype(q.dtype), whole) for name in ("k", "v"))
    other: Any = attention(q, k, v, mask=Full(), implementation="reference", return_lse=True)
    share = jax.nn.sigmoid(lse - other[1])[..., None]
    return (share * y + (1.0 - share) * other[0]).astype(y.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Query head h reads kv head h // (heads / kv_heads).
    Parameters: q/kernel [D, H * Dh], k/kernel and v/kernel [D, K * Dh], o/kernel [H * Dh, D] (from
    `out_init`); with `qkv_bias` a bias beside the first three; with `qk_norm` q_norm/scale and k_norm/scale
    [Dh], an RMSNorm of each head before the rotation (Qwen3). If the tree holds prefix/k and prefix/v [P, K, Dh]
    (`jaxrl.nets.adapters`), every query sees them, in windowed layers too; they take no column of a cache.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    window: int | None = None
    out_init: Callable = normal(0.02)
    implementation: str | None = None
    attend: Callable = attention  # the door, or one that knows a mesh
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x, cos, sin, mask, slot: Slot | None = None, windowed=None):
        """Attend.

        Args:
          x: [B, T, D].
          cos, sin: [B, T, 1, Dh / 2] from `rope.rotation`.
          mask: a mask of `jaxrl.kernels.attention`, over cache columns when there is a slot.
          slot: this layer's place in the cache, or None.
          windowed: boolean scalar, whether this layer uses `window`; None: it does if there is one.

        Returns:
          ([B, T, D], the slot with the T new columns written, or None).
        """
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        b, t, _ = x.shape

        def project(name, heads):
            y = Linear(heads * self.head_dim, use_bias=self.qkv_bias, **types, name=name)(x)
            return y.reshape(b, t, heads, self.head_dim)

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, **types, name="q_norm")(q)
            k = RMSNorm(self.norm_eps, **types, name="k_norm")(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        offset = 0
        if slot is not None:
            slot = store(slot, k, v)
            (k, v), offset = load(slot, self.dtype), slot.length

        prefix: Any = self.get_variable("params", "prefix")

        def attend(mask) -> Any:
            options: dict[str, Any] = {"mask": mask, "q_offset": offset, "implementation": self.implementation}
            if prefix is None:
                return self.attend(q, k, v, **options)
            return with_prefix(q, prefix, *self.attend(q, k, v, return_lse=True, **options))

        near = mask if self.window is None else mask & Window(self.window)
        y = attend(near) if windowed is None else jax.lax.cond(windowed, lambda: attend(near), lambda: attend(mask))
        y = y.reshape(b, t, self.heads * self.head_dim)
        return Linear(x.shape[-1], kernel_init=self.out_init, **types, name="o")(y), slot
