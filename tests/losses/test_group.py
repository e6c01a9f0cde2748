"""The property suite of the GRPO family, run over every row of the table, and what sets the rows apart."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import group, kl, policy, reduce
from jaxrl.losses.group import PRESETS
from tests.losses.devices import psum_over_shards
from tests.oracles import losses_group as oracle

ROWS, COLUMNS = 8, 6
every_row = pytest.mark.parametrize("name", PRESETS)
every_clip = pytest.mark.parametrize("name", [n for n, v in PRESETS.items() if v.form == "clip"])


def make_batch(name, seed=0):
    """Eight answers to four prompts. One row is empty, one has a gap, and one pair of rewards is equal.

    Log-ratios lie on both sides of the variant's clip; what stands under the mask is garbage.
    """
    rng = np.random.default_rng(seed)
    spread = 4e-4 if name.startswith("gspo") else 0.2
    pushed = np.array([2, -2, 2, 0, 0, 0, 0, 2])  # with the advantage, and in row 2 against it
    mask = np.arange(COLUMNS) < np.array([6, 3, 1, 4, 0, 5, 2, 6])[:, None]
    mask[0, 2] = False
    old = -rng.exponential(size=(ROWS, COLUMNS)) - 0.05
    batch = {
        "lp": old + spread * (rng.normal(size=old.shape) + pushed[:, None]),
        "old": old,
        "ref": old + 0.3 * rng.normal(size=old.shape),
    }
    batch = {key: np.float64(np.float32(x)) for key, x in batch.items()}
    rewards = np.array([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5], [-1.0, 2.0]])
    return batch, rewards, mask


def to_jax(batch, mask, garbage=0.0):
    return [jnp.asarray(np.where(mask, batch[k], garbage), jnp.float32) for k in ("lp", "old", "ref")]


class Result(NamedTuple):
    """What `compute` returns: the reduced loss, its gradient in the log-probs, and what `group.loss`
    returned."""

    total: jax.Array
    weight: jax.Array
    grad: jax.Array
    values: jax.Array
    diagnostics: dict


def uncompiled(variant):
    """(lp, old, ref, advantages, mask, kl_coef, segment_ids) -> Result."""
    reduction = reduce.by_name(variant.reduction, length=oracle.LENGTH)

    def total(lp, old, ref, advantages, mask, kl_coef, segment_ids):
        values, diagnostics = group.loss(
            lp, old, ref, advantages, mask, variant=variant, kl_coef=kl_coef, segment_ids=segment_ids
        )
        weighted = reduction(values, mask, segment_ids=segment_ids)
        return weighted.total, (weighted, values, diagnostics)

    def everything(lp, old, ref, advantages, mask, kl_coef=variant.kl_coef, segment_ids=None):
        grad, (weighted, values, diagnostics) = jax.grad(total, has_aux=True)(
            lp, old, ref, advantages, mask, jnp.float32(kl_coef), segment_ids
        )
        return Result(*weighted, grad, values, diagnostics)

    return everything


@functools.lru_cache
def compiled(variant):
    return jax.jit(uncompiled(variant))


def compute(variant):
    """`uncompiled`, jitted once to a variant and a shape."""

    def call(lp, old, ref, advantages, mask, kl_coef=variant.kl_coef, segment_ids=None):
        return compiled(variant)(lp, old, ref, advantages, mask, jnp.float32(kl_coef), segment_ids)

    return call


@functools.lru_cache
def advantages_of(variant):
    return jax.jit(functools.partial(group.advantages, variant=variant))


def prepare(name, seed=0):
    """The arguments of `compute`, of all rows of a batch."""
    batch, rewards, mask = make_batch(name, seed)
    lp, old, ref = to_jax(batch, mask)
    advantages = advantages_of(PRESETS[name])(rewards, mask, log_probs=old, ref_log_probs=ref)
    return lp, old, ref, advantages, jnp.asarray(mask)


def evaluate(variant, arrays, rewards, mask, kl_coef=None):
    """Mean loss of the whole batch and its gradient."""
    lp, old, ref = arrays
    kl_coef = jnp.float32(variant.kl_coef if kl_coef is None else kl_coef)
    advantages = advantages_of(variant)(rewards, mask, log_probs=old, ref_log_probs=ref, kl_coef=kl_coef)
    result = compute(variant)(lp, old, ref, advantages, mask, kl_coef)
    return result.total / result.weight, result.grad / result.weight


def without_mirror_term(variant):
    """Kimi's squared log-ratio is a KL by another name: switched off where no KL is wanted."""
    return dataclasses.replace(variant, tau=0.0) if variant.form == "mirror" else variant


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 1e-6, **kwargs})


