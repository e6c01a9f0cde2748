"""Swin, both versions, as Hugging Face's `SwinForImageClassification` and `Swinv2For...` describe and store it."""

from collections.abc import Mapping
from typing import Any

from jaxrl.nets.vision.swin import SwinConfig
from jaxrl.nets.weights.maps import Place, linear, norm, projection
from jaxrl.nets.weights.vit import block, classes, refuse, side

IGNORED = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Endings of tables that follow from the config, which older checkpoints hold: `from_checkpoint(ignored=IGNORED)`."""


def from_hugging_face(config: Mapping[str, Any], **changes) -> SwinConfig:
    """The Swin that a Hugging Face `config.json` describes; a plain `SwinModel` has no classes.

    Args:
      config: the parsed file, of model type swin or swinv2. Its image_size is left aside: any size will do.
      changes: fields of SwinConfig to set, such as dtype or remat.

    Raises:
      ValueError: another architecture, or choices that are not built here.
    """
    version = 2 if config.get("model_type") == "swinv2" else 1
    family, kind = ("Swin", "swin") if version == 1 else ("Swinv2", "swinv2")
    choices = {"hidden_act": "gelu", "qkv_bias": True, "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}
    refuse(config, family, {"model_type": kind, **choices})
    if config["mlp_ratio"] != int(config["mlp_ratio"]):
        raise ValueError(f"mlp_ratio is {config['mlp_ratio']}, expected a whole number")
    measured = config.get("pretrained_window_sizes") or () if version == 2 else ()  # 0: by the window itself
    fields = {
        "version": version,
        "patch": side(config["patch_size"]),
        "width": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": config["window_size"],
        "pretrained_windows": tuple(measured) if any(measured) else None,
        "mlp_ratio": int(config["mlp_ratio"]),
        "classes": classes(config, family),
        "channels": config["num_channels"],
        "drop_path": config["drop_path_rate"],
    }
    return SwinConfig(**(fields | changes))


def names(config: SwinConfig) -> dict[str, Place]:
    """The map of one Swin, of either version, for `jaxrl.nets.weights.maps`."""
    root = "swin" if config.version == 1 else "swinv2"
    found = projection(f"{root}.embeddings.patch_embeddings.projection", "patches")
    found |= norm(f"{root}.embeddings.norm", "patches_norm")
    for stage, depth in enumerate(config.depths):
        theirs = f"{root}.encoder.layers.{stage}"
        for layer in range(depth):
            pair, which = divmod(layer, 2)
            ours = f"stage{stage}/{('still', 'shifted')[which]}"
            found |= _block(config, f"{theirs}.blocks.{layer}", ours, (pair,))
        if stage < len(config.depths) - 1:
            found |= norm(f"{theirs}.downsample.norm", f"merge{stage}/norm")
            found |= linear(f"{theirs}.downsample.reduction", f"merge{stage}/reduce", bias=False)
    found |= norm(f"{root}.layernorm", "norm")
    return found if config.classes is None else found | linear("classifier", "head")


def _block(config, theirs, ours, index):
    own = f"{theirs}.attention.self"
    if config.version == 1:
        table = {f"{own}.relative_position_bias_table": Place(f"{ours}/bias/table", index)}
        return block(theirs, ours, index) | table
    return {
        **block(theirs, ours, index, key_bias=False),
        f"{own}.logit_scale": Place(f"{ours}/attention/logit_scale", index),
        **linear(f"{own}.continuous_position_bias_mlp.0", f"{ours}/bias/up", index),
        **linear(f"{own}.continuous_position_bias_mlp.2", f"{ours}/bias/down", index, bias=False),
    }
