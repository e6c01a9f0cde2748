"""Attention of the newest tokens over a key-value cache: one token a row, or a few drafted ones.

What is computed is little, what is read is the whole cache: the forms differ in how they read it. The queries of all
heads that share a key head are rows of one matrix, so that each key is read once. Rows read their own length, no more;
a paged cache is read page by page and never put together.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl.kernels.attention.checks import check_groups, check_per_head, check_soft_cap
from jaxrl.kernels.attention.reference import MASKED, SEEN, dense_attention, with_sinks
from jaxrl.kernels.platform import platform
from jaxrl.kernels.varying import shape_like, vary_alike

IMPLEMENTATIONS = ("reference", "xla", "pallas", "mosaic_gpu")
TILE = 2**16  # numbers in a tile of keys on CPU: it and its values stay in the cache of a core
COLUMNS = 2048  # keys times key heads that the TPU kernel works on at once
LANES = 128
dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


class Settings(NamedTuple):
    """What is static about a call."""

    scale: float
    soft_cap: float | None
    window: int | None


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    block_table: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`attention` of the last T tokens of every row over its cache, which holds them already.

        query i of row b stands at position p = lengths[b] - T + i and sees the keys s <= p  (and s > p - window)

    (Online softmax as in Dao et al. 2022, arXiv:2205.14135; pages as in Kwon et al. 2023, arXiv:2309.06180.) Softmax
    and sums are float32 whatever the inputs. Queries before position 0, such as those of a row of length 0, get zeros
    and lse about -1e30 (or the sink). What the cache holds past a row's length does not matter, even NaN; only for
    "mosaic_gpu" it must be finite.

    Args:
      q: queries [B, T, H, D]; T = 1, or a few.
      k: cache of keys [B, S, K, D] with H a multiple of K; with a block table, pages [P, page, K, D].
      v: cache of values [B, S, K, Dv], or [P, page, K, Dv]; Dv may differ from D.
      lengths: int [B], tokens in each row's cache, the queries' own included. Values cannot be checked under jit:
        those outside [0, S] (or the table's pages times page) are clipped.
      block_table: int [B, N] or None: keys n page .. (n + 1) page - 1 of row b lie in page block_table[b, n]. Entries
        past the row's length are not read; those outside [0, P) are clipped.
      window: a query sees itself and the window - 1 keys before it, or None for all.
      scale: factor on q k^T; default D ** -0.5. A Python number.
      soft_cap: bound on the logits, or None. A Python number.
      sinks: one logit per head, [H], that takes probability and has no value, or None.
      implementation: None picks the best one for the platform. "reference": dense, gathers all pages. "xla": row by
        row and tile by tile. "pallas": TPU kernel (interpreted on CPU); it reads the cache in place if D and Dv are 128
        and K is 1, 2, 4 or a multiple of 8, or D and Dv are multiples of 128 and K of 8, or, without pages, neither D
        nor Dv is a multiple of 128 but S is; any other cache is copied.
        "mosaic_gpu": kernel for Hopper GPUs, for bfloat16 and float16.
      return_lse: also return the log-sum-exp.

    Returns:
      o [B, T, H, Dv] in q's dtype; with return_lse, (o, lse [B, T, H] float32). Only "reference" has derivatives.

    Raises:
      ValueError: shapes that do not fit, or a named implementation that does not serve the call.
    """
    _check(q, k, v, lengths, block_table, window, scale, soft_cap, sinks, implementation)
    b, t, h, d = q.shape
    settings = Settings(d**-0.5 if scale is None else scale, soft_cap, window)
    chosen = _choose(implementation, q, k, v, block_table)
    keys = k.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, keys)
    if block_table is not None:
        block_table = jnp.clip(block_table.astype(jnp.int32), 0, k.shape[0] - 1)
    if 0 in (*q.shape, keys, v.shape[3]):
        o, lse = jnp.zeros((b, t, h, v.shape[3])), jnp.full((b, t, h), MASKED)
    elif chosen == "reference":
        o, lse = _dense(settings, q, k, v, lengths, block_table)
    else:
        o, lse = _without_derivatives(chosen, settings, *vary_alike(q, k, v, lengths, block_table))
    o, lse = with_sinks(o, lse, sinks)
    o = o.astype(q.dtype)
    return (o, lse) if return_lse else o


