"""What a network says of masked sequences: log-probs, the training loss, estimates of the likelihood.

Masked diffusion (Nie et al. 2025, LLaDA, arXiv 2502.09992; Sahoo et al. 2024, MDLM, arXiv 2406.07524) and block
diffusion (Arriola et al. 2025, BD3-LM, arXiv 2503.09573) are one loss on one network: what a token may see differs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.diffusion.noise import Noised, noised, uniforms, visible
from jaxrl.kernels.attention import BlockDiffusion, Segments
from jaxrl.losses import diffusion, reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain.score import layout
from jaxrl.types import TokenBatch


def log_probs_of(
    model: LanguageModel,
    params,
    part: Noised,
    *,
    mask_id: int,
    block: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each clean token at its own place, given what is not masked; the mask token is ruled out.

    Without blocks every token of a sequence sees every other one. With them one pass over [noisy ; clean], 2 T tokens,
    lets a noisy token see its own noisy block and the clean ones before it. No array [B, T, V] is held: the mask
    token's column is left out of the unembedding, so the others' probabilities sum to one.

    Args:
      model, params: the language model; its network needs no causal mask of its own.
      part: from `noised`.
      mask_id: the mask token.
      block: tokens in a block, or None.
      temperature, chunk: as in `token_log_probs`.

    Returns:
      `(log_probs [B, T], entropy [B, T])` float32. At places that are not masked they mean nothing: `diffusion.masked`
      does not read them.

    Raises:
      ValueError: a mask_id outside the vocabulary.
    """
    tokens, ids = part.tokens, visible(part.batch)
    positions = layout(part.batch.segments)[1]
    mask: Any = Segments(ids)
    if block is not None:
        twice = lambda x: jnp.concatenate([x, x], axis=1)
        columns = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        positions = twice(columns if positions is None else positions)
        mask = BlockDiffusion(block) & Segments(twice(ids))
        tokens = jnp.concatenate([tokens, part.batch.tokens], axis=1)
    hidden, _ = model.apply(params, tokens, positions=positions, mask=mask)
    rest, targets = others(model.unembedding(params), part.batch.tokens, mask_id)
    hidden = hidden[:, : targets.shape[1]]
    return model.log_probs(hidden, rest, targets, temperature=temperature, chunk=chunk)  # pyright: ignore


def others(unembedding: jax.Array, targets: jax.Array, mask_id: int) -> tuple[jax.Array, jax.Array]:
    """The unembedding without the mask token, `[D, V - 1]`, and ids among the remaining tokens."""
    vocabulary = unembedding.shape[1]
    if not 0 <= mask_id < vocabulary:
        raise ValueError(f"mask_id is {mask_id} of {vocabulary} tokens, expected an id in [0, {vocabulary})")
    rest = jnp.concatenate([unembedding[:, :mask_id], unembedding[:, mask_id + 1 :]], axis=1)
    return rest, jnp.clip(targets - (targets > mask_id), 0, vocabulary - 2)


def values(model: LanguageModel, params, part: Noised, *, mask_id: int, block: int | None = None) -> jax.Array:
    """Each token's part of the bound on -log p at the noise of `part`, `[B, T]`."""
    log_probs, _ = log_probs_of(model, params, part, mask_id=mask_id, block=block)
    return diffusion.masked(log_probs, part.masked, part.weight)


def loss(
    model: LanguageModel,
    params,
    part: Noised,
    *,
    mask_id: int,
    block: int | None = None,
    reduction: str = "tokens",
    chunk: int | None = None,
):
    """The training loss and its companions, as (total, weight) pairs.

    Args:
      model, params, part, mask_id, block, chunk: as in `log_probs_of`.
      reduction: "tokens" divides by all tokens that may be masked, for pre-training; "sequences" each response by its
        own length, for tuning (arXiv 2502.09992, algorithms 1 and 2).

    Returns:
      `(Weighted, {"train/target_probability", "policy/entropy", "diffusion/masked": Weighted})`; the first two over
      masked tokens, the last the share that was masked.
    """
    log_probs, entropy = log_probs_of(model, params, part, mask_id=mask_id, block=block, chunk=chunk)
    value = diffusion.masked(log_probs, part.masked, part.weight)
    counted = part.batch.loss_mask > 0
    fixed = jax.lax.stop_gradient
    metrics = {
        "train/target_probability": reduce.elements(fixed(jnp.exp(log_probs)), part.masked),
        "policy/entropy": reduce.elements(fixed(entropy), part.masked),
        "diffusion/masked": reduce.elements(part.masked, counted),
    }
    return reduce.by_name(reduction)(value, counted, segment_ids=part.batch.segments), metrics


def log_likelihood(
    model: LanguageModel,
    params,
    batch: TokenBatch,
    key: jax.Array,
    *,
    mask_id: int,
    samples: int = 128,
    form: str = "count",
    block: int | None = None,
) -> jax.Array:
    """An unbiased estimate of the lower bound on log p(what the loss mask counts | the rest), for each row.

    Args:
      model, params, mask_id, block: as in `log_probs_of`.
      batch: `[B, T]`, a row a sequence.
      key: consumed. The same key draws the same masks, whatever the parameters.
      samples: masks for each row, one after the other in one program; their times, or counts, are spread evenly.
      form: "count" masks exactly m of n, m uniform (arXiv 2502.09992, eq. 6, 128 samples); "time" masks each token with
        probability t ~ U(0, 1) (eq. 3), which varies more.

    Returns:
      `[B]` float32, in nats, the mean over samples; differentiable in the parameters.

    Raises:
      ValueError: packed rows.
    """
    if batch.segments is not None:
        raise ValueError("batch has segments, expected a sequence to a row: unpack it, or take `loss` for a mean")
    rows, length = batch.tokens.shape
    number = 1 if block is None else -(-length // block)
    first, second = jax.random.split(key)
    draws = uniforms(first, rows * number, samples).reshape(rows, number, samples)

    @jax.checkpoint
    def one(i):
        part = noised(
            jax.random.fold_in(second, i), batch, mask_id=mask_id, form=form, span=(0.0, 1.0), block=block,
            uniform=draws[..., i],
        )  # fmt: skip
        return -values(model, params, part, mask_id=mask_id, block=block).sum(1)

    add = lambda total, i: (total + one(i), None)
    return jax.lax.scan(add, jnp.zeros(rows), jnp.arange(samples))[0] / samples


def variances(
    value_of: Callable[[Noised], jax.Array], batch: TokenBatch, key: jax.Array, spans: jax.Array, *, block: int, **noise
) -> jax.Array:
    """Variance over blocks of the loss under each span of times; the lowest names the clipped schedule.

    (arXiv 2503.09573, section 5.3 and algorithm 1: searched anew every so often. Blocks of one token need none of it:
    they are always masked.)

    Args:
      value_of: `values` with all but its `part` given.
      batch: held-out rows `[B, T]`.
      key: consumed; all spans see the same numbers.
      spans: `[n, 2]`, as of `intervals`.
      block: tokens in a block.
      noise: what else `noised` takes.

    Returns:
      `[n]`. The search's answer is `spans[variances.argmin()]`.
    """
    length = batch.tokens.shape[1]
    blocks = jax.nn.one_hot(jnp.arange(length) // block, -(-length // block))

    def one(span):
        part = noised(jax.random.clone(key), batch, block=block, span=(span[0], span[1]), confine=True, **noise)
        return jnp.var((value_of(part) @ blocks) / blocks.sum(0)[None])

    return jax.lax.map(one, jnp.asarray(spans))
