"""Flash attention as Pallas kernels for TPU, forward and backward; interpreted on CPU.

The grid runs over (batch row, head, tile), where the tiles are those that the mask leaves alive, listed beforehand by
the mask's own `live` and `full` (see `tiles`). The mask itself is evaluated inside the kernel by its own `allowed`, on
blocks of its arrays, and only where it is not full. The backward pass is one kernel as long as dq of the
query heads that share a key head fits into VMEM, else two: one for dq, one for dk and dv.
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

from jaxrl.kernels.attention import masks, tiles, tpu_kernels
from jaxrl.kernels.attention.dropout import Dropout
from jaxrl.kernels.attention.reference import SEEN, with_sinks
from jaxrl.kernels.attention.tpu_kernels import Pieces, Place, Scalars, Settings
from jaxrl.kernels.varying import shape_like, vary_alike

LANES = 128
VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "7x": 64}  # MiB of one core
WIDE = ("v6e", "7x")  # matrix units of 256 x 256
USABLE = 0.75  # of it: the compiler's own scratch needs room too


class Blocks(NamedTuple):
    """Sides of a tile, multiples of 128; upper bounds, as a sequence may be shorter."""

    q: int
    k: int
    forward: Pieces
    backward: Pieces


def blocks_of(generation: str | None, itemsize: int) -> Blocks:
    """What gave the shortest schedules (benchmarks/attention/tpu.md), by generation of TPU and bytes of a number."""
    side = 512 if itemsize > 2 or generation == "v4" else 1024
    wide = generation in WIDE
    return Blocks(side, side, Pieces(512, 256 if wide else 128, 2), Pieces(512, 512, 1))


def refusal(q, k, v, mask, scale, soft_cap, bias) -> str | None:
    """Why the kernel cannot serve a call, or None if it can."""
    other = 'use implementation="xla" or None'
    if jax.default_backend() not in ("tpu", "cpu"):
        return f"the Pallas kernel is for TPU (interpreted on CPU), not {jax.default_backend()}; {other}"
    if bias is not None:
        return f"the Pallas kernel takes no bias (but alibi); {other}"
    if not (isinstance(scale, int | float) and isinstance(soft_cap, int | float | None)):
        return 'the Pallas kernel needs scale and soft_cap as Python numbers; use implementation="reference"'
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the Pallas kernel takes float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}; {other}"
    for path, _ in tree_leaves_with_path(mask):
        if path[-1].name not in masks.AXIS_OF_FIELD:
            name = path[-1].name
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
    alibi: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout: Dropout | None = None,
    blocks: Blocks | None = None,
    fused: bool | None = None,
    interpret: Any = True,
) -> tuple[jax.Array, jax.Array]:
    """`dense_attention` as a TPU kernel: O(T) memory forward and backward.

    (Dao 2023, arXiv:2307.08691.) Deviation: queries are scaled before they are multiplied with keys, in their own
    precision, where the formula scales the product.

    Args:
      q: [B, T, H, D]. k: [B, S, K, D]. v: [B, S, K, Dv]. All float32 or all bfloat16.
      mask, q_offset, scale, soft_cap, alibi, sinks, dropout: as in `dense_attention`. bias: must be None.
      blocks: sides of the tiles; default by shape and kind of TPU.
      fused: whether the backward pass is one kernel; default: where dq of a group of heads fits into VMEM.
      interpret: how the kernel runs where there is no TPU, as in `pl.pallas_call`.

    Returns:
      o [B, T, H, Dv] in the dtype of q, and lse [B, H, T] in float32.

    Raises:
      ValueError: what the kernel does not serve (see `refusal`).
    """
    reason = refusal(q, k, v, mask, scale, soft_cap, bias)
    if reason:
        raise ValueError(f'attention: implementation="pallas": {reason}.')
    options = {"scale": scale, "soft_cap": soft_cap, "alibi": alibi, "dropout": dropout}
    prepared = _prepare(q, k, v, mask, q_offset, **options, blocks=blocks, fused=fused, interpret=interpret)
    both: Any = _attention(*prepared)
    t = q.shape[1]
    o, lse = both
    o, lse = with_sinks(jnp.swapaxes(o[:, :, :t], 1, 2), jnp.swapaxes(lse[:, :, 0, :t], 1, 2), sinks)
    return o, jnp.swapaxes(lse, 1, 2)


class Part(NamedTuple):
    """Which part of a sequence of `k_length` keys the keys of a call are."""

    k_offset: int | jax.Array
    k_length: int


def part_outputs(q, k, v, *, mask, q_offset, part: Part, **options) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, Dv] and lse [B, H, T] over some of the keys, both float32; options as of `pallas_attention`."""
    t = q.shape[1]
    o, lse = _outputs(*_prepare(q, k, v, mask, q_offset, part=part, dtype=jnp.float32, **options))
    return jnp.swapaxes(o[:, :, :t], 1, 2), lse[:, :, 0, :t]


