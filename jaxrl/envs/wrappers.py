"""Wrappers: functions from an `Env` to an `Env`.

The order that agents use, from the inside: the environment, what changes its observations and actions, `time_limit`,
`auto_reset`, `vectorise`, and outside, over the whole batch, normalisation. `auto_reset` must come after `time_limit`,
or episodes that are cut would not begin again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs.env import Box, Discrete, Env, Space


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

    return around(env, reset, step, lambda state: state.env)


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


class Stacked(NamedTuple):
    """State of `frame_stack`: the environment's, and the last n observations, oldest first, [n, *shape]."""

    env: Any
    frames: jax.Array


def frame_stack(env: Env, n: int) -> Env:
    """The last n observations on a new first axis, oldest first; at the start, n times the first one.

    Goes inside `auto_reset`, so that a new episode sees nothing of the old one.

    Args:
      env: one environment with a `Box` of observations.
      n: how many, at least 1.

    Returns:
      Env with observations [n, *shape].
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 frame")
    space = box(env.observation_space, "frame_stack", "observations")

    def reset(key):
        state, observation = env.reset(key)
        frames = jnp.broadcast_to(observation, (n, *observation.shape))
        return Stacked(state, frames), frames

    def step(key, state, action):
        inner, timestep = env.step(key, state.env, action)
        frames = jnp.concatenate([state.frames[1:], timestep.successor[None]])
        return Stacked(inner, frames), timestep._replace(observation=frames, successor=frames)

    low, high = (tuple(np.broadcast_to(bound, (n, *space.shape)).tolist()) for bound in space.bounds)
    after = around(env, reset, step, lambda state: state.env)
    return after._replace(observation_space=Box(low, high, (n, *space.shape), space.dtype))


def mask_actions(env: Env, allowed: Callable) -> Env:
    """Forbids actions: `allowed(state) -> bool [n]`, besides what the environment forbids already.

    Agents that know masks never choose them; nothing stops others.
    """
    if not isinstance(env.action_space, Discrete):
        raise ValueError(f"mask_actions needs discrete actions, {env.name} has {env.action_space}")
    old = env.action_mask
    mask = allowed if old is None else lambda state: old(state) & allowed(state)
    return env._replace(action_mask=mask)


def clip_actions(env: Env) -> Env:
    """Actions are clipped to the bounds of the action space, a `Box`."""
    space = box(env.action_space, "clip_actions", "actions")
    low, high = (jnp.asarray(bound, space.dtype) for bound in space.bounds)

    def step(key, state, action):
        return env.step(key, state, jnp.clip(action, *(jnp.broadcast_to(b, action.shape) for b in (low, high))))

    return env._replace(step=step)


def rescale_actions(env: Env, *, low: float = -1.0, high: float = 1.0) -> Env:
    """Actions between `low` and `high` are stretched to the bounds of the action space, a bounded `Box`."""
    space = box(env.action_space, "rescale_actions", "actions")
    if not all(np.isfinite(bound).all() for bound in space.bounds):
        raise ValueError(f"rescale_actions needs bounds on both sides, {env.name} has {space}")
    if not low < high:
        raise ValueError(f"low {low} and high {high}: expected low < high")
    bottom, top = (jnp.asarray(bound, space.dtype) for bound in space.bounds)

    def step(key, state, action):
        share = (action - low) / (high - low)
        floor, ceiling = (jnp.broadcast_to(bound, action.shape) for bound in (bottom, top))
        return env.step(key, state, (floor + share * (ceiling - floor)).astype(space.dtype))

    return env._replace(step=step, action_space=Box(low, high, space.shape, space.dtype))


def box(space: Space, wrapper: str, what: str) -> Box:
    """The space, if it is a `Box`; else an error that names the wrapper."""
    if not isinstance(space, Box):
        raise ValueError(f"{wrapper} needs a Box of {what}, here they are {space}")
    return space


def around(env: Env, reset: Callable, step: Callable, inner: Callable) -> Env:
    """`env` with another reset and step, whose states hold the environment's own: `inner(state)`."""
    mask, render = env.action_mask, env.render
    return env._replace(
        reset=reset,
        step=step,
        action_mask=mask and (lambda state: mask(inner(state))),
        render=render and (lambda state: render(inner(state))),
    )
