"""Averages of returns against plain loops, MC Basic against its tables, control against planning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.returns import discounted_returns
from jaxrl.tabular import dynamic_programming, episodes, gridworld, make_mdp, monte_carlo
from jaxrl.tabular import mdp as models
from tests.oracles import tabular as oracle

# Figure 5.4: MC Basic with episodes of 15 steps, forbidden cells cost 10.
FIFTEEN = """
    1.4 1.8 2.2 2.7 3.3
    1.1 1.4 2.7 3.3 3.8
    0.8 0.5 7.9 3.8 4.5
    0.5 7.9 7.9 7.9 5.2
    0.2 6.9 7.9 6.9 6.0"""


def test_mc_basic_tables():
    """The values are those of as many sweeps of value iteration as episodes have steps."""
    mdp = gridworld.grid_world(forbidden_reward=-10.0)
    found = monte_carlo.basic(mdp, jax.random.key(0), discount=0.9, length=15, iterations=16)
    values = found.action_values.max(axis=1)
    assert np.abs(np.asarray(values) - np.array(FIFTEEN.split(), float)).max() <= 0.05 + 1e-4
    swept = dynamic_programming.value_iteration(mdp, discount=0.9, max_iterations=15, tolerance=0.0)
    assert jnp.allclose(values, swept.values, atol=1e-5)
    assert jnp.allclose(found.policy.sum(axis=1), 1.0) and (found.counts == 1).all()


def test_mc_basic_stops_where_episodes_end():
    walk = gridworld.random_walk(3)
    found = monte_carlo.basic(walk, jax.random.key(0), discount=0.5, length=6, iterations=4)
    assert jnp.allclose(found.action_values[1:-1, 1], jnp.array([0.25, 0.5, 1.0]))
    assert (found.action_values[jnp.array([0, 4])] == 0).all()


@pytest.mark.parametrize("first_visit", [True, False])
def test_visits_and_returns_are_the_textbook(first_visit):
    rng = np.random.default_rng(0)
    mdp = make_mdp(rng.dirichlet(np.ones(4), size=(4, 2)), rng.normal(size=(4, 2)), np.arange(4) == 3)
    for seed in range(2):
        stream = episodes.sample_stream(mdp, jax.random.key(seed), models.uniform_policy(mdp), steps=25, discount=0.9)
        length = int(np.argmax(np.asarray(stream.last))) + 1
        episode = [(int(s), int(a), float(r)) for s, a, r in zip(*stream[:3], strict=True)][:length]
        expected = oracle.monte_carlo_averages(episode, 4, 2, discount=0.9, first_visit=first_visit)
        pair = stream.s_tm1 * 2 + stream.a_tm1
        counted = monte_carlo._counted(pair, monte_carlo._alive(stream), 8, first_visit)
        returns = discounted_returns(stream.r_t, stream.discount_t)
        got = [jnp.zeros(8).at[pair].add(counted * x).reshape(4, 2) for x in (returns, 1.0)]
        assert jnp.allclose(got[0], expected[0], atol=1e-5) and (got[1] == expected[1]).all()


def test_short_returns_can_be_left_out():
    endless = make_mdp(np.ones((1, 1, 1)), np.ones((1, 1, 1)))
    run = {"discount": 0.5, "episodes": 2, "length": 12, "first_visit": False}
    values, counts = monte_carlo.prediction(endless, jax.random.key(0), jnp.ones((1, 1)), **run)
    kept, fewer = monte_carlo.prediction(endless, jax.random.key(0), jnp.ones((1, 1)), tail=8, **run)
    assert (counts[0], fewer[0]) == (24, 8)
    assert values[0] < 1.9 and abs(kept[0] - 2.0) < 2 * 0.5**8
    # An episode that ended by itself counts whole.
    walk = gridworld.random_walk(1)
    _, counts = monte_carlo.prediction(walk, jax.random.key(0), models.uniform_policy(walk), **run, tail=11)
    assert counts.tolist() == [0, 2, 0]


@pytest.mark.slow
def test_prediction_error_falls_as_one_over_root_n():
    walk = gridworld.random_walk(5)
    policy = models.uniform_policy(walk)
    truth = models.evaluate_policy(walk, policy, discount=1.0)
    sizes, errors = (30, 600), []
    for size in sizes:
        run = lambda key, size=size: monte_carlo.prediction(walk, key, policy, discount=1.0, episodes=size, length=60)[
            0
        ]
        values = jax.vmap(run)(jax.random.split(jax.random.key(size), 40))
        errors.append(float(jnp.sqrt(jnp.mean((values - truth[None]) ** 2))))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.1


def test_off_policy_prediction():
    walk = gridworld.random_walk(3)
    policy = jnp.tile(jnp.array([0.3, 0.7]), (5, 1))
    truth = models.evaluate_policy(walk, policy, discount=1.0)
    run = {"discount": 1.0, "episodes": 2500, "length": 25}
    for weighted in (True, False):
        values, _ = monte_carlo.prediction(
            walk, jax.random.key(1), policy, behaviour=models.uniform_policy(walk), weighted=weighted, **run
        )
        assert jnp.abs(values - truth).max() < 0.1
    followed = models.evaluate_policy(walk, models.uniform_policy(walk), discount=1.0)
    assert jnp.abs(followed - truth).max() > 0.3  # what it would be without the ratios


def test_control_on_a_small_grid():
    """Exploring starts find the optimum, epsilon-greedy the best policy that keeps exploring."""
    mdp = gridworld.grid_world(gridworld.Layout(2, 2, ((1, 1),), ((0, 1),)))
    run = {"discount": 0.8, "episodes": 1200, "length": 25}
    best = dynamic_programming.value_iteration(mdp, discount=0.8)
    found = monte_carlo.exploring_starts(mdp, jax.random.key(0), **run)
    assert jnp.allclose(models.evaluate_policy(mdp, found.policy, discount=0.8), best.values, atol=1e-3)
    soft = dynamic_programming.value_iteration(mdp, discount=0.8, epsilon=0.3)
    for first_visit in (True, False):
        found = monte_carlo.epsilon_greedy(mdp, jax.random.key(0), epsilon=0.3, first_visit=first_visit, tail=15, **run)
        values = models.evaluate_policy(mdp, found.policy, discount=0.8)
        assert jnp.allclose(values, soft.values, atol=1e-3) and (best.values - values).max() > 0.5
        assert jnp.abs(found.action_values.max(axis=1) - soft.action_values.max(axis=1)).max() < 0.5
    with pytest.raises(ValueError, match="0 episodes of 3 steps"):
        monte_carlo.exploring_starts(mdp, jax.random.key(0), discount=0.8, episodes=0, length=3)
    with pytest.raises(ValueError, match=r"values has shape \(4,\), expected \[S, A\] = \[4, 5\]"):
        monte_carlo.exploring_starts(mdp, jax.random.key(0), values=jnp.zeros(4), **run)


@pytest.mark.slow
def test_exploring_starts_on_the_5x5_grid():
    mdp = gridworld.grid_world()
    best = dynamic_programming.value_iteration(mdp, discount=0.9).values
    found = monte_carlo.exploring_starts(mdp, jax.random.key(1), discount=0.9, episodes=10_000, length=40)
    assert jnp.abs(models.evaluate_policy(mdp, found.policy, discount=0.9) - best).max() < 0.5
