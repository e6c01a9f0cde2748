"""Matrix products in 8 bits: int8 with a scale for each row and column, e4m3 floats with a scale for each block.

    x is about values * scale, one scale for each block
    x @ w is about sum_c scale_x scale_w (values_x @ values_w), c over the blocks of the contracted axis

The gradients pass straight through the rounding; their own products may be in 8 bits, too.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.grouped_matmul import grouped_matmul
from jaxrl.kernels.varying import vary_alike

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all of them."""

LEAST_SCALE = 2.0**-60  # the product of two scales is a normal float32, whatever the inputs
INT32_DEPTH = (2**31 - 1) // 127**2  # so many products of int8 surely fit an int32


class Quantised(NamedTuple):
    """What `quantise` makes.

    values: int8 or float8_e4m3fn [..., R, C].
    scales: float32 [..., R / rows of a block, C / columns of a block], rounded up.
    """

    values: jax.Array
    scales: jax.Array


class Scheme(NamedTuple):
    """How the two factors of x @ w are quantised; a block of x is as wide as a block of w is high.

    power_of_two: scales are rounded up to powers of two, as in `quantise`.
    """

    dtype: Any
    x_block: Block
    w_block: Block
    power_of_two: bool = False


INT8 = Scheme(jnp.int8, (1, None), (None, 1))
FP8 = Scheme(jnp.float8_e4m3fn, (1, 128), (128, 128))
"""As in DeepSeek-V3 (2024, arXiv:2412.19437, section 3.3)."""


def quantise(x: jax.Array, *, dtype: Any, block: Block, power_of_two: bool = False) -> Quantised:
    """Values in 8 bits and a scale for each block.

        scale = max(max |x| of the block * (1 / top), 2^-60);   values = round(x / scale)

    with top = 127 for int8 (symmetric: -128 is not used) and 448 for float8_e4m3fn, ties to even. A block of zeros
    gives zeros. A block with an infinity or a NaN gives values 0 and a scale of NaN: all that is computed from it is
    NaN. Where the axes are no multiples of the block, the last blocks are smaller. Computed in float32; no gradient.

    Args:
      x: [..., R, C], any float dtype.
      dtype: jnp.int8 or jnp.float8_e4m3fn.
      block: rows and columns of a block; None for the whole axis.
      power_of_two: the scale is rounded up to a power of two (`ue8m0` of DeepSeek-V3.1): multiplying by it rounds
        nothing. The largest value is then somewhere between top / 2 and top.

    Returns:
      `Quantised`.

    Raises:
      ValueError: x without two axes, another dtype, a block below 1.
    """
    top = _top(dtype)
    tiles = _tiles(lax.stop_gradient(x), block)
    largest = jnp.max(jnp.abs(tiles), axis=(-3, -1), keepdims=True, initial=0.0)
    finite = jnp.isfinite(largest)
    scale = jnp.where(finite, jnp.maximum(largest * (1 / top), LEAST_SCALE), 1.0)
    if power_of_two:
        scale = _next_power(scale)
    values = jnp.where(finite, tiles, 0.0) / scale
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    values = jnp.clip(values, -top, top).astype(dtype)
    rows, columns = (values.shape[n] * values.shape[n + 1] for n in (-4, -2))
    values = values.reshape(*x.shape[:-2], rows, columns)[..., : x.shape[-2], : x.shape[-1]]
    return Quantised(values, jnp.where(finite, scale, jnp.nan)[..., 0, :, 0])


def dequantise(q: Quantised, *, block: Block, dtype: Any = jnp.float32) -> jax.Array:
    """values * scale, [..., R, C]; block as given to `quantise`."""
    return (q.values.astype(jnp.float32) * _spread(q.scales, q.values.shape, block)).astype(dtype)