@every_row
def test_value_and_gradient_are_the_papers(name):
    batch, rewards, mask = make_batch(name)
    value, grad = evaluate(PRESETS[name], to_jax(batch, mask), rewards, mask)

    def paper(lp):
        return oracle.FAMILY[name](lp, batch["lp"], batch["old"], batch["ref"], rewards, mask)

    assert_close(value, paper(batch["lp"]))
    assert_close(grad, oracle.gradient(paper, batch["lp"]), rtol=2e-4, atol=2e-6)
    assert np.abs(np.asarray(grad)).max() > 1e-3


@every_row
def test_nothing_under_the_mask_matters(name):
    batch, rewards, mask = make_batch(name)
    expected = evaluate(PRESETS[name], to_jax(batch, mask), rewards, mask)
    for garbage in (np.nan, -np.inf, 1e30):
        value, grad = evaluate(PRESETS[name], to_jax(batch, mask, garbage), rewards, mask)
        assert_close(value, expected[0], rtol=0, atol=0)
        assert_close(grad, expected[1], rtol=0, atol=0)
    assert not np.asarray(expected[1])[~mask].any()


@every_row
def test_micro_batches_add_up(name):
    arrays = prepare(name)
    whole = compute(PRESETS[name])(*arrays)
    parts = [compute(PRESETS[name])(*(x[i : i + 2] for x in arrays)) for i in range(0, ROWS, 2)]
    assert_close(sum(part.total for part in parts), whole.total)
    assert sum(part.weight for part in parts) == whole.weight
    assert_close(np.concatenate([part.grad for part in parts]), whole.grad)


@every_row
def test_eight_devices_add_up(name):
    lp, *rest = prepare(name)
    shift = 0.01  # one parameter that all devices share, so that its gradient is a sum over them

    def sums(lp, *rest):
        result = compute(PRESETS[name])(lp + shift, *rest)
        return result.total, result.weight, result.grad.sum()

    assert_close(psum_over_shards(sums, lp, *rest), sums(lp, *rest))


@every_row
def test_packed_rows_give_the_same(name):
    arrays = prepare(name)
    mask = np.asarray(arrays[-1])
    whole = compute(PRESETS[name])(*arrays)

    layout = [[0, 1], [2, 3, 5], [6, 7]]  # row 4 is empty
    ends = {i: np.flatnonzero(mask[i])[-1] + 1 for row in layout for i in row}
    width = 1 + max(sum(ends[i] for i in row) for row in layout)

    def pack(x, fill):
        out = np.full((len(layout), width), fill, np.asarray(x).dtype)
        for r, row in enumerate(layout):
            joined = np.concatenate([np.asarray(x)[i, : ends[i]] for i in row])
            out[r, : len(joined)] = joined
        return jnp.asarray(out)

    ids = pack(np.arange(1, ROWS + 1, dtype=np.int32)[:, None] * np.ones((1, COLUMNS), np.int32), 0)
    fills = (np.nan, np.nan, np.nan, 0.0, False)
    packed = compute(PRESETS[name])(*map(pack, arrays, fills), segment_ids=ids)
    assert_close(packed.total, whole.total)
    assert packed.weight == whole.weight
    assert_close(packed.grad, pack(whole.grad, 0.0))


