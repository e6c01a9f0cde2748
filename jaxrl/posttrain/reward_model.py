"""Reward models: a language model with one number for each token.

Learnt from pairs of responses (Bradley-Terry), the number at the last token of a response is its reward. Learnt from
solutions whose steps are judged (process reward), the number at the last token of each step is the log-odds that the
step is right.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl import runs
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.losses import reduce
from jaxrl.losses import reward as losses
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.scalar_model import scalar_model, with_head
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import update
from jaxrl.posttrain.preference import check_batches, in_parts, interleave
from jaxrl.posttrain.scalars import token_scalars
from jaxrl.types import Pairs, Rollout, TokenBatch


@dataclasses.dataclass(frozen=True)
class RMConfig:
    """One step of reward modelling."""

    kind: str = "outcome"
    """outcome: pairs of whole responses; process: solutions judged step by step."""
    batch: int = 32
    """Pairs, or solutions, per step."""
    micro_batches: int = 1
    """Parts in which a batch is computed; the gradient is the whole batch's."""
    use_margin: bool = True
    """Ask for the margin that the data states, where it states one (Llama 2)."""
    centring: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around 0 (arXiv 2312.09244 suggests 0.01)."""

    def __post_init__(self):
        if self.kind not in ("outcome", "process"):
            raise ValueError(f"kind is {self.kind!r}; expected outcome or process")
        if self.centring < 0:
            raise ValueError(f"centring is {self.centring}; expected a weight of at least 0")
        check_batches(self.batch, self.micro_batches)


@flax.struct.dataclass
class Steps:
    """Solutions judged step by step.

    `examples`: `[N, T]`, the loss mask 1 on the last token of each step and nowhere else. `correct`: `[N, T]` float32,
    1 there where the step is right.
    """

    examples: TokenBatch
    correct: jax.Array


class RM(NamedTuple):
    """The pure functions of a run.

    init: `(key, params of a language model) -> TrainState` of {"model": ..., "head": ...}; the head begins at 0.
    step: `(state, Pairs or Steps of all N) -> (state, metrics)`.
    """

    init: Callable
    step: Callable


def token_scores(model: LanguageModel, params, batch: TokenBatch) -> jax.Array:
    """The number at every token: `[N, T]` float32, of right-padded examples.

    Raises:
      ValueError: packed examples.
    """
    if batch.segments is not None:
        raise ValueError("a reward model reads one example a row, and these are packed: encode them without packing")
    return scalar_model(model).apply(params, batch.tokens)


def score(model: LanguageModel, params, batch: TokenBatch) -> jax.Array:
    """Reward of each example, read at its last token under the loss mask.

    Args:
      model: the language model underneath.
      params: {"model": ..., "head": ...}.
      batch: `[N, T]`, right-padded; what stands behind the last token under the mask does not matter.

    Returns:
      `[N]` float32.
    """
    scores = token_scores(model, params, batch)
    last = batch.loss_mask.shape[1] - 1 - jnp.argmax(batch.loss_mask[:, ::-1] > 0, axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


def score_rollout(model: LanguageModel, params, rollout: Rollout) -> jax.Array:
    """Reward of each completion of a sampler, read at its last token (its EOS where it has one): `[B]` float32."""
    states = token_scalars(model, params, rollout)  # after the prompt, after one token, ...
    return jnp.take_along_axis(states, rollout.lengths[:, None], axis=1)[:, 0]


def solution_scores(model: LanguageModel, params, batch: TokenBatch, *, how: str = "product") -> jax.Array:
    """A process reward model's score of each solution, `[N]`; the loss mask marks the step ends, `how` as in
    `losses.reward.solution_score`."""
    return losses.solution_score(token_scores(model, params, batch), batch.loss_mask, how=how)


def loss(config: RMConfig, model: LanguageModel, params, part: Pairs | Steps):
    """The loss of the config's kind, and its companions, as (total, weight) pairs.

    Returns:
      `(Weighted, {name: Weighted})`: means over pairs, or over steps.
    """
    if isinstance(part, Steps):
        ends = part.examples.loss_mask
        values, diagnostics = losses.process(token_scores(model, params, part.examples), part.correct)
        metrics = {
            "rewards/step_accuracy": reduce.tokens(diagnostics["accuracy"], ends),
            "rewards/step_probability": reduce.tokens(diagnostics["probability"], ends),
        }
        return reduce.tokens(values, ends), metrics
    chosen, rejected = score(model, params, interleave(part)).reshape(-1, 2).T
    margin = part.margin if config.use_margin and part.margin is not None else 0.0
    values, diagnostics = losses.bradley_terry(chosen, rejected, margin=margin, centring=config.centring)
    named = {
        "rewards/chosen": diagnostics["chosen_rewards"],
        "rewards/rejected": diagnostics["rejected_rewards"],
        "rewards/margins": diagnostics["margin"],
        "rewards/accuracies": diagnostics["accuracy"],
    }
    return reduce.elements(values), {name: reduce.elements(value) for name, value in named.items()}


def make(
    config: RMConfig,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
) -> RM:
    """The pure functions of a run (Ouyang et al. 2022, arXiv 2203.02155; steps: Lightman et al. 2023, 2305.20050).

    Args:
      config: batch sizes and the loss.
      model: the language model underneath; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.
    """
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)

    def init(key, params):
        return update.init_state(with_head(model, params), optimizer, key)

    def step(state, data: Pairs | Steps):
        examples = jax.tree.leaves(data)[0].shape[0]
        rows = update.epoch_batch(state.key, state.step, batch=config.batch, examples=examples)
        batch = constrain(jax.tree.map(lambda x: x[rows], data))
        state, metrics = descend(state, model, partial(loss, config), batch, optimizer)
        sides = [batch.examples] if isinstance(batch, Steps) else [batch.chosen, batch.rejected]
        tokens = jnp.asarray(sum(side.tokens.size for side in sides), jnp.float32)
        return dataclasses.replace(state, step=state.step + 1), {**metrics, "throughput/tokens": tokens}

    return RM(init, step)


def margins(model: LanguageModel, params, pairs: Pairs, *, rows: int = 32) -> jax.Array:
    """Reward of the chosen minus that of the rejected, `[N]` float32, computed `rows` pairs at a time."""
    scores = in_parts(lambda part: score(model, params, interleave(part)), pairs, rows=rows)
    return scores[::2] - scores[1::2]


class Calibration(NamedTuple):
    """How far a reward model's probabilities can be believed.

    `accuracy`: share of pairs it orders right. `error`: expected calibration error. `table`: for each bin its `low`
    and `high` border, `count`, and mean `confidence` and `accuracy` (None in an empty bin).
    """

    accuracy: float
    error: float
    table: list[dict[str, Any]]


def calibration(differences, *, bins: int = 10) -> Calibration:
    """Expected calibration error of a model of pairs (Guo et al. 2017, arXiv 1706.04599).

        sum over bins of  n_b / N  |accuracy_b - confidence_b|

    The model's confidence in a pair is sigmoid(|r_w - r_l|), at least 1/2, whichever response it prefers; a tie is half
    right. Bins are equal parts of [1/2, 1].

    Args:
      differences: `[N]` r_w - r_l, reward of the truly better response minus that of the other.
      bins: number of them.

    Raises:
      ValueError: no pairs, or one that is not finite.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(
            f"calibration: the differences have shape {differences.shape}; expected [N], N >= 1, all of them finite"
        )
    confidence = 1.0 / (1.0 + np.exp(-np.abs(differences)))
    right = np.where(differences == 0, 0.5, differences > 0)
    borders = np.linspace(0.5, 1.0, bins + 1)
    where = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    table, error = [], 0.0
    for number in range(bins):
        inside = where == number
        count = int(inside.sum())
        means = [float(x[inside].mean()) if count else None for x in (confidence, right)]
        if means[0] is not None and means[1] is not None:
            error += count / len(differences) * abs(means[1] - means[0])
        edges = {"low": float(borders[number]), "high": float(borders[number + 1]), "count": count}
        table.append(edges | {"confidence": means[0], "accuracy": means[1]})
    return Calibration(float(right.mean()), float(error), table)


class RewardModel(NamedTuple):
    """A trained reward model, opened from its run folder: `score(language_model, params, batch)` reads it."""

    language_model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    transformer: TransformerConfig


def load(folder: str | Path) -> RewardModel:
    """Opens the reward model of a run folder from its newest intact checkpoint.

    Raises:
      ValueError: no model in the folder, or a language model.
      FileNotFoundError: no intact checkpoint yet.
    """
    saved = runs.load_model(folder, rewards=True)
    if set(saved.params) != {"model", "head"}:
        raise ValueError(
            f"{folder} holds a language model, which gives no rewards; expected the folder of `jaxrl train rm`"
        )
    return RewardModel(saved.language_model, saved.params, saved.tokenizer, saved.transformer)