def part_gradients(q, k, v, o, lse, do, dlse, *, mask, q_offset, part: Part, **options):
    """What some of the keys add to dq, and their dk and dv, float32; o and lse are those over all keys."""
    t, s = q.shape[1], k.shape[1]
    prepared = _prepare(q, k, v, mask, q_offset, part=part, dtype=jnp.float32, **options)
    settings = prepared.static.settings
    o, do = (_heads_first(x, settings.block_q) for x in (o, do.astype(q.dtype)))
    pad = ((0, 0), (0, 0), (0, 0), (0, -t % settings.block_q))
    lse, dlse = (jnp.pad(x[:, :, None], pad) for x in (lse, dlse))
    dq, dk, dv = _gradients(prepared.static, (*prepared[1:], o, lse), (do, dlse))
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))
    return dq[:, :t] * settings.query_factor, dk[:, :s], dv[:, :s]


class Static(NamedTuple):
    """What the derivative rules carry along."""

    settings: Settings
    fused: bool
    vmem: int
    interpret: Any
    dtype: Any  # of all results; None for those of the inputs


class Prepared(NamedTuple):
    """The arguments of the kernels."""

    static: Static
    q: jax.Array  # [B, H, T, D], scaled, of whole blocks
    k: jax.Array
    v: jax.Array
    leaves: list[jax.Array]
    kinds: jax.Array
    numbers: jax.Array
    slopes: jax.Array


def _prepare(
    q, k, v, mask, q_offset, *, scale, soft_cap=None, alibi=None, dropout=None, blocks=None, fused=None,
    interpret=True, part=None, dtype=None,
) -> Prepared:  # fmt: skip
    t, s, heads = q.shape[1], k.shape[1], k.shape[2]
    part = part or Part(0, s)
    generation, vmem = _tpu()
    blocks = _fitted(blocks or blocks_of(generation, q.dtype.itemsize), t, s)
    narrow = any(x.shape[3] % (256 if generation in WIDE else 128) for x in (q, v))  # leaves part of a unit idle
    unmasked = isinstance(mask, masks.Full) and s % blocks.k == 0
    if s % blocks.k:  # the last block overhangs
        mask = mask & masks.Prefix(jnp.full(q.shape[0], part.k_offset + s, jnp.int32))
    mask = masks.with_explicit_keys(mask)
    settings = Settings(
        scale=scale,
        soft_cap=soft_cap,
        alibi=alibi is not None,
        dropout=0.0 if dropout is None else dropout.rate,
        k_length=part.k_length,
        group=q.shape[2] // heads,
        block_q=blocks.q,
        block_k=blocks.k,
        forward=blocks.forward,
        backward=blocks.backward,
        dq_across=narrow or generation in WIDE,
        dkv_across=narrow,
        unmasked=unmasked,
        structure=jax.tree.structure(mask),
        kinds=tuple(masks.AXIS_OF_FIELD[path[-1].name] for path, _ in tree_leaves_with_path(mask)),
    )
    qh = _heads_first((q.astype(jnp.float32) * settings.query_factor).astype(q.dtype), blocks.q)
    kh, vh = _heads_first(k, blocks.k), _heads_first(v, blocks.k)
    whole = masks.Tile(q_offset, qh.shape[2], part.k_offset, kh.shape[2], part.k_length)
    leaves = _operands(settings, mask, q.shape[0], whole)
    kinds = tiles.tile_kinds(mask, (q.shape[0], t, s), (blocks.q, blocks.k), q_offset, **part._asdict())
    numbers = jnp.zeros(4, jnp.int32).at[0].set(q_offset).at[1].set(part.k_offset)
    if dropout is not None:
        numbers = numbers.at[2:].set(lax.bitcast_convert_type(dropout.seed, jnp.int32))
    slopes = jnp.zeros(1) if alibi is None else alibi.astype(jnp.float32)
    dq_bytes = settings.group * qh.shape[2] * qh.shape[3] * 4
    if fused is None:
        fused = dq_bytes <= vmem // 2
    static = Static(settings, fused, vmem, interpret, dtype)
    return Prepared(static, *vary_alike(qh, kh, vh, leaves, kinds, numbers, slopes))


