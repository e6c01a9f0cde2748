"""Sequences with a part of their tokens masked: what a masked diffusion model is trained and judged on.

Noise is data. It is drawn before the loss, so that the loss is a plain function of parameters and batch: micro-batches,
shards and two models that are to be compared all see the same masks.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.losses import diffusion
from jaxrl.losses.segments import sequence_sums, spread
from jaxrl.posttrain.score import layout
from jaxrl.types import TokenBatch

FORMS = ("time", "count")


@flax.struct.dataclass
class Noised:
    """A batch with masks in it.

    `batch`: the clean `TokenBatch [B, T]`. `tokens`: `[B, T]` as the network sees them. `masked`: `[B, T]` bool.
    `weight`: `[B, T]` float32, of a masked token's cross-entropy.
    """

    batch: TokenBatch
    tokens: jax.Array
    masked: jax.Array
    weight: jax.Array


def uniforms(key: jax.Array, rows: int, draws: int) -> jax.Array:
    """Numbers in [0, 1), `[rows, draws]`: each is uniform, and the draws of a row lie one to a stratum of 1 / draws.

    A row's strata are one random shift and a random order (the low-discrepancy sampler of Kingma et al. 2021, arXiv
    2107.00630, appendix I.1). Consumes the key.
    """
    shift, order = jax.random.split(key)
    start = jax.random.uniform(shift, (rows, 1))
    strata = jnp.argsort(jax.random.uniform(order, (rows, draws)), axis=1)
    return (start + strata / draws) % 1.0


def noised(
    key: jax.Array,
    batch: TokenBatch,
    *,
    mask_id: int,
    form: str = "time",
    span: tuple[Any, Any] = (1e-3, 1.0),
    schedule: str = "linear",
    block: int | None = None,
    confine: bool = False,
    uniform: jax.Array | None = None,
) -> Noised:
    """Masks a part of each sequence, or of each block, anew.

    "time": t ~ U(span), each token masked with probability 1 - alpha(t), weight -alpha' / (1 - alpha). With the linear
    schedule that is 1 / t, and a span of (1e-3, 1) is LLaDA's. "count": m of the n tokens that may be masked are, m
    uniform in 1..n, weight n / m: the same mean for the whole span, less variance, and never nothing to learn.
    (Nie et al. 2025, arXiv 2502.09992, eqs. 3 and 6; Arriola et al. 2025, arXiv 2503.09573, for blocks and spans.)

    Args:
      key: consumed.
      batch: only what its loss mask counts is ever masked: all tokens in pre-training, responses in tuning. Unlike in
        next-token prediction, the first token of a row counts.
      mask_id: the mask token.
      form: "time" or "count".
      span: times that are drawn. A span without its ends trains with less variance (the clipped schedules of block
        diffusion) but is no bound on the likelihood any more. Arrays are taken too.
      schedule: name in `losses.diffusion.SCHEDULES`, for "time".
      block: tokens that share a time, counted from column 0; None: a sequence does (every packed one its own).
      confine: draw masks again until the masked share of each block lies in the span, as far as one does; a span from
        1e-3 or less lets a block have no mask, or the full schedule would be no bound any more.
      uniform: numbers in [0, 1) to take times from, `[B, n]`, n being 1, the blocks of a row, or T for packed rows;
        None draws them, one to a stratum over the batch.

    Raises:
      ValueError: an unknown form, or "count" or confine with a schedule that is not linear.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    if schedule != "linear" and (form == "count" or confine):
        raise ValueError(
            f"schedule is {schedule!r}, but form 'count' and confine know masked shares only: use 'linear'"
        )
    rows, length = batch.tokens.shape
    counted = batch.loss_mask > 0
    groups = _groups(batch, block)
    total = lambda of: spread(sequence_sums(of, counted, segment_ids=groups), length=length, segment_ids=groups)
    draw, place, more = jax.random.split(key, 3)
    if uniform is None:
        number = 1 if groups is None else length if batch.segments is not None else -(-length // (block or length))
        uniform = uniforms(draw, 1, rows * number).reshape(rows, number)
    uniform = spread(uniform, length=length, segment_ids=groups)
    if form == "count":
        size = total(jnp.ones((rows, length)))
        count = jnp.minimum(1.0 + jnp.floor(uniform * size), jnp.maximum(size, 1.0))
        masked = counted & (_ranks(jax.random.uniform(place, (rows, length)), counted, groups) < count)
        return masked_by(batch, masked, size / count, mask_id=mask_id)
    at = diffusion.level(schedule, span[0] + (span[1] - span[0]) * uniform)
    masked = lambda noise: counted & (noise < 1.0 - at.alpha)
    first = jax.random.uniform(place, (rows, length))
    noise = _again(more, first, lambda noise: _outside(total, masked(noise), span)) if confine else first
    return masked_by(batch, masked(noise), diffusion.masked_weight(at), mask_id=mask_id)


def masked_by(batch: TokenBatch, masked: jax.Array, weight: jax.Array, *, mask_id: int) -> Noised:
    """The batch with those tokens masked, `masked` and `weight [B, T]`."""
    return Noised(batch, jnp.where(masked, mask_id, batch.tokens), masked, weight)


def visible(batch: TokenBatch) -> jax.Array:
    """Which tokens a network without a causal mask may see together, `[B, T]` ids: 0 is padding.

    The batch's segments; without them 1 up to the last token that is learnt, so padding behind it is not seen.
    """
    if batch.segments is not None:
        return batch.segments
    columns = jnp.arange(batch.tokens.shape[1])[None]
    end = jnp.where(batch.loss_mask > 0, columns + 1, 0).max(axis=1, keepdims=True)
    return (columns < end).astype(jnp.int32)


def ended(batch: TokenBatch, eos_id: int) -> TokenBatch:
    """Fills what stands behind the last learnt token with the EOS, to be learnt like it.

    A masked diffusion model fills a fixed number of places, so it learns where a response ends by learning the padding
    too (arXiv 2502.09992, section 2.3). Rows of one example each.
    """
    behind = visible(batch) == 0
    tokens, loss_mask = jnp.where(behind, eos_id, batch.tokens), jnp.where(behind, 1.0, batch.loss_mask)
    return dataclasses.replace(batch, tokens=tokens, loss_mask=loss_mask)


def shortened(key: jax.Array, batch: TokenBatch, *, share: float = 0.01) -> TokenBatch:
    """With probability `share`, the batch cut to a length from U{1, T}, so that a model meets all lengths.

    (arXiv 2502.09992, section 2.2.) What is cut off is neither learnt nor seen. Consumes the key. Rows of one example.
    """
    first, second = jax.random.split(key)
    width = batch.tokens.shape[1]
    length = jax.random.randint(first, (), 1, width + 1)
    length = jnp.where(jax.random.uniform(second) < share, length, width)
    kept = jnp.where(jnp.arange(width)[None] < length, batch.loss_mask, 0.0)
    return dataclasses.replace(batch, loss_mask=kept)


def intervals(*, step: float = 0.05, widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)) -> np.ndarray:
    """All spans `[n, 2]` of such widths inside (0, 1), `step` apart, that a clipped schedule is searched among."""
    starts = ((i * step, width) for width in widths for i in range(round((1.0 - width) / step) + 1))
    return np.array([(max(start, 1e-3), min(start + width, 1.0)) for start, width in starts], np.float32)


