"""The property suite of the DPO family, run over every row of the table, and what its methods promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import preference, reduce
from jaxrl.losses.preference import PRESETS
from tests.losses.devices import psum_over_shards
from tests.oracles import losses_group
from tests.oracles import losses_preference as oracle

N, COLUMNS = 8, 4
every_row = pytest.mark.parametrize("name", PRESETS)
every_pair = pytest.mark.parametrize("name", [n for n, v in PRESETS.items() if v.pairing == "pairs"])
FOUR = "chosen rejected ref_chosen ref_rejected".split()


def make_batch(seed=0):
    """Token log-probs [N, T] and masks of both responses of N pairs, under policy and reference."""
    rng = np.random.default_rng(seed)
    batch = {}
    for side in ("chosen", "rejected"):
        batch[f"{side}_mask"] = np.arange(COLUMNS) < rng.integers(1, COLUMNS + 1, size=N)[:, None]
        batch[side] = np.float32(-rng.exponential(size=(N, COLUMNS)) - 0.1)
        batch[f"ref_{side}"] = np.float32(batch[side] + 0.5 * rng.normal(size=(N, COLUMNS)))
    return batch


def loss(variant, batch, **kwargs):
    """From token log-probs to values [N] and diagnostics."""
    sums, lengths = {}, {}
    for key in FOUR:
        mask = batch[key.removeprefix("ref_") + "_mask"]
        sums[key], lengths[key] = preference.sequence_log_probs(batch[key], mask)
    return preference.loss(
        *(sums[key] for key in FOUR),
        variant=variant,
        chosen_lengths=lengths["chosen"],
        rejected_lengths=lengths["rejected"],
        **kwargs,
    )


@functools.lru_cache
def compiled(variant):
    """Jitted batch -> (values, gradients of their sum in every log-prob)."""

    def total(log_probs, masks):
        values, diagnostics = loss(variant, {**log_probs, **masks})
        return values.sum(), (values, diagnostics)

    grad = jax.jit(jax.grad(total, has_aux=True))

    def call(batch):
        log_probs = {key: batch[key] for key in FOUR}
        grads, (values, diagnostics) = grad(log_probs, {k: batch[k] for k in batch if k not in FOUR})
        return values, grads, diagnostics

    return call


def columns(batch):
    """The oracle's arguments in float64: four sums and two lengths, each [N]."""
    sums = [np.where(batch[key.removeprefix("ref_") + "_mask"], np.float64(batch[key]), 0.0).sum(1) for key in FOUR]
    return [*sums, batch["chosen_mask"].sum(1), batch["rejected_mask"].sum(1)]


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-6, **kwargs})


@every_row
def test_value_and_gradient_are_the_papers(name):
    batch = make_batch()
    values, grads, _ = compiled(PRESETS[name])(batch)
    given = columns(batch)
    assert_close(values, oracle.family(name, *given))
    for i, side in enumerate(("chosen", "rejected")):
        expected = losses_group.gradient(
            lambda x, i=i: sum(oracle.family(name, *given[:i], x, *given[i + 1 :])), given[i]
        )
        assert_close(grads[side], np.where(batch[f"{side}_mask"], expected[:, None], 0.0), rtol=1e-4)


@every_row
def test_reference_and_diagnostics_carry_no_gradient(name):
    batch = make_batch()
    _, grads, _ = compiled(PRESETS[name])(batch)
    assert not grads["ref_chosen"].any() and not grads["ref_rejected"].any()
    assert grads["chosen"].any() and grads["rejected"].any()

    def diagnostics(chosen):
        return sum(x.sum() for x in loss(PRESETS[name], {**batch, "chosen": chosen})[1].values())

    assert not jax.grad(diagnostics)(jnp.asarray(batch["chosen"])).any()


@every_pair
def test_better_chosen_is_less_loss(name):
    """Every loss falls when the chosen response gains on the rejected one, but for those that push both
    down."""
    batch = make_batch()
    _, grads, _ = compiled(PRESETS[name])(batch)
    assert (np.asarray(grads["rejected"])[batch["rejected_mask"]] > 0).all()
    chosen = np.asarray(grads["chosen"])[batch["chosen_mask"]]
    if name == "apo_down":  # s(b c) + 1 - s(b D): at D = c it is flat, and it always pushes rejected down
        return
    if name == "nca":  # its middle term holds the chosen reward back above log 3
        assert (chosen[np.repeat(columns(batch)[0] < columns(batch)[2], batch["chosen_mask"].sum(1))] < 0).all()
        return
    assert (chosen < 0).all()


