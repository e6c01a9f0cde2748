"""Preferences and policy gradients on estimated likelihoods."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import diffusion
from jaxrl.kernels.attention import Causal, Chunked
from jaxrl.nets.language_model import logits
from jaxrl.posttrain import grpo, preference, sft
from jaxrl.posttrain.preference import interleave
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.types import Pairs, Prompts, TokenBatch
from tests.diffusion.stubs import tiny

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MASK = 8
PARAMS = jax.jit(tiny.init, compiler_options=QUICK)(jax.random.key(1))
OTHER = jax.tree.map(lambda x: 1.5 * x, PARAMS)
RNG = np.random.default_rng(0)


def side(lengths):
    tokens = jnp.asarray(RNG.integers(MASK, size=(3, 6)))
    return TokenBatch(tokens, (jnp.arange(6)[None] >= 2) * (jnp.arange(6)[None] < jnp.array(lengths)[:, None]) * 1.0)


PAIRS = Pairs(side([6, 4, 5]), side([5, 6, 2]))  # the last rejected response is empty


def test_vrpo_is_the_dpo_loss_of_estimates_under_shared_masks():
    config, score = preference.DPOConfig(), partial(diffusion.responses, mask_id=MASK, samples=4)

    def value(params, reference, key):
        of = lambda params: score(tiny, params, interleave(PAIRS), key=jax.random.clone(key))[0].reshape(3, 2)
        frozen = jax.lax.stop_gradient(of(reference))
        part = preference.Referenced(PAIRS, frozen[:, :1], frozen[:, 1:])
        own = lambda *given: score(*given, key=jax.random.clone(key))
        weighted, metrics, _ = preference.loss(config, tiny, params, part, responses=own)
        return weighted.mean, (weighted, metrics)

    run = jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=QUICK)
    (same, _), gradient = run(PARAMS, PARAMS, jax.random.key(0))
    np.testing.assert_allclose(same, np.log(2), rtol=1e-6)  # the masks' noise cancels altogether
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-4
    (_, (value, metrics)), _ = run(OTHER, PARAMS, jax.random.key(0))
    estimate = jax.jit(partial(diffusion.log_likelihood, tiny, mask_id=MASK, samples=4), compiler_options=QUICK)
    new, old = (np.asarray(estimate(p, interleave(PAIRS), jax.random.key(0))) for p in (OTHER, PARAMS))
    margins = 0.1 * ((new - old)[0::2] - (new - old)[1::2])
    expected = np.log1p(np.exp(-margins))[:2]
    np.testing.assert_allclose(value.total, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(value.weight, 2)
    np.testing.assert_allclose(metrics["rewards/margins"].mean, margins[:2].mean(), rtol=1e-3, atol=1e-5)


def test_the_loops_train_a_diffusion_model():
    """SFT, DPO and GRPO as they are, with another objective, other responses, another sampler."""
    optimizer = optax.adam(1e-2)
    rows = TokenBatch(jnp.tile(jnp.arange(6)[:, None], (4, 6)), jnp.ones((24, 6)))  # one symbol a row, all alike
    noise, objective = partial(diffusion.noised, mask_id=MASK), partial(diffusion.loss, mask_id=MASK)
    recipe = sft.make(sft.SFTConfig(batch=24, micro_batches=2), tiny, optimizer, objective=objective, prepare=noise)
    state, step = recipe.init(jax.random.key(0), PARAMS), jax.jit(recipe.step, compiler_options=QUICK)
    losses = []
    for _ in range(60):
        state, metrics = step(state, rows)
        losses.append(float(metrics["train/loss"]))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5]), losses

    score = partial(diffusion.responses, mask_id=MASK, samples=4)
    config = preference.DPOConfig(batch=3, reference_every=1000)
    recipe = preference.make(config, tiny, optimizer, responses=score)
    state = recipe.init(jax.random.key(0), PARAMS)
    data = jax.jit(recipe.reference, compiler_options=QUICK)(PARAMS, PAIRS)
    step = jax.jit(recipe.step, compiler_options=QUICK)
    for i in range(8):
        state, metrics = step(state, data)
        if i == 0:
            np.testing.assert_allclose(metrics["train/loss"], np.log(2), rtol=1e-5)  # under the same masks
    assert metrics["rewards/margins"] > 0.05

    config = grpo.GRPOConfig(prompts=2, group=8, kl_coef=0.0, sampling=Sampling(max_tokens=3))
    recipe = grpo.make(
        config, tiny, optimizer, eos_id=7, pad_id=0, sampler=partial(diffusion.generate, mask_id=MASK),
        log_probs=partial(diffusion.completion_log_probs, mask_id=MASK, key=jax.random.key(5)),
    )  # fmt: skip
    state = recipe.init(jax.random.key(0), PARAMS)
    problems = grpo.Problems(Prompts(jnp.array([[0, 1], [2, 3]]), jnp.array([1, 2])), jnp.zeros(2))
    reward = lambda completions, _: ((completions.completions == 4) * completions.mask).sum(1)
    step = jax.jit(grpo.fused(recipe, reward, config), compiler_options=QUICK)
    rewards = []
    for _ in range(25):
        state, metrics = step(state, problems)
        rewards.append(float(metrics["reward/mean"]))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5, rewards


def test_responses_take_the_place_of_exact_ones():
    sums, lengths, entropy = diffusion.responses(tiny, PARAMS, PAIRS.chosen, key=jax.random.key(0), mask_id=MASK)
    assert sums.shape == lengths.shape == (3, 1) and entropy.mean == 0
    np.testing.assert_array_equal(lengths[:, 0], [4, 2, 3])
    assert (sums < 0).all()


def test_one_pass_log_probs_of_completions():
    prompts = Prompts(jnp.array([[0, 0, 1], [2, 3, 4]]), jnp.array([1, 3], jnp.int32))
    ids = {"mask_id": MASK, "eos_id": 7, "pad_id": 0}
    sampler = jax.jit(partial(diffusion.generate, tiny, sampling=Sampling(max_tokens=4), **ids), compiler_options=QUICK)
    completions = sampler(PARAMS, prompts, jax.random.key(0))
    of = lambda seed, **options: jax.jit(
        partial(diffusion.completion_log_probs, tiny, mask_id=MASK, **options), compiler_options=QUICK
    )(PARAMS, completions, key=jax.random.key(seed))
    log_probs, entropy = of(0, prompt_masked=0.0)
    assert log_probs.shape == entropy.shape == (2, 4)
    for i, prompt in enumerate([[1], [2, 3, 4]]):
        tokens = jnp.array([prompt + [MASK] * 4])
        whole = TokenBatch(jnp.array([prompt + completions.completions[i].tolist()]), jnp.ones(tokens.shape))
        part = diffusion.masked_by(whole, tokens == MASK, jnp.ones(tokens.shape), mask_id=MASK)
        alone = diffusion.log_probs_of(tiny, PARAMS, part, mask_id=MASK)[0][0, len(prompt) :]
        np.testing.assert_allclose(log_probs[i], alone, atol=1e-5)
    half = of(0, prompt_masked=0.5)[0]
    np.testing.assert_array_equal(half, of(0, prompt_masked=0.5)[0])
    assert any(not np.allclose(half, of(seed, prompt_masked=0.5)[0]) for seed in range(1, 4))
    # a part of a batch gives what the whole batch gave, as micro-batches need
    second = jax.tree.map(lambda x: x[1:], completions)
    alone = diffusion.completion_log_probs(
        tiny, PARAMS, second, key=jax.random.key(0), mask_id=MASK, prompt_masked=0.5
    )[0]
    np.testing.assert_allclose(alone[0], half[1], atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_one_pass_log_probs_in_blocks(block):
    """Each completion token from the clean blocks before its own and what its own block has of the prompt."""
    prompts = Prompts(jnp.array([[0, 0, 1], [2, 3, 4], [0, 5, 6]]), jnp.array([1, 3, 2], jnp.int32))
    known = {"mask_id": MASK, "eos_id": 7, "pad_id": 0, "sampling": Sampling(max_tokens=4)}
    order = Unmasking(block=block, order="random")
    sampler = jax.jit(partial(diffusion.generate_in_blocks, tiny, unmasking=order, **known), compiler_options=QUICK)
    completions = sampler(PARAMS, prompts, jax.random.key(0))
    of = partial(diffusion.completion_log_probs, tiny, mask_id=MASK, block=block, prompt_masked=0.0)
    log_probs, _ = jax.jit(of, compiler_options=QUICK)(PARAMS, completions, key=jax.random.key(0))
    hidden = jax.jit(lambda tokens: tiny.apply(PARAMS, tokens, mask=Causal() | Chunked(block))[0])
    for i, prompt in enumerate([[1], [2, 3, 4], [5, 6]]):
        row = [*prompt, *completions.completions[i].tolist()]
        for at in range(len(prompt), len(row)):
            first = at // block * block
            seen = [*row[:first], *(row[j] if j < len(prompt) else MASK for j in range(first, first + block))]
            scores = np.asarray(logits(hidden(jnp.array([seen]))[0, at], tiny.unembedding(PARAMS)), np.float64)[:MASK]
            alone = scores[row[at]] - np.log(np.exp(scores).sum())
            np.testing.assert_allclose(log_probs[i, at - len(prompt)], alone, atol=1e-4)
    if block == 1:  # exact: what the sampler said of its draws, up to their end
        np.testing.assert_allclose(log_probs * completions.mask, completions.log_probs * completions.mask, atol=1e-4)
