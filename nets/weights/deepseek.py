"""What DeepSeek-V3's checkpoints hold beside a decoder's tensors: modules of multi-token prediction.

Module k lies behind the layers, as layer L + k (61 in DeepSeek-V3): a layer like the last one, `eh_proj`, `enorm`,
`hnorm`, `shared_head.norm`, and the embedding and the head once more. `read_safetensors` turns 8-bit floats with their
`weight_scale_inv` into plain ones.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxrl.kernels.attention import Causal
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.multi_token import NAME, modules
from jaxrl.nets.transformer import rotations
from jaxrl.nets.weights import maps
from jaxrl.nets.weights import names as decoders
from jaxrl.nets.weights.maps import Place

OWN = {  # "model.layers.{L + k}." + name
    "enorm.weight": Place("enorm/scale"),
    "hnorm.weight": Place("hnorm/scale"),
    "eh_proj.weight": Place("eh_proj/kernel", axes=(1, 0)),
    "shared_head.norm.weight": Place("norm/scale"),
}
REPEATED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""Tensors of a module that are others again; tied checkpoints have the embedding for the head, too."""


def shapes(config: TransformerConfig, depth: int = 1) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, of a decoder and so many modules."""
    found = decoders.shapes(config)
    if depth:
        x = np.zeros((1, 1, config.width), np.float32)
        cos, sin = rotations(config, np.zeros((1, 1), np.int32))  # pyright: ignore
        own = maps.shapes(modules(config, depth), (x, None, None), np.stack([x] * depth), cos, sin, Causal(), 0)
        found |= {f"{NAME}/{path}": shape for path, shape in own.items()}
    return found


def names(config: TransformerConfig, depth: int = 1) -> dict[str, Place]:
    """The map of a decoder with so many modules: checkpoint name -> `Place`."""
    found, layers = decoders.names(config), config.layers
    further = decoders.names(replace(config, layers=layers + depth))
    for k in range(depth):
        before = f"model.layers.{layers + k}."
        for name, place in further.items():
            if name.startswith(before):
                path = f"{NAME}/layers/{place.path.removeprefix('layers/')}"
                found[name] = place._replace(path=path, index=(k, *place.index[1:]))
        found |= {f"{before}{name}": p._replace(path=f"{NAME}/{p.path}", index=(k,)) for name, p in OWN.items()}
    return found


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any], *, depth: int = 1) -> dict:
    """Parameters of `multi_token_model(config, depth)` from a checkpoint's tensors; see `names.from_checkpoint`.

    Args:
      config: of the decoder, without the modules (`num_hidden_layers` does not count them).
      tensors: checkpoint name -> array, or `Stored`.
      depth: modules, `num_nextn_predict_layers` of config.json.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    again = tuple(f"model.layers.{config.layers + k}.{name}" for k in range(depth) for name in REPEATED)
    ignored = (*decoders.IGNORED, *again, *(("lm_head.weight",) if config.tie_embeddings else ()))
    ours = shapes(config, depth)
    return maps.from_checkpoint(names(config, depth), ours, tensors, ignored=ignored, param_dtype=config.param_dtype)


def to_checkpoint(
    config: TransformerConfig, params: Mapping[str, Any], *, depth: int | None = None
) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`, with the repeated tensors.

    Args:
      config: of the decoder.
      params: of `multi_token_model`.
      depth: modules to write; None: all that there are, 0: the decoder alone.
    """
    if depth is None:
        depth = len(params[NAME]["eh_proj"]["kernel"]) if NAME in params else 0
    found = maps.to_checkpoint(names(config, depth), params)
    head = found.get("lm_head.weight", found["model.embed_tokens.weight"])
    for k in range(depth):
        before = f"model.layers.{config.layers + k}."
        for name, other in REPEATED.items():
            found[before + name] = found.get(other, head)
    return found
