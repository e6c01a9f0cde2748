"""One step of training, and the FLOPs that it counts to from its sizes alone."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel.pipeline import most_micro_batches
from jaxrl.parallel.sharding import BATCH
from jaxrl.plan.sizes import attention_widths, layer_matrices


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
    chips: str = "tpu"  # "tpu", "gpu" or "cpu", whose compilers keep buffers for other times

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
        """The same on the sampler's mesh; a copy of its own has the type of the computation."""
        if self.sampler_mesh is None:
            return self
        config = dataclasses.replace(self.config, param_dtype=self.config.dtype)
        return dataclasses.replace(self, config=config, mesh=self.sampler_mesh, sampler_mesh=None)


def rows_parts(mesh: Mapping[str, int]) -> int:
    """Devices over which rows are divided."""
    return math.prod(mesh[axis] for axis in BATCH)


def bytes_of(dtype: str) -> int:
    """Of one number."""
    return jnp.dtype(dtype).itemsize


def pipeline_batches(work: Work) -> int:
    """M, into which a pipeline cuts a device's rows; 1 without stages."""
    stages = work.mesh["stage"]
    rows = max(work.rows // (work.micro_batches * rows_parts(work.mesh)), 1)
    return most_micro_batches(rows, stages) if stages > 1 else 1


def empty_places(work: Work) -> float:
    """Work of a pipeline's layers over what is of use: (M + S - 1) / M for S stages."""
    parts = pipeline_batches(work)
    return (parts + work.mesh["stage"] - 1) / parts


def pairs(config: TransformerConfig, columns: int, *, causal: bool = True) -> float:
    """Pairs of query and key that one row's attention looks at, summed over layers."""

    def of(reach):
        if not causal:
            return float(columns * columns)
        reach = min(reach, columns)
        return reach * (reach + 1) / 2 + (columns - reach) * reach

    attending = sum(not kind.linear for kind in config.kinds)
    if config.window is None:
        return attending * of(columns)
    near = attending if config.window_layers is None else len(config.window_layers)
    return near * of(config.window) + (attending - near) * of(columns)


def linear_flops(config: TransformerConfig, *, chunk: int = 128) -> float:
    """FLOPs of a token in all linear layers: its state written and read, and the pairs of its chunk."""
    if config.linear is None:
        return 0.0
    heads, keys, values = config.linear.state(config.heads, config.kv_heads, config.head_size)
    layers = sum(kind.linear for kind in config.kinds)
    return layers * (4.0 * heads * keys * values + heads * chunk * (keys + values))


def train_flops(work: Work, *, dense: bool = False) -> dict[str, float]:
    """FLOPs of one train step on all devices, by part; products only.

    layers: 2 a parameter and token forward, 4 backward, and what `remat` computes again: "full" all but the last
    product of a layer, "dots" none. attention: two products forward and, as kernels do that keep no scores, five
    backward; again forward under "full" and "dots". unembed: forward, again, and two backward. reference: one forward
    pass. Of experts a token meets top_k. Work that a pipeline does on empty places is left out (`empty_places`).

    Args:
      work: the step.
      dense: attention and logits that keep all pairs: no pair is left out, nothing is computed again.
    """
    c, columns = work.config, work.length - 1
    tokens = work.rows * columns
    forward, widths = 2.0 * tokens * layer_matrices(c, active=True), attention_widths(c)
    last = c.layers * c.width * c.ffn if c.experts is None else 0.0
    again = {"none": 0.0, "dots": 0.0, "full": forward - 2.0 * tokens * last}[c.remat]
    attention = 2.0 * work.rows * pairs(c, columns, causal=c.causal and not dense) * (widths.scores + widths.mixed)
    attention += tokens * linear_flops(c)
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

    A drawn token looks at all columns of the cache, as it is laid out in full; latent attention at the latents.
    """
    c = work.config
    prompts, prompt = work.batch // work.group, work.length - work.completion
    matrices, logits = 2.0 * layer_matrices(c, active=True), 2.0 * c.width * c.vocab_size
    widths, latent = attention_widths(c), c.latent
    plain = widths.scores + widths.mixed
    absorbed = plain if latent is None else c.heads * (latent.cached + latent.kv_rank)
    attending = sum(not kind.linear for kind in c.kinds)
    scores = lambda width: 2.0 * width * attending * work.length + linear_flops(c, chunk=1)
    return {
        "prefill": prompts * (prompt * (matrices + scores(plain)) + logits),
        "decode": (work.completion - 1) * work.batch * (matrices + scores(absorbed) + logits),
    }
