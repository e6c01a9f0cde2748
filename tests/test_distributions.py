"""Distributions against scipy-free formulas in float64, quadrature and their own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.distributions import Categorical, Gaussian, TanhGaussian

LOGITS = np.array([[0.3, -1.2, 2.0], [0.0, 5.0, -5.0]])
MEAN, LOG_STD = np.array([0.4, -1.0]), np.array([-0.3, 0.5])


def test_categorical_against_numpy():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    policy, other = Categorical(jnp.asarray(LOGITS, jnp.float32)), Categorical(jnp.zeros((2, 3)))
    np.testing.assert_allclose(policy.log_prob(jnp.array([2, 0])), np.log(p[[0, 1], [2, 0]]), rtol=1e-5)
    np.testing.assert_allclose(policy.entropy(), -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(policy.kl(other), (p * np.log(p * 3)).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(policy.mode(), [2, 1])


def test_categorical_draws_have_its_probabilities():
    policy = Categorical(jnp.array([0.3, -1.2, 2.0]))
    noise = policy.noise(jax.random.key(0), (20000, 3))
    draws = Categorical(jnp.broadcast_to(policy.logits, noise.shape)).sample(noise)
    p = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 20000, p, atol=4 * 0.5 / np.sqrt(20000))


def test_forbidden_actions_have_no_probability_and_no_gradient():
    mask = jnp.array([True, False, True])

    def f(logits):
        policy = Categorical(logits).masked(mask)
        return policy.log_prob(jnp.int32(2)) + policy.entropy() + policy.kl(Categorical(jnp.zeros(3)).masked(mask))

    logits = jnp.array([0.5, 9.0, -0.5])
    assert jnp.isfinite(f(logits))
    gradient = jax.grad(f)(logits)
    assert np.isfinite(gradient).all() and gradient[1] == 0.0 and gradient[0] != 0.0
    policy = Categorical(logits).masked(mask)
    assert policy.mode() == 0 and policy.log_prob(jnp.int32(1)) == -jnp.inf
    noise = policy.noise(jax.random.key(0), (500, 3))
    draws = jax.vmap(policy.sample)(noise)
    assert set(np.unique(draws)) == {0, 2}


def test_gaussian_against_numpy():
    policy, other = Gaussian(jnp.asarray(MEAN), jnp.asarray(LOG_STD)), Gaussian(jnp.zeros(2), jnp.zeros(2))
    std, x = np.exp(LOG_STD), np.array([1.0, -0.2])
    expected = np.sum(-0.5 * ((x - MEAN) / std) ** 2 - LOG_STD - 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(policy.log_prob(jnp.asarray(x)), expected, rtol=1e-5)
    np.testing.assert_allclose(policy.entropy(), np.sum(0.5 * np.log(2 * np.pi * np.e * std**2)), rtol=1e-5)
    np.testing.assert_allclose(policy.kl(other), np.sum(0.5 * (std**2 + MEAN**2 - 1) - LOG_STD), rtol=1e-5)
    assert policy.kl(policy) == 0.0
    np.testing.assert_allclose(policy.sample(jnp.array([1.0, -1.0])), MEAN + np.array([1, -1]) * std, rtol=1e-6)


def test_squashed_density_integrates_to_one():
    policy = TanhGaussian(jnp.array([0.4]), jnp.array([-0.3]))
    u = np.linspace(-12, 12, 200_001)
    log_prob = jax.vmap(policy.log_prob)(jnp.asarray(u, jnp.float32)[:, None])
    slope = 1 - np.tanh(u) ** 2  # da = slope du
    np.testing.assert_allclose(np.sum(np.exp(np.asarray(log_prob, np.float64)) * slope) * (u[1] - u[0]), 1.0, rtol=1e-4)


@pytest.mark.parametrize("u", [0.0, 3.0, 20.0, -40.0])
def test_squashed_log_prob_keeps_its_digits(u):
    policy = TanhGaussian(jnp.array([0.0]), jnp.array([0.0]))
    log_slope = 2 * (np.log(2) - np.logaddexp(u, -u))  # log(1 - tanh^2) = -2 log cosh
    expected = -0.5 * u**2 - 0.5 * np.log(2 * np.pi) - log_slope
    np.testing.assert_allclose(policy.log_prob(jnp.array([u])), expected, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda u: policy.log_prob(u))(jnp.array([u]))).all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="noise has shape"):
        Categorical(jnp.zeros((2, 3))).sample(jnp.zeros(3))
    with pytest.raises(ValueError, match="action has shape"):
        Gaussian(jnp.zeros(2), jnp.zeros(2)).log_prob(jnp.zeros(()))
