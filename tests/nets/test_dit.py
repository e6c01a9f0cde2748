"""BD3-LM and MDLM against torch, through the values that tests/golden/make_dit.py stored, and their folders."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import cli, diffusion, networks, parallel
from jaxrl.data import CharTokenizer
from jaxrl.data.tokenizer_files import save_tokenizer
from jaxrl.kernels.attention import BlockDiffusion, Causal, Chunked
from jaxrl.nets import multi_token, presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.weights import dit, from_checkpoint, from_hugging_face, maps, to_checkpoint, to_hugging_face
from jaxrl.nets.weights.files import write_safetensors
from jaxrl.posttrain import talk
from jaxrl.posttrain.rollout import Sampling
from jaxrl.pretrained import load_pretrained, save_pretrained
from jaxrl.types import Prompts, TokenBatch

MASK, BLOCK, COND = 19, 4, 6


@functools.cache
def golden():
    """The arrays of the file."""
    with np.load(Path(__file__).parents[1] / "golden" / "dit.npz") as arrays:
        return dict(arrays)


def part(start):
    """Arrays whose names begin so, without the beginning."""
    return {name.removeprefix(start): x for name, x in golden().items() if name.startswith(start)}


def said(case: str = "blocks", **changes: Any) -> dict[str, Any]:
    """Its config.json."""
    return json.loads(str(golden()[f"{case}/config"])) | changes


def tensors(case="blocks"):
    """Of its checkpoint."""
    modulated = lambda name: "adaLN" in name or "sigma_map" in name
    return {name: x for name, x in part("weight/").items() if case != "bare" or not modulated(name)}


def load(case="blocks"):
    """(config, params)."""
    config = from_hugging_face(said(case), max_length=24)  # of [noisy ; clean]
    return config, from_checkpoint(config, tensors(case))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, ids, positions=None, mask=None):
    """float32 logits [B, T, V]."""
    model = language_model(config)
    hidden, _ = model.apply(params, ids, positions=positions, mask=mask)
    return logits(hidden, model.unembedding(params))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", ["whole", "bare"])
def test_logits_equal_those_of_torch(case):
    stored, (config, params) = part(f"{case}/"), load(case)
    close(forward(config, params, stored["noisy"]), stored["logits"])


def test_logits_of_noisy_and_clean_blocks_equal_those_of_torch():
    stored, (config, params) = part("blocks/"), load()
    both = np.concatenate([stored["noisy"], stored["ids"]], axis=1)
    positions = np.tile(np.arange(12), (2, 2))
    got = forward(config, params, both, positions, BlockDiffusion(BLOCK))
    close(got[:, :12], stored["logits"])


def test_logits_of_sampling_equal_those_of_torch():
    stored, (config, params) = part("blocks/"), load()
    close(forward(config, params, stored["noisy"], None, Causal() | Chunked(BLOCK)), stored["read"])


@pytest.mark.parametrize("case", ["whole", "blocks"])
def test_the_bound_and_its_gradients_equal_those_of_torch(case):
    """What `jaxrl.diffusion` makes of the same noise; gradients pass through the folding to its tensors."""
    stored, (config, _) = part(f"{case}/"), load(case)
    batch = TokenBatch(jnp.asarray(stored["ids"]), jnp.ones(stored["ids"].shape))
    weight = jnp.repeat(1 / stored["t"], 12 // stored["t"].shape[1], axis=1)
    noisy = diffusion.Noised(batch, jnp.asarray(stored["noisy"]), jnp.asarray(stored["masked"]), weight)
    block = BLOCK if case == "blocks" else None
    known = dit.names(config, COND)

    def loss(checkpoint):
        params = dit.folded(checkpoint)
        (total, count), _ = diffusion.loss(language_model(config), params, noisy, mask_id=MASK, block=block)
        return total / count

    checkpoint = maps.from_checkpoint(known, dit.shapes(config, COND), tensors(case))
    value, gradient = jax.jit(jax.value_and_grad(loss))(checkpoint)
    np.testing.assert_allclose(value, stored["loss"], rtol=1e-5)
    ours, theirs = maps.to_checkpoint(known, gradient), part(f"{case}/grad/")
    assert ours.keys() == theirs.keys() == tensors().keys()
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_norms_gates_and_the_bias_of_the_logits_are_where_they_belong():
    stored, (config, params) = part("whole/"), load("whole")
    for one in ("attention_norm/bias", "ffn_norm/bias", "norm/bias", "unembed_bias", "down/bias"):
        without = lambda path, x: x * (not jax.tree_util.keystr(path, simple=True, separator="/").endswith(one))
        changed = jax.tree.map_with_path(without, params)
        assert np.abs(forward(config, changed, stored["noisy"]) - stored["logits"]).max() > 1e-2, one
    assert params["layers"]["attention"].keys() == {"q", "k", "v", "o"}
    assert all(layer.keys() == {"kernel"} for layer in params["layers"]["attention"].values())
    model = language_model(config)
    hidden, _ = model.apply(params, stored["noisy"])
    assert hidden.shape == (2, 12, 17) and model.unembedding(params).shape == (17, 20)
    np.testing.assert_array_equal(hidden[..., -1], 1)


def folder_of(folder, case="blocks", **changes):
    """As its authors publish it, but with a tokenizer of 13 tokens."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(CharTokenizer("0123456789"), folder)
    buffers = {
        "backbone.rotary_emb.inv_freq": np.ones(4),
        "sampling_eps_min": np.ones(1),
        "sampling_eps_max": np.ones(1),
    }
    write_safetensors(folder, tensors(case) | buffers)
    (folder / "config.json").write_text(json.dumps(said(case, **changes)))
    return folder


