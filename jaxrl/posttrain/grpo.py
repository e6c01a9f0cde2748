"""GRPO and its family: sample a group of completions for each prompt, score them, and learn from the differences.

`sample`, a reward and `learn` make an iteration. With a reward in JAX the three are one program (`fused`); a Python
reward runs between two (`hosted`). Both are built from the same functions, so they do the same.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl.losses import group as family
from jaxrl.losses import kl, reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import draw, update
from jaxrl.posttrain.rewards.host import host_rewards
from jaxrl.posttrain.rewards.length import relative_length, soft_overlong
from jaxrl.posttrain.rollout import Sampling, check_routers, completion_log_probs, rollout
from jaxrl.posttrain.shared_prefix import group_log_probs
from jaxrl.posttrain.slots import rollout_in_slots
from jaxrl.types import Finish, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """One iteration of the GRPO family. What is None is taken from the variant's row of the table."""

    variant: str = "grpo"
    """Row of losses.group.PRESETS: grpo, dr_grpo, dapo, gspo, gspo_token, cispo, rloo, reinforce_pp, kimi, ..."""
    prompts: int = 32
    """Prompts per iteration."""
    group: int = 8
    """Completions for each prompt."""
    epochs: int = 1
    """Passes over each iteration's completions."""
    minibatches: int = 1
    """Updates per pass."""
    micro_batches: int = 1
    """Parts in which each update's gradient is computed; it is the same gradient in less memory."""
    share_prompt: bool = False
    """Learn with each prompt read once for its group; updates hold whole groups. For layers of attention only."""
    kl_coef: float | None = None
    """Weight of the KL to the parameters the run began with; 0 keeps no reference."""
    tau: float | None = None
    """Weight of the squared log-ratio in Kimi's mirror descent: how near an iteration stays to where it began."""
    kl: str | None = None
    """KL estimator: k1, k2, k3 or k3_ratio; see losses.kl for their gradients."""
    clip_low: float | None = None
    """Clip of the ratio below, as a distance from 1."""
    clip_high: float | None = None
    """Clip of the ratio above, as a distance from 1 (DAPO's clip-higher)."""
    scale: str | None = None
    """What divides the advantages: std, none or batch."""
    reduction: str | None = None
    """How token losses are averaged: tokens, sequences or constant."""
    mask_truncated: bool = False
    """Leave completions that hit the token limit out of the loss (DAPO's overlong filtering)."""
    overlong_buffer: int = 0
    """Tokens before the limit in which a punishment rises to 1 (DAPO's soft overlong punishment); 0 is none."""
    dynamic_rounds: int = 1
    """Rounds of sampling at most, to replace groups whose rewards are all equal (DAPO's dynamic sampling)."""
    importance_cap: float | None = None
    """Cap of the weight between sampler and trainer (truncated importance sampling); None is no weight."""
    importance: str = "token"
    """What the weight belongs to: token, sequence, or sequence_mask, which drops sequences beyond the cap."""
    slots: int = 0
    """Completions decoded at once; one that ends gives its place to the next (continuous batching). 0: all at once."""
    length_weight: float = 0.0
    """Weight of the length reward inside a group (Kimi k1.5)."""
    length_warmup: int = 0
    """Iterations before the length reward sets in."""
    solved: float = 1.0
    """Reward from which on an answer counts as right, for the length reward and for success rates."""
    prioritised: bool = False
    """Draw problems the more often the less they were solved (Kimi k1.5)."""
    curriculum_steps: int = 0
    """Batches until all problems are in, the easiest first, by the data's `difficulty`; 0 is no curriculum."""
    reset_optimizer: bool | None = None
    """Begin each iteration with fresh moments; None does for mirror descent (Kimi k1.5), whose reference moves."""
    reference_every: int = 0
    """Iterations after which the reference becomes the policy; 0 keeps the first."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """How completions are drawn."""

    def __post_init__(self):
        if self.variant not in family.PRESETS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(family.PRESETS)}")
        if self.group < 2 and self.row.baseline != "none":
            raise ValueError(
                f"group is {self.group}; {self.variant} compares completions of one prompt and needs at least 2"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling temperature is 0; greedy completions of a group are all equal and teach nothing")
        for name in ("prompts", "group", "epochs", "dynamic_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.slots < 0:
            raise ValueError(f"slots is {self.slots}; expected 0 (all completions at once) or a number of places")
        if self.overlong_buffer and self.overlong_buffer > self.sampling.max_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer} tokens, more than the limit of {self.sampling.max_tokens}"
            )
        if self.importance not in ("token", "sequence", "sequence_mask"):
            raise ValueError(f"importance is {self.importance!r}; expected token, sequence or sequence_mask")
        named = {"kl": kl.ESTIMATORS, "scale": ("std", "none", "batch"), "reduction": reduce.REDUCTIONS}
        for name, known in named.items():
            if getattr(self, name) is not None and getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        what = "prompts (share_prompt keeps groups whole)" if self.share_prompt else "completions"
        whole = self.prompts if self.share_prompt else self.prompts * self.group
        for name, items in (("minibatches", whole), ("micro_batches", whole // max(self.minibatches, 1))):
            parts = getattr(self, name)
            if parts < 1 or items % parts:
                raise ValueError(f"{name} is {parts}; it must divide the {items} {what} that it splits")

    @property
    def row(self) -> family.Variant:
        """The variant with this config's own values put in."""
        names = ("tau", "kl_coef", "kl", "clip_low", "clip_high", "scale", "reduction")
        own = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(family.PRESETS[self.variant], **given)


