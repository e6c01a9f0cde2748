"""PPO for language models: every switch against plain numpy, the pieces of an iteration, and runs that learn."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import returns
from jaxrl.envs import statistics
from jaxrl.nets.scalar_model import scalar_model, with_head
from jaxrl.posttrain import ppo, ppo_advantages, reward_model, sft, update
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.scalars import token_scalars
from jaxrl.types import Finish, TokenBatch
from tests.oracles import ppo as oracle
from tests.posttrain.ppo_case import (
    EOS,
    RATE,
    SAMPLING,
    SMALL,
    build,
    close,
    differ,
    farthest,
    jit,
    same,
    share_of_even_tokens,
)

MOST = dataclasses.replace(
    SMALL, epochs=1, normalise_scores="normalise", score_clip=1.0, scale_rewards=True, normalise_advantages=True,
    value_clip=0.2,
)  # fmt: skip
NONE = 1e9


@pytest.fixture(scope="module")
def critic(model, params):
    """A critic with opinions: another trunk, another head."""
    other = jax.tree.map(lambda x: x * 1.1, params)
    return {"model": other, "head": {"kernel": jnp.linspace(-0.5, 0.5, 16), "bias": jnp.asarray(0.3)}}


@pytest.fixture(scope="module")
def drifted(model, params, critic):
    """A state whose policy has left its reference, and its completions: some cut off, some ended."""
    recipe = build(model, SMALL)
    state = recipe.init(jax.random.key(0), params, critic)
    noise = lambda x, k: x + 0.1 * jnp.std(x) * jax.random.normal(k, x.shape)
    leaves, tree = jax.tree.flatten(params)
    moved = jax.tree.unflatten(tree, map(noise, leaves, jax.random.split(jax.random.key(8), len(leaves))))
    return dataclasses.replace(state, params=moved)


@pytest.fixture(scope="module")
def batch(model, drifted, prompts):
    """`(rollout, scores)` of the drifted policy."""
    rollout, rows = jit(build(model, SMALL).sample)(drifted, prompts)
    cut = np.asarray(rollout.finish == Finish.LENGTH)
    assert 0 < cut.sum() < 16 and len(set(np.asarray(rollout.lengths).tolist())) > 2
    return rollout, share_of_even_tokens(rollout, jnp.repeat(jnp.asarray([0.0, 0.5, -2.5, 2.0])[rows], 4))


@pytest.fixture(scope="module")
def plain(model):
    """`(policy, critic, rollout) -> log-probs, entropy, values`, `[B, C]`: on texts without padding on the left, with
    all logits at once."""

    def forward(params, critic, texts, starts, tokens):
        rows = jnp.arange(texts.shape[0])[:, None]
        columns = starts[:, None] - 1 + jnp.arange(tokens.shape[1])[None]
        logits = model.apply(params, texts)[0] @ model.unembedding(params) / SAMPLING.temperature
        table = jax.nn.log_softmax(logits[rows, columns])
        values = scalar_model(model).apply(critic, texts)[rows, columns]
        chosen = jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]
        return chosen, -(jnp.exp(table) * table).sum(-1), values

    return forward


def without_padding(rollout):
    starts = rollout.prompt_width - np.asarray(rollout.prompt_lengths)
    rows = [np.asarray(row)[start:] for row, start in zip(rollout.tokens, starts, strict=True)]
    return jnp.asarray([np.pad(row, (0, rollout.tokens.shape[1] - len(row))) for row in rows])


@pytest.fixture(scope="module")
def descend(plain):
    """Gradient of the whole loss, written out; every weight and bound is a number, so that it compiles once."""

    def objective(trained, where, seen, weights):
        log_probs, entropy, values = plain(*trained, *where)
        ratio, gain = jnp.exp(log_probs - seen["old"]), seen["advantages"]
        low, high = 1 - weights["clip_low"], 1 + weights["clip_high"]
        surrogate = jnp.maximum(-ratio * gain, -jnp.clip(ratio, low, high) * gain)
        surrogate = jnp.where(gain < 0, jnp.minimum(surrogate, -weights["dual_clip"] * gain), surrogate)
        held = seen["values"] + jnp.clip(values - seen["values"], -weights["value_clip"], weights["value_clip"])
        errors = 0.5 * jnp.maximum((values - seen["targets"]) ** 2, (held - seen["targets"]) ** 2)
        gap = log_probs - seen["reference"]
        total = surrogate + weights["value_coef"] * errors - weights["entropy_coef"] * entropy
        total = total + weights["kl_loss"] * 0.5 * gap**2
        return jnp.where(seen["inside"] > 0, total, 0.0).sum() / seen["inside"].sum()

    return jit(jax.grad(objective))


SHAPING = {
    "plain": ({}, {}),
    "no KL": ({"kl_coef": 0.0}, {"kl_coef": 0.0}),
    "KL in the loss": ({"kl_in": "loss", "kl": "k2"}, {"kl_in": "loss"}),
    "discount": ({"discount": 0.9}, {"gamma": 0.9}),
    "lambda": ({"lambda_": 0.5}, {"lam": 0.5}),
    "scores scaled": ({"normalise_scores": "scale"}, {"normalise": "scale"}),
    "scores normalised": ({"normalise_scores": "normalise"}, {"normalise": "normalise"}),
    "scores clipped": ({"score_clip": 1.0}, {"score_clip": 1.0}),
    "cut off": ({"missing_eos_penalty": 1.5}, {"missing_eos": 1.5}),
    "rewards scaled": ({"scale_rewards": True}, {"scale_rewards": True}),
    "advantages normalised": ({"normalise_advantages": True}, {"whiten": True}),
    "advantages clipped": ({"advantage_clip": 0.5}, {"advantage_clip": 0.5}),
    "all": (
        {
            "normalise_scores": "normalise",
            "score_clip": 0.8,
            "missing_eos_penalty": 1.5,
            "scale_rewards": True,
            "discount": 0.9,
            "normalise_advantages": True,
            "advantage_clip": 1.2,
        },
        {
            "normalise": "normalise",
            "score_clip": 0.8,
            "missing_eos": 1.5,
            "scale_rewards": True,
            "gamma": 0.9,
            "whiten": True,
            "advantage_clip": 1.2,
        },
    ),
}
"""What comes before the updates: fields of the config, and the same for the oracle."""

UPDATES = {
    "KL, entropy and weights": (
        {"kl_in": "loss", "kl": "k2", "kl_coef": 0.7, "entropy_coef": 0.5, "value_coef": 0.5},
        {"kl_in": "loss"},
        {"kl_loss": 0.7, "entropy_coef": 0.5, "value_coef": 0.5},
    ),
    "clips": (
        {"clip_low": 0.9, "clip_high": 1.0, "dual_clip": 1.05, "value_clip": 0.05, "kl_coef": 2.0},
        {"kl_coef": 2.0},
        {"clip_low": 0.9, "clip_high": 1.0, "dual_clip": 1.05, "value_clip": 0.05},
    ),
}
"""The updates themselves: fields of the config, what the oracle shapes by, and the weights of its loss."""


@pytest.mark.parametrize("name", SHAPING)
def test_every_switch_before_the_updates(name):
    """Advantages and targets are the oracle's, and a switch that is on moves what it should: the targets too where
    rewards change, the advantages alone where only they do."""
    changes, shaping = SHAPING[name]
    rng = np.random.default_rng(1)
    old, reference, values = rng.normal(size=(3, 6, 5))
    lengths, finish = jnp.asarray([5, 1, 3, 5, 2, 4]), jnp.asarray([1, 0, 0, 1, 2, 0])
    scores = np.asarray([2.0, -1.0, np.nan, 0.5, 4.0, -3.0])
    fresh = statistics.statistics()

    def judge(**changes):
        config = ppo.PPOConfig(**changes)
        arrays = map(jnp.asarray, (scores, finish, lengths, old - reference, values))
        return ppo_advantages.judge(config, fresh, fresh, *arrays, kl_coef=config.kl_coef)

    judged, off = judge(**changes), judge()
    cut = np.asarray(finish) == Finish.LENGTH
    expected = oracle.experience(old, reference, values, np.asarray(lengths), cut, scores, **shaping)
    close((judged.advantages, judged.targets), expected[:2], atol=1e-5, rtol=1e-4)
    if changes:
        moved = lambda x, y: float(jnp.abs(x - y).max()) > 1e-3
        only_advantages = set(changes) <= {"normalise_advantages", "advantage_clip"}
        assert moved(judged.advantages, off.advantages) and moved(judged.targets, off.targets) != only_advantages
    assert judged.score_moments.count == 5 and judged.return_moments.count == (5 if "scale_rewards" in changes else 0)


@pytest.fixture(scope="module")
def updated(model, plain, descend, drifted, batch):
    """`(shaping, weights) -> (policy, critic)` after two updates by the oracle, remembered."""
    rollout, scores = batch
    where = without_padding(rollout), rollout.prompt_lengths, rollout.completions
    start = drifted.params, drifted.critic.params
    look = jit(lambda policy: plain(policy, start[1], *where))
    (old, _, values), (reference, _, _) = look(drifted.params), look(drifted.reference)

    def run(shaping, weights, scores=scores, updates=2):
        cut = np.asarray(rollout.finish) == Finish.LENGTH
        lengths = np.asarray(rollout.lengths)
        advantages, targets, inside = oracle.experience(old, reference, values, lengths, cut, scores, **shaping)
        seen = {"advantages": advantages, "targets": targets, "inside": inside}
        seen = {name: jnp.asarray(value, jnp.float32) for name, value in seen.items()}
        seen |= {"old": old, "reference": reference, "values": values}
        weights = {
            "clip_low": 0.2, "clip_high": 0.2, "dual_clip": NONE, "value_clip": NONE,
            "value_coef": 1.0, "entropy_coef": 0.0, "kl_loss": 0.0, **weights,
        }  # fmt: skip
        trained = start
        for _ in range(updates):
            gradient = descend(trained, where, seen, {k: jnp.float32(v) for k, v in weights.items()})
            step = lambda rate, p, g: jax.tree.map(lambda x, y: x - rate * y, p, g)
            trained = step(RATE, trained[0], gradient[0]), step(0.5 * RATE, trained[1], gradient[1])
        return trained

    return run


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_the_oracles(name, model, drifted, batch, updated):
    """Two updates from the same completions: policy and critic end where the loss written out leads, and each switch
    alone would lead elsewhere."""
    changes, shaping, weights = UPDATES[name]
    state, _ = jit(build(model, dataclasses.replace(SMALL, **changes)).learn)(drifted, *batch)
    expected = updated(shaping, weights)
    close((state.params, state.critic.params), expected, atol=2e-5, rtol=1e-3)
    for switch in weights:
        others = {name: value for name, value in weights.items() if name != switch}
        assert farthest(updated(shaping, others), expected) > 1e-4, f"the oracle does not see {switch}"


@pytest.fixture(scope="module")
def most(model):
    """`learn` with most switches on."""
    return jit(build(model, MOST).learn)


def test_missing_scores_leave_their_completions_out(most, drifted, batch, updated):
    """A NaN score: no moment, no reward, no token of it counts; and the metrics are of the others."""
    rollout, scores = batch
    holed = scores.at[jnp.asarray([2, 9])].set(jnp.nan)
    state, metrics = most(drifted, rollout, holed)
    shaping = {"normalise": "normalise", "score_clip": 1.0, "scale_rewards": True, "whiten": True}
    expected = updated(shaping, {"value_clip": 0.2}, scores=np.asarray(holed), updates=1)
    close((state.params, state.critic.params), expected, atol=2e-5, rtol=1e-3)
    np.testing.assert_allclose(metrics["reward/mean"], np.nanmean(holed), rtol=1e-5)
    assert state.scores.count == state.returns.count == 14 and metrics["train/skipped"] == 0


@pytest.mark.parametrize(("width", "lengths"), [(7, [7, 1, 3, 0, 6]), (1, [1, 0]), (17, [17, 16, 5])])
def test_rewards_and_advantages_of_tokens(width, lengths):
    """Against loops; what stands after the end may be anything, NaN included."""
    rng = np.random.default_rng(0)
    penalties, values = rng.normal(size=(2, len(lengths), width))
    scores = rng.normal(size=len(lengths))
    for row, length in enumerate(lengths):
        penalties[row, length:] = values[row, length:] = np.nan
    rewards = returns.token_rewards(*map(jnp.asarray, (scores, penalties, lengths)))
    np.testing.assert_allclose(rewards, oracle.token_rewards(scores, penalties, lengths), atol=1e-6)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.0), (1.0, 1.0)):
        got = jit(partial(returns.token_gae, discount=gamma, lambda_=lam))(
            rewards, jnp.asarray(values), jnp.asarray(lengths)
        )
        expected = oracle.token_gae(np.asarray(rewards), values, lengths, gamma, lam)
        close(tuple(got), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3,), (3, 4), (2,)), r"lengths has shape \(2,\), expected \[B\] = \(3,\)"),
        (((2,), (3, 4), (3,)), r"scores has shape \(2,\), expected \[B\] = \(3,\)"),
        (((3,), (3,), (3,)), r"token values have shape \(3,\), expected \[B, C\]"),
        (((3,), (3, 0), (3,)), "with at least one column"),
    ],
)
def test_misshapen_tokens_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        returns.token_rewards(*(jnp.ones(shape, jnp.int32) for shape in shapes))
    if "scores" not in message:
        with pytest.raises(ValueError, match=message):
            returns.token_gae(jnp.ones(shapes[1]), jnp.ones(shapes[1]), jnp.ones(shapes[2], jnp.int32))


def test_metrics_of_an_iteration(most, plain, drifted, batch):
    """On policy the ratio is 1; signs, sums and means of what is watched, by numpy."""
    rollout, scores = batch
    _, metrics = most(drifted, rollout, scores)
    where = without_padding(rollout), rollout.prompt_lengths, rollout.completions
    look = jit(lambda policy: plain(policy, drifted.critic.params, *where))
    (old, entropy, values), (reference, _, _) = look(drifted.params), look(drifted.reference)
    mask = np.asarray(rollout.mask)
    inside = mask > 0
    mean = lambda x: float(np.asarray(x)[inside].mean())
    whole = ((np.asarray(old) - np.asarray(reference)) * mask).sum(1).mean()
    shaped = np.clip((np.asarray(scores) - np.mean(scores)) / np.std(scores), -1, 1)
    _, targets, _ = oracle.experience(old, reference, values, np.asarray(rollout.lengths), np.zeros(16, bool), scores,
                                      normalise="normalise", score_clip=1.0, scale_rewards=True)  # fmt: skip
    errors = (targets - np.asarray(values))[inside]
    assert abs(whole) > 0.05
    expected = {
        "reward/mean": float(np.mean(scores)),
        "reward/score": float(shaped.mean()),
        "reward/kl": -0.05 * whole,
        "policy/kl": mean(np.asarray(old) - np.asarray(reference)),
        "policy/kl_completion": whole,
        "policy/entropy": mean(entropy),
        "policy/ratio_mean": 1.0,
        "reference/perplexity": np.exp(-mean(reference)),
        "completion/length": mask.sum(1).mean(),
        "completion/truncated": float((np.asarray(rollout.finish) == Finish.LENGTH).mean()),
        "value/explained_variance": 1 - np.var(errors) / np.var(targets[inside]),
        "value/loss": 0.5 * np.mean(errors**2),
        "throughput/tokens": mask.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    assert metrics["policy/approx_kl"] < 1e-9 and metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0
    assert metrics["sampler/log_prob_gap"] < 1e-5


def test_masks_come_from_lengths(most, drifted, batch):
    """Tokens after the end are never looked at, and an EOS inside a completion does not end it."""
    rollout, scores = batch
    tokens = np.array(rollout.tokens)
    after = np.arange(6)[None] >= np.asarray(rollout.lengths)[:, None]
    tokens[:, rollout.prompt_width :][after] = 7
    one, other = most(drifted, rollout, scores), most(drifted, rollout.replace(tokens=jnp.asarray(tokens)), scores)
    same((one[0].params, one[0].critic.params), (other[0].params, other[0].critic.params))
    tokens[:, rollout.prompt_width] = EOS  # in the middle of the longer ones
    third, metrics = most(drifted, rollout.replace(tokens=jnp.asarray(tokens)), scores)
    assert metrics["throughput/tokens"] == np.asarray(rollout.lengths).sum() and differ(third.params, one[0].params)


def test_moments_are_those_of_the_stream():
    """Four batches of scores, some missing: exactly numpy's mean and standard deviation of all so far."""
    rng, kept = np.random.default_rng(3), statistics.statistics()
    shape = jit(partial(ppo_advantages.shape_scores, normalise="normalise", clip=1.5))
    seen = np.zeros(0)
    for size in (3, 1, 8, 5):
        scores = 100 + 7 * rng.normal(size=size)
        scores[rng.random(size) < 0.3] = np.nan
        seen = np.concatenate([seen, scores[~np.isnan(scores)]])
        shaped, kept = shape(kept, jnp.asarray(scores), jnp.zeros(size, jnp.int32))
        np.testing.assert_allclose(
            [kept.mean, kept.variance, kept.count], [seen.mean(), seen.var(), seen.size], rtol=1e-4
        )
        expected = np.clip((scores - seen.mean()) / (seen.std() or 1.0), -1.5, 1.5)
        np.testing.assert_allclose(shaped, expected, rtol=1e-3, atol=1e-4)