@pytest.mark.parametrize("case", ["blocks", "whole", "bare"])
def test_a_folder_opens_and_is_written_again(case, tmp_path):
    model = load_pretrained(folder_of(tmp_path / "first", case), max_length=24)
    config, params = load(case)
    assert model.transformer == config
    assert (model.mask_id, model.block) == (MASK, BLOCK if case == "blocks" else None)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    save_pretrained(model, tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert again.transformer == config and (again.mask_id, again.block) == (model.mask_id, model.block)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), again.params, params)
    half = load_pretrained(tmp_path / "first", param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}


def test_the_command_line_fills_in_block_after_block(tmp_path, capsys):
    folder = folder_of(tmp_path)
    cli.main(["generate", "--model", str(folder), "--prompt", "12", "--max-tokens", "6", "--temperature", "0"])
    written = capsys.readouterr().out
    model = load_pretrained(folder)
    run = functools.partial(
        diffusion.generate_in_blocks, model.language_model, sampling=Sampling(max_tokens=6, temperature=0.0),
        unmasking=diffusion.Unmasking(block=BLOCK), mask_id=MASK, eos_id=model.tokenizer.eos_id,
        pad_id=model.tokenizer.pad_id,
    )  # fmt: skip
    prompts = Prompts(jnp.array([model.tokenizer.encode("12")]), jnp.array([2]))
    found = jax.jit(run)(model.params, prompts, jax.random.key(0))
    tokens = found.tokens[0, 2 : 2 + int(found.lengths[0])]
    assert model.tokenizer.decode(tokens.tolist()) in written
    sampling = Sampling(max_tokens=6, temperature=0.0)
    own = talk.open_run(str(folder), sampling=sampling).complete("12")[0]
    np.testing.assert_allclose(own.log_prob, found.log_probs.sum(), rtol=1e-4)
    whole = talk.generator(model._replace(block=None), sampling)(model.params, prompts, jax.random.key(0))
    assert abs(whole.log_probs.sum() - own.log_prob) > 1e-2


def test_the_mask_token_and_the_block_are_what_config_json_says():
    assert dit.masking(said(), 19) == (19, 4) and dit.masking(said(mask_token_id=3), 20) == (3, 4)
    assert dit.masking(said("whole"), 19) == dit.masking(said(block_size=12), 19) == (19, None)
    assert dit.masking(said(model_type="mdlm"), 19) == (19, None)
    lacking = {name: value for name, value in said().items() if name not in ("block_size", "cross_attn")}
    assert dit.masking(lacking, 19) == (19, 1)  # as the class has them
    with pytest.raises(ValueError, match="vocab_size is 20, and the tokenizer has 20 words.*add mask_token_id"):
        dit.masking(said(), 20)


