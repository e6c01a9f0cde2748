"""Chameleon as Hugging Face describes and stores it, and its picture tokeniser as taming-transformers does.

The decoder has the names of Llama. The tokeniser's file that came with the paper, vqgan.ckpt, holds both of its sides;
transformers' checkpoints hold the encoder and the codebook, under the same names behind a prefix.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl.nets.chameleon import Pictures
from jaxrl.nets.chameleon import pictures as pictured
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.vision import prepare
from jaxrl.nets.vision.vq import VQ, VQConfig
from jaxrl.nets.weights import configs, maps, names
from jaxrl.nets.weights.maps import Place

VQ_PREFIX = "model.vqmodel."
CONV = (2, 3, 1, 0)
COUNTERS = ("num_batches_tracked",)
"""Integers in what taming-transformers trained the tokeniser with, beside its weights."""
BEGIN, END = "<racm3:break>", "<eoss>"
"""The tokens around a picture, by their names in the published vocabulary."""
PLACEHOLDER = "<image>"
"""What stands in a text where a picture goes."""


def from_hugging_face(config: Mapping[str, Any], **changes) -> tuple[TransformerConfig, VQConfig]:
    """The decoder and the picture tokeniser that a `config.json` of model type chameleon describes.

    Args:
      config: the parsed file.
      changes: fields of TransformerConfig to set.

    Raises:
      ValueError: another architecture, or choices that are not built here.
    """
    if config.get("model_type") != "chameleon":
        raise ValueError(f"model_type is {config.get('model_type')!r}, expected 'chameleon'")
    vq = config["vq_config"]
    wanted = {"double_latent": (False,), "attn_resolutions": (None, []), "attn_type": ("vanilla",), "in_channels": (3,)}
    wrong = [f"vq_config.{k} is {vq[k]!r}, expected {v[0]!r}" for k, v in wanted.items() if vq.get(k, v[0]) not in v]
    if wrong:
        raise ValueError("; ".join(wrong))
    tokeniser = VQConfig(
        vq["num_embeddings"], vq["embed_dim"], vq["latent_channels"], vq["resolution"], vq["base_channels"],
        tuple(vq["channel_multiplier"]), vq["num_res_blocks"],
    )  # fmt: skip
    return configs.from_hugging_face(config, **changes), tokeniser


def picture_tokens(config: Mapping[str, Any], vq: VQConfig) -> Pictures:
    """How pictures stand among the tokens, by the `vocabulary_map` of a `config.json`.

    Raises:
      ValueError: a vocabulary that lacks a code, or one of the marks `BEGIN` and `END`.
    """
    vocabulary = config.get("vocabulary_map") or {}
    if missing := [mark for mark in (BEGIN, END) if mark not in vocabulary]:
        raise ValueError(f"vocabulary_map has no {' and no '.join(missing)}, which stand around a picture")
    return pictured(vocabulary, vq, begin=vocabulary[BEGIN], end=vocabulary[END])


def preparation(said: Mapping[str, Any]) -> prepare.Preparation:
    """What a `preprocessor_config.json` says; what it leaves out is as in the published processor.

    Raises:
      ValueError: pictures that are not resized and cropped to one square.
    """
    colours = {"image_mean": (1.0,) * 3, "image_std": (1.0,) * 3, "resample": 1}
    own = ("size", "do_center_crop", "rescale_factor")
    found = prepare.from_hugging_face({**colours, **{k: v for k, v in said.items() if k not in own}})
    edge, crop = said.get("size", {"shortest_edge": 512}), said.get("crop_size", {"height": 512, "width": 512})
    side = edge.get("shortest_edge") if isinstance(edge, Mapping) else edge
    sides = [crop.get("height"), crop.get("width")] if isinstance(crop, Mapping) else [crop] * 2
    if sides != [side, side] or not (said.get("do_resize", True) and said.get("do_center_crop", True)):
        raise ValueError(f"size is {edge} and crop_size {crop}, expected pictures resized and cropped to one square")
    return found._replace(size=(side, side), crop=True, scale=said.get("rescale_factor", 0.0078))


def taming_names(config: VQConfig) -> dict[str, Place]:
    """The map of the whole tokeniser, under the names of taming-transformers."""
    found = {"quantize.embedding.weight": Place("codebook")}
    for theirs, ours in _layers(config):
        norm = ours.rpartition("/")[2].startswith("norm")
        found[f"{theirs}.weight"] = Place(f"{ours}/scale") if norm else Place(f"{ours}/kernel", axes=CONV)
        found[f"{theirs}.bias"] = Place(f"{ours}/bias")
    return found


def vq_names(config: VQConfig) -> dict[str, Place]:
    """The map of the tokeniser's encoder; transformers' checkpoints have no decoder."""
    behind = ("decoder.", "post_quant_conv.")
    return {VQ_PREFIX + name: place for name, place in taming_names(config).items() if not name.startswith(behind)}


def _layers(config: VQConfig) -> Iterator[tuple[str, str]]:
    """Pairs of their and our convolutions and norms."""
    last = len(config.multipliers) - 1
    yield from (("quant_conv", "quant"), ("post_quant_conv", "post_quant"))
    before = 1
    for level, times in enumerate(config.multipliers):
        yield from _level(f"encoder.down.{level}", f"encoder/down_{level}", config.blocks, before != times)
        if level < last:
            yield f"encoder.down.{level}.downsample.conv", f"encoder/down_{level}"
        before = times
    before = config.multipliers[-1]
    for level, times in reversed(list(enumerate(config.multipliers))):
        yield from _level(f"decoder.up.{level}", f"decoder/up_{level}", config.blocks + 1, before != times)
        if level:
            yield f"decoder.up.{level}.upsample.conv", f"decoder/up_{level}"
        before = times
    for side in ("encoder", "decoder"):
        yield from ((f"{side}.{name}", f"{side}/{name}") for name in ("conv_in", "norm_out", "conv_out"))
        for n in range(2):
            yield from _residual(f"{side}.mid.block_{n + 1}", f"{side}/middle/block_{n}")
        for theirs, ours in {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}.items():
            yield f"{side}.mid.attn_1.{theirs}", f"{side}/middle/attention/{ours}"


def _level(theirs: str, ours: str, blocks: int, widens: bool) -> Iterator[tuple[str, str]]:
    """Residual blocks of a level, of which the first may change the channels."""
    for n in range(blocks):
        yield from _residual(f"{theirs}.block.{n}", f"{ours}_block_{n}")
    if widens:
        yield f"{theirs}.block.0.nin_shortcut", f"{ours}_block_0/shortcut"


def _residual(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{theirs}.{part}", f"{ours}/{part}") for part in ("norm1", "conv1", "norm2", "conv2"))


def vq_from_checkpoint(config: VQConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of `VQ` from a tokeniser's own file, under the names of taming-transformers.

    Args:
      config: of the tokeniser.
      tensors: checkpoint name -> array, or `Stored` in a file; what its training needed (`loss.*`) is not used.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    shapes = maps.shapes(VQ(config), np.zeros((1, config.size, config.size, 3), np.float32))
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}
    return maps.from_checkpoint(taming_names(config), shapes, own)


def vq_to_checkpoint(config: VQConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `vq_from_checkpoint`. Also maps gradients."""
    return maps.to_checkpoint(taming_names(config), params)


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
