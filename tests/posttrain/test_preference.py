"""The DPO family as steps: closed-form optima on a bandit, gradients, parts, devices, packing, stored references."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.losses.preference import PRESETS
from jaxrl.posttrain import preference
from jaxrl.types import Pairs, TokenBatch
from tests.oracles import losses_preference as oracle
from tests.posttrain.tabular import bandit, comparisons, descent

STRENGTHS = np.array([1, 2, 3, 4])  # exp(reward): P(a beats b) = s_a / (s_a + s_b)
REFERENCE = np.array([0.3, -0.5, 0.8, 0.1])
EOS = 1


def optimum(config, pairs, *, steps=600):
    """Where gradient descent on all pairs ends, as a distribution over the responses; it begins at the reference."""
    model = bandit(len(REFERENCE))
    recipe = preference.make(config, model, descent(steps), max_grad_norm=0.0)
    state = recipe.init(jax.random.key(0), {"logits": jnp.asarray(REFERENCE, jnp.float32)})
    data = recipe.reference(state.params, pairs)
    *_, last = loop.run(recipe.step, state, data, steps=steps, chunk=steps)
    return np.asarray(jax.nn.softmax(last.state.params["logits"]), np.float64), last.metrics


def tilted(gain):
    """The closed form: ref(y) exp(gain(y)) / Z."""
    weights = np.exp(REFERENCE + gain)
    return weights / weights.sum()


def all_pairs(count):
    """{(a, b): how often a beats b} over ordered pairs of different responses."""
    return {(a, b): count(a, b) for a in range(4) for b in range(4) if a != b and count(a, b)}


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_finds_the_kl_regularised_optimum(beta):
    """With preferences that follow Bradley-Terry, pi* = ref exp(r / beta) / Z (arXiv 2305.18290, equation 4)."""
    pairs = comparisons(all_pairs(lambda a, b: STRENGTHS[a]))
    config = preference.DPOConfig(batch=pairs.chosen.tokens.shape[0], beta=beta)
    policy, metrics = optimum(config, pairs)
    expected = tilted(np.log(STRENGTHS) / beta)
    assert 0.5 * np.abs(policy - expected).sum() < 1e-5
    assert metrics[-1]["train/grad_norm"] < 1e-5 < metrics[0]["train/grad_norm"]


def test_ipo_finds_its_own_optimum():
    """With every pair as likely, pi* = ref exp(P(y beats mu) / beta) / Z, mu uniform (arXiv 2310.12036, section 5)."""
    wins = np.array([[STRENGTHS[a] / (STRENGTHS[a] + STRENGTHS[b]) for b in range(4)] for a in range(4)])
    counts = all_pairs(lambda a, b: round(420 * wins[a, b]))  # 420: every share is a whole number
    unequal = comparisons(counts)
    config = preference.DPOConfig(variant="ipo", beta=0.4, batch=unequal.chosen.tokens.shape[0])
    policy, _ = optimum(config, unequal)
    expected = tilted(wins.mean(axis=1) / 0.4)
    assert 0.5 * np.abs(policy - expected).sum() < 1e-5


def test_smoothed_labels_have_a_finite_optimum():
    """One pair, always the same winner: cDPO stops where sigmoid(beta h) = 1 - e; with plain DPO h has no bound."""
    pairs = comparisons({(2, 0): 4})
    config = preference.DPOConfig(variant="cdpo", label_smoothing=0.2, beta=0.5, batch=4)
    policy, _ = optimum(config, pairs)
    margin = np.log(policy[2] / policy[0]) - (REFERENCE[2] - REFERENCE[0])
    np.testing.assert_allclose(0.5 * margin, np.log(0.8 / 0.2), atol=1e-4)
    plain, _ = optimum(preference.DPOConfig(beta=0.5, batch=4), pairs)
    assert np.log(plain[2] / plain[0]) - (REFERENCE[2] - REFERENCE[0]) > margin + 1


def test_robust_dpo_undoes_flipped_labels():
    """A fifth of the labels flipped: the robust loss finds the optimum of the true ones, plain DPO a flatter one."""
    pairs = comparisons(all_pairs(lambda a, b: 4 * STRENGTHS[a] + STRENGTHS[b]))
    size = {"beta": 1.0, "batch": pairs.chosen.tokens.shape[0]}
    policy, _ = optimum(preference.DPOConfig(variant="robust", label_smoothing=0.2, **size), pairs)
    expected = tilted(np.log(STRENGTHS))
    assert 0.5 * np.abs(policy - expected).sum() < 1e-5
    fooled, _ = optimum(preference.DPOConfig(**size), pairs)
    assert 0.5 * np.abs(fooled - expected).sum() > 0.05


def random_pairs(rows, *, width=7, seed=0):
    """Pairs of unequal lengths that share a prompt; padding and EOS share an id."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(2, 13, size=(rows, 2))

    def side(width):
        tokens = np.concatenate([prompts, rng.integers(2, 13, size=(rows, width - 2))], axis=1)
        lengths = rng.integers(4, width + 1, size=rows)
        columns = np.arange(width)
        tokens[columns >= lengths[:, None] - 1] = EOS
        mask = (columns < lengths[:, None]) & (columns >= 2)
        return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32))

    return Pairs(side(width), side(width - 1))


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(16)


