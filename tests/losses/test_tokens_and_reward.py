"""Token cross-entropy and the reward model's loss against loops and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import reward, tokens
from tests.oracles import losses as oracle
from tests.oracles.losses_group import gradient

RNG = np.random.default_rng(0)
LOGITS, TARGETS = RNG.normal(size=(2, 3, 5)), RNG.integers(5, size=(2, 3))
CHOSEN, REJECTED = RNG.normal(size=6), RNG.normal(size=6)


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-6, **kwargs})


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.3)])
def test_cross_entropy(smoothing, z_loss):
    def total(logits):
        values = tokens.cross_entropy(logits, TARGETS, label_smoothing=smoothing, z_loss=z_loss)
        return values.sum(), values

    grad, values = jax.jit(jax.grad(total, has_aux=True))(jnp.float32(LOGITS))
    assert_close(values, oracle.cross_entropy(LOGITS, TARGETS, smoothing, z_loss))
    expected = gradient(lambda x: oracle.cross_entropy(x, TARGETS, smoothing, z_loss).sum(), LOGITS)
    assert_close(grad, expected, rtol=1e-4)


def test_cross_entropy_of_large_and_of_bfloat16_logits():
    big = jnp.array([[[1000.0, 0.0], [-1000.0, 0.0]]])
    assert_close(tokens.cross_entropy(big, jnp.array([[0, 0]])), [[0.0, 1000.0]])
    rounded = jnp.bfloat16(LOGITS)
    values = tokens.cross_entropy(rounded, TARGETS)
    assert values.dtype == jnp.float32
    assert_close(values, tokens.cross_entropy(rounded.astype(jnp.float32), TARGETS), rtol=0, atol=0)


def test_cross_entropy_is_the_negative_log_likelihood():
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(jnp.float32(LOGITS)), TARGETS[..., None], -1)[..., 0]
    assert_close(tokens.negative_log_likelihood(log_probs), tokens.cross_entropy(LOGITS, TARGETS))


def test_vmap_over_batches():
    together = jax.vmap(tokens.cross_entropy)(jnp.stack([LOGITS, -LOGITS]), jnp.stack([TARGETS, TARGETS]))
    assert_close(together[1], tokens.cross_entropy(-LOGITS, TARGETS))


@pytest.mark.parametrize("margin, centring", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.01), (0.3, 0.2)])
def test_bradley_terry(margin, centring):
    def total(chosen, rejected):
        values, diagnostics = reward.bradley_terry(chosen, rejected, margin=margin, centring=centring)
        return values.sum(), (values, diagnostics)

    grads, (values, diagnostics) = jax.grad(total, (0, 1), has_aux=True)(jnp.float32(CHOSEN), jnp.float32(REJECTED))
    assert_close(values, oracle.bradley_terry(CHOSEN, REJECTED, margin, centring))
    expected = gradient(lambda w: oracle.bradley_terry(w, REJECTED, margin, centring).sum(), CHOSEN)
    assert_close(grads[0], expected, rtol=1e-4)
    expected = gradient(lambda x: oracle.bradley_terry(CHOSEN, x, margin, centring).sum(), REJECTED)
    assert_close(grads[1], expected, rtol=1e-4)
    assert_close(diagnostics["accuracy"], CHOSEN > REJECTED)
    assert_close(diagnostics["margin"], CHOSEN - REJECTED)


def test_margin_of_each_pair_and_constant_diagnostics():
    margins = np.arange(6.0)
    values, _ = reward.bradley_terry(CHOSEN, REJECTED, margin=margins)
    assert_close(
        values,
        [oracle.bradley_terry([w], [x], m)[0] for w, x, m in zip(CHOSEN, REJECTED, margins, strict=True)],
    )
    grad = jax.grad(lambda x: sum(d.sum() for d in reward.bradley_terry(x, REJECTED)[1].values()))(jnp.float32(CHOSEN))
    assert not grad.any()


def test_only_centring_sees_the_level():
    shifted = reward.bradley_terry(CHOSEN + 3, REJECTED + 3)[0]
    assert_close(shifted, reward.bradley_terry(CHOSEN, REJECTED)[0])
    grad = jax.grad(lambda s: reward.bradley_terry(CHOSEN + s, REJECTED + s, centring=0.1)[0].sum())(3.0)
    assert grad > 0.1


def test_extreme_rewards_are_finite():
    values, _ = reward.bradley_terry(jnp.array([-500.0, 500.0]), jnp.array([500.0, -500.0]))
    assert_close(values, [1000.0, 0.0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tokens.cross_entropy(LOGITS[0], TARGETS[0]), r"expected \[B, T, V\]"),
        (lambda: tokens.cross_entropy(LOGITS, TARGETS[:, :2]), r"targets has shape \(2, 2\)"),
        (lambda: tokens.cross_entropy(LOGITS, TARGETS, label_smoothing=1.0), r"\[0, 1\)"),
        (lambda: tokens.negative_log_likelihood(LOGITS), r"expected \[B, T\]"),
        (lambda: reward.bradley_terry(CHOSEN, REJECTED[:3]), "rejected_rewards"),
        (lambda: reward.bradley_terry(CHOSEN, REJECTED, margin=np.ones(2)), "margin"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
