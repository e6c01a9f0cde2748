"""Decoders against torch, through the values that tests/golden/make_transformers.py and others stored."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.weights import from_checkpoint, from_hugging_face, to_checkpoint, to_hugging_face

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "llama": ["plain", "linear", "dynamic", "llama3", "yarn", "padded"],
    "qwen2": ["plain", "window"],
    "qwen3": ["plain"],
    "mistral": ["window"],
    "mixtral": ["plain"],
    "qwen2_moe": ["plain"],
    "qwen3_moe": ["plain"],
    "deepseek_v2": ["plain", "yarn"],
    "deepseek_v3": ["plain"],
    "moonlight": ["plain"],
    "minimax": ["padded"],
    "minimax_odd": ["padded"],
}


def load(file, case):
    """(config, params, arrays of the case)."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        weights = {k.removeprefix("weight/"): arrays[k] for k in arrays if k.startswith("weight/")}
        stored = {k.removeprefix(f"{case}/"): arrays[k] for k in arrays if k.startswith(f"{case}/")}
    published = json.loads(str(stored["config"]))
    config = from_hugging_face(published, max_length=64)
    return config, from_checkpoint(config, weights), stored


def forward(config, params, stored):
    """float32 logits [B, T, V] of a case; rows with padding hide it from the real tokens."""
    model = language_model(config)
    positions, real = jnp.asarray(stored["positions"]), jnp.asarray(stored["real"])
    mask = Causal() & Segments(real)
    hidden, _ = model.apply(params, jnp.asarray(stored["ids"]), positions=positions, mask=mask)
    return logits(hidden, model.unembedding(params))


@pytest.mark.parametrize(("file", "case"), [(f, c) for f, cases in CASES.items() for c in cases])
def test_logits_equal_those_of_torch(file, case):
    config, params, stored = load(file, case)
    got = np.asarray(jax.jit(forward, static_argnums=0)(config, params, arrays(stored)))
    real = stored["real"].astype(bool)
    np.testing.assert_allclose(got[real], stored["logits"][real], atol=1e-5, rtol=1e-5)


def arrays(stored):
    return {k: stored[k] for k in ("ids", "positions", "real")}


def test_rope_variants_are_told_apart():
    """The golden cases can fail: every variant gives other logits than plain rope on the same ids."""
    plain = load("llama", "plain")[2]
    for case in ("linear", "dynamic"):
        assert np.abs(load("llama", case)[2]["logits"] - plain["logits"]).max() > 1e-2
    first, second = (load("llama", case)[2] for case in ("llama3", "yarn"))
    assert np.abs(first["logits"] - second["logits"]).max() > 1e-2
    np.testing.assert_array_equal(first["ids"], second["ids"])


def test_a_part_of_a_head_turns_as_in_torch():
    """Phi-3, a Llama under other names whose heads turn by three quarters; whole, and through a cache."""
    with np.load(GOLDEN / "phi3.npz") as file:
        stored = {k.removeprefix("plain/"): file[k] for k in file}
    published = json.loads(str(stored["config"])) | {"model_type": "llama"}
    with pytest.raises(ValueError, match="6 numbers of a head turn .* transformers' LlamaForCausalLM all do"):
        from_hugging_face(published)
    config, whole = (from_hugging_face(published, max_length=64, rotary_dim=n) for n in (6, None))
    weights = {k.removeprefix("weight/"): v for k, v in stored.items() if k.startswith("weight/")}
    params, model = from_checkpoint(whole, weights), language_model(config)
    with pytest.raises(ValueError, match="rotary_dim differ from a Llama's"):
        from_checkpoint(config, weights)
    got, other = (jax.jit(forward, static_argnums=0)(c, params, arrays(stored)) for c in (config, whole))
    np.testing.assert_allclose(got, stored["logits"], atol=1e-5, rtol=1e-5)
    assert np.abs(other - stored["logits"]).max() > 1e-2
    cache, ids, run = model.init_cache(2, 12), jnp.asarray(stored["ids"]), jax.jit(model.apply)
    for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        hidden, cache = run(params, ids[:, part], cache=cache)
        got = logits(hidden, model.unembedding(params))
        np.testing.assert_allclose(got, stored["logits"][:, part], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", ["qwen3", "mixtral", "deepseek_v3", "minimax"])
def test_loss_and_gradients_equal_those_of_torch(file):
    config, params, stored = load(file, "plain")
    if config.experts:  # transformers' loss without labels has no term for the balance
        config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, aux_coef=0.0))

    def loss(params):
        scores = forward(config, params, arrays(stored))[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.asarray(stored["ids"])[:, 1:, None], axis=-1)
        return -picked.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, stored["loss"], rtol=1e-5)
    ours = {k: v for k, v in to_checkpoint(config, gradient).items() if "correction_bias" not in k}
    theirs = {k.removeprefix("grad/"): v for k, v in stored.items() if k.startswith("grad/")}
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)