@flax.struct.dataclass
class Problems:
    """Prompts and what their reward needs to know.

    `prompts`: of `N` problems. `answers`: a pytree whose leaves have a leading axis `N`, handed to the reward.
    `difficulty`: `[N]`, any scale, for a curriculum; or None.
    """

    prompts: Prompts
    answers: Any
    difficulty: jax.Array | None = None


class GRPO(NamedTuple):
    """The pure functions of a run.

    init: `(key, params, problems = 0) -> TrainState`; the reference is a copy of `params` where the KL has a weight;
      the number of problems is needed where they are prioritised.
    sample: `(state, problems) -> (state, Rollout of prompts * group rows, rows [prompts] drawn from the N)`; advances
      `state.drawn`.
    learn: `(state, rollout, rewards [prompts * group], rows = None) -> (state, metrics)`; advances `state.step`. The
      rows are needed where problems are prioritised.
    """

    init: Callable
    sample: Callable
    learn: Callable


def make(
    config: GRPOConfig,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    eos_id: int,
    pad_id: int,
    stop: tuple[tuple[int, ...], ...] = (),
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
    sampler: Callable | None = None,
    log_probs: Callable | None = None,
) -> GRPO:
    """Builds the functions of a run.

    Args:
      config: sizes and the variant.
      model: four functions; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      eos_id, pad_id, stop: see `rollout`.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.
      sampler, log_probs: in the place of `rollout` and `completion_log_probs`; those of a diffusion model are
        `partial(diffusion.generate, mask_id=...)` and `partial(diffusion.completion_log_probs, mask_id=, key=)`.

    Raises:
      ValueError: parts that exclude each other; a model whose experts drop choices.
    """
    if (log_probs and config.share_prompt) or (sampler and config.slots):
        raise ValueError(
            f"share_prompt {config.share_prompt} is of the trainer's own log_probs, slots {config.slots} of its own "
            "sampler; leave out what is replaced"
        )
    check_routers(model)
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)
    row = config.row
    reduction = reduce.by_name(row.reduction, length=config.sampling.max_tokens)
    updates = config.epochs * config.minibatches
    ends: dict[str, Any] = {"stop": stop} if stop else {}
    form = partial(group_log_probs, group=config.group) if config.share_prompt else completion_log_probs
    log_probs_of = partial(log_probs or form, temperature=config.sampling.temperature)
    complete = sampler or (partial(rollout_in_slots, slots=config.slots) if config.slots else rollout)
    resets = row.form == "mirror" if config.reset_optimizer is None else config.reset_optimizer

    def init(key, params, problems: int = 0):
        reference = jax.tree.map(jnp.copy, params) if row.kl_coef else None
        success = jnp.zeros(problems) if config.prioritised else None
        return update.init_state(params, optimizer, key, reference=reference, success=success)

    def sample(state, problems: Problems):
        rows = draw.rows_of(config, state, problems)
        completions = complete(
            model,
            state.params,
            constrain(jax.tree.map(lambda x: x[rows], problems.prompts)),
            _key(state, state.drawn, 0),
            sampling=config.sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            samples=config.group,
            **ends,
        )
        return dataclasses.replace(state, drawn=state.drawn + 1), constrain(completions), rows

    def loss(model, params, part):
        log_probs, entropy = log_probs_of(model, params, part["rollout"])
        mask, behaviour = part["mask"], part["rollout"].behaviour_log_probs
        values, diagnostics = family.loss(
            log_probs, part["old"], part["reference"], part["advantages"], mask, variant=row
        )
        gap = jnp.abs(log_probs - behaviour)
        watched = {
            "policy/entropy": entropy,
            "policy/ratio_mean": diagnostics["ratio"],
            "policy/clip_low": diagnostics["clipped_low"],
            "policy/clip_high": diagnostics["clipped_high"],
            "sampler/log_prob_gap": gap,
        }
        if part["reference"] is not None:
            watched["policy/kl"] = diagnostics["kl_ref"]
        if config.importance_cap is not None:
            old = jax.lax.stop_gradient(log_probs) if part["old"] is None else part["old"]
            weights = family.truncated_weights(old, behaviour, mask, cap=config.importance_cap, level=config.importance)
            values, watched["sampler/importance"] = values * weights, weights
        watched = {name: reduce.tokens(jax.lax.stop_gradient(value), mask) for name, value in watched.items()}
        return reduction(values, mask), watched

    def shaped(state, completions: Rollout, rewards):
        """The rewards that are learnt from: the task's own, and what length adds."""
        lengths = completions.lengths.reshape(rewards.shape)
        if config.overlong_buffer:
            limit = config.sampling.max_tokens
            rewards = rewards + soft_overlong(lengths, limit=limit, buffer=config.overlong_buffer)
        if config.length_weight:
            weight = jnp.where(state.step >= config.length_warmup, config.length_weight, 0.0)
            rewards = rewards + weight * relative_length(lengths, rewards >= config.solved)
        return rewards

    def learn(state, completions: Rollout, rewards, rows=None):
        raw = rewards.reshape(config.prompts, config.group)
        rewards = shaped(state, completions, raw)
        mask, score = completions.mask, lambda params: log_probs_of(model, params, completions)
        if resets:
            fresh = update.reset_moments(state.opt_state, state.params, optimizer)
            state = dataclasses.replace(state, opt_state=fresh)
        if config.mask_truncated:
            mask = mask * (completions.finish != Finish.LENGTH)[:, None]
        old = score(state.params)[0] if updates > 1 or (row.kl_coef and row.kl_in_reward) else None
        reference = score(state.reference)[0] if row.kl_coef else None
        advantages = family.advantages(rewards, mask, variant=row, log_probs=old, ref_log_probs=reference)
        batch = {
            "rollout": completions,
            "mask": mask,
            "advantages": advantages,
            "old": old if updates > 1 else None,
            "reference": None if row.kl_in_reward else reference,
        }

        def one(state, rows_and_place):
            rows, place = rows_and_place
            part = jax.tree.map(lambda x: x[rows], batch)
            return descend(state, model, loss, part, optimizer, number=state.step * updates + place)

        if updates == 1:
            state, metrics = descend(state, model, loss, batch, optimizer)
        else:
            order = _shuffles(_key(state, state.step, 1), config)
            state, stacked = jax.lax.scan(one, state, (order, jnp.arange(updates)))
            metrics = {
                name: values[-1] if name == "train/skipped" else values.mean() for name, values in stacked.items()
            }
        metrics |= summary(completions, raw)
        if config.overlong_buffer or config.length_weight:
            metrics["reward/shaped"] = jnp.nanmean(rewards)
        changes: dict[str, Any] = {"step": state.step + 1}
        if config.prioritised:
            assert rows is not None, "prioritised problems need the rows that were drawn"
            changes["success"] = draw.record(state.success, rows, raw, solved=config.solved)
            metrics["reward/success_rate"] = changes["success"].mean()
        if config.reference_every and row.kl_coef:
            due = changes["step"] % config.reference_every == 0
            take = lambda new, old: jnp.where(due, new, old)
            changes["reference"] = jax.tree.map(take, state.params, state.reference)
        return dataclasses.replace(state, **changes), metrics

    return GRPO(init, sample, learn)


