"""Grid worlds and walks as MDPs: Zhao's 5x5 world, cliff walking, the windy grid world, the random walk.

A state is the cell's number, row by row from the top left. A `Layout` says where things are, for these functions and
for `jaxrl.tabular.picture`; cells are (row, column) from 0.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxrl.tabular.mdp import MDP, make_mdp

UP, RIGHT, DOWN, LEFT, STAY = (-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)
DIAGONAL = ((-1, 1), (1, 1), (1, -1), (-1, -1))

Cell = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a grid looks like. The actions are `moves`, in this order, each (rows down, columns right)."""

    rows: int
    columns: int
    targets: tuple[Cell, ...] = ()
    forbidden: tuple[Cell, ...] = ()
    start: Cell | None = None
    moves: tuple[Cell, ...] = (UP, RIGHT, DOWN, LEFT, STAY)

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a grid of {self.rows} x {self.columns} cells has no cell")
        if not self.moves:
            raise ValueError("moves is empty: expected at least one (rows down, columns right)")
        named = {"targets": self.targets, "forbidden": self.forbidden, "start": (self.start,) if self.start else ()}
        for name, cells in named.items():
            for cell in cells:
                if not self.holds(cell):
                    raise ValueError(
                        f"{name}: {cell} lies outside the {self.rows} x {self.columns} grid; cells are (row, column), "
                        "counted from 0"
                    )
        both = set(self.targets) & set(self.forbidden)
        if both:
            raise ValueError(f"{sorted(both)} stand among both targets and forbidden")

    @property
    def cells(self) -> list[Cell]:
        """All cells in the order of the states."""
        return [(row, column) for row in range(self.rows) for column in range(self.columns)]

    def holds(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.rows and 0 <= cell[1] < self.columns

    def state(self, cell: Cell) -> int:
        """The number of a cell."""
        if not self.holds(cell):
            raise ValueError(f"{cell} lies outside the {self.rows} x {self.columns} grid")
        return cell[0] * self.columns + cell[1]


ZHAO = Layout(5, 5, targets=((3, 2),), forbidden=((1, 1), (1, 2), (2, 2), (3, 1), (3, 3), (4, 1)))
CLIFF = Layout(4, 12, ((3, 11),), tuple((3, c) for c in range(1, 11)), (3, 0), (UP, RIGHT, DOWN, LEFT))
WINDY = Layout(7, 10, ((3, 7),), (), (3, 0), (UP, RIGHT, DOWN, LEFT))
WIND = (0, 0, 0, 1, 1, 1, 2, 2, 1, 0)
"""How many rows the wind of each column of WINDY carries upwards."""


def grid_world(
    layout: Layout = ZHAO,
    *,
    target_reward: float = 1.0,
    forbidden_reward: float = -1.0,
    boundary_reward: float = -1.0,
    step_reward: float = 0.0,
    bounce_enters: bool = False,
    episodic: bool = False,
) -> MDP:
    """Zhao's grid world (Mathematical Foundations of Reinforcement Learning, 2025), on any layout.

    Entering a target pays `target_reward`, a forbidden cell (which may be entered) `forbidden_reward`; staying in a
    cell enters it again. A move off the grid leaves the agent where it is and pays `boundary_reward`. Any other step
    pays `step_reward`. (The Python environment beside the book has other rules: forbidden cells are walls there.)

    Args:
      layout: where things are; `start` None means uniform over all cells but terminal ones.
      target_reward, forbidden_reward, boundary_reward, step_reward: see above.
      bounce_enters: whether a move off the grid counts as entering the cell again, so that it pays for a forbidden
        cell or a target too. The book is of two minds: its tables of epsilon-greedy policies (chapter 5) need True,
        those of chapters 2, 4 and 8 False.
      episodic: whether reaching a target ends the episode. In the book it does not: the agent stays and goes on
        collecting, v(target) = target_reward / (1 - discount).

    Returns:
      MDP with rows * columns states and len(layout.moves) actions.
    """

    def entering(cell):
        return target_reward * (cell in layout.targets) + forbidden_reward * (cell in layout.forbidden)

    def arrive(cell, move):
        target = _add(cell, move)
        if not layout.holds(target):
            return cell, boundary_reward + (entering(cell) if bounce_enters else 0.0)
        special = target in layout.targets or target in layout.forbidden
        return target, entering(target) if special else step_reward

    return _mdp_of(layout, arrive, layout.targets if episodic else ())


def cliff_walking() -> MDP:
    """Cliff walking (Sutton and Barto 2018, example 6.6): -1 a step; the cliff pays -100 and leads back to the start.

    The layout is CLIFF. Episodes end at the goal only. The shortest path returns -13, undiscounted.
    """

    def arrive(cell, move):
        target = _add(cell, move)
        if not CLIFF.holds(target):
            return cell, -1.0
        return (CLIFF.start, -100.0) if target in CLIFF.forbidden else (target, -1.0)

    return _mdp_of(CLIFF, arrive, CLIFF.targets)


def windy_layout(*, kings_moves: bool = False, stay: bool = False) -> Layout:
    """WINDY with its four moves, the four diagonal ones besides if `kings_moves`, and no move at all if `stay`."""
    return dataclasses.replace(WINDY, moves=WINDY.moves + DIAGONAL * kings_moves + (STAY,) * stay)


def windy_grid_world(*, kings_moves: bool = False, stay: bool = False, stochastic: bool = False) -> MDP:
    """The windy grid world (Sutton and Barto 2018, example 6.5, exercises 6.9 and 6.10): -1 a step.

    The wind of the column that is left carries the agent up; the border stops it. The shortest path takes 15 steps, 7
    with king's moves.

    Args:
      kings_moves, stay: as `windy_layout`, which is the layout.
      stochastic: whether the wind, where there is any, is a row weaker or stronger with probability 1/3 each.

    Returns:
      MDP with 70 states and 4, 5, 8 or 9 actions.
    """
    layout = windy_layout(kings_moves=kings_moves, stay=stay)

    def arrive(gust):
        def land(cell, move):
            wind = WIND[cell[1]]
            row = cell[0] + move[0] - wind - (gust if wind else 0)
            column = cell[1] + move[1]
            return (min(max(row, 0), layout.rows - 1), min(max(column, 0), layout.columns - 1)), -1.0

        return land

    gusts = (-1, 0, 1) if stochastic else (0,)
    transition = sum(_arrays_of(layout, arrive(gust))[0] for gust in gusts) / len(gusts)
    return _finish(layout, transition, np.full_like(transition, -1.0), layout.targets)


def random_walk(states: int = 19) -> MDP:
    """The random walk (Sutton and Barto 2018, examples 6.2 and 7.1): a chain with a terminal state at either end.

    Actions 0 and 1 go left and right; under `uniform_policy` this is the walk. State 0 and state `states` + 1 are
    terminal, entering them pays -1 and +1; episodes start in the middle. Undiscounted, state i of 19 is worth
    i / 10 - 1 under the walk.

    Args:
      states: how many states are not terminal; odd, so that there is a middle.

    Returns:
      MDP with `states` + 2 states and 2 actions.
    """
    if states < 1 or states % 2 == 0:
        raise ValueError(f"states is {states}, expected an odd number: episodes start in the middle one")
    every = np.arange(states + 2)
    transition, reward = np.zeros((states + 2, 2, states + 2)), np.zeros((states + 2, 2, states + 2))
    for action, move in enumerate((-1, 1)):
        transition[every, action, np.clip(every + move, 0, states + 1)] = 1.0
    reward[1, 0, 0], reward[states, 1, states + 1] = -1.0, 1.0
    return make_mdp(transition, reward, (every == 0) | (every == states + 1), every == (states + 1) // 2)


def _add(cell: Cell, move: Cell) -> Cell:
    return cell[0] + move[0], cell[1] + move[1]


def _arrays_of(layout: Layout, arrive: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(transition, reward), both [S, A, S], of `arrive`: (cell, move) -> (cell, reward)."""
    states = layout.rows * layout.columns
    transition, reward = np.zeros((states, len(layout.moves), states)), np.zeros((states, len(layout.moves), states))
    for state, cell in enumerate(layout.cells):
        for action, move in enumerate(layout.moves):
            arrived, paid = arrive(cell, move)
            transition[state, action, layout.state(arrived)] = 1.0
            reward[state, action, layout.state(arrived)] = paid
    return transition, reward


def _mdp_of(layout, arrive, ends) -> MDP:
    return _finish(layout, *_arrays_of(layout, arrive), ends)


def _finish(layout, transition, reward, ends) -> MDP:
    terminal = np.isin(np.arange(transition.shape[0]), [layout.state(cell) for cell in ends])
    start = None if layout.start is None else np.arange(transition.shape[0]) == layout.state(layout.start)
    return make_mdp(transition, reward, terminal, start)
