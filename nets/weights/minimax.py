"""MiniMax-Text-01 as transformers' `MiniMaxForCausalLM` describes and stores it, and our Transformer.

Its norms stand before a layer and on the residual stream itself: the first layer's input_layernorm is our norm of
the embeddings, that of every other layer the ffn_norm of the layer before it, and the model's norm that of the last.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.presets import LIGHTNING
from jaxrl.nets.weights import configs, maps
from jaxrl.nets.weights import names as decoders
from jaxrl.nets.weights.files import Stored
from jaxrl.nets.weights.maps import Place

IGNORED = (*decoders.IGNORED, ".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")
"""Tables that follow from the config."""
KINDS = ("linear_attention", "full_attention")
SUMS = ("linear_attn", "full_attn", "mlp")
"""Sums of the residual stream with what a part makes of it: alpha x + beta f(x)."""
FUSED = ".qkv_proj.weight"
"""Queries, keys and values of a head stand together there."""
FREE = ("head_dim", "ffn", "dtype", "param_dtype", "cache_dtype", "remat", "attention", "unroll", "decode_unroll")
"""Fields of a config of which the architecture says nothing, or nothing else: every layer has experts."""
GATING = ("experts", "top_k", "ffn", "shared", "first_dense", "score", "normalise", "scale", "groups", "bias")
"""Fields of its experts of which it does: not what training adds."""
EXPERTS = ("moe/router/kernel", "moe/gate", "moe/up", "moe/down")
LINEAR_LAYER = {
    "self_attn.out_proj.weight": Place("attention/o/kernel", axes=(1, 0)),
    "self_attn.output_gate.weight": Place("attention/gate/kernel", axes=(1, 0)),
    "self_attn.norm.weight": Place("attention/out_norm/scale"),
}


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a `config.json` of model type minimax describes.

    Args:
      config: the parsed file, with `layer_types`.
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: choices that are not built here, all in one message: sums with factors alpha that differ or with a
        beta other than 1, a sliding window, no lightning layer at all.

    `rotary_dim` of the file that MiniMax published, or `partial_rotary_factor`, says how many numbers of a head turn.
    transformers' class (5.24) passes over both and turns all: give rotary_dim=None for that network.
    """
    of, types = config.get, config["layer_types"]
    alphas = {f"{name}_alpha_factor": float(of(f"{name}_alpha_factor", 1)) for name in SUMS}
    wanted = {
        "model_type": "minimax", "hidden_act": "silu", "sliding_window": None,
        **{f"{name}_beta_factor": 1 for name in SUMS},
    }  # fmt: skip
    wrong = [
        f"{key} is {config[key]!r}, expected {value!r}" for key, value in wanted.items() if of(key, value) != value
    ]
    if len(set(alphas.values())) > 1:
        wrong.append(f"the factors {alphas} differ, expected one for all sums")
    if set(types) - set(KINDS) or KINDS[0] not in types or len(types) != config["num_hidden_layers"]:
        wrong.append(
            f"layer_types is {types}, expected one of {KINDS} for each of {config['num_hidden_layers']} layers, "
            f"{KINDS[0]} at least once"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    own = {
        "linear": replace(LIGHTNING, kv_heads=config["num_attention_heads"]),
        "linear_layers": tuple(i for i, kind in enumerate(types) if kind == KINDS[0]),
        "norm_place": "post",
        "embed_norm": True,
        "residual": alphas["mlp_alpha_factor"],
        "rotary_dim": configs.rotary_dim(config),
    }
    plain = {"rope_theta": 1e6, **config, "model_type": "mixtral"}
    return configs.from_hugging_face(plain, **(own | changes))


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a MiniMax: plain JSON without the ids of special tokens.

    transformers' class (5.24) does not look at the `rotary_dim` in it, so it makes another network of such a file.

    Raises:
      ValueError: a network with choices that are not MiniMax's.
    """
    c = config
    plain = replace(
        c, linear=None, linear_layers=None, norm_place="pre", embed_norm=False, residual=1.0, rotary_dim=None
    )
    found = configs.to_hugging_face(plain) | {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "layer_types": [KINDS[0] if kind.linear else KINDS[1] for kind in c.kinds],
        **{f"{name}_alpha_factor": c.residual for name in SUMS},
        **{f"{name}_beta_factor": 1.0 for name in SUMS},
        **({} if c.rotary_dim is None else {"rotary_dim": c.rotary_dim}),
    }
    if configs.model_type(plain) == "mixtral":
        again = from_hugging_face(found, **{name: getattr(c, name) for name in FREE})
        linear = c.linear and replace(c.linear, implementation=None)
        gating = all(getattr(c.experts, name) == getattr(again.experts, name) for name in GATING)
        if gating and again == replace(c, experts=again.experts, linear=linear):
            return found
    raise ValueError(f"the network is no MiniMax: expected the choices of presets.minimax_text_01, got {c}")


def names(config: TransformerConfig) -> dict[str, Place | tuple[Place, ...]]:
    """The map of a MiniMax. Its matrix of queries, keys and values has these one after another, see `regroup`."""
    to_hugging_face(config)  # refuses what is no MiniMax
    assert config.experts is not None
    n, moe = config.heads * config.head_size, decoders.expert_names("mixtral", config.experts.experts)
    experts = {name: place for name, place in moe.items() if place.path in EXPERTS}
    full = {f"self_attn.{x}_proj.weight": Place(f"attention/{x}/kernel", axes=(1, 0)) for x in "qkvo"}
    found: dict[str, Place | tuple[Place, ...]] = {
        "model.embed_tokens.weight": Place("embed/embedding"),
        "model.layers.0.input_layernorm.weight": Place("embed_norm/scale"),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = Place("unembed/kernel", axes=(1, 0))
    for i, (stack, index) in enumerate(decoders.stacks(config)):
        at, linear = f"model.layers.{i}.", config.kinds[i].linear
        following = f"model.layers.{i + 1}.input_layernorm" if i + 1 < config.layers else "model.norm"
        layer: dict[str, Place | tuple[Place, ...]] = {
            f"{at}post_attention_layernorm.weight": Place("attention_norm/scale"),
            f"{following}.weight": Place("ffn_norm/scale"),
            **{f"{at}{name}": place for name, place in (experts | (LINEAR_LAYER if linear else full)).items()},
        }
        if linear:
            thirds = {f"attention/{x}/kernel": (j * n, (j + 1) * n) for j, x in enumerate("qkv")}
            layer[f"{at}self_attn{FUSED}"] = tuple(Place(path, (), (1, 0), rows) for path, rows in thirds.items())
        here = lambda place: place._replace(path=f"{stack}/{place.path}", index=(*index, *place.index))
        found |= {
            name: here(place) if isinstance(place, Place) else tuple(map(here, place)) for name, place in layer.items()
        }
    return found


def regroup(rows: Any, first: int, second: int) -> np.ndarray:
    """Rows [first * second * n, D] that stand by (first, second) as rows by (second, first)."""
    rows = np.asarray(rows)
    return rows.reshape(first, second, -1, rows.shape[1]).swapaxes(0, 1).reshape(rows.shape)


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors; see `names.from_checkpoint`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """

    def by_part(name: str, tensor: Any) -> Any:
        if not name.endswith(FUSED):
            return tensor
        return Stored(tuple(np.shape(tensor)), lambda: regroup(tensor, config.heads, 3))

    given = {name: by_part(name, tensor) for name, tensor in tensors.items()}
    ignored = (*IGNORED, "lm_head.weight") if config.tie_embeddings else IGNORED
    known = names(config), decoders.shapes(config)
    return maps.from_checkpoint(*known, given, ignored=ignored, param_dtype=config.param_dtype)


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array, layers unstacked. Also maps gradients."""
    known = names(config)
    maps.check_total(known, decoders.shapes(config))
    found = maps.to_checkpoint(known, params)
    return {name: regroup(x, 3, config.heads) if name.endswith(FUSED) else x for name, x in found.items()}
