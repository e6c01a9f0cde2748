"""Rewards in units of the spread of returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs import statistics
from jaxrl.envs.statistics import Statistics


class RewardScale(NamedTuple):
    """`returns` [N]: discounted sums of the rewards of the episodes so far. `statistics`: of all such sums seen."""

    returns: jax.Array
    statistics: Statistics


def reward_scale(envs: int) -> RewardScale:
    """Before the first reward of N environments."""
    return RewardScale(jnp.zeros(envs), statistics.statistics())


def scale_rewards(
    scale: RewardScale,
    rewards: jax.Array,
    done: jax.Array,
    *,
    discount: jax.Array | float,
    axis_name: str | None = None,
) -> tuple[RewardScale, jax.Array]:
    """Rewards over the standard deviation of the running discounted sum, not centred, clipped to [-10, 10].

        G <- discount G + r;   the statistics take in G;   r' = r / std;   G <- 0 where the episode ended

    The order is Stable-Baselines3's: the sum that includes the last reward counts, and nothing of it reaches the next
    episode. The statistics take in all [T, N] at once, and all rewards of a trajectory are scaled with the result.

    Args:
      scale: so far.
      rewards: [T, N].
      done: bool [T, N], where the episode ended, either way.
      discount: the agent's.
      axis_name: a mapped axis of devices whose rewards are taken in as well.

    Returns:
      The scale after the rewards, and the scaled rewards [T, N].
    """

    def step(returns, now):
        reward, done = now
        returns = discount * returns + reward
        return jnp.where(done, 0.0, returns), returns

    last, returns = jax.lax.scan(step, scale.returns, (rewards, done))
    seen = statistics.update(scale.statistics, returns, axis_name=axis_name)
    return RewardScale(last, seen), statistics.scale(seen, rewards)