def _tpu() -> tuple[str | None, int]:
    """Generation of the TPU that is lowered for, and bytes of VMEM a kernel may use; None and the least of all where it
    is not known."""
    try:
        info = pltpu.get_tpu_info()
        return str(info.chip_version), int(info.vmem_capacity_bytes * USABLE)
    except ValueError:  # no TPU, and no mesh of one
        return None, int(min(VMEM.values()) * 2**20 * USABLE)


def _fitted(blocks: Blocks, t: int, s: int) -> Blocks:
    """Sides of equal blocks that cover the sequences: one block of any size, or several multiples of 128."""
    for limit in blocks[:2]:
        if limit % LANES:
            raise ValueError(f"attention: the Pallas kernel needs blocks that are multiples of {LANES}, got {limit}.")

    def side(length, limit):
        count = -(-length // limit)
        unit = 16 if count == 1 else LANES
        return -(-length // (count * unit)) * unit

    def part(length, limit):
        fits = [n for n in range(LANES, min(limit, length) + 1, LANES) if length % n == 0]
        return fits[-1] if fits else length

    q, k = side(t, blocks.q), side(s, blocks.k)
    forward, backward = (Pieces(part(q, p.q), part(k, p.k), p.ahead) for p in blocks[2:])
    return Blocks(q, k, forward, backward)


def _heads_first(x: jax.Array, block: int) -> jax.Array:
    """[B, T, H, D] -> [B, H, T rounded up to whole blocks, D], zeros at the end."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


def _operands(settings: Settings, mask: masks.Mask, batch: int, whole: masks.Tile) -> list[jax.Array]:
    """The mask's leaves as int32 [B, 1, queries], [B, keys, 1] or [B], cut to the whole call."""
    cut = {
        "q": lambda x: whole.of_query(x)[:, :, :, 0],
        "k": lambda x: jnp.swapaxes(whole.of_key(x)[:, 0], 1, 2),
        "row": lambda x: x,
    }
    leaves = [cut[kind](leaf) for kind, leaf in zip(settings.kinds, jax.tree.leaves(mask), strict=True)]
    return [jnp.broadcast_to(x, (batch, *x.shape[1:])).astype(jnp.int32) for x in leaves]


class Step(NamedTuple):
    """Where the grid stands within one (batch row, head)."""

    g: Any  # query head of the group
    first: Any
    dq_done: Any  # no later tile adds to dq of this block of queries


DONE, PAST = 1, 2


def _dq_order(kinds: jax.Array, entries: jax.Array) -> jax.Array:
    """Where the fused kernel writes dq, for each entry of its list by keys, int32 [B|1, n].

    The block of queries whose sum is the next to be complete, times 4, plus DONE where it is complete with this entry
    (as its last live block of keys is reached). Behind the last such entry its block stays, with PAST. So a block is
    never left before it is written, nor entered again.
    """
    blocks = jnp.arange(kinds.shape[2], dtype=jnp.int32)
    last_keys = jnp.max(jnp.where(kinds > 0, blocks, -1), axis=2)
    minor, slots = tiles.minor(entries), jnp.arange(entries.shape[1], dtype=jnp.int32)[None]
    reached = tiles.major(entries) == jnp.take_along_axis(last_keys, minor, axis=1)
    done = reached & ((entries & tiles.LIVE) != 0)
    final = jnp.max(jnp.where(done, slots, 0), axis=1, keepdims=True)
    following = lax.cummin(jnp.where(done, slots, final), axis=1, reverse=True)
    block = jnp.take_along_axis(minor, jnp.where(slots > final, final, following), axis=1)
    return (block << 2) + PAST * (slots > final) + DONE * done


def _call(body, name, static, kinds, numbers, slopes, leaves, inputs, outputs, scratch, *, by_keys):
    """Run a kernel of `tpu_kernels` over the tiles that are alive.

    Args:
      body: the kernel.
      kinds: of the tiles, see `tiles.tile_kinds`.
      inputs: (array, axis), axis "q" or "k" for [B, heads, length, D] and "row" for [B, H, 1, T].
      outputs: (shape, dtype, axis); axis "dq" for [B, H, T, D], by keys, of which a block is written when it is done.
      scratch: shapes, float32.
      by_keys: go block of keys by block of keys, and through all query heads of a key head; else block of queries
        by block of queries.
    """
    settings = static.settings
    bq, bk = settings.block_q, settings.block_k
    listed = tiles.tile_list(jnp.swapaxes(kinds, 1, 2) if by_keys else kinds)
    alike = listed.entries.shape[0] == 1
    order = [_dq_order(kinds, listed.entries)] if "dq" in [axis for *_, axis in outputs] else []
    batch, heads = inputs[1][0].shape[:2]
    grid = (batch, heads, listed.count, settings.group) if by_keys else (batch, heads * settings.group, listed.count, 1)
    rows = [x for x, kind in zip(leaves, settings.kinds, strict=True) if kind == "row"]
    blocks = [(x, kind) for x, kind in zip(leaves, settings.kinds, strict=True) if kind != "row"]

    def place(b, head, n, g, entries):
        entry = entries[0 if alike else b, n]
        this, other = tiles.major(entry), tiles.minor(entry)
        i, j = (other, this) if by_keys else (this, other)
        return Place(b, head * settings.group + g if by_keys else head, entry, i, j)

    def spec(shape, axis):
        def index(b, head, n, g, entries, *scalars):
            if axis == "dq":
                code = scalars[-1][0 if alike else b, n]
                of_group = jnp.where(code & DONE != 0, g, jnp.where(code & PAST != 0, settings.group - 1, 0))
                return b, head * settings.group + of_group, lax.shift_right_logical(code, 2), 0
            at = place(b, head, n, g, entries)
            kv_head = head if by_keys else lax.div(head, settings.group)
            return {"q": (b, at.head, at.i, 0), "k": (b, kv_head, at.j, 0), "row": (b, at.head, 0, at.i)}[axis]

        block = {"q": (1, 1, bq, shape[-1]), "k": (1, 1, bk, shape[-1]), "row": (1, 1, 1, bq)}
        return pl.BlockSpec((block | {"dq": block["q"]})[axis], index)

    def mask_spec(kind):
        def index(b, head, n, g, entries, *_):
            at = place(b, head, n, g, entries)
            return (b, 0, at.i) if kind == "q" else (b, at.j, 0)

        return pl.BlockSpec((1, 1, bq) if kind == "q" else (1, bk, 1), index)

    def kernel(entries, numbers, slopes, *refs):
        refs = iter(refs)
        take = lambda n: [next(refs) for _ in range(n)]
        scalars = Scalars(entries, numbers, slopes, take(len(rows)))
        codes = take(len(order))
        b, head, n, g = (pl.program_id(axis) for axis in range(4))
        at = place(b, head, n, g, entries)
        step = Step(g, (n == 0) & (g == 0), (codes[0][0 if alike else b, n] & DONE) != 0 if codes else False)
        body(
            settings, scalars, at, step,
            take(len(inputs)), take(len(blocks)), take(len(outputs)), take(len(scratch)),
        )  # fmt: skip

    def run(count, *args, interpret):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3 + len(rows) + len(order),
                grid=(*grid[:2], count, grid[3]),
                in_specs=[spec(x.shape, axis) for x, axis in inputs] + [mask_spec(kind) for _, kind in blocks],
                out_specs=[spec(shape, axis) for shape, _, axis in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[shape_like(args[0], shape, dtype) for shape, dtype, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=static.vmem
            ),
            interpret=interpret,
            name=name,
        )(*args)

    return lax.platform_dependent(
        listed.count, listed.entries, numbers, slopes, *rows, *order, *(x for x, _ in inputs), *(x for x, _ in blocks),
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=static.interpret),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, leaves, kinds, numbers, slopes):
    return _forward(static, q, k, v, leaves, kinds, numbers, slopes)[0]


def _forward(static, q, k, v, leaves, kinds, numbers, slopes):
    o, lse = _outputs(static, q, k, v, leaves, kinds, numbers, slopes)
    return (o, lse), (q, k, v, leaves, kinds, numbers, slopes, o, lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _outputs(static, q, k, v, leaves, kinds, numbers, slopes):
    settings = static.settings
    (b, h, t, _), dv, bq = q.shape, v.shape[3], settings.block_q
    return _call(
        tpu_kernels.forward,
        "attention_forward",
        static,
        kinds,
        numbers,
        slopes,
        leaves,
        [(q, "q"), (k, "k"), (v, "k")],
        [((b, h, t, dv), static.dtype or q.dtype, "q"), ((b, h, 1, t), jnp.float32, "row")],
        [(1, bq), (1, bq), (dv, bq)],
        by_keys=False,
    )


def _backward(static, residuals, cotangents):
    return (*_gradients(static, residuals, cotangents), None, None, None, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(static, residuals, cotangents):
    settings = static.settings
    q, k, v, leaves, kinds, numbers, slopes, o, lse = residuals
    do, dlse = cotangents
    bq, bk, d = settings.block_q, settings.block_k, q.shape[3]
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None] - dlse
    lse = jnp.where(lse < SEEN, 0.0, lse * tpu_kernels.LOG2E)
    inputs = [(q, "q"), (k, "k"), (v, "k"), (do, "q"), (lse, "row"), (delta, "row")]
    call = functools.partial(
        _call, static=static, kinds=kinds, numbers=numbers, slopes=slopes, leaves=leaves, inputs=inputs
    )
    q_type, k_type, v_type = (static.dtype or x.dtype for x in (q, k, v))
    outputs = [(k.shape, k_type, "k"), (v.shape, v_type, "k")]
    shape = lambda turned, *sides: sides[::-1] if turned else sides
    dq_shape = shape(settings.dq_across, bq, d)
    scratch = [shape(settings.dkv_across, bk, d), shape(settings.dkv_across, bk, v.shape[3])]
    if static.fused:
        outputs.append((q.shape, q_type, "dq"))
        scratch.append((settings.group, q.shape[2] // bq, *dq_shape))
        dk, dv, dq = call(tpu_kernels.dk_dv, "attention_backward", outputs=outputs, scratch=scratch, by_keys=True)
        written = jnp.repeat(jnp.any(kinds > 0, axis=2), bq, axis=1)  # blocks that see nothing are not
        return jnp.where(written[:, None, :, None], dq, 0), dk, dv
    (dq,) = call(
        tpu_kernels.dq_only, "attention_dq", outputs=[(q.shape, q_type, "q")], scratch=[dq_shape], by_keys=False
    )
    dk, dv = call(tpu_kernels.dk_dv, "attention_dkv", outputs=outputs, scratch=scratch, by_keys=True)
    return dq, dk, dv


_attention.defvjp(_forward, _backward)


@_gradients.defjvp
@_outputs.defjvp
def _second_derivatives(static, primals, tangents):
    raise ValueError(
        'attention: implementation="pallas" has no second derivatives; use implementation="reference", which has all.'
    )
