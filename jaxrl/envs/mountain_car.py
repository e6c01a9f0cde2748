"""MountainCar: a car in a valley, too weak to drive straight up, has to swing to reach the flag.

Moore, 1990, Efficient memory-based learning for robot control; constants and dynamics as Gymnasium's MountainCar-v0
and MountainCarContinuous-v0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep

MIN_POSITION, MAX_POSITION, MAX_SPEED, GRAVITY = -1.2, 0.6, 0.07, 0.0025
FORCE, GOAL = 0.001, 0.5
CONTINUOUS_FORCE, CONTINUOUS_GOAL = 0.0015, 0.45


class State(NamedTuple):
    """Scalars: `position` along the valley, `velocity` to a step."""

    position: jax.Array
    velocity: jax.Array


def dynamics(state: State, push: jax.Array) -> State:
    """The state a step later under an acceleration `push`; the wall on the left stops the car."""
    velocity = state.velocity + push - GRAVITY * jnp.cos(3 * state.position)
    velocity = jnp.clip(velocity, -MAX_SPEED, MAX_SPEED)
    position = jnp.clip(state.position + velocity, MIN_POSITION, MAX_POSITION)
    stopped = (position <= MIN_POSITION) & (velocity < 0)
    return State(position, jnp.where(stopped, jnp.zeros_like(velocity), velocity))


def make() -> Env:
    """MountainCar without a time limit: reward -1 for every step; actions 0, 1, 2 push left, not at all, right."""

    def push(action):
        return (action - 1) * FORCE, 0.0

    return _make("MountainCar", push, Discrete(3), GOAL, reward=-1.0, prize=0.0)


def make_continuous() -> Env:
    """MountainCarContinuous without a time limit: reward 100 at the flag, less 0.1 action^2 for every step."""

    def push(action):
        return jnp.clip(action[0], -1.0, 1.0) * CONTINUOUS_FORCE, 0.1 * action[0] ** 2

    return _make("MountainCarContinuous", push, Box(-1.0, 1.0, (1,)), CONTINUOUS_GOAL, reward=0.0, prize=100.0)


def _make(name, push, actions, goal, *, reward, prize) -> Env:
    """`push(action)` gives the acceleration and its cost."""

    def observe(state):
        return jnp.stack(state).astype(jnp.float32)

    def reset(key):
        start = State(jax.random.uniform(key, (), jnp.float32, -0.6, -0.4), jnp.float32(0.0))
        return start, observe(start)

    def step(key, state, action):
        acceleration, cost = push(action)
        after = dynamics(state, acceleration)
        there = (after.position >= goal) & (after.velocity >= 0.0)
        observation = observe(after)
        gain = jnp.where(there, prize, 0.0) + reward - cost
        return after, TimeStep(observation, gain.astype(jnp.float32), there, jnp.zeros((), bool), observation)

    space = Box((MIN_POSITION, -MAX_SPEED), (MAX_POSITION, MAX_SPEED), (2,))
    return Env(name, reset, step, space, actions, render=lambda state: render(state, goal=goal))


def height(position):
    """Height of the valley, for pictures."""
    return 0.45 * np.sin(3 * position) + 0.55


def render(state: State, *, goal: float = GOAL) -> np.ndarray:
    """The valley, the car and the flag as a picture."""
    view = canvas.View((MIN_POSITION, 0.0), (MAX_POSITION, 1.2), (450, 300))
    picture = canvas.blank(*view.size)
    places = np.linspace(MIN_POSITION, MAX_POSITION, 80)
    valley = [view(x, height(x)) for x in places]
    canvas.polygon(picture, [*valley, view(MAX_POSITION, -0.1), view(MIN_POSITION, -0.1)], colour=canvas.LIGHT)
    canvas.polyline(picture, valley, width=2, colour=canvas.GREY)
    top = (goal, height(goal) + 0.18)
    canvas.line(picture, view(goal, height(goal)), view(*top), width=2)
    flag = [view(*top), view(goal + 0.09, top[1] - 0.035), view(goal, top[1] - 0.07)]
    canvas.polygon(picture, flag, colour=canvas.RED)
    position = float(state.position)
    slope = math.atan(3 * 0.45 * math.cos(3 * position))

    def place(along, up):
        x = position + along * math.cos(slope) - up * math.sin(slope)
        return view(x, height(position) + along * math.sin(slope) + up * math.cos(slope))

    body = [place(-0.075, 0.03), place(0.075, 0.03), place(0.055, 0.085), place(-0.055, 0.085)]
    canvas.polygon(picture, body, colour=canvas.BLUE)
    for wheel in (-0.045, 0.045):
        canvas.circle(picture, place(wheel, 0.026), 6, colour=canvas.BLACK)
    return picture
