"""Reward models: what is read where, a planted reward, calibration by hand, process rewards, parts and devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.losses import reward as losses
from jaxrl.nets.language_model import language_model
from jaxrl.nets.scalar_model import scalar_model, with_head
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import reward_model
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.types import Pairs, TokenBatch
from tests.oracles import losses as oracle

EOS = 1


@pytest.fixture(scope="module")
def scored(model, params):
    """Parameters with a head that says something."""
    head = {"kernel": jax.random.normal(jax.random.key(9), (16,)), "bias": jnp.float32(0.3)}
    return {"model": params, "head": head}


def responses(rng, rows, *, width=8, prompt=2):
    """A prompt, letters, EOS, then padding that shares EOS's id."""
    lengths = rng.integers(prompt + 1, width + 1, size=rows)
    columns, tokens = np.arange(width), rng.integers(2, 13, size=(rows, width))
    tokens[columns >= lengths[:, None] - 1] = EOS
    mask = (columns >= prompt) & (columns < lengths[:, None])
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32)), lengths


def test_the_last_token_of_the_response_is_read(model, scored):
    """Its EOS, though padding shares the id; what stands behind it changes nothing."""
    batch, lengths = responses(np.random.default_rng(0), 6)
    every = np.asarray(jax.jit(scalar_model(model).apply)(scored, batch.tokens))
    read = jax.jit(lambda params, batch: reward_model.score(model, params, batch))
    rewards = read(scored, batch)
    np.testing.assert_allclose(rewards, every[np.arange(6), lengths - 1], rtol=1e-6)
    garbage = jnp.where(np.arange(8) >= lengths[:, None], 7, batch.tokens)
    np.testing.assert_allclose(read(scored, batch.replace(tokens=garbage)), rewards, rtol=1e-5)
    with pytest.raises(ValueError, match="these are packed: encode them without packing"):
        reward_model.score(model, scored, batch.replace(segments=jnp.ones((6, 8), jnp.int32)))