def test_equal_scores_are_left_in_peace():
    """Nothing has differed yet: centred they are 0, scaled they stay as they are; none of them is infinite."""
    equal, finish = jnp.full(4, 0.7), jnp.zeros(4, jnp.int32)
    shape = lambda how: ppo_advantages.shape_scores(statistics.statistics(), equal, finish, normalise=how)[0]
    np.testing.assert_allclose(shape("normalise"), 0.0, atol=1e-6)
    np.testing.assert_allclose(shape("scale"), 0.7, rtol=1e-6)


def test_moments_are_carried_over(most, drifted, batch):
    """The second iteration normalises by both batches."""
    rollout, scores = batch
    state, _ = most(drifted, rollout, scores)
    state, metrics = most(state, rollout, scores + 1)
    both = np.concatenate([scores, scores + 1])
    np.testing.assert_allclose([state.scores.mean, state.scores.variance], [both.mean(), both.var()], rtol=1e-4)
    shaped = np.clip((np.asarray(scores) + 1 - both.mean()) / both.std(), -1, 1)
    np.testing.assert_allclose(metrics["reward/score"], shaped.mean(), rtol=1e-4)
    assert state.returns.count == 32


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_bad_update_is_skipped_by_both(value, most, drifted, batch):
    """Values that are not finite, or whose loss alone is not, stop the critic and the policy alike, counted once."""
    broken = jax.tree.map(lambda x: x.at[...].set(value) if x.ndim == 0 else x, drifted.critic.params)
    state = dataclasses.replace(drifted, critic=dataclasses.replace(drifted.critic, params=broken))
    after, metrics = most(state, *batch)
    same((after.params, after.critic.params), (state.params, broken))
    assert after.skipped == after.skipped_in_a_row == metrics["train/skipped"] == 1


