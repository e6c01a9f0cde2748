"""Published configurations of decoders, `config.json`, and our TransformerConfig."""

import math
from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.rope import DynamicNTK, LinearScaling, Llama3Scaling, RopeScaling, Yarn

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "chameleon": "ChameleonForConditionalGeneration",
}
OF_ENCODERS = (
    *("causal", "positions", "rotary_dim", "rope_sections", "norm", "norm_place", "gated", "activation", "bias"),
    *("embed_width", "embed_norm", "token_types", "share_layers", "unembed_bias"),
    *("linear", "linear_layers", "rectified", "residual", "pattern"),
)
"""Choices in which the decoders of `CLASSES` do not differ."""


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a Hugging Face `config.json` describes.

    Args:
      config: the parsed file, old (`rope_scaling`, `rope_theta`) or new (`rope_parameters`).
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: an architecture, activation, rope type or quantisation that is not supported; heads of which a part
        turns, unless `changes` say which `rotary_dim` is meant.
    """
    kind = config.get("model_type")
    if kind not in CLASSES:
        known = (*CLASSES, "gpt2", "minimax", "llada", "bd3lm", "mdlm")
        raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(known)}")
    quantised = config.get("quantization_config") or {}
    blocks = quantised.get("quant_method") == "fp8" and quantised.get("weight_block_size") == [128, 128]
    if quantised and not blocks:  # FP8 in blocks is turned into floats where it is read
        method = quantised.get("quant_method", "an unnamed method")
        raise ValueError(
            f"the weights are quantised ({method}); expected plain floats, FP8 in blocks of 128 x 128, or a GGUF file"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, expected 'silu': the layers are SwiGLU")
    if kind not in ("qwen2", "qwen2_moe") and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ValueError("attention_bias and mlp_bias are set, but only Qwen2's biases on q, k and v exist here")
    if "rotary_dim" not in changes and (turned := rotary_dim(config)) is not None:
        raise ValueError(
            f"{turned} numbers of a head turn (rotary_dim or partial_rotary_factor), but in transformers' "
            f"{CLASSES[kind]} all do: give rotary_dim=None for that network"
        )
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
        "qkv_bias": config.get("qkv_bias", True) if kind == "qwen2_moe" else kind == "qwen2",
        "qk_norm": "heads" if kind == "chameleon" else kind in ("qwen3", "qwen3_moe"),
        "norm_place": "branch" if config.get("swin_norm") else "pre",
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "experts": _experts(config),
        **_window(config),
    }
    if kind.startswith("deepseek"):
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        latent = LatentConfig(*(config[name] for name in sizes), q_rank=config.get("q_lora_rank"))
        fields |= {"latent": latent, "kv_heads": fields["heads"], "head_dim": None}
        fields["head_dim"] = None if config["hidden_size"] % fields["heads"] == 0 else latent.nope + latent.rope
    return TransformerConfig(**(fields | changes))


def rotary_dim(config: Mapping[str, Any]) -> int | None:
    """How many numbers of a head turn by `rotary_dim` or `partial_rotary_factor` of a `config.json`; None: all.

    Raises:
      ValueError: fields that say different numbers.
    """
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    parts = (config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {})
    factors = [part["partial_rotary_factor"] for part in parts if part.get("partial_rotary_factor") is not None]
    said = {int(size * factor) for factor in factors}
    if config.get("rotary_dim") is not None:
        said.add(config["rotary_dim"])
    if len(said) > 1:
        raise ValueError(
            f"rotary_dim is {config.get('rotary_dim')} and partial_rotary_factor {factors}: {sorted(said)} of {size} "
            "numbers of a head turn, expected one of these; take the wrong field out"
        )
    return None if said <= {size} else said.pop()


def _experts(config: Mapping[str, Any]) -> MoEConfig | None:
    """The mixture of experts that a `config.json` describes, None for a dense network.

    Losses that balance have the published coefficients where the file has one (transformers' `router_aux_loss_coef` is
    of a loss that is top_k at balance, ours is 1 there); DeepSeek's files leave theirs out.
    """
    kind, of = config["model_type"], config.get
    if kind not in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        return None
    sparse = of("mlp_only_layers") or of("decoder_sparse_step", 1) != 1 or of("moe_layer_freq", 1) != 1
    if sparse:
        raise ValueError("mlp_only_layers, decoder_sparse_step or moe_layer_freq mix dense layers in; expected none")
    if kind == "mixtral":
        k = config["num_experts_per_tok"]
        aux = of("router_aux_loss_coef", 0.0) * k
        return MoEConfig(config["num_local_experts"], k, config["intermediate_size"], normalise=True, aux_coef=aux)
    k, ffn = config["num_experts_per_tok"], config["moe_intermediate_size"]
    normalise = bool(of("norm_topk_prob", False))
    if kind.startswith("qwen"):
        shared = config["shared_expert_intermediate_size"] if kind == "qwen2_moe" else 0
        aux = of("router_aux_loss_coef", 0.0) * k
        options: dict[str, Any] = {"shared": shared, "shared_gate": shared > 0, "aux_coef": aux}
        return MoEConfig(of("num_experts") or config["num_local_experts"], k, ffn, normalise=normalise, **options)
    third = kind == "deepseek_v3"
    grouped = third or of("topk_method", "greedy") == "group_limited_greedy"
    options = {
        "shared": ffn * (of("n_shared_experts") or 0),
        "first_dense": of("first_k_dense_replace", 0),
        "score": "sigmoid" if third else "softmax",
        "normalise": normalise if third else False,  # transformers' DeepSeek-V2 never does
        "scale": float(of("routed_scaling_factor", 1.0)),
        "groups": of("n_group") or 1 if grouped else 1,
        "top_groups": of("topk_group") or 1 if grouped else 1,
        "group_score": 2 if third else 1,
        "bias": third,
    }
    return MoEConfig(config["n_routed_experts"], k, ffn, **options)


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
            if rope.get("mscale") and rope.get("mscale_all_dim"):
                of = lambda name: 0.1 * rope[name] * math.log(rope["factor"]) + 1.0
                options["attention_factor"] = options["attention_factor"] or of("mscale") / of("mscale_all_dim")
            scores = rope.get("mscale_all_dim") or 0.0 if config["model_type"].startswith("deepseek") else 0.0
            return base, Yarn(rope["factor"], original, **options, mscale_all_dim=scores)
        case other:
            raise ValueError(f"rope type is {other!r}, expected default, linear, dynamic, llama3 or yarn")


def model_type(config: TransformerConfig) -> str:
    """The published decoder architecture, one of `CLASSES`, that a network is of.

    Raises:
      ValueError: a combination of choices that no published architecture has.
    """
    c = config
    plain = TransformerConfig(c.vocab_size, c.width, c.layers, c.heads, c.kv_heads, c.ffn, head_dim=c.head_dim)
    if c.qk_norm == "heads":
        plain = replace(plain, norm_place=c.norm_place)
    own = [name for name in OF_ENCODERS if getattr(c, name) != getattr(plain, name)]
    if own:
        raise ValueError(f"{', '.join(own)} differ from a Llama's, and no published decoder of {list(CLASSES)} is so")
    if c.qkv_bias and c.qk_norm:
        raise ValueError("qkv_bias and qk_norm are both set; Qwen2 has the one, Qwen3 the other, no architecture both")
    if c.latent or (c.experts and c.experts.bias):
        if not (c.latent and c.experts):
            raise ValueError("latent attention and a router's bias are DeepSeek's: both, with experts, or neither")
        return "deepseek_v3" if c.experts.bias else "deepseek_v2"
    if c.experts and (c.experts.noisy or not c.experts.gated or c.experts.activation != "silu"):
        raise ValueError("experts are not SwiGLU layers, or their gating is noisy, and no published decoder is so")
    if c.experts:
        return "qwen2_moe" if c.qkv_bias else "qwen3_moe" if c.qk_norm else "mixtral"
    if c.qk_norm == "heads":
        return "chameleon"
    kind = "qwen2" if c.qkv_bias else "qwen3" if c.qk_norm else "mistral" if c.window else "llama"
    if kind == "mistral" and c.window_layers is not None:
        raise ValueError(
            f"window_layers is {c.window_layers}, and without qkv_bias or qk_norm that is no published "
            "architecture: Mistral's window is on all layers"
        )
    return kind


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a network, which `from_hugging_face` and transformers read.

    Returns:
      Plain JSON, without the ids of special tokens and the storage type.

    Raises:
      ValueError: a combination of choices that no published architecture has.
    """
    kind = model_type(config)
    if kind == "chameleon":
        raise ValueError("a Chameleon folder needs its picture tokeniser and vocabulary too; keep the run folder")
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
    if kind not in ("mistral", "mixtral", "qwen2", "qwen2_moe"):
        published["attention_bias"] = False
    if config.latent:
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        published |= dict(zip(sizes, astuple(config.latent), strict=False))
        published["head_dim"] = config.latent.rope  # as transformers means it there
    if config.experts:
        published |= _published_experts(kind, config.experts)
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


