"""Online DPO: best and worst of a group, judges of several kinds, the reference fixed or replaced, parts, devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.posttrain import online
from jaxrl.posttrain.grpo import Problems
from jaxrl.posttrain.rollout import Sampling, completion_log_probs
from tests.oracles import losses_preference as oracle

EOS, PAD = 1, 0
SAMPLING = Sampling(max_tokens=6, temperature=1.5)
SMALL = online.OnlineConfig(prompts=4, group=4, beta=0.5, sampling=SAMPLING)


def share_of_even_tokens(rollout, answers):
    even = (rollout.completions % 2 == 0) * rollout.mask
    return even.sum(axis=1) / rollout.lengths


@pytest.fixture(scope="module")
def problems(prompts):
    return Problems(prompts, jnp.zeros(4))


def build(config, model, optimizer=None, **options):
    return online.make(config, model, optimizer or optax.sgd(0.3), eos_id=EOS, pad_id=PAD, max_grad_norm=0.0, **options)


def test_extremes_are_the_first_best_and_worst_of_what_is_known():
    nan = jnp.nan
    scores = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [nan, 5.0, 4.0], [nan, 1.0, nan], [nan, nan, nan]])
    best, worst, decided = online.extremes(scores)
    assert best[:3].tolist() == [1, 0, 1] and worst[:3].tolist() == [0, 0, 2]
    assert decided.tolist() == [True, False, True, False, False]


def test_learn_is_dpo_on_best_and_worst(model, params, problems):
    """The loss is the oracle's on the pairs picked by hand; groups without a verdict count for nothing."""
    recipe = build(SMALL, model)
    state = recipe.init(jax.random.key(0), params)
    rollout, rows = jax.jit(recipe.sample)(state, problems.prompts)
    assert rows.shape == (4,) and rollout.lengths.shape == (16,)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    scores = np.random.default_rng(0).normal(size=(4, 4))
    scores[1] = 0.5  # a draw
    scores[2, :3] = np.nan  # one known score is no comparison
    after, metrics = jax.jit(recipe.learn)(dataclasses.replace(state, params=moved), rollout, jnp.asarray(scores))

    def sums(params):
        log_probs, _ = jax.jit(
            lambda params: completion_log_probs(model, params, rollout, temperature=SAMPLING.temperature)
        )(params)
        return (np.asarray(log_probs, np.float64) * np.asarray(rollout.mask)).sum(1).reshape(4, 4)

    policy, reference = sums(moved), sums(params)
    values = []
    for row in (0, 3):
        best, worst = scores[row].argmax(), scores[row].argmin()
        values.append(oracle.dpo(*(x[row, i] for x in (policy, reference) for i in (best, worst)), 1, 1, b=0.5))
    np.testing.assert_allclose(metrics["train/loss"], np.mean(values), rtol=1e-4)
    assert metrics["judge/decided"] == 0.5 and after.step == 1
    np.testing.assert_allclose(metrics["reward/mean"], np.nanmean(scores), rtol=1e-5)


