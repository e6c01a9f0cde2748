"""Flash attention as a Pallas kernel for TPU, forward and backward; interpreted on CPU.

The grid runs over (batch row, head, query block, key block). Which tiles the mask leaves alive is worked
out beforehand, by the mask's own `live`, into a table in scalar memory: dead tiles cost neither compute nor
a copy, because their index map repeats the block that is already there. The mask itself is evaluated inside
the kernel by its own `allowed`, on blocks of its arrays. The backward pass works on transposed tiles (keys
down, queries across), so that row statistics lie along lanes: one kernel for dq, one for dk and dv, which
sums over the query heads that share a key head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.tree_util import tree_leaves_with_path

from jaxrl.kernels.attention import masks
from jaxrl.kernels.attention.reference import MASKED, SEEN

BLOCK = 512
LANES = 128
AXIS_OF_FIELD = {"q_ids": "q", "kv_ids": "k", "end": "k", "lengths": "row"}
dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


class Settings(NamedTuple):
    """What is static about a call."""

    scale: float
    soft_cap: float | None
    t: int
    s: int
    group: int
    block_q: int
    block_k: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of query blocks and of key blocks."""
        return -(-self.t // self.block_q), -(-self.s // self.block_k)


class KernelTile(NamedTuple):
    """The tile a kernel is working on, with the mask's arrays already cut to it (a `masks.Rectangle`)."""

    q_first: Any
    k_first: Any
    q_size: int
    k_size: int
    k_length: int
    transposed: bool

    @property
    def q_last(self):
        return self.q_first + (self.q_size - 1)

    @property
    def k_last(self):
        return self.k_first + (self.k_size - 1)

    def _iota(self, axis):
        shape = (self.k_size, self.q_size) if self.transposed else (self.q_size, self.k_size)
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    @property
    def q(self):
        return self.q_first + self._iota(1 if self.transposed else 0)

    @property
    def k(self):
        return self.k_first + self._iota(0 if self.transposed else 1)

    def of_query(self, values):
        return values

    of_key = of_row = of_query

    def of_pair(self, values):
        raise ValueError("the Pallas kernel does not take dense masks")


def refusal(q, k, v, mask, scale, soft_cap, bias) -> str | None:
    """Why the kernel cannot serve a call, or None if it can."""
    other = 'use implementation="xla" or None'
    if jax.default_backend() not in ("tpu", "cpu"):
        return f"the Pallas kernel is for TPU (interpreted on CPU), not {jax.default_backend()}; {other}"
    if bias is not None:
        return f"the Pallas kernel takes no bias; {other}"
    if not (isinstance(scale, int | float) and isinstance(soft_cap, int | float | None)):
        return 'the Pallas kernel needs scale and soft_cap as Python numbers; use implementation="reference"'
    if {q.dtype, k.dtype, v.dtype} - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"the Pallas kernel takes float32 and bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}; {other}"
    for path, _ in tree_leaves_with_path(mask):
        if _field(path) not in AXIS_OF_FIELD:
            name = _field(path)
            return f"the Pallas kernel cannot cut the mask's {name!r} into blocks (as of Dense); {other}"
    return None


def pallas_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: masks.Mask,
    q_offset: int | jax.Array = 0,
    scale: float,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """`dense_attention` as a TPU kernel: O(T) memory forward and backward.

    (Dao 2023, arXiv:2307.08691, with the backward pass split into dq and dk, dv.)

    Args:
      q: [B, T, H, D]. k: [B, S, K, D]. v: [B, S, K, Dv]. float32 or bfloat16.
      mask, q_offset, scale, soft_cap, sinks: as in `attention`. bias: must be None.
      block_q, block_k: upper bounds on the tile's sides, multiples of 128.

    Returns:
      o [B, T, H, Dv] in the dtype of q, and lse [B, H, T] in float32.

    Raises:
      ValueError: what the kernel does not serve (see `refusal`).
    """
    reason = refusal(q, k, v, mask, scale, soft_cap, bias)
    if reason:
        raise ValueError(f'attention: implementation="pallas": {reason}.')
    t, s = q.shape[1], k.shape[1]
    settings = Settings(scale, soft_cap, t, s, q.shape[2] // k.shape[2], _block(t, block_q), _block(s, block_k))
    qh = _heads_first(q, settings.block_q)
    kh, vh = _heads_first(k, settings.block_k), _heads_first(v, settings.block_k)
    mask = _explicit_keys(mask)
    kinds = tuple(AXIS_OF_FIELD[_field(path)] for path, _ in tree_leaves_with_path(mask))
    leaves = _operands(settings, mask, q.shape[0], q_offset)
    live = _live_table(settings, mask, q.shape[0], q_offset)
    offset = jnp.asarray(q_offset, jnp.int32).reshape(1)
    static = (settings, jax.tree.structure(mask), kinds)
    both: Any = _attention(static, qh, kh, vh, leaves, live, offset)
    o, lse = both
    o, lse = jnp.swapaxes(o[:, :, :t], 1, 2), lse[:, :, 0, :t]
    if sinks is not None:  # a key without a value: it only takes its share of the probability
        with_sink = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, :, None])
        o = o * jnp.swapaxes(jnp.exp(lse - with_sink), 1, 2)[..., None].astype(o.dtype)
        lse = with_sink
    return o, lse


