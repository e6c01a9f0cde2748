"""Finite MDPs as environments; grid worlds with a picture."""

from collections.abc import Callable

import jax
import numpy as np

from jaxrl.envs import canvas
from jaxrl.envs.env import Discrete, Env, TimeStep
from jaxrl.tabular import mdp as tabular
from jaxrl.tabular.gridworld import Layout
from jaxrl.tabular.mdp import MDP


def from_mdp(mdp: MDP, *, name: str = "MDP", render: Callable | None = None) -> Env:
    """An MDP as an environment: states and observations are state numbers, int32 [].

    Args:
      mdp: transition and reward [S, A, S], terminal and start [S].
      name: of the environment.
      render: `(state) -> uint8 [height, width, 3]`, or None.

    Returns:
      Env over `Discrete(S)` and `Discrete(A)`. An MDP without terminal states needs a time limit.
    """

    def reset(key):
        state = tabular.draw(key, mdp.start)
        return state, state

    def step(key, state, action):
        after, reward, terminated = tabular.step(key, mdp, state, action)
        never = jax.numpy.zeros((), bool)
        return after, TimeStep(after, reward.astype(jax.numpy.float32), terminated, never, after)

    return Env(name, reset, step, Discrete(mdp.states), Discrete(mdp.actions), render=render)


def grid_world(layout: Layout, mdp: MDP, *, name: str = "GridWorld", cell: int = 48) -> Env:
    """`from_mdp` with a picture of the grid: forbidden cells orange, targets blue, the agent a disc."""
    if mdp.states != layout.rows * layout.columns:
        raise ValueError(
            f"the layout has {layout.rows} x {layout.columns} cells, the MDP {mdp.states} states: expected one each"
        )

    def render(state) -> np.ndarray:
        picture = canvas.blank(cell * layout.columns + 2, cell * layout.rows + 2, canvas.GREY)
        for row, column in layout.cells:
            colour = canvas.WHITE
            if (row, column) in layout.forbidden:
                colour = (245, 214, 178)
            elif (row, column) in layout.targets:
                colour = (172, 204, 240)
            corner = (cell * column + 2, cell * row + 2)
            canvas.rectangle(picture, corner, (corner[0] + cell - 2, corner[1] + cell - 2), colour=colour)
        row, column = divmod(int(state), layout.columns)
        centre = (cell * column + 1 + cell / 2, cell * row + 1 + cell / 2)
        canvas.circle(picture, centre, cell * 0.3, colour=canvas.BLACK)
        return picture

    return from_mdp(mdp, name=name, render=render)
