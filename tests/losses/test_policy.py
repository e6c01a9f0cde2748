"""Policy-gradient and value losses against loops, finite differences and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import policy
from tests.oracles import losses as oracle
from tests.oracles.losses_group import gradient

N = 9
RNG = np.random.default_rng(0)
OLD = -RNG.exponential(size=N) - 0.1
LP = OLD + np.array([-0.5, -0.5, -0.15, -0.1, 0.0, 0.1, 0.15, 0.5, 0.5])  # both signs of A on either side
ADVANTAGES = np.array([1.0, -0.7, 0.3, -1.2, 0.8, 0.5, -0.4, 1.5, -0.9])


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-6, **kwargs})


@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, None), (0.1, 0.3, None), (0.2, 0.2, 1.3)])
def test_ppo_clip(low, high, dual):
    def total(lp, old, advantages):
        values, diagnostics = policy.ppo_clip(lp, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
        return values.sum(), (values, diagnostics)

    grads, (values, diagnostics) = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(
        *map(jnp.float32, (LP, OLD, ADVANTAGES))
    )
    assert_close(values, oracle.ppo_clip(LP, OLD, ADVANTAGES, low, high, dual))
    expected = gradient(lambda lp: oracle.ppo_clip(lp, OLD, ADVANTAGES, low, high, dual).sum(), LP)
    assert_close(grads[0], expected, rtol=1e-4)
    assert not grads[1].any() and not grads[2].any()
    held = sum(np.asarray(diagnostics[k]) for k in ("clipped_low", "clipped_high", "clipped_dual"))
    assert ((expected == 0.0) == (held > 0)).all() and held.any()
    assert_close(diagnostics["ratio"], np.exp(LP - OLD))


def test_open_clip_is_the_surrogate_of_trpo():
    values, _ = policy.ppo_clip(LP, OLD, ADVANTAGES, clip_low=None, clip_high=None)
    assert_close(values, -np.exp(LP - OLD) * ADVANTAGES)


def test_reinforce_and_policy_gradient():
    baseline = 0.3 * ADVANTAGES + 1.0
    assert_close(policy.policy_gradient(LP, ADVANTAGES), -LP * ADVANTAGES)
    assert_close(policy.reinforce(LP, ADVANTAGES), -LP * ADVANTAGES)
    assert_close(policy.reinforce(LP, ADVANTAGES, baseline), -LP * (ADVANTAGES - baseline))
    grads = jax.grad(lambda *x: policy.reinforce(*x).sum(), (0, 1, 2))(*map(jnp.float32, (LP, ADVANTAGES, baseline)))
    assert_close(grads[0], baseline - ADVANTAGES)
    assert not grads[1].any() and not grads[2].any()


def test_softmax_policy_gradient_in_the_logits():
    """grad of log pi(a) A in the logits is (onehot(a) - pi) A."""
    logits, action = jnp.array([0.3, -1.0, 2.0]), 1
    grad = jax.grad(lambda x: policy.policy_gradient(jax.nn.log_softmax(x)[action], jnp.float32(1.7)))(logits)
    assert_close(-grad, (np.eye(3)[action] - jax.nn.softmax(logits)) * 1.7)


def test_approx_kl():
    actual = policy.approx_kl(LP, OLD)
    ratio = np.exp(LP - OLD)
    assert_close(actual, ratio - 1 - np.log(ratio))
    assert (actual >= 0).all()
    assert not jax.grad(lambda x: policy.approx_kl(x, OLD).sum())(jnp.float32(LP)).any()


def test_approx_kl_is_kl_of_old_and_new_on_average():
    old, new = (jax.nn.log_softmax(jnp.float32(x)) for x in (LP, ADVANTAGES))
    assert_close((jnp.exp(old) * policy.approx_kl(new, old)).sum(), (jnp.exp(old) * (old - new)).sum())


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip):
    values, targets, old = RNG.normal(size=N), RNG.normal(size=N), RNG.normal(size=N)

    def total(values, targets, old):
        each = policy.value_loss(values, targets, old_values=old, clip=clip)
        return each.sum(), each

    grads, each = jax.grad(total, (0, 1, 2), has_aux=True)(*map(jnp.float32, (values, targets, old)))
    assert_close(each, oracle.value_loss(values, targets, old, clip))
    assert_close(grads[0], gradient(lambda v: oracle.value_loss(v, targets, old, clip).sum(), values), rtol=1e-4)
    assert not grads[1].any() and not grads[2].any()


def test_entropy():
    logits = RNG.normal(size=(4, 5)) * 3
    assert_close(policy.entropy_from_logits(logits), oracle.entropy(logits))
    assert_close(policy.entropy_from_log_probs(jax.nn.log_softmax(jnp.float32(logits))), oracle.entropy(logits))
    grad = jax.grad(lambda x: policy.entropy_from_logits(x).sum())(jnp.float32(logits))
    assert_close(grad, gradient(lambda x: oracle.entropy(x).sum(), logits), rtol=1e-3, atol=1e-5)
    assert_close(policy.entropy_from_logits(jnp.zeros(8)), np.log(8))
    assert policy.entropy_from_logits(jnp.bfloat16(logits)).dtype == jnp.float32


def test_entropy_with_impossible_actions():
    logits = jnp.array([0.0, -jnp.inf, 0.0])
    assert_close(policy.entropy_from_logits(logits), np.log(2))
    grad = jax.grad(policy.entropy_from_log_probs)(jnp.log(jnp.array([0.5, 0.0, 0.5])))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: policy.policy_gradient(np.ones(3), np.ones(2)), r"advantages has shape \(2,\)"),
        (lambda: policy.ppo_clip(np.ones(3), np.ones(3), np.ones((3, 1))), "nothing is broadcast"),
        (lambda: policy.ppo_clip(np.ones(3), np.ones(3), np.ones(3), dual_clip=1.0), "above 1"),
        (lambda: policy.value_loss(np.ones(3), np.ones(3), clip=0.2), "old_values is None"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
