"""Pendulum: swing a rod up and hold it upright, with a torque too weak to lift it in one go.

Constants and dynamics as Gymnasium's Pendulum-v1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Env, TimeStep

GRAVITY, MASS, LENGTH, SECONDS, MAX_SPEED, MAX_TORQUE = 10.0, 1.0, 1.0, 0.05, 8.0, 2.0


class State(NamedTuple):
    """Scalars: `angle` from upright in rad, anticlockwise; `angular_velocity` in rad/s; the last `torque` in Nm, for
    the picture."""

    angle: jax.Array
    angular_velocity: jax.Array
    torque: jax.Array


def dynamics(state: State, action: jax.Array) -> tuple[State, jax.Array]:
    """The state 0.05 s later and the reward, which counts the state before the step: -(angle^2 + 0.1 angular_velocity^2
    + 0.001 torque^2), the angle in [-pi, pi). `action`: the torque, [1], clipped to +-2 Nm."""
    angle, speed, _ = state
    torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
    nearest = (angle + math.pi) % (2 * math.pi) - math.pi
    reward = -(nearest**2 + 0.1 * speed**2 + 0.001 * torque**2)
    pull = 3 * GRAVITY / (2 * LENGTH) * jnp.sin(angle) + 3.0 / (MASS * LENGTH**2) * torque
    speed = jnp.clip(speed + pull * SECONDS, -MAX_SPEED, MAX_SPEED)
    return State(angle + speed * SECONDS, speed, torque), reward


def make() -> Env:
    """Pendulum without a time limit; it never ends by itself. Observation: cos and sin of the angle, angular
    velocity."""

    def observe(state):
        return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.angular_velocity]).astype(jnp.float32)

    def reset(key):
        angle, speed = jax.random.uniform(key, (2,), jnp.float32, -1.0, 1.0)
        start = State(angle * math.pi, speed, jnp.float32(0.0))
        return start, observe(start)

    def step(key, state, action):
        after, reward = dynamics(state, action)
        observation, never = observe(after), jnp.zeros((), bool)
        return after, TimeStep(observation, reward.astype(jnp.float32), never, never, observation)

    space = Box((-1.0, -1.0, -MAX_SPEED), (1.0, 1.0, MAX_SPEED), (3,))
    return Env("Pendulum", reset, step, space, Box(-MAX_TORQUE, MAX_TORQUE, (1,)), render=render)


def render(state: State) -> np.ndarray:
    """The rod as a picture; a blue arrow shows the torque."""
    view = canvas.View((-1.3, -1.3), (1.3, 1.3), (240, 240))
    picture = canvas.blank(*view.size)
    angle, torque = float(state.angle), float(state.torque)
    tip = (-LENGTH * math.sin(angle), LENGTH * math.cos(angle))
    canvas.line(picture, view(0.0, 0.0), view(*tip), width=16, colour=canvas.RED)
    canvas.circle(picture, view(0.0, 0.0), 5, colour=canvas.BLACK)
    if abs(torque) > 0.02:
        sweep = np.linspace(0.0, torque * math.pi / 2, 24)
        arc = [view(-0.35 * math.sin(a), 0.35 * math.cos(a)) for a in sweep]
        canvas.polyline(picture, arc[:-2], width=2.5, colour=canvas.BLUE)
        canvas.arrow(picture, arc[-3], arc[-2], width=2.5, colour=canvas.BLUE)
    return picture
