"""Flash attention for Hopper GPUs as Pallas Mosaic GPU kernels, forward and backward (see `gpu_kernels`).

Which tiles a block of 128 rows goes through is worked out beforehand by the mask's own `live` and `full`: first the
tiles in which every pair is allowed, which are not masked, then those in which some are, which are masked by the mask's
own `allowed`. The backward pass is one kernel for dq and one for dk and dv (or one for each, where registers would not
hold both). Nothing is added atomically: the same call gives the same bits. Lengths need not be multiples of the tiles:
TMA reads zeros past the end of an array and does not write there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.tree_util import tree_leaves_with_path

from jaxrl.kernels.attention import gpu_kernels, masks, tiles
from jaxrl.kernels.attention.dropout import Dropout
from jaxrl.kernels.attention.gpu_kernels import BLOCK, GROUPS, LOG2E, TILE, Masking, Settings, Visit
from jaxrl.kernels.attention.reference import MASKED, with_sinks
from jaxrl.kernels.varying import vary_alike

STAGES = 2  # tiles in shared memory, where they fit
SHARED = 232448 - 4096  # bytes of shared memory for one block, less what barriers and alignment take
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def refusal(q, k, v, mask, scale, soft_cap, bias, alibi, dropout) -> str | None:
    """Why the kernels cannot serve a call, or None if they can."""
    other = 'use implementation="xla" or None'
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != "9.0":
            return f"the Mosaic GPU kernel is for Hopper, compute capability 9.0, not {capability}; {other}"
    elif jax.default_backend() != "cpu":  # from where it may be compiled ahead of time
        return f"the Mosaic GPU kernel is for Hopper GPUs, not {jax.default_backend()}; {other}"
    for name, option in (("bias", bias), ("alibi", alibi), ("dropout", dropout)):
        if option is not None:
            return f"the Mosaic GPU kernel takes no {name}; {other}"
    if not (isinstance(scale, int | float) and isinstance(soft_cap, int | float | None)):
        return 'the Mosaic GPU kernel needs scale and soft_cap as Python numbers; use implementation="reference"'
    if scale <= 0:
        return f"the Mosaic GPU kernel needs a positive scale, not {scale}; {other}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"the Mosaic GPU kernel takes bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}; {other}"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"the Mosaic GPU kernel takes D and Dv up to 256, not {q.shape[3]} and {v.shape[3]}; {other}"
    for path, _ in tree_leaves_with_path(mask):
        if path[-1].name not in masks.AXIS_OF_FIELD:
            return f"the Mosaic GPU kernel cannot cut the mask's {path[-1].name!r} into tiles (as of Dense); {other}"
    return None


def mosaic_gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: masks.Mask,
    q_offset: int | jax.Array = 0,
    scale: float,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`dense_attention` as kernels for Hopper GPUs: O(T) memory forward and backward.

    (Shah et al. 2024, arXiv:2407.08608, without its overlap of two tiles within a warpgroup; the backward pass
    is split, as in Dao 2023, arXiv:2307.08691, so that it is deterministic.)

    Args:
      q: [B, T, H, D]. k: [B, S, K, D]. v: [B, S, K, Dv]. All bfloat16 or all float16; D and Dv up to 256. Head
        sizes that are no multiples of 64 and lengths that are no multiples of 8 are padded, which copies the arrays.
      mask, q_offset, sinks: as in `attention`. scale, soft_cap: Python numbers, scale > 0.
      bias, alibi, dropout: must be None.

    Returns:
      o [B, T, H, Dv] in the dtype of q, and lse [B, H, T] in float32.

    Raises:
      ValueError: what the kernels do not serve (see `refusal`).
    """
    reason = refusal(q, k, v, mask, scale, soft_cap, bias, alibi, dropout)
    if reason:
        raise ValueError(f'attention: implementation="mosaic_gpu": {reason}.')
    b, t, h, dv = *q.shape[:3], v.shape[3]
    if 0 in (b, t, h, k.shape[1]):
        o, lse = jnp.zeros((b, t, h, dv), q.dtype), jnp.full((b, h, t), MASKED, jnp.float32)
    else:
        settings = Settings(scale, soft_cap, t, k.shape[1], h // k.shape[2], BLOCK, BLOCK, STAGES)
        padded = (_pad(_pad(x, 3, 64), 1, 8) for x in (q, k, v))
        mask, q_offset = masks.with_explicit_keys(mask), jnp.asarray(q_offset, jnp.int32)
        both: Any = _attention(settings, *vary_alike(*padded, mask, q_offset))
        o, lse = both[0][:, :t, :, :dv], both[1][:, :, :t]
    o, lse = with_sinks(o, jnp.swapaxes(lse, 1, 2), sinks)
    return o, jnp.swapaxes(lse, 1, 2)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros at the end of an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def visiting_order(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which tiles each block goes through, and in which order.

    Args:
      kinds: of `tile_kinds`, [B|1, blocks, tiles].

    Returns:
      order int32 [B|1, blocks, tiles]: the indices of tiles that need no mask, then of those that need one, then of
      the rest; and counts int32 [B|1, blocks, 2]: how many need no mask, how many are gone through.
    """
    order = jnp.argsort(-kinds, axis=2, stable=True)
    counts = jnp.stack([jnp.sum(kinds & tiles.FULL > 0, axis=2), jnp.sum(kinds > 0, axis=2)], axis=2)
    return order.astype(jnp.int32), counts.astype(jnp.int32)


def mask_vectors(mask: masks.Mask, axes: tuple[str, ...], shape: tuple[int, int, int], q_offset) -> list[jax.Array]:
    """What a mask knows of queries, of keys and of batch rows, for attention of `shape` (B, T, S).

    Returns int32 [B, vectors, queries] and [B, vectors, keys], the indices first, repeated to whole blocks; then
    int32 [B] for each array of the mask that has one value a row. `axes` says along what its arrays lie.
    """
    batch, t, s = shape
    t, whole_s = (-(-n // BLOCK) * BLOCK for n in (t, s))
    whole = masks.Tile(q_offset, t, 0, whole_s, s)
    found = {"q": [whole.q.reshape(1, t)], "k": [whole.k.reshape(1, whole_s)], "row": []}
    cut = {"q": lambda x: whole.of_query(x)[:, 0, :, 0], "k": lambda x: whole.of_key(x)[:, 0, 0], "row": lambda x: x}
    for axis, leaf in zip(axes, jax.tree.leaves(mask), strict=True):
        found[axis].append(cut[axis](leaf))
    wide = {axis: [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in xs] for axis, xs in found.items()}
    sides = [jnp.stack(wide[axis], axis=1) for axis in "qk"]
    return [x.astype(jnp.int32) for x in (*sides, *wide["row"])]


def _call(
    body,
    name: str,
    settings: Settings,
    heads: int,
    mask,
    q_offset,
    inputs,
    outputs,
    shared,
    *,
    by_key=False,
    pages=None,
):
    """Run a kernel of GROUPS compute warpgroups and one for memory, over a grid (batch, head, block).

    Blocks of BLOCK queries go through tiles of keys; with `by_key`, blocks of keys go through tiles of queries.
    With `pages`, int32 [B, N], the keys of row b lie in the pages pages[b] of k and v, [pages, page, K, D].
    """
    shape = inputs[0].shape[0], settings.t, settings.s
    sizes = settings.block_q, settings.block_k
    if settings.s % settings.block_k:
        mask = masks.Exists() if isinstance(mask, masks.Full) else masks.Exists() & mask
    kinds = tiles.tile_kinds(mask, shape, sizes, q_offset)
    tables = visiting_order(jnp.swapaxes(kinds, 1, 2) if by_key else kinds)
    axes = tuple(masks.AXIS_OF_FIELD[path[-1].name] for path, _ in tree_leaves_with_path(mask))
    vectors, rows = (), ()
    if not isinstance(mask, masks.Full):
        queries, keys, *rows = mask_vectors(mask, axes, shape, q_offset)
        vectors = (keys, queries) if by_key else (queries, keys)
        shared["mask_tiles"] = _shared((settings.stages, vectors[1].shape[1], sizes[not by_key]), jnp.int32)
    pieces = 1 if pages is None else max(1, settings.block_k // inputs[1].shape[1])
    carrier, copies = ("ready", 3) if by_key else ("k_ready", pieces)
    shared[carrier] = _barriers(settings.stages, copies + bool(vectors))

    if not by_key:
        shared["v_ready"] = _barriers(settings.stages, pieces)
    tables += () if pages is None else (pages,)

    def kernel(*refs, **buffers):
        (order, counts, *table), refs = refs[: len(tables)], refs[len(tables) :]
        kept, moving = refs[:2] if vectors else (None, None)
        first, last = len(vectors), len(vectors) + len(rows)
        structure = jax.tree.structure(mask)
        masking = Masking(structure, axes, kept, moving, refs[first:last], settings.s, queries_across=by_key)
        b, head, block, wg = (lax.axis_index(axis) for axis in ("batch", "head", "block", "warpgroup"))
        if not by_key:
            block = order.shape[1] - 1 - block  # under causal masks the last ones are the longest: they go first
        row = b if order.shape[0] > 1 else 0
        visit = Visit(order.at[row, block], counts[row, block, 0], counts[row, block, 1], *table)
        body(settings, (b, head, block, wg), visit, masking, *refs[last:], **buffers)

    results = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        scratch_types=shared,
        grid=(shape[0], heads, kinds.shape[1 + by_key]),
        grid_names=("batch", "head", "block"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*tables, *vectors, *rows, *inputs)
    *results, _ = vary_alike(*results, inputs[0])  # which plgpu.kernel forgets
    return results


def _shared(shape: tuple[int, ...], dtype):
    """Shared memory; the factors of products are tiled and swizzled as wgmma reads them."""
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=tiled if jnp.dtype(dtype) in DTYPES else ())


def _barriers(count: int, arrivals: int = 1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def _stages(kept: int, rows: int, columns: int) -> int:
    """How many tiles of rows x columns fit beside blocks of `kept` columns."""
    return min(STAGES, (SHARED - 2 * BLOCK * kept) // (2 * rows * columns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, v, mask, q_offset):
    return _forward(settings, q, k, v, mask, q_offset)[0]


def _not_differentiable(f):
    """f(static, ...) with an error that says so where its derivatives are asked for."""
    f = jax.custom_jvp(f, nondiff_argnums=(0,))

    @f.defjvp
    def _(static, primals, tangents):
        raise ValueError(
            'attention: implementation="mosaic_gpu" has no second derivatives; use implementation="reference", '
            "which has all."
        )

    return f


@_not_differentiable
def _forward(settings, q, k, v, mask, q_offset):
    o, lse = run_forward(settings, q, k, v, mask, q_offset)
    return (o, lse), (q, k, v, mask, q_offset, o, lse)


def run_forward(settings, q, k, v, mask, q_offset, pages=None):
    """o [B, T, H, Dv] and lse [B, H, T] of the forward kernel; `pages` as in `_call`."""
    (b, t, h, d), dv = q.shape, v.shape[3]
    block_k = 128 if max(d, dv) <= 128 else 64
    stages = _stages(d if d == dv else d + dv, block_k, d + dv)
    shared = {
        "q_tile": _shared((GROUPS, TILE, d), q.dtype),
        "lse_tile": _shared((GROUPS, TILE), jnp.float32),
        "k_tiles": _shared((stages, block_k, d), k.dtype),
        "v_tiles": _shared((stages, block_k, dv), v.dtype),
        "own_ready": _barriers(GROUPS),
        "k_free": _barriers(stages, GROUPS),
        "v_free": _barriers(stages, GROUPS),
        "turn": _barriers(1, GROUPS),
    }
    if dv != d:
        shared["o_tile"] = _shared((GROUPS, TILE, dv), q.dtype)
    outputs = [((b, t, h, dv), q.dtype), ((b, h, -(-t // BLOCK) * BLOCK), jnp.float32)]
    settings = settings._replace(block_k=block_k, stages=stages)
    inputs, body = (q, k, v), gpu_kernels.forward
    o, lse = _call(body, "attention_forward", settings, h, mask, q_offset, inputs, outputs, shared, pages=pages)
    return o, lse[:, :, :t]


def _backward(settings, residuals, cotangents):
    return _gradients(settings, residuals, cotangents)


@_not_differentiable
def _gradients(settings, residuals, cotangents):
    """With delta = rowsum(do * o) - dlse:  p = exp(s - lse);  dv = p^T do;  ds = p (do v^T - delta);
    dq = scale ds k;  dk = scale ds^T q.
    """
    q, k, v, mask, q_offset, o, lse = residuals
    do, dlse = cotangents
    (h, d), (heads, dv) = q.shape[2:], v.shape[2:]
    delta = jnp.einsum("bthd,bthd->bht", do.astype(jnp.float32), o.astype(jnp.float32)) - dlse
    stats = jnp.stack([lse * LOG2E, delta], axis=2)
    inputs = q, k, v, do, _pad(stats, 3, BLOCK)
    stages = _stages(d + dv, 64, d + dv)
    free = _barriers(stages, GROUPS)
    shared = {
        "q_tile": _shared((GROUPS, TILE, d), q.dtype),
        "do_tile": _shared((GROUPS, TILE, dv), do.dtype),
        "k_tiles": _shared((stages, 64, d), k.dtype),
        "v_tiles": _shared((stages, 64, dv), v.dtype),
        "own_ready": _barriers(GROUPS, 2),
        **{"k_free": free, "v_free": free},
    }
    by_query = settings._replace(block_k=64, stages=stages)
    outputs = [(q.shape, q.dtype)]
    (dq,) = _call(gpu_kernels.dq, "attention_dq", by_query, h, mask, q_offset, inputs, outputs, shared)

    by_key = settings._replace(block_q=64, stages=stages)
    together = d + dv <= 256 - 64 * (settings.soft_cap is not None)  # else registers do not hold both sums
    results = {}
    for wanted in ["kv"] if together else ["k", "v"]:
        shared = {
            "k_tile": _shared((GROUPS, TILE, d), k.dtype),
            "v_tile": _shared((GROUPS, TILE, dv), v.dtype),
            "q_tiles": _shared((stages, 64, d), q.dtype),
            "do_tiles": _shared((stages, 64, dv), do.dtype),
            "stat_tiles": _shared((stages, 2, 64), jnp.float32),
            "own_ready": _barriers(GROUPS, 2),
            "free": free,
        }
        outputs = [(x.shape, x.dtype) for x in (k, v) if x is {"k": k, "v": v}.get(wanted, x)]
        body = functools.partial(gpu_kernels.dkv, wanted=wanted)
        name = f"attention_d{wanted}"
        got = _call(body, name, by_key, heads, mask, q_offset, inputs, outputs, shared, by_key=True)
        results |= zip(wanted, got, strict=True)
    return dq, results["k"], results["v"], None, None


_attention.defvjp(_forward, _backward)
