"""Partial rollouts: long completions are drawn a segment in each iteration, so none of them holds up the others.

Kimi Team 2025, arXiv 2501.12599, section 2.6.2. A completion that has not ended after `segment` new tokens waits in the
train state and goes on in the next iteration, under the parameters of then. A group is learnt from once all its
completions have ended; new prompts take its place. `make` wraps a `grpo.GRPO` and gives one back, for `grpo.fused` and,
with `of_ready`, for `grpo.hosted`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import draw, update
from jaxrl.posttrain.grpo import GRPO, GRPOConfig
from jaxrl.posttrain.rewards.host import Scored
from jaxrl.posttrain.rollout import rollout
from jaxrl.types import Finish, Prompts, Rollout

UNFINISHED = -1
"""In `Rollout.finish`, for a completion that goes on in the next iteration."""


@dataclasses.dataclass(frozen=True)
class PartialConfig:
    """How much of a completion is drawn in an iteration, and when one is stopped."""

    segment: int = 0
    """New tokens of each completion and iteration at most; 0 draws completions whole."""
    loss_on: str = "last"
    """Tokens that are learnt from: last, each completion's newest segment, or all, which needs importance_cap."""
    repetition: int = 0
    """Longest stretch of tokens whose repetition stops a completion; 0 never stops one."""
    repetition_times: int = 8
    """How often a stretch must follow itself."""
    repetition_penalty: float = 1.0
    """Taken off the reward of a completion that was stopped so."""

    def __post_init__(self):
        if self.loss_on not in ("last", "all"):
            raise ValueError(f"loss_on is {self.loss_on!r}; expected last or all")
        for name, least in (("segment", 0), ("repetition", 0), ("repetition_times", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")


@flax.struct.dataclass
class Buffer:
    """The completions of an iteration's `prompts * group` places, finished or not.

    `completions`: their `finish` is -1 where they go on. Places whose group has ended are free. `begun`: `[B]`, where
    the newest segment of each begins. `rows`: `[prompts]`, the problem at each place. `queue`: `[prompts]` problems
    drawn, of which the first `taken` have been given a place.
    """

    completions: Rollout
    begun: jax.Array
    rows: jax.Array
    queue: jax.Array
    taken: jax.Array


@flax.struct.dataclass
class PartialState(update.TrainState):
    """A run as one pytree: its `TrainState` and the completions that have not ended."""

    buffer: Buffer | None = None


def make(
    options: PartialConfig,
    config: GRPOConfig,
    plain: GRPO,
    model: LanguageModel,
    *,
    prompt_width: int,
    eos_id: int,
    pad_id: int,
    stop: tuple[tuple[int, ...], ...] = (),
) -> GRPO:
    """The functions of a run with partial rollouts; with a segment of at least `max_tokens` they do what `plain` does.

    Behaviour log-probs are those of the parameters that drew each segment. With `loss_on = "last"` only a completion's
    newest segment is learnt from. It is on policy unless the completion waited for others of its group: then it is off
    by that many updates. With "all" every token is, weighted by trainer / sampler up to `importance_cap`, which also
    mends the waiting with "last". Each segment reads prompt and earlier segments anew: keys and values of old
    parameters are stale. Completions that wait take part in sampling, and what is drawn for them is thrown away.

    An iteration in which no group has ended updates nothing; its metrics are NaN. `reward/mean` includes the penalty
    for repetition.

    Args:
      options: see `PartialConfig`.
      config: that of `plain`.
      plain: from `grpo.make`.
      model: must take caches of `context(...)` tokens.
      prompt_width: P of the problems' prompts, whose completions the state holds.
      eos_id, pad_id, stop: as given to `grpo.make`.

    Returns:
      `GRPO(init, sample, learn)` over a `PartialState`. `sample` advances the buffer by a segment; in its rollout
      `finish` is -1 where a completion goes on, and its reward is not looked at.

    Raises:
      ValueError: `loss_on = "all"` without importance weights, or dynamic sampling, which wants whole groups at once.
    """
    if options.loss_on == "all" and config.importance_cap is None:
        raise ValueError("loss_on is 'all' and importance_cap is not set: segments of old parameters need its weights")
    if config.dynamic_rounds > 1:
        raise ValueError(f"dynamic_rounds is {config.dynamic_rounds}; partial rollouts take 1")
    places, group, budget = config.prompts, config.group, config.sampling.max_tokens
    segment = min(options.segment or budget, budget)
    count, extent = places * group, -(-budget // segment) * segment
    sampling = dataclasses.replace(config.sampling, max_tokens=segment)
    columns = jnp.arange(extent)[None]

    def init(key, params, problems: int = 0):
        state = plain.init(key, params, problems)
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
        logs = lambda: jnp.zeros((count, extent))
        nothing = Rollout(
            tokens=jnp.full((count, prompt_width + extent), pad_id, jnp.int32),
            prompt_lengths=zeros(count),
            lengths=zeros(count),
            finish=zeros(count) + Finish.EOS,
            log_probs=logs(),
            behaviour_log_probs=logs(),
            prompt_width=prompt_width,
        )
        buffer = Buffer(nothing, zeros(count), zeros(places), zeros(places), jnp.int32(places))
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return PartialState(**fields, buffer=buffer)

    def refilled(state, problems) -> tuple[Buffer, jax.Array]:
        """New problems in the places that are free; and batches drawn."""
        buffer, free = state.buffer, _ready(state.buffer, group)
        fresh = draw.rows_of(config, state, problems)
        number = buffer.taken + jnp.cumsum(free) - 1
        rows = jnp.where(free, jnp.concatenate([buffer.queue, fresh])[number], buffer.rows)
        taken = buffer.taken + free.sum(dtype=jnp.int32)
        more = taken > places
        each = jnp.repeat(free, group)
        new = jax.tree.map(lambda x: jnp.repeat(x[rows], group, axis=0), problems.prompts)
        old = buffer.completions
        put = lambda value, kept: jnp.where(each.reshape(-1, *(1,) * (kept.ndim - 1)), value, kept)
        completions = dataclasses.replace(
            old,
            tokens=put(jnp.pad(new.tokens, ((0, 0), (0, extent)), constant_values=pad_id), old.tokens),
            prompt_lengths=put(new.lengths, old.prompt_lengths),
            lengths=put(0, old.lengths),
            finish=put(UNFINISHED, old.finish),
            log_probs=put(0.0, old.log_probs),
            behaviour_log_probs=put(0.0, old.behaviour_log_probs),
        )
        queue = jnp.where(more, fresh, buffer.queue)
        buffer = Buffer(completions, put(0, buffer.begun), rows, queue, jnp.where(more, taken - places, taken))
        return buffer, state.drawn + more

    def sample(state, problems):
        buffer, drawn = refilled(state, problems)
        old = buffer.completions
        goes = old.finish == UNFINISHED
        made = rollout(
            model,
            state.params,
            _so_far(old, width=prompt_width + extent - segment),
            jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), state.step), 0),
            sampling=sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            stop=stop,
        )
        added = jnp.where(goes, jnp.minimum(made.lengths, budget - old.lengths), 0)
        here = (columns >= old.lengths[:, None]) & (columns < (old.lengths + added)[:, None])
        source = jnp.clip(columns - old.lengths[:, None], 0, segment - 1)
        put = lambda new, kept: jnp.where(here, jnp.take_along_axis(new, source, axis=1), kept)
        lengths = old.lengths + added
        finish = jnp.where(added < made.lengths, Finish.LENGTH, made.finish)
        finish = jnp.where((finish == Finish.LENGTH) & (lengths < budget), UNFINISHED, finish)
        new = dataclasses.replace(
            old,
            tokens=jnp.concatenate([old.tokens[:, :prompt_width], put(made.completions, old.completions)], axis=1),
            lengths=lengths,
            finish=jnp.where(goes, finish, old.finish),
            log_probs=put(made.log_probs, old.log_probs),
            behaviour_log_probs=put(made.behaviour_log_probs, old.behaviour_log_probs),
        )
        if options.repetition:
            longest, times = options.repetition, options.repetition_times
            round_ = repeats(new.completions, lengths, longest=longest, times=times)
            open_ = (new.finish == UNFINISHED) | (new.finish == Finish.LENGTH)
            new = dataclasses.replace(new, finish=jnp.where(goes & open_ & round_, Finish.REPEAT, new.finish))
        buffer = dataclasses.replace(buffer, completions=new, begun=jnp.where(goes, old.lengths, buffer.begun))
        state = dataclasses.replace(state, drawn=drawn, buffer=buffer)
        return state, _cut(new, budget), buffer.rows

    def learn(state, completions: Rollout, rewards, rows=None):
        buffer, ready = state.buffer, _ready(state.buffer, group)
        each, share = jnp.repeat(ready, group), ready.mean()
        rewards = rewards - options.repetition_penalty * (completions.finish == Finish.REPEAT)
        early = columns[:, :budget] < buffer.begun[:, None]
        whole = dataclasses.replace(
            completions,
            lengths=jnp.where(each, completions.lengths, 0),
            finish=jnp.where(each, completions.finish, UNFINISHED),
            given=early if options.loss_on == "last" else None,
        )
        rows = jnp.where(ready, buffer.rows, jnp.iinfo(jnp.int32).max)  # what is not ready leaves no success

        def some(state):
            state, metrics = plain.learn(state, whole, jnp.where(each, rewards, jnp.nan), rows)
            for name in ("completion/length", "completion/truncated"):
                metrics[name] = metrics[name] / share
            metrics["reward/zero_std"] = (metrics["reward/zero_std"] - (1 - share)) / share
            return state, metrics

        def none(state):
            shapes = jax.eval_shape(some, state)[1]
            metrics = {name: jnp.full(shape.shape, jnp.nan, shape.dtype) for name, shape in shapes.items()
                       if name not in ("train/skipped", "throughput/tokens")}  # fmt: skip
            metrics |= {"train/skipped": state.skipped, "throughput/tokens": jnp.float32(0)}
            return dataclasses.replace(state, step=state.step + 1), metrics

        state, metrics = jax.lax.cond(ready.any(), some, none, state)
        repeated = (completions.finish == Finish.REPEAT).mean()
        return state, metrics | {"sampling/groups_ready": share, "completion/repeated": repeated}

    return GRPO(init, sample, learn)


