"""Gymnax environments (gymnax 1.0 or newer), in the program like our own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs.env import Box, Discrete, Env, Space, TimeStep


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

    def settle(state):
        return jax.tree.map(lambda leaf, kind: jnp.asarray(leaf, kind.dtype), state, kinds)

    def observe(observation):
        return jnp.asarray(observation, observations.dtype).reshape(observations.shape)

    def reset(key):
        observation, state = inner.reset_env(key, params)
        return settle(state), observe(observation)

    def step(key, state, action):
        observation, after, reward, terminated, _ = inner.step_env(key, state, action, params)
        timestep = TimeStep(
            observe(observation),
            jnp.asarray(reward, jnp.float32).reshape(()),
            jnp.asarray(terminated, bool).reshape(()),
            jnp.asarray(inner.is_truncated(after, params), bool).reshape(()),
            observe(observation),
        )
        return settle(after), timestep

    _, kinds = jax.eval_shape(inner.reset_env, jax.random.key(0), params)
    return Env(f"gymnax:{name}", reset, step, observations, actions)


def space_of(space: Any) -> Space:
    """Our space for one of gymnax or Gymnasium, told by its attributes."""
    if hasattr(space, "n") and space.shape == ():
        return Discrete(int(space.n))
    if hasattr(space, "low") and hasattr(space, "high"):
        shape = tuple(space.shape)
        kind = np.dtype(space.dtype)
        dtype = jnp.float32 if kind.kind == "f" else jnp.dtype(jax.dtypes.canonicalize_dtype(kind))
        low, high = (_bound(bound, shape) for bound in (space.low, space.high))
        return Box(low, high, shape, dtype)
    raise ValueError(f"{space} is neither Discrete nor Box; flatten it first (gymnasium.wrappers.FlattenObservation)")


def _bound(bound, shape):
    """One number where all are the same, else nested tuples, so that spaces can be compared."""
    values = np.broadcast_to(np.asarray(bound, np.float64), shape)
    if values.size and (values == values.flat[0]).all():
        return float(values.flat[0])
    return _tuples(values.tolist())


def _tuples(values):
    return tuple(_tuples(v) for v in values) if isinstance(values, list) else values
