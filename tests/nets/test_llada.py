"""LLaDA against torch, through the values that tests/golden/make_llada.py stored, and its folders in and out."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import cli, diffusion, networks
from jaxrl.data import CharTokenizer
from jaxrl.data.tokenizer_files import save_tokenizer
from jaxrl.kernels.attention import Segments
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.weights import (
    from_checkpoint,
    from_hugging_face,
    read_safetensors,
    to_checkpoint,
    to_hugging_face,
    write_safetensors,
)
from jaxrl.posttrain import evaluation, talk, tools
from jaxrl.posttrain.rollout import Sampling
from jaxrl.pretrained import load_pretrained, save_pretrained
from jaxrl.types import Prompts, TokenBatch

MASK, EOS = 61, 62


@functools.cache
def golden():
    """The arrays of the file."""
    with np.load(Path(__file__).parents[1] / "golden" / "llada.npz") as arrays:
        return dict(arrays)


def part(start):
    """Arrays whose names begin so, without the beginning."""
    return {name.removeprefix(start): x for name, x in golden().items() if name.startswith(start)}


def said(case: str = "plain", **changes: Any) -> dict[str, Any]:
    """Its config.json."""
    return json.loads(str(golden()[f"{case}/config"])) | changes


def tensors(case="plain"):
    """Of its checkpoint."""
    own = part("weight/")
    return {name: x for name, x in own.items() if case != "tied" or name != "model.transformer.ff_out.weight"}


def load(case="plain"):
    """(config, params)."""
    config = from_hugging_face(said(case))
    return config, from_checkpoint(config, tensors(case))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, ids, real=None):
    """float32 logits [B, T, V]; None of real: the network's own mask."""
    model = language_model(config)
    mask = None if real is None else Segments(real)
    positions = None if real is None else jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden, _ = model.apply(params, ids, positions=positions, mask=mask)
    return logits(hidden, model.unembedding(params))


@pytest.mark.parametrize("case", ["plain", "padded", "tied"])
def test_logits_equal_those_of_torch(case):
    stored, (config, params) = part(f"{case}/"), load(case)
    real = stored["real"].astype(bool)
    got = np.asarray(forward(config, params, stored["ids"], None if real.all() else stored["real"]))
    np.testing.assert_allclose(got[real], stored["logits"][real], atol=1e-5, rtol=1e-5)


def test_every_token_sees_those_after_it():
    stored, (config, params) = part("plain/"), load()
    causal = forward(dataclasses.replace(config, causal=True), params, stored["ids"])
    assert np.abs(causal - stored["logits"])[:, :-1].max(-1).min() > 1e-2
    other = stored["ids"].copy()
    other[:, -1] += 1
    assert np.abs(forward(config, params, other) - stored["logits"]).max(-1).min() > 1e-3


def test_loss_of_masked_tokens_and_gradients_equal_those_of_torch():
    stored, (config, params) = part("masked/"), load()
    weight = stored["masked"] / stored["t"][:, None]

    def loss(params):
        scores = jax.nn.log_softmax(forward(config, params, stored["noisy"]))
        picked = jnp.take_along_axis(scores, stored["ids"][..., None], axis=-1)[..., 0]
        return -(picked * weight).mean()

    compare(config, params, loss, stored, "loss", "grad/")


def test_bound_of_the_diffusion_loss_and_gradients_equal_those_of_torch():
    """What `jaxrl.diffusion` makes of the same noise, where the mask token is ruled out."""
    stored, (config, params) = part("masked/"), load()
    batch = TokenBatch(jnp.asarray(stored["ids"]), jnp.ones(stored["ids"].shape))
    levels = jnp.broadcast_to(1 / stored["t"][:, None], batch.tokens.shape)
    noisy = diffusion.Noised(batch, jnp.asarray(stored["noisy"]), jnp.asarray(stored["masked"]), levels)

    def loss(params):
        (total, count), _ = diffusion.loss(language_model(config), params, noisy, mask_id=MASK)
        return total / count

    compare(config, params, loss, stored, "bound", "bound_grad/")


def compare(config, params, loss, stored, name, prefix):
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, stored[name], rtol=1e-5)
    ours = to_checkpoint(config, gradient)
    theirs = {key.removeprefix(prefix): x for key, x in stored.items() if key.startswith(prefix)}
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
        np.testing.assert_allclose(ours[key], want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=key)


