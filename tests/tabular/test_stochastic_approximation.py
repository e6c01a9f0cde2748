"""Robbins-Monro and its cases against worked sequences and against what theory says about their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.tabular import stochastic_approximation as sa


def test_figure_6_4():
    """tanh(w - 1) from w = 3 with a_k = 1 / k, without noise (Zhao 2025)."""
    path = sa.robbins_monro(lambda w, key: jnp.tanh(w - 1.0), 3.0, sa.power_schedule(10), jax.random.key(0))
    expected = [3, 2.0360, 1.6478, 1.4578, 1.3507, 1.2833, 1.2373, 1.2040, 1.1789, 1.1592, 1.1434]
    assert np.abs(np.asarray(path) - expected).max() <= 0.5e-4 + 1e-6


def test_figure_6_3():
    """w^3 - 5 from w = 0: with 1 / k the first steps overshoot without return; 1 / (k + 2) converges as theory says."""
    cubic = lambda w, key: w**3 - 5.0 + jax.random.normal(key)
    root, final = 5.0 ** (1 / 3), {}
    for offset in (0.0, 2.0):
        keys = jax.random.split(jax.random.key(int(offset)), 500)
        sizes = sa.power_schedule(1000, offset=offset)
        final[offset] = jax.vmap(lambda key, sizes=sizes: sa.robbins_monro(cubic, 0.0, sizes, key)[-1])(keys)
    found = jnp.abs(final[0.0] - root) < 1.0  # false for infinities and NaN
    assert found.mean() < 0.03
    slope = 3 * root**2
    theory = (1 / ((2 * slope - 1) * 1000)) ** 0.5
    assert abs(jnp.sqrt(jnp.mean((final[2.0] - root) ** 2)) / theory - 1.0) < 0.15


def test_mean_is_the_mean():
    x = jax.random.normal(jax.random.key(0), (50, 3)) + 2.0
    running = sa.incremental_mean(x)
    expected = jnp.cumsum(x, axis=0) / jnp.arange(1, 51)[:, None]
    assert jnp.allclose(running, expected, atol=1e-5)
    forgetting = sa.incremental_mean(x, jnp.full(50, 0.2).at[0].set(1.0))
    by_hand = x[0]
    for row in x[1:]:
        by_hand = 0.8 * by_hand + 0.2 * row
    assert jnp.allclose(forgetting[-1], by_hand, atol=1e-5)
    # The same as the root of E[w - x], found by Robbins and Monro.
    path = sa.robbins_monro(lambda w, key: w - 1.5, 0.0, sa.power_schedule(4), jax.random.key(0))
    assert path[1:].tolist() == [1.5] * 4


def test_conditions():
    powers = jnp.array([0.0, 0.5, 0.51, 0.75, 1.0, 1.01])
    assert sa.converges(powers).tolist() == [False, False, True, True, True, False]
    assert sa.power_schedule(3, scale=2.0, power=0.5, offset=1.0).tolist() == pytest.approx(
        [2 / 2**0.5, 2 / 3**0.5, 1.0]
    )
    far, near = (sa.step_size_sums(sa.power_schedule(4000, power=power)) for power in (0.75, 2.0))
    assert far[0][-1] > 20 and near[0][-1] < 1.65  # goes far enough, or not
    assert far[1][-1] - far[1][1999] < 0.03  # the squares settle
    constant = sa.step_size_sums(jnp.full(100, 0.1))
    assert jnp.allclose(constant[1][-1], 1.0)


def test_sgd_and_mini_batches():
    """Linear regression: both find the solution; the noise at constant step size falls with the batch."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 2))
    y = x @ jnp.array([1.0, -2.0]) + 0.5 * jax.random.normal(keys[1], (64,))
    gradient = jax.grad(lambda w, example: 0.5 * (example[0] @ w - example[1]) ** 2)
    solution = jnp.linalg.lstsq(x, y)[0]

    def spread(batch):
        path = sa.stochastic_gradient_descent(
            gradient, jnp.zeros(2), (x, y), jnp.full(2500, 0.05), jax.random.key(batch), batch=batch
        )
        assert path.shape == (2501, 2)
        return jnp.square(path[500:] - solution[None]).mean()

    one, eight = spread(1), spread(8)
    assert 5 < one / eight < 12
    exact = sa.stochastic_gradient_descent(gradient, jnp.zeros(2), (x, y), jnp.full(300, 0.3), keys[2], batch=None)
    assert jnp.allclose(exact[-1], solution, atol=1e-5)
    falling = sa.power_schedule(4000, offset=5.0)
    path = sa.stochastic_gradient_descent(gradient, jnp.zeros(2), (x, y), falling, jax.random.key(9), batch=1)
    assert jnp.abs(path[-1] - solution).max() < 0.05


def test_mini_batch_of_a_mean():
    """SGD on (w - x)^2 / 2 with a_k = 1 / k is the mean of the examples drawn."""
    data = jnp.array([1.0, 2.0, 6.0])
    path = sa.stochastic_gradient_descent(
        lambda w, x: w - x, 0.0, data, sa.power_schedule(3000), jax.random.key(0), batch=4
    )
    assert abs(path[-1] - 3.0) < 4 * 2.2 / (3000 * 4) ** 0.5


def test_faults_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"step_sizes has shape \(\), expected \[K\]"):
        sa.robbins_monro(lambda w, key: w, 0.0, jnp.float32(0.1), key)
    with pytest.raises(ValueError, match="3 step sizes for 4 entries"):
        sa.incremental_mean(jnp.zeros(4), jnp.ones(3))
    with pytest.raises(ValueError, match="single number"):
        sa.incremental_mean(jnp.float32(1.0))
    with pytest.raises(ValueError, match="batch is 0"):
        sa.stochastic_gradient_descent(lambda w, x: w, 0.0, jnp.zeros(3), jnp.ones(2), key, batch=0)
