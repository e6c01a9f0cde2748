"""Checkpoints of GPT-2 as Hugging Face has them, and our Transformer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.encoder_presets import gpt2
from jaxrl.nets.weights import maps
from jaxrl.nets.weights.maps import Place, norm
from jaxrl.nets.weights.names import shapes

IGNORED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")  # the embeddings again; causal masks as tables


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that GPT-2's `config.json` describes; `changes` are fields of TransformerConfig.

    Raises:
      ValueError: another model type, or a choice that GPT-2's published sizes do not make.
    """
    wanted = {
        "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
        "add_cross_attention": (False,), "quantization_config": (None,),
    }  # fmt: skip
    wrong = [f"{k} is {config[k]!r}, expected {v[0]!r}" for k, v in wanted.items() if config.get(k, v[0]) not in v]
    if wrong or "model_type" not in config:
        raise ValueError("; ".join(wrong) or "no model_type, expected 'gpt2'")
    sizes = (config["n_embd"], config["n_layer"], config["n_head"])
    own = {"max_length": config["n_positions"], "norm_eps": config["layer_norm_epsilon"]}
    own["ffn"] = config.get("n_inner") or 4 * config["n_embd"]
    return gpt2(*sizes, vocab_size=config["vocab_size"], **(own | changes))


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a GPT-2: plain JSON without the ids of special tokens.

    Raises:
      ValueError: a network with choices that are not GPT-2's.
    """
    c = config
    sizes = {
        "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.ffn, "n_positions": c.max_length,
        "vocab_size": c.vocab_size, "layer_norm_epsilon": c.norm_eps,
    }  # fmt: skip
    found = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", **sizes}
    runs = ("dtype", "param_dtype", "cache_dtype", "remat", "attention", "unroll", "decode_unroll")
    if from_hugging_face(found, **{name: getattr(c, name) for name in runs}) != c:
        raise ValueError(f"the network is no GPT-2: expected the choices of jaxrl.nets.encoder_presets.gpt2, got {c}")
    return found


def names(config: TransformerConfig) -> dict[str, Place | tuple[Place, ...]]:
    """The map of a GPT-2. Its matrices are stored [in, out], as ours are; q, k and v in one, side by side."""
    d = config.width
    linear = lambda theirs, ours, i: {
        f"{theirs}.weight": Place(f"{ours}/kernel", (i,)),
        f"{theirs}.bias": Place(f"{ours}/bias", (i,)),
    }
    found: dict[str, Place | tuple[Place, ...]] = {
        "transformer.wte.weight": Place("embed/embedding"),
        "transformer.wpe.weight": Place("position_embed/embedding"),
        **norm("transformer.ln_f", "norm"),
    }
    for i in range(config.layers):
        at = f"transformer.h.{i}"
        parts = [(f"layers/attention/{part}", (j * d, (j + 1) * d)) for j, part in enumerate("qkv")]
        found[f"{at}.attn.c_attn.weight"] = tuple(Place(f"{path}/kernel", (i,), None, rows, 1) for path, rows in parts)
        found[f"{at}.attn.c_attn.bias"] = tuple(Place(f"{path}/bias", (i,), None, rows) for path, rows in parts)
        found |= linear(f"{at}.attn.c_proj", "layers/attention/o", i)
        found |= linear(f"{at}.mlp.c_fc", "layers/ffn/up", i) | linear(f"{at}.mlp.c_proj", "layers/ffn/down", i)
        found |= norm(f"{at}.ln_1", "layers/attention_norm", (i,)) | norm(f"{at}.ln_2", "layers/ffn_norm", (i,))
    return found


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors, with or without the prefix "transformer." (OpenAI's release).

    Returns:
      The nested dict of `jaxrl.nets.transformer.Transformer`, numpy arrays in `config.param_dtype`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    prefixed = lambda name: name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
    tensors = {prefixed(name): tensor for name, tensor in tensors.items()}
    ours = shapes(config)
    return maps.from_checkpoint(names(config), ours, tensors, ignored=IGNORED, param_dtype=config.param_dtype)


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array. Also maps gradients."""
    known = names(config)
    maps.check_total(known, shapes(config))
    return maps.to_checkpoint(known, params)