def folder_of(folder, case="plain"):
    """As its authors lay it out, with a tokenizer of 13 tokens."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(CharTokenizer("0123456789"), folder)
    write_safetensors(folder, tensors(case))
    (folder / "config.json").write_text(json.dumps(said(case)))
    return folder


def test_completions_of_a_folder_equal_those_of_torch(tmp_path):
    model, stored = load_pretrained(folder_of(tmp_path)), part("drawn/")
    prompts = Prompts(jnp.pad(stored["prompt"], ((0, 0), (2, 0))), jnp.array([5, 5]))
    run = functools.partial(
        diffusion.generate, model.language_model, sampling=Sampling(max_tokens=8, temperature=0.0),
        unmasking=diffusion.Unmasking(block=4, steps=2), mask_id=model.mask_id, eos_id=EOS, pad_id=0,
    )  # fmt: skip
    found = jax.jit(run)(model.params, prompts, jax.random.key(0))
    np.testing.assert_array_equal(found.tokens[:, found.prompt_width :], stored["tokens"])


@pytest.mark.parametrize("case", ["plain", "tied"])
def test_a_folder_opens_and_is_written_again(case, tmp_path):
    model = load_pretrained(folder_of(tmp_path / "first", case), remat="none")
    config, params = load(case)
    assert model.transformer == dataclasses.replace(config, remat="none")
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    save_pretrained(model, tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert again.transformer == config and again.mask_id == MASK
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    written = read_safetensors(tmp_path / "again")
    assert written.keys() == tensors(case).keys()
    for name, want in tensors(case).items():
        np.testing.assert_array_equal(np.asarray(written[name]), want, err_msg=name)
    for field, value in json.loads((tmp_path / "again" / "config.json").read_text()).items():
        ids = ("vocab_size", "eos_token_id", "pad_token_id")  # rows of the embedding; of the tokenizer
        assert field in ids or field not in said(case) or value == said(case)[field], field


def test_the_command_line_fills_in_masks(tmp_path, capsys):
    folder = folder_of(tmp_path)
    cli.main(["generate", "--model", str(folder), "--prompt", "12", "--max-tokens", "6", "--temperature", "0"])
    written = capsys.readouterr().out
    model = load_pretrained(folder)
    ids = {"eos_id": model.tokenizer.eos_id, "pad_id": model.tokenizer.pad_id, "mask_id": MASK}
    run = functools.partial(diffusion.generate, model.language_model, sampling=Sampling(max_tokens=6, temperature=0.0))
    prompts = Prompts(jnp.array([model.tokenizer.encode("12")]), jnp.array([2]))
    found = jax.jit(functools.partial(run, **ids))(model.params, prompts, jax.random.key(0))
    assert model.tokenizer.decode(found.tokens[0, 2:].tolist()) in written


def test_a_folder_without_a_mask_token_does_not_write(tmp_path):
    model = load_pretrained(folder_of(tmp_path / "first"))
    save_pretrained(model._replace(mask_id=None), tmp_path / "again")
    sampling = Sampling(max_tokens=4)
    with pytest.raises(ValueError, match="sees tokens on both sides and names no mask token"):
        talk.open_run(str(tmp_path / "again"), sampling=sampling)
    again, problems = load_pretrained(tmp_path / "again"), [{"prompt": "12"}]
    with pytest.raises(ValueError, match="sees tokens on both sides and names no mask token"):
        evaluation.complete(again, problems, sampling=sampling)
    with pytest.raises(ValueError, match="this one fills in masks"):
        evaluation.complete(model, problems, sampling=sampling, tools=[tools.calculator])
    assert len(evaluation.complete(model, problems, sampling=sampling).texts) == 1


def test_the_published_size():
    """8.02 billion parameters, 6.98 without the two tables of tokens, as in the paper's table of architectures."""
    sizes: dict[str, Any] = {"d_model": 4096, "n_layers": 32, "mlp_hidden_size": 12288, "max_sequence_length": 4096}
    sizes |= dict.fromkeys(("n_heads", "n_kv_heads"), 32) | dict.fromkeys(("vocab_size", "embedding_size"), 126464)
    config = from_hugging_face(said() | sizes)
    assert config == presets.llada_8b()
    assert from_hugging_face(to_hugging_face(config)) == config
    found = networks.find("llada-8b")
    assert found.family == "decoder" and found.parameters == 8_015_581_184
    assert found.parameters - 2 * config.vocab_size * config.width == 6_979_588_096
    assert f"{found.parameters:,}" in (presets.llada_8b.__doc__ or "")