@pytest.fixture(scope="module")
def reference(params):
    """Another model than the policy, so that log-ratios are far from zero."""
    return jax.tree.map(lambda x: x * 0.9, params)


def columns_of(model, params, reference, pairs):
    """The oracle's columns: log-probs summed over the tokens of each response, one model and one row at a time."""

    def sums(params, side):
        logits = np.asarray(jax.jit(model.apply)(params, side.tokens)[0] @ model.unembedding(params), np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows, width = side.tokens.shape
        return [
            sum(log_probs[i, t - 1, side.tokens[i, t]] for t in range(1, width) if side.loss_mask[i, t])
            for i in range(rows)
        ]

    sides = (pairs.chosen, pairs.rejected)
    lengths = [np.asarray(side.loss_mask).sum(1).astype(int).tolist() for side in sides]
    return *(sums(p, side) for p in (params, reference) for side in sides), *lengths


@pytest.fixture(scope="module")
def every_row(model, params, reference, pairs):
    """{variant: (reference data, loss, metrics)}, compiled as one program."""
    configs = {variant: preference.DPOConfig(variant=variant, batch=16) for variant in PRESETS}

    def outcome(config, params, reference, pairs):
        data = preference.make(config, model, optax.sgd(0.1)).reference(reference, pairs)
        return data, *preference.loss(config, model, params, data)[:2]

    outcomes = lambda *args: {variant: outcome(config, *args) for variant, config in configs.items()}
    return jax.jit(outcomes)(params, reference, pairs)


@pytest.fixture(scope="module")
def columns(model, params, reference, pairs):
    return columns_of(model, params, reference, pairs)


@pytest.mark.parametrize("variant", sorted(PRESETS))
def test_every_row_against_the_oracle(variant, every_row, columns):
    """The loss of a batch, from tokens, and the metrics users watch."""
    data, value, metrics = every_row[variant]
    np.testing.assert_allclose(value.mean, np.mean(oracle.family(variant, *columns)), rtol=3e-4)
    chosen, rejected, ref_chosen, ref_rejected = map(np.array, columns[:4])
    np.testing.assert_allclose(metrics["logps/chosen"].mean, chosen.mean(), rtol=1e-5)
    assert metrics["policy/entropy"].mean > 0
    row = PRESETS[variant]
    if row.score == "log_ratio":
        margins = row.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        np.testing.assert_allclose(metrics["rewards/margins"].mean, margins.mean(), rtol=2e-4)
        np.testing.assert_allclose(metrics["rewards/accuracies"].mean, (margins > 0).mean())
        np.testing.assert_allclose(data.chosen, ref_chosen, rtol=1e-5)
    else:
        assert data.chosen is None


def test_gradient_against_finite_differences():
    """The parameters' change in one step of SGD, on the bandit, against the oracle's loss moved by hand."""
    weights = {"dpo": 0.8, "bco": 0.2, "nll": 1.0}
    config = preference.DPOConfig(mixture=weights, batch=30, beta=0.7)
    pairs = comparisons(all_pairs(lambda a, b: STRENGTHS[a]))
    model, start = bandit(4), np.array([0.5, -1.0, 0.2, 0.7])
    recipe = preference.make(config, model, optax.sgd(1.0), max_grad_norm=0.0)
    data = recipe.reference({"logits": jnp.asarray(REFERENCE, jnp.float32)}, pairs)
    state = recipe.init(jax.random.key(0), {"logits": jnp.asarray(start, jnp.float32)})
    state = dataclasses.replace(state, reward_mean=jnp.float32(0.3))
    after, metrics = jax.jit(recipe.step)(state, data)

    def total(logits):
        log_probs, reference = (x - np.log(np.exp(x).sum()) for x in (logits, REFERENCE))
        values = []
        for winner, loser in zip(*(np.asarray(s.tokens)[:, 1] for s in (pairs.chosen, pairs.rejected)), strict=True):
            row = log_probs[winner], log_probs[loser], reference[winner], reference[loser], 1, 1
            bco = oracle.bco(*row, b=0.7, delta=0.3)
            values.append(0.8 * oracle.dpo(*row, b=0.7) + 0.2 * bco - log_probs[winner])
        return np.mean(values)

    np.testing.assert_allclose(metrics["train/loss"], total(start), rtol=1e-6)
    moved = [(total(start + 1e-5 * e) - total(start - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
    np.testing.assert_allclose(state.params["logits"] - after.params["logits"], moved, atol=2e-6)
    rewards = 0.5 * (metrics["rewards/chosen"] + metrics["rewards/rejected"])
    np.testing.assert_allclose(after.reward_mean, 0.9 * 0.3 + 0.1 * rewards, rtol=1e-6)


@pytest.fixture(scope="module")
def data(model, reference, pairs):
    """The pairs with the other model's log-probs, computed in uneven parts."""
    return jax.jit(preference.make(preference.DPOConfig(batch=7), model, optax.sgd(0.1)).reference)(reference, pairs)


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        ({"mixture": {"dpo": 0.8, "bco": 0.2, "orpo": 1.0}, "micro_batches": 4}, ""),
        ({}, "data=4,fsdp=2"),
        ({"reference_every": 1, "micro_batches": 2}, ""),
        ({"variant": "aot"}, "data=8"),
    ],
    ids=["parts", "devices", "moving", "sorted"],
)
def test_parts_and_devices_change_nothing(options, mesh, model, params, data):
    """Three steps in parts or on eight devices end where those in one piece on one device end."""
    outcomes = []
    for divided in (False, True):
        config = preference.DPOConfig(**{"batch": 8, **options} | ({} if divided else {"micro_batches": 1}))
        devices = parallel.make_mesh(mesh) if divided and mesh else None
        place = {"constrain": partial(parallel.shard_batch, mesh=devices)} if devices else {}
        recipe = preference.make(config, model, optax.sgd(0.3), **place)
        state = recipe.init(jax.random.key(0), params)
        if devices:
            state = jax.device_put(state, parallel.state_shardings(state, devices))
        (result,) = loop.run(recipe.step, state, data, steps=3, chunk=3)
        outcomes.append((jax.device_get(result.state.params), result.metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), *(params for params, _ in outcomes))
    for row, expected in zip(*(metrics for _, metrics in outcomes), strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), outcomes[0][0], jax.device_get(params))
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_the_stored_reference_is_the_one_recomputed(model, params, pairs):
    """Computed in uneven parts and stored, it is what a forward pass over each batch says: a policy at its reference
    has reward 0 everywhere, and the first loss is log 2."""
    recipe = preference.make(preference.DPOConfig(batch=7), model, optax.sgd(0.1))
    data = jax.jit(recipe.reference)(params, pairs)
    assert data.chosen.shape == data.rejected.shape == (16,)
    whole = columns_of(model, params, params, pairs)
    np.testing.assert_allclose(data.chosen, whole[0], rtol=1e-5)
    np.testing.assert_allclose(data.rejected, whole[1], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(recipe.margins)(params, data), np.zeros(16), atol=1e-5)
    _, metrics = jax.jit(recipe.step)(recipe.init(jax.random.key(0), params), data)
    np.testing.assert_allclose(metrics["train/loss"], np.log(2), rtol=1e-5)


def test_packed_pairs_are_the_same_pairs(model, params, reference):
    """Two pairs to a row, chosen and rejected in the same order: the loss and its gradient are those of four rows."""
    pairs = random_pairs(4)

    def packed(side):
        lengths = np.asarray(side.loss_mask.shape[1] - jnp.argmax(side.loss_mask[:, ::-1] > 0, axis=1))
        tokens, mask, segments = (np.zeros((2, 2 * side.tokens.shape[1]), np.int32) for _ in range(3))
        for row in range(2):
            start = 0
            for number, example in enumerate((2 * row, 2 * row + 1), 1):
                end = start + lengths[example]
                tokens[row, start:end] = side.tokens[example, : lengths[example]]
                mask[row, start:end] = side.loss_mask[example, : lengths[example]]
                segments[row, start:end] = number
                start = end
        return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32), jnp.asarray(segments))

    together = Pairs(packed(pairs.chosen), packed(pairs.rejected))
    config = preference.DPOConfig(variant="ipo", batch=2, nll_coef=0.5)
    recipe = preference.make(config, model, optax.sgd(0.1))
    outcomes = []
    for form in (pairs, together):
        data = jax.jit(recipe.reference)(reference, form)
        one = lambda params, data: preference.loss(config, model, params, data)[0].mean
        outcomes.append(jax.jit(jax.value_and_grad(one))(params, data))
    (value, gradient), (packed_value, packed_gradient) = outcomes
    np.testing.assert_allclose(packed_value, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), packed_gradient, gradient)
    with pytest.raises(ValueError, match="packed rows hold places without a pair"):
        aot = preference.DPOConfig(variant="aot", batch=2)
        preference.loss(aot, model, params, jax.jit(recipe.reference)(reference, together))


