"""Losses of DDPG, TD3 and SAC against the formulas in numpy, their gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import continuous
from tests.oracles.losses_group import gradient

RNG = np.random.default_rng(0)
B, K, A = 5, 2, 3
Q, QA = RNG.normal(size=(K, B)), RNG.normal(size=(K, B, A))
LOG_PROB = RNG.normal(size=B)
PROBS = RNG.dirichlet(np.ones(A), size=B)


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-6, **kwargs})


def test_deterministic_policy_gradient_is_the_chain_rule():
    """On mu(s) = tanh(w s), q(s, a) = -(a - s)^2: the gradient of -q(s, mu(s)) by finite differences."""
    s, w = RNG.normal(size=(B, 2)), RNG.normal(size=(2,))
    mu = lambda w: jnp.tanh(w * jnp.float32(s))
    dq_da = lambda a: -2 * (a - jnp.float32(s))
    loss = lambda w: continuous.deterministic_policy_gradient(mu(w), dq_da(mu(w))).sum()
    expected = gradient(lambda w: np.sum((np.tanh(w * s) - s) ** 2), w)
    with jax.numpy_rank_promotion("allow"):
        assert_close(jax.grad(loss)(jnp.float32(w)), expected, rtol=1e-4)


def test_deterministic_policy_gradient_leaves_the_critic_alone():
    a, g = jnp.float32(RNG.normal(size=(B, A))), jnp.float32(RNG.normal(size=(B, A)))
    assert not jax.grad(lambda g: continuous.deterministic_policy_gradient(a, g).sum())(g).any()
    clipped = -jax.grad(lambda a: continuous.deterministic_policy_gradient(a, g, clip=0.5).sum())(a)
    norms = np.linalg.norm(np.asarray(g), axis=1, keepdims=True)
    assert_close(clipped, g * np.minimum(1, 0.5 / norms))
    assert (norms > 0.5).any()
    free = continuous.deterministic_policy_gradient(a, jnp.zeros((B, A)), clip=1.0)
    assert not jnp.isnan(
        jax.grad(lambda a: continuous.deterministic_policy_gradient(a, 0 * a, clip=1.0).sum())(a)
    ).any()
    assert not free.any()


def test_soft_values():
    assert_close(continuous.smallest(Q), Q.min(0))
    assert_close(continuous.soft_value(Q, LOG_PROB, 0.3), Q.min(0) - 0.3 * LOG_PROB)
    loops = [sum(PROBS[b, a] * (QA[:, b, a].min() - 0.3 * np.log(PROBS[b, a])) for a in range(A)) for b in range(B)]
    assert_close(continuous.expected_soft_value(QA, np.log(PROBS), 0.3), loops)
    assert_close(continuous.expected_soft_actor(QA, np.log(PROBS), 0.3), -np.array(loops))
    assert_close(continuous.soft_actor(Q, LOG_PROB, 0.3), 0.3 * LOG_PROB - Q.min(0))


def test_impossible_actions_add_nothing():
    log_probs = jnp.log(jnp.array([[0.25, 0.75, 0.0]]))
    q = jnp.array([[[1.0, 2.0, 100.0]]])
    expected = 0.25 * (1 - 0.1 * np.log(0.25)) + 0.75 * (2 - 0.1 * np.log(0.75))
    assert_close(continuous.expected_soft_value(q, log_probs, 0.1), [expected])
    logits = jnp.array([[0.1, 0.2, -jnp.inf]])
    slope = jax.grad(lambda z: continuous.expected_soft_actor(q, jax.nn.log_softmax(z), 0.1).sum())(logits)
    assert jnp.isfinite(slope).all()


def test_actor_gradients():
    """Through the action and its log-prob only: neither temperature nor (counted actions) critics."""
    q, log_probs = jnp.float32(QA), jnp.log(jnp.float32(PROBS))
    by = jax.grad(lambda *x: continuous.expected_soft_actor(*x).sum(), (0, 1, 2))(q, log_probs, 0.3)
    assert not by[0].any()
    assert by[1].any()
    assert not by[2]
    by = jax.grad(lambda *x: continuous.soft_actor(*x).sum(), (0, 1, 2))(jnp.float32(Q), jnp.float32(LOG_PROB), 0.3)
    assert_close(by[0], -(Q == Q.min(0)).astype(float))
    assert_close(by[1], np.full(B, 0.3))
    assert not by[2]
    expected = gradient(
        lambda z: (
            -sum((p := np.exp(z[b]) / np.exp(z[b]).sum()) @ (QA[:, b].min(0) - 0.3 * np.log(p)) for b in range(B))
        ),
        np.log(PROBS),
    )
    logits = lambda z: continuous.expected_soft_actor(q, jax.nn.log_softmax(z), 0.3).sum()
    assert_close(jax.grad(logits)(log_probs), expected, rtol=1e-4, atol=1e-5)


def test_the_best_counted_policy_is_a_softmax():
    """pi = softmax(q / alpha) has soft value alpha logsumexp(q / alpha) and is where the actor's gradient vanishes."""
    q, alpha = jnp.float32(QA[:1, 0]), 0.7
    log_pi = jax.nn.log_softmax(q[0] / alpha)
    best = alpha * jax.nn.logsumexp(q[0] / alpha)
    assert_close(continuous.expected_soft_value(q, log_pi, alpha), best)
    slope = jax.grad(lambda z: continuous.expected_soft_actor(q, jax.nn.log_softmax(z), alpha))(q[0] / alpha)
    assert_close(slope, np.zeros(A))


def test_temperature_rises_while_entropy_lacks():
    loss = lambda t, h: continuous.temperature_loss(t, h, -1.0)
    assert_close(loss(jnp.log(0.2), jnp.array([0.5, -2.0])), [0.2 * 1.5, 0.2 * -1.0])
    slope = jax.grad(lambda t, h: loss(t, h), (0, 1))
    assert_close(slope(jnp.log(0.2), -3.0)[0], 0.2 * -2.0)  # negative: descent raises it
    assert slope(jnp.log(0.2), -3.0)[1] == 0.0


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="dq_da has shape"):
        continuous.deterministic_policy_gradient(jnp.zeros((2, 3)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="log_probs has shape"):
        continuous.soft_value(jnp.zeros((2, 3)), jnp.zeros(2), 1.0)
    with pytest.raises(ValueError, match="log_probs has shape"):
        continuous.expected_soft_value(jnp.zeros((2, 3)), jnp.zeros(3 + 1), 1.0)
    with pytest.raises(ValueError, match="stack"):
        continuous.smallest(jnp.float32(1.0))
