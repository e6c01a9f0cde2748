"""Losses of discrete diffusion against transition matrices, and against each other where they must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import diffusion, reduce
from tests.oracles import diffusion as oracle
from tests.oracles.losses_group import gradient

RNG = np.random.default_rng(0)
B, T, V, MASK = 2, 5, 6, 3
LOGITS = RNG.normal(size=(B, T, V))
TOKENS = RNG.choice([0, 1, 2, 4, 5], size=(B, T))
IS_MASKED = RNG.random((B, T)) < 0.5
TIMES = np.array([[0.37] * T, [0.82] * T])


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 5e-5, "atol": 5e-6, **kwargs})


def at(schedule, times=TIMES):
    of = lambda f: np.vectorize(lambda t: f(schedule, t))(times)
    return of(oracle.alpha), of(oracle.slope)


def noisy(noise):
    return np.where(IS_MASKED, MASK, TOKENS) if noise == "absorbing" else np.where(IS_MASKED, (TOKENS + 1) % V, TOKENS)


def cross_entropy(logits=LOGITS):
    """-log p with the mask token ruled out."""
    x = np.where(np.arange(V) == MASK, -np.inf, logits)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_schedules(schedule):
    alpha, slope = at(schedule)
    level = diffusion.level(schedule, jnp.float32(TIMES))
    assert_close(level.alpha, alpha)
    assert_close(level.slope, slope, rtol=1e-4)
    assert_close(diffusion.masked_weight(level), -slope / (1 - alpha), rtol=2e-4)
    ends = diffusion.level(schedule, jnp.array([0.0, 1.0])).alpha
    assert_close(ends, [1, 0], atol=2e-5)
    assert np.isfinite(diffusion.masked_weight(diffusion.level(schedule, jnp.array([0.0, 1.0])))).all()


def test_masked_is_weighted_cross_entropy_of_masked_tokens_only():
    weight = 1 / TIMES
    log_probs = np.where(IS_MASKED, -cross_entropy(), np.nan)
    values = diffusion.masked(jnp.float32(log_probs), jnp.asarray(IS_MASKED), jnp.float32(weight))
    expected = np.zeros((B, T))
    for b, i in np.ndindex(B, T):
        expected[b, i] = cross_entropy()[b, i] / TIMES[b, i] if IS_MASKED[b, i] else 0.0
    assert_close(values, expected)
    whole = reduce.tokens(values, jnp.ones((B, T)))
    assert_close(whole.mean, expected.sum() / (B * T))  # all tokens, not the masked ones
    response = np.arange(T)[None] >= np.array([[1], [3]])
    per_row = reduce.sequences(values, jnp.asarray(response))
    assert_close(per_row.mean, np.mean([expected[0, 1:].sum() / 4, expected[1, 3:].sum() / 2]))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("noise", diffusion.NOISES)
def test_d3pm(noise, schedule):
    before = TIMES - 0.2
    (a_s, _), (a_t, _) = at(schedule, before), at(schedule)

    def value(logits):
        values = diffusion.d3pm(
            logits, TOKENS, noisy(noise), jnp.float32(a_s), jnp.float32(a_t), noise=noise, mask_id=MASK
        )
        return values.sum(), values

    grad, values = jax.jit(jax.grad(value, has_aux=True))(jnp.float32(LOGITS))
    want = lambda logits: oracle.d3pm(logits, TOKENS, noisy(noise), a_s, a_t, noise, MASK)
    assert_close(values, want(LOGITS))
    assert_close(grad, gradient(lambda logits: want(logits).sum(), LOGITS), rtol=1e-3, atol=1e-5)
    if noise == "absorbing":
        assert not np.asarray(values)[~IS_MASKED].any()


@pytest.mark.parametrize("noise", diffusion.NOISES)
def test_last_step_of_d3pm_is_the_likelihood_of_the_clean_token(noise):
    one, a_t = jnp.ones((B, T)), jnp.full((B, T), 0.6)
    values = diffusion.d3pm(jnp.float32(LOGITS), TOKENS, noisy(noise), one, a_t, noise=noise, mask_id=MASK)
    if noise == "absorbing":
        assert_close(values, np.where(IS_MASKED, cross_entropy(), 0.0))
        return
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    for b, i in np.ndindex(B, T):
        joint = [p[b, i, y] * (0.6 * (y == noisy(noise)[b, i]) + 0.4 / V) for y in range(V)]
        assert_close(values[b, i], -np.log(joint[TOKENS[b, i]] / sum(joint)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square"])
def test_many_steps_of_absorbing_d3pm_are_masked_diffusion(schedule):
    steps = 2000
    level, before = (diffusion.level(schedule, jnp.float32(t)) for t in (TIMES, TIMES - 1 / steps))
    values = steps * diffusion.d3pm(
        jnp.float32(LOGITS), TOKENS, noisy("absorbing"), before.alpha, level.alpha, noise="absorbing", mask_id=MASK
    )
    limit = diffusion.masked(jnp.float32(-cross_entropy()), jnp.asarray(IS_MASKED), diffusion.masked_weight(level))
    assert_close(values, limit, rtol=2e-3)


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
@pytest.mark.parametrize("noise", diffusion.NOISES)
def test_score_entropy(noise, schedule):
    alpha, slope = at(schedule)

    def value(log_scores):
        level = diffusion.Level(jnp.float32(alpha), jnp.float32(slope))
        values = diffusion.score_entropy(log_scores, TOKENS, noisy(noise), level, noise=noise, mask_id=MASK)
        return values.sum(), values

    grad, values = jax.jit(jax.grad(value, has_aux=True))(jnp.float32(LOGITS))
    want = lambda x: oracle.score_entropy(x, TOKENS, noisy(noise), alpha, slope, noise, MASK)
    assert_close(values, want(LOGITS), rtol=2e-4)
    assert_close(grad, gradient(lambda x: want(x).sum(), LOGITS), rtol=1e-3, atol=1e-4)


def test_score_entropy_is_zero_at_the_true_scores_and_positive_elsewhere():
    alpha = np.full((B, T), 0.4)
    p = np.full((B, T, V), 0.6 / V) + 0.4 * np.eye(V)[TOKENS]
    x = noisy("uniform")
    true = np.log(p / np.take_along_axis(p, x[..., None], -1))
    level = diffusion.Level(jnp.float32(alpha), -jnp.ones((B, T)))
    value = lambda s: diffusion.score_entropy(jnp.float32(s), TOKENS, x, level, noise="uniform")
    assert_close(value(true), np.zeros((B, T)), atol=1e-5)
    assert (value(true + 0.3) > 1e-3).all()


def test_absorbing_score_entropy_is_masked_diffusion():
    level = diffusion.level("linear", jnp.float32(TIMES))
    x = np.where(np.arange(V) == MASK, -np.inf, LOGITS)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    log_scores = jnp.float32(log_p) + jnp.log(level.alpha / (1 - level.alpha))[..., None]
    values = diffusion.score_entropy(log_scores, TOKENS, noisy("absorbing"), level, noise="absorbing", mask_id=MASK)
    masked = diffusion.masked(jnp.float32(-cross_entropy()), jnp.asarray(IS_MASKED), diffusion.masked_weight(level))
    assert_close(values, masked, rtol=2e-4)


def test_a_mask_token_has_no_probability_and_no_gradient():
    def total(logits):
        values = diffusion.d3pm(
            logits, TOKENS, noisy("absorbing"), jnp.ones((B, T)), jnp.full((B, T), 0.5), noise="absorbing", mask_id=MASK
        )
        return values.sum()

    sure = jnp.float32(LOGITS).at[..., MASK].set(60.0)
    assert_close(total(sure), np.where(IS_MASKED, cross_entropy(), 0).sum())
    assert not np.asarray(jax.grad(total)(sure))[..., MASK].any()


def test_copied_tokens_cost_nothing_however_unlikely():
    logits = jnp.zeros((1, 1, V)).at[0, 0, 0].set(-300.0)
    half = jnp.full((1, 1), 0.5)
    zero = jnp.zeros((1, 1), jnp.int32)
    value = lambda x: diffusion.d3pm(x, zero, zero, half, half / 2, noise="absorbing", mask_id=MASK).sum()
    assert value(logits) == 0 and np.isfinite(jax.grad(value)(logits)).all()


BAD = {
    "schedule": (lambda: diffusion.level("slow", jnp.ones(1)), "schedule is 'slow'"),
    "noise": (lambda: _d3pm(noise="gaussian"), "noise is 'gaussian'"),
    "no mask": (lambda: _d3pm(noise="absorbing", mask_id=None), "mask_id is None"),
    "mask outside": (lambda: _d3pm(noise="absorbing", mask_id=V), "mask_id is 6 of 6"),
    "logits": (lambda: _d3pm(LOGITS[0]), "logits have shape"),
    "noisy": (lambda: _d3pm(noisy=TOKENS[:, :2]), "noisy has shape"),
    "masked": (lambda: diffusion.masked(jnp.ones((2, 3)), jnp.ones((2, 2), bool), jnp.ones((2, 3))), "is_masked"),
}


def _d3pm(logits=LOGITS, noisy=TOKENS, noise="uniform", mask_id: int | None = MASK):
    a = jnp.full((B, T), 0.5)
    return diffusion.d3pm(jnp.float32(logits), TOKENS, noisy, a, a / 2, noise=noise, mask_id=mask_id)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