def context(prompt_width: int, budget: int, segment: int) -> int:
    """The cache that sampling asks for: P and the budget rounded up to whole segments."""
    segment = min(segment or budget, budget)
    return prompt_width + -(-budget // segment) * segment


def of_ready(reward: Callable[[Rollout, Any], Any], *, group: int) -> Callable[[Rollout, Any], Any]:
    """A host's reward that sees only groups whose completions have all ended; the others get NaN.

    Where none has, it is asked about the first group as it stands, for the names of its metrics alone.
    """

    def ready_only(completions: Rollout, rows):
        finish, rows = np.asarray(completions.finish), np.asarray(rows)
        ready = (finish.reshape(-1, group) >= 0).all(axis=1)
        asked = ready if ready.any() else np.arange(len(rows)) == 0
        each = np.repeat(asked, group)
        shown = dataclasses.replace(completions, finish=np.where(finish < 0, Finish.LENGTH, finish))
        given = reward(jax.tree.map(lambda x: np.asarray(x)[each], shown), rows[asked])
        values, parts = given if isinstance(given, Scored) else (given, {})
        filled = np.full(each.shape, np.nan, np.float32)
        if not ready.any():
            return Scored(filled, dict.fromkeys(parts, np.nan))
        filled[each] = np.asarray(values, np.float32)
        return Scored(filled, parts)

    return ready_only


def repeats(tokens: jax.Array, lengths: jax.Array, *, longest: int, times: int) -> jax.Array:
    """Whether a row ends in a stretch of at most `longest` tokens that stands there `times` times in a row.

    With L = lengths: for some p <= longest, L >= times p and x_i = x_{i-p} for all i in [L - (times - 1) p, L).

    Args:
      tokens: [B, C].
      lengths: [B], tokens of each row.
      longest, times: at least 1 and 2.

    Returns:
      [B] bool.
    """
    columns = jnp.arange(tokens.shape[1])[None]
    end = lengths[:, None]

    def period(p):
        same = (tokens == jnp.roll(tokens, p, axis=1)) & (columns >= p)
        tail = (columns >= end - (times - 1) * p) & (columns < end)
        return (same | ~tail).all(axis=1) & (lengths >= times * p)

    return jax.lax.map(period, jnp.arange(1, longest + 1)).any(axis=0)


def _ready(buffer: Buffer, group: int) -> jax.Array:
    """`[prompts]`: whether all completions of a place have ended."""
    return (buffer.completions.finish.reshape(-1, group) >= 0).all(axis=1)


def _so_far(completions: Rollout, *, width: int) -> Prompts:
    """Prompt and completion, moved to the right until they end in the last of `width` columns."""
    lengths = completions.prompt_lengths + completions.lengths
    ends = completions.prompt_width + completions.lengths
    source = jnp.arange(width)[None] + (ends - width)[:, None]
    tokens = jnp.take_along_axis(completions.tokens, jnp.maximum(source, 0), axis=1)
    return Prompts(tokens, jnp.minimum(lengths, width))


def _cut(completions: Rollout, budget: int) -> Rollout:
    """Without the columns that no completion may fill."""
    return dataclasses.replace(
        completions,
        tokens=completions.tokens[:, : completions.prompt_width + budget],
        log_probs=completions.log_probs[:, :budget],
        behaviour_log_probs=completions.behaviour_log_probs[:, :budget],
    )
