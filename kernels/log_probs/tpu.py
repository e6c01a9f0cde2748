"""Token statistics as Pallas kernels for TPU, forward and backward; interpreted on CPU.

The forward kernel runs over (token block, vocabulary block) and keeps a running maximum, sum and mean per token in
scratch memory. The backward pass is two kernels, each of which computes the logits anew: tokens outside and
vocabulary inside for the gradient of the hidden states, the other way round for that of the unembedding, so that each
sums in float32 in scratch memory and writes once. What belongs to a token lies along sublanes, [N, 1].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl.kernels.varying import shape_like

LOWEST = -1e30
LANES, SUBLANES = 128, 16
BLOCK = 512
VMEM_LIMIT = 56 * 2**20  # a core of a TPU v7 has 64 MB, of a v5e, v5p or v6e 128 MB
VMEM_BUDGET = 40 * 2**20
dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


class Settings(NamedTuple):
    """What is static about a call."""

    soft_cap: float | None
    tokens: int
    vocabulary: int
    size: int  # of the vocabulary
    interpret: Any


def refusal(hidden, unembedding, soft_cap) -> str | None:
    """Why the kernel cannot serve a call, or None if it can."""
    other = 'use implementation="xla" or None'
    if jax.default_backend() not in ("tpu", "cpu"):
        return f"the Pallas kernel is for TPU (interpreted on CPU), not {jax.default_backend()}; {other}"
    if not isinstance(soft_cap, int | float | None):
        return 'the Pallas kernel needs soft_cap as a Python number; use implementation="reference"'
    if hidden.dtype != unembedding.dtype or hidden.dtype not in (jnp.float32, jnp.bfloat16):
        return (
            "the Pallas kernel takes float32 or bfloat16 for both hidden and unembedding, "
            f"not {hidden.dtype} and {unembedding.dtype}; {other}"
        )
    if _vmem(LANES, hidden.shape[-1], hidden.dtype.itemsize) > VMEM_BUDGET:
        return f"a hidden size of {hidden.shape[-1]} is too large for the Pallas kernel; {other}"
    return None


def _vmem(block: int, d: int, itemsize: int) -> int:
    """Bytes that the largest kernel takes: two buffers each of hidden, unembedding and gradient, a sum, four tiles."""
    return block * d * (6 * itemsize + 4) + 16 * block * block


def pallas_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    scale: jax.Array,
    *,
    soft_cap: float | None = None,
    tokens: int | None = None,
    vocabulary: int | None = None,
    interpret: Any = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dense_statistics` as TPU kernels, with one tile of logits at a time in VMEM.

    (Milakov and Gimelshein 2018, arXiv:1805.02867; Wijmans et al. 2024, arXiv:2411.09009.)

    Args:
      hidden, unembedding, targets, scale, soft_cap: as in `dense_statistics`; hidden and unembedding both float32 or
        both bfloat16, soft_cap a Python number.
      tokens, vocabulary: the tile's sides, multiples of 16 and of 128; default by the size of VMEM.
      interpret: how the kernel runs where there is no TPU, as in `pl.pallas_call`.

    Returns:
      log_probs [N], entropy [N] and lse [N], float32. First derivatives only, in reverse mode.

    Raises:
      ValueError: tokens or vocabulary that are no such multiples.
    """
    if (tokens or 0) % SUBLANES or (vocabulary or 0) % LANES:
        raise ValueError(
            f"token_log_probs: the Pallas kernel got a tile of {tokens} tokens and {vocabulary} columns, expected "
            f"multiples of {SUBLANES} and {LANES}."
        )
    (n, d), size = hidden.shape, unembedding.shape[1]
    fitting = [b for b in (BLOCK, BLOCK // 2, LANES) if _vmem(b, d, hidden.dtype.itemsize) <= VMEM_BUDGET]
    limit = max(fitting, default=LANES)
    rounded = max(1, -(-n // SUBLANES)) * SUBLANES
    settings = Settings(soft_cap, tokens or min(limit, rounded), min(size, vocabulary or limit), size, interpret)
    pad = -n % settings.tokens if n else settings.tokens
    column = lambda x, dtype: jnp.pad(x.astype(dtype), (0, pad))[:, None]
    h = jnp.pad(hidden, ((0, pad), (0, 0)))
    out: Any = _statistics(settings, h, unembedding, column(targets, jnp.int32), column(scale, jnp.float32))
    log_probs, entropy, lse = (x[:n, 0] for x in out)
    return log_probs, entropy, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(settings, h, w, y, scale):
    return _forward(settings, h, w, y, scale)[0]


def _forward(settings, h, w, y, scale):
    out = _call(
        _forward_kernel,
        "log_probs_forward",
        settings,
        (h, w, y, scale),
        [((y.shape, jnp.float32), "token")] * 3,
        [pltpu.VMEM((settings.tokens, 1), jnp.float32)] * 4,
    )
    return tuple(out), (h, w, y, scale, out[1], out[2])


def _backward(settings, residuals, cotangents):
    """The formulas of `blocked._gradients`."""
    h, w, y, scale, entropy, lse = residuals
    g, g_entropy, g_lse = cotangents
    inputs = h, w, y, scale, lse, g, g_entropy, g_lse - g - g_entropy * entropy
    d, bt, bv = h.shape[1], settings.tokens, settings.vocabulary
    dh, dscale = _call(
        _dh_kernel,
        "log_probs_dh",
        settings,
        inputs,
        [((h.shape, h.dtype), "hidden"), ((y.shape, jnp.float32), "token")],
        [pltpu.VMEM((bt, d), jnp.float32), pltpu.VMEM((bt, 1), jnp.float32)],
    )
    (dw,) = _call(
        _dw_kernel,
        "log_probs_dw",
        settings,
        inputs,
        [((w.shape, w.dtype), "vocabulary")],
        [pltpu.VMEM((d, bv), jnp.float32)],
        vocabulary_first=True,
    )
    return dh, dw, None, dscale


_statistics.defvjp(_forward, _backward)


def _call(kernel, name, settings, inputs, outputs, scratch, vocabulary_first=False):
    """Run a kernel over token and vocabulary blocks. Inputs are hidden, unembedding and then [N, 1] arrays; outputs
    are ((shape, dtype), "hidden" | "vocabulary" | "token")."""
    h, w = inputs[:2]
    bt, bv = settings.tokens, settings.vocabulary
    grid = (h.shape[0] // bt, pl.cdiv(settings.size, bv))
    at = (lambda j, i: (i, j)) if vocabulary_first else (lambda i, j: (i, j))
    specs = {
        "hidden": pl.BlockSpec((bt, h.shape[1]), lambda *ids: (at(*ids)[0], 0)),
        "vocabulary": pl.BlockSpec((w.shape[0], bv), lambda *ids: (0, at(*ids)[1])),
        "token": pl.BlockSpec((bt, 1), lambda *ids: (at(*ids)[0], 0)),
    }

    def run(*args, interpret):
        return pl.pallas_call(
            functools.partial(kernel, settings=settings),
            grid=grid[::-1] if vocabulary_first else grid,
            in_specs=[specs["hidden"], specs["vocabulary"]] + [specs["token"]] * (len(args) - 2),
            out_specs=[specs[kind] for _, kind in outputs],
            out_shape=[shape_like(h, *shape) for shape, _ in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=interpret,
            name=name,
        )(*args)

    @jax.custom_jvp
    def on_any_platform(*args):
        return lax.platform_dependent(
            *args,
            tpu=functools.partial(run, interpret=False),
            default=functools.partial(run, interpret=settings.interpret),
        )

    @on_any_platform.defjvp
    def _second_derivatives(primals, tangents):
        raise ValueError(
            'token_log_probs: implementation="pallas" has no second derivatives; use implementation="reference", '
            "which has all."
        )

    return on_any_platform(*inputs)


def _logits(settings: Settings, h, w, first):
    """The capped logits of one tile, the slope of the soft cap (1.0 without), and the column of each."""
    u, slope = dot(h, w, (((1,), (0,)), ((), ()))), 1.0
    if settings.soft_cap is not None:
        bent = jnp.tanh(u / settings.soft_cap)
        u, slope = settings.soft_cap * bent, 1.0 - bent * bent
    column = lax.broadcasted_iota(jnp.int32, u.shape, 1) + first
    if settings.size % settings.vocabulary:  # the last block overhangs, and what it reads there may be anything
        inside = column < settings.size
        u, slope = jnp.where(inside, u, LOWEST), jnp.where(inside, slope, 0.0)
    return u, slope, column


def _forward_kernel(h, w, y, scale, log_prob, entropy, lse, m, total, spread, chosen, *, settings):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full_like(m, LOWEST)
        for x in (total, spread, chosen):
            x[...] = jnp.zeros_like(x)

    u, _slope, column = _logits(settings, h[...], w[...], j * settings.vocabulary)
    x = u * scale[...]
    m_new = jnp.maximum(m[...], jnp.max(x, axis=-1, keepdims=True))
    z = x - m_new
    e = jnp.exp(z)
    decay = jnp.exp(m[...] - m_new)
    spread[...] = decay * (spread[...] + (m[...] - m_new) * total[...]) + jnp.sum(e * z, axis=-1, keepdims=True)
    total[...] = decay * total[...] + jnp.sum(e, axis=-1, keepdims=True)
    chosen[...] += jnp.sum(jnp.where(column == y[...], x, 0.0), axis=-1, keepdims=True)
    m[...] = m_new

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        log_total = jnp.log(total[...])
        log_prob[...] = (chosen[...] - m[...]) - log_total
        entropy[...] = log_total - spread[...] / total[...]
        lse[...] = m[...] + log_total


def _slopes(settings: Settings, refs, first):
    """Of one tile: the gradient of the logits before the soft cap in the dtype of the weights, and that of the scale
    of each token."""
    h, w, y, scale, lse, g, g_entropy, rest = (x[...] for x in refs)
    u, slope, column = _logits(settings, h, w, first)
    log_p = u * scale - lse
    dx = jnp.exp(log_p) * (rest - g_entropy * log_p) + jnp.where(column == y, g, 0.0)
    return (dx * scale * slope).astype(w.dtype), jnp.sum(dx * u, axis=-1, keepdims=True)


def _dh_kernel(h, w, y, scale, lse, g, g_entropy, rest, dh, dscale, dh_sum, dscale_sum, *, settings):
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    first = j * settings.vocabulary

    @pl.when(j == 0)
    def _():
        dh_sum[...] = jnp.zeros_like(dh_sum)
        dscale_sum[...] = jnp.zeros_like(dscale_sum)

    du, dr = _slopes(settings, (h, w, y, scale, lse, g, g_entropy, rest), first)
    dscale_sum[...] += dr
    overhangs = settings.size % settings.vocabulary != 0

    @pl.when((j < last) | (not overhangs))
    def _():
        dh_sum[...] += dot(du, w[...], (((1,), (1,)), ((), ())))

    if overhangs:

        @pl.when(j == last)
        def _():
            column = lax.broadcasted_iota(jnp.int32, w.shape, 1) + first
            known = jnp.where(column < settings.size, w[...], jnp.zeros_like(w))
            dh_sum[...] += dot(du, known, (((1,), (1,)), ((), ())))

    @pl.when(j == last)
    def _():
        dh[...] = dh_sum[...].astype(dh.dtype)
        dscale[...] = dscale_sum[...]


def _dw_kernel(h, w, y, scale, lse, g, g_entropy, rest, dw, dw_sum, *, settings):
    j, i = pl.program_id(0), pl.program_id(1)

    @pl.when(i == 0)
    def _():
        dw_sum[...] = jnp.zeros_like(dw_sum)

    du = _slopes(settings, (h, w, y, scale, lse, g, g_entropy, rest), j * settings.vocabulary)[0]
    dw_sum[...] += dot(h[...], du, (((0,), (0,)), ((), ())))

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        dw[...] = dw_sum[...].astype(dw.dtype)