def test_ptx_adds_its_gradient(most, model, drifted, batch):
    """With the mix, and in two micro-batches, the update is that of the whole batch without it plus the weight times
    the gradient of next-token prediction."""
    rollout, scores = batch
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(2, 13, (8, 9)))
    data = TokenBatch(tokens, jnp.asarray(np.arange(9) < rng.integers(2, 10, (8, 1)), jnp.float32))
    without, seen = most(drifted, rollout, scores)
    mixed = build(model, dataclasses.replace(MOST, ptx_coef=3.0, ptx_batch=4, micro_batches=2))
    state, metrics = jit(mixed.learn)(drifted, rollout, scores, data)
    rows = update.epoch_batch(jax.random.fold_in(drifted.key, (1 << 30) + 1), jnp.int32(0), batch=4, examples=8)
    some = jax.tree.map(lambda x: x[rows], data)
    loss, gradient = jit(jax.value_and_grad(lambda p: sft.loss(model, p, some)[0].mean))(drifted.params)
    expected = jax.tree.map(lambda x, g: x - RATE * 3.0 * g, without.params, gradient)
    close((state.params, state.critic.params), (expected, without.critic.params), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(metrics.pop("ptx/loss"), loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.pop("train/loss"), seen.pop("train/loss") + 3.0 * loss, rtol=1e-4)
    for name in seen.keys() - {"train/grad_norm"}:
        np.testing.assert_allclose(metrics[name], seen[name], atol=1e-5, rtol=1e-4, err_msg=name)


def test_shared_critic_and_its_warmup(model, drifted, batch, descend, plain):
    """A head on the trunk: the trunk follows both losses, the head its own; during the warm-up only the head moves."""
    rollout, scores = batch
    head = {"kernel": jnp.linspace(-0.5, 0.5, 16), "bias": jnp.asarray(0.3)}
    recipe = build(model, dataclasses.replace(SMALL, critic="shared", epochs=1, critic_warmup=2))
    fresh = recipe.init(jax.random.key(0), drifted.params, {"head": head})
    assert set(fresh.critic.params) == {"head"}
    learn = jit(recipe.learn)
    waiting, _ = learn(fresh, rollout, scores)
    same((waiting.params, waiting.opt_state), (fresh.params, fresh.opt_state))
    after, _ = learn(dataclasses.replace(fresh, step=jnp.int32(2)), rollout, scores)
    close(after.critic.params, waiting.critic.params, atol=1e-6)

    where = without_padding(rollout), rollout.prompt_lengths, rollout.completions
    trained = drifted.params, {"model": drifted.params, "head": head}
    old, _, values = jit(plain)(*trained, *where)
    advantages, targets, inside = oracle.experience(old, old, values, np.asarray(rollout.lengths), np.zeros(16, bool),
                                                    scores)  # fmt: skip
    seen = {"advantages": advantages, "targets": targets, "inside": inside, "old": old, "reference": old}
    weights = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": NONE, "value_clip": NONE, "value_coef": 1.0,
               "entropy_coef": 0.0, "kl_loss": 0.0}  # fmt: skip
    to_policy, to_critic = descend(
        trained, where, {k: jnp.asarray(v, jnp.float32) for k, v in (seen | {"values": values}).items()},
        {k: jnp.float32(v) for k, v in weights.items()},
    )  # fmt: skip
    both = jax.tree.map(jnp.add, to_policy, to_critic["model"])
    close(after.params, jax.tree.map(lambda x, g: x - RATE * g, drifted.params, both), atol=2e-5, rtol=1e-3)
    expected = jax.tree.map(lambda x, g: x - 0.5 * RATE * g, head, to_critic["head"])
    close(after.critic.params["head"], expected, atol=2e-5, rtol=1e-3)


