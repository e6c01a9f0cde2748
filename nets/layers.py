"""The small parts of a Transformer: linear maps, norms, feed-forward layers."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

normal = nn.initializers.normal


@runtime_checkable
class Operator(Protocol):
    """A linear layer's map in another form than an array: quantised, or with an adapter (`jaxrl.nets.adapters`).

    A pytree that may stand in a tree of parameters where a kernel [in, out] stands; its leaves are stacked as kernels
    are.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel, [..., in, out]."""
        ...

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """What the layer makes of rows [N, in] in `dtype`, [N, out]; `dot` multiplies a matrix by a matrix."""
        ...


def times(rows: jax.Array, kernel: Any, *, dot: Callable, dtype: Any) -> jax.Array:
    """rows [N, in] times a kernel, an array or an `Operator`."""
    if isinstance(kernel, Operator):
        return kernel.times(rows, dot=dot, dtype=dtype)
    return dot(rows, kernel.astype(dtype))


def as_matrix(kernel: Any, dtype: Any) -> jax.Array:
    """A kernel [in, out], an array or an `Operator`, as an array in `dtype`."""
    if isinstance(kernel, Operator):
        return times(jnp.eye(kernel.shape[-2], dtype=dtype), kernel, dot=jnp.dot, dtype=dtype)
    return kernel.astype(dtype)


class Linear(nn.Module):
    """y = x W (+ b), with W [in, out]: computed in `dtype`, kept in `param_dtype`.

    Parameters: kernel [in, out] from `kernel_init`, in whose place an `Operator` may stand, and, with `use_bias`, bias
    [out] = 0. `dot` multiplies [N, in] by [in, out]: `jnp.dot` or `small_dot`.
    """

    features: int
    use_bias: bool = False
    kernel_init: Callable = normal(0.02)
    dtype: str = "float32"
    param_dtype: str = "float32"
    dot: Callable = jnp.dot

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., in] to [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Operator):
            kernel = self.param("kernel", self.kernel_init, shape, jnp.dtype(self.param_dtype))
        elif kernel.shape != shape:
            raise ValueError(f"{'/'.join(self.path)}/kernel is a map of shape {kernel.shape}, expected {shape}")
        # rows of a matrix: the kernel's gradient of [B, T, in] x [in, out] would transpose both factors in memory
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = times(rows, kernel, dot=self.dot, dtype=self.dtype).reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.param_dtype))
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y


@jax.custom_jvp
def small_dot(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """rows @ kernel, [N, in] x [in, out] -> [N, out], for layers that fit into a cache, as agents have.

    The kernel's gradient is rows^T g, and XLA's CPU backend multiplies by a matrix that lies transposed in memory at
    two thirds of its speed, at a tenth where `out` is small. Where `out` is at most `in`, it is (g^T rows)^T here, with
    g^T laid out first; other backends have no use for that and get the plain form. Derivatives of every order and in
    both modes are those of `rows @ kernel`. Layers as wide as a language model's lose more by the laying out than they
    gain.
    """
    return jnp.dot(rows, kernel)


@small_dot.defjvp
def _small_dot_jvp(primals, tangents):
    (rows, kernel), (d_rows, d_kernel) = primals, tangents
    if kernel.shape[0] < kernel.shape[1]:
        by_kernel = jnp.dot(rows, d_kernel)
    else:
        by_kernel = jax.lax.platform_dependent(rows, d_kernel, cpu=_laid_out, default=jnp.dot)
    return small_dot(rows, kernel), small_dot(d_rows, kernel) + by_kernel


def _laid_out(rows, kernel):
    """rows @ kernel, so written that its transpose in `kernel` is (g^T rows)^T with g^T in memory."""
    held = jax.lax.optimization_barrier
    return held(jax.lax.dot_general(held(kernel.T), rows, (((1,), (1,)), ((), ())))).T


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, arXiv:1910.07467).

    Statistics are float32. The normalised value is rounded to `dtype` before it meets the scale, as Llama
    and Qwen do. Parameters: scale [features] = 1.
    """

    eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x [..., features]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.param_dtype))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        y = (wide * inverse).astype(self.dtype)
        return y * jnp.broadcast_to(scale.astype(self.dtype), y.shape)


def make_norm(kind: str, eps: float, dtype: str, param_dtype: str, name: str | None = None) -> nn.Module:
    """`RMSNorm`, or for kind "layer" LayerNorm with scale and bias (Ba et al. 2016, arXiv:1607.06450)."""
    if kind == "rms":
        return RMSNorm(eps, dtype, param_dtype, name=name)
    return nn.LayerNorm(eps, jnp.dtype(dtype), jnp.dtype(param_dtype), use_fast_variance=False, name=name)


ACTIVATIONS: dict[str, Callable] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}


class FeedForward(nn.Module):
    """y = (act(x W_gate) * x W_up) W_down; without a gate y = act(x W_up) W_down.

    Gated by silu it is SwiGLU (Shazeer 2020, arXiv:2002.05202), the default. Parameters: gate/kernel and up/kernel
    [D, ffn], down/kernel [ffn, D] (from `out_init`), with `use_bias` a bias beside each.
    """

    ffn: int
    out_init: Callable = normal(0.02)
    gated: bool = True
    activation: str = "silu"
    use_bias: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., D]."""
        types: dict[str, Any] = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        act = ACTIVATIONS[self.activation]
        up = Linear(self.ffn, **types, name="up")(x)
        inner = act(Linear(self.ffn, **types, name="gate")(x)) * up if self.gated else act(up)
        return Linear(x.shape[-1], kernel_init=self.out_init, **types, name="down")(inner)


class Kernel(nn.Module):
    """A matrix that is stored here and multiplied elsewhere. Parameters: kernel [in, out] ~ N(0, 0.02^2)."""

    shape: tuple[int, int]
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return the matrix."""
        return self.param("kernel", normal(0.02), self.shape, jnp.dtype(self.param_dtype))
