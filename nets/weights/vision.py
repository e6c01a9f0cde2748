"""Networks that classify pictures, as Hugging Face publishes them: ViT, Swin v1 and v2."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.nets.vision.swin import Swin, SwinConfig
from jaxrl.nets.vision.vit import ViT, ViTConfig
from jaxrl.nets.weights import maps, swin, vit
from jaxrl.nets.weights.maps import Place

IGNORED = (*vit.IGNORED, *swin.IGNORED)
"""Endings of tensors that files hold and these networks have no place for."""
KINDS = {"vit": vit, "swin": swin, "swinv2": swin}


def from_hugging_face(config: Mapping[str, Any], **changes) -> ViTConfig | SwinConfig:
    """The network that a `config.json` describes; see `vit.from_hugging_face` and `swin.from_hugging_face`."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind].from_hugging_face(config, **changes)


def network(config: ViTConfig | SwinConfig) -> ViT | Swin:
    """The module."""
    return ViT(config) if isinstance(config, ViTConfig) else Swin(config)


def names(config: ViTConfig | SwinConfig) -> dict[str, Place]:
    """The map of checkpoint names; those of a plain network, without classes, do not begin with its name."""
    if isinstance(config, ViTConfig):
        found, root = vit.names(config), "vit."
    else:
        found, root = swin.names(config), "swin." if config.version == 1 else "swinv2."
    return found if config.classes else {name.removeprefix(root): place for name, place in found.items()}


def shapes(config: ViTConfig | SwinConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, as init makes them."""
    size = config.image_size if isinstance(config, ViTConfig) else (config.patch * 2 ** len(config.depths),) * 2
    return maps.shapes(network(config), np.zeros((1, *size, config.channels), np.float32))


def from_checkpoint(config: ViTConfig | SwinConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors.

    Args:
      config: the network; decides which tensors must be there.
      tensors: checkpoint name -> array, or `Stored` in a file. Those whose names end as `IGNORED` are not used.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    options: dict[str, Any] = {"ignored": IGNORED, "param_dtype": config.param_dtype}
    return maps.from_checkpoint(names(config), shapes(config), tensors, **options)


def to_checkpoint(config: ViTConfig | SwinConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array. Also maps gradients."""
    known = names(config)
    maps.check_total(known, shapes(config))
    return maps.to_checkpoint(known, params)
