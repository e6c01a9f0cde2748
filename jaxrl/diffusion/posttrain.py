"""Preferences and policy gradients for masked diffusion models, whose likelihood is only estimated.

The masks are a function of a key and a row's tokens, so that old, new and reference parameters are compared under the
same masks: most of the noise cancels in their difference.
"""

import jax
import jax.numpy as jnp

from jaxrl.diffusion.likelihood import log_likelihood, log_probs_of
from jaxrl.diffusion.noise import masked_by
from jaxrl.losses import reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.types import Rollout, TokenBatch


def responses(
    model: LanguageModel,
    params,
    batch: TokenBatch,
    *,
    key: jax.Array,
    mask_id: int,
    samples: int = 8,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array, reduce.Weighted]:
    """`posttrain.preference.responses` of a diffusion model: each response's estimated bound on its log-prob.

    With it the DPO family is VRPO (Zhu et al. 2025, LLaDA 1.5, arXiv 2505.19223): the whole budget goes to different
    times, one mask for each, spread evenly; policy and reference share them where they get the same key and rows.

    Args:
      model, params, mask_id, samples, block: as in `log_likelihood`.
      batch: `[B, T]`, a row a response.
      key: consumed.

    Returns:
      `([B, 1] sums, [B, 1] lengths, Weighted)`; the last, of weight 0, stands for an entropy that is not known.
    """
    sums = log_likelihood(model, params, batch, key, mask_id=mask_id, samples=samples, block=block)
    lengths = (batch.loss_mask > 0).sum(1, dtype=jnp.float32)
    return sums[:, None], lengths[:, None], reduce.Weighted(jnp.zeros(()), jnp.zeros(()))


def completion_log_probs(
    model: LanguageModel,
    params,
    completions: Rollout,
    *,
    key: jax.Array,
    mask_id: int,
    prompt_masked: float = 0.15,
    block: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """diffu-GRPO's log-probs: each completion token from the prompt alone, in one pass (d1, arXiv 2504.12216).

    The whole completion is masked, and each prompt token with a small probability. (Zhao et al. 2025, section 3.1.) The
    estimate treats the tokens of a completion as independent. With blocks, where one pass reads the clean row too, that
    is so within a block alone: each sees the clean ones before it, and blocks of one token give the exact log-probs.

    Args:
      model, params, temperature, chunk: as in `posttrain.rollout.completion_log_probs`, whose place this takes.
      completions: `B` completions of width `C`.
      key: with a row's tokens, decides which of its prompt is masked: the same in all passes that are compared. As
        `grpo.make` takes one key for a run, the updates on one batch share their masks, where the paper draws anew.
      mask_id: the mask token.
      prompt_masked: that probability.
      block: of block diffusion, where it concerns only what shares a block with the completion; or None.

    Returns:
      `(log_probs [B, C], entropy [B, C])` float32; apply `completions.mask`.
    """
    up = lambda number: -(-number // (block or 1)) * (block or 1)
    lengths, width = completions.prompt_lengths[:, None], completions.tokens.shape[1]
    columns, padding = jnp.arange(up(width))[None], completions.prompt_width - lengths
    # as they are sampled: blocks begin with the prompt and are whole
    tokens = jnp.take_along_axis(completions.tokens, jnp.minimum(columns + padding, width - 1), axis=1)
    own = columns < up(width - padding)
    of_row = lambda row: jax.random.uniform(jax.random.fold_in(key, _checksum(row)), row.shape)
    masked = own & ((columns >= lengths) | (jax.vmap(of_row)(tokens) < prompt_masked))
    batch = TokenBatch(tokens, own.astype(jnp.float32), own.astype(jnp.int32))
    part = masked_by(batch, masked, jnp.ones(tokens.shape), mask_id=mask_id)
    found = log_probs_of(model, params, part, mask_id=mask_id, block=block, temperature=temperature, chunk=chunk)
    places = lengths + jnp.arange(width - completions.prompt_width)[None]
    log_probs, entropy = (jnp.take_along_axis(x, places, axis=1) for x in found)
    return log_probs, entropy


def _checksum(row: jax.Array) -> jax.Array:
    """A number that rows of different tokens hardly share."""
    mix = lambda total, token: (total * jnp.uint32(1_000_003) ^ token.astype(jnp.uint32), None)
    return jax.lax.scan(mix, jnp.uint32(len(row)), row)[0]
