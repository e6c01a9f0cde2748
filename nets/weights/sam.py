"""Segment Anything as transformers' `SamModel` describes and stores it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxrl.nets.vision.sam import SAM, prompt
from jaxrl.nets.vision.sam_encoder import SAMConfig
from jaxrl.nets.weights import maps
from jaxrl.nets.weights.maps import Place, linear, norm
from jaxrl.nets.weights.vit import side

VISION = {  # transformers' values where a config.json leaves them out, those of ViT-B
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_dim": None, "mlp_ratio": 4.0,
    "global_attn_indexes": (2, 5, 8, 11), "window_size": 14, "image_size": 1024, "patch_size": 16,
    "output_channels": 256,
}  # fmt: skip
PROMPT = {"mask_input_channels": 16}
DECODER = {
    "num_hidden_layers": 2, "num_attention_heads": 8, "mlp_dim": 2048, "attention_downsample_rate": 2,
    "num_multimask_outputs": 3, "iou_head_hidden_dim": 256, "iou_head_depth": 3, "layer_norm_eps": 1e-6,
}  # fmt: skip
IGNORED = ("prompt_encoder.shared_embedding.positional_embedding",)
"""A second copy of the frequencies, in old files."""


def from_hugging_face(config: Mapping[str, Any], **changes) -> SAMConfig:
    """The network that a Hugging Face `config.json` of model type sam describes.

    Args:
      config: the parsed file.
      changes: fields of SAMConfig to set, such as dtype or remat.

    Raises:
      ValueError: another architecture, or choices that are not built here, all in one message.
    """
    if config.get("model_type") != "sam":
        raise ValueError(f"model_type is {config.get('model_type')!r}, expected 'sam'")
    given = {name: config.get(f"{name}_config") or {} for name in ("vision", "prompt_encoder", "mask_decoder")}
    v, p, d = VISION | given["vision"], PROMPT | given["prompt_encoder"], DECODER | given["mask_decoder"]
    layers, seen = v["num_hidden_layers"], tuple(v["global_attn_indexes"])
    every = seen[0] + 1 if seen else layers
    shared = {"image_size": v["image_size"], "patch_size": v["patch_size"]}
    wanted = {
        "vision": {"hidden_act": "gelu", "qkv_bias": True, "use_abs_pos": True, "use_rel_pos": True, "num_channels": 3,
                   "layer_norm_eps": 1e-6, "num_pos_feats": v["output_channels"] // 2,
                   "global_attn_indexes": list(range(every - 1, layers, every))},
        "prompt_encoder": {**shared, "hidden_act": "gelu", "num_point_embeddings": 4, "layer_norm_eps": 1e-6,
                           "hidden_size": v["output_channels"]},
        "mask_decoder": {"hidden_act": "relu", "hidden_size": v["output_channels"]},
    }  # fmt: skip
    wrong = [
        f"{part}_config.{name} is {given[part][name]!r}, expected {value!r}"
        for part, values in wanted.items()
        for name, value in values.items()
        if given[part].get(name, value) != value
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    fields = {
        "width": v["hidden_size"],
        "layers": layers,
        "heads": v["num_attention_heads"],
        "global_every": every,
        "ffn": v["mlp_dim"] or int(v["hidden_size"] * v["mlp_ratio"]),
        "window": v["window_size"],
        "image": side(v["image_size"]),
        "patch": side(v["patch_size"]),
        "channels": v["output_channels"],
        "mask_channels": p["mask_input_channels"],
        "decoder_layers": d["num_hidden_layers"],
        "decoder_heads": d["num_attention_heads"],
        "decoder_ffn": d["mlp_dim"],
        "downsample": d["attention_downsample_rate"],
        "masks": d["num_multimask_outputs"],
        "iou_hidden": d["iou_head_hidden_dim"],
        "iou_depth": d["iou_head_depth"],
        "decoder_norm_eps": d["layer_norm_eps"],
    }
    return SAMConfig(**(fields | changes))


def _encoder(config: SAMConfig) -> dict[str, Place | tuple[Place, ...]]:
    c, d = config, config.width
    found: dict[str, Place | tuple[Place, ...]] = {
        "vision_encoder.pos_embed": Place("image_encoder/positions"),
        "vision_encoder.neck.conv1.weight": Place("image_encoder/neck_in/kernel", axes=(2, 3, 1, 0)),
        "vision_encoder.neck.conv2.weight": Place("image_encoder/neck_out/kernel", axes=(2, 3, 1, 0)),
        **linear("vision_encoder.patch_embed.projection", "image_encoder/patch", axes=(2, 3, 1, 0)),
        **norm("vision_encoder.neck.layer_norm1", "image_encoder/neck_in_norm"),
        **norm("vision_encoder.neck.layer_norm2", "image_encoder/neck_out_norm"),
    }
    for i in range(c.layers):
        period, within = divmod(i, c.global_every)
        is_global = within == c.global_every - 1
        index = (period,) if is_global else (period, within)
        ours = f"image_encoder/blocks/{'global' if is_global else 'windowed'}"
        theirs = f"vision_encoder.layers.{i}"
        fused = lambda name, axes: tuple(
            Place(f"{ours}/attention/{part}/{name}", index, axes, (j * d, (j + 1) * d)) for j, part in enumerate("qkv")
        )
        found |= {
            f"{theirs}.attn.qkv.weight": fused("kernel", (1, 0)),
            f"{theirs}.attn.qkv.bias": fused("bias", None),
            f"{theirs}.attn.rel_pos_h": Place(f"{ours}/attention/rows", index),
            f"{theirs}.attn.rel_pos_w": Place(f"{ours}/attention/columns", index),
            **linear(f"{theirs}.attn.proj", f"{ours}/attention/o", index),
            **norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm", index),
            **norm(f"{theirs}.layer_norm2", f"{ours}/ffn_norm", index),
            **linear(f"{theirs}.mlp.lin1", f"{ours}/ffn/up", index),
            **linear(f"{theirs}.mlp.lin2", f"{ours}/ffn/down", index),
        }
    return found


def _prompts() -> dict[str, Place]:
    ours = "prompt_encoder"
    return {
        "shared_image_embedding.positional_embedding": Place(f"{ours}/frequencies"),
        "prompt_encoder.not_a_point_embed.weight": Place(f"{ours}/not_a_point"),
        "prompt_encoder.no_mask_embed.weight": Place(f"{ours}/no_mask"),
        **{f"prompt_encoder.point_embed.{i}.weight": Place(f"{ours}/points", (i,)) for i in range(4)},
        **linear("prompt_encoder.mask_embed.conv1", f"{ours}/mask/in", axes=(2, 3, 1, 0)),
        **linear("prompt_encoder.mask_embed.conv2", f"{ours}/mask/mid", axes=(2, 3, 1, 0)),
        **linear("prompt_encoder.mask_embed.conv3", f"{ours}/mask/out", axes=(2, 3, 1, 0)),
        **norm("prompt_encoder.mask_embed.layer_norm1", f"{ours}/mask/in_norm"),
        **norm("prompt_encoder.mask_embed.layer_norm2", f"{ours}/mask/mid_norm"),
    }


def _attention(theirs: str, ours: str, index=()) -> dict[str, Place]:
    found = {}
    for name, part in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
        found |= linear(f"{theirs}.{name}", f"{ours}/{part}", index)
    return found


def _mlp(theirs: str, ours: str, depth: int, index=()) -> dict[str, Place]:
    names = ["proj_in", *(f"layers.{i}" for i in range(depth - 2)), "proj_out"]
    found = {}
    for i, name in enumerate(names):
        found |= linear(f"{theirs}.{name}", f"{ours}/layer_{i}", index)
    return found


def _decoder(config: SAMConfig) -> dict[str, Place]:
    ours = "mask_decoder"
    found = {
        "mask_decoder.iou_token.weight": Place(f"{ours}/iou_token"),
        "mask_decoder.mask_tokens.weight": Place(f"{ours}/mask_tokens"),
        **_attention("mask_decoder.transformer.final_attn_token_to_image", f"{ours}/final"),
        **norm("mask_decoder.transformer.layer_norm_final_attn", f"{ours}/final_norm"),
        **linear("mask_decoder.upscale_conv1", f"{ours}/upscale_in", axes=(0, 2, 3, 1)),
        **linear("mask_decoder.upscale_conv2", f"{ours}/upscale_out", axes=(0, 2, 3, 1)),
        **norm("mask_decoder.upscale_layer_norm", f"{ours}/upscale_norm"),
        **_mlp("mask_decoder.iou_prediction_head", f"{ours}/iou", config.iou_depth),
    }
    for i in range(1 + config.masks):
        found |= _mlp(f"mask_decoder.output_hypernetworks_mlps.{i}", f"{ours}/masks", 3, (i,))
    for i in range(config.decoder_layers):
        theirs, here = f"mask_decoder.transformer.layers.{i}", f"{ours}/layers"
        found |= {
            **_attention(f"{theirs}.self_attn", f"{here}/tokens", (i,)),
            **_attention(f"{theirs}.cross_attn_token_to_image", f"{here}/to_image", (i,)),
            **_attention(f"{theirs}.cross_attn_image_to_token", f"{here}/to_tokens", (i,)),
            **norm(f"{theirs}.layer_norm1", f"{here}/tokens_norm", (i,)),
            **norm(f"{theirs}.layer_norm2", f"{here}/to_image_norm", (i,)),
            **norm(f"{theirs}.layer_norm3", f"{here}/ffn_norm", (i,)),
            **norm(f"{theirs}.layer_norm4", f"{here}/to_tokens_norm", (i,)),
            **linear(f"{theirs}.mlp.lin1", f"{here}/ffn/layer_0", (i,)),
            **linear(f"{theirs}.mlp.lin2", f"{here}/ffn/layer_1", (i,)),
        }
    return found


def names(config: SAMConfig) -> dict[str, Place | tuple[Place, ...]]:
    """Checkpoint name -> our place, for `jaxrl.nets.weights.maps` (with `ignored=IGNORED`)."""
    return {**_encoder(config), **_prompts(), **_decoder(config)}


def from_checkpoint(config: SAMConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    pictures = jnp.zeros((1, config.image, config.image, 3))
    shapes = maps.shapes(SAM(config), pictures, prompt(points=jnp.zeros((1, 1, 2))))
    return maps.from_checkpoint(names(config), shapes, tensors, ignored=IGNORED, param_dtype=config.param_dtype)