def test_a_moving_reference_follows_the_policy(model, params, pairs):
    """TR-DPO: every second step the reference becomes a mixture; without it no copy is kept."""
    config = preference.DPOConfig(batch=8, reference_every=2, reference_mix=0.6)
    recipe = preference.make(config, model, optax.sgd(0.3))
    state = recipe.init(jax.random.key(0), params)
    data, step = jax.jit(recipe.reference)(params, pairs), jax.jit(recipe.step)
    first, metrics = step(state, data)
    assert abs(metrics["rewards/margins"]) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, first.reference, params)
    second, metrics = step(first, data)
    assert abs(metrics["rewards/margins"]) > 1e-4  # against the first parameters, not those of the step
    mixed = jax.tree.map(lambda new, old: 0.6 * new + 0.4 * old, second.params, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), second.reference, mixed)
    still = preference.make(preference.DPOConfig(batch=8), model, optax.sgd(0.3)).init(jax.random.key(0), params)
    assert still.reference is None and still.reward_mean is None


def test_nothing_is_learnt_from_a_non_finite_loss(model, params, pairs):
    config = preference.DPOConfig(variant="bco", batch=16)
    recipe = preference.make(config, model, optax.sgd(0.3))
    data = jax.jit(recipe.reference)(params, pairs)
    broken = data.replace(chosen=data.chosen.at[3].set(jnp.nan))
    state = recipe.init(jax.random.key(0), params)
    after, metrics = jax.jit(recipe.step)(state, broken)
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    assert metrics["train/skipped"] == 1 and after.reward_mean == 0 and after.step == 1


