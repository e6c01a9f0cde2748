"""Kimi k1.5 on problems small enough to write down: where mirror descent goes, iteration by iteration, and how."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.losses import group
from jaxrl.posttrain import grpo, recipes, update
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.recipes.kimi import KIMI_RUN
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Finish, Rollout
from tests.posttrain.tabular import bandit

ARMS = 6


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x))
    return e / e.sum()


def descend(logits, rewards, *, tau, baseline, steps, optimizer):
    """Minimises the expectation of the row's loss under pi_i, the policy at `logits`: reference and sampler."""
    variant = dataclasses.replace(group.PRESETS["kimi"], tau=tau)
    old, mask = jax.nn.log_softmax(logits), jnp.ones((ARMS, 1))
    advantages = jnp.float32(rewards - baseline)

    def population(logits):
        values, _ = group.loss(
            jax.nn.log_softmax(logits)[:, None], old[:, None], None, advantages, mask, variant=variant
        )
        return (jnp.exp(old) * values[:, 0]).sum()

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(population)(logits), state, logits)
        return (optax.apply_updates(logits, updates), state), None

    return jax.lax.scan(step, (logits, optimizer.init(logits)), length=steps)[0][0]


def variation(a, b):
    return 0.5 * np.abs(a - b).sum()


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_every_iteration_ends_in_its_own_closed_form(tau):
    """Four iterations, each from fresh moments with the last one's end as reference: pi_{i+1} = pi_i exp(r / tau) / Z.

    With the baseline tau log Z the loss has its minimum there: total variation below 1e-5 at each iteration. With the
    mean reward under pi_i, which the paper uses and the row takes from the group, its minimum is another, and the
    nearer the larger tau is: total variation 0.063 at tau 0.3 and 0.003 at tau 1, of a way of 0.28 and 0.11.
    """
    rng = np.random.default_rng(0)
    rewards, optimizer = rng.uniform(size=ARMS), optax.adam(optax.cosine_decay_schedule(0.03, 600))
    run = jax.jit(lambda x, baseline: descend(x, rewards, tau=tau, baseline=baseline, steps=600, optimizer=optimizer))
    start = jnp.asarray(rng.normal(size=ARMS), jnp.float32)
    logits = start
    for _ in range(4):
        before = softmax(logits)
        weighted = before * np.exp(rewards / tau)
        logits = run(logits, tau * np.log(weighted.sum()))
        assert variation(softmax(logits), weighted / weighted.sum()) < 1e-5
    whole = softmax(start) * np.exp(4 * rewards / tau)
    assert variation(softmax(logits), whole / whole.sum()) < 4e-5

    before = softmax(start)
    weighted = before * np.exp(rewards / tau)
    after = softmax(run(start, (before * rewards).sum()))
    assert variation(after, weighted / weighted.sum()) < {0.3: 0.08, 1.0: 0.005}[tau]
    assert variation(after, before) > 2 * variation(after, weighted / weighted.sum())


def completions_of(arms):
    """One prompt token and one completion token in each row."""
    rows = len(arms)
    zeros = jnp.zeros((rows, 1))
    tokens = jnp.stack([jnp.zeros(rows, jnp.int32), jnp.asarray(arms, jnp.int32)], axis=1)
    ones = jnp.ones(rows, jnp.int32)
    return Rollout(tokens, ones, ones, jnp.full(rows, Finish.EOS), zeros, zeros, prompt_width=1)


def equation_3(logits, old, arms, rewards, tau):
    """1/k sum_j [ grad log pi(y_j) (r_j - mean r) - tau/2 grad (log pi(y_j) / pi_i(y_j))^2 ], mean over problems."""
    total = np.zeros(ARMS)
    pi, pi_old = softmax(logits), softmax(old)
    for group_arms, group_rewards in zip(arms, rewards, strict=True):
        for arm, reward in zip(group_arms, group_rewards, strict=True):
            slope = (np.arange(ARMS) == arm) - pi
            distance = np.log(pi[arm]) - np.log(pi_old[arm])
            total += slope * (reward - group_rewards.mean()) - tau / 2 * 2 * distance * slope
    return total / arms.size