def test_fields_that_a_file_may_leave_out_are_those_of_the_class():
    config = from_hugging_face(said())
    assert (config.kv_heads, config.ffn, config.causal, config.vocab_size) == (2, 48, False, 64)
    single = said(n_kv_heads=None, multi_query_attention=True, mlp_hidden_size=None, mlp_ratio=3)
    assert (from_hugging_face(single).kv_heads, from_hugging_face(single).ffn) == (1, 96)
    assert from_hugging_face(said(n_kv_heads=None)).kv_heads == 4
    assert from_hugging_face(said(n_kv_heads=4, multi_query_attention=False)).kv_heads == 4
    assert from_hugging_face(said(embedding_size=None)).vocab_size == 64
    bare = {name: value for name, value in said().items() if name not in ("rope_theta", "max_sequence_length")}
    assert (from_hugging_face(bare).rope_base, from_hugging_face(bare).max_length) == (1e4, 1024)
    assert from_hugging_face({k: v for k, v in said().items() if k != "weight_tying"}).tie_embeddings
    assert from_hugging_face(said(bias_for_layer_norm=None, include_qkv_bias=None)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential', expected 'llama'"),
        ({"activation_type": "swiglu"}, "activation_type is 'swiglu', expected 'silu'"),
        ({"layer_norm_type": "gemma_rms"}, "layer_norm_type is 'gemma_rms', expected 'rms'"),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine is False, expected True"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm is True, expected False"),
        ({"attention_layer_norm": True}, "attention_layer_norm is True, expected False"),
        ({"input_emb_norm": True}, "input_emb_norm is True, expected False"),
        ({"include_bias": True, "include_qkv_bias": True}, "include_bias is True.*; include_qkv_bias is True"),
        ({"rope": False, "alibi": True}, "rope is False, expected True; alibi is True, expected False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is .'type': 'yarn'., expected None"),
        ({"scale_logits": True}, "scale_logits is True, expected False"),
        ({"block_group_size": 2}, "block_group_size is 2, expected 1"),
        ({"multi_query_attention": True}, "n_kv_heads is 2 and multi_query_attention True, expected one"),
        ({"multi_query_attention": False}, "n_kv_heads is 2 and multi_query_attention False, expected one"),
        ({"embedding_size": 32}, "embedding_size is 32, expected at least vocab_size 64"),
        ({"num_experts": 64}, "num_experts is 64: LLaDA-MoE is another network"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .gptq"),
    ],
)
def test_what_is_not_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face(said(**change))


def test_fields_that_are_not_there_are_refused_where_the_class_takes_another():
    lacking = {name: value for name, value in said().items() if name not in ("rope", "block_type")}
    with pytest.raises(ValueError, match="block_type is 'sequential' where the file lacks it, .* rope is False where"):
        from_hugging_face(lacking)


def test_a_checkpoint_that_does_not_fit_names_every_problem():
    own = tensors()
    own["model.transformer.blocks.0.ff_proj.weight"] = own["model.transformer.blocks.0.ff_proj.weight"].T
    del own["model.transformer.ln_f.weight"]
    own["model.transformer.blocks.1.q_proj.bias"] = np.zeros(32)
    with pytest.raises(ValueError) as error:
        from_checkpoint(load()[0], own)
    for message in (
        "missing model.transformer.ln_f.weight",
        "unused model.transformer.blocks.1.q_proj.bias",
        "model.transformer.blocks.0.ff_proj.weight has shape (32, 48), expected (48, 32)",
    ):
        assert message in str(error.value)
    tied, params = load("tied")
    repeated = from_checkpoint(tied, tensors())  # as transformers may write it
    jax.tree.map(np.testing.assert_array_equal, repeated, params)


def test_a_llada_is_known_by_its_choices():
    config, params = load()
    assert from_hugging_face(to_hugging_face(dataclasses.replace(config, head_dim=8))) == config
    changes = ({"head_dim": 12}, {"qkv_bias": True}, {"qk_norm": True}, {"window": 4}, {"positions": "learned"})
    for change in changes:
        with pytest.raises(ValueError, match="the network is no LLaDA: expected the choices of presets.llada_8b"):
            to_checkpoint(dataclasses.replace(config, **change), params)
    assert to_hugging_face(dataclasses.replace(config, causal=True))["model_type"] == "llama"