def _check(q, k, v, lengths, block_table, window, scale, soft_cap, sinks, implementation):
    name = "decode_attention"
    cache = "B, S" if block_table is None else "P, page"
    for what, x, axes in (("q", q, "B, T, H, D"), ("k", k, f"{cache}, K, D"), ("v", v, f"{cache}, K, Dv")):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name}: {what} has shape {jnp.shape(x)}, expected [{axes}].")
    (b, _, h, d), (kb, _, _, kd) = q.shape, k.shape
    if kd != d:
        raise ValueError(f"{name}: k has D = {kd}, expected q's D = {d}.")
    if block_table is None and kb != b:
        raise ValueError(f"{name}: k has B = {kb}, expected q's B = {b}; pages need a block_table.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{name}: v has {cache}, K = {v.shape[:3]}, expected k's {k.shape[:3]}.")
    check_groups(name, q, k)
    if jnp.shape(lengths) != (b,):
        raise ValueError(f"{name}: lengths has shape {jnp.shape(lengths)}, expected [B] = ({b},).")
    if block_table is not None and (jnp.ndim(block_table) != 2 or len(block_table) != b):
        raise ValueError(f"{name}: block_table has shape {jnp.shape(block_table)}, expected [B, N] with B = {b}.")
    for what, x in (("lengths", lengths), ("block_table", block_table)):
        if x is not None and not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise ValueError(f"{name}: {what} is {jnp.result_type(x)}, expected integers.")
    check_per_head(name, h, sinks=sinks)
    check_soft_cap(name, soft_cap)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{name}: window = {window!r}, expected an int of at least 1, or None for no window.")
    for what, value in (("scale", scale), ("soft_cap", soft_cap)):
        if not isinstance(value, int | float | None):
            raise ValueError(f"{name}: {what} is {type(value).__name__}, expected a Python number.")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{name}: implementation={implementation!r}, expected None or {IMPLEMENTATIONS}.")


def _seen(settings, query, key):
    """Whether the query at one position sees the key at another."""
    seen = key <= query
    return seen if settings.window is None else seen & (key > query - settings.window)


def _first(settings, length, t: int):
    """The first position that any of the last t queries of a row sees."""
    return jnp.zeros_like(length) if settings.window is None else jnp.maximum(length - t - settings.window + 1, 0)