@every_pair
def test_micro_batches_add_up(name):
    batch = make_batch()
    values, grads, _ = compiled(PRESETS[name])(batch)
    for start in (0, 4):
        part_values, part_grads, _ = compiled(PRESETS[name])({k: v[start : start + 4] for k, v in batch.items()})
        assert_close(part_values, values[start : start + 4])
        assert_close(part_grads["chosen"], grads["chosen"][start : start + 4])


@every_pair
def test_eight_devices_add_up(name):
    batch = make_batch()

    def sums(batch):
        values, grads, _ = compiled(PRESETS[name])(batch)
        weighted = reduce.elements(values)
        return weighted.total, weighted.weight, grads["chosen"].sum()

    assert_close(psum_over_shards(sums, batch), sums(batch))


@every_row
def test_packed_rows_give_the_same(name):
    """Chosen and rejected of one pair in one row, chosen first, two pairs to a row, padding last."""
    batch = make_batch()
    values, _, _ = compiled(PRESETS[name])(batch)
    width = 4 * COLUMNS + 1
    ids, mask = np.zeros((N // 2, width), np.int32), np.zeros((N // 2, width), bool)
    packed = {"": np.full((N // 2, width), np.nan, np.float32), "ref_": np.zeros((N // 2, width), np.float32)}
    for pair in range(N):
        for j, side in enumerate(("chosen", "rejected")):
            row = pair // 2
            kept = batch[f"{side}_mask"][pair]
            here = slice(int((ids[row] > 0).sum()), int((ids[row] > 0).sum() + kept.sum()))
            for prefix in packed:
                packed[prefix][row, here] = batch[prefix + side][pair][kept]
            ids[row, here], mask[row, here] = 1 + 2 * (pair % 2) + j, True
    arguments, lengths = [], None
    for prefix in packed:
        sums, lengths = preference.sequence_log_probs(packed[prefix], mask, segment_ids=ids)
        arguments += [sums[:, 0:4:2].reshape(-1), sums[:, 1:4:2].reshape(-1)]
    assert lengths is not None and not lengths[:, 4:].any()
    actual, _ = preference.loss(
        *arguments,
        variant=PRESETS[name],
        chosen_lengths=lengths[:, 0:4:2].reshape(-1),
        rejected_lengths=lengths[:, 1:4:2].reshape(-1),
    )
    assert_close(actual, values)


@every_row
def test_bfloat16_vmap_and_garbage_under_the_mask(name):
    batch = make_batch()
    rounded = {k: jnp.asarray(v).astype(jnp.bfloat16) if k in FOUR else v for k, v in batch.items()}
    full = {k: np.asarray(v, np.float32) if k in FOUR else v for k, v in rounded.items()}
    expected, _, _ = compiled(PRESETS[name])(full)
    actual, _ = loss(PRESETS[name], rounded)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected)

    garbage = {
        k: np.where(full[k.removeprefix("ref_") + "_mask"], full[k], np.nan) if k in FOUR else full[k] for k in full
    }
    values, grads, _ = compiled(PRESETS[name])(garbage)
    assert_close(values, expected, rtol=0, atol=0)
    assert np.isfinite(grads["chosen"]).all()

    halves = {k: jnp.stack([v[:4], v[4:]]) for k, v in full.items()}
    together = jax.vmap(lambda half: loss(PRESETS[name], half)[0])(halves)
    for half in (0, 1):
        alone, _ = loss(PRESETS[name], {k: v[half] for k, v in halves.items()})
        assert_close(together[half], alone)


@every_row
def test_an_empty_response_is_finite(name):
    batch = make_batch()
    batch["chosen_mask"][2] = batch["rejected_mask"][3] = False
    values, grads, _ = compiled(PRESETS[name])(batch)
    assert np.isfinite(values).all() and np.isfinite(grads["chosen"]).all()


@every_row
def test_certain_responses_are_finite(name):
    """Log-probs of zero: probability one, whose odds are infinite."""
    batch = make_batch()
    batch["chosen"] = np.zeros_like(batch["chosen"])
    values, grads, _ = compiled(PRESETS[name])(batch)
    assert np.isfinite(values).all() and np.isfinite(grads["chosen"]).all()


def test_diagnostics():
    w, lose = jnp.array([-1.0, -4.0]), jnp.array([-3.0, -2.0])
    rw, rl = jnp.array([-2.0, -3.0]), jnp.array([-3.0, -1.0])
    _, diagnostics = preference.loss(w, lose, rw, rl, variant=dataclasses.replace(PRESETS["dpo"], beta=0.5))
    assert_close(diagnostics["chosen_rewards"], [0.5, -0.5])
    assert_close(diagnostics["rejected_rewards"], [0.0, -0.5])
    assert_close(diagnostics["margin"], [0.5, 0.0])
    assert_close(diagnostics["accuracy"], [1.0, 0.0])


def test_gradient_of_dpo_is_the_papers():
    """-beta sigmoid(-h) [grad log pi(w) - grad log pi(l)]."""
    batch = make_batch()
    values, grads, diagnostics = compiled(PRESETS["dpo"])(batch)
    expected = -0.1 * jax.nn.sigmoid(-diagnostics["margin"])
    assert_close(grads["chosen"], np.where(batch["chosen_mask"], expected[:, None], 0.0))
    assert_close(grads["rejected"], np.where(batch["rejected_mask"], -expected[:, None], 0.0))


def test_options():
    batch = make_batch()
    given = columns(batch)
    per_token = [x / n for x, n in zip(given[:4], given[4:] * 2, strict=True)]
    values, _ = loss(dataclasses.replace(PRESETS["ipo"], per_token=True), batch)
    assert_close(values, oracle.family("ipo", *per_token, *given[4:]))

    values, _ = loss(PRESETS["bco"], batch, reference_point=0.3)
    expected = [oracle.bco(*row, delta=0.3) for row in zip(*given, strict=True)]
    assert_close(values, expected)

    nll = np.arange(1.0, N + 1)
    values, _ = loss(PRESETS["orpo"], batch, chosen_nll=nll)
    assert_close(values, np.array(oracle.family("orpo", *given)) + nll + given[0] / given[4])

    no_smoothing, _ = loss(dataclasses.replace(PRESETS["cdpo"], label_smoothing=0.0), batch)
    assert_close(no_smoothing, oracle.family("dpo", *given))


def test_aot_on_one_pair_is_dpo():
    batch = {k: v[:1] for k, v in make_batch().items()}
    expected, _ = loss(PRESETS["dpo"], batch)
    for name in ("aot", "aot_unpaired"):
        assert_close(loss(PRESETS[name], batch)[0], expected)


def test_robust_is_unbiased_under_flipped_labels():
    batch = make_batch()
    flipped = {
        **{k: batch[k.replace("chosen", "rejected")] for k in batch if "chosen" in k},
        **{k: batch[k.replace("rejected", "chosen")] for k in batch if "rejected" in k},
    }
    clean, _ = loss(PRESETS["dpo"], batch)
    right, _ = loss(PRESETS["robust"], batch)
    wrong, _ = loss(PRESETS["robust"], flipped)
    assert_close(0.9 * right + 0.1 * wrong, clean, rtol=1e-4)


def bandit(seed=0, arms=6):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(arms)), rng.normal(size=arms)


def fit_dpo(reference, weights, beta, steps=3000, rate=20.0):
    """Descends DPO over pairs of arms; weights[..., i, j] is how often i beat j. Returns policies [...,
    A]."""
    arms = len(reference)
    i, j = (x.reshape(-1) for x in np.meshgrid(np.arange(arms), np.arange(arms), indexing="ij"))
    ref = jnp.log(jnp.float32(reference))
    variant = dataclasses.replace(PRESETS["dpo"], beta=beta)

    def objective(logits, weights):
        log_probs = jax.nn.log_softmax(logits)
        values, _ = preference.loss(log_probs[i], log_probs[j], ref[i], ref[j], variant=variant)
        return (weights * values).sum()

    def descend(weights):
        step = lambda _, logits: logits - rate * jax.grad(objective)(logits, weights)  # noqa: E731
        return jax.nn.softmax(jax.lax.fori_loop(0, steps, step, ref))

    weights = weights.reshape(-1, arms * arms)
    return np.asarray(jax.jit(jax.vmap(descend))(jnp.float32(weights / weights.sum(1, keepdims=True))))


def test_population_optimum_of_dpo_is_the_closed_form():
    """pi* = pi_ref exp(r / beta) / Z, from preferences that follow Bradley and Terry's model of r exactly."""
    reference, reward = bandit()
    beta = 0.5
    wins = 1 / (1 + np.exp(-(reward[:, None] - reward[None]))) * (1 - np.eye(6))
    optimum = reference * np.exp(reward / beta)
    optimum /= optimum.sum()
    policy = fit_dpo(reference, wins, beta)[0]
    assert 0.5 * np.abs(reference - optimum).sum() > 0.2
    assert 0.5 * np.abs(policy - optimum).sum() < 1e-5
    implicit = beta * (np.log(policy) - np.log(reference))
    assert_close(implicit - implicit.mean(), reward - reward.mean(), atol=1e-4)


def test_dpo_from_sampled_pairs_approaches_it():
    """The distance falls as 1 / sqrt(n), by 3.2 from one n to the next: mean of eight draws each."""
    reference, reward = bandit()
    beta, rng = 0.5, np.random.default_rng(1)
    optimum = reference * np.exp(reward / beta)
    optimum /= optimum.sum()
    sizes, draws = (100, 1_000, 10_000), 8
    wins = np.zeros((len(sizes), draws, 6, 6))
    for s, n in enumerate(sizes):
        for d in range(draws):
            pairs = rng.integers(6, size=(n, 2))
            first_wins = rng.random(n) < 1 / (1 + np.exp(-(reward[pairs[:, 0]] - reward[pairs[:, 1]])))
            np.add.at(wins[s, d], tuple(np.where(first_wins[:, None], pairs, pairs[:, ::-1]).T), 1.0)
    policies = fit_dpo(reference, (wins * (1 - np.eye(6))).reshape(-1, 6, 6), beta)
    distances = 0.5 * np.abs(policies - optimum).sum(1).reshape(len(sizes), draws).mean(1)
    assert distances[1] < distances[0] / 2 and distances[2] < distances[1] / 2


def test_kto():
    rng = np.random.default_rng(0)
    x, desirable = rng.normal(size=N), rng.random(N) > 0.5

    def expected(x):
        return sum(oracle.kto(v, d, 0.3, 0.2, 1.3, 0.7) for v, d in zip(x, desirable, strict=True))

    def total(x, z):
        values, _ = preference.kto(
            x, desirable, reference_point=z, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7
        )
        return values.sum()

    value, (grad, grad_z) = jax.value_and_grad(total, (0, 1))(jnp.float32(x), jnp.float32(0.3))
    assert_close(value, expected(x))
    assert_close(grad, losses_group.gradient(expected, x), rtol=1e-4)
    assert grad_z == 0.0
    assert (np.sign(grad) == np.where(desirable, -1, 1)).all()
    _, diagnostics = preference.kto(x, desirable, reference_point=0.3)
    assert_close(diagnostics["rewards"], 0.1 * x)


def test_kto_reference_point():
    ratios = jnp.array([0.5, 1.5, -1.0, 77.0])
    assert_close(preference.kto_reference_point(ratios, jnp.array([1, 1, 1, 0])), 1 / 3)
    assert preference.kto_reference_point(-ratios) == 0.0
    assert preference.kto_reference_point(ratios, jnp.zeros(4)) == 0.0
    assert not jax.grad(lambda x: preference.kto_reference_point(x))(ratios).any()


ONES = np.ones(3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: preference.loss(ONES, ONES, variant=PRESETS["dpo"]), "pass ref_chosen_log_probs"),
        (
            lambda: preference.loss(ONES, np.ones(2), variant=PRESETS["simpo"]),
            r"rejected_log_probs has shape \(2,\)",
        ),
        (lambda: preference.loss(ONES, ONES, variant=PRESETS["simpo"]), "pass chosen_lengths"),
        (lambda: preference.loss(ONES, ONES, variant=PRESETS["orpo"]), "pass chosen_lengths"),
        (
            lambda: preference.loss(
                ONES, ONES, ONES, ONES, variant=dataclasses.replace(PRESETS["exo"], label_smoothing=0.0)
            ),
            "soft labels",
        ),
        (
            lambda: preference.loss(
                ONES, ONES, ONES, ONES, variant=dataclasses.replace(PRESETS["robust"], label_smoothing=0.5)
            ),
            r"\[0, 0.5\)",
        ),
        (lambda: preference.loss(ONES, ONES, ONES, ONES, variant=preference.Variant(link="x")), "'apo_zero'"),
        (lambda: preference.kto(ONES, np.ones(2), reference_point=0.0), r"desirable has shape \(2,\)"),
        (lambda: preference.sequence_log_probs(ONES, ONES), r"expected \[B, T\]"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
