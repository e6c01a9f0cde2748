"""Names of vision-language checkpoints: Qwen2-VL and Qwen2.5-VL, Kimi-VL and, for images, Kimi-K2.5; and configs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxrl.nets.vision import prepare
from jaxrl.nets.vision.packed import PackedViT, PackedViTConfig, Patches
from jaxrl.nets.vision_language import VisionLanguageConfig
from jaxrl.nets.weights import configs, maps
from jaxrl.nets.weights import names as decoders
from jaxrl.nets.weights.files import Stored
from jaxrl.nets.weights.gguf import halves
from jaxrl.nets.weights.maps import Place, linear

RENAMED = {  # what Kimi-K2.5 has, or transformers 5.24 writes for it, -> Kimi-VL's
    "mm_projector.proj.0.": "multi_modal_projector.linear_1.",
    "mm_projector.proj.2.": "multi_modal_projector.linear_2.",
    "mm_projector.pre_norm.": "multi_modal_projector.pre_norm.",
    "model.mm_projector.pre_norm.": "multi_modal_projector.pre_norm.",
    "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed.",
}
FUSED = ".wqkv."  # Kimi's queries and keys, whose rotary pairs are neighbours
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
PLACEHOLDERS = {  # what a chat template writes for a picture, by model type
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "kimi_vl": "<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
    "kimi_k25": "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
}
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def is_kimi(config: VisionLanguageConfig) -> bool:
    """Whether the tower is MoonViT."""
    return config.vision.grid is not None


def _norm(config: PackedViTConfig, theirs: str, ours: str, index: tuple[int, ...] = ()) -> dict[str, Place]:
    found = {f"{theirs}.weight": Place(f"{ours}/scale", index)}
    return found | ({f"{theirs}.bias": Place(f"{ours}/bias", index)} if config.norm == "layer" else {})


def _fused(config: PackedViTConfig, theirs: str, layer: int) -> dict[str, tuple[Place, ...]]:
    """Names of queries, keys and values in one matrix, in this order."""
    d, parts = config.width, tuple(enumerate("qkv"))
    rows = lambda i: (i * d, (i + 1) * d)
    at = "layers/attention/"
    return {
        f"{theirs}.weight": tuple(Place(f"{at}{x}/kernel", (layer,), (1, 0), rows(i)) for i, x in parts),
        f"{theirs}.bias": tuple(Place(f"{at}{x}/bias", (layer,), None, rows(i)) for i, x in parts),
    }


def _qwen(config: PackedViTConfig) -> dict[str, Place | tuple[Place, ...]]:
    c, found = config, {}
    for i in range(c.layers):
        at, here = f"visual.blocks.{i}", (i,)
        found |= _norm(c, f"{at}.norm1", "layers/attention_norm", here) | _norm(
            c, f"{at}.norm2", "layers/ffn_norm", here
        )
        found |= _fused(c, f"{at}.attn.qkv", i) | linear(f"{at}.attn.proj", "layers/attention/o", here)
        parts = ("gate_proj", "up_proj", "down_proj") if c.gated else ("fc1", "fc2")
        ours = ("gate", "up", "down") if c.gated else ("up", "down")
        for theirs, name in zip(parts, ours, strict=True):
            found |= linear(f"{at}.mlp.{theirs}", f"layers/ffn/{name}", here)
    return {
        "visual.patch_embed.proj.weight": Place("patches/kernel", axes=(1, 2, 3, 4, 0)),
        **found,
        **_norm(c, "visual.merger.ln_q", "merger/norm"),
        **linear("visual.merger.mlp.0", "merger/up"),
        **linear("visual.merger.mlp.2", "merger/down"),
    }


def _moonvit(config: PackedViTConfig) -> dict[str, Place | tuple[Place, ...]]:
    c, found = config, {}
    for i in range(c.layers):
        at, here = f"vision_tower.encoder.blocks.{i}", (i,)
        found |= _norm(c, f"{at}.norm0", "layers/attention_norm", here) | _norm(
            c, f"{at}.norm1", "layers/ffn_norm", here
        )
        found |= _fused(c, f"{at}.wqkv", i) | linear(f"{at}.wo", "layers/attention/o", here)
        found |= linear(f"{at}.mlp.fc0", "layers/ffn/up", here) | linear(f"{at}.mlp.fc1", "layers/ffn/down", here)
    return {
        "vision_tower.patch_embed.proj.weight": Place("patches/kernel", axes=(1, 2, 3, 0)),
        "vision_tower.patch_embed.proj.bias": Place("patches/bias"),
        "vision_tower.patch_embed.pos_emb.weight": Place("positions"),
        **found,
        **_norm(c, "vision_tower.encoder.final_layernorm", "norm"),
        **_norm(c, "multi_modal_projector.pre_norm", "merger/norm"),
        **linear("multi_modal_projector.linear_1", "merger/up"),
        **linear("multi_modal_projector.linear_2", "merger/down"),
    }


def _under(part: str, found: Place | tuple[Place, ...]) -> Place | tuple[Place, ...]:
    move = lambda place: place._replace(path=f"{part}/{place.path}")
    return move(found) if isinstance(found, Place) else tuple(move(place) for place in found)


def _text(config: VisionLanguageConfig):
    """The decoder, as the maps of decoders know it."""
    return replace(config.text, rope_sections=None)


def names(config: VisionLanguageConfig) -> dict[str, Place | tuple[Place, ...]]:
    """The map of checkpoint names. Kimi's needs `from_checkpoint` besides, which reorders rows of queries and keys."""
    prefix, tower = ("language_model.", _moonvit) if is_kimi(config) else ("", _qwen)
    text = {f"{prefix}{name}": _under("text", place) for name, place in decoders.names(_text(config)).items()}
    return text | {name: _under("vision", place) for name, place in tower(config.vision).items()}


