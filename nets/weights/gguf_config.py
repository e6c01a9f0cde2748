"""The network that a GGUF file's metadata describe."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.rope import LinearScaling, Llama3Scaling, RopeScaling, Yarn, frequencies

GGUF_TYPES = ("llama", "qwen2", "qwen3")


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
