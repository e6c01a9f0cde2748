"""Names of Swin checkpoints, as Hugging Face's `SwinForImageClassification` and `Swinv2For...` store them."""

from jaxrl.nets.vision.swin import SwinConfig
from jaxrl.nets.weights.maps import Place, linear, norm, projection
from jaxrl.nets.weights.vit import block

IGNORED = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Endings of tables that follow from the config, which older checkpoints hold: `from_checkpoint(ignored=IGNORED)`."""


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
