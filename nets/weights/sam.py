"""Checkpoint names of Segment Anything, as transformers' `SamModel` writes them, and our parameter paths."""

from jaxrl.nets.vision.sam_encoder import SAMConfig
from jaxrl.nets.weights.maps import Place, linear, norm

IGNORED = ("prompt_encoder.shared_embedding.positional_embedding",)
"""A second copy of the frequencies, in old files."""


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
