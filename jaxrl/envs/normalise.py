"""Wrappers that normalise observations and rewards by running statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs import statistics
from jaxrl.envs.env import Box, Env
from jaxrl.envs.statistics import Statistics
from jaxrl.envs.wrappers import around, box


class Normalised(NamedTuple):
    """State of `normalise_observations`: the environment's, and the statistics of all observations so far."""

    env: Any
    statistics: Statistics


def normalise_observations(env: Env, *, clip: float = 10.0, eps: float = 1e-8) -> Env:
    """Observations less their running mean, over their running standard deviation, clipped.

    An observation is taken in before it is normalised; the successor is normalised with the same statistics but not
    taken in. All copies of a vectorised environment share one set of statistics: vectorise first.

    Args:
      env: with a float `Box` of observations, vectorised or not.
      clip: largest size of a normalised number.
      eps: added to the variance.

    Returns:
      Env with state `Normalised`.
    """
    space = box(env.observation_space, "normalise_observations", "observations")

    def reset(key):
        state, observation = env.reset(key)
        seen = statistics.update(statistics.statistics(space.shape), observation)
        return Normalised(state, seen), statistics.normalise(seen, observation, clip=clip, eps=eps)

    def step(key, state, action):
        inner, timestep = env.step(key, state.env, action)
        seen = statistics.update(state.statistics, timestep.observation)
        observation, successor = (
            statistics.normalise(seen, x, clip=clip, eps=eps) for x in (timestep.observation, timestep.successor)
        )
        return Normalised(inner, seen), timestep._replace(observation=observation, successor=successor)

    after = around(env, reset, step, lambda state: state.env)
    return after._replace(observation_space=Box(-clip, clip, space.shape))


class Scaled(NamedTuple):
    """State of `normalise_rewards`: the environment's; the discounted `returns` of the episodes so far, float32 [] or
    [n]; the statistics of all such returns."""

    env: Any
    returns: jax.Array
    statistics: Statistics


def normalise_rewards(env: Env, *, discount: float, clip: float = 10.0, eps: float = 1e-8) -> Env:
    """Rewards over the running standard deviation of the discounted return, clipped, not centred.

        G <- discount G + r;  take in G;  r' = r / sqrt(variance + eps);  G <- 0 where the episode ended

    This order is Stable-Baselines3's: the return with the last reward counts, and nothing of it reaches the next
    episode. All copies of a vectorised environment share one set of statistics: vectorise first.

    Args:
      env: with `auto_reset`, vectorised or not.
      discount: the agent's.
      clip: largest size of a scaled reward.
      eps: added to the variance.

    Returns:
      Env with state `Scaled`.
    """

    def reset(key):
        state, observation = env.reset(key)
        batch = jax.tree.leaves(observation)[0].shape
        batch = batch[: len(batch) - len(env.observation_space.shape)]
        return Scaled(state, jnp.zeros(batch), statistics.statistics()), observation

    def step(key, state, action):
        inner, timestep = env.step(key, state.env, action)
        returns = discount * state.returns + timestep.reward
        seen = statistics.update(state.statistics, returns)
        reward = statistics.scale(seen, timestep.reward, clip=clip, eps=eps)
        returns = jnp.where(timestep.terminated | timestep.truncated, 0.0, returns)
        return Scaled(inner, returns, seen), timestep._replace(reward=reward)

    return around(env, reset, step, lambda state: state.env)
