"""Wrappers: functions from an `Env` to an `Env`.

The order that agents use, from the inside: the environment, what changes its observations and actions, `time_limit`,
`auto_reset`, `vectorise`, and outside, over the whole batch, normalisation. `auto_reset` must come after `time_limit`,
or episodes that are cut would not begin again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs.env import Env


class Timed(NamedTuple):
    """State of `time_limit`: the environment's, and `time`, steps taken in this episode, int32."""

    env: Any
    time: jax.Array


def time_limit(env: Env, steps: int) -> Env:
    """Truncates episodes after `steps` steps.

    A step that reaches the limit and ends the task too has both flags set, as in Gymnasium; termination wins: nothing
    may be bootstrapped then.

    Args:
      env: the environment.
      steps: the longest episode, at least 1.

    Returns:
      Env with state `Timed`.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1: an episode has one step or more")

    def reset(key):
        state, observation = env.reset(key)
        return Timed(state, jnp.int32(0)), observation

    def step(key, state, action):
        inner, timestep = env.step(key, state.env, action)
        time = state.time + 1
        return Timed(inner, time), timestep._replace(truncated=timestep.truncated | (time >= steps))

    return _around(env, reset, step, lambda state: state.env)


def auto_reset(env: Env) -> Env:
    """Begins a new episode in the very step that ends one.

    `observation` is then the first of the new episode, `successor` the last of the old one; reward and flags belong to
    the old one. The keys of the reset and of the step are different.

    Args:
      env: one environment, with its time limit.

    Returns:
      Env with the same state.
    """

    def step(key, state, action):
        step_key, reset_key = jax.random.split(key)
        later, timestep = env.step(step_key, state, action)
        done = timestep.terminated | timestep.truncated
        fresh = env.reset(reset_key)
        state, observation = jax.tree.map(lambda x, y: jnp.where(done, x, y), fresh, (later, timestep.observation))
        return state, timestep._replace(observation=observation)

    return env._replace(step=step)


def vectorise(env: Env, n: int) -> Env:
    """n copies side by side: `reset(key)` and `step(key, state, action)` with a leading axis n on all but the key.

    The spaces stay those of one copy. The picture is that of the first copy.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 environment")

    def reset(key):
        return jax.vmap(env.reset)(jax.random.split(key, n))

    def step(key, state, action):
        return jax.vmap(env.step)(jax.random.split(key, n), state, action)

    mask, render = env.action_mask, env.render
    return env._replace(
        reset=reset,
        step=step,
        action_mask=mask and jax.vmap(mask),
        render=render and (lambda state: render(jax.tree.map(lambda x: x[0], state))),
    )


def _around(env, reset, step, inner):
    """`env` with another reset and step, whose states hold the environment's: `inner(state)`."""
    mask, render = env.action_mask, env.render
    return env._replace(
        reset=reset,
        step=step,
        action_mask=mask and (lambda state: mask(inner(state))),
        render=render and (lambda state: render(inner(state))),
    )