def _dense(settings, q, k, v, lengths, block_table):
    t = q.shape[1]
    if block_table is not None:
        k, v = (x[block_table].reshape(len(lengths), -1, *x.shape[2:]) for x in (k, v))
    key = jnp.arange(k.shape[1]).reshape(1, 1, 1, -1)
    query = (lengths[:, None] - t + jnp.arange(t)[None])[:, None, :, None]
    v = jnp.where((key < lengths.reshape(-1, 1, 1, 1)).reshape(*v.shape[:2], 1, 1), v, 0)  # 0 weight times NaN is NaN
    allowed = _seen(settings, query, key)
    o, lse = dense_attention(q, k, v, allowed=allowed, scale=settings.scale, soft_cap=settings.soft_cap)
    return o, jnp.swapaxes(lse, 1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _without_derivatives(chosen, settings, q, k, v, lengths, block_table):
    if chosen == "xla":
        return _tiled(settings, q, k, v, lengths, block_table)
    if chosen == "mosaic_gpu":
        t = q.shape[1]
        stop = lengths[:, None] + jnp.arange(1 - t, 1, dtype=jnp.int32)[None]
        start = jnp.zeros_like(stop) if settings.window is None else stop - settings.window
        options = {"scale": settings.scale, "soft_cap": settings.soft_cap}
        return _on_hopper().decode(q, k, v, start, stop, block_table, **options)
    run = functools.partial(_across_call if _across(k, v, block_table) else _kernel_call, settings)
    arguments = (q, k, v, lengths) if block_table is None else (q, k, v, lengths, block_table)
    return lax.platform_dependent(
        *arguments,
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )


@_without_derivatives.defjvp
def _no_derivatives(chosen, settings, primals, tangents):
    raise ValueError(
        f'decode_attention: implementation="{chosen}" has no derivatives; train with attention(...), or use '
        'implementation="reference".'
    )


def _tiled(settings, q, k, v, lengths, block_table):
    """One row at a time, one tile of its keys at a time, with heads in front: products of what lies in cache."""
    b, t, h, d = q.shape
    size, heads = k.shape[1:3]
    group = h // heads
    acc = jnp.promote_types(q.dtype, jnp.float32)
    rows = jnp.swapaxes(q, 1, 2).reshape(b, heads, group * t, d).astype(acc) * settings.scale
    if block_table is None:
        tile = min(size, max(16, TILE // (heads * d)))
        take = lambda x, row, first: lax.dynamic_slice(x, (row, first, 0, 0), (1, tile, *x.shape[2:]))[0]
        last = size - tile
    else:
        pages = min(block_table.shape[1], max(1, TILE // (heads * d * size)))
        tile = pages * size
        last = block_table.shape[1] * size - tile

        def take(x, row, first):
            ids = lax.dynamic_slice(block_table, (row, lax.div(first, size)), (1, pages))[0]
            return x[ids].reshape(tile, *x.shape[2:])

    def one_row(row):
        length = lengths[row]
        query = length - t + jnp.tile(jnp.arange(t, dtype=jnp.int32), group)[:, None]

        def visit(j, carry):
            m, total, o = carry
            first = jnp.minimum(j * tile, last)  # the last tile reaches back over keys that have been seen
            key = first + jnp.arange(tile, dtype=jnp.int32)
            own = (key >= j * tile) & (key < length)
            kj, vj = (jnp.swapaxes(take(x, row, first), 0, 1).astype(acc) for x in (k, v))
            kj, vj = lax.optimization_barrier((kj, jnp.where(own[None, :, None], vj, 0)))
            logits = _capped(settings, jnp.einsum("knd,ksd->kns", rows[row], kj))
            logits = jnp.where((own[None] & _seen(settings, query, key[None]))[None], logits, MASKED)
            return _online(m, total, o, logits, lambda p: jnp.einsum("kns,ksd->knd", p, vj))

        m = jnp.full((heads, group * t, 1), MASKED, acc)
        *nothing, _ = vary_alike(m, jnp.zeros_like(m), jnp.zeros((heads, group * t, v.shape[3]), acc), q)
        tiles = lax.div(_first(settings, length, t), tile), lax.div(length + (tile - 1), tile)
        return _finished(*lax.fori_loop(*tiles, visit, tuple(nothing)))

    o, lse = lax.map(one_row, jnp.arange(b))
    o, lse = (jnp.swapaxes(x.reshape(b, h, t, -1), 1, 2) for x in (o, lse))
    return o, lse[..., 0]


def _capped(settings, logits):
    return logits if settings.soft_cap is None else settings.soft_cap * jnp.tanh(logits / settings.soft_cap)


def _online(m, total, o, logits, weighted):
    """Running maximum, sum and weighted values after more logits; statistics [..., rows, 1]."""
    m_new = jnp.maximum(m, jnp.max(logits, axis=-1, keepdims=True))
    safe = jnp.where(m_new < SEEN, 0.0, m_new)
    p, decay = jnp.exp(logits - safe), jnp.exp(m - safe)
    return m_new, total * decay + jnp.sum(p, axis=-1, keepdims=True), o * decay + weighted(p)


def _finished(m, total, o):
    """o and lse [..., rows, 1]."""
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return o / total, jnp.where(seen, m + jnp.log(total), MASKED)


def _choose(implementation, q, k, v, block_table) -> str:
    """The implementation that None stands for, or the named one if it serves the call."""
    target = platform()
    if implementation == "pallas" and (reason := _refusal(q, k, v)):
        raise ValueError(f'decode_attention: implementation="pallas": {reason}; use "xla" or None.')
    if implementation == "mosaic_gpu" and (reason := _on_hopper().refusal(q, k, v, block_table)):
        raise ValueError(f'decode_attention: implementation="mosaic_gpu": {reason}; use "reference" or None.')
    if implementation:
        return implementation
    if target == "tpu" and _refusal(q, k, v) is None and _in_place(k, v, block_table):
        return "pallas"
    if target == "gpu" and _on_hopper().refusal(q, k, v, block_table) is None:
        return "mosaic_gpu"
    return "xla" if target == "cpu" else "reference"


def _on_hopper():
    from jaxrl.kernels.attention import decode_gpu  # where it is wanted: its back end is large

    return decode_gpu


def _refusal(q, k, v) -> str | None:
    """Why the kernel cannot serve a call, or None if it can."""
    if jax.default_backend() not in ("tpu", "cpu"):
        return f"the Pallas kernel is for TPU (interpreted on CPU), not {jax.default_backend()}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the Pallas kernel takes float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def _in_place(k, v, block_table) -> bool:
    """Whether a TPU program hands the cache to a kernel as it lies (seen in compiled programs); else it copies it."""

    def flat(cache):
        heads, width = cache.shape[2:]
        return width % LANES == 0 and (heads % 8 == 0 or (width == LANES and heads in (1, 2, 4)))

    return (flat(k) and flat(v)) or _across(k, v, block_table)


def _across(k, v, block_table) -> bool:
    """Whether a TPU keeps the cache with keys along lanes (seen in compiled programs)."""
    return block_table is None and k.shape[1] % LANES == 0 and bool(k.shape[3] % LANES and v.shape[3] % LANES)


def _kernel_call(settings, q, k, v, lengths, block_table=None, *, interpret, columns=COLUMNS):
    """All heads at once: their queries are the rows of one matrix, and the keys of all key heads its columns, as they
    lie in memory. That is K times the products needed, on units that would otherwise wait for memory; no key is moved
    inside the kernel. Pages past a row's length, or before its window, are neither fetched nor worked on.
    """
    b, t, h, d = q.shape
    size, heads, dv = *k.shape[1:3], v.shape[3]
    rows = h * t
    columns = min(columns, max(256, 2**18 // rows))
    if block_table is None:  # the row is cut into pages of our own
        page, at_once = size if size * heads <= columns else max(16, columns // (16 * heads) * 16), 1
        count = pl.cdiv(size, page)
    else:
        page, count = size, block_table.shape[1]
        fit = min(8, count, columns // (page * heads))
        at_once = max(1, fit) if page * heads % 16 == 0 else 1
    reach = count if settings.window is None else min(count, (settings.window + t + page - 3) // page + 1)
    scalars = (lengths,) if block_table is None else (lengths, block_table)

    def block(i, width):
        def index(row, j, lengths, *table):
            n = _page_at(settings, lengths[row], t, page, j * at_once + i)
            return (table[0][row, n] if table else row), (0 if table else n), 0

        return pl.BlockSpec((1, page * heads, width), index)

    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
    of_row = lambda width: pl.BlockSpec((1, rows, width), lambda row, *_: (row, 0, 0))
    row, column = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.arange(at_once * page * heads, dtype=jnp.int32)[None]
    constants = row // (t * (h // heads)), t - 1 - row % t, column % heads
    flat_q = jnp.swapaxes(q, 1, 2).reshape(b, rows, d)
    flat_k, flat_v = (x.reshape(x.shape[0], size * heads, -1) for x in (k, v))
    pages = range(at_once)
    o, lse = pl.pallas_call(
        functools.partial(_kernel, settings=settings, t=t, page=page, heads=heads, at_once=at_once),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, pl.cdiv(reach, at_once)),
            in_specs=[of_row(d), *map(whole, constants), *(block(i, d) for i in pages), *(block(i, dv) for i in pages)],
            out_specs=[of_row(dv), of_row(LANES)],
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, dv)],
        ),
        out_shape=[shape_like(flat_q, (b, rows, width), jnp.float32) for width in (dv, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * rows * reach * page * heads * (d + dv),
            transcendentals=b * rows * reach * page * heads,
            bytes_accessed=b * reach * page * heads * (d + dv) * k.dtype.itemsize,
        ),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, flat_q, *constants, *[flat_k] * at_once, *[flat_v] * at_once)
    o, lse = (jnp.swapaxes(x.reshape(b, h, t, -1), 1, 2) for x in (o, lse))
    return o, lse[..., 0]


def _page_at(settings, length, t: int, page: int, n):
    """Page of a row to fetch n-th: the pages that its queries see, then the last of them again, which costs nothing."""
    last = lax.div(jnp.maximum(length - 1, 0), page)
    return jnp.minimum(lax.div(_first(settings, length, t), page) + n, last)


def _kernel(lengths, *refs, settings, t, page, heads, at_once):
    table = len(refs) - (4 + 2 * at_once + 5)  # 1 if there is one
    q, row_head, behind, column_head, *refs = refs[table:]
    ks, vs, (o, lse, m_scratch, total_scratch, o_scratch) = (
        refs[:at_once],
        refs[at_once : 2 * at_once],
        refs[2 * at_once :],
    )
    length = lengths[pl.program_id(0)]
    start = (lax.div(_first(settings, length, t), page) + pl.program_id(1) * at_once) * page

    def look():
        keys, values = (jnp.concatenate([x[0] for x in xs], axis=0) for xs in (ks, vs))
        # column c holds key start + c // heads; c // heads < n as c < n * heads, without a division
        c = lax.broadcasted_iota(jnp.int32, (1, len(keys)), 1)
        query = length - 1 - behind[...] - start
        allowed = (row_head[...] == column_head[...]) & (c < (query + 1) * heads)
        if settings.window is not None:
            allowed = allowed & (c >= (query - (settings.window - 1)) * heads)
        logits = dot(q[0], keys, (((1,), (1,)), ((), ())))
        own = lax.broadcasted_iota(jnp.int32, values.shape, 0) < (length - start) * heads
        return logits, allowed, values, own, 0

    _sum_up(settings, start < length, look, o, lse, m_scratch, total_scratch, o_scratch)


def _sum_up(settings, live, look, o, lse, m_scratch, total_scratch, o_scratch):
    """A step over the keys of a row: where it is live, look() gives the products with the keys, which of them are
    allowed, the values, which of those there are, and the axis of the values along which keys lie."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        m_scratch[...] = jnp.full_like(m_scratch, MASKED)
        total_scratch[...] = jnp.zeros_like(total_scratch)
        o_scratch[...] = jnp.zeros_like(o_scratch)

    @pl.when(live)
    def _():
        products, allowed, values, own, axis = look()
        logits = jnp.where(allowed, _capped(settings, products * settings.scale), MASKED)
        values = jnp.where(own, values.astype(jnp.float32), 0.0).astype(values.dtype)
        weighted = lambda p: dot(p.astype(values.dtype), values, (((1,), (axis,)), ((), ())))
        m, total, summed = _online(m_scratch[:, :1], total_scratch[:, :1], o_scratch[...], logits, weighted)
        m_scratch[...] = jnp.broadcast_to(m, m_scratch.shape)
        total_scratch[...] = jnp.broadcast_to(total, total_scratch.shape)
        o_scratch[...] = summed

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        result, statistic = _finished(m_scratch[:, :1], total_scratch[:, :1], o_scratch[...])
        o[0] = result
        lse[0] = jnp.broadcast_to(statistic, lse.shape[1:])


def _across_call(settings, q, k, v, lengths, *, interpret, number=2**20):
    """A TPU keeps caches of widths that are no multiple of 128 as [B, K, D, S], keys along lanes, which is how this
    kernel takes them: `number` bytes of the keys of all heads at once. Each query lies in the place of its own key
    head, among zeros, so that one product serves all heads; of the values' sums only that place is taken.
    """
    b, t, h, d = q.shape
    size, heads, dv = *k.shape[1:3], v.shape[3]
    rows = h * t
    fit = number // (heads * max(d, dv) * k.dtype.itemsize * LANES) * LANES
    page = min(max(fit, LANES), pl.cdiv(size, LANES) * LANES)
    count = pl.cdiv(size, page)
    reach = count if settings.window is None else min(count, (settings.window + t + page - 3) // page + 1)
    own = jnp.eye(heads, dtype=q.dtype)[None, :, None, :, None]
    of_head = jnp.swapaxes(q, 1, 2).reshape(b, heads, rows // heads, 1, d)
    wide_q = (of_head * own).reshape(b, rows, heads * d)
    behind = t - 1 - jnp.arange(rows, dtype=jnp.int32)[:, None] % t
    wide_k, wide_v = (x.transpose(0, 2, 3, 1).reshape(b, -1, size) for x in (k, v))

    def block(width):
        return pl.BlockSpec(
            (1, heads * width, page),
            lambda row, j, lengths: (row, 0, _page_at(settings, lengths[row], t, page, j)),
        )

    of_row = lambda width: pl.BlockSpec((1, rows, width), lambda row, *_: (row, 0, 0))
    o, lse = pl.pallas_call(
        functools.partial(_kernel_across, settings=settings, t=t, page=page),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, reach),
            in_specs=[of_row(heads * d), pl.BlockSpec((rows, 1), lambda *_: (0, 0)), block(d), block(dv)],
            out_specs=[of_row(heads * dv), of_row(LANES)],
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, heads * dv)],
        ),
        out_shape=[shape_like(q, (b, rows, width), jnp.float32) for width in (heads * dv, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention_across",
    )(lengths, wide_q, behind, wide_k, wide_v)
    o = jnp.sum(o.reshape(b, heads, rows // heads, heads, dv) * own, axis=3)
    o, lse = (jnp.swapaxes(x.reshape(b, h, t, -1), 1, 2) for x in (o, lse))
    return o, lse[..., 0]


def _kernel_across(lengths, q, behind, k, v, o, lse, *scratch, settings, t, page):
    length = lengths[pl.program_id(0)]
    start = (lax.div(_first(settings, length, t), page) + pl.program_id(1)) * page

    def look():
        key = lax.broadcasted_iota(jnp.int32, (1, page), 1) + start
        allowed = _seen(settings, length - 1 - behind[...], key)
        return dot(q[0], k[0], (((1,), (0,)), ((), ()))), allowed, v[0], key < length, 1

    _sum_up(settings, start < length, look, o, lse, *scratch)
