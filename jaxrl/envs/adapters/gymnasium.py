"""Gymnasium environments, on the host: any of them trains, at the price of a call out of the program at every step.

A state in the program is a ticket: which episode, its seed, how many steps it has taken. The environments stand in a
pool on the host, which knows by the ticket which one to step. The calls are `jax.pure_callback`s: what one returns is
in the next one's ticket, so they happen in order under jit, scan and vmap; a batch is one call; and a call repeated
with the same ticket and action is answered from memory, without a second step.

What it costs: about 0.1 ms for a call and Gymnasium's own time for every environment in the batch, one after the other.
Every `reset` is a real one: `auto_reset` resets at every step, whether it is needed or not. An episode cannot go back:
stepping an old ticket with another action is an error, and so is going on in a new process.
"""

import collections
import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs.adapters.convert import space_of
from jaxrl.envs.env import Discrete, Env, TimeStep

SPARE = 64
"""How many environments wait for a first step before one of them is reset for another episode."""


class Ticket(NamedTuple):
    """Scalars, int32: number of the `episode`, 0 for one that is over; its `seed`; `time`, steps taken."""

    episode: jax.Array
    seed: jax.Array
    time: jax.Array


def from_gymnasium(name: str | Callable, *, instances: int = 1024, **options) -> Env:
    """A Gymnasium environment with its own time limit.

    Args:
      name: of a registered environment, or a function without arguments that makes one (with wrappers, for example).
      instances: how many episodes may be under way; beyond, the one that has waited longest is given up.
      options: for `gymnasium.make`.

    Returns:
      Env with state `Ticket`. It has pictures if it was made with render_mode="rgb_array".

    Raises:
      ValueError: Gymnasium is missing or does not know the name; a space that is neither Discrete nor Box.
    """
    if isinstance(name, str):
        build, title = _builder(name, options), f"gymnasium:{name}"
    else:
        build, title = name, "gymnasium"
    pool = _Pool(build, instances)
    outer = pool.first
    observations, actions = space_of(outer.observation_space), space_of(outer.action_space)
    start = int(getattr(outer.action_space, "start", 0))
    base = int(getattr(outer.observation_space, "start", 0))

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    seen = jax.ShapeDtypeStruct(observations.shape, observations.dtype)
    number, flag = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)

    def host_reset(seeds):
        seeds = np.asarray(seeds)
        rows = [pool.reset(int(seed)) for seed in seeds.ravel()]
        return _columns(rows, seeds.shape, (scalar, seen), (0, base))

    def host_step(episodes, seeds, times, actions_taken):
        episodes, taken = np.asarray(episodes), np.asarray(actions_taken)
        taken = taken.reshape(episodes.size, *actions.shape)
        if isinstance(actions, Discrete):
            taken = taken + start
        tickets = zip(episodes.ravel(), np.ravel(seeds), np.ravel(times), taken, strict=True)
        rows = [pool.step(int(episode), int(seed), int(time), action) for episode, seed, time, action in tickets]
        return _columns(rows, episodes.shape, (scalar, scalar, seen, number, flag, flag), (0, 0, base, 0, 0, 0))

    def reset(key):
        seed = (jax.random.bits(key, (), jnp.uint32) >> 1).astype(jnp.int32)
        episode, observation = jax.pure_callback(host_reset, (scalar, seen), seed, vmap_method="broadcast_all")
        return Ticket(episode, seed, jnp.int32(0)), observation

    def step(key, state, action):
        episode, time, observation, reward, terminated, truncated = jax.pure_callback(
            host_step, (scalar, scalar, seen, number, flag, flag), *state, action, vmap_method="broadcast_all"
        )
        return Ticket(episode, state.seed, time), TimeStep(observation, reward, terminated, truncated, observation)

    render = pool.render if outer.render_mode == "rgb_array" else None
    return Env(title, reset, step, observations, actions, render=render)


def _builder(name, options):
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError(f"Gymnasium cannot be imported ({error}): pip install 'jaxrl[envs]'") from error
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise ValueError(f"Gymnasium has no environment {name!r}: {error}") from error
    return lambda: gymnasium.make(name, **({"disable_env_checker": True} | options))