def _block(length: int, limit: int) -> int:
    """The side of equal blocks that cover `length`: one block of any size, or several multiples of 128."""
    if limit % LANES:
        raise ValueError(f"attention: the Pallas kernel needs blocks that are multiples of {LANES}, got {limit}.")
    count = -(-length // limit)
    unit = 16 if count == 1 else LANES
    return -(-length // (count * unit)) * unit


def _heads_first(x: jax.Array, block: int) -> jax.Array:
    """[B, T, H, D] -> [B, H, T rounded up to whole blocks, D], zeros at the end."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


def _field(path) -> str:
    return path[-1].name


def _explicit_keys(mask: masks.Mask) -> masks.Mask:
    """The same mask with the key ids of every Segments filled in, so that each leaf belongs to one axis."""
    is_segments = lambda x: isinstance(x, masks.Segments)  # noqa: E731
    fill = lambda x: masks.Segments(x.q_ids, x.keys()) if is_segments(x) else x  # noqa: E731
    return jax.tree.map(fill, mask, is_leaf=is_segments)


def _operands(settings: Settings, mask: masks.Mask, batch: int, q_offset) -> list[jax.Array]:
    """The mask's leaves as int32 [B, length] or [B], cut to this call and padded to whole blocks."""
    nq, nk = settings.blocks
    whole = masks.Tile(q_offset, nq * settings.block_q, 0, nk * settings.block_k, settings.s)
    cut = {
        "q": lambda x: whole.of_query(x)[:, 0, :, 0],
        "k": lambda x: whole.of_key(x)[:, 0, 0, :],
        "row": lambda x: x,
    }
    leaves = [cut[AXIS_OF_FIELD[_field(path)]](leaf) for path, leaf in tree_leaves_with_path(mask)]
    return [jnp.broadcast_to(x, (batch, *x.shape[1:])).astype(jnp.int32) for x in leaves]


def _live_table(settings: Settings, mask: masks.Mask, batch: int, q_offset) -> jax.Array:
    """bool [B, query blocks, key blocks]: which tiles may hold an allowed pair."""
    nq, nk = settings.blocks

    def live(row, i, j):
        bq, bk = settings.block_q, settings.block_k
        return jnp.asarray(mask.live(masks.Tile(q_offset + i * bq, bq, j * bk, bk, settings.s, row)), bool)

    over = jax.vmap(jax.vmap(jax.vmap(live, (None, None, 0)), (None, 0, None)), (0, None, None))
    return over(jnp.arange(batch), jnp.arange(nq), jnp.arange(nk))


def _last_live(live: jax.Array) -> jax.Array:
    """Along the last axis: the index itself where live, else the last live index before it, else -1."""
    index = jnp.where(live, jnp.arange(live.shape[-1], dtype=jnp.int32)[None, None], -1)
    return lax.cummax(index, axis=2)


def _logits(q, k, allowed_of, settings: Settings, tile: KernelTile):
    """Masked logits of a tile (keys down and queries across if transposed), and the slope of the soft cap."""
    a, b = (k, q) if tile.transposed else (q, k)
    logits, slope = dot(a, b, (((1,), (1,)), ((), ()))) * settings.scale, 1.0
    if settings.soft_cap is not None:
        bent = jnp.tanh(logits / settings.soft_cap)
        logits, slope = settings.soft_cap * bent, 1.0 - bent * bent
    allowed = allowed_of(tile)
    if settings.s % settings.block_k:
        allowed = allowed & (tile.k < settings.s)
    return jnp.where(allowed, logits, MASKED), slope


def _tile(i, j, offset_ref, settings: Settings, transposed: bool) -> KernelTile:
    q_first = offset_ref[0] + i * settings.block_q
    return KernelTile(q_first, j * settings.block_k, settings.block_q, settings.block_k, settings.s, transposed)


def _mask_in_kernel(structure, kinds, refs, rows, b):
    """The mask's predicate, with its leaves read from the blocks at hand."""
    refs, rows = iter(refs), iter(rows)
    leaves = [next(rows)[b] if kind == "row" else next(refs)[0] for kind in kinds]
    return jax.tree.unflatten(structure, leaves).allowed


def _forward_kernel(table, offset, *refs, settings, structure, kinds):
    n_rows, n_blocks = kinds.count("row"), len(kinds) - kinds.count("row")
    rows, (q, k, v, *mask_refs) = refs[:n_rows], refs[n_rows : n_rows + 3 + n_blocks]
    o, lse, m_scratch, total_scratch, o_scratch = refs[n_rows + 3 + n_blocks :]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        m_scratch[...] = jnp.full_like(m_scratch, MASKED)
        total_scratch[...] = jnp.zeros_like(total_scratch)
        o_scratch[...] = jnp.zeros_like(o_scratch)

    @pl.when(table[b, i, j] == j)
    def _():
        allowed = _mask_in_kernel(structure, kinds, mask_refs, rows, b)
        logits, _ = _logits(q[0, 0], k[0, 0], allowed, settings, _tile(i, j, offset, settings, False))
        m = m_scratch[:, :1]
        m_new = jnp.maximum(m, jnp.max(logits, axis=-1, keepdims=True))
        safe = jnp.where(m_new < SEEN, 0.0, m_new)
        p, decay = jnp.exp(logits - safe), jnp.exp(m - safe)
        total = total_scratch[:, :1] * decay + jnp.sum(p, axis=-1, keepdims=True)
        total_scratch[...] = jnp.broadcast_to(total, total_scratch.shape)
        o_scratch[...] = o_scratch[...] * decay + dot(p.astype(v.dtype), v[0, 0], (((1,), (0,)), ((), ())))
        m_scratch[...] = jnp.broadcast_to(m_new, m_scratch.shape)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        total = total_scratch[...]
        seen = total > 0
        o[0, 0] = jnp.where(seen[:, :1], o_scratch[...] / jnp.where(seen, total, 1.0)[:, :1], 0.0).astype(o.dtype)
        row = jnp.where(seen, m_scratch[...] + jnp.log(jnp.where(seen, total, 1.0)), MASKED)
        lse[0, 0] = row.T[:1]


def _backward_tile(q, k, v, do, lse, delta, allowed, settings, tile):
    """p and ds of one tile, both [keys, queries]."""
    logits, slope = _logits(q, k, allowed, settings, tile)
    p = jnp.exp(logits - jnp.where(lse < SEEN, 0.0, lse))
    dp = dot(v, do, (((1,), (1,)), ((), ())))
    return p, p * (dp - delta) * (settings.scale * slope)


def _dq_kernel(table, offset, *refs, settings, structure, kinds):
    n_rows, n_blocks = kinds.count("row"), len(kinds) - kinds.count("row")
    rows, (q, k, v, do, lse, delta, *mask_refs) = refs[:n_rows], refs[n_rows : n_rows + 6 + n_blocks]
    dq, dq_scratch = refs[n_rows + 6 + n_blocks :]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        dq_scratch[...] = jnp.zeros_like(dq_scratch)

    @pl.when(table[b, i, j] == j)
    def _():
        allowed = _mask_in_kernel(structure, kinds, mask_refs, rows, b)
        tile = _tile(i, j, offset, settings, True)
        _, ds = _backward_tile(q[0, 0], k[0, 0], v[0, 0], do[0, 0], lse[0, 0], delta[0, 0], allowed, settings, tile)
        dq_scratch[...] += dot(ds.astype(k.dtype), k[0, 0], (((0,), (0,)), ((), ())))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = dq_scratch[...].astype(dq.dtype)


def _dkv_kernel(table, offset, *refs, settings, structure, kinds):
    n_rows, n_blocks = kinds.count("row"), len(kinds) - kinds.count("row")
    rows, (q, k, v, do, lse, delta, *mask_refs) = refs[:n_rows], refs[n_rows : n_rows + 6 + n_blocks]
    dk, dv, dk_scratch, dv_scratch = refs[n_rows + 6 + n_blocks :]
    b, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_scratch[...] = jnp.zeros_like(dk_scratch)
        dv_scratch[...] = jnp.zeros_like(dv_scratch)

    @pl.when(table[b, j, i] == i)
    def _():
        allowed = _mask_in_kernel(structure, kinds, mask_refs, rows, b)
        tile = _tile(i, j, offset, settings, True)
        p, ds = _backward_tile(q[0, 0], k[0, 0], v[0, 0], do[0, 0], lse[0, 0], delta[0, 0], allowed, settings, tile)
        dv_scratch[...] += dot(p.astype(do.dtype), do[0, 0], (((1,), (0,)), ((), ())))
        dk_scratch[...] += dot(ds.astype(q.dtype), q[0, 0], (((1,), (0,)), ((), ())))

    @pl.when((g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk[0, 0] = dk_scratch[...].astype(dk.dtype)
        dv[0, 0] = dv_scratch[...].astype(dv.dtype)


def _call(kernel, name, grid, at, table, offset, inputs, outputs, scratch, mask_leaves, static):
    """Run a kernel. `at` maps grid indices and the table to (b, query head, key head, query and key block).

    `inputs` are (array, axis) with axis "q" | "k" for [B, heads, length, D] and "stat" for [B, H, 1, T];
    `outputs` are (shape, dtype, axis).
    """
    settings, structure, kinds, transposed = static
    bq, bk = settings.block_q, settings.block_k

    def spec(shape, axis):
        def index(*ids):
            b, head, kv_head, i, j = at(*ids)
            return {"q": (b, head, i, 0), "k": (b, kv_head, j, 0), "stat": (b, head, 0, i)}[axis]

        block = {"q": (1, 1, bq, shape[3]), "k": (1, 1, bk, shape[3]), "stat": (1, 1, 1, bq)}[axis]
        return pl.BlockSpec(block, index)

    def mask_spec(kind):
        across = (kind == "q") == transposed  # along lanes

        def index(*ids):
            b, _, _, i, j = at(*ids)
            n = i if kind == "q" else j
            return (b, 0, n) if across else (b, n, 0)

        size = bq if kind == "q" else bk
        return pl.BlockSpec((1, 1, size) if across else (1, size, 1), index)

    rows = [x for x, kind in zip(mask_leaves, kinds, strict=True) if kind == "row"]
    blocks = [(x, kind) for x, kind in zip(mask_leaves, kinds, strict=True) if kind != "row"]
    laid = [x[:, None, :] if (kind == "q") == transposed else x[:, :, None] for x, kind in blocks]
    specs = [spec(shape, axis) for shape, _, axis in outputs]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]

    def run(*args, interpret):
        return pl.pallas_call(
            functools.partial(kernel, settings=settings, structure=structure, kinds=kinds),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2 + len(rows),
                grid=grid,
                in_specs=[spec(x.shape, axis) for x, axis in inputs] + [mask_spec(kind) for _, kind in blocks],
                out_specs=specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
            ),
            interpret=interpret,
            name=name,
        )(*args)

    return lax.platform_dependent(
        table, offset, *rows, *(x for x, _ in inputs), *laid,
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, leaves, live, offset):
    return _forward(static, q, k, v, leaves, live, offset)[0]


def _forward(static, q, k, v, leaves, live, offset):
    settings, structure, kinds = static
    b, h, t, d = q.shape
    group, (nq, nk) = settings.group, settings.blocks

    def at(b, head, i, j, table, *_):
        return b, head, lax.div(head, group), i, jnp.maximum(table[b, i, j], 0)

    o, lse = _call(
        _forward_kernel,
        "attention_forward",
        (b, h, nq, nk),
        at,
        _last_live(live),
        offset,
        [(q, "q"), (k, "k"), (v, "k")],
        [((b, h, t, v.shape[3]), q.dtype, "q"), ((b, h, 1, t), jnp.float32, "stat")],
        [(settings.block_q, LANES), (settings.block_q, LANES), (settings.block_q, v.shape[3])],
        leaves,
        (settings, structure, kinds, False),
    )
    return (o, lse), (q, k, v, leaves, live, offset, o, lse)


def _backward(static, residuals, cotangents):
    settings, structure, kinds = static
    q, k, v, leaves, live, offset, o, lse = residuals
    do, dlse = cotangents
    b, h, _, d = q.shape
    heads, dv = v.shape[1], v.shape[3]
    group, (nq, nk) = settings.group, settings.blocks
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None] - dlse
    inputs = [(q, "q"), (k, "k"), (v, "k"), (do, "q"), (lse, "stat"), (delta, "stat")]

    def at_dq(b, head, i, j, table, *_):
        return b, head, lax.div(head, group), i, jnp.maximum(table[b, i, j], 0)

    def at_dkv(b, kv_head, j, g, i, table, *_):
        return b, kv_head * group + g, kv_head, jnp.maximum(table[b, j, i], 0), j

    (dq,) = _call(
        _dq_kernel,
        "attention_dq",
        (b, h, nq, nk),
        at_dq,
        _last_live(live),
        offset,
        inputs,
        [(q.shape, q.dtype, "q")],
        [(settings.block_q, d)],
        leaves,
        (settings, structure, kinds, True),
    )
    dk, dv = _call(
        _dkv_kernel,
        "attention_dkv",
        (b, heads, nk, group, nq),
        at_dkv,
        _last_live(jnp.swapaxes(live, 1, 2)),
        offset,
        inputs,
        [(k.shape, k.dtype, "k"), (v.shape, v.dtype, "k")],
        [(settings.block_k, d), (settings.block_k, dv)],
        leaves,
        (settings, structure, kinds, True),
    )
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)
