"""LLaDA as its authors' class describes and stores it, and our Transformer: a Llama whose tokens all see each other.

Nie et al. 2025, arXiv:2502.09992. It fills in masks, so what samples and trains is `jaxrl.diffusion`. The mask token is
an argument there, and the folder's config.json names it:

    model = load_pretrained(folder, dtype="bfloat16")  # of jaxrl.pretrained
    rollout = diffusion.generate(
        model.language_model, model.params, prompts, key, sampling=Sampling(max_tokens=128, temperature=0.0),
        unmasking=diffusion.Unmasking(block=32), mask_id=model.mask_id, eos_id=model.tokenizer.eos_id,
        pad_id=model.tokenizer.pad_id,
    )

`infill`, `log_likelihood`, `loss` and the other functions of `jaxrl.diffusion` take the same `mask_id`. Ours never draw
the mask token, the authors' sampler may.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.weights import configs, maps
from jaxrl.nets.weights import names as decoders
from jaxrl.nets.weights.maps import Place

BUILT: dict[str, tuple[Any, Any]] = {
    "block_type": ("sequential", "llama"),
    "activation_type": ("swiglu", "silu"),
    "layer_norm_type": ("default", "rms"),
    "layer_norm_with_affine": (True, True),
    "bias_for_layer_norm": (False, False),
    "attention_layer_norm": (False, False),
    "input_emb_norm": (False, False),
    "include_bias": (False, False),
    "include_qkv_bias": (False, False),
    "rope": (False, True),
    "rope_scaling": (None, None),
    "alibi": (False, False),
    "scale_logits": (False, False),
    "block_group_size": (1, 1),
}
"""Field of a config.json -> what the authors' class takes where the file lacks it, and what is built here."""
FREE = ("dtype", "param_dtype", "cache_dtype", "remat", "attention", "unroll", "decode_unroll")
"""Fields of a config of which the architecture says nothing."""
MODEL = {  # its names -> a Llama's
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
LAYER = {  # "model.transformer.blocks.{i}." + name -> "model.layers.{i}." + name
    "attn_norm.weight": "input_layernorm.weight",
    "q_proj.weight": "self_attn.q_proj.weight",
    "k_proj.weight": "self_attn.k_proj.weight",
    "v_proj.weight": "self_attn.v_proj.weight",
    "attn_out.weight": "self_attn.o_proj.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "ff_proj.weight": "mlp.gate_proj.weight",
    "up_proj.weight": "mlp.up_proj.weight",
    "ff_out.weight": "mlp.down_proj.weight",
}


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a `config.json` of model type llada describes.

    Args:
      config: the parsed file. What it lacks is what the authors' class takes then. `embedding_size` is how many rows
        there are, those of ids that no token has included.
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: choices that are not built here, all in one message: another block, norm or activation, biases, ALiBi,
        norms of queries and keys, heads of keys that two fields count differently, LLaDA-MoE; quantised weights.
    """
    of, none = config.get, lambda value: value or None
    if "num_experts" in config:
        raise ValueError(f"num_experts is {config['num_experts']}: LLaDA-MoE is another network, not built here")
    wrong = [
        f"{key} is {of(key, unsaid)!r}{'' if key in config else ' where the file lacks it'}, expected {built!r}"
        for key, (unsaid, built) in {"model_type": (None, "llada"), **BUILT}.items()
        if none(of(key, unsaid)) != none(built)
    ]
    heads, kv_heads, single = config["n_heads"], of("n_kv_heads"), of("multi_query_attention")
    by_flag = None if single is None else 1 if single else heads
    if None not in (kv_heads, by_flag) and kv_heads != by_flag:
        wrong.append(f"n_kv_heads is {kv_heads} and multi_query_attention {single}, expected one of the two to be null")
    rows = of("embedding_size") or config["vocab_size"]
    if rows < config["vocab_size"]:
        wrong.append(f"embedding_size is {rows}, expected at least vocab_size {config['vocab_size']}")
    if wrong:
        raise ValueError("; ".join(wrong))
    plain = {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or by_flag,
        "intermediate_size": of("mlp_hidden_size") or of("mlp_ratio", 4) * config["d_model"],
        "max_position_embeddings": of("max_sequence_length", 1024),
        "rms_norm_eps": of("rms_norm_eps", 1e-5),
        "rope_theta": of("rope_theta", 1e4),
        "tie_word_embeddings": of("weight_tying", True),
        "quantization_config": of("quantization_config"),
    }
    return configs.from_hugging_face(plain, **({"causal": False} | changes))


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a LLaDA: plain JSON without the ids of special tokens.

    transformers opens such a folder with the authors' configuration_llada.py and modeling_llada.py in it, and
    trust_remote_code.

    Raises:
      ValueError: a network with choices that are not LLaDA's.
    """
    c = config
    found = {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        **{key: built for key, (_, built) in BUILT.items()},
        "d_model": c.width,
        "n_layers": c.layers,
        "n_heads": c.heads,
        "n_kv_heads": c.kv_heads,
        "mlp_hidden_size": c.ffn,
        "vocab_size": c.vocab_size,
        "embedding_size": c.vocab_size,
        "max_sequence_length": c.max_length,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "rope_full_precision": True,
        "weight_tying": c.tie_embeddings,
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0),
        "flash_attention": False,
        "use_cache": False,
    }
    again = from_hugging_face(found, **{name: getattr(c, name) for name in FREE})
    if again.head_size == c.head_size and replace(again, head_dim=c.head_dim) == c:
        return found
    raise ValueError(f"the network is no LLaDA: expected the choices of presets.llada_8b, got {c}")


def names(config: TransformerConfig) -> dict[str, Place]:
    """The map of a LLaDA: a Llama's places under its own names."""
    to_hugging_face(config)  # refuses what is no LLaDA
    each = {
        f"model.transformer.blocks.{i}.{theirs}": f"model.layers.{i}.{name}"
        for i in range(config.layers)
        for theirs, name in LAYER.items()
    }
    llama = decoders.names(replace(config, causal=True))
    return {theirs: llama[name] for theirs, name in (MODEL | each).items() if name in llama}


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors; see `names.from_checkpoint`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    ignored = ("model.transformer.ff_out.weight",) if config.tie_embeddings else ()
    known = names(config), decoders.shapes(config)
    return maps.from_checkpoint(*known, tensors, ignored=ignored, param_dtype=config.param_dtype)


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array, layers unstacked. Also maps gradients."""
    known = names(config)
    maps.check_total(known, decoders.shapes(config))
    return maps.to_checkpoint(known, params)