def test_critic_begins_as_the_reward_model(model, params, critic):
    recipe = build(model, SMALL)
    same(recipe.init(jax.random.key(0), params, critic).critic.params, critic)
    same(recipe.init(jax.random.key(0), params).critic.params, with_head(model, params))
    with pytest.raises(ValueError, match=r"critic parameters are \['embed'.*a separate critic has \['head', 'model'\]"):
        recipe.init(jax.random.key(0), params, params)
    with pytest.raises(ValueError, match="critic_model was given for a shared critic"):
        build(model, dataclasses.replace(SMALL, critic="shared"), critic_model=model)
    with pytest.raises(ValueError, match="a model of its own and no parameters"):
        build(model, SMALL, critic_model=model).init(jax.random.key(0), params)


def test_learned_reward_and_pretraining_go_with_the_data(prompts):
    """An iteration hands the reward its completions, repeated answers and parameters, and `learn` the rest."""
    parts = ppo.PPO(
        init=lambda *_: None,
        sample=lambda state, prompts: ("completions", jnp.asarray([2, 0])),
        learn=lambda *given: given,
    )
    config = dataclasses.replace(SMALL, prompts=2, group=2)
    data = ppo.Data(prompts, jnp.arange(4), reward_params="judge", pretraining="texts")  # pyright: ignore
    state, completions, (seen, answers, judge), texts = ppo.fused(parts, lambda *given: given, config)("state", data)
    assert (state, completions, seen, judge, texts) == ("state", "completions", "completions", "judge", "texts")
    assert answers.tolist() == [2, 2, 0, 0]
    *_, (_, answers), texts = ppo.fused(parts, lambda *given: given, config)("state", ppo.Data(prompts))
    assert answers is None and texts is None


