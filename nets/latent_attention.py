"""Multi-head latent attention: a cache of one short vector a token, from which all heads make their keys and values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxrl.kernels.attention import attention
from jaxrl.nets.cache import Slot, load, store
from jaxrl.nets.layers import Kernel, Linear, RMSNorm, as_matrix, normal
from jaxrl.nets.rope import rotate

INNER_EPS = 1e-6
"""Of the norms of the compressed queries and keys, whatever the layers' is: the released code has it so."""


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1)."""

    kv_rank: int  # of the latent that is cached
    nope: int  # numbers of a query and key that do not rotate
    rope: int  # and that do; all heads share those of the keys, which are cached too
    value: int  # numbers of a value
    q_rank: int | None = None  # of the compressed queries; None: they are not compressed
    absorb: int = 64  # with a cache and at most so many new tokens, the latents are attended to as they are

    @property
    def cached(self) -> int:
        """Numbers that a token takes in the cache."""
        return self.kv_rank + self.rope


class LatentAttention(nn.Module):
    """Attention whose keys and values are made from a latent c of each token.

        c = norm(x W_c),   k_h = [c U_h ; rotate(x W_r)],   v_h = c V_h,   q_h = [x Q_h ; rotate(x R_h)]
        o = sum_h softmax(q_h k_h / sqrt(nope + rope)) v_h W_h

    (DeepSeek-AI 2024, arXiv:2405.04434, equations 9-19; 2412.19437, section 2.1.1.) Two forms, equal up to rounding.
    Plain: keys and values of all heads are laid out. Absorbed: q_h U_h^T meets the cached latents, and V_h is applied
    to the weighted sum of them: a step of decoding reads `cached` numbers a token instead of those of all heads.

    Parameters: kv_down/kernel [D, kv_rank + rope], kv_down_norm/scale [kv_rank], kv_up/kernel
    [kv_rank, H (nope + value)] with nope before value in each head, o/kernel [H value, D] (from `out_init`);
    q_down/kernel [D, q_rank], q_down_norm/scale, q_up/kernel [q_rank, H (nope + rope)], or without q_rank
    q/kernel [D, H (nope + rope)].
    Neighbours are the pairs that rotate, as in the published weights.
    """

    heads: int
    config: LatentConfig
    score_factor: float = 1.0
    out_init: Callable = normal(0.02)
    implementation: str | None = None
    attend: Callable = attention
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x, cos, sin, mask, slot: Slot | None = None, windowed=None):
        """As `jaxrl.nets.attention.Attention`, with cos and sin [B, T, 1, rope / 2]; a slot holds [c ; turned key]."""
        c, h = self.config, self.heads
        b, t, _ = x.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        size = h * (c.nope + c.rope)
        if c.q_rank is None:
            q = Linear(size, **types, name="q")(x)
        else:
            q = Linear(c.q_rank, **types, name="q_down")(x)
            q = Linear(size, **types, name="q_up")(RMSNorm(INNER_EPS, **types, name="q_down_norm")(q))
        plain_q, turned_q = jnp.split(q.reshape(b, t, h, c.nope + c.rope), [c.nope], axis=-1)
        turned_q = rotate(turned_q, cos, sin, interleaved=True)

        latent, shared = jnp.split(Linear(c.cached, **types, name="kv_down")(x), [c.kv_rank], axis=-1)
        latent = RMSNorm(INNER_EPS, **types, name="kv_down_norm")(latent)[:, :, None]
        turned_k = rotate(shared[:, :, None], cos, sin, interleaved=True)
        offset = 0
        if slot is not None:
            slot = store(slot, jnp.concatenate([latent, turned_k], axis=-1), None)
            kept, offset = load(slot, self.dtype)[0], slot.length
            latent, turned_k = kept[..., : c.kv_rank], kept[..., c.kv_rank :]

        up = Kernel((c.kv_rank, h * (c.nope + c.value)), self.param_dtype, name="kv_up")()
        up = as_matrix(up, self.dtype).reshape(c.kv_rank, h, c.nope + c.value)
        options: dict[str, Any] = {
            "mask": mask,
            "scale": self.score_factor / math.sqrt(c.nope + c.rope),
            "q_offset": offset,
            "implementation": self.implementation,
        }
        if slot is not None and t <= c.absorb:
            q = jnp.concatenate([jnp.einsum("bthn,chn->bthc", plain_q, up[..., : c.nope]), turned_q], axis=-1)
            y = self.attend(q, kept, latent, **options)
            y = jnp.einsum("bthc,chv->bthv", y, up[..., c.nope :])
        else:
            k, v = jnp.split(jnp.einsum("bsc,chn->bshn", latent[:, :, 0], up), [c.nope], axis=-1)
            k = jnp.concatenate([k, jnp.broadcast_to(turned_k, (*k.shape[:3], c.rope))], axis=-1)
            y = self.attend(jnp.concatenate([plain_q, turned_q], axis=-1), k, v, **options)
        y = y.reshape(b, t, h * c.value)
        return Linear(x.shape[-1], kernel_init=self.out_init, **types, name="o")(y), slot