def summary(completions: Rollout, rewards: jax.Array) -> dict[str, jax.Array]:
    """What an iteration's completions look like: rewards `[P, G]` (NaN: none given) and lengths."""
    spread = jnp.nanstd(rewards, axis=1)
    return {
        "reward/mean": jnp.nanmean(rewards),
        "reward/std": jnp.nanmean(spread),
        "reward/zero_std": (jnp.nan_to_num(spread) == 0).mean(),
        "completion/length": completions.lengths.mean(),
        "completion/truncated": (completions.finish == Finish.LENGTH).mean(),
        "throughput/tokens": completions.lengths.sum().astype(jnp.float32),
    }


def fused(grpo: GRPO, reward: Callable[[Rollout, Any], jax.Array], config: GRPOConfig) -> Callable:
    """One iteration as one pure function `(state, Problems) -> (state, metrics)`.

    Args:
      grpo: from `make`.
      reward: `(rollout of B rows, answers of B rows) -> [B]`, traceable.
      config: that of `make`.
    """

    def scored(state, problems: Problems):
        state, completions, rows = grpo.sample(state, problems)
        answers = jax.tree.map(lambda x: jnp.repeat(x[rows], config.group, axis=0), problems.answers)
        return state, draw.Round(completions, reward(completions, answers), rows)

    def step(state, problems: Problems):
        state, first = scored(state, problems)
        if config.dynamic_rounds == 1:
            return grpo.learn(state, *first)

        def again(carry):
            state, full, number = carry
            state, fresh = scored(state, problems)
            return state, draw.refill(full, fresh), number + 1

        unfilled = lambda carry: (carry[1].filled < config.prompts) & (carry[2] < config.dynamic_rounds)
        state, full, rounds = jax.lax.while_loop(unfilled, again, (state, draw.begin(first), jnp.int32(1)))
        return _learn_full(grpo, config, state, full, rounds)

    return step