def test_the_published_size():
    stored = json.loads(str(golden()["published/config"]))
    config = from_hugging_face(stored)
    assert config == presets.bd3lm_small() and from_hugging_face(to_hugging_face(config)) == config
    mdlm = {name: stored[name] for name in ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length")}
    assert from_hugging_face(mdlm | {"model_type": "mdlm", "time_conditioning": False}) == config
    assert dit.masking(stored, 50257) == (50257, 16)
    found = networks.find("bd3lm-small")
    count = lambda shapes: sum(np.prod(shape, dtype=int) for shape in shapes.values())
    assert found.family == "decoder" and found.parameters == 162_265_682
    assert count(dit.shapes(config, 128)) == golden()["published/parameters"] == 169_627_218
    rest = found.parameters - 2 * config.vocab_size * config.width  # what the paper's 110M leaves out, and more
    assert rest == 85_069_394
    assert f"{found.parameters:,}" in (presets.bd3lm_small.__doc__ or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_conditioning": True}, "time_conditioning is True: the noise level moves its norms and gates"),
        ({"causal": True}, "causal is True: it reads from left to right"),
        ({"causal": True, "time_conditioning": True}, "time_conditioning is True.*; causal is True"),
        ({"model_type": "udlm"}, "model_type is 'udlm', expected one of"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*: expected plain floats"),
        ({"n_heads": 3}, "width 16 is not a multiple of heads 3"),
    ],
)
def test_what_is_not_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face(said(**change))


def test_a_checkpoint_that_does_not_fit_names_every_problem():
    own = tensors()
    own["backbone.blocks.0.attn_qkv.weight"] = own["backbone.blocks.0.attn_qkv.weight"].T
    del own["backbone.output_layer.linear.bias"], own["backbone.sigma_map.mlp.2.bias"]
    own["backbone.blocks.1.attn_out.bias"] = np.zeros(16)
    with pytest.raises(ValueError) as error:
        from_checkpoint(load()[0], own)
    for message in (
        "missing backbone.output_layer.linear.bias",
        "missing backbone.sigma_map.mlp.2.bias",
        "unused backbone.blocks.1.attn_out.bias",
        "backbone.blocks.0.attn_qkv.weight has shape (16, 48), expected (48, 16)",
    ):
        assert message in str(error.value)
    with pytest.raises(ValueError, match="unused backbone.sigma_map.mlp.0.bias"):
        from_checkpoint(load()[0], tensors("bare") | {"backbone.sigma_map.mlp.0.bias": np.zeros(6)})


def test_such_a_network_is_known_by_its_choices():
    config, params = load()
    for change in ({"bias": True}, {"ffn": 32}, {"norm": "rms"}, {"rope_base": 5e5}, {"head_dim": 6}):
        with pytest.raises(ValueError, match="the network is no such DiT: expected the choices of presets.bd3lm_small"):
            to_checkpoint(dataclasses.replace(config, **change), params)
    with pytest.raises(ValueError, match="unembed_bias"):
        to_hugging_face(presets.tiny(unembed_bias=True))
    with pytest.raises(ValueError, match="unembed_bias"):
        multi_token.multi_token_model(presets.tiny(unembed_bias=True))
    with pytest.raises(ValueError, match="bias is 'all', expected one of False, True, 'ffn'"):
        presets.tiny(bias="all")


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["stage=2,tensor=2,data=2", "fsdp=2,context=2,data=2"])
def test_the_bias_of_the_logits_on_a_mesh(spec):
    config = presets.shrunk(presets.bd3lm_small(), 20, width=16, heads=2, ffn=64)
    mesh, plain = parallel.make_mesh(spec), language_model(config)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), jnp.float32), plain.init(jax.random.key(0))
    )
    tokens = jnp.asarray(draw.integers(0, 20, (4, 8)))

    def score(model):
        def total(params):
            hidden, _ = model.apply(params, tokens)
            return model.log_probs(hidden, model.unembedding(params), tokens)[0].mean()

        return jax.jit(jax.value_and_grad(total))

    value, gradient = score(plain)(params)
    placed = jax.device_put(params, parallel.state_shardings(params, mesh))
    found, other = score(parallel.model_on(config, mesh))(placed)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, gradient)
    assert np.abs(gradient["unembed_bias"]).max() > 1e-2