def test_modules_behind_the_layers_are_left_out():
    """Published checkpoints of DeepSeek-V3 hold them; `weights.deepseek` reads them."""
    config, params, _ = load("deepseek_v3", "plain")
    tensors = to_checkpoint(config, params)
    more = tensors | {f"model.layers.{config.layers}.eh_proj.weight": np.zeros((16, 32))}
    jax.tree.map(np.testing.assert_array_equal, from_checkpoint(config, more), params)
    with pytest.raises(ValueError, match="unused model.layers.9.eh_proj.weight"):
        from_checkpoint(config, tensors | {"model.layers.9.eh_proj.weight": np.zeros(2)})


def test_fp8_in_blocks_is_read_and_other_quantisation_refused():
    published = json.loads(str(load("deepseek_v3", "plain")[2]["config"]))
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert from_hugging_face(published | {"quantization_config": blocks}) == from_hugging_face(published)
    with pytest.raises(ValueError, match="quantised .gptq"):
        from_hugging_face(published | {"quantization_config": {"quant_method": "gptq"}})


ALL = ["qwen2", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "moonlight", "minimax", "minimax_odd"]


@pytest.mark.parametrize("file", ALL)
def test_checkpoint_round_trip_is_exact(file):
    case = CASES[file][-1]
    config, params, stored = load(file, case)
    again = from_checkpoint(config, to_checkpoint(config, params))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    described = from_hugging_face(to_hugging_face(config))
    assert described.head_size == config.head_size
    assert dataclasses.replace(described, head_dim=config.head_dim) == config


def test_a_published_config_names_windows_biases_and_ties():
    config, _, _ = load("qwen2", "window")
    assert config.window_layers == (1,) and config.qkv_bias and config.tie_embeddings


