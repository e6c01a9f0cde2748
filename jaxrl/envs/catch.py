"""Catch: a ball falls down a board, a paddle at the bottom moves to meet it.

Mnih et al., 2014, arXiv 1406.6247; rules as in bsuite (Osband et al., 2019, arXiv 1908.03568): the episode ends when
the ball reaches the last row, with reward 1 if it is caught and -1 if not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep


class State(NamedTuple):
    """Scalars, int32: `row` and `column` of the ball, column of the `paddle`."""

    row: jax.Array
    column: jax.Array
    paddle: jax.Array


def make(*, rows: int = 10, columns: int = 5) -> Env:
    """Catch: actions 0, 1, 2 move the paddle left, not at all, right.

    Args:
      rows, columns: of the board. Every ball can be caught if rows > columns / 2.

    Returns:
      Env with float32 observations [rows, columns], 1 at the ball and at the paddle; the optimal return is 1.
    """
    if rows < 2 or columns < 1:
        raise ValueError(f"a board of {rows} x {columns}, expected at least 2 rows and 1 column")

    def observe(state):
        row, column = jnp.arange(rows)[:, None], jnp.arange(columns)[None]
        ball = (row == state.row) & (column == state.column)
        return (ball | (row == rows - 1) & (column == state.paddle)).astype(jnp.float32)

    def reset(key):
        column = jax.random.randint(key, (), 0, columns, jnp.int32)
        start = State(jnp.int32(0), column, jnp.int32(columns // 2))
        return start, observe(start)

    def step(key, state, action):
        paddle = jnp.clip(state.paddle + action - 1, 0, columns - 1).astype(jnp.int32)
        after = State(state.row + 1, state.column, paddle)
        landed = after.row >= rows - 1
        reward = jnp.where(landed, jnp.where(paddle == state.column, 1.0, -1.0), 0.0).astype(jnp.float32)
        observation = observe(after)
        return after, TimeStep(observation, reward, landed, jnp.zeros((), bool), observation)

    def render(state):
        picture = canvas.blank(24 * columns + 8, 24 * rows + 8, canvas.LIGHT)
        canvas.rectangle(picture, (4, 4), (24 * columns + 4, 24 * rows + 4), colour=canvas.WHITE)
        x, y = (24 * int(state.paddle) + 4, 24 * (rows - 1) + 4)
        canvas.rectangle(picture, (x + 1, y + 14), (x + 23, y + 22), colour=canvas.BLUE)
        ball = (24 * int(state.column) + 16, 24 * int(state.row) + 16)
        canvas.circle(picture, ball, 9, colour=canvas.ORANGE)
        return picture

    return Env("Catch", reset, step, Box(0.0, 1.0, (rows, columns)), Discrete(3), render=render)
