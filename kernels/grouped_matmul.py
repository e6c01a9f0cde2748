"""Products of a mixture of experts: rows sorted by expert, each group times its own matrix (see `experts`)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.platform import platform
from jaxrl.kernels.varying import vary_alike

IMPLEMENTATIONS = ("tiles", "ragged_dot", "mosaic_gpu", "pallas_tpu")
TILE, SMALL_TILE = 32, 8  # rows of a product on CPU: least time of 8 .. 256 for groups of 64 rows and more, and of 4


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Each row times the matrix of its group.

        y_i = x_i @ w[e]   for the rows i of group e:  start_e <= i < start_e + group_sizes[e]
        dx_i = dy_i @ w[e]^T,   dw[e] = sum_i x_i^T dy_i

    The groups follow each other from row 0 on. Rows after the last group give zeros and take and give no gradient;
    an empty group's matrix has gradient zero. Sums are float32 (int32 for integers) whatever the inputs. Reverse
    derivatives of every order; no forward mode.

    (Gale et al. 2022, MegaBlocks, arXiv:2211.15841, for products without padding or dropping.)

    Args:
      x: rows [M, K], sorted by group.
      w: [E, K, N], in the dtype of x.
      group_sizes: int [E], not negative, with a sum of at most M; values cannot be checked under jit, and groups
        that reach beyond M are cut off there.
      dtype: of the result; default that of x.
      implementation: None picks by platform. "tiles": a loop over tiles of rows (CPU, where XLA makes a ragged dot
        of E dense products). "ragged_dot": `jax.lax.ragged_dot_general`. "mosaic_gpu": kernels for Hopper GPUs, where
        XLA makes a ragged dot of E dense products; bfloat16 or float16, K and N multiples of 64. "pallas_tpu": a ragged
        dot forward and for dx, and for dw, of which XLA makes E dense products on TPUs, a kernel (interpreted on CPU);
        bfloat16 or float32.

    Returns:
      y [M, N].

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation or one that does not serve the call.
    """
    _check(x, w, group_sizes, implementation)
    sizes = within(jnp.asarray(group_sizes, jnp.int32), x.shape[0])
    settings = _Settings(jnp.dtype(dtype or x.dtype), implementation)
    return _rows(settings, *vary_alike(x, w, sizes))