def shapes(config: VisionLanguageConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, as init makes them."""
    c, n = config.vision, config.vision.merge**2

    def array(*shape, dtype="int32") -> Any:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

    values = array(1, n, c.channels * c.frames * c.patch**2, dtype="float32")
    row = Patches(values, array(1, n, 3), array(1, n, 3), array(1, n), array(1, n, dtype="float32"))
    tower = jax.eval_shape(lambda row: PackedViT(c).init(jax.random.key(0), row)["params"], row)
    paths = {
        jax.tree_util.keystr(at, simple=True, separator="/"): x.shape for at, x in jax.tree.leaves_with_path(tower)
    }
    text = {f"text/{path}": shape for path, shape in decoders.shapes(config.text).items()}
    return text | {f"vision/{path}": shape for path, shape in paths.items()}


def _each_third(tensor: Any, heads: int, reorder) -> np.ndarray:
    q, k, v = np.split(np.asarray(tensor), 3)
    return np.concatenate([reorder(q, heads), reorder(k, heads), v])


def _neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves`."""
    pairs = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def from_checkpoint(config: VisionLanguageConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters {"text", "vision"} from a checkpoint's tensors.

    Args:
      config: of both networks; decides which tensors must be there.
      tensors: checkpoint name -> array, or `Stored` in a file, as published for Qwen2-VL, Qwen2.5-VL and Kimi-VL;
        transformers' `language_model` in the middle of Qwen's names, and Kimi-K2.5's names of the projector, will do.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    given = {}
    for name, tensor in tensors.items():
        for theirs, ours in RENAMED.items():
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        if not is_kimi(config):
            name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if FUSED in name:
            read = lambda tensor=tensor: _each_third(tensor, config.vision.heads, halves)
            tensor = Stored(tuple(np.shape(tensor)), read)
        given[name] = tensor
    ignored = decoders.IGNORED + ("lm_head.weight",) * config.text.tie_embeddings
    return maps.from_checkpoint(
        names(config), shapes(config), given, ignored=ignored, param_dtype=config.text.param_dtype
    )


def to_checkpoint(config: VisionLanguageConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`, under the published names; also maps gradients."""
    known = names(config)
    maps.check_total(known, shapes(config))
    found = maps.to_checkpoint(known, params)
    reorder = lambda x: _each_third(x, config.vision.heads, _neighbours)
    return {name: reorder(x) if FUSED in name else x for name, x in found.items()}


def from_hugging_face(config: Mapping[str, Any], **changes) -> VisionLanguageConfig:
    """The networks that a `config.json` describes: of qwen2_vl, qwen2_5_vl, kimi_vl or kimi_k25.

    Args:
      config: the parsed file, flat as Qwen published it, or with `text_config`.
      changes: fields of the decoder's TransformerConfig to set.

    Raises:
      ValueError: another architecture, or what `configs.from_hugging_face` refuses.
    """
    kind, v = config.get("model_type"), config.get("vision_config", {})
    text = dict(config.get("text_config") or config)
    if kind in ("kimi_vl", "kimi_k25"):
        decoder = configs.from_hugging_face({**text, "model_type": "deepseek_v3"}, **changes)
        return VisionLanguageConfig(decoder, _published_moonvit(v, decoder.width))
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(f"model_type is {kind!r}, expected qwen2_vl, qwen2_5_vl, kimi_vl or kimi_k25")
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    sections = tuple(rope.pop("mrope_section", (16, 24, 24)))
    plain = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    plain.setdefault("rope_theta", text.get("rope_theta", 1e6))
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    text |= {"model_type": "qwen2", "rope_parameters": plain, "rope_scaling": None, "tie_word_embeddings": bool(tied)}
    decoder = configs.from_hugging_face(text, **{"rope_sections": sections, **changes})
    second = kind == "qwen2_vl"
    pace = None if second else v.get("tokens_per_second", 4)
    return VisionLanguageConfig(decoder, _published_qwen(v, decoder.width, second=second), pace)


def preparation(config: VisionLanguageConfig, kind: str, said: Mapping[str, Any]) -> prepare.Preparation:
    """What a `preprocessor_config.json` says; what it leaves out is as in the published processors.

    Args:
      config: of the networks.
      kind: model type of the config.json.
      said: the parsed file. Of Kimi-K2.5's only the colours are read: how large its pictures become is not built here.

    Raises:
      ValueError: patches that are not the network's, or what `prepare.from_hugging_face` refuses.
    """
    if kind == "kimi_k25":
        half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
        return prepare.from_hugging_face(
            {"resample": 3, **half, **said, **said.get("media_proc_cfg", {}), "size": None}
        )
    v, size = config.vision, said.get("size")
    own = {
        "patch_size": v.patch,
        "merge_size": v.merge,
        "merge_kernel_size": [v.merge] * 2,
        "temporal_patch_size": v.frames,
    }
    if wrong := [f"{name} is {said[name]}, but the network's {x}" for name, x in own.items() if said.get(name, x) != x]:
        raise ValueError("; ".join(wrong))
    found = prepare.from_hugging_face({"resample": 3, **CLIP, **said, "size": None})
    if not said.get("do_resize", True):
        return found
    if kind == "kimi_vl":
        return found._replace(patches=said.get("in_token_limit", 4096), pad=said.get("pad_input", False))
    edges = size if isinstance(size, Mapping) else {}
    limit = lambda name, edge, default: said.get(name) or edges.get(edge) or edges.get(name) or default
    fewest = limit("min_pixels", "shortest_edge", 56 * 56)
    return found._replace(area=(fewest, limit("max_pixels", "longest_edge", 28 * 28 * 1280)))


def _published_qwen(v: Mapping[str, Any], out: int, *, second: bool) -> PackedViTConfig:
    width = v.get("embed_dim", 1280) if second else v.get("hidden_size", 1280)
    sizes: dict[str, Any] = {
        "width": width,
        "layers": v.get("depth", 32),
        "heads": v.get("num_heads", 16),
        "out": out,
        "patch": _number(v.get("patch_size", 14)),
        "frames": _number(v.get("temporal_patch_size", 2)),
        "merge": v.get("spatial_merge_size", 2),
        "channels": v.get("in_channels", 3),
    }
    if second:
        activation = v.get("hidden_act", "quick_gelu")
        return PackedViTConfig(**sizes, ffn=int(width * v.get("mlp_ratio", 4)), activation=activation)
    windows = {
        "window": v.get("window_size", 112),
        "full_layers": tuple(v.get("fullatt_block_indexes", (7, 15, 23, 31))),
    }
    ffn = v.get("intermediate_size", 3420)
    return PackedViTConfig(**sizes, ffn=ffn, norm="rms", gated=True, activation=v.get("hidden_act", "silu"), **windows)


def _published_moonvit(v: Mapping[str, Any], out: int) -> PackedViTConfig:
    side = lambda name: v.get(f"init_pos_emb_{name}") or v.get(f"pos_emb_{name}") or 64
    merge = tuple(v.get("merge_kernel_size", (2, 2)))
    if merge[0] != merge[1]:
        raise ValueError(f"merge_kernel_size is {merge}, expected a square")
    return PackedViTConfig(
        v.get("hidden_size", 1152), v.get("num_hidden_layers", 27), v.get("num_attention_heads", 16),
        v.get("intermediate_size", 4304), out, patch=_number(v.get("patch_size", 14)), merge=merge[0],
        grid=(side("height"), side("width")), rope="alternating", patch_bias=True, norm_eps=1e-5, final_norm=True,
        activation="gelu_tanh",
    )  # fmt: skip


def _number(size: Any) -> int:
    """Of a field that transformers also writes as a list of equal numbers."""
    return size if isinstance(size, int) else size[-1]
