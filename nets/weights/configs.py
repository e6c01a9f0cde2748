"""Published configurations of the Llama family, `config.json` or GGUF metadata, and our TransformerConfig."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.nets.rope import DynamicNTK, LinearScaling, Llama3Scaling, RopeScaling, Yarn, frequencies
from jaxrl.nets.transformer import TransformerConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_TYPES = ("llama", "qwen2", "qwen3")
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a Hugging Face `config.json` describes.

    Args:
      config: the parsed file, old (`rope_scaling`, `rope_theta`) or new (`rope_parameters`).
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: an architecture, activation, rope type or quantisation that is not supported.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(MODEL_TYPES)}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ValueError(f"the weights are quantised ({method}); expected plain floats, or a GGUF file")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, expected 'silu': the layers are SwiGLU")
    if kind != "qwen2" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ValueError("attention_bias and mlp_bias are set, but only Qwen2's biases on q, k and v exist here")
    base, scaling = _rope(config)
    fields = {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "ffn": config["intermediate_size"],
        "head_dim": config.get("head_dim") or None,
        "max_length": config["max_position_embeddings"],
        "rope_base": base,
        "rope_scaling": scaling,
        "norm_eps": config["rms_norm_eps"],
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_window(config),
    }
    return TransformerConfig(**(fields | changes))


def _window(config: Mapping[str, Any]) -> dict[str, Any]:
    """window and window_layers: Mistral slides in all layers, Qwen in those from `max_window_layers` on."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return {}
    layers = range(config["num_hidden_layers"])
    types = config.get("layer_types")
    if types is not None:
        chosen = tuple(i for i in layers if types[i] == "sliding_attention")
    else:
        chosen = tuple(i for i in layers if i >= config.get("max_window_layers", 0))
    if not chosen:
        return {}
    return {"window": window, "window_layers": None if len(chosen) == len(layers) else chosen}


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(base, scaling)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return base, None
        case "linear":
            return base, LinearScaling(rope["factor"])
        case "dynamic":
            return base, DynamicNTK(rope["factor"], config["max_position_embeddings"])
        case "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            return base, Llama3Scaling(rope["factor"], original, low, high)
        case "yarn":
            named = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}
            options = {k: default if rope.get(k) is None else rope[k] for k, default in named.items()}
            return base, Yarn(rope["factor"], original, **options)
        case other:
            raise ValueError(f"rope type is {other!r}, expected default, linear, dynamic, llama3 or yarn")


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a network, which `from_hugging_face` and transformers read.

    Returns:
      Plain JSON, without the ids of special tokens and the storage type.

    Raises:
      ValueError: a combination of choices that no published architecture has.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("qkv_bias and qk_norm are both set; Qwen2 has the one, Qwen3 the other, no architecture both")
    kind = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "mistral" if config.window else "llama"
    if kind == "mistral" and config.window_layers is not None:
        raise ValueError(
            f"window_layers is {config.window_layers}, and without qkv_bias or qk_norm that is no published "
            "architecture: Mistral's window is on all layers"
        )
    published = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if kind in ("llama", "qwen3"):
        published["attention_bias"] = False
    if kind == "mistral":
        published["sliding_window"] = config.window
    elif config.window is not None:
        sliding = range(config.layers) if config.window_layers is None else config.window_layers
        published |= {
            "use_sliding_window": True,
            "sliding_window": config.window,
            "max_window_layers": min(sliding),
            "layer_types": ["sliding_attention" if i in sliding else "full_attention" for i in range(config.layers)],
        }
    if isinstance(config.rope_scaling, DynamicNTK):  # there the trained length is this field
        published["max_position_embeddings"] = config.rope_scaling.original_length
    scaling = _published_scaling(config.rope_scaling)
    return published | ({"rope_scaling": scaling} if scaling else {})


def _published_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling(factor, original, low, high):
            frequency = {"low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original, **frequency}
        case Yarn(factor, original, fast, slow, attention, truncate):
            options = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
            options |= {} if attention is None else {"attention_factor": attention}
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **options}


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a GGUF file describes.

    Args:
      metadata, tensors: the two fields of `gguf.read_gguf`. The shape of the embedding gives the vocabulary, the
        absence of `lm_head.weight` ties the embeddings, `rope_freqs.weight` tells of Llama 3's scaling.
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: an architecture, expert layers, partial rotation or a rope scaling that is not supported; a missing
        key.
    """
    kind = metadata.get("general.architecture")
    if kind not in GGUF_TYPES:
        raise ValueError(f"general.architecture is {kind!r}, expected one of {', '.join(GGUF_TYPES)}")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{kind}.{key}", default)
        if found is None:
            raise ValueError(f"the GGUF metadata lack {kind}.{key}; the file is damaged or from a very old converter")
        if isinstance(found, list):
            raise ValueError(f"{kind}.{key} differs by layer ({found}), expected one number: all layers are alike")
        return found

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    if value("expert_count", 0):
        raise ValueError(f"{kind}.expert_count is {value('expert_count')}: expert layers are not supported")
    if value("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"{kind}.rope.dimension_count is {value('rope.dimension_count')}, expected all {head_dim} of a head"
        )
    base, length = float(value("rope.freq_base", 10_000.0)), value("context_length")
    embedding = tensors.get("model.embed_tokens.weight")
    window = value("attention.sliding_window", 0) if kind == "llama" else 0
    fields = {
        "vocab_size": embedding.shape[0] if embedding is not None else value("vocab_size"),
        "width": width,
        "layers": value("block_count"),
        "heads": heads,
        "kv_heads": value("attention.head_count_kv", heads),
        "ffn": value("feed_forward_length"),
        "head_dim": None if head_dim * heads == width else head_dim,
        "max_length": length,
        "rope_base": base,
        "rope_scaling": _gguf_scaling(value, tensors.get("rope_freqs.weight"), head_dim, base, length),
        "norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_embeddings": "lm_head.weight" not in tensors,
        "window": window or None,
    }
    return TransformerConfig(**(fields | changes))


def _shortest(number: float) -> float:
    """The shortest decimal that is this number in float32, in which GGUF stores it: 1e-05 for 9.99999974738e-06."""
    return float(str(np.float32(number)))


def _gguf_scaling(value, factors, head_dim: int, base: float, length: int) -> RopeScaling | None:
    if factors is not None:
        divided = np.asarray(factors)
        scaling = Llama3Scaling(float(divided.max()), 8192)
        plain, scaled = frequencies(head_dim, base=base), frequencies(head_dim, base=base, scaling=scaling)
        if divided.shape != plain.shape or not np.allclose(divided, plain / scaled, rtol=1e-4):
            raise ValueError("rope_freqs.weight is not the table of Llama 3's scaling (8192 tokens at first, 1 and 4)")
        return scaling
    match value("rope.scaling.type", "none"):
        case "none":
            return None
        case "linear":
            return LinearScaling(float(value("rope.scaling.factor")))
        case "yarn":
            return Yarn(float(value("rope.scaling.factor")), value("rope.scaling.original_context_length", length))
        case other:
            raise ValueError(f"rope.scaling.type is {other!r}, expected none, linear or yarn")
