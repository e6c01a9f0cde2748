"""Supervised fine-tuning: next-token cross-entropy on the masked tokens, as one pure step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl.data.packing import limit_length, pack
from jaxrl.data.records import Examples
from jaxrl.losses import multi_token, reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import update
from jaxrl.posttrain.score import layout_of, statistics_of
from jaxrl.types import TokenBatch

PREPARED = (1 << 30) + 3
"""Folded into a run's key for what `prepare` draws; other numbers are for the order of examples."""


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """One step of supervised fine-tuning."""

    batch: int = 64
    """Examples per step; packed rows with `packing`."""
    micro_batches: int = 1
    """Parts in which a batch is computed; the gradient is the whole batch's."""
    packing: bool = False
    """Several examples share a row, each as if it were alone: less padding, the same gradient for the same examples."""
    width: int = 0
    """Tokens of the longest example, and of a packed row; 0 takes the longest example."""
    overlong: str = "error"
    """What becomes of examples longer than `width`: error, drop (left out) or cut (the end is lost, EOS too)."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits from drifting (PaLM 1e-4, Chameleon 1e-5)."""


class SFT(NamedTuple):
    """`init(key, params) -> state` and `step(state, data) -> (state, metrics)`; both pure."""

    init: Callable
    step: Callable


def loss(model: LanguageModel, params, batch: TokenBatch, *, z_loss: float = 0.0):
    """Token-mean cross-entropy and its companions, as (total, weight) pairs.

    Args:
      model, params: the language model.
      batch: right-padded or packed; the first token of an example cannot be predicted.
      z_loss: weight of `(log Z)^2` of every counted token, as in `losses.tokens.cross_entropy`.

    Returns:
      `(Weighted, {"train/target_probability": Weighted, "policy/entropy": Weighted})`; with z_loss also
      `train/log_z_squared`.
    """
    (log_probs, entropy, *log_z), mask = statistics_of(model, params, batch, **({"return_lse": True} if z_loss else {}))
    likelihood = jax.lax.stop_gradient(jnp.exp(log_probs))
    metrics = {
        "train/target_probability": reduce.tokens(likelihood, mask),
        "policy/entropy": reduce.tokens(jax.lax.stop_gradient(entropy), mask),
    }
    values = -log_probs
    if z_loss:
        squared = jnp.square(log_z[0])
        values = values + z_loss * squared
        metrics["train/log_z_squared"] = reduce.tokens(jax.lax.stop_gradient(squared), mask)
    return reduce.tokens(values, mask), metrics


def multi_token_loss(model: LanguageModel, params, batch: TokenBatch, *, ahead: Callable, weight: float = 0.3):
    """`loss` with that of predictions further ahead beside it (`losses.multi_token`).

    For `make` it is `objective=partial(multi_token_loss, ahead=...)`.

    Args:
      model, params, batch: as in `loss`.
      ahead: of the `nets.multi_token.MultiToken` that the model is of.
      weight: of the further predictions; 0.3, later 0.1, in DeepSeek-V3.

    Returns:
      As `loss`, whose metrics are of the next token alone, and `train/multi_token_loss`, the mean of the others.
    """
    segments, inputs = batch.segments, batch.tokens[:, :-1]
    mask, positions = layout_of(model, batch)
    hidden, _ = model.apply(params, inputs, positions=positions, mask=mask)
    further = ahead(params, hidden, inputs, positions=positions, mask=mask)
    depth, *shape = further.shape
    targets, counted = multi_token.targets(batch.tokens, batch.loss_mask, depth=depth, segments=segments)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    every = jnp.concatenate([hidden[None], further])
    log_probs, entropy = model.log_probs(flat(every), model.unembedding(params), flat(targets))
    log_probs, entropy = (x.reshape(depth + 1, *shape[:2]) for x in (log_probs, entropy))
    value, others = multi_token.multi_token(-log_probs, counted, weight=weight)
    metrics = {
        "train/target_probability": reduce.tokens(jax.lax.stop_gradient(jnp.exp(log_probs[0])), counted[0]),
        "policy/entropy": reduce.tokens(jax.lax.stop_gradient(entropy[0]), counted[0]),
        "train/multi_token_loss": jax.lax.stop_gradient(others),
    }
    return value, metrics


def arrange(config: SFTConfig, examples: Examples) -> tuple[TokenBatch, int]:
    """The data that `step` draws from: rows of one example each, or packed.

    Args:
      config: what to do with long examples, and whether to pack.
      examples: from `data.encode_examples`.

    Returns:
      `(TokenBatch [N, T], examples that were dropped or cut)`.

    Raises:
      ValueError: an example longer than `config.width` under "error", an unknown `overlong`, or nothing left.
    """
    width = config.width or int(examples.lengths.max())
    examples, overlong = limit_length(examples, width, overlong=config.overlong)
    rows = pack(examples, width) if config.packing else TokenBatch(examples.tokens, examples.loss_mask)  # pyright: ignore
    return jax.tree.map(jnp.asarray, rows), overlong


def make(
    config: SFTConfig,
    model: LanguageModel | None,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
    objective: Callable | None = None,
    prepare: Callable = lambda key, batch: batch,
) -> SFT:
    """The pure functions of a run.

    Args:
      config: batch sizes.
      model: four functions; see `LanguageModel`. None with an `objective` that knows its network.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.
      objective: `(model, params, batch) -> (loss, metrics)`, both as (total, weight), such as `multi_token_loss`; None
        is `loss` with `config.z_loss`.
      prepare: `(key, batch) -> what objective takes`, before the batch is divided: the noise of a diffusion model,
        `partial(diffusion.noised, mask_id=...)` with `partial(diffusion.loss, mask_id=...)` as objective.

    Returns:
      `init(key, params) -> TrainState` and `step(state, data) -> (state, metrics)`, where `data` is a `TokenBatch` of
      all rows `[N, T]`, from `arrange`; a step draws `config.batch` of them by `update.epoch_batch`.

    Raises:
      ValueError: `config.z_loss` beside another objective, which knows nothing of it.
    """
    if objective is not None and config.z_loss:
        raise ValueError(
            f"z_loss is {config.z_loss} and an objective of its own is given, which must add it: leave z_loss at 0"
        )
    objective = objective or partial(loss, z_loss=config.z_loss)
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)

    def init(key, params):
        return update.init_state(params, optimizer, key)

    def step(state, data: TokenBatch):
        rows = update.epoch_batch(state.key, state.step, batch=config.batch, examples=data.tokens.shape[0])
        batch = constrain(jax.tree.map(lambda x: x[rows], data))
        key = jax.random.fold_in(jax.random.fold_in(state.key, PREPARED), state.step)
        state, metrics = descend(state, model, objective, prepare(key, batch), optimizer)
        tokens = batch.loss_mask[:, 1:].sum() if hasattr(batch, "loss_mask") else batch.tokens.size
        return dataclasses.replace(state, step=state.step + 1), {**metrics, "throughput/tokens": tokens}

    return SFT(init, step)