def hosted(
    grpo: GRPO, reward: Callable[[Rollout, Any], Any], config: GRPOConfig, *, sample: Callable | None = None
) -> Callable:
    """The same iteration with Python between two programs; for `loop.run(..., jit=False)`.

    Args:
      grpo: from `make`.
      reward: `(rollout on the host, rows [prompts] of the problems) -> rewards.Scored`: `[B]` numbers, NaN where there
        is none, and metrics of the step (their mean over rounds of sampling); or the numbers alone.
      config: that of `make`.
      sample: in place of `grpo.sample`, a function that is called as it is and may end with a dict of metrics:
        `turns.sampler`, for one.
    """
    sample = jax.jit(grpo.sample) if sample is None else sample
    learn = jax.jit(grpo.learn, donate_argnums=0)
    begin, refill = jax.jit(draw.begin), jax.jit(draw.refill)
    learn_full = jax.jit(partial(_learn_full, grpo, config), donate_argnums=0)

    def scored(state, problems: Problems):
        state, completions, rows, *seen = sample(state, problems)
        values, parts = host_rewards(reward, completions, rows)
        fresh = draw.Round(completions, jnp.asarray(values), rows)
        return state, fresh, {**parts, **(seen[0] if seen else {})}

    def step(state, problems: Problems):
        state, fresh, *parts = scored(state, problems)
        if config.dynamic_rounds == 1:
            state, metrics = learn(state, *fresh)
        else:
            full, rounds = begin(fresh), 1
            while full.filled < config.prompts and rounds < config.dynamic_rounds:
                state, fresh, more = scored(state, problems)
                full, rounds, parts = refill(full, fresh), rounds + 1, [*parts, more]
            state, metrics = learn_full(state, full, jnp.int32(rounds))
        return state, metrics | {
            name: jnp.float32(sum(p.get(name, jnp.nan) for p in parts) / len(parts)) for name in parts[0]
        }

    return step


def _learn_full(grpo: GRPO, config: GRPOConfig, state, full: draw.Full, rounds):
    """Learns from a filled batch; places that stayed free have no reward."""
    free = jnp.arange(config.prompts)[:, None] >= full.filled
    rewards = jnp.where(free, jnp.nan, full.groups.rewards).reshape(-1)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), full.groups.completions)
    state, metrics = grpo.learn(state, flat, rewards, full.groups.rows)
    found = full.taught / (rounds * config.prompts)
    return state, metrics | {
        "sampling/rounds": rounds.astype(jnp.float32),
        "sampling/groups_kept": found,
        "throughput/tokens": full.tokens,
    }


def _key(state: update.TrainState, number: jax.Array, use: int) -> jax.Array:
    """A key of its own for each step (or round of sampling) and use; `epoch_batch` uses the epoch's number instead."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), number), use)


def _shuffles(key: jax.Array, config: GRPOConfig) -> jax.Array:
    """Rows of each update, `[epochs * minibatches, rows / minibatches]`: every pass a fresh permutation.

    With `share_prompt` the groups are permuted, and their rows follow each other.
    """
    together = config.group if config.share_prompt else 1
    items = config.prompts * config.group // together
    orders = jax.vmap(lambda k: jax.random.permutation(k, items))(jax.random.split(key, config.epochs))
    rows = orders[..., None] * together + jnp.arange(together)[None, None]
    return rows.reshape(config.epochs * config.minibatches, -1)