def quantised_matmul(
    x: jax.Array, w: jax.Array | Quantised, *, scheme: Scheme = FP8, quantise_gradient: bool = False
) -> jax.Array:
    """x @ w with both factors in 8 bits.

        y = sum_c (values_x[:, c] @ values_w[c]) * scale_x[:, c] * scale_w[c]

    over the blocks c of K: one for `INT8`, whose sums are exact in int32, and K / 128 for `FP8`, summed in float32
    within a block (as far as the machine's 8-bit product does) and over the scaled blocks. `product_bound` bounds
    the error.

    The gradients are those of the unrounded product of the dequantised factors, in the dtype of x: dx = dy w'^T,
    dw = x'^T dy (straight through; Bengio et al. 2013, arXiv:1308.3432). With `quantise_gradient` the two products are
    in 8 bits, too, as in DeepSeek-V3's training: dy is quantised in blocks along N for the one and along M for the
    other, and so is x', which was quantised along K before. Deviations: no factor has more than 8 bits (theirs does
    behind attention), and sums are in float32 throughout.
    What is kept for the backward pass is in 8 bits. Second derivatives take the factors for constants.

    Args:
      x: [..., K], float.
      w: [K, N], float; or quantise(w, dtype=scheme.dtype, block=scheme.w_block), which then has no gradient.
      scheme: `FP8` (default), `INT8`, or another `Scheme`.
      quantise_gradient: see above; blocks of w must be as wide as high.

    Returns:
      y [..., N] in the dtype of x.

    Raises:
      ValueError: shapes that do not fit; a quantised w of another scheme; a K too deep for int32 sums; blocks of w
        that are not square, with `quantise_gradient`.
    """
    _check("quantised_matmul", x, w, scheme, 2, quantise_gradient)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _product(scheme, rows, w, None, quantise_gradient).reshape(*x.shape[:-1], _weights(w).shape[-1])


def quantised_grouped_matmul(
    x: jax.Array,
    w: jax.Array | Quantised,
    group_sizes: jax.Array,
    *,
    scheme: Scheme = FP8,
    quantise_gradient: bool = False,
) -> jax.Array:
    """`grouped_matmul` with rows and matrices in 8 bits, as in `quantised_matmul`; rows after the groups give zeros.

    With `quantise_gradient` the blocks along M of dw's factors begin where a group does: a group's gradient depends on
    its own rows alone.

    Args:
      x: rows [M, K], sorted by group.
      w: [E, K, N], float or quantised by the scheme.
      group_sizes: int [E].
      scheme, quantise_gradient: as in `quantised_matmul`.

    Returns:
      y [M, N] in the dtype of x.

    Raises:
      ValueError: as `quantised_matmul` and `grouped_matmul`.
    """
    _check("quantised_grouped_matmul", x, w, scheme, 3, quantise_gradient)
    return _product(scheme, x, w, group_sizes, quantise_gradient)


def rounding_bound(x: jax.Array, *, dtype: Any, block: Block, power_of_two: bool = False) -> jax.Array:
    """A bound on |dequantise(quantise(x)) - x|, element by element.

        int8: scale / 2 + 2^-22 |x|;   e4m3: max(2^-4 |x|, 2^-10 scale) + 2^-22 |x|

    Half a step of int8 is half a scale. e4m3 has three bits after the leading one, so half a step is at most 2^-4 of
    a normal value; below 2^-6 values stand 2^-9 apart. The last term covers the float32 division and product.

    Args:
      x, dtype, block, power_of_two: as given to `quantise`.

    Returns:
      float32 [..., R, C]; NaN in blocks that are not finite.
    """
    scale = _spread(quantise(x, dtype=dtype, block=block, power_of_two=power_of_two).scales, x.shape, block)
    size = jnp.abs(x.astype(jnp.float32))
    step = scale / 2 if jnp.issubdtype(dtype, jnp.integer) else jnp.maximum(2.0**-4 * size, 2.0**-10 * scale)
    return step + 2.0**-22 * size