def test_no_verdicts_teach_nothing(model, params, problems):
    recipe = build(SMALL, model)
    state = recipe.init(jax.random.key(0), params)
    rollout, _ = jax.jit(recipe.sample)(state, problems.prompts)
    after, metrics = jax.jit(recipe.learn)(state, rollout, jnp.full(16, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    assert metrics["judge/decided"] == 0 and metrics["train/skipped"] == 0


@pytest.mark.parametrize("every", [0, 1, 2])
def test_reference_stands_or_follows(every, model, params, problems):
    """0: the first one stays. 1: it is the current policy, and no copy is kept. 2: replaced at every second step."""
    config = dataclasses.replace(SMALL, reference_every=every)
    recipe = build(config, model)
    learn, states = jax.jit(recipe.learn), [recipe.init(jax.random.key(0), params)]
    rollout, _ = jax.jit(recipe.sample)(states[0], problems.prompts)
    losses = []
    for _ in range(2):
        state, metrics = learn(states[-1], rollout, jnp.arange(16.0))
        states, losses = [*states, state], [*losses, float(metrics["train/loss"])]
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    if every == 1:
        assert states[0].reference is None
        np.testing.assert_allclose(losses[1], np.log(2), rtol=1e-5)
    else:
        assert losses[1] < losses[0] - 0.01
        jax.tree.map(np.testing.assert_array_equal, states[1].reference, params)
        kept = params if every == 0 else states[2].params
        jax.tree.map(np.testing.assert_array_equal, states[2].reference, kept)


@pytest.mark.parametrize(
    ("options", "mesh"),
    [({"micro_batches": 2, "epochs": 2}, ""), ({}, "data=2,fsdp=2")],
    ids=["parts", "devices"],
)
def test_parts_and_devices_change_nothing(options, mesh, model, params, problems):
    outcomes = []
    for divided in (False, True):
        config = dataclasses.replace(SMALL, **options | ({} if divided else {"micro_batches": 1}))
        devices = parallel.make_mesh(mesh, devices=jax.devices()[:4]) if divided and mesh else None
        recipe = build(config, model, **({"constrain": partial(parallel.shard_batch, mesh=devices)} if devices else {}))
        step = online.fused(recipe, share_of_even_tokens, config)
        state = recipe.init(jax.random.key(4), params)
        if devices:
            state = jax.device_put(state, parallel.state_shardings(state, devices))
        (result,) = loop.run(step, state, problems, steps=2, chunk=2)
        outcomes.append((jax.device_get(result.state.params), result.metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *(params for params, _ in outcomes))
    for row, expected in zip(*(metrics for _, metrics in outcomes), strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-4, atol=2e-5)


def test_a_judge_of_texts_gives_the_run_of_the_same_reward(model, params, problems):
    """A Python judge that scores texts as the JAX reward scores tokens: the same parameters after three steps."""
    tokenizer = load_tokenizer("char:abcdefghijk")  # a has id 0
    asked = ["first", "second", "third", "fourth"]

    def judge(prompts, completions):
        assert len(prompts) == 4 and set(prompts) <= set(asked)
        even = lambda text: sum(tokenizer.token_id(letter) % 2 == 0 for letter in text)
        return [[float(even(text)) for text in group] for group in completions]

    def count_even(rollout, _):
        even = (rollout.completions % 2 == 0) & (rollout.completions < 11)
        return (even * rollout.mask).sum(axis=1)

    recipe = build(SMALL, model)
    outcomes = []
    for step, jit in (
        (online.fused(recipe, count_even, SMALL), True),
        (online.hosted(recipe, online.judged(judge, tokenizer, asked, group=4)), False),
    ):
        state = recipe.init(jax.random.key(1), jax.tree.map(jnp.copy, params))
        *_, last = loop.run(step, state, problems, steps=3, chunk=3, jit=jit)
        outcomes.append(last)
    compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(compare, *(outcome.state.params for outcome in outcomes))
    assert [row["judge/decided"] for row in outcomes[0].metrics] == [
        row["judge/decided"] for row in outcomes[1].metrics
    ]


def test_rewards_rise(model, params, problems):
    recipe = build(SMALL, model, optax.adam(2e-3))
    step = online.fused(recipe, share_of_even_tokens, SMALL)
    *_, last = loop.run(step, recipe.init(jax.random.key(1), params), problems, steps=24, chunk=24)
    rewards = [row["reward/mean"] for row in last.metrics]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.1, rewards


def test_winners_of_two_are_verdicts_too(model, params, problems):
    config = dataclasses.replace(SMALL, group=2)
    recipe = build(config, model)
    rollout, rows = jax.jit(recipe.sample)(recipe.init(jax.random.key(0), params), problems.prompts)
    tokenizer = load_tokenizer("char:abcdefghijk")
    scores = online.judged(lambda prompts, completions: [1, 0, None, (3, 4)], tokenizer, "abcd", group=2)
    np.testing.assert_array_equal(scores(rollout, np.asarray(rows)), [0, 1, 1, 0, np.nan, np.nan, 3, 4])
    for verdict, message in (([2] * 4, "verdict is 2; expected 2 scores, 0 or 1"), ([0] * 3, "3 verdicts for 4")):
        with pytest.raises(ValueError, match=message):
            online.judged(lambda prompts, texts, given=verdict: given, tokenizer, "abcd", group=2)(
                rollout, np.asarray(rows)
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dpo2"}, "variant is 'dpo2'; expected one of dpo"),
        ({"variant": "aot"}, "variant aot sorts the pairs"),
        ({"group": 1}, "group is 1; a best and a worst"),
        ({"epochs": 0}, "epochs is 0"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature is 0; greedy"),
        ({"prompts": 4, "micro_batches": 3}, "batch is 4 and micro_batches is 3"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        online.OnlineConfig(**options)
