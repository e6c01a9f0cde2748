"""Self-attention of a decoder layer: projections, QK-norm, rotary positions, cache."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Full, Mask, Pattern, Window, attention, dense
from jaxrl.nets.cache import Slot, load, store
from jaxrl.nets.layers import Linear, RMSNorm, normal
from jaxrl.nets.rope import rotate


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


def rectified(q, k, v, *, mask: Mask, q_offset: int | jax.Array = 0, **_: Any) -> jax.Array:
    """relu(q k^T / sqrt(Dh)) v over the keys that the mask allows (ReLA: Zhang et al. 2021, arXiv:2104.07012).

    Shapes as in `attention`, sums float32. Dense: O(T S) memory, whatever the mask empties.
    """
    b, t, h, size = q.shape
    allowed = dense(mask, (b, h, t, k.shape[1]), q_offset)
    k, v = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * size**-0.5
    weights = jnp.where(allowed, nn.relu(scores), 0.0).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


class HeadNorm(nn.Module):
    """LayerNorm of x [..., H, Dh] over each head, in float32. Parameters: scale = 1 and bias = 0, [H, Dh]."""

    eps: float
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis."""
        shape, stored = x.shape[-2:], jnp.dtype(self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, shape, stored)
        bias = self.param("bias", nn.initializers.zeros, shape, stored)
        wide = x.astype(jnp.float32)
        wide = jax.nn.standardize(wide, axis=-1, epsilon=self.eps)
        y = wide * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)
        return y.astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Query head h reads kv head h // (heads / kv_heads).
    Parameters: q/kernel [D, H * Dh], k/kernel and v/kernel [D, K * Dh], o/kernel [H * Dh, D] (from
    `out_init`); with `qkv_bias` a bias beside the first three, with `bias` beside all; with `qk_norm` q_norm/scale and
    k_norm/scale [Dh], an RMSNorm of each head before the rotation (Qwen3), or for "heads" LayerNorms with scale and
    bias [heads, Dh] (Chameleon, arXiv:2405.09818); with `rectified` out_norm/scale [H * Dh]. If the tree holds prefix/k
    and prefix/v [P, K, Dh] (`jaxrl.nets.adapters`), every query sees them, in windowed layers too; they take no column
    of a cache.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    bias: bool = False
    qk_norm: bool | Literal["heads"] = False
    norm_eps: float = 1e-6
    window: int | None = None
    pattern: Pattern | None = None  # a mask that is laid over the given one, as the window is
    rectified: bool = False  # relu in the place of the softmax, and an RMSNorm of what comes out
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
          cos, sin: [B, T, 1, d / 2] from `rope.rotation`, of the d numbers that turn; None: positions turn nothing.
          mask: a mask of `jaxrl.kernels.attention`, over cache columns when there is a slot.
          slot: this layer's place in the cache, or None.
          windowed: boolean scalar, whether this layer uses `window` and `pattern`; None: it does if there are any.

        Returns:
          ([B, T, D], the slot with the T new columns written, or None).
        """
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        b, t, _ = x.shape
        q, k, v = self.projected(x, cos, sin)
        offset = 0
        if slot is not None:
            slot = store(slot, k, v)
            (k, v), offset = load(slot, self.dtype), slot.length

        prefix: Any = self.get_variable("params", "prefix")

        def attend(mask) -> Any:
            options: dict[str, Any] = {"mask": mask, "q_offset": offset, "implementation": self.implementation}
            if prefix is None:
                return (rectified if self.rectified else self.attend)(q, k, v, **options)
            if self.rectified:
                raise ValueError("rectified attention has no form with a prefix: its weights are not shares of a whole")
            return with_prefix(q, prefix, *self.attend(q, k, v, return_lse=True, **options))

        near = mask if self.window is None else mask & Window(self.window)
        near = near if self.pattern is None else near & self.pattern
        y = attend(near) if windowed is None else jax.lax.cond(windowed, lambda: attend(near), lambda: attend(mask))
        y = y.reshape(b, t, self.heads * self.head_dim)
        if self.rectified:
            y = RMSNorm(self.norm_eps, **types, name="out_norm")(y)
        out = Linear(x.shape[-1], use_bias=self.bias, kernel_init=self.out_init, **types, name="o")
        return out(y), slot

    def projected(self, x, cos, sin):
        """Queries [B, T, H, Dh], keys and values [B, T, K, Dh] of x, normed and turned."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name, heads):
            y = Linear(heads * self.head_dim, use_bias=self.qkv_bias or self.bias, **types, name=name)(x)
            return y.reshape(*x.shape[:2], heads, self.head_dim)

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        if self.qk_norm:
            norm = HeadNorm if self.qk_norm == "heads" else RMSNorm
            q = norm(self.norm_eps, **types, name="q_norm")(q)
            k = norm(self.norm_eps, **types, name="k_norm")(k)
        return (q, k, v) if cos is None else (rotate(q, cos, sin), rotate(k, cos, sin), v)
