"""Log-probabilities of given sequences: one forward pass, shared by every loss on data that is there already."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import Causal, Mask, Segments
from jaxrl.nets.language_model import LanguageModel
from jaxrl.types import TokenBatch


def layout(segments: jax.Array | None) -> tuple[Mask, jax.Array | None]:
    """What a model must know of rows that hold several examples: the attention mask, and positions `[B, T]`.

    Args:
      segments: `[B, T]` as in `TokenBatch`, or None: one example a row.
    """
    if segments is None:
        return Causal(), None
    columns = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = lax.cummax(jnp.where(starts, columns, 0), axis=1)
    return Causal() & Segments(segments), columns - first


def layout_of(model: LanguageModel, batch: TokenBatch) -> tuple[Mask, jax.Array | None]:
    """`layout` of the tokens but the last, which a model reads to predict the others.

    Where a model's experts have little room, the mask also says that what comes after the last token to be predicted is
    padding, so that it takes none.
    """
    if batch.segments is not None:
        return layout(batch.segments[:, :-1])
    if model.routers is None or not model.routers.drops:
        return layout(None)
    return layout(lax.cummax((batch.loss_mask[:, 1:] > 0).astype(jnp.int32), axis=1, reverse=True))


def log_probs_of(
    model: LanguageModel, params, batch: TokenBatch, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-prob of every token from those before it in its example.

    Args:
      model, params: the language model.
      batch: `tokens [B, T]`, right-padded or packed. The first token of an example cannot be predicted.
      temperature, chunk: as in `token_log_probs`.

    Returns:
      `(log_probs, entropy, mask)`, each `[B, T - 1]` float32: column `t` is of token `t + 1`. The mask is the batch's
      loss mask, without the tokens that begin an example.
    """
    (log_probs, entropy), counted = statistics_of(model, params, batch, temperature=temperature, chunk=chunk)
    return log_probs, entropy, counted


def statistics_of(
    model: LanguageModel, params, batch: TokenBatch, **options
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """As `log_probs_of`: (all that `model.log_probs` gives under these options, the mask)."""
    segments = batch.segments
    mask, positions = layout_of(model, batch)
    hidden, _ = model.apply(params, batch.tokens[:, :-1], positions=positions, mask=mask)
    statistics = model.log_probs(hidden, model.unembedding(params), batch.tokens[:, 1:], **options)
    counted = batch.loss_mask[:, 1:]
    if segments is not None:
        counted = jnp.where(segments[:, 1:] == segments[:, :-1], counted, 0.0)
    return statistics, counted
