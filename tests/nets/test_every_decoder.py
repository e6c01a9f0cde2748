"""Every language network through SFT, DPO and GRPO as they are; the trainer scores what the sampler drew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import networks
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import grpo, preference, recipes, sft
from jaxrl.posttrain.recipes.common import network
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Pairs, Prompts, TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
SIZES = {"width": 16, "layers": 2, "heads": 2, "ffn": 16, "max_length": 32}
KINDS = {  # one of each kind of decoder
    "gpt2": "gpt2", "qwen2": "qwen25_0_5b", "qwen3": "qwen3_0_6b", "mixtral": "mixtral_8x7b",
    "qwen_moe": "qwen15_moe_a2_7b", "deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3",
    "moonlight": "moonlight_16b_a3b", "chameleon": "chameleon_7b", "chameleon_34b": "chameleon_34b",
    "minimax": "minimax_text_01",
}  # fmt: skip
OWN = {
    "linear": presets.linear_transformer(12, 16, 2, heads=2, kv_heads=2, max_length=32),
    "performer": presets.performer(12, 16, 2, heads=2, kv_heads=2, max_length=32),
    "transnormer": presets.transnormer(12, 16, 2, heads=2, kv_heads=2, max_length=32),
    "retnet": presets.retnet_like(12, 16, 2, heads=2, kv_heads=2, max_length=32),
}
FAST = ("gpt2", "deepseek_v3", "minimax")
CASES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in (*KINDS, *OWN)]


def config_of(kind):
    if kind in OWN:
        return OWN[kind]
    return presets.shrunk(networks.find(KINDS[kind]).config, 12, **SIZES)


@pytest.mark.parametrize("kind", CASES)
def test_trains_in_every_loop(kind):
    model, optimizer = language_model(config_of(kind)), optax.adam(2e-2)
    params = jit(model.init)(jax.random.key(0))

    rows = TokenBatch(jnp.tile(jnp.arange(2, 8)[None], (4, 1)), jnp.ones((4, 6)))
    recipe = sft.make(sft.SFTConfig(batch=4), model, optimizer)
    state, losses = recipe.init(jax.random.key(1), params), []
    step = jit(recipe.step)
    for _ in range(12):
        state, metrics = step(state, rows)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.6 * losses[0], losses

    side = lambda last: TokenBatch(jnp.array([[2, 3, last, 1], [4, 5, last, 1]]), jnp.array([[0.0, 0.0, 1.0, 1.0]] * 2))
    recipe = preference.make(preference.DPOConfig(batch=2), model, optimizer)
    data = jit(recipe.reference)(params, Pairs(side(6), side(7)))
    state, step = recipe.init(jax.random.key(2), params), jit(recipe.step)
    for _ in range(8):
        state, metrics = step(state, data)
    assert metrics["rewards/margins"] > 0.02

    config = grpo.GRPOConfig(prompts=2, group=8, kl_coef=0.0, sampling=Sampling(max_tokens=4))
    recipe = grpo.make(config, model, optimizer, eos_id=1, pad_id=0)
    problems = grpo.Problems(Prompts(jnp.array([[0, 2], [3, 4]]), jnp.array([1, 2])), jnp.zeros(2))
    reward = lambda completions, _: ((completions.completions == 5) * completions.mask).sum(1) / 4
    state, step, rewards = recipe.init(jax.random.key(3), params), jit(grpo.fused(recipe, reward, config)), []
    for _ in range(20):
        state, metrics = step(state, problems)
        rewards.append(float(metrics["reward/mean"]))
        assert metrics["sampler/log_prob_gap"] < 1e-4  # the trainer scores what the sampler drew
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15, rewards


def test_a_run_names_the_network_that_it_is_like():
    options = recipes.ModelConfig(like="deepseek-v3", width=32, layers=2, heads=4, ffn=64)
    config = network(options, 50, 40)
    assert (config.latent.kv_rank, config.experts.experts, config.experts.bias) == (16, 8, True)
    assert (config.vocab_size, config.max_length, config.width, config.dense_layers) == (50, 40, 32, 1)
    given = network(recipes.ModelConfig(like="qwen3-0.6b", kv_heads=4, remat="none", tie_embeddings=False), 50, 40)
    assert (given.kv_heads, given.remat, given.tie_embeddings, given.qk_norm) == (4, "none", False, True)
    kinds = {
        "performer-protein": lambda c: c.linear.features == "performer" and c.linear.random == 16,
        "transnormer-t2": lambda c: c.linear_layers == (1,) and c.pattern is not None,
        "retnet-1.3b": lambda c: c.linear.decay == "retention" and not c.gated,
        "linear-transformer-mnist": lambda c: c.linear.normalise and c.positions == "learned",
        "qwen2.5-vl-7b": lambda c: c.qkv_bias and c.rope_sections is None,
        "kimi-vl-a3b": lambda c: c.latent and c.experts.bias,
    }
    for like, right in kinds.items():
        config = network(dataclasses.replace(options, like=like), 50, 40)
        assert right(config) and (config.vocab_size, config.width) == (50, 32), like
        jax.eval_shape(lambda key, c=config: language_model(c).init(key), jax.random.key(0))
    refused = {
        "bert-base": "is no decoder", "gru-medium": "no decoder but of the family recurrent",
        "vit-b16": "family vision", "deepseek-v9": "did you mean 'deepseek_v",
    }  # fmt: skip
    for like, message in refused.items():
        with pytest.raises(ValueError, match=message):
            network(recipes.ModelConfig(like=like), 50, 40)
