"""Bytes on one device, by kind, at the worst moment of a step."""

import dataclasses
import math

from jaxrl.plan.sizes import attention_widths, gathered, inner_width, one_layer, own_parameters, table_entries
from jaxrl.plan.work import Work, bytes_of, empty_places, pipeline_batches, rows_parts

MOMENTS = {"float32": 8.0, "bfloat16": 4.0, "int8": 2.03}
"""Bytes of Adam's two moments a parameter."""


def held(work: Work) -> dict[str, float]:
    """What lives from step to step: parameters, optimizer and reference."""
    c = work.config
    divided, whole = (own_parameters(c, work.mesh, fsdp=fsdp) for fsdp in (True, False))
    mine = (divided if work.zero == 3 else whole) * bytes_of(c.param_dtype)
    parts = {"parameters": float(mine), "optimizer": divided * MOMENTS[work.optimizer]}
    return {**parts, "reference": float(mine)} if work.reference else parts


def train_memory(work: Work) -> dict[str, float]:
    """Bytes at the peak of a train step.

    data: the batch, on every device; of grpo only its own rows. activations: what the layers keep for the backward
    pass, of a pipeline's empty places too. copy: of a stage's matrices that fsdp divides, gathered once for all ticks.
    Then the larger of two moments. At the head: the unembedding and its gradient whole on every device of fsdp, in the
    compute type. In a layer's backward pass: gradients in the parameters' type, the layer's matrices and their
    gradients whole, and `working` numbers a token of one of the pipeline's micro-batches. On GPUs the head's buffers
    live through the layers' backward pass. With micro-batches of the update a sum of gradients lives through both.
    """
    c, mesh = work.config, work.mesh
    compute, stored = bytes_of(c.dtype), bytes_of(c.param_dtype)
    gradient = float(own_parameters(c, mesh, fsdp=work.zero > 1) * stored)
    head = 2 * table_entries(c, mesh) * compute + 3 * work.own_tokens * c.width * compute
    at_once = work.own_tokens / pipeline_batches(work)
    layer = 2 * one_layer(c, mesh) * compute + at_once * working(work) * compute
    lent = mesh["stage"] > 1 and mesh["fsdp"] > 1 and work.zero == 3
    data = work.rows * work.length * 8.0
    sums = gradient if work.micro_batches > 1 else 0.0
    busy = {"gradients": sums + gradient, "temporaries": layer}
    if work.chips == "gpu":
        busy["temporaries"] += head
    elif head > gradient + layer:
        busy = {"gradients": sums, "temporaries": head}
    return {
        **held(work),
        "data": data / rows_parts(mesh) if work.task == "grpo" else data,
        "activations": empty_places(work) * work.own_tokens * c.layers / mesh["stage"] * kept(work) * compute,
        **({"copy": gathered(c, mesh) * compute} if lent else {}),
        **busy,
    }


def kept(work: Work) -> float:
    """Numbers a token and layer that are kept for the backward pass.

    "full": the residual stream. "dots": it and the results of the products. "none": also what norms (in float32),
    rotations and SwiGLU leave.
    """
    c, t = work.config, work.mesh["tensor"]
    widths, inner = attention_widths(c), inner_width(c) / t
    return {
        "full": c.width,
        "dots": 2 * c.width + widths.outputs / t + inner,
        "none": 16 * c.width + (2 * widths.queries + widths.outputs) / t + 3 * inner,
    }[c.remat]


def working(work: Work) -> float:
    """Numbers a token that live while the backward pass is in one layer, about: fitted to what libtpu needs.

    Rows that travel to experts have room on each device for those of all devices of the axis `expert`.
    """
    c, t = work.config, work.mesh["tensor"]
    widths = attention_widths(c)
    dense = 5.5 * c.width + (4 * widths.queries + 2 * widths.keys + 2 * widths.values) / t
    if c.experts is None:
        return dense + 5 * c.ffn / t
    routed = work.mesh["expert"] * c.experts.top_k * (6 * c.width + 8 * c.experts.ffn / t)
    return dense + routed + 5 * c.experts.shared / t


def cache_bytes(work: Work) -> float:
    """Keys and values, or states: rows over data, fsdp, expert and context, heads over tensor, latents whole."""
    c, mesh = work.config, work.mesh
    kind = c.cache_dtype or c.dtype
    latent = c.latent
    width, copies = (c.head_size, 2.0 * c.kv_heads / mesh["tensor"]) if latent is None else (latent.cached, 1.0)
    size = width + 4 if kind == "int8" else width * bytes_of(kind)
    rows = math.ceil(work.batch / (rows_parts(mesh) * mesh["context"]))
    attending = sum(not kind.linear for kind in c.kinds)
    states = 0.0
    if c.linear is not None:
        states = 4.0 * (c.layers - attending) * math.prod(c.linear.state(c.heads, c.kv_heads, c.head_size))
    return rows * (attending * copies * work.length * size + states)


def sampler_copy(work: Work) -> dict[str, float]:
    """The parameters once more, where the sampler has a mesh of its own; they live through the whole step."""
    if work.sampler_mesh is None:
        return {}
    one = work.sampling
    return {"sampler's copy": float(own_parameters(one.config, one.mesh) * bytes_of(one.config.param_dtype))}


def sample_memory(work: Work) -> dict[str, float]:
    """Bytes while sampling: what training holds, the sampler's copy, the cache, and for a step the unembedding, one
    layer's matrices and the logits.
    """
    one = work.sampling
    c, mesh = one.config, one.mesh
    compute = bytes_of(c.dtype)
    rows = one.batch / rows_parts(mesh) / mesh["context"]
    stored = bytes_of(c.param_dtype)
    table = table_entries(c, mesh) * (compute + stored * (mesh["fsdp"] > 1 and stored != compute))
    matrices = table + one_layer(c, mesh) * compute
    return {
        **held(work),
        **sampler_copy(work),
        "cache": cache_bytes(one),
        "temporaries": matrices + 3 * rows * c.vocab_size / mesh["tensor"] * 4,
    }


def memories(work: Work) -> dict[str, dict[str, float]]:
    """Bytes by kind of each phase of a step; a copy for the sampler is laid out while the last one is still there."""
    copy = sampler_copy(work)
    found = {"train": {**train_memory(work), **copy}}
    if work.task == "grpo":
        found["sample"] = sample_memory(work)
    if copy:
        found["lay out"] = {**held(work), **{f"{name}, old and new": 2 * size for name, size in copy.items()}}
    return found


def peak(work: Work) -> float:
    """Bytes at the worst moment."""
    return max(sum(parts.values()) for parts in memories(work).values())


def largest_batch(work: Work, memory: float) -> int:
    """The largest batch that fits into `memory` bytes a device, of those that divide; 0 if none does."""
    parts = rows_parts(work.mesh) * work.micro_batches
    step = math.lcm(parts, work.group)
    fits = lambda many: peak(dataclasses.replace(work, batch=many * step)) <= memory
    low, high = 0, 1
    while fits(high) and high * step < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step
