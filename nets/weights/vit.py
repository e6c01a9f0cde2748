"""ViT as Hugging Face's `ViTForImageClassification` describes and stores it."""

from collections.abc import Mapping
from typing import Any

from jaxrl.nets.vision.vit import ViTConfig
from jaxrl.nets.weights.maps import Place, linear, norm, projection

IGNORED = ("pooler.dense.weight", "pooler.dense.bias")
"""A plain `ViTModel` has a layer behind the class token, which its tokens do not depend on; it is not built here."""


def from_hugging_face(config: Mapping[str, Any], **changes) -> ViTConfig:
    """The ViT that a Hugging Face `config.json` describes; a plain `ViTModel` has no classes.

    Args:
      config: the parsed file.
      changes: fields of ViTConfig to set, such as dtype or remat.

    Raises:
      ValueError: another architecture, or choices that are not built here, all in one message.
    """
    refuse(config, "ViT", {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True})
    fields = {
        "image_size": pair(config["image_size"]),
        "patch": side(config["patch_size"]),
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "ffn": config["intermediate_size"],
        "classes": classes(config, "ViT"),
        "channels": config["num_channels"],
        "norm_eps": config["layer_norm_eps"],
    }
    return ViTConfig(**(fields | changes))


def refuse(config: Mapping[str, Any], family: str, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError unless a `config.json` has these values, or nothing in their place, and heads that exist here.

    The model type must be there. `family` is how the names of its classes begin, as "Swinv2".
    """
    if "model_type" not in config:
        raise ValueError(f"no model_type, expected {wanted['model_type']!r}")
    wrong = [f"{key} is {config[key]!r}, expected {v!r}" for key, v in wanted.items() if config.get(key, v) != v]
    heads = [f"{family}ForImageClassification", f"{family}Model"]
    if (config.get("architectures") or heads)[0] not in heads:
        wrong.append(f"architectures is {config['architectures']}, expected one of {heads}")
    if wrong:
        raise ValueError("; ".join(wrong))


def classes(config: Mapping[str, Any], family: str) -> int | None:
    """How many classes the head has that "architectures" names; None for the plain network, meant where it is not."""
    if f"{family}ForImageClassification" not in (config.get("architectures") or ()):
        return None
    return len(config.get("id2label") or range(2))  # transformers leaves two classes without a name out


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a `config.json`, in order; none for the plain network and where it names none.

    Raises:
      ValueError: names that do not stand at 0 ... n - 1.
    """
    named = {int(key): name for key, name in (config.get("id2label") or {}).items()}
    if sorted(named) != list(range(len(named))):
        raise ValueError(f"id2label names the classes {sorted(named)}, expected 0 ... {len(named) - 1}")
    return tuple(named[i] for i in range(len(named)))


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a field that is a number or a list."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def side(size: Any) -> int:
    """The side of a square, of such a field.

    Raises:
      ValueError: a patch that is no square.
    """
    height, width = pair(size)
    if height != width:
        raise ValueError(f"patch_size is {size}, expected a square: a number, or a list of two equal ones")
    return height


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
