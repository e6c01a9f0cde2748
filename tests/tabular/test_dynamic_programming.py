"""Planning against the printed tables of Zhao's book (chapters 2 to 8), counts of sweeps, and worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.tabular import dynamic_programming as planning
from jaxrl.tabular import gridworld, make_mdp
from jaxrl.tabular import mdp as models

# Figures 3.4(a) and 7.4(b): forbidden cells cost 1.
OPTIMAL = """
     5.8 5.6  6.2  6.5 5.8
     6.5 7.2  8.0  7.2 6.5
     7.2 8.0 10.0  8.0 7.2
     8.0 10.0 10.0 10.0 8.0
     7.2 9.0 10.0  9.0 8.1"""
# Figures 2.7(a), 3.4(d), 4.4(h), 5.6(a): forbidden cells cost 10.
OPTIMAL_10 = """
     3.5 3.9  4.3  4.8 5.3
     3.1 3.5  4.8  5.3 5.9
     2.8 2.5 10.0  5.9 6.6
     2.5 10.0 10.0 10.0 7.3
     2.3 9.0 10.0  9.0 8.1"""
# Figure 2.7(b), always to the right.
RIGHT = """
    -6.6 -7.3 -8.1 -9.0 -10.0
    -8.5 -8.3 -8.1 -9.0 -10.0
    -7.5 -8.3 -8.1 -9.0 -10.0
    -7.5 -7.2 -9.1 -9.0 -10.0
    -7.6 -7.3 -8.1 -9.0 -10.0"""
# Figure 8.6(b), all actions alike.
UNIFORM = """
    -3.8 -3.8 -3.6 -3.1 -3.2
    -3.8 -3.8 -3.8 -3.1 -2.9
    -3.6 -3.9 -3.4 -3.2 -2.9
    -3.9 -3.6 -3.4 -2.9 -3.2
    -4.5 -4.2 -3.4 -3.4 -3.5"""
# Chapter 5: the best policy of those with epsilon 0.1.
EPSILON = """
     0.4  0.5 0.9 1.3 1.4
     0.1  0.0 0.5 1.3 1.7
     0.1 -0.4 3.4 1.4 1.9
    -0.1  3.4 3.3 3.7 2.2
    -0.3  2.6 3.7 3.1 2.7"""


def check(values, printed, shape=(5, 5)):
    """Equal to the digit: within half of the last one."""
    printed = np.array(printed.split(), float).reshape(shape)
    assert np.abs(np.asarray(values).reshape(shape) - printed).max() <= 0.05 + 1e-4


@pytest.fixture(scope="module")
def mild():
    return gridworld.grid_world()


@pytest.fixture(scope="module")
def harsh():
    return gridworld.grid_world(forbidden_reward=-10.0)


def test_optimal_values(mild, harsh):
    check(planning.value_iteration(mild, discount=0.9).values, OPTIMAL)
    check(planning.value_iteration(harsh, discount=0.9).values, OPTIMAL_10)
    exact = planning.value_iteration(mild, discount=0.9).values[:5]
    assert jnp.allclose(exact, jnp.array([5.832, 5.58, 6.2, 6.48, 5.832]), atol=2e-5)


def test_shorter_sight(mild):
    half = planning.value_iteration(mild, discount=0.5, tolerance=1e-9).values.reshape(5, 5)
    assert jnp.allclose(half[0], 2.0 ** -jnp.arange(9.0, 4.0, -1.0), rtol=1e-5)
    assert jnp.allclose(half[2], jnp.array([0.0005, 0.0002, 2.0, 0.0625, 0.125]), atol=5e-5)
    assert jnp.allclose(half[3], jnp.array([0.0002, 2.0, 2.0, 2.0, 0.25]), atol=5e-5)
    blind = planning.value_iteration(mild, discount=0.0).values.reshape(5, 5)
    assert jnp.argwhere(blind == 1.0).tolist() == [[2, 2], [3, 1], [3, 2], [3, 3], [4, 2]] and blind.sum() == 5


def test_values_of_two_policies(mild):
    check(models.evaluate_policy(mild, models.deterministic_policy(mild, 1), discount=0.9), RIGHT)
    uniform = models.evaluate_policy(mild, models.uniform_policy(mild), discount=0.9)
    check(uniform, UNIFORM)
    assert abs(uniform[0] + 3.8463) < 1e-4


def test_best_epsilon_greedy_policy():
    mdp = gridworld.grid_world(forbidden_reward=-10.0, bounce_enters=True)
    solution = planning.value_iteration(mdp, discount=0.9, epsilon=0.1)
    check(solution.values, EPSILON)
    assert jnp.allclose(models.evaluate_policy(mdp, solution.policy, discount=0.9), solution.values, atol=2e-5)


def test_ties_are_where_the_book_has_them(mild, harsh):
    for mdp, cells in ((mild, [(0, 4), (1, 4), (2, 0), (2, 1), (2, 3), (2, 4)]), (harsh, [(0, 3), (1, 3)])):
        q = planning.value_iteration(mdp, discount=0.9).action_values
        best = (models.greedy(q, ties=1e-4) > 0).sum(axis=1)
        twice = [cell for cell, number in zip(gridworld.ZHAO.cells, best.tolist(), strict=True) if number > 1]
        assert twice == cells and best.max() == 2


def test_two_by_two():
    """Figure 4.2: forbidden top right, target bottom right."""
    mdp = gridworld.grid_world(gridworld.Layout(2, 2, ((1, 1),), ((0, 1),)))
    first = planning.value_iteration(mdp, discount=0.9, max_iterations=1)
    assert first.values.tolist() == [0, 1, 1, 1] and first.iterations == 1
    second = planning.value_iteration(mdp, discount=0.9, max_iterations=2)
    assert jnp.allclose(second.values, jnp.array([0.9, 1.9, 1.9, 1.9]))
    assert second.policy.argmax(axis=1).tolist() == [2, 2, 1, 4]
    q = models.action_values(mdp, jnp.zeros(4), discount=0.9)
    assert q.tolist() == [[-1, -1, 0, -1, 0], [-1, -1, 1, 0, -1], [0, 1, -1, -1, 0], [-1, -1, -1, 0, 1]]


def test_two_states():
    """Example of section 4.2: left, stay, right; the target is the right one."""
    layout = gridworld.Layout(1, 2, ((0, 1),), moves=(gridworld.LEFT, gridworld.STAY, gridworld.RIGHT))
    mdp = gridworld.grid_world(layout)
    left = models.deterministic_policy(mdp, 0)
    values = models.evaluate_policy(mdp, left, discount=0.9)
    assert jnp.allclose(values, jnp.array([-10.0, -9.0]), atol=1e-5)
    q = models.action_values(mdp, values, discount=0.9)
    assert jnp.allclose(q, jnp.array([[-10, -9, -7.1], [-9, -7.1, -9.1]]), atol=1e-5)
    v = jnp.zeros(2)
    for expected in ([-1, 0], [-1.9, -0.9], [-2.71, -1.71]):
        v = models.bellman(mdp, left, v, discount=0.9)
        assert jnp.allclose(v, jnp.array(expected), atol=1e-6)
    found = planning.policy_iteration(mdp, left, discount=0.9)
    assert jnp.allclose(found.values, 10.0, atol=1e-5) and found.iterations == 2  # the second changed nothing


def test_iteration_counts():
    """In float64, so that the last digits of the tolerance mean something."""
    with jax.enable_x64(True):
        for forbidden, counts in ((-1.0, (6, 7)), (-10.0, (9, 11))):
            mdp = gridworld.grid_world(forbidden_reward=forbidden)
            loose = planning.value_iteration(mdp, discount=0.9, tolerance=1e-3)
            tight = planning.value_iteration(mdp, discount=0.9, tolerance=1e-6)
            assert (loose.iterations, tight.iterations) == (67, 133)
            starts = [models.deterministic_policy(mdp, action) for action in (4, 0)]
            found = [planning.policy_iteration(mdp, policy, discount=0.9) for policy in starts]
            assert tuple(int(solution.iterations) for solution in found) == counts
            best = found[0].values
            assert abs(float(jnp.abs(loose.values - best).max()) - 0.0086) < 1e-4
        mdp = gridworld.grid_world()
        best = planning.policy_iteration(mdp, models.deterministic_policy(mdp, 4), discount=0.9).values
        for sweeps, expected in ((1, 153), (3, 51), (10, 16)):
            values, count = jnp.zeros(25), 0
            while jnp.abs(values - best).max() >= 1e-6:
                values = planning.truncated_policy_iteration(
                    mdp, discount=0.9, sweeps=sweeps, max_iterations=1, values=values
                ).values
                count += 1
            assert count == expected


def test_changes_shrink_by_the_discount(mild):
    solution = planning.value_iteration(mild, discount=0.9, tolerance=1e-3)
    made = solution.changes[: int(solution.iterations)]
    assert made.size == 67 and jnp.isnan(solution.changes[67:]).all()
    assert (made[1:] <= 0.9 * made[:-1] + 1e-5).all() and jnp.allclose(made[-1] / made[-2], 0.9, atol=2e-3)


def test_improvement_is_monotone(harsh):
    policy = models.deterministic_policy(harsh, 4)
    values = models.evaluate_policy(harsh, policy, discount=0.9)
    for _ in range(4):
        step = planning.policy_iteration(harsh, policy, discount=0.9, max_iterations=1)
        assert (step.values >= values - 1e-4).all()
        policy, values = step.policy, step.values


def test_walks_and_winds():
    walk = gridworld.random_walk()
    values = models.evaluate_policy(walk, models.uniform_policy(walk), discount=1.0)
    assert jnp.allclose(values[1:-1], jnp.arange(-9, 10) / 10, atol=1e-5) and values[0] == values[-1] == 0
    best = lambda mdp, state: planning.value_iteration(mdp, discount=1.0).values[state]
    assert best(gridworld.cliff_walking(), gridworld.CLIFF.state((3, 0))) == -13
    start = gridworld.WINDY.state((3, 0))
    assert best(gridworld.windy_grid_world(), start) == -15
    assert jnp.allclose(best(gridworld.windy_grid_world(kings_moves=True), start), -7, atol=1e-5)
    assert jnp.allclose(best(gridworld.windy_grid_world(kings_moves=True, stay=True), start), -7, atol=1e-5)


def test_vmap_over_discounts(mild):
    discounts = jnp.array([0.0, 0.5, 0.9])
    many = jax.vmap(lambda discount: planning.value_iteration(mild, discount=discount))(discounts)
    one = planning.value_iteration(mild, discount=0.5)
    assert jnp.allclose(many.values[1], one.values, atol=1e-6) and many.iterations[1] == one.iterations


def test_random_mdp_all_three_agree():
    rng = np.random.default_rng(0)
    mdp = make_mdp(rng.dirichlet(np.ones(7), size=(7, 3)), rng.normal(size=(7, 3)), np.arange(7) == 6)
    by_value = planning.value_iteration(mdp, discount=0.8)
    by_policy = planning.policy_iteration(mdp, models.uniform_policy(mdp), discount=0.8)
    truncated = planning.truncated_policy_iteration(mdp, discount=0.8, sweeps=3)
    assert jnp.allclose(by_value.values, by_policy.values, atol=1e-5)
    assert jnp.allclose(truncated.values, by_policy.values, atol=1e-5)
    with pytest.raises(ValueError, match="sweeps is 0"):
        planning.truncated_policy_iteration(mdp, discount=0.8, sweeps=0)