class _Settings(NamedTuple):
    """What is static about a product."""

    dtype: Any
    implementation: str | None
    transposed: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(settings, x, w, sizes):
    """[M, K] by [E, K, N] to [M, N]; transposed, [M, N] by [E, K, N] to [M, K]."""
    kernel = _kernel(settings, x, w, w.shape[1:])
    if kernel is not None:
        return kernel.rows(x, w, sizes, transposed=settings.transposed, dtype=settings.dtype)
    return _by_platform(settings, _rows_by_tiles, _rows_by_ragged_dot, _rows_by_ragged_dot)(x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(settings, x, y, sizes):
    """The sum of x_i^T y_i over each group: [M, K] and [M, N] to [E, K, N]."""
    kernel = _kernel(settings, x, y, (x.shape[1], y.shape[1]))
    if kernel is not None:
        return kernel.outer(x, y, sizes, dtype=settings.dtype)
    return _by_platform(settings, _outer_by_tiles, _outer_by_ragged_dot, _outer_on_tpu)(x, y, sizes)


def _kernel(settings, a, b, columns):
    """The module of the kernels for Hopper GPUs, if they are to compute a product of a and b."""
    wanted = settings.implementation == "mosaic_gpu"
    if not wanted and (settings.implementation or jax.default_backend() != "gpu"):
        return None
    from jaxrl.kernels import grouped_matmul_gpu  # where it is wanted: its back end is large

    reason = grouped_matmul_gpu.refusal(a.dtype, b.dtype, settings.dtype, *columns)
    if reason and wanted:
        raise ValueError(f'grouped_matmul: implementation="mosaic_gpu": {reason}.')
    return None if reason else grouped_matmul_gpu


def _by_platform(settings, *forms):
    """One of the forms for "tiles", "ragged_dot" and "pallas_tpu"."""
    tiles, ragged_dot, tpu = (functools.partial(form, settings) for form in forms)
    if settings.implementation is None:
        return functools.partial(lax.platform_dependent, cpu=tiles, tpu=tpu, default=ragged_dot)
    return {"tiles": tiles, "ragged_dot": ragged_dot, "pallas_tpu": tpu}[settings.implementation]


def _rows_forward(settings, x, w, sizes):
    return _rows(settings, x, w, sizes), (x, w, sizes)


def _rows_backward(settings, residuals, dy):
    x, w, sizes = residuals
    dx = _rows(settings._replace(dtype=x.dtype, transposed=not settings.transposed), dy, w, sizes)
    pair = (dy, x) if settings.transposed else (x, dy)
    return dx, _outer(_Settings(w.dtype, settings.implementation), *pair, sizes), None


def _outer_forward(settings, x, y, sizes):
    return _outer(settings, x, y, sizes), (x, y, sizes)


def _outer_backward(settings, residuals, dw):
    x, y, sizes = residuals
    dx = _rows(_Settings(x.dtype, settings.implementation, transposed=True), y, dw, sizes)
    return dx, _rows(_Settings(y.dtype, settings.implementation), x, dw, sizes), None


_rows.defvjp(_rows_forward, _rows_backward)
_outer.defvjp(_outer_forward, _outer_backward)


def _rows_by_tiles(settings, x, w, sizes):
    """Where a tile reaches into the next group, that group's tile overwrites it."""
    contracted = 2 if settings.transposed else 1
    m, tile = x.shape[0], _tile(x.shape[0], w.shape[0])
    x_bits, w_bits = _bits(_overhang(x, tile)), _bits(w)

    def visit(group, row, _, out):
        rows = _floats(lax.dynamic_slice_in_dim(x_bits, row, tile), x.dtype)
        matrix = _floats(lax.dynamic_index_in_dim(w_bits, group, keepdims=False), w.dtype)
        y = _dot(rows, matrix, 1, contracted - 1).astype(settings.dtype)
        return lax.dynamic_update_slice_in_dim(out, _bits(y), row, 0)

    out = _bits(jnp.zeros((m + tile, w.shape[3 - contracted]), settings.dtype))
    out = _over_tiles(sizes, tile, visit, vary_alike(out, x_bits)[0])
    return _zeros_after(_floats(out[:m], settings.dtype), sizes)


def _outer_by_tiles(settings, x, y, sizes):
    tile = _tile(x.shape[0], sizes.shape[0])
    bits = [(_bits(_overhang(rows, tile)), rows.dtype) for rows in (x, y)]

    def visit(group, row, rest, out):
        inside = (jnp.arange(tile) < rest)[:, None]
        parts = (_floats(lax.dynamic_slice_in_dim(b, row, tile), dtype) for b, dtype in bits)
        a, b = (jnp.where(inside, part, jnp.zeros_like(part)) for part in parts)
        total = lax.dynamic_index_in_dim(out, group, keepdims=False) + _dot(a, b, 0, 0)
        return lax.dynamic_update_index_in_dim(out, total, group, 0)

    acc = accumulator(jnp.promote_types(x.dtype, y.dtype))
    out = jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), acc)
    return _over_tiles(sizes, tile, visit, vary_alike(out, x)[0]).astype(settings.dtype)


