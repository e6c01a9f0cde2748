"""The protocol: an environment is two pure functions and two spaces.

    env = envs.make("CartPole-v1")
    state, observation = env.reset(key)
    state, timestep = env.step(key, state, action)

Everything random comes from the key, everything that lasts is in the state, so environments are jitted, vmapped and
scanned like any other function. A wrapper is a function from an `Env` to an `Env`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The integers 0 .. n - 1."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def dtype(self) -> Any:
        return jnp.int32

    def sample(self, key: jax.Array) -> jax.Array:
        """A uniform draw, int32 []."""
        return jax.random.randint(key, (), 0, self.n)


@dataclasses.dataclass(frozen=True)
class Box:
    """Arrays of `shape` between `low` and `high`, each a number or a (nested) tuple of that shape."""

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) as arrays of `shape`."""
        return np.broadcast_to(self.low, self.shape), np.broadcast_to(self.high, self.shape)

    def sample(self, key: jax.Array) -> jax.Array:
        """A uniform draw; a side without a bound counts as 1 from the other bound, or from 0."""
        low, high = self.bounds
        low = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 1.0, -1.0))
        high = np.where(np.isfinite(high), high, low + 1.0)
        if np.issubdtype(self.dtype, np.integer):
            return jax.random.randint(key, self.shape, low.astype(int), high.astype(int) + 1, self.dtype)
        return jax.random.uniform(key, self.shape, self.dtype, low, high)


Space = Discrete | Box


class TimeStep(NamedTuple):
    """What a step gives back.

    `observation`: what to act on next. `reward`: float32. `terminated`: the task ended, nothing follows. `truncated`: a
    time limit, or anything outside the task, cut the episode: bootstrap from `successor`. `successor`: the observation
    the action really led to; it differs from `observation` only where `auto_reset` has begun a new episode.
    """

    observation: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    successor: Any


class Env(NamedTuple):
    """An environment.

    `reset`: `(key) -> (state, observation)`. `step`: `(key, state, action) -> (state, TimeStep)`. `action_mask`:
    `(state) -> bool [n]`, true where an action is allowed, or None. `render`: `(state) -> uint8 [height, width, 3]`, on
    the host, or None.
    """

    name: str
    reset: Callable
    step: Callable
    observation_space: Space
    action_space: Space
    action_mask: Callable | None = None
    render: Callable | None = None