def test_values_are_read_before_each_token(model, critic, batch):
    """And a reward model's score is the value after the last one."""
    rollout, _ = batch
    scalars = jit(partial(token_scalars, model))(critic, rollout)
    texts = jit(scalar_model(model).apply)(critic, without_padding(rollout))
    for row, (prompt, length) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
        expected = texts[row, prompt - 1 : prompt + length]
        np.testing.assert_allclose(scalars[row, : length + 1], expected, atol=1e-5)
    scores = jit(partial(reward_model.score_rollout, model))(critic, rollout)
    np.testing.assert_allclose(scalars[jnp.arange(16), rollout.lengths], scores, atol=1e-6)


def test_reference_can_be_left_out(model, params, batch):
    recipe = build(model, dataclasses.replace(SMALL, kl_coef=0.0, reference=False))
    state, metrics = jax.eval_shape(recipe.learn, recipe.init(jax.random.key(0), params), *batch)
    assert state.reference is None and not {"policy/kl", "reference/perplexity"} & metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=0.0)}, "temperature is 0; PPO learns from how sampled completions differ"),
        ({"prompts": 0}, "prompts is 0; expected at least 1"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"kl": "k4"}, "kl is 'k4'; expected one of k1, k2, k3, k3_ratio"),
        ({"kl_in": "both"}, "kl_in is 'both'; expected one of reward, loss"),
        ({"kl_in": "loss"}, "kl is 'k1' in the loss, where its gradient is zero on average; take k2"),
        ({"normalise_scores": "mean"}, "normalise_scores is 'mean'; expected one of none, scale, normalise"),
        ({"critic": "none"}, "critic is 'none'; expected one of separate, shared"),
        ({"score_clip": 0.0}, "score_clip is 0.0; expected a number above 0, or none"),
        ({"value_clip": -1.0}, "value_clip is -1.0; expected a number above 0"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0; expected a bound on the ratio above 1"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target is 6.0 with kl_coef 0.0, which can only stay there"),
        ({"reference": False}, "reference is false with kl_coef 0.05; set it to 0, or keep the reference"),
        ({"prompts": 3, "group": 3, "minibatches": 2}, "minibatches is 2; it must divide the 9 completions"),
        ({"prompts": 4, "micro_batches": 3}, "micro_batches is 3; it must divide the 4"),
        (
            {"ptx_coef": 1.0, "ptx_batch": 3, "micro_batches": 2},
            "micro_batches is 2; it must divide the ptx_batch of 3",
        ),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ppo.PPOConfig(**options)


def test_ptx_without_data_is_refused(model, drifted, batch):
    with pytest.raises(ValueError, match="ptx_coef is 1.0 and pretraining data is missing"):
        build(model, dataclasses.replace(SMALL, ptx_coef=1.0)).learn(drifted, *batch)
    with pytest.raises(ValueError, match="ptx_coef is 0.0 and pretraining data is given"):
        data = TokenBatch(jnp.ones((40, 4), jnp.int32), jnp.ones((40, 4)))
        build(model, SMALL).learn(drifted, *batch, data)


def test_max_turns_on_what_plain_leaves_off():
    plain, best = ppo.PPOConfig(), ppo.PPO_MAX
    for name, off in {"normalise_scores": "none", "score_clip": None, "normalise_advantages": False,
                      "advantage_clip": None, "value_clip": None, "critic_warmup": 0}.items():  # fmt: skip
        assert getattr(plain, name) == off != getattr(best, name)
    changed = {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) != getattr(best, f.name)}
    assert len(changed) == 6
