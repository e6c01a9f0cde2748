"""Self-attention of a decoder layer: projections, QK-norm, rotary positions, cache, and the one attention door."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Window, attention
from jaxrl.nets.layers import STD, Linear, RMSNorm
from jaxrl.nets.rope import rotate


class Slot(NamedTuple):
    """Where one layer finds its keys and values: the whole cache [L, B, K, S, Dh], its row, the first free column."""

    k: jax.Array
    v: jax.Array
    layer: jax.Array
    length: jax.Array


def store(slot: Slot, k: jax.Array, v: jax.Array) -> Slot:
    """Write k and v [B, T, K, Dh] at columns [length, length + T) of the slot's layer, in place under jit."""
    start = (slot.layer, 0, 0, slot.length, 0)

    def write(cache, x):
        return jax.lax.dynamic_update_slice(cache, jnp.swapaxes(x, 1, 2)[None].astype(cache.dtype), start)

    return slot._replace(k=write(slot.k, k), v=write(slot.v, v))


def load(slot: Slot, dtype: str) -> tuple[jax.Array, jax.Array]:
    """All columns of the slot's layer, as keys and values [B, S, K, Dh]."""

    def read(cache):
        layer = jax.lax.dynamic_index_in_dim(cache, slot.layer, keepdims=False)
        return jnp.swapaxes(layer, 1, 2).astype(dtype)

    return read(slot.k), read(slot.v)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head h reads kv head h // (H / K).

    Parameters: q/kernel [D, H * Dh], k/kernel and v/kernel [D, K * Dh], o/kernel [H * Dh, D] (drawn with `out_std`),
    with `qkv_bias` a bias beside the first three, with `qk_norm` q_norm/scale and k_norm/scale [Dh] (RMSNorm over each
    head, before the rotation, as Qwen3).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    window: int | None = None
    out_std: float = STD
    implementation: str | None = None
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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
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

        def attend(mask):
            return attention(q, k, v, mask=mask, q_offset=offset, implementation=self.implementation)

        if self.window is None:
            y = attend(mask)
        elif windowed is None:
            y = attend(mask & Window(self.window))
        else:
            y = jax.lax.cond(windowed, lambda: attend(mask & Window(self.window)), lambda: attend(mask))
        y = y.reshape(b, t, self.heads * self.head_dim)
        return Linear(x.shape[-1], std=self.out_std, **types, name="o")(y), slot
