"""Features against their definitions, least squares against float64, where linear TD ends up."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.tabular import episodes, gridworld, linear
from jaxrl.tabular import mdp as models
from jaxrl.tabular import temporal_difference as td

POINTS = jnp.array([[0.0, 0.0], [0.3, 0.8], [1.0, 0.5]])


def coordinates(layout):
    return jnp.array(layout.cells) / jnp.array([[layout.rows - 1, layout.columns - 1]])


def test_polynomial_and_fourier():
    y, x = np.asarray(POINTS, np.float64).T
    assert jnp.allclose(linear.polynomial(POINTS, order=1), np.stack([np.ones(3), x, y, x * y], axis=1), atol=1e-6)
    powers = list(itertools.product(range(4), repeat=2))
    expected = np.stack([y**i * x**j for i, j in powers], axis=1)
    assert jnp.allclose(linear.polynomial(POINTS, order=3), expected, atol=1e-6)
    expected = np.stack([np.cos(np.pi * (i * y + j * x)) for i, j in powers], axis=1)
    assert jnp.allclose(linear.fourier(POINTS, order=3), expected, atol=1e-5)
    assert linear.fourier(POINTS[:, None, :], order=2).shape == (3, 1, 9)
    assert jnp.isfinite(jax.grad(lambda p: linear.polynomial(p, order=2).sum())(POINTS)).all()


def test_tile_coding():
    x = jnp.linspace(0.0, 1.0, 201)[:, None]
    features = linear.tile_coding(x, tilings=4, tiles=5)
    assert features.shape == (201, 24) and set(np.unique(features)) == {0, 1}
    assert (features.reshape(201, 4, 6).sum(axis=2) == 1).all()
    shared = features @ features.T  # in how many tilings two points lie in the same tile
    distance = jnp.abs(x - x.T)
    assert (shared[distance < 1e-6] == 4).all() and (shared[distance > 0.2 + 1e-6] == 0).all()
    assert {1, 2, 3} <= set(np.unique(shared).astype(int))
    plane = linear.tile_coding(POINTS, tilings=3, tiles=2)
    assert plane.shape == (3, 27) and (plane.sum(axis=1) == 3).all()
    # Tiling 1 of 3 is shifted by 1/3 of a tile down and 3/3, a whole one, to the right: the same as none.
    assert plane.reshape(3, 3, 3, 3)[1, 1].argmax() == 1
    one_dimension = linear.tile_coding(jnp.array([[0.45], [0.55]]), tilings=2, tiles=2).reshape(2, 2, 3)
    assert one_dimension.argmax(axis=2).tolist() == [[0, 1], [1, 1]]


@pytest.fixture(scope="module")
def grid():
    mdp = gridworld.grid_world()
    policy = models.uniform_policy(mdp)
    stream = episodes.sample_stream(mdp, jax.random.key(0), policy, steps=4000, discount=0.9)
    return mdp, policy, stream


def test_lstd_is_least_squares(grid):
    _, _, stream = grid
    features = linear.polynomial(coordinates(gridworld.ZHAO), order=2)
    phi = np.asarray(features, np.float64)
    a, b = 0.1 * np.eye(9), np.zeros(9)
    for s, r, discount, successor in zip(stream.s_tm1, stream.r_t, stream.discount_t, stream.s_t, strict=True):
        a += np.outer(phi[int(s)], phi[int(s)] - float(discount) * phi[int(successor)])
        b += phi[int(s)] * float(r)
    weights = linear.lstd(stream, features, regularisation=0.1)
    assert np.abs(phi @ np.asarray(weights) - phi @ np.linalg.solve(a, b)).max() < 2e-3


def test_lstd_on_a_table_is_the_empirical_model(grid):
    """Visited often enough, the deterministic grid's model is known but for the policy's frequencies."""
    mdp, policy, stream = grid
    counts = jnp.zeros((25, 5)).at[stream.s_tm1, stream.a_tm1].add(1.0)
    empirical = counts / counts.sum(axis=1, keepdims=True)
    values = linear.lstd(stream, jnp.eye(25))
    assert counts.sum(axis=1).min() > 20
    assert jnp.allclose(values, models.evaluate_policy(mdp, empirical, discount=0.9), atol=1e-3)


def test_stationary_distribution(grid):
    mdp, policy, _ = grid
    d = linear.stationary_distribution(mdp, policy)
    flow = jnp.einsum("s,sa,san->n", d, policy, mdp.transition)
    assert jnp.allclose(flow, d, atol=1e-6) and jnp.allclose(d.sum(), 1.0, atol=1e-5)
    walk = gridworld.random_walk(3)  # terminal, then the middle again: the middle is visited most
    d = linear.stationary_distribution(walk, models.uniform_policy(walk))
    assert jnp.allclose(d, jnp.array([1, 2, 4, 2, 1]) / 10, atol=1e-5)


def test_fixed_point(grid):
    """With a table it is the value itself; with fewer features the best that TD can do, which is not zero error."""
    mdp, policy, _ = grid
    d = linear.stationary_distribution(mdp, policy)
    truth = models.evaluate_policy(mdp, policy, discount=0.9)
    assert jnp.allclose(linear.td_fixed_point(mdp, policy, jnp.eye(25), d, discount=0.9), truth, atol=1e-4)
    errors = []
    for order in (0, 1, 2):
        features = linear.polynomial(coordinates(gridworld.ZHAO), order=order)
        w = linear.td_fixed_point(mdp, policy, features, d, discount=0.9)
        # No expected update there: sum_s d(s) [T_pi v - v](s) features(s) = 0.
        v = features @ w
        expected_update = (d * (models.bellman(mdp, policy, v, discount=0.9) - v)) @ features
        assert jnp.abs(expected_update).max() < 1e-5
        errors.append(float(jnp.sqrt(jnp.mean((v - truth) ** 2))))
    assert errors[0] > errors[1] > errors[2] > 0.05


def test_linear_td_ends_near_the_fixed_point(grid):
    mdp, policy, _ = grid
    features = linear.fourier(coordinates(gridworld.ZHAO), order=1)
    d = linear.stationary_distribution(mdp, policy)
    expected = features @ linear.td_fixed_point(mdp, policy, features, d, discount=0.9)
    run = lambda key: td.prediction(
        mdp, key, policy, discount=0.9, step_size=0.05, episodes=8, max_steps=150, features=features
    )
    weights = jax.vmap(run)(jax.random.split(jax.random.key(1), 40)).values
    assert jnp.sqrt(jnp.mean((features @ weights.mean(axis=0) - expected) ** 2)) < 0.15


def test_linear_control_with_tile_coding():
    """Sarsa and Q-learning with tiles on a walk of 9 states learn to go right."""
    walk = gridworld.random_walk(9)
    features = linear.tile_coding(jnp.linspace(0, 1, 11)[:, None], tilings=2, tiles=5)
    for target in (td.sarsa, td.q_learning):
        learnt = td.control(
            walk, jax.random.key(0), target, discount=0.9, step_size=0.2, epsilon=0.3, episodes=60, features=features
        )
        q = features @ learnt.values
        assert (q[1:-1, 1] > q[1:-1, 0]).all() and learnt.values.shape == (12, 2)


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"points has shape \(\), expected \[..., K\]"):
        linear.fourier(jnp.float32(0.5), order=1)
    with pytest.raises(ValueError, match="order is -1"):
        linear.polynomial(POINTS, order=-1)
    with pytest.raises(ValueError, match="0 tilings of 3 tiles"):
        linear.tile_coding(POINTS, tilings=0, tiles=3)
    with pytest.raises(ValueError, match=r"features has shape \(4,\), expected \[S, D\]"):
        linear.lstd(episodes.Transition(*[jnp.zeros(1, int)] * 7), jnp.zeros(4))