def _published_experts(kind: str, experts: MoEConfig) -> dict[str, Any]:
    c = experts
    found: dict[str, Any] = {"num_experts_per_tok": c.top_k, "router_aux_loss_coef": c.aux_coef / c.top_k}
    if kind == "mixtral":
        return found | {"num_local_experts": c.experts, "intermediate_size": c.ffn}
    found |= {"moe_intermediate_size": c.ffn, "norm_topk_prob": c.normalise}
    if kind.startswith("qwen"):
        shared = {"shared_expert_intermediate_size": c.shared} if kind == "qwen2_moe" else {}
        return found | {"num_experts": c.experts, "decoder_sparse_step": 1, "mlp_only_layers": [], **shared}
    found |= {"scoring_func": c.score, "topk_method": "group_limited_greedy" if kind == "deepseek_v2" else "noaux_tc"}
    return found | {
        "n_routed_experts": c.experts,
        "n_shared_experts": c.shared // c.ffn,
        "first_k_dense_replace": c.first_dense,
        "routed_scaling_factor": c.scale,
        "n_group": c.groups,
        "topk_group": c.top_groups,
    }


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
        case Yarn(factor, original, fast, slow, attention, truncate, mscale):
            options = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
            options |= {} if attention is None else {"attention_factor": attention}
            options |= {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **options}
