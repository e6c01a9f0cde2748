"""Adapters under GRPO and DPO: the reference is the base, without a second copy; Python between programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop
from jaxrl.nets import adapters
from jaxrl.posttrain import grpo, preference
from jaxrl.posttrain.rollout import Sampling, completion_log_probs
from jaxrl.types import Pairs, Prompts, TokenBatch
from tests.nets import adapter_cases as cases

KINDS = {
    "lora": lambda: adapters.lora(adapters.LoRAConfig(rank=3)),
    "prompt": lambda: adapters.prompt(adapters.PromptConfig(length=2)),
}
SGD = optax.sgd(0.3)


def ready(kind):
    _, model, base = cases.network()
    adapter = KINDS[kind]()
    return model, base, adapter, adapter.init(jax.random.key(1), model, base)


def batch():
    draw = np.random.default_rng(1)
    mask = np.arange(7)[None] < draw.integers(3, 8, 8)[:, None]
    return TokenBatch(jnp.asarray(draw.integers(2, 16, (8, 7)), jnp.int32), jnp.asarray(mask, jnp.float32))


SMALL = grpo.GRPOConfig(prompts=2, group=4, kl_coef=0.1, sampling=Sampling(max_tokens=4))


def even(rollout, answers):
    return ((rollout.completions % 2 == 0) * rollout.mask).sum(axis=1) / rollout.lengths


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_grpo_learns_with_the_base_as_reference(kind):
    """The reference that GRPO copies is an adapter at its start: the base, and no second copy of it."""
    model, base, adapter, params = ready(kind)
    problems = grpo.Problems(Prompts(jnp.asarray([[5, 6], [7, 8]]), jnp.asarray([2, 2])), jnp.zeros(2))
    optimizer = optax.adam(5e-2)
    build = lambda model: grpo.make(SMALL, model, optimizer, eos_id=1, pad_id=0)
    state = build(model).init(jax.random.key(0), params)
    kept = sum(x.size for x in jax.tree.leaves(state.reference))
    assert kept == sum(x.size for x in jax.tree.leaves(params)) < sum(x.size for x in jax.tree.leaves(base))
    step = adapters.over_base(lambda model: grpo.fused(build(model), even, SMALL), model, adapter)
    given = adapters.Based(base, problems)
    rows = [row for done in loop.run(step, state, given, steps=24, chunk=12) for row in done.metrics]
    rewards = [row["reward/mean"] for row in rows]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.1, rewards
    assert rows[0]["policy/kl"] < 1e-6 < rows[-1]["policy/kl"]
    assert max(row["sampler/log_prob_gap"] for row in rows) < 1e-4


def test_the_reference_is_the_base_itself():
    model, base, adapter, params = ready("lora")
    problems = grpo.Problems(Prompts(jnp.asarray([[5, 6], [7, 8]]), jnp.asarray([2, 2])), jnp.zeros(2))
    build = lambda model: grpo.make(SMALL, model, SGD, eos_id=1, pad_id=0)
    state = build(model).init(jax.random.key(0), params)
    sample = jax.jit(adapters.over_base(lambda model: build(model).sample, model, adapter))
    state, completions, _ = sample(state, adapters.Based(base, problems))
    of_base = jax.jit(lambda base: completion_log_probs(model, base, completions)[0])(base)
    of_reference = jax.jit(
        lambda base, params: completion_log_probs(adapters.adapt(model, base, adapter), params, completions)[0]
    )(base, state.reference)
    np.testing.assert_array_equal(of_base, of_reference)
    np.testing.assert_allclose(completions.log_probs, of_base * completions.mask, atol=2e-5)


def test_dpo_with_log_probs_of_the_base():
    model, base, adapter, params = ready("lora")
    pairs = Pairs(batch(), dataclasses.replace(batch(), tokens=jnp.roll(batch().tokens, 1, axis=0)))
    config = preference.DPOConfig(batch=8, beta=0.5)
    build = lambda model: preference.make(config, model, SGD)
    state = build(model).init(jax.random.key(0), params)
    reference = jax.jit(preference.make(config, model, SGD).reference)(base, pairs)
    own = jax.jit(adapters.over_base(lambda model: build(model).reference, model, adapter))
    again = own(params, adapters.Based(base, pairs))
    np.testing.assert_array_equal(reference.chosen, again.chosen)
    step = adapters.over_base(lambda model: build(model).step, model, adapter)
    rows = [row for p in loop.run(step, state, adapters.Based(base, again), steps=6, chunk=3) for row in p.metrics]
    np.testing.assert_allclose(rows[0]["train/loss"], np.log(2), rtol=1e-5)
    assert rows[-1]["train/loss"] < 0.95 * np.log(2)


def test_python_between_two_programs():
    """`bind` puts the base into a compiled function, for loops outside of jit."""
    model, base, adapter, params = ready("lora")
    problems = grpo.Problems(Prompts(jnp.asarray([[5, 6], [7, 8]]), jnp.asarray([2, 2])), jnp.zeros(2))
    build = lambda model: grpo.make(SMALL, model, SGD, eos_id=1, pad_id=0)
    state = build(model).init(jax.random.key(0), params)
    sample = adapters.bind(jax.jit(adapters.over_base(lambda model: build(model).sample, model, adapter)), base)
    learn = adapters.bind(jax.jit(adapters.over_base(lambda model: build(model).learn, model, adapter)), base)
    after, completions, rows = sample(state, problems)
    after, metrics = learn(after, completions, even(completions, None), rows)
    fused = adapters.over_base(lambda model: grpo.fused(build(model), even, SMALL), model, adapter)
    expected, _ = jax.jit(fused)(state, adapters.Based(base, problems))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, expected.params)
    assert np.isfinite(metrics["train/loss"])
