"""A frozen base in few bits: int8 by columns, and QLoRA's NF4 with doubly quantised scales (arXiv:2305.14314).

The products are those of the dequantised kernel, one layer at a time, forward and backward: what is kept for the
backward pass is the codes. There is no gradient for the base.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl.kernels.quantised import Quantised, dequantise, quantise
from jaxrl.nets.adapters.adapted import LINEAR, kernels, put
from jaxrl.nets.layers import Operator

CODES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
"""4-bit NormalFloat: quantiles of the normal distribution, scaled to [-1, 1], with a zero (appendix E)."""

BLOCK = 64
"""Inputs of one column that share a scale."""
SCALES_BLOCK = (1, 256)
INT8_BLOCK = (None, 1)


class Int8(NamedTuple):
    """A kernel [..., in, out] as int8 with a scale for each column: values * scale (an `Operator` of `nets.layers`)."""

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.values.shape

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """Rows [N, in] -> [N, out]."""
        return _times((dot, dtype), rows, self)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel that the codes stand for."""
        return dequantise(Quantised(self.values, self.scales), block=INT8_BLOCK, dtype=dtype)


class NF4(NamedTuple):
    """A kernel [..., in, out] in 4-bit NormalFloat: CODES[code] * (mean + absmax) (an `Operator` of `nets.layers`).

    codes: uint8 [..., in / 2, out], two consecutive inputs in a byte, the first in the high half. absmax: int8 with
    scales, [..., ceil(in / 64), out]: the largest |w| of each block, less their mean. mean: float32 [..., 1, 1].
    4.13 bits a weight, where `in` and `out` are multiples of 64 and 256.
    """

    codes: jax.Array
    absmax: Quantised
    mean: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        *stack, half, columns = self.codes.shape
        return (*stack, 2 * half, columns)

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """Rows [N, in] -> [N, out]."""
        return _times((dot, dtype), rows, self)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel that the codes stand for."""
        *stack, half, columns = self.codes.shape
        pairs = jnp.stack([self.codes >> 4, self.codes & 15], axis=-2)
        values = jnp.asarray(CODES)[pairs.reshape(*stack, 2 * half, columns)]
        absmax = dequantise(self.absmax, block=SCALES_BLOCK) + self.mean
        return (values * jnp.repeat(absmax, BLOCK, axis=-2)[..., : 2 * half, :]).astype(dtype)


def to_int8(kernel: jax.Array) -> Int8:
    """A kernel [..., in, out] in int8: error at most half a scale, scale = largest |w| of the column / 127."""
    return Int8(*quantise(kernel, dtype=jnp.int8, block=INT8_BLOCK))


def to_nf4(kernel: jax.Array) -> NF4:
    """A kernel [..., in, out] in NF4.

        c = max |w| of a block of 64;   code = the nearest of CODES to w / c;   c is kept as mean(c) + int8(c - mean(c))

    The error of a weight is at most 0.152 c (half the widest gap of CODES) + the error of c, which is at most
    max |c - mean| / 254 over 256 neighbouring blocks. Deviations from the paper: blocks of scales are of one row of
    blocks, so that a sharded kernel is quantised where it lies; scales are int8 and not 8-bit floats: they spread
    evenly about their mean, and int8 has the smaller error there.

    Raises:
      ValueError: an odd number of inputs.
    """
    *stack, rows, columns = kernel.shape
    if rows % 2:
        raise ValueError(f"to_nf4: the kernel has shape {kernel.shape}, expected an even number of inputs: two a byte")
    pad = [(0, 0)] * len(stack) + [(0, -rows % BLOCK), (0, 0)]
    blocks = jnp.pad(kernel.astype(jnp.float32), pad).reshape(*stack, -1, BLOCK, columns)
    absmax = jnp.abs(blocks).max(-2)
    scaled = blocks / jnp.where(absmax == 0, 1.0, absmax)[..., None, :]
    between = jnp.asarray((CODES[1:] + CODES[:-1]) / 2)
    codes = jnp.searchsorted(between, scaled).astype(jnp.uint8).reshape(*stack, -1, columns)[..., :rows, :]
    mean = absmax.mean((-2, -1), keepdims=True)
    pairs = codes.reshape(*stack, rows // 2, 2, columns)
    packed = (pairs[..., 0, :] << 4) | pairs[..., 1, :]
    return NF4(packed, quantise(absmax - mean, dtype=jnp.int8, block=SCALES_BLOCK), mean)


FORMS = {"int8": to_int8, "nf4": to_nf4}


def quantise_base(base: Any, *, form: str = "nf4", targets: tuple[str, ...] = LINEAR) -> dict:
    """A model's parameters with the kernels of its linear layers in few bits; embeddings and norms stay as they are.

    Args:
      base: the parameters; numpy arrays are taken to the device one kernel at a time.
      form: int8 or nf4.
      targets: layers, as in `LoRAConfig`.

    Raises:
      ValueError: an unknown form or layer; an odd number of inputs for nf4.
    """
    if form not in FORMS:
        raise ValueError(f"quantise_base: form is {form!r}, expected {' or '.join(FORMS)}")
    convert = jax.jit(FORMS[form])
    found = kernels(base, targets, who="quantise_base")
    return put(base, {f"{path}/kernel": convert(kernel) for path, kernel in found.items()})


def dequantise_base(base: Any, dtype: Any = jnp.float32) -> Any:
    """The parameters with plain kernels, for what cannot take codes (export)."""
    stored = lambda x: isinstance(x, Operator)
    return jax.tree.map(lambda x: x.dense(dtype) if stored(x) else x, base, is_leaf=stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _times(static, rows, kernel):
    dot, dtype = static
    return dot(rows, kernel.dense(dtype))


def _forward(static, rows, kernel):
    return _times(static, rows, kernel), kernel


def _backward(static, kernel, g):
    """The kernel is dequantised anew: a plain gradient would keep the dense one of every layer."""
    dot, dtype = static
    back = lax.dot_general(g, kernel.dense(dtype), (((1,), (1,)), ((), ())))
    return back.astype(dtype), None


_times.defvjp(_forward, _backward)
