"""Adapters against PEFT, through the values that tests/golden/make_peft.py stored, and PEFT's files in and out."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets import adapters
from jaxrl.nets.adapters.peft import CONFIG, WEIGHTS
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.weights import from_checkpoint, from_hugging_face

GOLDEN = Path(__file__).parents[1] / "golden"
LOW_RANK = ["lora", "rslora", "dora"]


@pytest.fixture(scope="module")
def base():
    """(config, model, params) of the tiny Llama that the adapters were made for."""
    with np.load(GOLDEN / "llama.npz") as arrays:
        weights = {k.removeprefix("weight/"): arrays[k] for k in arrays if k.startswith("weight/")}
        config = from_hugging_face(json.loads(str(arrays["plain/config"])), max_length=64)
    return config, language_model(config), jax.tree.map(jnp.asarray, from_checkpoint(config, weights))


@pytest.fixture(scope="module")
def stored():
    with np.load(GOLDEN / "peft.npz") as arrays:
        return {name: arrays[name] for name in arrays}


def case(stored, name):
    """(adapter_config, tensors) of a case."""
    start = f"{name}/tensor/"
    tensors = {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
    return json.loads(str(stored[f"{name}/config"])), tensors


def compare(base, stored, name, adapter, params, atol=2e-5):
    _, model, tree = base

    def forward(tree, params, ids):
        adapted = adapters.adapt(model, tree, adapter)
        return logits(adapted.apply(params, ids)[0], adapted.unembedding(params))

    got = jax.jit(forward)(tree, params, jnp.asarray(stored["ids"]))
    np.testing.assert_allclose(got, stored[f"{name}/logits"], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", LOW_RANK)
def test_logits_of_low_rank_adapters(base, stored, name):
    lora, params = adapters.from_peft(base[0], *case(stored, name))
    assert lora.magnitude == (name == "dora") and lora.scaling == ("standard", "rank_stabilised")[name == "rslora"]
    compare(base, stored, name, adapters.lora(lora), params)


def linear(tensors, name):
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def test_logits_of_prompts(base, stored):
    _, tensors = case(stored, "prompt")
    adapter = adapters.prompt(adapters.PromptConfig(length=5))
    compare(base, stored, "prompt", adapter, {"embedding": tensors["embedding.weight"]})

    _, tensors = case(stored, "mlp")
    mlp = {str(n): linear(tensors, f"mlp_head.{2 * n}") for n in range(3)}
    params = {"embedding": tensors["embedding.weight"], "encoder": {"mlp": mlp}}
    compare(base, stored, "mlp", adapters.prompt(adapters.PromptConfig(length=5, encoder="mlp", hidden=6)), params)

    _, tensors = case(stored, "lstm")
    cell = lambda name: {
        "input": tensors[f"lstm_head.weight_ih_{name}"].T,
        "memory": tensors[f"lstm_head.weight_hh_{name}"].T,
        "bias": tensors[f"lstm_head.bias_ih_{name}"] + tensors[f"lstm_head.bias_hh_{name}"],
    }
    sides = lambda n: {"forward": cell(f"l{n}"), "backward": cell(f"l{n}_reverse")}
    mlp = {str(n): linear(tensors, f"mlp_head.{2 * n}") for n in range(2)}
    encoder = {"lstm": {"0": sides(0), "1": sides(1)}, "mlp": mlp}
    params = {"embedding": tensors["embedding.weight"], "encoder": encoder}
    compare(base, stored, "lstm", adapters.prompt(adapters.PromptConfig(length=5, encoder="lstm", hidden=6)), params)


def test_logits_of_prefixes(base, stored):
    config, model, tree = base
    _, tensors = case(stored, "prefix")
    made = tensors["embedding.weight"].reshape(5, config.layers, 2, config.kv_heads, config.head_size)
    params = {"k": jnp.asarray(made[:, :, 0].swapaxes(0, 1)), "v": jnp.asarray(made[:, :, 1].swapaxes(0, 1))}
    compare(base, stored, "prefix", adapters.prefix(adapters.PrefixConfig(length=5)), params)

    _, tensors = case(stored, "prefix_mlp")
    mlp = {str(n): linear(tensors, f"transform.{2 * n}") for n in range(2)}
    params = {"embedding": jnp.asarray(tensors["embedding.weight"]), "encoder": {"mlp": mlp}}
    compare(base, stored, "prefix_mlp", adapters.prefix(adapters.PrefixConfig(length=5, hidden=6)), params)
    bare = adapters.without_network(model, params)
    compare(base, stored, "prefix_mlp", adapters.prefix(adapters.PrefixConfig(length=5)), bare)


@pytest.mark.parametrize("name", LOW_RANK)
def test_what_is_written_is_what_peft_wrote(base, stored, name, tmp_path):
    described, tensors = case(stored, name)
    config, params = adapters.from_peft(base[0], described, tensors)
    folder = adapters.save_peft(tmp_path / "adapter", config, params, base_model="somewhere/base")
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS])
    written = json.loads((folder / CONFIG).read_text())
    assert written["base_model_name_or_path"] == "somewhere/base"
    for field in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "task_type", "fan_in_fan_out"):
        assert written[field] == described[field]
    assert written["target_modules"] == sorted(described["target_modules"])
    _, ours = adapters.to_peft(config, params)
    assert ours.keys() == tensors.keys()
    for tensor, value in tensors.items():
        np.testing.assert_array_equal(ours[tensor], value)
    again, back = adapters.load_peft(folder, base[0])
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


BAD = {
    "kind": (lambda d, t: d.update(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "option": (lambda d, t: d.update(bias="all"), "bias is 'all'"),
    "pattern": (lambda d, t: d.update(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "module": (lambda d, t: d.update(target_modules=["lm_head"]), "target_modules has lm_head"),
    "missing": (
        lambda d, t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        "missing .*q_proj",
    ),
    "unused": (lambda d, t: t.update(other=np.zeros(2)), "unused other"),
    "shape": (lambda d, t: d.update(r=2), r"lora_A.weight has shape \(3, 32\), expected \(2, 32\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_adapters_are_refused(base, stored, change, message):
    described, tensors = case(stored, "lora")
    change(described, tensors)
    with pytest.raises(ValueError, match=message):
        adapters.from_peft(base[0], described, tensors)


def test_bad_folders_are_refused(base, stored, tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        adapters.load_peft(tmp_path, base[0])
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        adapters.load_peft(tmp_path, base[0])
    config, params = adapters.from_peft(base[0], *case(stored, "lora"))
    with pytest.raises(ValueError, match="holds something already"):
        adapters.save_peft(tmp_path, config, params)
