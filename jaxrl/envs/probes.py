"""Probe environments: the smallest tasks that single out one fault of an agent, with known values.

The first five after Andy Jones, 2021, Debugging reinforcement learning, without spectacle. Each ends within a few
steps, and an agent that learns at all learns it at once: a wrong value names the part that is broken.

    Probe-Constant     one action, reward 1, one step                      the value loss, or the optimizer
    Probe-Observation  one action, reward = observation (+-1), one step    backpropagation through the network
    Probe-Discount     one action, two steps, reward 1 at the end          discounting, values of successors
    Probe-Action       two actions, reward +-1, one step                   advantages, the policy loss
    Probe-Policy       reward 1 if the action fits the observation         the policy's use of the observation
    Probe-Loss         as Probe-Action, but all rewards are negative       the sign of the advantage, its baseline
    Probe-Delay        a cost now for a greater reward later               credit over time
    Probe-Truncation   endless, reward 1 a step, cut after 4               truncation taken for termination
    Probe-Successor    cut where a known value lies ahead                  bootstrapping from the reset's observation

With `continuous=True` the action is a number u in [-1, 1] that mixes the two: rewards are (1 - u) / 2 of the first
action's and (1 + u) / 2 of the second's. The values are the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep
from jaxrl.envs.wrappers import time_limit


class Probe(NamedTuple):
    """A probe and what is to be learned.

    `env`. `observations`: [n, 1], all there are to act on. `values`: `(discount) -> [n]`, of the optimal policy.
    `actions`: the best action for each observation, [n] integers, -1 where it does not matter.
    """

    env: Env
    observations: np.ndarray
    values: Callable
    actions: np.ndarray


class State(NamedTuple):
    """Scalars: what is `seen`, float32, and the `time`, int32."""

    seen: jax.Array
    time: jax.Array


def constant(*, continuous: bool = False) -> Probe:
    """Reward 1, one step: the value is 1."""

    def move(state, choice):
        return 0.0, 1.0, True

    env = _env("Probe-Constant", _zero, move, _actions(1, continuous))
    return Probe(env, _column(0), lambda discount: np.array([1.0]), np.array([-1]))


def observation(*, continuous: bool = False) -> Probe:
    """The reward is the observation, -1 or 1, and so are the values."""

    def move(state, choice):
        return state.seen, state.seen, True

    env = _env("Probe-Observation", _sign, move, _actions(1, continuous))
    return Probe(env, _column(-1, 1), lambda discount: np.array([-1.0, 1.0]), np.array([-1, -1]))


def discount(*, continuous: bool = False) -> Probe:
    """Two steps, observed as 0 and 1, reward 1 for the second: values discount and 1."""

    def move(state, choice):
        return 1.0, state.time, state.time == 1

    env = _env("Probe-Discount", _zero, move, _actions(1, continuous))
    return Probe(env, _column(0, 1), lambda discount: np.array([discount, 1.0]), np.array([-1, -1]))


def action(*, continuous: bool = False) -> Probe:
    """The first action pays -1, the second 1: the value of the best policy is 1."""

    def move(state, choice):
        return 0.0, 2.0 * choice - 1.0, True

    env = _env("Probe-Action", _zero, move, _actions(2, continuous))
    return Probe(env, _column(0), lambda discount: np.array([1.0]), np.array([1]))


def policy(*, continuous: bool = False) -> Probe:
    """The first action fits observation -1, the second 1; fitting pays 1, else -1."""

    def move(state, choice):
        return state.seen, (2.0 * choice - 1.0) * state.seen, True

    env = _env("Probe-Policy", _sign, move, _actions(2, continuous))
    return Probe(env, _column(-1, 1), lambda discount: np.array([1.0, 1.0]), np.array([0, 1]))


def loss(*, continuous: bool = False) -> Probe:
    """The first action pays -3, the second -1: an advantage with the wrong sign prefers the first, and a policy that is
    pushed away from all it tries never settles."""

    def move(state, choice):
        return 0.0, 2.0 * choice - 3.0, True

    env = _env("Probe-Loss", _zero, move, _actions(2, continuous))
    return Probe(env, _column(0), lambda discount: np.array([-1.0]), np.array([1]))


def delay(*, continuous: bool = False) -> Probe:
    """The second action costs 1 now and pays 3 in the next step, observed as 1; the first does neither, observed as -1.

    Worth it for discounts above 1/3.
    """

    def move(state, choice):
        first = state.time == 0
        reward = jnp.where(first, -choice, 1.5 * (state.seen + 1.0))
        return jnp.where(first, 2.0 * choice - 1.0, state.seen), reward, ~first

    env = _env("Probe-Delay", _zero, move, _actions(2, continuous))
    return Probe(env, _column(0, 1), lambda discount: np.array([3.0 * discount - 1.0, 3.0]), np.array([1, -1]))


def truncation(*, continuous: bool = False) -> Probe:
    """Reward 1 for ever, cut after 4 steps: the value is 1 / (1 - discount), less if truncation counts as an end."""

    def move(state, choice):
        return 0.0, 1.0, False

    env = time_limit(_env("Probe-Truncation", _zero, move, _actions(1, continuous)), 4)
    return Probe(env, _column(0), lambda discount: np.array([1.0 / (1.0 - discount)]), np.array([-1]))


def successor(*, continuous: bool = False) -> Probe:
    """Starts at 0 or 1. From 1 the episode ends with reward 1; from 0 it gets to 1 and is cut there, with reward 0.

    The values are discount and 1, if they bootstrap from where the episode was cut and not from the next one's start.
    """

    def start(key):
        return jax.random.bernoulli(key).astype(jnp.float32)

    def move(state, choice):
        return 1.0, state.seen, state.seen == 1.0

    env = time_limit(_env("Probe-Successor", start, move, _actions(1, continuous)), 1)
    return Probe(env, _column(0, 1), lambda discount: np.array([discount, 1.0]), np.array([-1, -1]))


PROBES: dict[str, Callable[..., Probe]] = {
    "Probe-Constant": constant,
    "Probe-Observation": observation,
    "Probe-Discount": discount,
    "Probe-Action": action,
    "Probe-Policy": policy,
    "Probe-Loss": loss,
    "Probe-Delay": delay,
    "Probe-Truncation": truncation,
    "Probe-Successor": successor,
}


def _zero(key):
    return jnp.float32(0.0)


def _sign(key):
    return jnp.where(jax.random.bernoulli(key), jnp.float32(1.0), jnp.float32(-1.0))


def _column(*values):
    return np.array(values, np.float32)[:, None]


def _actions(n, continuous):
    return Box(-1.0, 1.0, (1,)) if continuous else Discrete(n)


def _env(name, start, move, actions) -> Env:
    """`start(key)` is the first thing seen; `move(state, choice)` gives (seen next, reward, terminated), where `choice`
    is 0 for the first action, 1 for the second, and between for continuous ones."""

    def reset(key):
        state = State(start(key), jnp.int32(0))
        return state, state.seen[None]

    def step(key, state, action):
        choice = (jnp.clip(action[0], -1.0, 1.0) + 1.0) / 2.0 if isinstance(actions, Box) else action
        seen, reward, terminated = move(state, choice)
        after = State(jnp.asarray(seen, jnp.float32), state.time + 1)
        timestep = TimeStep(
            after.seen[None],
            jnp.asarray(reward, jnp.float32),
            jnp.asarray(terminated, bool),
            jnp.zeros((), bool),
            after.seen[None],
        )
        return after, timestep

    return Env(name, reset, step, Box(-1.0, 1.0, (1,)), actions, render=_render)


def _render(state):
    """What is seen: a disc, blue for 1, orange for -1, grey for 0."""
    picture = canvas.blank(64, 64)
    seen = float(state.seen)
    canvas.circle(picture, (32, 32), 22, colour=canvas.BLUE if seen > 0 else canvas.ORANGE if seen < 0 else canvas.GREY)
    return picture