@every_row
def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(name):
    batch, rewards, mask = make_batch(name)
    variant, lp = PRESETS[name], to_jax(batch, mask)[0]
    advantages = advantages_of(variant)(rewards, mask, log_probs=lp, ref_log_probs=lp)
    result = compute(variant)(lp, lp, lp, advantages, mask, 0.0)
    assert (np.asarray(result.diagnostics["ratio"]) == 1.0).all()
    assert not result.diagnostics["kl_old"].any() and not result.diagnostics["clipped_high"].any()

    lengths = np.maximum(mask.sum(1, keepdims=True), 1)
    of_a_token = {"tokens": 1.0, "sequences": 1.0 / lengths, "constant": 1.0 / oracle.LENGTH}
    weight = 1.0 if variant.level == "sequence_sum" else of_a_token[variant.reduction]
    assert_close(result.grad, -np.asarray(advantages) * weight)
    if variant.form == "clip":
        assert_close(result.values, -np.asarray(advantages))

    without_old = uncompiled(variant)(lp, None, lp, advantages, mask, 0.0)
    assert_close(without_old.grad, result.grad)


@every_row
def test_old_reference_and_advantages_are_constants(name):
    lp, old, ref, advantages, mask = prepare(name)
    batch, rewards, _ = make_batch(name)

    def f(old, ref, advantages):
        given = group.advantages(rewards, mask, variant=PRESETS[name], log_probs=old, ref_log_probs=ref)
        return uncompiled(PRESETS[name])(lp, old, ref, advantages + given, mask, 0.5).total

    for grad in jax.grad(f, (0, 1, 2))(old, ref, advantages):
        assert not grad.any()


@every_row
def test_the_reference_reaches_the_gradient(name):
    batch, rewards, mask = make_batch(name)
    lp, old, ref = to_jax(batch, mask)
    _, near = evaluate(PRESETS[name], (lp, old, ref), rewards, mask, kl_coef=0.5)
    _, far = evaluate(PRESETS[name], (lp, old, ref - 1.0 * (ref < old)), rewards, mask, kl_coef=0.5)
    assert np.abs(np.asarray(near - far)).max() > 1e-3


@every_row
def test_equal_rewards_give_exactly_no_gradient(name):
    batch, _, mask = make_batch(name)
    variant = without_mirror_term(PRESETS[name])
    _, grad = evaluate(variant, to_jax(batch, mask), np.full((4, 2), 0.1), mask, kl_coef=0.0)
    assert not grad.any()
    if not variant.whiten:  # a group whose answers are equal among others that are not
        rewards = np.array([[0.1, 0.1], [0.0, 1.0], [1.0, 0.0], [0.7, 0.7]])
        _, grad = evaluate(variant, to_jax(batch, mask), rewards, mask, kl_coef=0.0)
        assert not grad[:2].any() and not grad[6:].any() and grad[2:6].any()


@every_row
def test_an_empty_batch_is_zero_and_finite(name):
    batch, rewards, mask = make_batch(name)
    nothing = np.zeros_like(mask)
    lp, old, ref = to_jax(batch, mask, np.nan)
    advantages = advantages_of(PRESETS[name])(rewards, nothing, log_probs=old, ref_log_probs=ref)
    result = compute(PRESETS[name])(lp, old, ref, advantages, nothing)
    assert result.total == 0.0 and result.weight == 0.0 and not result.grad.any()
    assert reduce.Weighted(result.total, result.weight).mean == 0.0


@every_row
def test_an_answer_without_reward_has_no_gradient(name):
    batch, rewards, mask = make_batch(name)
    rewards = rewards.copy()
    rewards[0, 1] = np.nan
    arrays = to_jax(batch, mask)
    value, grad = evaluate(without_mirror_term(PRESETS[name]), arrays, rewards, mask, kl_coef=0.0)
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert not grad[1].any()
    assert grad[3].any()


