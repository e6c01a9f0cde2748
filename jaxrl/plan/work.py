"""One step of training, and what it counts to from its sizes alone: parameters and FLOPs."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel.sharding import BATCH


@dataclasses.dataclass(frozen=True)
class Work:
    """What is planned. Meshes have all axes of `jaxrl.parallel.AXES`, in their order."""

    config: TransformerConfig
    task: str  # "sft", "dpo" or "grpo"
    batch: int  # rows of sft, pairs of dpo, completions of grpo
    length: int  # tokens of a row, prompt and completion
    mesh: Mapping[str, int]
    sampler_mesh: Mapping[str, int] | None = None  # grpo: where it samples, on the same chips; None: on `mesh`
    completion: int = 0  # grpo: how many tokens are sampled
    group: int = 1  # grpo: completions of each prompt
    reference: bool = False  # grpo: a frozen copy of the parameters for a KL
    micro_batches: int = 1
    zero: int = 3
    optimizer: str = "float32"

    def __post_init__(self):
        if self.config.experts is not None:
            raise ValueError("plan counts dense layers only, and the config has experts")

    @property
    def rows(self) -> int:
        """Rows that go through the network in a step."""
        return self.batch * (2 if self.task == "dpo" else 1)

    @property
    def own_tokens(self) -> float:
        """Tokens of one device in one micro-batch; a row of n tokens has n - 1 to predict from."""
        rows = self.rows / self.micro_batches / rows_parts(self.mesh)
        return rows * (self.length - 1) / self.mesh["context"]

    @property
    def scored(self) -> float:
        """Share of the tokens whose log-probabilities are taken."""
        return self.completion / (self.length - 1) if self.task == "grpo" else 1.0

    @property
    def sampling(self) -> "Work":
        """The same on the sampler's mesh."""
        return (
            self if self.sampler_mesh is None else dataclasses.replace(self, mesh=self.sampler_mesh, sampler_mesh=None)
        )


def rows_parts(mesh: Mapping[str, int]) -> int:
    """Devices over which rows are divided."""
    return math.prod(mesh[axis] for axis in BATCH)


def bytes_of(dtype: str) -> int:
    """Of one number."""
    return jnp.dtype(dtype).itemsize


def heads_of(config: TransformerConfig) -> tuple[int, int]:
    """Width of all query heads, and of all key heads."""
    return config.heads * config.head_size, config.kv_heads * config.head_size


def parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameters by part: embed, attention, ffn, norms, unembed (0 where it is tied)."""
    c, (heads, keys) = config, heads_of(config)
    attention = c.width * (2 * heads + 2 * keys) + c.qkv_bias * (heads + 2 * keys)
    return {
        "embed": c.vocab_size * c.width,
        "attention": c.layers * attention,
        "ffn": c.layers * 3 * c.width * c.ffn,
        "norms": c.layers * (2 * c.width + c.qk_norm * 2 * c.head_size) + c.width,
        "unembed": 0 if c.tie_embeddings else c.vocab_size * c.width,
    }


def layer_matrices(config: TransformerConfig) -> int:
    """Entries of the matrices of all layers."""
    heads, keys = heads_of(config)
    return config.layers * config.width * (2 * heads + 2 * keys + 3 * config.ffn)


def table_entries(config: TransformerConfig, mesh: Mapping[str, int]) -> float:
    """Entries of the embedding, or the unembedding, of one tensor slice; whole where the vocabulary does not divide."""
    divided = config.vocab_size % mesh["tensor"] == 0
    return config.vocab_size * config.width / (mesh["tensor"] if divided else 1)


def own_parameters(config: TransformerConfig, mesh: Mapping[str, int], *, fsdp: bool = True) -> int:
    """Parameters on one device, by `jaxrl.parallel.RULES`: matrices over stage, fsdp and tensor, norms over stage."""
    c, t, (heads, keys) = config, mesh["tensor"], heads_of(config)
    parts = mesh["fsdp"] * t if fsdp else t
    vectors = c.qkv_bias * (heads + 2 * keys) // t + 2 * c.width + c.qk_norm * 2 * c.head_size
    layers = (layer_matrices(c) // parts + c.layers * vectors) // mesh["stage"]
    tables = (1 if c.tie_embeddings else 2) * table_entries(c, mesh) / (mesh["fsdp"] if fsdp else 1)
    return layers + int(tables) + c.width


def pairs(config: TransformerConfig, columns: int, *, causal: bool = True) -> float:
    """Pairs of query and key that one row's attention looks at, summed over layers."""

    def of(reach):
        if not causal:
            return float(columns * columns)
        reach = min(reach, columns)
        return reach * (reach + 1) / 2 + (columns - reach) * reach

    if config.window is None:
        return config.layers * of(columns)
    near = config.layers if config.window_layers is None else len(config.window_layers)
    return near * of(config.window) + (config.layers - near) * of(columns)


def train_flops(work: Work, *, dense: bool = False) -> dict[str, float]:
    """FLOPs of one train step on all devices, by part; products only.

    layers: 2 a parameter and token forward, 4 backward, and what `remat` computes again: "full" all but the last
    product of a layer, "dots" none. attention: two products forward and, as kernels do that keep no scores, five
    backward; again forward under "full" and "dots". unembed: forward, again, and two backward. reference: one forward
    pass. Work that a pipeline does on empty places is left out.

    Args:
      work: the step.
      dense: attention and logits that keep all pairs: no pair is left out, nothing is computed again.
    """
    c, columns = work.config, work.length - 1
    tokens = work.rows * columns
    forward = 2.0 * tokens * layer_matrices(c)
    again = {"none": 0.0, "dots": 0.0, "full": forward - 2.0 * tokens * c.layers * c.width * c.ffn}[c.remat]
    attention = 4.0 * work.rows * pairs(c, columns, causal=not dense) * heads_of(c)[0]
    unembed = 2.0 * tokens * work.scored * c.width * c.vocab_size
    parts = {
        "layers": 3 * forward + again,
        "attention": ((3.0 if dense else 3.5) + (c.remat != "none")) * attention,
        "unembed": (3.0 if dense else 4.0) * unembed,
    }
    if work.reference:
        parts["reference"] = forward + attention + unembed
    return parts


def model_flops(work: Work) -> float:
    """FLOPs that the step needs whatever is computed again: three forward passes (PaLM, arXiv:2204.02311)."""
    plain = dataclasses.replace(work, config=dataclasses.replace(work.config, remat="none"), reference=False)
    parts = train_flops(plain)
    return parts["layers"] + parts["attention"] * 3 / 3.5 + parts["unembed"] * 3 / 4


def sample_flops(work: Work) -> dict[str, float]:
    """FLOPs on all devices of the sampler: all prompts read, and all completions drawn to their full width.

    A drawn token looks at all columns of the cache, as it is laid out in full.
    """
    c = work.config
    prompts, prompt = work.batch // work.group, work.length - work.completion
    scores, logits = 4.0 * heads_of(c)[0] * c.layers * work.length, 2.0 * c.width * c.vocab_size
    each = 2.0 * layer_matrices(c) + scores
    return {
        "prefill": prompts * (prompt * each + logits),
        "decode": (work.completion - 1) * work.batch * (each + logits),
    }
