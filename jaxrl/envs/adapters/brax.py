"""Brax environments, in the program like our own."""

import importlib

import jax
import jax.numpy as jnp

from jaxrl.envs.adapters.convert import settle
from jaxrl.envs.env import Box, Env, TimeStep
from jaxrl.envs.wrappers import time_limit


def from_brax(name: str, *, episode_length: int = 1000, **options) -> Env:
    """A Brax environment, without Brax's own wrappers, so that every episode begins with a reset of its own.

    Args:
      name: of a registered environment, "ant".
      episode_length: time limit, in the environment's steps.
      options: for `brax.envs.get_environment`.

    Returns:
      Env with Brax's `State` and actions in [-1, 1].

    Raises:
      ValueError: Brax is missing or does not know the name; observations that are not one vector.
    """
    try:
        envs = importlib.import_module("brax.envs")
    except ImportError as error:
        raise ValueError(f"Brax cannot be imported ({error}): pip install brax") from error
    try:
        inner = envs.get_environment(name, **options)
    except KeyError as error:
        raise ValueError(f"Brax has no environment {name!r}") from error
    if not isinstance(inner.observation_size, int):
        raise ValueError(f"{name} observes {inner.observation_size}, expected one vector")

    def reset(key):
        state = inner.reset(key)
        return settle(state, kinds), jnp.asarray(state.obs, jnp.float32)

    def step(key, state, action):
        after = inner.step(state, action)
        observation = jnp.asarray(after.obs, jnp.float32)
        reward, never = jnp.asarray(after.reward, jnp.float32), jnp.zeros((), bool)
        return settle(after, kinds), TimeStep(observation, reward, after.done.astype(bool), never, observation)

    kinds = jax.eval_shape(inner.reset, jax.random.key(0))
    space = Box(-jnp.inf, jnp.inf, (inner.observation_size,))
    return time_limit(Env(f"brax:{name}", reset, step, space, Box(-1.0, 1.0, (inner.action_size,))), episode_length)