def test_rollouts_score_as_their_texts_do(model, params, scored, prompts):
    """Padded on the left by a sampler or on the right by a data set: the same rewards."""
    sampling = Sampling(max_tokens=5, temperature=1.5)
    sampled = jax.jit(partial(rollout, model, sampling=sampling, eos_id=EOS, pad_id=0, samples=2))(
        params, prompts, jax.random.key(0)
    )
    rewards = jax.jit(lambda params, sampled: reward_model.score_rollout(model, params, sampled))(scored, sampled)
    starts = sampled.prompt_width - np.asarray(sampled.prompt_lengths)
    ends = sampled.prompt_width + np.asarray(sampled.lengths)
    tokens, mask = np.zeros((8, 9), np.int32), np.zeros((8, 9), np.float32)
    for row in range(8):
        text = np.asarray(sampled.tokens)[row, starts[row] : ends[row]]
        tokens[row, : len(text)], mask[row, len(text) - int(sampled.lengths[row]) : len(text)] = text, 1
    batch = TokenBatch(jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(rewards, reward_model.score(model, scored, batch), rtol=1e-4, atol=1e-5)
    assert len(set(np.asarray(sampled.lengths).tolist())) > 1


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(1)
    (chosen, _), (rejected, _) = responses(rng, 16), responses(rng, 16, width=7)
    return Pairs(chosen, rejected, jnp.asarray(rng.random(16), jnp.float32))


@pytest.mark.parametrize("use_margin", [True, False])
def test_loss_against_the_oracle(use_margin, model, scored, pairs):
    config = reward_model.RMConfig(batch=16, use_margin=use_margin, centring=0.1)
    chosen, rejected = (
        np.asarray(jax.jit(lambda params, side: reward_model.score(model, params, side))(scored, side), np.float64)
        for side in (pairs.chosen, pairs.rejected)
    )
    value, metrics = jax.jit(lambda params, pairs: reward_model.loss(config, model, params, pairs))(scored, pairs)
    margins = np.asarray(pairs.margin, np.float64) if use_margin else np.zeros(16)
    one = lambda i: oracle.bradley_terry(chosen[i : i + 1], rejected[i : i + 1], margins[i], 0.1)[0]
    np.testing.assert_allclose(value.mean, np.mean([one(i) for i in range(16)]), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/accuracies"].mean, (chosen > rejected).mean())
    np.testing.assert_allclose(metrics["rewards/margins"].mean, (chosen - rejected).mean(), rtol=1e-3)


@pytest.mark.parametrize(("micro_batches", "mesh"), [(4, ""), (1, "data=4,fsdp=2")], ids=["parts", "devices"])
def test_parts_and_devices_change_nothing(micro_batches, mesh, model, params, pairs):
    outcomes = []
    for parts, devices in ((1, ""), (micro_batches, mesh)):
        place = parallel.make_mesh(devices) if devices else None
        options = {"constrain": partial(parallel.shard_batch, mesh=place)} if place else {}
        config = reward_model.RMConfig(batch=8, micro_batches=parts, centring=0.05)
        recipe = reward_model.make(config, model, optax.sgd(0.1), **options)
        state = recipe.init(jax.random.key(0), params)
        if place:
            state = jax.device_put(state, parallel.state_shardings(state, place))
        (result,) = loop.run(recipe.step, state, pairs, steps=3, chunk=3)
        outcomes.append((jax.device_get(result.state.params), result.metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), *(params for params, _ in outcomes))
    for row, expected in zip(*(metrics for _, metrics in outcomes), strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    assert outcomes[0][1][0]["rewards/margins"] == 0.0 != outcomes[0][1][2]["rewards/margins"]


def test_learns_a_planted_reward_and_knows_how_sure_it_is():
    """Every token has a worth, a response of five the sum of those: new pairs are ordered right (> 95 %). With labels
    drawn as Bradley-Terry says, the model's confidence is right too: its calibration error is small, an overconfident
    model's is not."""
    rng = np.random.default_rng(0)
    worth = rng.normal(size=13)
    model = language_model(
        TransformerConfig(vocab_size=13, width=16, layers=1, heads=2, kv_heads=1, ffn=16, max_length=16)
    )
    recipe = reward_model.make(
        reward_model.RMConfig(batch=256), model, optax.adam(optax.cosine_decay_schedule(2e-2, 200))
    )
    initial = jax.jit(model.init)(jax.random.key(1))

    def data(rows, *, noisy):
        sides = []
        for _ in range(2):
            tokens = np.concatenate(
                [np.full((rows, 1), 2), rng.integers(2, 13, size=(rows, 5)), np.full((rows, 1), EOS)], axis=1
            )
            mask = np.broadcast_to(np.arange(7) > 0, tokens.shape)
            sides.append(TokenBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32)))
        first, second = (worth[np.asarray(side.tokens)].sum(1) for side in sides)
        ahead = 1 / (1 + np.exp(second - first)) > (rng.random(rows) if noisy else 0.5)
        choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(ahead[:, None], x, y), a, b)
        return Pairs(choose(*sides), choose(*sides[::-1]))

    found = {}
    for noisy in (False, True):
        training, test = data(8192, noisy=noisy), data(2048, noisy=noisy)
        *_, last = loop.run(recipe.step, recipe.init(jax.random.key(0), initial), training, steps=200, chunk=100)
        differences = jax.jit(lambda p, pairs: reward_model.margins(model, p, pairs, rows=512))(last.state.params, test)
        found[noisy] = np.asarray(differences)
    assert reward_model.calibration(found[False]).accuracy > 0.95
    honest = reward_model.calibration(found[True])
    assert honest.error < 0.04 and 0.8 < honest.accuracy < 0.9, honest
    assert reward_model.calibration(3 * found[True]).error > honest.error + 0.05


def test_calibration_by_hand():
    """Four pairs in two bins, and a tie: confidences and outcomes written out."""
    logit = lambda p: np.log(p / (1 - p))
    differences = [logit(0.6), -logit(0.7), logit(0.9), logit(0.8), 0.0]
    result = reward_model.calibration(differences, bins=2)
    low, high = result.table
    assert (low["low"], low["high"], low["count"], high["count"]) == (0.5, 0.75, 3, 2)
    np.testing.assert_allclose(low["confidence"], (0.6 + 0.7 + 0.5) / 3)
    np.testing.assert_allclose(low["accuracy"], (1 + 0 + 0.5) / 3)
    np.testing.assert_allclose(high["confidence"], 0.85)
    np.testing.assert_allclose(result.accuracy, 3.5 / 5)
    np.testing.assert_allclose(result.error, 3 / 5 * abs(0.5 - 0.6) + 2 / 5 * abs(1 - 0.85))
    sure = reward_model.calibration([1e4, -1e4], bins=3)
    assert sure.error == 0.5 and sure.table[0]["accuracy"] is None and sure.table[2]["count"] == 2
    for wrong in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="calibration: the differences have shape"):
            reward_model.calibration(wrong)


