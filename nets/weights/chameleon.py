"""Chameleon's checkpoints: the decoder has the names of Llama, the picture tokeniser its own."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.vision.vq import VQ, VQConfig
from jaxrl.nets.weights import maps, names
from jaxrl.nets.weights.maps import Place

VQ_PREFIX = "model.vqmodel."
CONV = (2, 3, 1, 0)


def vq_names(config: VQConfig) -> dict[str, Place]:
    """The map of the tokeniser's encoder; transformers' checkpoints have no decoder."""
    found = {"quantize.embedding.weight": Place("codebook")}
    for theirs, ours in _layers(config):
        norm = ours.rpartition("/")[2].startswith("norm")
        found[f"{theirs}.weight"] = Place(f"{ours}/scale") if norm else Place(f"{ours}/kernel", axes=CONV)
        found[f"{theirs}.bias"] = Place(f"{ours}/bias")
    return {VQ_PREFIX + name: place for name, place in found.items()}


def _layers(config: VQConfig) -> Iterator[tuple[str, str]]:
    """Pairs of their and our convolutions and norms."""
    yield from ((f"encoder.{name}", f"encoder/{name}") for name in ("conv_in", "norm_out", "conv_out"))
    yield "quant_conv", "quant"
    blocks = {f"mid.block_{n + 1}": f"middle/block_{n}" for n in range(2)}
    before = 1
    for level, times in enumerate(config.multipliers):
        for block in range(config.blocks):
            theirs, ours = f"down.{level}.block.{block}", f"down_{level}_block_{block}"
            blocks[theirs] = ours
            if block == 0 and times != before:
                yield f"encoder.{theirs}.nin_shortcut", f"encoder/{ours}/shortcut"
        before = times
        if level + 1 < len(config.multipliers):
            yield f"encoder.down.{level}.downsample.conv", f"encoder/down_{level}"
    for theirs, ours in blocks.items():
        yield from ((f"encoder.{theirs}.{p}", f"encoder/{ours}/{p}") for p in ("norm1", "conv1", "norm2", "conv2"))
    for theirs, ours in {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}.items():
        yield f"encoder.mid.attn_1.{theirs}", f"encoder/middle/attention/{ours}"


def from_checkpoint(
    config: TransformerConfig, vq: VQConfig, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The decoder's parameters, and those of `VQ` that `encode` needs.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor of either, in one message.
    """
    pictures = {name: tensor for name, tensor in tensors.items() if name.startswith(VQ_PREFIX)}
    text = {name: tensor for name, tensor in tensors.items() if name not in pictures}
    shapes = maps.shapes(VQ(vq), np.zeros((1, vq.size, vq.size, 3), np.float32), method="encode")
    encoder = maps.from_checkpoint(
        vq_names(vq), shapes, pictures, ignored=("post_quant_conv.weight", "post_quant_conv.bias")
    )
    return names.from_checkpoint(config, text), encoder
