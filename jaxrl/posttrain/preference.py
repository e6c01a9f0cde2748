"""Learning from preferences that are there already: the DPO family on pairs, as pure functions.

The reference stands still, so its log-probs are computed once for the whole data set and kept with it: no second copy
of the parameters lives through the run. Both responses of a pair go through one forward pass.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl.losses import preference as family
from jaxrl.losses import reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import update
from jaxrl.posttrain.score import log_probs_of
from jaxrl.types import Pairs, TokenBatch

NLL = family.Variant(score="log_prob", weight=0.0, nll_coef=1.0)
"""The row "nll" of a mixture: negative log-likelihood per token of the chosen response."""


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """One step of the DPO family. What is None is taken from the variant's row of the table."""

    variant: str = "dpo"
    """Row of losses.preference.PRESETS: dpo, cdpo, robust, ipo, hinge, simpo, orpo, bco, nca, sppo, apo_zero, ..."""
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    """Rows and their weights, added up in place of `variant`; "nll" is the chosen response's likelihood. MPO (arXiv
    2411.10442) is dpo 0.8, bco 0.2, nll 1."""
    batch: int = 32
    """Pairs per step."""
    micro_batches: int = 1
    """Parts in which a batch is computed; the gradient is the whole batch's."""
    score: str | None = None
    """What a response is scored by: log_ratio, log_prob or log_odds. Own values act on every row of a mixture."""
    per_token: bool | None = None
    """Whether a score is divided by the response's length."""
    pairing: str | None = None
    """How scores make margins: pairs, sorted_margins or sorted_scores."""
    link: str | None = None
    """From margins to losses: sigmoid, robust, ipo, hinge, exo, bco, nca, sppo, apo_zero or apo_down."""
    beta: float | None = None
    """Scale of the implicit reward."""
    label_smoothing: float | None = None
    """Share of pairs whose label is taken to be wrong."""
    target_margin: float | None = None
    """By how much the margin of rewards should be positive (SimPO's gamma)."""
    weight: float | None = None
    """Weight of the link beside the likelihood (ORPO's lambda)."""
    nll_coef: float | None = None
    """Weight of the chosen response's negative log-likelihood per token."""
    point_decay: float = 0.9
    """How much of BCO's running mean of rewards stays at each step."""
    reference_every: int = 0
    """Steps after which the reference follows the policy (TR-DPO, arXiv 2404.09656), which needs a copy of the
    parameters; 0 keeps the first reference."""
    reference_mix: float = 1.0
    """The policy's share in the new reference."""

    def __post_init__(self):
        known = {"score": ("log_ratio", "log_prob", "log_odds"), "pairing": family.PAIRINGS, "link": family.LINKS}
        named = [("variant", self.variant, family.PRESETS)]
        named += [("mixture row", name, [*family.PRESETS, "nll"]) for name in self.mixture]
        named += [(name, getattr(self, name), table) for name, table in known.items()]
        for what, value, table in named:
            if value is not None and value not in table:
                raise ValueError(f"{what} is {value!r}; expected one of {', '.join(table)}")
        check_batches(self.batch, self.micro_batches)
        if self.micro_batches > 1 and self.whole_batch:
            raise ValueError(
                f"micro_batches is {self.micro_batches}, but a sorted pairing compares the whole batch; set it to 1"
            )
        if any(row.beta <= 0 for _, row in self.rows):
            raise ValueError(f"beta is {self.beta}; expected a positive scale of the reward")
        if not 0 <= self.point_decay < 1 or not 0 < self.reference_mix <= 1:
            raise ValueError(
                f"point_decay is {self.point_decay} and reference_mix is {self.reference_mix}; "
                "expected values in [0, 1) and (0, 1]"
            )

    @property
    def rows(self) -> tuple[tuple[float, family.Variant], ...]:
        """(weight, row) of all that is added up, with this config's own values put in."""
        names = [field.name for field in dataclasses.fields(family.Variant)]
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        row = lambda name: NLL if name == "nll" else dataclasses.replace(family.PRESETS[name], **own)
        return tuple((weight, row(name)) for name, weight in (self.mixture or {self.variant: 1.0}).items())

    @property
    def needs_reference(self) -> bool:
        """Whether any row scores by the ratio to a reference."""
        return any(row.score == "log_ratio" for _, row in self.rows)

    @property
    def whole_batch(self) -> bool:
        """Whether any row compares all pairs of a batch, so that its parts are not batches of their own."""
        return any(row.pairing != "pairs" for _, row in self.rows)

    @property
    def running_point(self) -> bool:
        """Whether any row has a running mean of rewards, as BCO."""
        return any(row.link == "bco" for _, row in self.rows)