def _over_tiles(sizes, tile: int, visit, carry):
    """visit(group, first row, rows of the group from there on, carry) -> carry, tile by tile in the order of rows."""
    starts, counts = jnp.cumsum(sizes) - sizes, -(-sizes // tile)
    last = jnp.cumsum(counts)

    def one(i, carry):
        group = jnp.searchsorted(last, i, side="right")
        done = (i - last[group] + counts[group]) * tile
        return visit(group, starts[group] + done, sizes[group] - done, carry)

    return lax.fori_loop(0, last[-1], one, carry)


def _overhang(rows, tile: int):
    """Rows for the last tile to reach over."""
    return jnp.pad(rows, ((0, tile), (0, 0)))


def _bits(x):
    """Floats below 32 bits as integers (a copy): XLA:CPU would turn all of them into float32 to slice a part."""
    small = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if small else x


def _floats(bits, dtype):
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _rows_by_ragged_dot(settings, x, w, sizes):
    contracted = 2 if settings.transposed else 1
    y = _ragged_dot((((1,), (contracted,)), ((), ())), [0], x, w, sizes)
    return _zeros_after(y.astype(settings.dtype), sizes)


def _outer_by_ragged_dot(settings, x, y, sizes):
    x, y = (_zeros_after(rows, sizes) for rows in (x, y))
    return _ragged_dot((((0,), (0,)), ((), ())), [], x, y, sizes).astype(settings.dtype)


def _outer_on_tpu(settings, x, y, sizes):
    from jaxrl.kernels import grouped_matmul_tpu

    reason, wanted = grouped_matmul_tpu.refusal(x.dtype, y.dtype), settings.implementation
    if reason and wanted:
        raise ValueError(f'grouped_matmul: implementation="pallas_tpu": {reason}.')
    if reason:
        return _outer_by_ragged_dot(settings, x, y, sizes)
    interpret = wanted is not None and platform() == "cpu"
    return grouped_matmul_tpu.outer(x, y, sizes, dtype=settings.dtype, interpret=interpret)


def _ragged_dot(dimensions, group_dimensions, a, b, sizes):
    common = jnp.promote_types(a.dtype, b.dtype)
    numbers = lax.RaggedDotDimensionNumbers(dimensions, [0], group_dimensions)
    return lax.ragged_dot_general(
        a.astype(common), b.astype(common), sizes, numbers, preferred_element_type=accumulator(common)
    )


def _dot(a, b, contracted_a: int, contracted_b: int):
    common = jnp.promote_types(a.dtype, b.dtype)
    dimensions = ((contracted_a,), (contracted_b,)), ((), ())
    return lax.dot_general(a.astype(common), b.astype(common), dimensions, preferred_element_type=accumulator(common))


def accumulator(dtype):
    """The dtype in which products of `dtype` are summed."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.dtype(jnp.int32)
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _tile(m: int, groups: int) -> int:
    return TILE if m >= 16 * groups else SMALL_TILE


def within(sizes, m: int):
    """The sizes of the groups as far as there are rows."""
    return jnp.diff(jnp.minimum(jnp.cumsum(sizes), m), prepend=jnp.zeros_like(sizes[:1]))


def _zeros_after(rows, sizes):
    """The rows of groups; zeros, whatever stood there, after the last group."""
    inside = lax.broadcasted_iota(jnp.int32, rows.shape, 0) < jnp.sum(sizes)
    return jnp.where(inside, rows, jnp.zeros_like(rows))


def _check(x, w, group_sizes, implementation):
    if jnp.ndim(x) != 2 or jnp.ndim(w) != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"grouped_matmul: x {jnp.shape(x)} and w {jnp.shape(w)}, expected [M, K] and [E, K, N] with the same K."
        )
    if x.dtype != w.dtype:
        raise ValueError(f"grouped_matmul: x is {x.dtype} and w is {w.dtype}, expected the same dtype; cast one.")
    if w.shape[0] == 0:
        raise ValueError("grouped_matmul: w has E = 0 groups, expected at least 1.")
    integers = jnp.issubdtype(jnp.result_type(group_sizes), jnp.integer)
    if jnp.shape(group_sizes) != w.shape[:1] or not integers:
        raise ValueError(
            f"grouped_matmul: group_sizes are {jnp.result_type(group_sizes)} {jnp.shape(group_sizes)}, "
            f"expected integers [E] = ({w.shape[0]},)."
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"grouped_matmul: implementation={implementation!r}, expected None or {IMPLEMENTATIONS}.")
