"""Bandits: episodes of one step. The arms' parameters may be traced arrays, so a batch of bandits is a `vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep


def gaussian(means: ArrayLike, *, std: ArrayLike = 1.0) -> Env:
    """Arm i pays a draw from N(means[i], std^2) (Sutton and Barto 2018, section 2.3).

    Args:
      means: [k].
      std: standard deviation, a number or [k].

    Returns:
      Env with observation [1.0].
    """
    arms = _arms(means, "means")
    spread = jnp.broadcast_to(jnp.asarray(std, jnp.float32), arms.shape)
    return _bandit("GaussianBandit", arms[None], lambda key, arm: arms[arm] + spread[arm] * jax.random.normal(key))


def bernoulli(probabilities: ArrayLike) -> Env:
    """Arm i pays 1 with probability probabilities[i] ([k]), else 0. Returns an Env with observation [1.0]."""
    arms = _arms(probabilities, "probabilities")
    return _bandit("BernoulliBandit", arms[None], lambda key, arm: jax.random.bernoulli(key, arms[arm]))


def contextual(means: ArrayLike, *, std: float = 0.0) -> Env:
    """A bandit for each context, drawn uniformly and seen: in context c, arm i pays a draw from N(means[c, i], std^2).

    Args:
      means: [contexts, k].
      std: standard deviation.

    Returns:
      Env with the context as a one-hot observation [contexts].
    """
    table = jnp.asarray(means, jnp.float32)
    if table.ndim != 2:
        raise ValueError(f"means has shape {table.shape}, expected [contexts, k]: a row of arms for each context")

    def reset(key):
        context = jax.random.randint(key, (), 0, table.shape[0], jnp.int32)
        return context, jax.nn.one_hot(context, table.shape[0], dtype=jnp.float32)

    def step(key, context, action):
        reward = table[context, action] + (std * jax.random.normal(key) if std else 0.0)
        return context, _last(jax.nn.one_hot(context, table.shape[0], dtype=jnp.float32), reward)

    space = Box(0.0, 1.0, (table.shape[0],))
    render = _picture(table)
    return Env("ContextualBandit", reset, step, space, Discrete(table.shape[1]), render=render)


def _bandit(name, table, pull) -> Env:
    """One context; `pull(key, arm)` is the reward."""
    observation = jnp.ones(1, jnp.float32)

    def reset(key):
        return jnp.int32(0), observation

    def step(key, state, action):
        return state, _last(observation, pull(key, action))

    return Env(name, reset, step, Box(0.0, 1.0, (1,)), Discrete(table.shape[1]), render=_picture(table))


def _last(observation, reward):
    return TimeStep(observation, jnp.asarray(reward, jnp.float32), jnp.ones((), bool), jnp.zeros((), bool), observation)


def _arms(values, name):
    arms = jnp.asarray(values, jnp.float32)
    if arms.ndim != 1 or not arms.size:
        raise ValueError(f"{name} has shape {arms.shape}, expected [k]: one number for each arm")
    return arms


def _picture(table):
    """Draws the arms' means as bars; a row for each context, the present one dark."""

    def render(context) -> np.ndarray:
        means = np.asarray(table)
        low, high = min(means.min(), 0.0), max(means.max(), 0.0)
        unit, rows, arms = 60 / max(high - low, 1e-6), *means.shape
        picture = canvas.blank(28 * arms + 16, 80 * rows)
        for row in range(rows):
            zero = 80 * row + 70 + low * unit
            for arm in range(arms):
                colour = canvas.BLUE if row == int(context) else canvas.GREY
                corner, opposite = (28 * arm + 12, zero), (28 * arm + 32, zero - means[row, arm] * unit)
                canvas.rectangle(picture, corner, opposite, colour=colour)
            canvas.line(picture, (6, zero), (28 * arms + 10, zero), width=1)
        return picture

    return render