@flax.struct.dataclass
class Referenced:
    """`N` pairs, and the reference's log-probs of their responses, summed over tokens.

    `chosen`, `rejected`: `[N]` float32, or `[N, T - 1]` for packed rows (column `j` is the row's `j`-th example); None
    where no row of the family needs them.
    """

    pairs: Pairs
    chosen: jax.Array | None = None
    rejected: jax.Array | None = None


@flax.struct.dataclass
class PreferenceState(update.TrainState):
    """A train state with BCO's running mean of rewards, or None. `reference` is only kept where it moves."""

    reward_mean: Any = None


class DPO(NamedTuple):
    """The pure functions of a run.

    init: `(key, params) -> PreferenceState`.
    reference: `(params, pairs) -> Referenced`; to be called once, under jit.
    step: `(state, Referenced of all N pairs) -> (state, metrics)`.
    margins: `(params, Referenced) -> [N]` chosen minus rejected implicit reward; `[N (T - 1)]` for packed rows.
    """

    init: Callable
    reference: Callable
    step: Callable
    margins: Callable


def interleave(pairs: Pairs) -> TokenBatch:
    """Both responses of `N` pairs as `2 N` rows of one width: chosen, rejected, chosen, rejected, ..."""
    width = max(side.tokens.shape[1] for side in (pairs.chosen, pairs.rejected))

    def together(chosen, rejected):
        sides = [jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (chosen, rejected)]
        return jnp.stack(sides, axis=1).reshape(-1, width)

    return jax.tree.map(together, pairs.chosen, pairs.rejected)


SCORED = (1 << 30) + 5
"""Folded into a run's key for what `responses` draws, where they are estimates."""


def responses(
    model: LanguageModel, params, batch: TokenBatch, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, reduce.Weighted]:
    """Log-probs of whole responses, their lengths, and the mean entropy of their tokens.

    Args:
      model, params: the language model.
      batch: right-padded `[B, T]`, or packed.
      key: not used; others that take this function's place draw from it.

    Returns:
      `([B] sums, [B] lengths, Weighted)`; `[B, T - 1]` for packed rows, as in `sequence_log_probs`.
    """
    log_probs, entropy, mask = log_probs_of(model, params, batch)
    ids = None if batch.segments is None else batch.segments[:, 1:]
    sums, lengths = family.sequence_log_probs(log_probs, mask, segment_ids=ids)
    return sums, lengths, reduce.tokens(jax.lax.stop_gradient(entropy), mask)


def loss(
    config: DPOConfig,
    model: LanguageModel,
    params,
    part: Referenced,
    *,
    reference_point: jax.Array | float = 0.0,
    responses: Callable = responses,
):
    """Mean over pairs of the mixture's losses, and their companions, as (total, weight) pairs.

    Args:
      config: which rows.
      model, params: the policy.
      part: pairs with their reference. A pair with an empty response counts for nothing.
      reference_point: BCO's, in units of reward.
      responses: what gives the rows' log-probs, as the function of that name.

    Returns:
      `(Weighted, {"rewards/chosen", ..., "policy/entropy": Weighted}, margins)`. Rewards are those of the first row.
    """
    batch = interleave(part.pairs)
    if batch.segments is not None and config.whole_batch:
        raise ValueError("packed rows hold places without a pair, which a sorted pairing cannot take: do not pack them")
    sums, lengths, entropy = responses(model, params, batch)
    split = lambda x: jnp.moveaxis(x.reshape(-1, 2, *x.shape[1:]), 1, 0).reshape(2, -1)
    (chosen, rejected), (chosen_lengths, rejected_lengths) = split(sums), split(lengths)
    counted = (chosen_lengths > 0) & (rejected_lengths > 0)
    flat = lambda x: None if x is None else x.reshape(-1)
    values, kept = jnp.zeros_like(chosen), []
    for weight, row in config.rows:
        one, diagnostics = family.loss(
            chosen,
            rejected,
            flat(part.chosen),
            flat(part.rejected),
            variant=row,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            reference_point=reference_point if row.link == "bco" else 0.0,
        )
        values, kept = values + weight * one, [*kept, diagnostics]
    metrics = pair_metrics(kept[0], chosen, rejected, counted)
    return reduce.elements(values, counted), {**metrics, "policy/entropy": entropy}, kept[0]["margin"]


def pair_metrics(diagnostics: dict, chosen: jax.Array, rejected: jax.Array, counted: jax.Array) -> dict:
    """What users watch: rewards and log-probs `[N]` of both sides, over the counted pairs."""
    watched = {
        "rewards/chosen": diagnostics["chosen_rewards"],
        "rewards/rejected": diagnostics["rejected_rewards"],
        "rewards/margins": diagnostics["margin"],
        "rewards/accuracies": diagnostics["accuracy"],
        "logps/chosen": jax.lax.stop_gradient(chosen),
        "logps/rejected": jax.lax.stop_gradient(rejected),
    }
    return {name: reduce.elements(value, counted) for name, value in watched.items()}