def product_bound(x: jax.Array, w: jax.Array, *, scheme: Scheme = FP8) -> jax.Array:
    """A bound on |quantised_matmul(x, w) - x @ w| for a float32 result.

        |x| @ dw + dx @ (|w| + dw) + g (|x| + dx) @ (|w| + dw)

    with dx, dw from `rounding_bound` and g of float32's rounding: 2^-24 times (4 for the conversion and the scales,
    and for floats the depth of a block and the number of blocks). It is what errors that all agree in sign would
    make; where signs are random, the error is smaller by about the square root of K.

    Args:
      x: [M, K].
      w: [K, N].
      scheme: as in `quantised_matmul`.

    Returns:
      float32 [M, N].
    """
    bound = functools.partial(rounding_bound, dtype=scheme.dtype, power_of_two=scheme.power_of_two)
    dx, dw = bound(x, block=scheme.x_block), bound(w, block=scheme.w_block)
    size_x, size_w = (jnp.abs(a.astype(jnp.float32)) for a in (x, w))
    depth, count = _depth(scheme, x.shape[1])
    roundings = 4 if jnp.issubdtype(scheme.dtype, jnp.integer) else 4 + depth + count
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return dot(size_x, dw) + dot(dx, size_w + dw) + 2.0**-24 * roundings * dot(size_x + dx, size_w + dw)


def _product(scheme, x, w, group_sizes, quantise_gradient=False) -> Any:
    if isinstance(w, Quantised):
        x, *w = vary_alike(x, *w)
        return _rounded((scheme, x.dtype, None, quantise_gradient), x, None, Quantised(*w), group_sizes)
    x, w = vary_alike(x, w)
    return _rounded((scheme, x.dtype, w.dtype, quantise_gradient), x, w, None, group_sizes)


