"""`presets.shrunk` keeps what makes a network: its groups of experts, its pattern, the order of its layers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import BigBird, Causal, Chunked, Fixed, Longformer, Strided
from jaxrl.kernels.attention.masks import dense
from jaxrl.nets import moe, presets


@pytest.mark.parametrize("make", [presets.deepseek_v2, presets.deepseek_v3])
def test_groups_of_experts_stay_limited(make):
    config: Any = presets.shrunk(make(), 32).experts
    assert (config.experts, config.top_k, config.groups, config.top_groups) == (8, 2, 2, 1)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 200, 8)), jnp.float32)
    groups = np.asarray(moe.route(config, logits).ids) // 4
    assert (groups[..., 0] == groups[..., 1]).all()
    free = np.asarray(moe.route(dataclasses.replace(config, top_groups=2), logits).ids) // 4
    assert (free[..., 0] != free[..., 1]).any()


def test_networks_without_groups_get_none():
    for make in (presets.mixtral_8x7b, presets.moonlight_16b_a3b, presets.deepseek_v2_lite):
        config: Any = presets.shrunk(make(), 32).experts
        assert (config.groups, config.top_groups) == (1, 1)


@pytest.mark.parametrize("length", [16, 32, 128, 512])
def test_a_sparse_pattern_stays_sparse(length):
    config: Any = presets.shrunk(presets.sparse_transformer_enwik8(), 32, max_length=length)
    assert config.pattern.block <= length // 8
    shape = (1, 1, length, length)
    sparse, causal = (int(np.sum(dense(mask, shape))) for mask in (config.pattern & Causal(), Causal()))
    assert sparse < 0.7 * causal


def test_lengths_of_a_pattern_keep_their_shares():
    config = lambda pattern: presets.tiny(pattern=pattern, causal=False)
    patterns: dict[Any, Any] = {
        Fixed(128, 32): Fixed(16, 4), Chunked(64): Chunked(16), Chunked(8): Chunked(8), Strided(100): Strided(16),
        Longformer(256): Longformer(16, 0), Longformer(256, 64): Longformer(16, 4), BigBird(64, 5): BigBird(16, 5),
    }  # fmt: skip
    for given, want in patterns.items():
        assert presets.shrunk(config(given), 32, max_length=128).pattern == want


@pytest.mark.parametrize(
    ("layers", "minimax", "transnormer"),
    [(2, (0,), (1,)), (3, (0, 2), (1, 2)), (4, (0, 2), (2, 3)), (8, (0, 2, 4, 6), (4, 5, 6, 7))],
)
def test_layers_keep_their_networks_order(layers, minimax, transnormer):
    assert presets.shrunk(presets.minimax_text_01(), 32, layers=layers).linear_layers == minimax
    config: Any = presets.shrunk(presets.transnormer(32, 64, 12), 32, layers=layers)
    assert config.linear_layers == transnormer == presets.transnormer(32, 64, layers).linear_layers
    assert config.pattern == Chunked(64) and config.linear.norm == "all"


def test_cut():
    assert presets.cut("aaaaaaab" * 10, 5) == list("ababa")
    assert presets.cut("abbbbbbbbb", 2) == list("ab")  # neither at a share of the depth, nor a period
    assert presets.cut("aabbbb", 3) == list("abb")
    assert presets.cut("aaaa", 2) == list("aa")
    window = presets.tiny(layers=6, window=8, window_layers=(0, 2, 4))
    assert presets.shrunk(window, 32, layers=3).window_layers == (0, 2)
