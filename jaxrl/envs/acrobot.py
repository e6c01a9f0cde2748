"""Acrobot: swing the free end of two links above a line, with a torque at the joint between them.

Sutton, 1996, Generalization in reinforcement learning: successful examples using sparse coarse coding; constants and
Runge-Kutta step as Gymnasium's Acrobot-v1 (the equations "of the book").
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep

GRAVITY, MASS, LENGTH, CENTRE, INERTIA, SECONDS = 9.8, 1.0, 1.0, 0.5, 1.0, 0.2
MAX_SPEED = (4 * math.pi, 9 * math.pi)


class State(NamedTuple):
    """Scalars: `first`, angle of the upper link from hanging down, and `second`, of the lower one from the upper, in
    rad; their speeds in rad/s."""

    first: jax.Array
    second: jax.Array
    first_speed: jax.Array
    second_speed: jax.Array


def derivative(state: State, torque: jax.Array) -> State:
    """Change of the state in a second."""
    first, second, first_speed, second_speed = state
    cos, sin = jnp.cos(second), jnp.sin(second)
    d1 = MASS * CENTRE**2 + MASS * (LENGTH**2 + CENTRE**2 + 2 * LENGTH * CENTRE * cos) + 2 * INERTIA
    d2 = MASS * (CENTRE**2 + LENGTH * CENTRE * cos) + INERTIA
    phi2 = MASS * CENTRE * GRAVITY * jnp.sin(first + second)
    phi1 = (
        -MASS * LENGTH * CENTRE * second_speed * (second_speed + 2 * first_speed) * sin
        + (MASS * CENTRE + MASS * LENGTH) * GRAVITY * jnp.sin(first)
        + phi2
    )
    second_pull = (torque + d2 / d1 * phi1 - MASS * LENGTH * CENTRE * first_speed**2 * sin - phi2) / (
        MASS * CENTRE**2 + INERTIA - d2**2 / d1
    )
    return State(first_speed, second_speed, -(d2 * second_pull + phi1) / d1, second_pull)


def dynamics(state: State, action: jax.Array) -> State:
    """The state 0.2 s later (one Runge-Kutta step) under a torque of -1, 0 or 1 Nm (actions 0, 1, 2)."""
    torque = (action - 1).astype(state.first.dtype)

    def ahead(slope, seconds):
        return State(*(x + seconds * d for x, d in zip(state, slope, strict=True)))

    k1 = derivative(state, torque)
    k2 = derivative(ahead(k1, SECONDS / 2), torque)
    k3 = derivative(ahead(k2, SECONDS / 2), torque)
    k4 = derivative(ahead(k3, SECONDS), torque)
    slope = State(*((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)))
    first, second, first_speed, second_speed = ahead(slope, SECONDS)
    return State(
        _wrap(first),
        _wrap(second),
        jnp.clip(first_speed, -MAX_SPEED[0], MAX_SPEED[0]),
        jnp.clip(second_speed, -MAX_SPEED[1], MAX_SPEED[1]),
    )


def make() -> Env:
    """Acrobot without a time limit: reward -1 for every step that does not end it; ends when the free end is a link's
    length above the fixed one."""

    def observe(state):
        first, second, *speeds = state
        parts = [jnp.cos(first), jnp.sin(first), jnp.cos(second), jnp.sin(second), *speeds]
        return jnp.stack(parts).astype(jnp.float32)

    def reset(key):
        start = State(*jax.random.uniform(key, (4,), jnp.float32, -0.1, 0.1))
        return start, observe(start)

    def step(key, state, action):
        after = dynamics(state, action)
        high = -jnp.cos(after.first) - jnp.cos(after.first + after.second) > 1.0
        observation, reward = observe(after), jnp.where(high, jnp.float32(0.0), jnp.float32(-1.0))
        return after, TimeStep(observation, reward, high, jnp.zeros((), bool), observation)

    high = (1.0, 1.0, 1.0, 1.0, *MAX_SPEED)
    low = tuple(-bound for bound in high)
    return Env("Acrobot", reset, step, Box(low, high, (6,)), Discrete(3), render=render)


def render(state: State) -> np.ndarray:
    """The two links and the line to reach as a picture."""
    view = canvas.View((-2.2, -2.2), (2.2, 2.2), (300, 300))
    picture = canvas.blank(*view.size)
    first, second = float(state.first), float(state.second)
    joint = (LENGTH * math.sin(first), -LENGTH * math.cos(first))
    end = (joint[0] + LENGTH * math.sin(first + second), joint[1] - LENGTH * math.cos(first + second))
    canvas.line(picture, view(-2.2, LENGTH), view(2.2, LENGTH), width=2, colour=canvas.GREEN)
    for start, stop in (((0.0, 0.0), joint), (joint, end)):
        canvas.line(picture, view(*start), view(*stop), width=12, colour=canvas.BLUE)
    for point in ((0.0, 0.0), joint):
        canvas.circle(picture, view(*point), 7, colour=canvas.YELLOW)
    canvas.circle(picture, view(*end), 4, colour=canvas.RED)
    return picture


def _wrap(angle):
    """The same angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi
