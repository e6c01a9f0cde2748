"""Checkpoints of decoders whatever their names: GPT-2, MiniMax, LLaDA, BD3-LM have their own, others are in `names`."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.weights import configs, dit, gpt2, llada, minimax, names

OWN = {"gpt2": gpt2, "minimax": minimax, "llada": llada, **dict.fromkeys(dit.KINDS, dit)}


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a Hugging Face `config.json` describes; see `configs.from_hugging_face`."""
    return OWN.get(config.get("model_type", ""), configs).from_hugging_face(config, **changes)


def masking(config: Mapping[str, Any], words: int) -> tuple[int | None, int | None]:
    """(the mask token, tokens in a block) of a `config.json` of a network that fills in masks, None for what it lacks.

    words: how many the tokenizer has; see `dit.masking`.
    """
    if config.get("model_type") in dit.KINDS:
        return dit.masking(config, words)
    return config.get("mask_token_id"), config.get("block_size")


def with_masking(config: TransformerConfig, mask_id: int | None, block: int | None) -> dict[str, Any]:
    """The inverse of `masking`: fields of a `config.json`. LLaDA's has none for a block; `block_size` is ours there."""
    if mask_id is None:
        return {}
    blocks = {} if block is None else {"block_size": block, **({"cross_attn": True} if _own(config) is dit else {})}
    return {"mask_token_id": mask_id, **blocks}


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
        return dit if config.unembed_bias else llada
    if config.positions == "learned":
        return gpt2
    return minimax if config.linear and config.linear.decay == "lightning" and config.experts else None
