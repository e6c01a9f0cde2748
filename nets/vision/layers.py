"""What vision networks share: patches, self-attention over rows of tokens, MLP, stochastic depth, resampling."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.kernels.attention import Full, Mask, attention
from jaxrl.nets.layers import FeedForward, Linear, normal

MAX_LOGIT_SCALE = math.log(100.0)  # of cosine attention (Liu et al. 2021, arXiv:2111.09883, section 3.2)


def layer_norm(eps: float, *, dtype: str, param_dtype: str, name: str, scale_init: Callable = nn.initializers.ones):
    """LayerNorm with float32 statistics, as a module: y = (x - mean) / sqrt(var + eps) * scale + bias."""
    types: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    return nn.LayerNorm(eps, use_fast_variance=False, scale_init=scale_init, **types, name=name)


def patches(features: int, size: int, *, dtype: str, param_dtype: str, name: str):
    """A linear map of each size x size patch, as a module: images [B, H, W, C] -> [B, H // size, W // size, features].

    Parameters: kernel [size, size, C, features] ~ N(0, 0.02^2), bias [features] = 0.
    """
    types: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    shape = (size, size)
    return nn.Conv(features, shape, strides=shape, padding="VALID", kernel_init=normal(0.02), **types, name=name)


class SelfAttention(nn.Module):
    """Every token of a row attends to the row: y = softmax(q k^T / sqrt(Dh) + bias) v W_o.

    With `cosine` the logits are q.k / (|q| |k|) exp(min(logit_scale, log 100)) + bias, a temperature for each head
    (Liu et al. 2021, arXiv:2111.09883, equation 2), and keys have no bias.
    Parameters: {q,k,v,o}/kernel [D, D], {q,k,v,o}/bias [D]; with `cosine` logit_scale [H, 1, 1] = log 10, no k/bias.
    """

    heads: int
    cosine: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None, bias: Any = None) -> jax.Array:
        """Attend.

        Args:
          x: [B, T, D].
          mask: which token sees which; None: all.
          bias: [B|1, H|1, T, T] added to the logits; or a function of the queries [B, T, H, Dh] that makes it.

        Returns:
          [B, T, D].
        """
        b, t, d = x.shape
        if d % self.heads:
            raise ValueError(f"width {d} is not a multiple of heads {self.heads}: change one of them")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name):
            y = Linear(d, use_bias=name != "k" or not self.cosine, **types, name=name)(x)
            return y.reshape(b, t, self.heads, d // self.heads)

        q, k, v = project("q"), project("k"), project("v")
        bias = bias(q) if callable(bias) else bias
        scale = None
        if self.cosine:
            ten = nn.initializers.constant(math.log(10.0))
            sharp = self.param("logit_scale", ten, (self.heads, 1, 1), jnp.dtype(self.param_dtype))
            sharp = jnp.exp(jnp.minimum(sharp.astype(jnp.float32), MAX_LOGIT_SCALE)).reshape(1, 1, self.heads, 1)
            q, k, scale = (_unit(q) * sharp).astype(self.dtype), _unit(k).astype(self.dtype), 1.0
        y: Any = attention(q, k, v, mask=Full() if mask is None else mask, bias=bias, scale=scale)
        return Linear(d, use_bias=True, **types, name="o")(y.reshape(b, t, d))


def _unit(x):
    """x / max(|x|, 1e-12) along the last axis, float32, with finite gradients at 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def mlp(ffn: int, *, dtype: str = "float32", param_dtype: str = "float32", name: str | None = None) -> FeedForward:
    """y = gelu(x W_up + b) W_down + b, with the exact gelu. Parameters: {up,down}/{kernel,bias}."""
    plain: dict[str, Any] = {"gated": False, "activation": "gelu", "use_bias": True}
    return FeedForward(ffn, **plain, dtype=dtype, param_dtype=param_dtype, name=name)


def drop_path(module: nn.Module, x: jax.Array, rate: jax.Array | None) -> jax.Array:
    """Stochastic depth: a residual branch is left out for some images, x kept / (1 - rate).

    (Huang et al. 2016, arXiv:1603.09382.) Draws once an image where the call has a stream "dropout"; elsewhere, and
    with rate None, x is as it is.

    Args:
      module: whose stream is read.
      x: [B, ...].
      rate: scalar in [0, 1).
    """
    if rate is None or not module.has_rng("dropout"):
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / jnp.full_like(x, 1 - rate), 0)


def bicubic(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resample x [h, w, ...] to [*size, ...] by cubic convolution with a = -0.75, edges repeated.

    (Keys 1981, "Cubic convolution interpolation for digital image processing".) Pixels are areas: row i stands at
    (i + 1/2) h / h' - 1/2. No smoothing before shrinking. The same as torch's `interpolate(mode="bicubic")`;
    `jax.image.resize` has a = -0.5 and smooths.
    """
    rows, columns = (jnp.asarray(_cubic(old, new), x.dtype) for old, new in zip(x.shape, size, strict=False))
    return jnp.einsum("ia,jb,ab...->ij...", rows, columns, x)


def cubic_weight(distance: Any, a: float = -0.75) -> Any:
    """Keys' kernel at distances of 0 to 2 pixels, for numpy and JAX arrays."""
    s = distance
    near = ((a + 2) * s - (a + 3)) * s * s + 1
    far = ((a * s - 5 * a) * s + 8 * a) * s - 4 * a
    return (s <= 1) * near + (s > 1) * far


def _cubic(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of one axis."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        weight = cubic_weight(np.abs(place - first - tap))
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return weights


def colours_remedy(shape: tuple[int, ...], channels: int, rank: int) -> str:
    """The end of a message about images [..., H, W, channels] of this rank: what would help a grey or an RGBA one."""
    if len(shape) == rank - 1 and shape[-1] != channels:
        return f"; repeat the grey: np.repeat(image[..., None], {channels}, axis=-1)"
    if len(shape) == rank and shape[-1] == 1:
        return f"; repeat the grey: np.repeat(image, {channels}, axis=-1)"
    if len(shape) == rank and shape[-1] == channels + 1:
        return f"; leave out the transparency, image[..., :{channels}], or lay the image on a ground"
    return ""


def check_images(images: jax.Array, channels: int) -> None:
    """Raise ValueError unless images are [B, H, W, channels] floats, none of them 0."""
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
        raise ValueError(
            f"images have shape {images.shape}, expected [B, H, W, {channels}], at least one: channels last, one image "
            f"is image[None]{colours_remedy(images.shape, channels, 4)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}, expected floats: scale and normalise bytes first")
