"""The worlds themselves: single moves and what they pay, layouts, pictures."""

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from jaxrl.tabular import gridworld, picture
from jaxrl.tabular import mdp as models

UP, RIGHT, DOWN, LEFT, STAY = range(5)


def go(mdp, layout, cell, action):
    """(cell reached, reward) of a sure move."""
    state = layout.state(cell)
    successor = int(mdp.transition[state, action].argmax())
    assert mdp.transition[state, action, successor] == 1
    return layout.cells[successor], float(mdp.reward[state, action, successor])


@pytest.mark.parametrize("bounce_enters, in_forbidden", [(False, -3.0), (True, -13.0)])
def test_zhao(bounce_enters, in_forbidden):
    mdp = gridworld.grid_world(
        target_reward=1.0, forbidden_reward=-10.0, boundary_reward=-3.0, step_reward=-0.5, bounce_enters=bounce_enters
    )
    move = lambda cell, action: go(mdp, gridworld.ZHAO, cell, action)
    assert mdp.transition.shape == (25, 5, 25) and not mdp.terminal.any() and jnp.allclose(mdp.start, 0.04)
    assert move((0, 0), RIGHT) == ((0, 1), -0.5)
    assert move((0, 0), STAY) == ((0, 0), -0.5)
    assert move((0, 0), UP) == ((0, 0), -3.0)
    assert move((0, 1), DOWN) == ((1, 1), -10.0)
    assert move((1, 1), STAY) == ((1, 1), -10.0)
    assert move((1, 1), LEFT) == ((1, 0), -0.5)
    assert move((4, 2), UP) == ((3, 2), 1.0) and move((3, 2), STAY) == ((3, 2), 1.0)
    assert move((4, 1), DOWN) == ((4, 1), in_forbidden)


def test_episodic_from_one_cell():
    layout = gridworld.Layout(2, 3, ((0, 2),), ((1, 1),), (1, 0))
    mdp = gridworld.grid_world(layout, episodic=True)
    assert mdp.terminal.tolist() == [False, False, True, False, False, False]
    assert mdp.start.tolist() == [0, 0, 0, 1, 0, 0]


def test_cliff():
    mdp, layout = gridworld.cliff_walking(), gridworld.CLIFF
    assert go(mdp, layout, (3, 0), RIGHT) == ((3, 0), -100)
    assert go(mdp, layout, (2, 5), DOWN) == ((3, 0), -100)
    assert go(mdp, layout, (2, 11), DOWN) == ((3, 11), -1)
    assert go(mdp, layout, (3, 0), LEFT) == ((3, 0), -1)
    assert mdp.terminal.nonzero()[0].tolist() == [47] and mdp.start.argmax() == 36


def test_wind():
    mdp, layout = gridworld.windy_grid_world(), gridworld.WINDY
    assert go(mdp, layout, (3, 2), RIGHT) == ((3, 3), -1)  # no wind where it came from
    assert go(mdp, layout, (3, 3), RIGHT) == ((2, 4), -1)
    assert go(mdp, layout, (3, 6), RIGHT) == ((1, 7), -1)
    assert go(mdp, layout, (1, 6), UP) == ((0, 6), -1)
    assert go(mdp, layout, (4, 8), LEFT) == ((3, 7), -1) and mdp.terminal[layout.state((3, 7))]
    kings = gridworld.windy_layout(kings_moves=True, stay=True)
    mdp = gridworld.windy_grid_world(kings_moves=True, stay=True)
    assert mdp.actions == len(kings.moves) == 9
    assert go(mdp, kings, (3, 3), kings.moves.index((1, 1))) == ((3, 4), -1)
    assert go(mdp, kings, (3, 6), kings.moves.index((0, 0))) == ((1, 6), -1)
    gusty = gridworld.windy_grid_world(kings_moves=True, stochastic=True)
    landing = gusty.transition[layout.state((3, 6)), RIGHT]
    assert jnp.allclose(landing[jnp.array([layout.state((row, 7)) for row in (0, 1, 2)])], 1 / 3)
    assert gusty.transition[layout.state((3, 0)), RIGHT, layout.state((3, 1))] == 1


def test_random_walk():
    mdp = gridworld.random_walk(5)
    assert mdp.transition.shape == (7, 2, 7) and mdp.start.argmax() == 3
    assert mdp.transition[3, 0, 2] == mdp.transition[3, 1, 4] == 1
    assert mdp.reward[1, 0, 0] == -1 and mdp.reward[5, 1, 6] == 1 and jnp.abs(mdp.reward).sum() == 2
    assert mdp.terminal.tolist() == [True] + 5 * [False] + [True]
    with pytest.raises(ValueError, match="states is 4, expected an odd number"):
        gridworld.random_walk(4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 3), "0 x 3 cells has no cell"),
        ((2, 2, ((2, 0),)), r"targets: \(2, 0\) lies outside"),
        ((2, 2, ((1, 0),), ((1, 0),)), "among both targets and forbidden"),
        ((2, 2, (), (), (0, 5)), r"start: \(0, 5\) lies outside"),
        ((2, 2, (), (), None, ()), "moves is empty"),
    ],
)
def test_layouts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        gridworld.Layout(*arguments)
    with pytest.raises(ValueError, match=r"\(5, 0\) lies outside the 5 x 5 grid"):
        gridworld.ZHAO.state((5, 0))


def test_picture(tmp_path):
    layout, mdp = gridworld.ZHAO, gridworld.grid_world()
    values, policy = np.arange(25.0), models.deterministic_policy(mdp, STAY).at[7].set(jnp.eye(5)[RIGHT])
    axes = picture.draw_grid(layout, values, policy, title="title", path=tmp_path / "grid.png")
    assert matplotlib.image.imread(tmp_path / "grid.png").std() > 0.05
    written = [text.get_text() for text in axes.texts]
    assert written.count("24.0") == 1 and axes.get_title() == "title"
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    (arrow,) = arrows  # the others stay: rings
    assert arrow.xyann == pytest.approx((2, 1 - 0.12)) and arrow.xy[0] > 2.2
    assert len(axes.lines) == 24
    bare = picture.draw_grid(gridworld.CLIFF)
    assert [text.get_text() for text in bare.texts] == ["S"]
    for wrong, message in (((np.zeros(24),), r"values has shape \(24,\)"), ((None, np.zeros((25, 4))), "policy has")):
        with pytest.raises(ValueError, match=message):
            picture.draw_grid(layout, *wrong)
