"""CartPole: a cart is pushed left or right so that the pole on it stays upright.

Barto, Sutton and Anderson, 1983, Neuronlike adaptive elements that can solve difficult learning control problems;
constants and Euler integration as Gymnasium's CartPole-v1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
TOTAL_MASS, POLE_MOMENT = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360


class State(NamedTuple):
    """Scalars: `position` of the cart in m, its `velocity` in m/s, `angle` of the pole from upright in rad, its
    `angular_velocity` in rad/s."""

    position: jax.Array
    velocity: jax.Array
    angle: jax.Array
    angular_velocity: jax.Array


def dynamics(state: State, action: jax.Array) -> State:
    """The state 0.02 s after the cart is pushed with 10 N to the left (action 0) or to the right (1)."""
    position, velocity, angle, angular_velocity = state
    force = jnp.where(action == 1, FORCE, -FORCE)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    push = (force + POLE_MOMENT * angular_velocity**2 * sin) / TOTAL_MASS
    angular = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cos**2 / TOTAL_MASS))
    linear = push - POLE_MOMENT * angular * cos / TOTAL_MASS
    return State(
        position + SECONDS * velocity,
        velocity + SECONDS * linear,
        angle + SECONDS * angular_velocity,
        angular_velocity + SECONDS * angular,
    )


def make() -> Env:
    """CartPole without a time limit: reward 1 for every step; ends when the cart leaves +-2.4 m or the pole +-12
    degrees."""

    def observe(state):
        return jnp.stack(state).astype(jnp.float32)

    def reset(key):
        start = State(*jax.random.uniform(key, (4,), jnp.float32, -0.05, 0.05))
        return start, observe(start)

    def step(key, state, action):
        after = dynamics(state, action)
        fallen = (jnp.abs(after.position) > MAX_POSITION) | (jnp.abs(after.angle) > MAX_ANGLE)
        observation = observe(after)
        return after, TimeStep(observation, jnp.float32(1.0), fallen, jnp.zeros((), bool), observation)

    high = (2 * MAX_POSITION, math.inf, 2 * MAX_ANGLE, math.inf)
    low = tuple(-bound for bound in high)
    return Env("CartPole", reset, step, Box(low, high, (4,)), Discrete(2), render=render)


def render(state: State) -> np.ndarray:
    """The cart, the pole and the track as a picture."""
    view = canvas.View((-2.8, -0.6), (2.8, 1.6), (480, 200))
    picture = canvas.blank(*view.size)
    x, angle = float(state.position), float(state.angle)
    canvas.line(picture, view(-2.8, 0.0), view(2.8, 0.0), width=2, colour=canvas.GREY)
    for edge in (-MAX_POSITION, MAX_POSITION):
        canvas.line(picture, view(edge, -0.12), view(edge, 0.12), width=2, colour=canvas.RED)
    canvas.rectangle(picture, view(x - 0.28, -0.14), view(x + 0.28, 0.14), colour=canvas.BLACK)
    tip = (x + 2 * HALF_LENGTH * math.sin(angle), 0.14 + 2 * HALF_LENGTH * math.cos(angle))
    canvas.line(picture, view(x, 0.14), view(*tip), width=8, colour=canvas.ORANGE)
    canvas.circle(picture, view(x, 0.14), 4, colour=canvas.BLUE)
    return picture