def test_own_values_override_every_row():
    config = preference.DPOConfig(mixture={"dpo": 0.5, "ipo": 0.25, "nll": 2.0}, beta=0.3, per_token=True)
    (a, dpo), (b, ipo), (c, nll) = config.rows
    assert (a, b, c) == (0.5, 0.25, 2.0) and dpo.beta == ipo.beta == 0.3 and dpo.per_token and ipo.link == "ipo"
    assert nll == preference.NLL and config.needs_reference and not config.running_point
    assert not preference.DPOConfig(variant="simpo").needs_reference
    assert preference.DPOConfig(variant="simpo").rows[0][1].target_margin == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dpo2"}, "variant is 'dpo2'; expected one of dpo, cdpo"),
        ({"mixture": {"sft": 1.0}}, "mixture row is 'sft'; expected one of dpo, .*, nll"),
        ({"link": "logit"}, "link is 'logit'; expected one of sigmoid"),
        ({"score": "prob"}, "score is 'prob'; expected one of log_ratio"),
        ({"pairing": "all"}, "pairing is 'all'; expected one of pairs"),
        ({"batch": 6, "micro_batches": 4}, "batch is 6 and micro_batches is 4"),
        ({"batch": 0}, "batch is 0"),
        ({"variant": "aot", "micro_batches": 2}, "a sorted pairing compares the whole batch"),
        ({"beta": 0.0}, "beta is 0.0; expected a positive"),
        ({"reference_mix": 0.0}, "reference_mix is 0.0"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        preference.DPOConfig(**options)
