"""What a network is made of, counted from the shapes of its parameters and the rules that divide them."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax

from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel.sharding import partition


class Leaf(NamedTuple):
    """A parameter: path, shape, and whether tokens are multiplied by it in a layer."""

    path: str
    shape: tuple[int, ...]

    @property
    def matrix(self) -> bool:
        """Whether it is one of a layer's matrices."""
        named = re.search(r"(kernel|projection|moe/(gate|up|down))$", self.path)
        return "layers/" in self.path and named is not None

    @property
    def expert(self) -> bool:
        """Whether it holds the matrices of experts, of which a token meets `top_k`."""
        return re.search(r"moe/(gate|up|down)$", self.path) is not None

    @property
    def stack(self) -> str:
        """The layers it belongs to, "" for none."""
        return self.path[: self.path.index("layers/") + len("layers")] if "layers/" in self.path else ""


def leaves(config: TransformerConfig) -> tuple[Leaf, ...]:
    """All parameters."""
    same: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "cache_dtype": None, "remat": "none"}
    return _leaves(dataclasses.replace(config, **same, unroll=1, decode_unroll=1))


@functools.lru_cache(maxsize=64)
def _leaves(config: TransformerConfig) -> tuple[Leaf, ...]:
    params = jax.eval_shape(language_model(config).init, jax.random.key(0))
    named = jax.tree_util.tree_leaves_with_path(params)
    return tuple(Leaf(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape) for path, x in named)


@functools.lru_cache(maxsize=65536)
def _parts(leaf: Leaf, mesh: tuple[tuple[str, int], ...], fsdp: bool) -> int:
    sizes = dict(mesh)
    spec = partition(leaf.path, leaf.shape, SimpleNamespace(shape=sizes), fsdp=fsdp)  # type: ignore[arg-type]
    return math.prod(sizes[str(axis)] for axis in spec if axis)


def own(leaf: Leaf, mesh: Mapping[str, int], *, fsdp: bool = True) -> int:
    """Entries of a parameter on one device."""
    return math.prod(leaf.shape) // _parts(leaf, tuple(mesh.items()), fsdp)


def parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameters by part: embed, attention, ffn (experts and routers too), norms, unembed (0 where it is tied)."""
    found: dict[str, int] = dict.fromkeys(("embed", "attention", "ffn", "norms", "unembed"), 0)
    for leaf in leaves(config):
        part = (
            "norms" if re.search(r"norm/(scale|bias)$", leaf.path)
            else "attention" if "/attention/" in leaf.path
            else "ffn" if leaf.stack
            else "unembed" if leaf.path.startswith("unembed")
            else "embed"
        )  # fmt: skip
        found[part] += math.prod(leaf.shape)
    return found


def own_parameters(config: TransformerConfig, mesh: Mapping[str, int], *, fsdp: bool = True) -> int:
    """Parameters on one device, by `jaxrl.parallel.RULES`."""
    return sum(own(leaf, mesh, fsdp=fsdp) for leaf in leaves(config))


def layer_matrices(config: TransformerConfig, *, active: bool = False) -> float:
    """Entries of the matrices of all layers; active: of those that a token meets, so `top_k` experts of each layer."""
    share = config.experts.top_k / config.experts.experts if active and config.experts else 1.0
    return sum(math.prod(x.shape) * (share if x.expert else 1.0) for x in leaves(config) if x.matrix)


def gathered(config: TransformerConfig, mesh: Mapping[str, int]) -> float:
    """Entries of the layers' matrices that a device sees when fsdp's parts have been put together."""
    return float(sum(own(leaf, mesh, fsdp=False) for leaf in leaves(config) if leaf.matrix))


def one_layer(config: TransformerConfig, mesh: Mapping[str, int]) -> float:
    """The same of the largest layer."""
    of_stack: dict[str, float] = {}
    for leaf in leaves(config):
        if leaf.matrix:
            layers = math.prod(leaf.shape[: 2 if leaf.stack.startswith("periods") else 1]) / mesh["stage"]
            of_stack[leaf.stack] = of_stack.get(leaf.stack, 0.0) + own(leaf, mesh, fsdp=False) / layers
    return max(of_stack.values())


def table_entries(config: TransformerConfig, mesh: Mapping[str, int]) -> float:
    """Entries of the embedding, or the unembedding, of one tensor slice; whole where the vocabulary does not divide."""
    divided = config.vocab_size % mesh["tensor"] == 0
    return config.vocab_size * config.width / (mesh["tensor"] if divided else 1)


class Widths(NamedTuple):
    """Numbers of a token in a layer's attention, all heads together."""

    queries: int
    keys: int  # as they are laid out for a whole pass
    values: int
    outputs: int  # of all the products before attention
    scores: int  # queries' and keys' width in a whole pass
    mixed: int  # values' width, of the same


def attention_widths(config: TransformerConfig) -> Widths:
    """Of plain grouped-query attention, or of latent attention in its plain form."""
    c, latent = config, config.latent
    if latent is None:
        heads, keys = c.heads * c.head_size, c.kv_heads * c.head_size
        return Widths(heads, keys, keys, heads + 2 * keys, heads, heads)
    queries, values = c.heads * (latent.nope + latent.rope), c.heads * latent.value
    made = (latent.q_rank or 0) + queries + latent.cached + c.heads * (latent.nope + latent.value)
    return Widths(queries, queries, values, made, queries, values)


def inner_width(config: TransformerConfig) -> float:
    """Numbers that a token's products leave inside of feed-forward layers, mean over layers."""
    c = config
    dense = (1 + c.gated) * c.ffn
    if c.experts is None:
        return dense
    inner = c.experts.top_k * c.experts.ffn + c.experts.shared
    routed = c.experts.top_k * c.width + (1 + c.experts.gated) * inner
    return (c.dense_layers * dense + (c.layers - c.dense_layers) * routed) / c.layers