def test_process_loss_and_scores_against_loops():
    """Loss, accuracy, and both ways to one score, step by step."""
    rng = np.random.default_rng(0)
    rewards, ends = rng.normal(size=(5, 6)) * 2, rng.random((5, 6)) < 0.5
    ends[2] = False
    correct = (rng.random((5, 6)) < 0.5) & ends
    values, diagnostics = losses.process(rewards, correct)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for row in range(5):
        product, weakest = 1.0, 1.0
        for column in range(6):
            r, y = rewards[row, column], correct[row, column]
            np.testing.assert_allclose(values[row, column], -np.log(sigmoid(r) if y else 1 - sigmoid(r)), rtol=1e-5)
            assert diagnostics["accuracy"][row, column] == ((r > 0) == y)
            if ends[row, column]:
                product, weakest = product * sigmoid(r), min(weakest, sigmoid(r))
        np.testing.assert_allclose(losses.solution_score(rewards, ends)[row], product, rtol=1e-5)
        np.testing.assert_allclose(losses.solution_score(rewards, ends, how="min")[row], weakest, rtol=1e-5)
    gradient = jax.grad(lambda r: losses.process(r, correct)[0].sum())(jnp.float32(rewards))
    np.testing.assert_allclose(gradient, sigmoid(rewards) - correct, atol=1e-6)
    with pytest.raises(ValueError, match="how is 'mean', expected one of 'product', 'min'"):
        losses.solution_score(rewards, ends, how="mean")
    with pytest.raises(ValueError, match="correct has shape"):
        losses.process(rewards, correct[0])


@pytest.fixture(scope="module")
def judged_steps():
    """Solutions of three steps of two tokens; a step is right if its first token is even. Width 7 with the prompt."""
    rng = np.random.default_rng(3)
    tokens = np.concatenate([np.full((512, 1), 2), rng.integers(2, 13, size=(512, 6))], axis=1)
    ends, correct = np.zeros((512, 7), np.float32), np.zeros((512, 7), np.float32)
    for end in (2, 4, 6):
        tokens[:, end] = 3
        ends[:, end], correct[:, end] = 1, tokens[:, end - 1] % 2 == 0
    ends[:100, 6] = 0  # shorter solutions
    correct[:100, 6] = 0
    return reward_model.Steps(TokenBatch(jnp.asarray(tokens), jnp.asarray(ends)), jnp.asarray(correct))


def test_process_model_learns_which_step_is_wrong(model, judged_steps):
    """Step accuracy rises to nearly 1, and the product of steps separates solutions without a wrong one."""
    config = reward_model.RMConfig(kind="process", batch=128)
    recipe = reward_model.make(config, model, optax.adam(1e-2))
    state = recipe.init(jax.random.key(0), jax.jit(model.init)(jax.random.key(1)))
    *_, last = loop.run(recipe.step, state, judged_steps, steps=120, chunk=60)
    assert last.metrics[-1]["rewards/step_accuracy"] > 0.97
    examples, correct = judged_steps.examples, np.asarray(judged_steps.correct)
    whole = (correct.sum(1) == np.asarray(examples.loss_mask).sum(1)).astype(bool)
    for how in ("product", "min"):
        read = jax.jit(lambda params, batch, how=how: reward_model.solution_scores(model, params, batch, how=how))
        scores = np.asarray(read(last.state.params, examples))
        assert 0 <= scores.min() and scores.max() <= 1
        assert ((scores > 0.5) == whole).mean() > 0.95


def test_process_parts_change_nothing(model, scored, judged_steps):
    """Solutions of unequal numbers of steps: the mean is over steps, whatever the parts."""
    outcomes = []
    for parts in (1, 4):
        recipe = reward_model.make(
            reward_model.RMConfig(kind="process", batch=16, micro_batches=parts), model, optax.sgd(0.1)
        )
        state = recipe.init(jax.random.key(0), scored["model"])
        outcomes.append(jax.jit(recipe.step)(state.replace(params=scored), judged_steps))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), *(state.params for state, _ in outcomes))
    np.testing.assert_allclose(*(list(metrics.values()) for _, metrics in outcomes), rtol=1e-4)


def test_a_new_head_says_nothing(model, params, pairs):
    scores = reward_model.score(model, with_head(model, params), pairs.chosen)
    np.testing.assert_array_equal(scores, np.zeros(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "steps"}, "kind is 'steps'; expected outcome or process"),
        ({"centring": -0.1}, "centring is -0.1"),
        ({"batch": 3, "micro_batches": 2}, "batch is 3 and micro_batches is 2"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        reward_model.RMConfig(**options)
