"""GRPO's iteration: against a plain policy gradient, with and without Python in between, on one device and on eight."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.losses.group import PRESETS
from jaxrl.posttrain import grpo, update
from jaxrl.posttrain.rewards import relative_length, soft_overlong
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Finish

EOS, PAD = 1, 0
SAMPLING = Sampling(max_tokens=6, temperature=1.5)
SMALL = grpo.GRPOConfig(prompts=4, group=4, sampling=SAMPLING)


def share_of_even_tokens(rollout, answers):
    even = (rollout.completions % 2 == 0) * rollout.mask
    return even.sum(axis=1) / rollout.lengths + answers


@pytest.fixture(scope="module")
def problems(prompts):
    return grpo.Problems(prompts, jnp.asarray([0.0, 0.5, -0.5, 2.0]))


def build(model, config, **options):
    optimizer = optax.sgd(0.5)
    recipe = grpo.make(config, model, optimizer, eos_id=EOS, pad_id=PAD, max_grad_norm=0.0, **options)
    return recipe, grpo.fused(recipe, share_of_even_tokens, config)


def change(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a - b) / 0.5, before.params, after.params)


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_update_is_the_policy_gradient(model, params, problems):
    """On policy: the gradient of -mean over sequences of mean over tokens of A log pi, written out in plain numpy."""
    recipe, step = build(model, grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.0, sampling=SAMPLING))
    state = recipe.init(jax.random.key(0), params)
    _, rollout, rows = jax.jit(recipe.sample)(state, problems)
    rewards = share_of_even_tokens(rollout, jnp.repeat(problems.answers[rows], 4))
    groups = np.asarray(rewards, np.float64).reshape(4, 4)
    advantages = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)

    prompt_lengths, lengths = np.asarray(rollout.prompt_lengths), np.asarray(rollout.lengths)
    starts = rollout.prompt_width - prompt_lengths
    rows_of_text = [np.asarray(row)[start:] for row, start in zip(rollout.tokens, starts, strict=True)]
    texts = jnp.asarray([np.pad(row, (0, 10 - len(row))) for row in rows_of_text])

    def objective(params):
        logits = model.apply(params, texts)[0] @ model.unembedding(params) / SAMPLING.temperature
        log_probs = jax.nn.log_softmax(logits)
        total = 0.0
        for row, advantage in enumerate(advantages.reshape(-1)):
            columns = prompt_lengths[row] - 1 + np.arange(lengths[row])
            total += advantage * log_probs[row, columns, texts[row, columns + 1]].mean()
        return -total / 16

    expected = jax.jit(jax.grad(objective))(params)
    after, metrics = jax.jit(step)(state, problems)
    close(change(state, after), expected, atol=2e-5)
    assert metrics["policy/ratio_mean"] == 1.0
    np.testing.assert_allclose(metrics["reward/mean"], rewards.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["completion/length"], rollout.lengths.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["completion/truncated"], (rollout.finish == Finish.LENGTH).mean(), rtol=1e-6)
    assert metrics["sampler/log_prob_gap"] < 1e-5


def test_slots_learn_from_the_policys_own_completions(model, params, problems):
    """Two prompts' worth of places for four prompts: every completion is the policy's, and none is missing."""
    recipe, step = build(model, dataclasses.replace(SMALL, slots=8))
    state = recipe.init(jax.random.key(0), params)
    _, rollout, _ = jax.jit(recipe.sample)(state, problems)
    assert (rollout.lengths >= 1).all() and rollout.tokens.shape[0] == 16
    after, metrics = jax.jit(step)(state, problems)
    assert metrics["sampler/log_prob_gap"] < 1e-5 and metrics["train/grad_norm"] > 0
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(change(state, after))) > 0


def test_python_reward_gives_the_same_run(model, params, problems):
    """The host loop and the one-program iteration end with the same parameters after three steps."""
    recipe, step = build(model, SMALL)

    def on_host(rollout, rows):
        return np.asarray(share_of_even_tokens(rollout, np.repeat(np.asarray(problems.answers)[rows], 4)))

    outcomes = []
    for one, jit in ((step, True), (grpo.hosted(recipe, on_host, SMALL), False)):
        state = recipe.init(jax.random.key(1), jax.tree.map(jnp.copy, params))
        *_, last = loop.run(one, state, problems, steps=3, chunk=3, jit=jit)
        outcomes.append(last)
    close(outcomes[0].state.params, outcomes[1].state.params, atol=1e-6)
    for fused, hosted in zip(outcomes[0].metrics, outcomes[1].metrics, strict=True):
        assert fused.keys() == hosted.keys()
        np.testing.assert_allclose(list(fused.values()), list(hosted.values()), atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("data=8", {}),
        ("data=2,fsdp=4", {"kl_coef": 0.0, "epochs": 2, "minibatches": 2, "micro_batches": 2}),
        ("data=8", {"share_prompt": True}),
    ],
    ids=["data", "fsdp", "shared"],
)
def test_eight_devices_do_what_one_does(mesh, options, model, params, problems):
    """The same losses and parameters after two steps; parameters really lie in pieces under fsdp."""
    config = grpo.GRPOConfig(prompts=4, group=4, sampling=SAMPLING, **options)
    alone, step = build(model, config)
    *_, one = loop.run(step, alone.init(jax.random.key(4), params), problems, steps=2, chunk=2)
    devices = parallel.make_mesh(mesh)
    spread, step = build(model, config, constrain=partial(parallel.shard_batch, mesh=devices))
    state = spread.init(jax.random.key(4), params)
    state = jax.device_put(state, parallel.state_shardings(state, devices))
    *_, eight = loop.run(step, state, problems, steps=2, chunk=2)
    for a, b in zip(one.metrics, eight.metrics, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), atol=2e-5)
    close(one.state.params, jax.device_get(eight.state.params), atol=2e-5)
    kernel = eight.state.params["layers"]["ffn"]["up"]["kernel"]
    pieces = {shard.data.shape for shard in kernel.addressable_shards}
    assert pieces == {(2, 16 // (4 if "fsdp" in mesh else 1), 32)} and len(kernel.sharding.device_set) == 8


@pytest.fixture(scope="module")
def sample(model):
    """The sampler of eight completions a prompt, which is the same for every variant."""
    return jax.jit(build(model, grpo.GRPOConfig(prompts=4, group=8, sampling=SAMPLING))[0].sample)


@pytest.mark.parametrize("variant", sorted(PRESETS))
def test_every_variant_learns(variant, sample, model, params, problems):
    """Sixteen iterations raise the mean reward, for every row of the table."""
    config = grpo.GRPOConfig(variant=variant, prompts=4, group=8, kl_coef=0.0, sampling=SAMPLING)
    recipe = grpo.make(config, model, optax.adam(2e-3), eos_id=EOS, pad_id=PAD)
    learn, state, rewards = jax.jit(recipe.learn), recipe.init(jax.random.key(3), params), []
    for _ in range(16):
        state, rollout, rows = sample(state, problems)
        scores = share_of_even_tokens(rollout, jnp.repeat(problems.answers[rows], 8))
        state, metrics = learn(state, rollout, scores, rows)
        rewards.append(float(metrics["reward/mean"]))
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1, rewards


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("grpo", {"epochs": 2, "minibatches": 2, "micro_batches": 2}),
        ("dapo", {"mask_truncated": True, "minibatches": 4}),
        ("gspo", {"minibatches": 2}),
        ("kimi", {"kl_coef": 0.1, "micro_batches": 2}),
    ],
)
def test_a_shared_prompt_teaches_the_same(variant, options, sample, model, params, problems, monkeypatch):
    """The change of the parameters is that of one row for each completion, where both take the same groups in turn."""
    config = grpo.GRPOConfig(variant=variant, prompts=4, group=8, sampling=SAMPLING, **options)
    apart, _ = build(model, config)
    shared, _ = build(model, dataclasses.replace(config, share_prompt=True))
    state = apart.init(jax.random.key(0), params)
    _, rollout, rows = sample(state, problems)
    if state.reference is not None:
        state = dataclasses.replace(state, reference=jax.tree.map(lambda p: 1.1 * p, params))
    rewards = jnp.asarray(np.random.default_rng(0).random(32), jnp.float32)
    by_group = grpo._shuffles
    together = lambda key, config: by_group(key, dataclasses.replace(config, share_prompt=True))
    monkeypatch.setattr(grpo, "_shuffles", together)
    (want, expected), (got, metrics) = (
        jax.jit(recipe.learn)(state, rollout, rewards, rows) for recipe in (apart, shared)
    )
    step = max(np.abs(x).max() for x in jax.tree.leaves(change(state, want)))
    assert step > 1e-3
    close(change(state, got), change(state, want), atol=1e-4 * step)
    np.testing.assert_allclose([metrics[n] for n in expected], list(expected.values()), atol=2e-4, rtol=1e-4)


def test_shared_prompts_are_shuffled_as_groups():
    config = grpo.GRPOConfig(prompts=6, group=4, epochs=2, minibatches=3, share_prompt=True, sampling=SAMPLING)
    orders = np.asarray(grpo._shuffles(jax.random.key(0), config))
    assert orders.shape == (6, 8) and (orders[:3] != orders[3:]).any()
    for epoch in orders.reshape(2, 6, 4):
        assert sorted(epoch[:, 0].tolist()) == [0, 4, 8, 12, 16, 20]
        np.testing.assert_array_equal(epoch - epoch[:, :1], np.tile(np.arange(4), (6, 1)))


def test_equal_rewards_teach_nothing(model, params, problems):
    """All rewards equal: parameters stay bitwise as they were, and every group is reported as uninformative."""
    recipe, _ = build(model, grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.0, sampling=SAMPLING))
    step = grpo.fused(recipe, lambda rollout, answers: jnp.full(16, 0.7), SMALL)
    state = recipe.init(jax.random.key(0), params)
    after, metrics = jax.jit(step)(state, problems)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert metrics["reward/zero_std"] == 1.0 and metrics["train/loss"] == 0.0


def test_missing_rewards_count_for_nothing(model, params, problems):
    """A NaN reward leaves its completion out: the others are compared with each other."""
    recipe, _ = build(model, grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.0, sampling=SAMPLING))
    state = recipe.init(jax.random.key(0), params)
    state, rollout, rows = jax.jit(recipe.sample)(state, problems)
    rewards = jnp.asarray(np.random.default_rng(0).random(16), jnp.float32).at[5].set(jnp.nan)
    _, metrics = jax.jit(recipe.learn)(state, rollout, rewards, rows)
    np.testing.assert_allclose(metrics["reward/mean"], np.nanmean(rewards), rtol=1e-6)
    assert np.isfinite(metrics["train/grad_norm"]) and metrics["train/skipped"] == 0


def test_truncated_completions_can_be_left_out(model, params, problems):
    """With `mask_truncated` the update is that of the completions that ended, by the mask of the others being 0."""
    options = {"prompts": 4, "group": 4, "kl_coef": 0.0, "sampling": SAMPLING}
    recipe, _ = build(model, grpo.GRPOConfig(mask_truncated=True, **options))
    plain, _ = build(model, grpo.GRPOConfig(**options))
    state = recipe.init(jax.random.key(0), params)
    state, rollout, rows = jax.jit(recipe.sample)(state, problems)
    cut = rollout.finish == Finish.LENGTH
    assert 0 < cut.sum() < 16
    learn, rewards = jax.jit(recipe.learn), jnp.arange(16.0) % 5
    filtered, _ = learn(state, rollout, rewards)
    expected, _ = jax.jit(plain.learn)(state, rollout.replace(lengths=jnp.where(cut, 0, rollout.lengths)), rewards)
    close(filtered.params, expected.params, atol=1e-7)
    nothing, _ = learn(state, rollout.replace(finish=jnp.full(16, Finish.LENGTH)), rewards)
    jax.tree.map(np.testing.assert_array_equal, nothing.params, state.params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (filtered.params, state.params)), strict=True))


def only_some_teach(rollout, answers):
    """Groups of problems whose answer is negative have equal rewards."""
    return jnp.where(answers < 0, 0.3, share_of_even_tokens(rollout, 0.0))


def test_dynamic_sampling_keeps_the_batch_full(model, params, problems):
    """Groups that teach nothing are replaced by those of the next draw; fused and hosted do the same."""
    config = grpo.GRPOConfig(prompts=2, group=4, kl_coef=0.0, dynamic_rounds=8, sampling=SAMPLING)
    problems = problems.replace(answers=jnp.asarray([-1.0, -1.0, -1.0, 0.0]))  # one of four teaches
    recipe, _ = build(model, config)

    def on_host(rollout, rows):
        answers = np.repeat(np.asarray(problems.answers)[rows], 4)
        return np.asarray(only_some_teach(rollout, answers))

    start = recipe.init(jax.random.key(1), params)
    fused, metrics = jax.jit(grpo.fused(recipe, only_some_teach, config))(start, problems)
    hosted, same = grpo.hosted(recipe, on_host, config)(jax.tree.map(jnp.copy, start), problems)
    assert metrics["sampling/rounds"] == fused.drawn == hosted.drawn and 3 <= fused.drawn <= 4
    np.testing.assert_allclose(metrics["sampling/groups_kept"], 2 / (2 * fused.drawn))
    assert metrics["reward/zero_std"] == 0 and fused.step == 1
    close(fused.params, hosted.params, atol=1e-6)
    np.testing.assert_allclose([metrics[name] for name in sorted(same)], [same[n] for n in sorted(same)], atol=1e-5)
    after, metrics = jax.jit(grpo.fused(recipe, lambda *_: jnp.full(8, 0.5), config))(start, problems)
    assert metrics["sampling/rounds"] == 8 and metrics["sampling/groups_kept"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, start.params)


def test_shaping_by_length_is_added_to_the_reward(model, params, problems):
    config = grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.0, sampling=SAMPLING)
    shaping = {"overlong_buffer": 2, "length_weight": 0.7, "length_warmup": 0, "solved": 0.5}
    plain, (shaped, _) = build(model, config)[0], build(model, dataclasses.replace(config, **shaping))
    state = plain.init(jax.random.key(0), params)
    _, rollout, _ = jax.jit(plain.sample)(state, problems)
    rewards = jnp.asarray(np.random.default_rng(0).random(16), jnp.float32)
    lengths = rollout.lengths.reshape(4, 4)
    extra = relative_length(lengths, rewards.reshape(4, 4) >= 0.5) * 0.7
    extra += soft_overlong(lengths, limit=SAMPLING.max_tokens, buffer=2)
    want, _ = jax.jit(plain.learn)(state, rollout, rewards + extra.reshape(-1))
    got, metrics = jax.jit(shaped.learn)(state, rollout, rewards)
    close(got.params, want.params, atol=1e-6)
    np.testing.assert_allclose(metrics["reward/mean"], rewards.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/shaped"], rewards.mean() + extra.mean(), rtol=1e-5)
    later, _ = build(model, dataclasses.replace(config, length_weight=0.7, length_warmup=1))
    close(
        jax.jit(later.learn)(state, rollout, rewards)[0].params,
        jax.jit(plain.learn)(state, rollout, rewards)[0].params,
        0,
    )


def test_importance_weights_between_sampler_and_trainer(model, params, problems):
    """With the sampler's log-probs shifted, each token's loss is weighted by min(pi / mu, cap)."""
    config = grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.0, importance_cap=1.5, sampling=SAMPLING)
    recipe, (plain, _) = build(model, config)[0], build(model, dataclasses.replace(config, importance_cap=None))
    state = recipe.init(jax.random.key(0), params)
    _, rollout, _ = jax.jit(plain.sample)(state, problems)
    rewards = jnp.asarray(np.random.default_rng(0).random(16), jnp.float32)
    same, metrics = jax.jit(recipe.learn)(state, rollout, rewards)
    want, _ = jax.jit(plain.learn)(state, rollout, rewards)
    close(same.params, want.params, atol=1e-5)  # on policy the weights are 1
    np.testing.assert_allclose(metrics["sampler/importance"], 1.0, atol=1e-5)
    for shift, weight in ((-1.0, 1.5), (1.0, np.exp(-1.0))):
        moved = rollout.replace(behaviour_log_probs=rollout.behaviour_log_probs + shift)
        got, _ = jax.jit(recipe.learn)(state, moved, rewards)
        expected = jax.tree.map(lambda a, b, w=weight: a + w * (b - a), state.params, want.params)
        close(got.params, expected, atol=1e-5)


def test_moments_begin_anew_but_the_schedule_goes_on(model, params, problems):
    optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, 10))
    config = grpo.GRPOConfig(variant="kimi", prompts=4, group=4, epochs=2, sampling=SAMPLING)
    recipe = grpo.make(config, model, optimizer, eos_id=EOS, pad_id=PAD)
    step = jax.jit(grpo.fused(recipe, share_of_even_tokens, config))
    state = recipe.init(jax.random.key(0), params)
    for _ in range(2):
        state, _ = step(state, problems)
    moments, schedule = state.opt_state
    assert moments.count == 2 and schedule.count == 4  # two updates an iteration


def test_the_reference_follows_the_policy(model, params, problems):
    config = grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.1, reference_every=2, sampling=SAMPLING)
    recipe, step = build(model, config)
    state = recipe.init(jax.random.key(0), params)
    state, _ = jax.jit(step)(state, problems)
    close(state.reference, params, 0)
    state, _ = jax.jit(step)(state, problems)
    close(state.reference, state.params, 0)


def test_problems_are_prioritised_by_success(model, params, problems):
    config = grpo.GRPOConfig(prompts=2, group=4, kl_coef=0.0, prioritised=True, solved=0.5, sampling=SAMPLING)
    recipe, _ = build(model, config)
    step = jax.jit(grpo.fused(recipe, lambda rollout, answers: (answers > 0).astype(jnp.float32), config))
    state = recipe.init(jax.random.key(0), params, problems=4)
    for _ in range(8):
        state, metrics = step(state, problems)
    assert state.success[jnp.asarray([1, 3])].min() > 0.5 and state.success[jnp.asarray([0, 2])].max() == 0
    np.testing.assert_allclose(metrics["reward/success_rate"], state.success.mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong_buffer": 99}, "overlong_buffer is 99 tokens, more than the limit of"),
        ({"importance": "words"}, "importance is 'words'; expected token, sequence or sequence_mask"),
        ({"dynamic_rounds": 0}, "dynamic_rounds is 0; expected at least 1"),
        ({"variant": "gpro"}, "variant is 'gpro'; expected one of grpo"),
        ({"group": 1}, "group is 1; grpo compares completions of one prompt and needs at least 2"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature is 0; greedy completions"),
        ({"prompts": 3, "group": 3, "minibatches": 2}, "minibatches is 2; it must divide the 9 completions"),
        ({"prompts": 2, "group": 2, "micro_batches": 3}, "micro_batches is 3; it must divide"),
        (
            {"prompts": 3, "minibatches": 2, "share_prompt": True},
            "must divide the 3 prompts \\(share_prompt keeps groups",
        ),
        ({"prompts": 4, "minibatches": 2, "micro_batches": 4, "share_prompt": True}, "must divide the 2 prompts"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"slots": -1}, "slots is -1; expected 0"),
        ({"kl": "k4"}, "kl is 'k4'; expected one of k1, k2, k3, k3_ratio"),
        ({"scale": "max"}, "scale is 'max'; expected one of std, none, batch"),
        ({"reduction": "mean"}, "reduction is 'mean'; expected one of tokens"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo.GRPOConfig(**options)


def test_own_values_override_the_variant():
    assert grpo.GRPOConfig(variant="kimi", tau=0.5).row.tau == 0.5
    row = grpo.GRPOConfig(variant="dapo", clip_high=0.5, kl_coef=0.1, kl="k2").row
    assert (row.clip_low, row.clip_high, row.kl_coef, row.kl, row.reduction) == (0.2, 0.5, 0.1, "k2", "tokens")


def test_kl_holds_the_policy(model, params, problems):
    """A large KL weight keeps the policy near the reference while the same run without it moves away."""
    distance = {}
    for weight in (0.001, 3.0):
        config = grpo.GRPOConfig(prompts=4, group=8, kl_coef=weight, kl="k2", sampling=SAMPLING)
        recipe = grpo.make(config, model, update.make_optimizer(update.OptimizerConfig(learning_rate=3e-3)),
                           eos_id=EOS, pad_id=PAD)  # fmt: skip
        step = grpo.fused(recipe, share_of_even_tokens, config)
        (result,) = loop.run(step, recipe.init(jax.random.key(3), params), problems, steps=16, chunk=16)
        distance[weight] = result.metrics[-1]["policy/kl"]
    assert distance[3.0] < 0.3 * distance[0.001]