def _groups(batch: TokenBatch, block: int | None) -> jax.Array | None:
    """[B, T] ids, equal where tokens share a time; None: a whole row does."""
    if block is None:
        return batch.segments
    columns = jnp.broadcast_to((jnp.arange(batch.tokens.shape[1]) // block)[None], batch.tokens.shape)
    return columns if batch.segments is None else batch.segments * batch.tokens.shape[1] + columns


def _ranks(noise: jax.Array, counted: jax.Array, groups: jax.Array | None) -> jax.Array:
    """Place of every counted token among those of its group, by noise: 0 is the lowest."""
    columns = jnp.broadcast_to(jnp.arange(noise.shape[1])[None], noise.shape)
    inside = layout(groups)[1]
    first = jnp.zeros_like(columns) if inside is None else columns - inside
    order = jnp.lexsort((noise, ~counted, first), axis=1)
    return jnp.argsort(order, axis=1) - first


def _outside(total, masked: jax.Array, span) -> jax.Array:
    share = total(masked) / jnp.maximum(total(jnp.ones_like(masked)), 1.0)
    low = jnp.where(span[0] > 1.001e-3, span[0] - 1e-6, 0.0)
    return (share < low) | (share > span[1] + 1e-6)


def _again(key: jax.Array, noise: jax.Array, outside, tries: int = 100) -> jax.Array:
    """Draws the noise again where it leads outside, at most so many times."""

    def redraw(carry):
        number, noise = carry
        fresh = jax.random.uniform(jax.random.fold_in(key, number), noise.shape)
        return number + 1, jnp.where(outside(noise), fresh, noise)

    more = lambda carry: (carry[0] < tries) & outside(carry[1]).any()
    return jax.lax.while_loop(more, redraw, (jnp.int32(1), noise))[1]