@every_row
def test_bfloat16_is_computed_in_float32(name):
    lp, old, ref, advantages, mask = prepare(name)
    rounded = [x.astype(jnp.bfloat16) for x in (lp, old, ref)]
    expected = compute(PRESETS[name])(*(x.astype(jnp.float32) for x in rounded), advantages, mask)
    actual = uncompiled(PRESETS[name])(*rounded, advantages, mask)
    assert actual.values.dtype == actual.total.dtype == jnp.float32
    assert_close(actual.total, expected.total)
    assert_close(actual.values, expected.values)
    assert actual.grad.dtype == jnp.bfloat16  # rounded once, on the way out, to 8 bits
    assert_close(np.float32(actual.grad), expected.grad, rtol=2**-8)


@every_row
def test_vmap_is_a_loop(name):
    inputs = [prepare(name, seed) for seed in (0, 1)]
    together = jax.vmap(uncompiled(PRESETS[name]))(*map(jnp.stack, zip(*inputs, strict=True)))
    for i, arrays in enumerate(inputs):
        alone = compute(PRESETS[name])(*arrays)
        assert_close(together.values[i], alone.values)
        assert_close(together.grad[i], alone.grad)


@every_row
def test_absurd_log_ratios_stay_finite(name):
    *_, advantages, mask = prepare(name)
    lp = jnp.where(np.arange(COLUMNS) % 2, -1.0, -500.0)[None] * jnp.ones((ROWS, 1))
    result = compute(PRESETS[name])(lp, lp[:, ::-1], lp, advantages, mask, 0.0)
    assert np.isfinite(result.values).all() and np.isfinite(result.grad).all()


@every_clip
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_holds_on_the_side_that_the_advantage_pushes_to(name, sign):
    """One token to a sequence, so that token and sequence are the same, and four ratios around the clip."""
    low, high = PRESETS[name].clip_low, PRESETS[name].clip_high
    ratios = np.array([1 - 1.5 * low, 1 - 0.5 * low, 1 + 0.5 * high, 1 + 1.5 * high] * 2)
    old, mask = jnp.full((ROWS, COLUMNS), -1.0), np.arange(COLUMNS) < np.ones((ROWS, 1))
    lp = old + jnp.log(jnp.float32(ratios))[:, None]
    result = compute(PRESETS[name])(lp, old, old, jnp.full(old.shape, sign), mask, 0.0)
    grad = np.asarray(result.grad)[:4, 0]
    held = np.array([sign < 0, False, False, sign > 0])
    assert ((grad == 0.0) == held).all()
    scale = oracle.LENGTH if name == "dr_grpo" else 1.0
    assert_close(grad, np.where(held, 0.0, -sign * ratios[:4] / scale), rtol=1e-4)
    assert result.diagnostics["clipped_low"][:4, 0].tolist() == [sign < 0, 0, 0, 0]
    assert result.diagnostics["clipped_high"][:4, 0].tolist() == [0, 0, 0, sign > 0]


@pytest.mark.parametrize("name, bound", [("grpo", 0.012), ("dapo", 0.0128)])
def test_a_rare_token_stops_growing_at_the_clip(name, bound):
    """Probability 0.01 and A > 0: no gradient above 0.012, with DAPO's clip-higher above 0.0128."""
    p = np.array([0.01, 0.0119, 0.01201, 0.0127, 0.01281, 0.5, 0.01, 0.01])
    lp = jnp.log(jnp.float32(p))[:, None] * jnp.ones((1, COLUMNS))
    old = jnp.full((ROWS, COLUMNS), np.log(0.01))
    result = compute(PRESETS[name])(lp, old, old, jnp.ones(old.shape), np.ones(old.shape, bool), 0.0)
    assert ((np.asarray(result.grad)[:, 0] == 0.0) == (p > bound)).all()


