"""From per-token values to one number, as a total and a weight.

A mean of means is not the mean. So every reduction returns `Weighted(total, weight)`: add totals and add
weights over micro-batches, over packed rows and over devices (`jax.lax.psum`), divide once at the end, and
the gradient is exactly that of the whole batch. A sequence must lie within one call.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import choice, same_shape
from jaxrl.losses.segments import sequence_sums


class Weighted(NamedTuple):
    """A sum and the weight to divide it by, float32 scalars. Both may be added up over parts of a batch."""

    total: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """total / weight, and 0 (with zero gradient) where the weight is 0."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


Reduction = Callable[..., Weighted]
"""(values [B, T], mask [B, T], *, segment_ids=None) -> Weighted."""


def elements(values: jax.Array, mask: jax.Array | None = None) -> Weighted:
    """Mean over elements of any shape: pairs [N], steps [T], streams [B, T].

    Args:
      values: [...].
      mask: [...], true where an element counts (values elsewhere are never read), or None for all.

    Returns:
      total = sum of unmasked values, weight = their number.
    """
    same_shape("[...]", values=values, mask=mask)
    values = jnp.asarray(values, jnp.float32)
    counted = jnp.ones_like(values, bool) if mask is None else jnp.asarray(mask, bool)
    return Weighted(jnp.where(counted, values, 0.0).sum(), counted.sum(dtype=jnp.float32))


def tokens(values: jax.Array, mask: jax.Array, *, segment_ids: jax.Array | None = None) -> Weighted:
    """Mean over tokens: long sequences count for more (DAPO, Yu et al. 2025, arXiv 2503.14476; SFT).

    Args:
      values: [B, T]. Values where the mask is false are never read, so they may be NaN.
      mask: [B, T], true where a token counts.
      segment_ids: [B, T] or None; accepted so that all reductions are called alike, and without effect.

    Returns:
      total = sum of unmasked values, weight = number of unmasked tokens. An empty row adds nothing to either.
    """
    same_shape("[B, T]", values=values, mask=mask, segment_ids=segment_ids)
    return elements(values, mask)


def sequences(
    values: jax.Array, mask: jax.Array, *, segment_ids: jax.Array | None = None, count_empty: bool = False
) -> Weighted:
    """Mean over sequences of the mean over their tokens (GRPO, Shao et al. 2024, arXiv 2402.03300).

    Args:
      values, mask: [B, T], as in `tokens`.
      segment_ids: [B, T] or None: several sequences packed into a row (see `segments`).
      count_empty: what a row without any unmasked token counts for. False: nothing, it is padding (verl,
        Tunix, OpenRLHF). True: one sequence whose value is zero (TRL). The paper has no such rows.

    Returns:
      total = sum over sequences of their token means, weight = number of sequences.

    Raises:
      ValueError: count_empty with segment_ids, where an empty sequence and padding look alike.
    """
    return _over_sequences(values, mask, segment_ids, count_empty, lambda sums, lengths: sums / lengths)


def constant(
    values: jax.Array,
    mask: jax.Array,
    *,
    length: float,
    segment_ids: jax.Array | None = None,
    count_empty: bool = False,
) -> Weighted:
    """Mean over sequences of (sum over their tokens) / length (Dr.GRPO, Liu et al. 2025, arXiv 2503.20783).

    Args:
      values, mask, segment_ids, count_empty: as in `sequences`.
      length: the one divisor for every sequence: the longest response that can be generated, in tokens. It
        must not follow the padded width, which changes from batch to batch. 1 gives sums over tokens.

    Returns:
      total = sum of unmasked values / length, weight = number of sequences.

    Raises:
      ValueError: as `sequences`.
    """
    return _over_sequences(values, mask, segment_ids, count_empty, lambda sums, lengths: sums / length)


def _over_sequences(values, mask, segment_ids, count_empty, per_sequence) -> Weighted:
    same_shape("[B, T]", values=values, mask=mask, segment_ids=segment_ids)
    if count_empty and segment_ids is not None:
        raise ValueError(
            "count_empty=True was given with segment_ids, where an empty sequence cannot be told from "
            "padding: unpack the rows, or leave count_empty=False"
        )
    sums = sequence_sums(values, mask, segment_ids=segment_ids)
    lengths = sequence_sums(jnp.ones(jnp.shape(mask)), mask, segment_ids=segment_ids)
    total = per_sequence(sums, jnp.maximum(lengths, 1.0)).sum()
    weight = jnp.float32(lengths.size) if count_empty else (lengths > 0).sum(dtype=jnp.float32)
    return Weighted(total, weight)


REDUCTIONS: dict[str, Reduction] = {"tokens": tokens, "sequences": sequences, "constant": constant}


def by_name(name: str, *, length: float | None = None) -> Reduction:
    """The reduction of that name, ready to be called as (values, mask, *, segment_ids=None).

    Args:
      name: a key of `REDUCTIONS`.
      length: the divisor of `constant`; the other two ignore it.

    Raises:
      ValueError: an unknown name, or `constant` without a length.
    """
    reduction = choice("reduction", name, REDUCTIONS)
    if name != "constant":
        return reduction
    if length is None:
        raise ValueError(
            "the reduction 'constant' was given no length: pass length=, the longest response, in tokens, "
            "that can be generated"
        )
    return partial(constant, length=length)
