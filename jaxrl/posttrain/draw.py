"""Which problems an iteration works on, and how a batch is kept full of groups that teach something."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.posttrain import update
from jaxrl.types import Rollout

FLOOR = 0.01  # a solved problem is still drawn now and then
FIRST = 0.25  # share of the problems, the easiest, that a curriculum begins with


def problems(
    state: update.TrainState,
    difficulty: jax.Array | None,
    *,
    batch: int,
    number: int,
    prioritised: bool = False,
    curriculum_steps: int = 0,
) -> jax.Array:
    """Indices of the next batch of problems, a function of the state alone.

    By default every epoch is a fresh permutation. Prioritised, problem i is drawn with a probability that grows with
    1 - s_i, s_i its success rate so far; a curriculum begins with the easiest and lets the others in one by one. Both
    without repetition inside a batch, by Gumbel noise. (Kimi Team 2025, arXiv 2501.12599, section 2.3.3.)

    Args:
      state: its key and `drawn`; prioritised, its `success [number]`.
      difficulty: `[number]`, any scale; needed with a curriculum.
      batch, number: sizes, `batch <= number`.
      prioritised: see above.
      curriculum_steps: batches after which all problems are in; 0 is no curriculum.

    Returns:
      `[batch]` int32.
    """
    if not prioritised and not curriculum_steps:
        return update.epoch_batch(state.key, state.drawn, batch=batch, examples=number)
    if not 1 <= batch <= number:
        raise ValueError(f"a batch of {batch} was asked from {number} problems; give more data or a smaller batch")
    scores = jnp.log1p(FLOOR - state.success) if prioritised else jnp.zeros(number)
    if curriculum_steps:
        if difficulty is None:
            raise ValueError("a curriculum needs a difficulty for every problem; add a column `difficulty` to the data")
        rank = jnp.argsort(jnp.argsort(difficulty, stable=True))
        share = FIRST + (1 - FIRST) * jnp.minimum(state.drawn / curriculum_steps, 1.0)
        scores = jnp.where(rank < jnp.maximum(batch, jnp.ceil(share * number)), scores, -jnp.inf)
    key = jax.random.fold_in(jax.random.fold_in(state.key, (1 << 30) + 1), state.drawn)
    return jax.lax.top_k(scores + jax.random.gumbel(key, (number,)), batch)[1].astype(jnp.int32)


def rows_of(config: Any, state: update.TrainState, data: Any) -> jax.Array:
    """The next batch as a `GRPOConfig` wants it: rows of the `grpo.Problems`."""
    return problems(
        state,
        data.difficulty,
        batch=config.prompts,
        number=data.prompts.tokens.shape[0],
        prioritised=config.prioritised,
        curriculum_steps=config.curriculum_steps,
    )


def record(success: jax.Array, rows: jax.Array, rewards: jax.Array, *, solved: float, rate: float = 0.5) -> jax.Array:
    """Success rates after an iteration: an exponential mean of the share of a group that solved the problem.

    Args:
      success: `[number]`; 0 before a problem was seen.
      rows: `[P]` problems of the iteration.
      rewards: `[P, G]`, NaN where there is none.
      solved: reward from which on an answer counts as right.
      rate: weight of the newest group.
    """
    known = ~jnp.isnan(rewards)
    share = jnp.where(known, rewards >= solved, False).sum(1) / jnp.maximum(known.sum(1), 1)
    before = success[rows]
    return success.at[rows].set(jnp.where(known.any(1), before + rate * (share - before), before))


def teaches(rewards: jax.Array) -> jax.Array:
    """Whether the rewards of a group differ: `[P, G] -> [P]`. Where they do not, every advantage is zero."""
    low, high = (jnp.where(jnp.isnan(rewards), fill, rewards) for fill in (jnp.inf, -jnp.inf))
    return high.max(1) > low.min(1)


def fill(batch, fresh, filled: jax.Array, wanted: jax.Array):
    """Puts the wanted groups of `fresh` into the free places of `batch`.

    Args:
      batch, fresh: trees of arrays `[P, ...]`.
      filled: number of places taken, the first ones.
      wanted: `[P]` bool.

    Returns:
      The batch and the number of places now taken. What does not fit is left out.
    """
    places = wanted.shape[0]
    position = jnp.where(wanted, filled + jnp.cumsum(wanted) - 1, places)
    source = jnp.full(places + 1, -1).at[jnp.minimum(position, places)].set(jnp.arange(places))[:places]
    taken = source >= 0

    def put(old, new):
        here = taken.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(here, new[jnp.maximum(source, 0)], old)

    return jax.tree.map(put, batch, fresh), jnp.minimum(filled + wanted.sum(), places)


class Round(NamedTuple):
    """What one round of sampling gives: completions, their rewards `[P * G]`, and the problems `[P]` they are of."""

    completions: Rollout
    rewards: jax.Array
    rows: jax.Array


@flax.struct.dataclass
class Full:
    """A batch that is being filled with groups that teach something.

    `groups`: a `Round` with leaves `[P, ...]`. `filled`: groups in place. `taught`: groups found so far. `tokens`:
    tokens sampled so far.
    """

    groups: Any
    filled: jax.Array
    taught: jax.Array
    tokens: jax.Array


def begin(first: Round) -> Full:
    """The batch after the first round."""
    zero = jnp.zeros((), jnp.int32)
    return refill(Full(_by_group(first), zero, zero, jnp.zeros(())), first)


def refill(full: Full, fresh: Round) -> Full:
    """The batch with one more round's groups whose rewards differ (Yu et al. 2025, arXiv 2503.14476, section 3.2)."""
    groups = _by_group(fresh)
    wanted = teaches(groups.rewards)
    kept, filled = fill(full.groups, groups, full.filled, wanted)
    tokens = full.tokens + fresh.completions.lengths.sum()
    return Full(kept, filled, full.taught + wanted.sum(dtype=jnp.int32), tokens)


def _by_group(one: Round) -> Round:
    split = lambda x: x.reshape(one.rows.shape[0], -1, *x.shape[1:])
    return Round(jax.tree.map(split, one.completions), split(one.rewards), one.rows)
