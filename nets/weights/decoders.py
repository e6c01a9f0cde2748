"""Checkpoints of decoders whatever their names: those of GPT-2, MiniMax and LLaDA are their own, others in `names`."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.weights import configs, gpt2, llada, minimax, names

OWN = {"gpt2": gpt2, "minimax": minimax, "llada": llada}


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a Hugging Face `config.json` describes; see `configs.from_hugging_face`."""
    return OWN.get(config.get("model_type", ""), configs).from_hugging_face(config, **changes)


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a network; see `configs.to_hugging_face`."""
    return (_own(config) or configs).to_hugging_face(config)


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors; see `names.from_checkpoint`."""
    return (_own(config) or names).from_checkpoint(config, tensors)


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array, layers unstacked."""
    return (_own(config) or names).to_checkpoint(config, params)


def _own(config: TransformerConfig) -> ModuleType | None:
    """The module of an architecture with names of its own, None for all others."""
    if not config.causal:
        return llada
    if config.positions == "learned":
        return gpt2
    return minimax if config.linear and config.linear.decay == "lightning" and config.experts else None