def test_cispo_keeps_the_gradient_that_ppo_drops():
    lp, old = jnp.log(jnp.array([[0.5], [0.001]])), jnp.log(jnp.array([[0.01], [0.01]]))
    for sign in (1.0, -1.0):
        grad = jax.grad(
            lambda lp, sign=sign: group.loss(
                lp, old, None, jnp.full(2, sign), jnp.ones((2, 1)), variant=PRESETS["cispo"]
            )[0].sum()
        )(lp)
        assert_close(grad[:, 0], [-5.0 * sign, -0.1 * sign])  # the weight is at most 1 + clip_high = 5


def test_dual_clip_bounds_the_loss_of_bad_answers_only():
    variant = dataclasses.replace(PRESETS["grpo"], dual_clip=3.0, kl_coef=0.0)
    lp, old = jnp.log(jnp.array([[0.2], [0.4]])), jnp.full((2, 1), np.log(0.1))

    def f(lp, sign):
        values, diagnostics = group.loss(lp, old, None, jnp.full(2, sign), jnp.ones((2, 1)), variant=variant)
        return values.sum(), (values, diagnostics)

    grad, (values, diagnostics) = jax.grad(f, has_aux=True)(lp, -1.0)
    assert_close(values[:, 0], [2.0, 3.0])
    assert_close(grad[:, 0], [2.0, 0.0])
    assert diagnostics["clipped_dual"][:, 0].tolist() == [0.0, 1.0]
    _, (values, diagnostics) = jax.grad(f, has_aux=True)(lp, 1.0)
    assert_close(values[:, 0], [-1.2, -1.2])
    assert not diagnostics["clipped_dual"].any()


def test_log_ratio_clamp_kills_the_gradient_outside():
    lp, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.5, -4.0]])

    def f(lp):
        values, diagnostics = group.surrogate(
            lp, old, -jnp.ones(1), jnp.ones((1, 2)), clip_high=None, log_ratio_clamp=2.0
        )
        return values.sum(), diagnostics

    grad, diagnostics = jax.grad(f, has_aux=True)(lp)
    assert_close(diagnostics["ratio"], np.exp([[0.5, 2.0]]))
    assert_close(grad, [[np.exp(0.5), 0.0]])


def test_advantages_are_constants():
    lp, _, ref, _, mask = prepare("rloo")

    def total(rewards, lp):
        return group.advantages(rewards, mask, variant=PRESETS["rloo"], log_probs=lp, ref_log_probs=ref)[0, 0]

    for grad in jax.grad(total, (0, 1))(jnp.arange(8.0).reshape(4, 2), lp):
        assert not grad.any()


def test_gspo_and_gspo_token_agree_when_advantages_are_constant():
    batch, rewards, mask = make_batch("gspo")
    gspo = evaluate(PRESETS["gspo"], to_jax(batch, mask), rewards, mask)
    token = evaluate(PRESETS["gspo_token"], to_jax(batch, mask), rewards, mask)
    for a, b in zip(gspo, token, strict=True):
        assert_close(a, b)


def test_gspo_token_weighs_tokens_by_their_own_advantages():
    variant, mask = PRESETS["gspo_token"], jnp.ones((1, 2))
    lp = jnp.array([[-1.0, -2.0]])
    grad = jax.grad(lambda lp: group.loss(lp, lp, None, jnp.array([[3.0, -1.0]]), mask, variant=variant)[0].sum())(lp)
    assert_close(grad, [[-3.0, 1.0]])


def test_the_ratio_of_the_r1_report_is_the_sequences_own():
    lp, old = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[-1.05, -2.03, 0.0]])
    mask = jnp.array([[1, 1, 0]])
    _, diagnostics = group.surrogate(lp, old, jnp.ones(1), mask, level="sequence_sum")
    assert_close(diagnostics["ratio"][0, :2], np.exp([0.08, 0.08]))
    _, diagnostics = group.surrogate(lp, old, jnp.ones(1), mask, level="sequence")
    assert_close(diagnostics["ratio"][0, :2], np.exp([0.04, 0.04]))