def test_updates_of_an_iteration_are_equation_3():
    """`grpo.learn` over four passes with plain ascent, against numpy: the reference stays at the iteration's start."""
    rng = np.random.default_rng(1)
    rate, tau = 0.7, group.PRESETS["kimi"].tau
    config = GRPOConfig(variant="kimi", prompts=3, group=4, epochs=4, sampling=Sampling(max_tokens=1))
    recipe = grpo.make(config, bandit(ARMS), optax.sgd(rate), eos_id=0, pad_id=0, max_grad_norm=0.0)
    state = recipe.init(jax.random.key(0), {"logits": jnp.asarray(rng.normal(size=ARMS), jnp.float32)})
    learn = jax.jit(recipe.learn)
    logits = np.float64(state.params["logits"])
    for _ in range(3):
        arms, rewards = rng.integers(0, ARMS, (3, 4)), rng.normal(size=(3, 4))
        state, _ = learn(state, completions_of(arms.reshape(-1)), jnp.asarray(rewards.reshape(-1), jnp.float32))
        old, first = logits, logits
        for _ in range(4):
            logits = logits + rate * equation_3(logits, old, arms, rewards, tau)
        np.testing.assert_allclose(state.params["logits"], logits - (logits - state.params["logits"]).mean(), atol=2e-5)
        assert np.abs(logits - first).max() > 0.05


def test_moments_are_fresh_in_each_iteration():
    """With Adam the second iteration is that of a run which begins with it; GRPO's own moments go on."""
    rng = np.random.default_rng(2)
    batches = [
        (completions_of(rng.integers(0, ARMS, 8)), jnp.asarray(rng.normal(size=8), jnp.float32)) for _ in range(2)
    ]
    for variant, same in (("kimi", True), ("grpo", False)):
        config = GRPOConfig(
            variant=variant, prompts=2, group=4, minibatches=2, kl_coef=0.0, sampling=Sampling(max_tokens=1)
        )
        recipe = grpo.make(config, bandit(ARMS), optax.adam(0.1), eos_id=0, pad_id=0)
        learn = jax.jit(recipe.learn)
        first, _ = learn(recipe.init(jax.random.key(0), {"logits": jnp.zeros(ARMS)}), *batches[0])
        second, _ = learn(first, *batches[1])
        anew = recipe.init(jax.random.key(0), first.params)
        anew, _ = learn(dataclasses.replace(anew, step=first.step), *batches[1])
        equal = np.allclose(second.params["logits"], anew.params["logits"], atol=1e-7)
        assert equal == same


def test_the_reward_for_length_sets_in_and_never_pays_for_wrong_answers():
    """Of one group in `learn`: before the warm-up the task's reward alone, then shorter right answers are ahead."""
    config = dataclasses.replace(
        KIMI_RUN.grpo, prompts=1, group=4, minibatches=1, prioritised=False, length_warmup=1,
        sampling=Sampling(max_tokens=8),
    )  # fmt: skip
    recipe = grpo.make(config, bandit(ARMS), optax.sgd(1.0), eos_id=0, pad_id=0, max_grad_norm=0.0)
    lengths = jnp.asarray([2, 6, 2, 6])
    rows = completions_of([0] * 4)
    tokens = jnp.concatenate([rows.tokens[:, :1], jnp.tile(jnp.asarray([[1], [2], [3], [4]]), (1, 8))], axis=1)
    drawn = dataclasses.replace(rows, tokens=tokens, lengths=lengths, behaviour_log_probs=jnp.zeros((4, 8)))
    state = recipe.init(jax.random.key(0), {"logits": jnp.zeros(ARMS)})
    rewards = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    learn = jax.jit(recipe.learn)
    before, metrics = learn(state, drawn, rewards)
    np.testing.assert_allclose(metrics["reward/shaped"], 0.5, atol=1e-6)
    _, metrics = learn(before, drawn, rewards)
    # + 0.5 * (0.5 - 0.5 + 0 - 0.5) / 4: right and short, right and long, wrong and short, wrong and long
    np.testing.assert_allclose(metrics["reward/shaped"], 0.5 - 0.5 * 0.5 / 4, atol=1e-6)


def test_the_run_is_kimi():
    row = KIMI_RUN.grpo.row
    assert (row.form, row.level, row.baseline, row.scale) == ("mirror", "sequence_sum", "group", "none")
    assert row.kl_coef == 0 and KIMI_RUN.grpo.epochs * KIMI_RUN.grpo.minibatches > 1  # else the reference has no say
    assert KIMI_RUN.grpo.length_weight > 0 and KIMI_RUN.grpo.length_warmup > 0 and KIMI_RUN.grpo.prioritised
    assert KIMI_RUN.grpo.curriculum_steps == 0 and KIMI_RUN.grpo.group == 8


def test_a_small_run_ends(tmp_path):
    small = recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16)
    sizes = {"prompts": 4, "group": 4, "length_warmup": 1, "sampling": Sampling(max_tokens=6)}
    run = dataclasses.replace(
        KIMI_RUN, out=str(tmp_path / "run"), model=small, held_out=16, steps=2, chunk=2, eval_every=0,
        grpo=dataclasses.replace(KIMI_RUN.grpo, **sizes), optimizer=update.OptimizerConfig(learning_rate=1e-3),
    )  # fmt: skip
    outcome = recipes.train_grpo(run)
    assert outcome.summary["steps"] == 2 and outcome.summary["skipped"] == 0
