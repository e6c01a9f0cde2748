"""Names of ViT checkpoints, as Hugging Face's `ViTForImageClassification` stores them."""

from jaxrl.nets.vision.vit import ViTConfig
from jaxrl.nets.weights.maps import Place, linear, norm, projection


def block(
    theirs: str, ours: str, index: tuple[int, ...], *, attention: str = "attention.self", key_bias: bool = True
) -> dict[str, Place]:
    """Names of one layer, which ViT and Swin have in common; `attention` is where query, key and value stand."""
    at = lambda name, path, **options: linear(f"{theirs}.{name}", f"{ours}/{path}", index, **options)
    return {
        **at(f"{attention}.query", "attention/q"),
        **at(f"{attention}.key", "attention/k", bias=key_bias),
        **at(f"{attention}.value", "attention/v"),
        **at("attention.output.dense", "attention/o"),
        **at("intermediate.dense", "ffn/up"),
        **at("output.dense", "ffn/down"),
        **norm(f"{theirs}.layernorm_before", f"{ours}/attention_norm", index),
        **norm(f"{theirs}.layernorm_after", f"{ours}/ffn_norm", index),
    }


def names(config: ViTConfig) -> dict[str, Place]:
    """The map of one ViT for `jaxrl.nets.weights.maps`; published networks have pool "class"."""
    found = projection("vit.embeddings.patch_embeddings.projection", "patches")
    found["vit.embeddings.position_embeddings"] = Place("positions")
    if config.pool == "class":
        found["vit.embeddings.cls_token"] = Place("class_token")
    for layer in range(config.layers):
        found |= block(f"vit.encoder.layer.{layer}", "layers", (layer,), attention="attention.attention")
    found |= norm("vit.layernorm", "norm")
    return found if config.classes is None else found | linear("classifier", "head")