def _quantise(scheme, x, block) -> Quantised:
    return quantise(x, dtype=scheme.dtype, block=block, power_of_two=scheme.power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(static, x, w, w_quantised, group_sizes):
    return _forward(static, x, w, w_quantised, group_sizes)[0]


def _forward(static, x, w, w_quantised, group_sizes):
    scheme, dtype, _, _ = static
    x = _quantise(scheme, x, scheme.x_block)
    if w_quantised is None:
        w_quantised = _quantise(scheme, w, scheme.w_block)
    y = _sum_of_blocks(scheme, x, w_quantised, group_sizes).astype(dtype)
    return y, (x, w_quantised, group_sizes)


def _backward(static, residuals, dy):
    (scheme, dtype, w_dtype, quantise_gradient), (x, w, group_sizes) = static, residuals
    if quantise_gradient:
        dx, dw = _quantised_gradients(scheme, x, w, dy, group_sizes)
        return dx.astype(dtype), None if w_dtype is None else dw.astype(w_dtype), None, None
    x = dequantise(x, block=scheme.x_block, dtype=dtype)
    w = dequantise(w, block=scheme.w_block, dtype=dtype)

    def plain(x, w):
        if group_sizes is not None:
            return grouped_matmul(x, w, group_sizes)
        return jnp.matmul(x, w, preferred_element_type=jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    dx, dw = jax.vjp(plain, x, w)[1](dy)
    return dx, None if w_dtype is None else dw.astype(w_dtype), None, None


_rounded.defvjp(_forward, _backward)


def _quantised_gradients(scheme, x: Quantised, w: Quantised, dy, group_sizes) -> tuple[jax.Array, jax.Array]:
    """dy w'^T and x'^T dy, every factor quantised along the axis that is summed over."""
    transposed = Quantised(*(jnp.swapaxes(a, -1, -2) for a in w))
    dx = _sum_of_blocks(scheme, _quantise(scheme, dy, scheme.x_block), transposed, group_sizes)
    rows = dequantise(x, block=scheme.x_block)
    if group_sizes is not None:
        return dx, _outer_of_groups(scheme, rows, dy, group_sizes)
    across = scheme._replace(w_block=scheme.x_block[::-1])
    columns = _quantise(scheme, rows.T, scheme.x_block)
    return dx, _sum_of_blocks(across, columns, _quantise(scheme, dy, across.w_block), None)


def _outer_of_groups(scheme, x, dy, group_sizes) -> jax.Array:
    """x^T dy of each group, [M, K] and [M, N] to float32 [E, K, N], in blocks that a group begins with."""
    (m, _), block, count = x.shape, scheme.x_block[::-1], len(group_sizes)
    depth = block[0]
    ends = jnp.cumsum(jnp.asarray(group_sizes, jnp.int32))
    last = jnp.cumsum(-(-jnp.diff(ends, prepend=0) // depth))  # blocks up to each group's last
    row = jnp.arange(m)
    group = jnp.searchsorted(ends, row, side="right")
    begin = lambda a: jnp.pad(a, (1, 0))[group]
    blocks = -(-m // depth) + count  # as many as there can be
    place = jnp.where(jnp.less(group, count), begin(last) * depth + row - begin(ends), blocks * depth)

    def cut(a):
        spread = jnp.zeros((blocks * depth, a.shape[1]), jnp.float32).at[place].set(a.astype(jnp.float32), mode="drop")
        values, scales = _quantise(scheme, spread, block)
        columns = jnp.broadcast_to(_spread(scales, (blocks, a.shape[1]), (1, block[1])), (blocks, a.shape[1]))
        return values.reshape(blocks, depth, a.shape[1]), columns

    acc = jnp.int32 if jnp.issubdtype(scheme.dtype, jnp.integer) else jnp.float32

    def add(total, given):
        (a, a_scale), (b, b_scale), owner = given
        product = jnp.matmul(a.T, b, preferred_element_type=acc).astype(jnp.float32)
        return total.at[owner].add(product * (a_scale[:, None] * b_scale[None]), mode="drop"), None

    owner = jnp.searchsorted(last, jnp.arange(blocks), side="right")
    total = vary_alike(jnp.zeros((count, x.shape[1], dy.shape[1]), jnp.float32), x, dy, group_sizes)[0]
    return lax.scan(add, total, (cut(x), cut(dy), owner))[0]


def _sum_of_blocks(scheme, x: Quantised, w: Quantised, group_sizes):
    """The sum over blocks c of values_x[:, c] @ values_w[c], scaled, [M, N] in float32."""
    (m, k), n = x.values.shape, w.values.shape[-1]
    depth, count = _depth(scheme, k)
    acc = jnp.int32 if jnp.issubdtype(scheme.dtype, jnp.integer) else jnp.float32
    pad = ((0, 0), (0, count * depth - k))
    x_values = jnp.moveaxis(jnp.pad(x.values, pad).reshape(m, count, depth), 1, 0)
    pad = ((0, 0),) * (w.values.ndim - 2) + (pad[1], (0, 0))
    w_values = jnp.pad(w.values, pad).reshape(*w.values.shape[:-2], count, depth, n)
    x_scales = _spread(x.scales, (m, count), (scheme.x_block[0], 1)).T
    w_scales = _spread(w.scales, (*w.scales.shape[:-1], n), (1, scheme.w_block[1]))
    if group_sizes is None:
        dot = functools.partial(jnp.matmul, preferred_element_type=acc)
    else:
        dot = lambda a, b: grouped_matmul(a, b, group_sizes, dtype=acc)
        group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right")  # E after the last

    def add(total, block):
        a, b, a_scale, b_scale = block
        b_scale = b_scale[None] if group_sizes is None else jnp.take(b_scale, group, axis=0, mode="clip")
        return total + dot(a, b).astype(jnp.float32) * (a_scale[:, None] * b_scale), None

    blocks = x_values, jnp.moveaxis(w_values, -3, 0), x_scales, jnp.moveaxis(w_scales, -2, 0)
    total = vary_alike(jnp.zeros((m, n), jnp.float32), *jax.tree.leaves((x, w, group_sizes)))[0]
    total = add(total, jax.tree.map(lambda a: a[0], blocks))[0] if count == 1 else lax.scan(add, total, blocks)[0]
    return total if group_sizes is None else jnp.where(jnp.less(group, w.values.shape[0])[:, None], total, 0.0)


def _depth(scheme, k: int) -> tuple[int, int]:
    """How deep a block of the contraction is, and how many there are."""
    depth = max(k if scheme.x_block[1] is None else scheme.x_block[1], 1)
    return depth, -(-k // depth)


def _next_power(scale):
    """The least power of two that is not smaller, of positive normal float32: by their bits, exactly."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0x7FFFFF)
    return lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)


def _top(dtype) -> float:
    if dtype == jnp.int8:
        return 127.0
    if dtype == jnp.float8_e4m3fn:
        return 448.0
    raise ValueError(f"quantise: dtype = {jnp.dtype(dtype).name}, expected int8 or float8_e4m3fn.")


def _sides(shape, block: Block) -> tuple[int, int]:
    """The sides of a block, at least 1."""
    if len(shape) < 2:
        raise ValueError(f"quantise: x has shape {tuple(shape)}, expected [..., R, C].")
    if any(side is not None and side < 1 for side in block):
        raise ValueError(f"quantise: block = {block}, expected sides of at least 1, or None for the whole axis.")
    rows, columns = (max(n if side is None else side, 1) for n, side in zip(shape[-2:], block, strict=True))
    return rows, columns


def _tiles(x, block: Block):
    """float32 [..., R / rows, rows, C / columns, columns], zeros in the overhang."""
    sides = _sides(x.shape, block)
    counts = [-(-n // side) for n, side in zip(x.shape[-2:], sides, strict=True)]
    overhang = [(0, c * side - n) for n, c, side in zip(x.shape[-2:], counts, sides, strict=True)]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 2) + overhang)
    return x.reshape(*x.shape[:-2], counts[0], sides[0], counts[1], sides[1])


def _spread(scales, shape, block: Block):
    """The scale of each element, [..., R, C]."""
    rows, columns = _sides(shape, block)
    spread = jnp.repeat(jnp.repeat(scales, rows, axis=-2), columns, axis=-1)
    return spread[..., : shape[-2], : shape[-1]]


def _weights(w) -> jax.Array:
    return w.values if isinstance(w, Quantised) else w


def _check(name, x, w, scheme, rank, quantise_gradient):
    axes = {2: ("[..., K]", "[K, N]"), 3: ("[M, K]", "[E, K, N]")}[rank]
    shape_x, shape_w = jnp.shape(x), jnp.shape(_weights(w))
    if not shape_x or len(shape_w) != rank or (rank == 3 and len(shape_x) != 2) or shape_x[-1] != shape_w[-2]:
        raise ValueError(f"{name}: x {shape_x} and w {shape_w}, expected {axes[0]} and {axes[1]} with the same K.")
    if scheme.x_block[1] != scheme.w_block[0]:
        raise ValueError(
            f"{name}: blocks of x are {scheme.x_block[1]} wide and blocks of w {scheme.w_block[0]} high, "
            "expected the same."
        )
    if quantise_gradient and (scheme.w_block[0] is None or len({*scheme.w_block, scheme.x_block[1]}) > 1):
        raise ValueError(
            f"{name}: blocks of w are {scheme.w_block}, and quantise_gradient multiplies by w from both "
            "sides: expected as many rows as columns, as in FP8"
        )
    if jnp.issubdtype(scheme.dtype, jnp.integer) and _depth(scheme, shape_x[-1])[0] > INT32_DEPTH:
        raise ValueError(
            f"{name}: K = {shape_x[-1]} in one block, expected at most {INT32_DEPTH} for sums in int32; "
            "give the scheme smaller blocks."
        )
    if isinstance(w, Quantised):
        sides = _sides(shape_w, scheme.w_block)
        scales = *shape_w[:-2], *(-(-n // side) for n, side in zip(shape_w[-2:], sides, strict=True))
        if w.values.dtype != scheme.dtype or w.scales.shape != scales:
            raise ValueError(
                f"{name}: w has values {w.values.dtype} and scales {w.scales.shape}, expected "
                f"{jnp.dtype(scheme.dtype).name} and {scales}; make it with dtype=scheme.dtype, block=scheme.w_block."
            )