def test_kimi_reaches_the_closed_form_of_its_problem():
    """max E r - tau KL(pi || pi_i) has pi* = pi_i exp(r / tau) / Z; with the baseline tau log Z the loss
    leads there.

    Enumerated over five answers: each sample's gradient is zero at pi*, and descent from pi_i ends in it.
    """
    rng = np.random.default_rng(0)
    start, rewards, tau = rng.dirichlet(10 * np.ones(5)), 0.5 * rng.normal(size=5), 0.7
    optimum = start * np.exp(rewards / tau)
    log_z = np.log(optimum.sum())
    optimum /= optimum.sum()
    variant = dataclasses.replace(PRESETS["kimi"], tau=tau)
    old, mask = jnp.log(jnp.float32(start))[:, None], jnp.ones((5, 1))

    def gradient(log_probs, baseline):
        values_grad = jax.grad(
            lambda lp: group.loss(lp, old, None, jnp.float32(rewards - baseline), mask, variant=variant)[0].sum()
        )(log_probs[:, None])
        return values_grad[:, 0]

    at_optimum = jnp.log(jnp.float32(optimum))
    assert_close(gradient(at_optimum, tau * log_z), np.zeros(5), atol=1e-5)
    assert np.abs(gradient(old[:, 0], tau * log_z)).max() > 0.1

    # Descend the expectation under pi_i over softmax logits with the baseline tau log Z.
    logits = jnp.log(jnp.float32(start))
    weight = jnp.float32(start)

    def population(logits):
        log_probs = jax.nn.log_softmax(logits)[:, None]
        values, _ = group.loss(log_probs, old, None, jnp.float32(rewards - tau * log_z), mask, variant=variant)
        return (weight * values[:, 0]).sum()

    step = jax.jit(lambda x: x - 3.0 * jax.grad(population)(x))
    for _ in range(400):
        logits = step(logits)
    assert_close(jax.nn.softmax(logits), optimum, rtol=1e-4, atol=1e-5)


def test_kimi_gradient_is_equation_3():
    """1/k sum_j [ grad log pi (r_j - mean r) - tau / 2 grad (log pi / pi_i)^2 ], and -grad L / (2 tau) of the
    square."""
    batch, rewards, mask = make_batch("kimi")
    mask[4] = mask[3]
    variant = PRESETS["kimi"]
    lp, old, ref = to_jax(batch, mask)
    _, grad = evaluate(variant, (lp, old, ref), rewards, mask)
    centred = (rewards - rewards.mean(1, keepdims=True)).reshape(-1)
    distance = np.where(mask, batch["lp"] - batch["old"], 0).sum(1)
    assert_close(grad, -np.where(mask, (centred - variant.tau * distance)[:, None] / ROWS, 0.0), rtol=1e-4)

    def square(lp):
        distance = jnp.where(mask, lp - old, 0.0).sum(1)
        return jnp.square(jnp.float32(centred) - variant.tau * distance).mean() / (2 * variant.tau)

    assert_close(grad, jax.grad(square)(lp), rtol=1e-4)


def test_a2c_is_ppo_at_ratio_one():
    rng = np.random.default_rng(0)
    lp, advantages = -jnp.float32(rng.exponential(size=9)), jnp.float32(rng.normal(size=9))
    a2c = jax.grad(lambda lp: policy.policy_gradient(lp, advantages).sum())(lp)
    ppo = jax.grad(lambda lp: policy.ppo_clip(lp, jax.lax.stop_gradient(lp), advantages)[0].sum())(lp)
    assert_close(ppo, a2c, rtol=0, atol=0)