def _columns(rows, batch, kinds, bases):
    """Rows of results as arrays [*batch, *shape] of the kinds."""
    columns = zip(*rows, strict=True)
    return tuple(
        (np.asarray(column) - base if base else np.asarray(column)).astype(kind.dtype).reshape((*batch, *kind.shape))
        for column, kind, base in zip(columns, kinds, bases, strict=True)
    )


class _Episode:
    """An episode on the host: its environment (None once it is over), steps taken, and the last step's answer."""

    def __init__(self, env):
        self.env: Any = env
        self.time = 0
        self.action: Any = None
        self.answer: Any = None


class _Pool:
    """Environments and the episodes they play. `waiting`: reset, but not stepped; may be reset again from its seed."""

    def __init__(self, build, instances):
        self.build, self.instances = build, instances
        self.first = build()
        self.free: list[Any] = [self.first]
        self.waiting: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self.playing: collections.OrderedDict[int, _Episode] = collections.OrderedDict()
        self.over: collections.OrderedDict[int, _Episode] = collections.OrderedDict()
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    def reset(self, seed):
        with self.lock:
            env, number = self.take(), next(self.numbers) % (2**31 - 1) + 1
            observation, _ = env.reset(seed=seed)
            self.waiting[number] = env
            return number, observation

    def step(self, number, seed, time, action):
        with self.lock:
            if number == 0:  # stepped on after its end, as evaluation does until the last episode is over
                return 0, time, self.blank(), 0.0, True, False
            episode = self.playing.get(number) or self.over.get(number)
            if episode is None and time == 0:
                episode = self.playing[number] = _Episode(self.begin(number, seed))
            if episode is None:
                raise RuntimeError(
                    f"the pool does not hold episode {number} at step {time}: more than {self.instances} episodes are "
                    "under way (raise `instances`), or the state comes from another process"
                )
            if time == episode.time - 1 and np.array_equal(action, episode.action):
                return episode.answer
            if time != episode.time or episode.env is None:
                raise RuntimeError(
                    f"episode {number} has taken {episode.time} steps and cannot go back to step {time}: a Gymnasium "
                    "environment lives on the host, use each of its states once"
                )
            observation, reward, terminated, truncated, _ = episode.env.step(action)
            done = terminated or truncated
            after = 0 if done else number
            # Environments may write the next observation into the same array.
            answer = (after, time + 1, np.array(observation), reward, terminated, truncated)
            episode.time, episode.action, episode.answer = time + 1, np.array(action), answer
            if done:
                self.free.append(episode.env)
                episode.env = None
                self.over[number] = self.playing.pop(number)
                if len(self.over) > self.instances:
                    self.over.popitem(last=False)
            else:
                self.playing.move_to_end(number)
            return answer

    def begin(self, number, seed):
        """The environment of an episode at its first observation."""
        if number in self.waiting:
            return self.waiting.pop(number)
        env = self.take()
        env.reset(seed=seed)
        return env

    def take(self):
        """An environment to reset: free, new, waiting, or that of the episode stepped longest ago."""
        if self.free:
            return self.free.pop()
        if len(self.waiting) < SPARE and len(self.waiting) + len(self.playing) < self.instances:
            return self.build()
        if self.waiting:
            return self.waiting.popitem(last=False)[1]
        return self.playing.popitem(last=False)[1].env

    def blank(self):
        space = self.first.observation_space
        return np.full(space.shape, getattr(space, "start", 0), space.dtype)

    def render(self, state) -> np.ndarray:
        number, seed, time = (int(part) for part in state)
        with self.lock:
            if number not in self.playing and time == 0:
                self.playing[number] = _Episode(self.begin(number, seed))
            episode = self.playing.get(number)
            if episode is None or episode.time != time:
                raise ValueError(
                    "a Gymnasium environment draws only its present state, and none after the end of an episode"
                )
            return np.asarray(episode.env.render(), np.uint8)
