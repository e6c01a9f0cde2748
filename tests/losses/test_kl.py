"""KL estimators on a distribution that can be enumerated: what they estimate, and whose gradient they
have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import kl

K = 20


def distributions():
    """Logits of policy, reference and an older policy over K outcomes."""
    rng = np.random.default_rng(0)
    policy = rng.normal(size=K)
    return [jnp.float32(x) for x in (policy, policy + 1.2 * rng.normal(size=K), policy + 0.4 * rng.normal(size=K))]


LOGITS, REF_LOGITS, OLD_LOGITS = distributions()
REF, OLD = jax.nn.log_softmax(REF_LOGITS), jax.nn.log_softmax(OLD_LOGITS)


def reverse_kl(logits):
    log_p = jax.nn.log_softmax(logits)
    return (jnp.exp(log_p) * (log_p - REF)).sum()


def forward_kl(logits):
    return (jnp.exp(REF) * (REF - jax.nn.log_softmax(logits))).sum()


def expected_estimate(logits, name, sampled_from=None, **kwargs):
    """E_x[estimator(x)] over samples that are held fixed while differentiating, enumerated."""
    log_p = jax.nn.log_softmax(logits)
    weights = jnp.exp(jax.lax.stop_gradient(log_p) if sampled_from is None else sampled_from)
    return (weights * kl.ESTIMATORS[name](log_p, REF, old_log_probs=sampled_from, **kwargs)).sum()


def assert_close(actual, expected, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", ["k1", "k3", "k3_ratio"])
def test_values_are_unbiased(name):
    assert_close(expected_estimate(LOGITS, name), reverse_kl(LOGITS))


def test_k2_is_biased():
    assert abs(expected_estimate(LOGITS, "k2") - reverse_kl(LOGITS)) > 0.01


@pytest.mark.parametrize(
    "name, whose",
    [
        ("k1", lambda logits: 0.0 * logits.sum()),
        ("k2", reverse_kl),
        ("k3", forward_kl),
        ("k3_ratio", reverse_kl),
    ],
)
def test_gradients_on_policy(name, whose):
    assert_close(jax.grad(expected_estimate)(LOGITS, name), jax.grad(whose)(LOGITS))


def test_forward_and_reverse_gradients_are_not_alike():
    assert np.abs(jax.grad(forward_kl)(LOGITS) - jax.grad(reverse_kl)(LOGITS)).max() > 1e-3


def test_k3_ratio_is_exact_off_policy_too():
    assert_close(expected_estimate(LOGITS, "k3_ratio", OLD), reverse_kl(LOGITS))
    assert_close(jax.grad(expected_estimate)(LOGITS, "k3_ratio", OLD), jax.grad(reverse_kl)(LOGITS))
    assert np.abs(jax.grad(expected_estimate)(LOGITS, "k2", OLD) - jax.grad(reverse_kl)(LOGITS)).max() > 1e-3


def test_k1_in_the_reward_is_the_reverse_kl():
    """The policy gradient of a reward -k1 is minus the gradient of the reverse KL."""

    def policy_gradient(logits):
        log_p = jax.nn.log_softmax(logits)
        constant = jax.lax.stop_gradient(log_p)
        return (jnp.exp(constant) * -kl.k1(constant, REF) * log_p).sum()

    assert_close(jax.grad(policy_gradient)(LOGITS), -jax.grad(reverse_kl)(LOGITS))


@pytest.mark.parametrize("name", kl.ESTIMATORS)
def test_numbers_gradients_and_constants(name):
    lp, ref, old = (np.array(x) for x in ([-1.0, -2.0], [-1.5, -0.5], [-1.2, -2.0]))
    d, r = lp - ref, np.exp(lp - old)
    value = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "k3_ratio": r * (np.exp(-d) - 1 + d)}[name]
    slope = {"k1": 1 + 0 * d, "k2": d, "k3": 1 - np.exp(-d), "k3_ratio": r * d}[name]
    f = kl.ESTIMATORS[name]
    assert_close(f(lp, ref, old_log_probs=old), value)
    grads = jax.grad(lambda lp, ref, old: f(lp, ref, old_log_probs=old).sum(), (0, 1, 2))(
        *(jnp.float32(x) for x in (lp, ref, old))
    )
    assert_close(grads[0], slope)
    assert not grads[1].any() and not grads[2].any()
    assert f(jnp.bfloat16(lp), jnp.bfloat16(ref)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_clamp_is_off_unless_asked_for(name):
    lp, ref = jnp.array([-1.0, -9.0]), jnp.array([-6.0, -8.5])
    f = kl.ESTIMATORS[name]
    assert_close(f(lp, ref, clamp=2.0), f(jnp.array([2.0, -0.5]), jnp.zeros(2)))
    grad = jax.grad(lambda lp: f(lp, ref, clamp=2.0).sum())(lp)
    assert grad[0] == 0.0 and grad[1] != 0.0
    assert_close(f(lp, ref), f(lp - ref, jnp.zeros(2)))


def test_k3_is_accurate_near_zero():
    """exp(-d) - 1 rounds to a multiple of 6e-8, as large as the value itself; expm1 does not."""
    d = 1e-3
    assert abs(kl.k3(jnp.float32(d), jnp.float32(0.0)) - (np.exp(-d) - 1 + d)) < 1e-9


def test_categorical():
    log_p = jax.nn.log_softmax(LOGITS)
    assert_close(kl.categorical(log_p, REF), reverse_kl(LOGITS))
    impossible = jnp.log(jnp.array([[1.0, 0.0], [0.5, 0.5]]))
    other = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    assert_close(kl.categorical(impossible, other), [np.log(4), 0.0])
    assert np.isfinite(jax.grad(lambda x: kl.categorical(x, other).sum())(impossible)).all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"ref_log_probs has shape \(2,\)"):
        kl.k3(jnp.ones(3), jnp.ones(2))