def make(
    config: DPOConfig,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
    responses: Callable = responses,
) -> DPO:
    """The pure functions of a run (Rafailov et al. 2023, arXiv 2305.18290, and the family of `losses.preference`).

    BCO's reference point is the mean reward of earlier steps, weighted exponentially, so that micro-batches are exact;
    it begins at 0, which is right for a policy that begins at its reference.

    Args:
      config: batch sizes and the loss.
      model: four functions; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.
      responses: `(model, params, batch, key=) -> (sums, lengths, entropy)`, log-probs of responses; those of a
        diffusion model are `partial(diffusion.responses, mask_id=...)`. With `reference_every` the reference is scored
        in each step under the same key as the policy (VRPO); else once, with a key of its own.
    """
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)
    moves = config.reference_every > 0 and config.needs_reference

    def init(key, params):
        reference = jax.tree.map(jnp.copy, params) if moves else None
        state = update.init_state(params, optimizer, key, reference=reference)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return PreferenceState(**fields, reward_mean=jnp.zeros(()) if config.running_point else None)

    def reference(params, pairs: Pairs, *, rows: int = config.batch, key: jax.Array | None = None):
        if not config.needs_reference:
            return Referenced(pairs)
        key = jax.random.key(0) if key is None else key
        of = lambda part: responses(model, params, interleave(constrain(part)), key=jax.random.clone(key))[0]
        sums = in_parts(of, pairs, rows=rows)
        sums = sums.reshape(-1, 2, *sums.shape[1:])
        return Referenced(pairs, sums[:, 0], sums[:, 1])

    def step(state, data: Referenced):
        examples = data.pairs.chosen.tokens.shape[0]
        rows = update.epoch_batch(state.key, state.step, batch=config.batch, examples=examples)
        batch = constrain(jax.tree.map(lambda x: x[rows], data))
        key = jax.random.fold_in(jax.random.fold_in(state.key, SCORED), state.step)
        if moves:
            parts = config.batch // config.micro_batches
            batch = reference(state.reference, batch.pairs, rows=parts, key=jax.random.clone(key))
        score = lambda *given: responses(*given, key=jax.random.clone(key))
        point = state.reward_mean if config.running_point else 0.0
        of = lambda model, params, part: loss(config, model, params, part, reference_point=point, responses=score)[:2]
        state, metrics = descend(state, model, of, batch, optimizer)
        changes: dict[str, Any] = {"step": state.step + 1}
        if config.running_point:
            mean = 0.5 * (metrics["rewards/chosen"] + metrics["rewards/rejected"])
            new = config.point_decay * point + (1.0 - config.point_decay) * mean
            changes["reward_mean"] = jnp.where(jnp.isfinite(mean), new, point)
            metrics["rewards/reference_point"] = jnp.asarray(point, jnp.float32)
        if moves:
            mix = jnp.where(changes["step"] % config.reference_every == 0, config.reference_mix, 0.0)
            follow = lambda new, old: jnp.where(mix > 0, mix * new + (1.0 - mix) * old, old).astype(old.dtype)
            changes["reference"] = jax.tree.map(follow, state.params, state.reference)
        tokens = sum(side.loss_mask[:, 1:].sum() for side in (batch.pairs.chosen, batch.pairs.rejected))
        return dataclasses.replace(state, **changes), {**metrics, "throughput/tokens": tokens}

    def margins(params, data: Referenced):
        score = lambda *given: responses(*given, key=jax.random.key(0))
        one = lambda part: loss(config, model, params, constrain(part), responses=score)[2]
        return in_parts(one, data, rows=config.batch)

    return DPO(init, reference, step, margins)


def in_parts(function: Callable, batch, *, rows: int):
    """`function` of `rows` rows at a time, in a loop that holds the memory of one part.

    Args:
      function: of a part of the batch; its result has a leading axis that is a multiple of the part's rows.
      batch: pytree with leading axis `N`. The last part is filled up with rows from the start.
      rows: rows of a part.

    Returns:
      What `function` gives for all rows, without that of the filling.
    """
    number = jax.tree.leaves(batch)[0].shape[0]
    rows = min(rows, number)
    parts = -(-number // rows)
    order = (jnp.arange(parts * rows) % number).reshape(parts, rows)
    results = jax.lax.map(lambda chosen: function(jax.tree.map(lambda x: x[chosen], batch)), order)
    join = lambda x: x.reshape(-1, *x.shape[2:])[: number * (x.shape[1] // rows)]
    return jax.tree.map(join, results)


def check_batches(batch: int, micro_batches: int) -> None:
    """Raises ValueError unless the micro-batches divide the batch."""
    if batch < 1 or micro_batches < 1 or batch % micro_batches:
        raise ValueError(
            f"batch is {batch} and micro_batches is {micro_batches}; expected a batch of at least 1 that they divide"
        )
