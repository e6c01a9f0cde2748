"""Checkpoints of decoders whatever their names: GPT-2's are its own, all others' those of `names`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.weights import configs, gpt2, names


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a Hugging Face `config.json` describes; see `configs.from_hugging_face`."""
    return (gpt2 if config.get("model_type") == "gpt2" else configs).from_hugging_face(config, **changes)


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a network; see `configs.to_hugging_face`."""
    return (gpt2 if _is_gpt2(config) else configs).to_hugging_face(config)


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors; see `names.from_checkpoint`."""
    return (gpt2 if _is_gpt2(config) else names).from_checkpoint(config, tensors)


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array, layers unstacked."""
    return (gpt2 if _is_gpt2(config) else names).to_checkpoint(config, params)


def _is_gpt2(config: TransformerConfig) -> bool:
    return config.causal and config.positions == "learned"
