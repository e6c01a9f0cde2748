"""Published `config.json` files of the Llama family as a TransformerConfig."""

from collections.abc import Mapping
from typing import Any

from jaxrl.nets.rope import DynamicNTK, LinearScaling, Llama3Scaling, RopeScaling, Yarn
from jaxrl.nets.transformer import TransformerConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a Hugging Face `config.json` describes.

    Args:
      config: the parsed file, old (`rope_scaling`, `rope_theta`) or new (`rope_parameters`).
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: an architecture, activation or rope type that is not supported.
    """
    kind = config["model_type"]
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(MODEL_TYPES)}")
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