def test_a_checkpoint_that_does_not_fit_names_every_problem():
    config, params, _ = load("llama", "plain")
    tensors = to_checkpoint(config, params)
    del tensors["model.norm.weight"]
    tensors["extra"] = np.zeros(3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T
    with pytest.raises(ValueError) as error:
        from_checkpoint(config, tensors)
    for part in ("missing model.norm.weight", "unused extra", "lm_head.weight has shape (32, 64)"):
        assert part in str(error.value)


def test_unsupported_published_configs_are_refused():
    _, _, stored = load("llama", "plain")
    published = json.loads(str(stored["config"]))
    with pytest.raises(ValueError, match="model_type is 't5'"):
        from_hugging_face(published | {"model_type": "t5"})
    with pytest.raises(ValueError, match="hidden_act"):
        from_hugging_face(published | {"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="rope type is 'longrope'"):
        from_hugging_face(published | {"rope_parameters": {"rope_type": "longrope"}})
    with pytest.raises(ValueError, match="attention_bias"):
        from_hugging_face(published | {"attention_bias": True})
    with pytest.raises(ValueError, match="4 numbers of a head turn .* LlamaForCausalLM all do"):
        from_hugging_face(published | {"partial_rotary_factor": 0.5})
    assert from_hugging_face(published | {"partial_rotary_factor": 1.0}) == from_hugging_face(published)


def test_a_minimax_that_does_not_fit_names_every_problem():
    config, params, _ = load("minimax", "plain")
    tensors = to_checkpoint(config, params)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((24, 16))
    tensors["model.layers.1.self_attn.qkv_proj.weight"] = np.zeros((24, 16))
    with pytest.raises(ValueError) as error:
        from_checkpoint(config, tensors)
    for part in (
        "missing model.norm.weight",
        "unused model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.qkv_proj.weight has shape (24, 16), expected (72, 16)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_attn_beta_factor": 0.5}, "full_attn_beta_factor is 0.5, expected 1"),
        ({"mlp_alpha_factor": 2.0}, "'mlp_alpha_factor': 2.0. differ, expected one for all sums"),
        ({"rotary_dim": 3}, "rotary_dim is 3, but rotary embedding turns pairs"),
        ({"rotary_dim": 4, "partial_rotary_factor": 0.5}, r"\[3, 4\] of 6 numbers of a head turn, expected one"),
        ({"sliding_window": 8, "hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'; sliding_window is 8"),
        ({"layer_types": ["full_attention"] * 6}, "linear_attention at least once"),
        ({"layer_types": ["linear_attention"] * 2}, "for each of 6 layers"),
        ({"layer_types": ["mamba"] * 6}, "layer_types is .'mamba'"),
    ],
)
def test_what_is_not_built_of_a_minimax_is_refused(change, message):
    with np.load(GOLDEN / "minimax.npz") as arrays:
        config = json.loads(str(arrays["plain/config"]))
    with pytest.raises(ValueError, match=message):
        from_hugging_face(config | change)


def test_a_minimax_says_how_many_numbers_of_a_head_turn():
    """As published: `rotary_dim`. Our parameters are the same, the network is not."""
    config, params, stored = load("minimax_odd", "plain")
    published = json.loads(str(stored["config"]))
    theta = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}  # 4.2 of 6
    partial = dataclasses.replace(config, rotary_dim=4)
    for said in ({"rotary_dim": 4}, {"partial_rotary_factor": 0.7}, {"rope_parameters": theta}):
        assert from_hugging_face(published | said, max_length=64) == partial
        assert from_hugging_face(published | said, max_length=64, rotary_dim=None) == config
    assert from_hugging_face(published | {"rotary_dim": 6}, max_length=64) == config
    assert to_hugging_face(partial) == to_hugging_face(config) | {"rotary_dim": 4}
    assert from_hugging_face(to_hugging_face(partial)) == partial
    tensors = to_checkpoint(partial, params)
    jax.tree.map(np.testing.assert_array_equal, from_checkpoint(partial, tensors), params)
    got, whole = (jax.jit(forward, static_argnums=0)(c, params, arrays(stored)) for c in (partial, config))
    np.testing.assert_array_equal(got[:, 0], whole[:, 0])  # position 0 turns nothing
    assert np.abs(got - whole).max() > 1e-3
    large = presets.minimax_text_01(rotary_dim=64)
    assert from_hugging_face(to_hugging_face(large)) == large


def test_a_minimax_is_known_by_its_choices():
    """Whatever training adds to the gating; every other choice must be MiniMax's."""
    config = load("minimax", "plain")[0]
    replace = dataclasses.replace
    changed = lambda of, **changes: replace(config, **{of: replace(getattr(config, of), **changes)})
    trained = replace(changed("experts", z_coef=1e-3, capacity_factor=2.0), dtype="bfloat16")
    assert to_hugging_face(trained)["num_local_experts"] == 3
    assert from_hugging_face(to_hugging_face(presets.minimax_text_01())) == presets.minimax_text_01()
    odd = [changed("linear", kv_heads=2), changed("experts", score="sigmoid"), changed("experts", shared=8)]
    for other in (*odd, replace(config, embed_norm=False), replace(config, qkv_bias=True)):
        with pytest.raises(ValueError, match="the network is no MiniMax"):
            to_checkpoint(other, {})
