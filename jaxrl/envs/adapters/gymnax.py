"""Gymnax environments (gymnax 1.0 or newer), in the program like our own."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.envs.adapters.convert import settle, space_of
from jaxrl.envs.env import Env, TimeStep


def from_gymnax(name: str, *, params: Any = None, **options) -> Env:
    """A gymnax environment, without its automatic reset; `auto_reset` is ours.

    Its time limit (`params.max_steps_in_episode`) is in: gymnax 1.0 tells `terminated` from `truncated`.

    Args:
      name: of a registered environment, "CartPole-v1" or "Breakout-MinAtar".
      params: the environment's parameters; None for its own.
      options: for `gymnax.make`.

    Returns:
      Env with gymnax's state, every leaf with a fixed dtype.

    Raises:
      ValueError: gymnax is missing, too old, or does not know the name; a space that is neither Discrete nor Box.
    """
    try:
        import gymnax
    except ImportError as error:
        raise ValueError(f"gymnax cannot be imported ({error}): pip install 'jaxrl[envs]'") from error
    try:
        inner, defaults = gymnax.make(name, **options)
    except (KeyError, ValueError) as error:
        raise ValueError(f"gymnax has no environment {name!r}: {error}") from error
    if not hasattr(inner, "is_truncated"):
        raise ValueError("this gymnax has no is_truncated: version 1.0 or newer is needed, which knows truncation")
    params = defaults if params is None else params
    observations = space_of(inner.observation_space(params))
    actions = space_of(inner.action_space(params))

    def observe(observation):
        return jnp.asarray(observation, observations.dtype).reshape(observations.shape)

    def reset(key):
        observation, state = inner.reset_env(key, params)
        return settle(state, kinds), observe(observation)

    def step(key, state, action):
        observation, after, reward, terminated, _ = inner.step_env(key, state, action, params)
        timestep = TimeStep(
            observe(observation),
            jnp.asarray(reward, jnp.float32).reshape(()),
            jnp.asarray(terminated, bool).reshape(()),
            jnp.asarray(inner.is_truncated(after, params), bool).reshape(()),
            observe(observation),
        )
        return settle(after, kinds), timestep

    _, kinds = jax.eval_shape(inner.reset_env, jax.random.key(0), params)
    return Env(f"gymnax:{name}", reset, step, observations, actions)