def test_penalised_rewards():
    scores, mask = jnp.array([2.0, -0.9, 5.0]), jnp.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    lp = jnp.array([[-1.0, -2.0, jnp.nan, -3.0], [-1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ref = jnp.array([[-1.5, -1.0, 0.0, -3.0], [-3.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    expected = [[-0.05, 0.1, 0.0, 2.0], [-0.9 - 0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert_close(group.penalised_rewards(scores, lp, ref, mask, kl_coef=0.1), expected)
    assert_close(group.score_at_last(scores, mask).sum(1), [2.0, -0.9, 0.0])
    integer_scores = group.score_at_last(jnp.array([1, 0, 1]), mask)
    assert integer_scores.dtype == jnp.float32


def test_kl_coefficient_may_be_traced_and_overrides_the_row():
    batch, rewards, mask = make_batch("grpo")
    lp, old, ref = to_jax(batch, mask)
    advantages = group.advantages(rewards, mask, variant=PRESETS["grpo"])

    @jax.jit
    def values(coef):
        return group.loss(lp, old, ref, advantages, mask, variant=PRESETS["grpo"], kl_coef=coef)[0]

    without = group.loss(lp, old, None, advantages, mask, variant=PRESETS["grpo"], kl_coef=0.0)[0]
    assert_close(values(0.0), without)
    assert_close(values(2.0) - without, np.where(mask, 2.0 * kl.k3(lp, ref), 0.0), atol=1e-5)


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_kl_estimator_is_a_choice(estimator):
    batch, rewards, mask = make_batch("grpo")
    lp, old, ref = to_jax(batch, mask)
    variant = dataclasses.replace(PRESETS["grpo"], kl=estimator, kl_coef=1.0)
    values, diagnostics = group.loss(lp, old, ref, jnp.zeros(ROWS), mask, variant=variant)
    expected = kl.ESTIMATORS[estimator](lp, ref, old_log_probs=old)
    assert_close(values, np.where(mask, expected, 0.0))
    assert_close(diagnostics["kl_ref"], np.where(mask, kl.k3(lp, ref), 0.0))


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: group.surrogate(ONES, np.ones((2, 4)), np.ones(2), ONES),
            r"old_log_probs has shape \(2, 4\)",
        ),
        (lambda: group.surrogate(ONES, ONES, np.ones(3), ONES), r"\[B\]"),
        (lambda: group.surrogate(np.ones(3), None, np.ones(3), np.ones(3)), r"expected \[B, T\]"),
        (lambda: group.surrogate(ONES, ONES, np.ones(2), ONES, level="row"), "'sequence_token'"),
        (lambda: group.surrogate(ONES, ONES, np.ones(2), ONES, form="ppo"), "'cispo'"),
        (lambda: group.surrogate(ONES, ONES, np.ones(2), ONES, segment_ids=ONES), "one per token"),
        (lambda: group.surrogate(ONES, ONES, np.ones(2), ONES, dual_clip=0.5), "above 1"),
        (lambda: group.loss(ONES, ONES, None, ONES, ONES, variant=PRESETS["grpo"]), "or kl_coef=0"),
        (lambda: group.advantages(np.ones(2), ONES, variant=PRESETS["grpo"]), r"\[P, G\] and \[P \* G, T\]"),
        (lambda: group.advantages(np.ones((2, 1)), ONES, variant=PRESETS["grpo"]), "at least 2"),
        (lambda: group.advantages(np.ones((1, 2)), ONES, variant=PRESETS["rloo"]), "pass log_probs"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mask"])
def test_truncated_weights(level):
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(2, 6, 5)).astype(np.float32)
    mask = np.arange(5)[None] < rng.integers(0, 6, (6, 1))
    got = group.truncated_weights(jnp.asarray(new), jnp.asarray(old), jnp.asarray(mask), cap=1.7, level=level)
    for row in range(6):
        gaps = [new[row, t] - old[row, t] if mask[row, t] else 0.0 for t in range(5)]
        for t in range(5):
            ratio = np.exp(gaps[t] if level == "token" else sum(gaps))
            want = min(ratio, 1.7) if level != "sequence_mask" or ratio <= 1.7 else 0.0
            np.testing.assert_allclose(got[row, t], want, rtol=1e-5)
    slope = jax.grad(lambda x: group.truncated_weights(x, old, mask, cap=1.7, level=level).sum())(jnp.asarray(new))
    assert not slope.any()
