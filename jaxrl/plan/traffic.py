"""Bytes that move, and seconds at the chips' peak rates: over the network, to and from memory."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl.plan import chips
from jaxrl.plan.hlo import Traffic
from jaxrl.plan.memory import MOMENTS, cache_bytes, working
from jaxrl.plan.sizes import attention_widths, gathered, own_parameters, table_entries
from jaxrl.plan.work import Work, bytes_of, empty_places, pipeline_batches, rows_parts, sample_flops, train_flops

LANES = 128
"""Width of a TPU's tile: a matrix cut finer along its last axis is gathered by an all-reduce, at twice the bytes."""


def cut_fine(work: Work) -> bool:
    """Whether fsdp cuts the model's width finer than a TPU's tile; `train_traffic` does not know of that."""
    return work.mesh["fsdp"] > 1 and work.zero == 3 and work.config.width // work.mesh["fsdp"] % LANES > 0


def train_traffic(work: Work) -> tuple[Traffic, ...]:
    """The least that a train step sends from each device, by kind and axis (bytes as in `hlo.count`).

    fsdp: the layers' matrices gathered forward and backward and the unembedding once, their gradients reduce-scattered,
    in the compute type; the embedding's rows exchanged for its columns. With zero 2 and 1 gradients in the compute
    type, then the new parameters. A pipeline gathers once for all its ticks, and reduce-scatters in each. data, expert
    and context: gradients all-reduced. tensor: two all-reduces of the residual stream a layer forward, two backward,
    one again under "full"; one for the embedding and one for the head. expert: the rows of a token's experts there and
    back, forward and backward, and again what remat leaves. context: keys and values around the ring forward, again
    under remat, and with their gradients (float32) backward. stage: the residual stream to the next, forward and
    backward.
    """
    c, n, rounds = work.config, work.mesh, work.micro_batches
    item, stored = bytes_of(c.dtype), bytes_of(c.param_dtype)
    share = lambda axis: (n[axis] - 1) / n[axis]
    table = table_entries(c, n) * item
    layers = gathered(c, n) * item
    every = layers + table * (1 if c.tie_embeddings else 2)
    stream = work.own_tokens * c.width * item
    each, again = c.layers / n["stage"], c.remat != "none"
    found: list[Traffic] = []

    def add(kind, axis, size, times=1.0):
        if n[axis] > 1:
            found.append(Traffic(kind, (axis,), float(size), float(times)))

    if work.zero == 3:
        ticks = pipeline_batches(work) + n["stage"] - 1
        passes = (2 if n["stage"] == 1 else 1) + work.reference
        sent = passes * layers + (1 + work.reference) * table
        add("all-gather", "fsdp", rounds * sent * share("fsdp"), rounds * passes)
        add("reduce-scatter", "fsdp", rounds * (ticks * layers + table) * share("fsdp"), rounds * ticks)
        add("all-to-all", "fsdp", rounds * 2 * stream * share("fsdp"), rounds * 2)
    else:
        kind, times = ("reduce-scatter", 1) if work.zero == 2 else ("all-reduce", 2)
        add(kind, "fsdp", times * every * share("fsdp"))
        add("all-gather", "fsdp", every / item * stored * share("fsdp"))
    for axis in ("data", "expert", "context"):
        add("all-reduce", axis, 2 * every / (n["fsdp"] if work.zero > 1 else 1) * share(axis))
    times = rounds * ((4 + (c.remat == "full") + 2 * work.reference) * each + 2)
    add("all-reduce", "tensor", times * 2 * stream * share("tensor"), times)
    if c.experts is not None:
        rows = rounds * (c.layers - c.dense_layers) / n["stage"] * (4 + again * 2 + work.reference * 2)
        add("all-to-all", "expert", rows * c.experts.top_k * stream * share("expert"), rows)
    widths = attention_widths(c)
    keys = work.own_tokens * (widths.keys + widths.values) / n["tensor"]
    forward, hops = 1 + again + work.reference, rounds * each * (n["context"] - 1)
    add("collective-permute", "context", hops * keys * ((forward + 1) * item + 4), hops * (forward + 1))
    add("collective-permute", "stage", rounds * 2 * stream, 2 * rounds)
    return tuple(found)


def sample_traffic(work: Work) -> tuple[Traffic, ...]:
    """The least that one drawn token of every row sends: the matrices gathered over fsdp, two all-reduces a layer."""
    c, n = work.config, work.mesh
    item = bytes_of(c.dtype)
    rows = work.batch / rows_parts(n) / n["context"]
    found = []
    if n["fsdp"] > 1 and work.zero == 3:
        size = _matrices(work) * item * (n["fsdp"] - 1) / n["fsdp"]
        found.append(Traffic("all-gather", ("fsdp",), size, 1.0))
    if n["tensor"] > 1:
        times = 2.0 * c.layers + 1
        size = times * 2 * rows * c.width * item * (n["tensor"] - 1) / n["tensor"]
        found.append(Traffic("all-reduce", ("tensor",), size, times))
    return tuple(found)


def _matrices(work: Work) -> float:
    """Entries of all matrices, those of all experts here too, on one device of a stage's tensor slices."""
    return gathered(work.config, work.mesh) * work.mesh["stage"] + table_entries(work.config, work.mesh)


def train_bytes(work: Work) -> float:
    """Bytes to and from memory in a train step, about: matrices and activations of every pass, and the update."""
    c = work.config
    passes = 3 + (c.remat == "full") + work.reference
    numbers = _matrices(work) / work.mesh["stage"] + work.own_tokens * c.layers / work.mesh["stage"] * working(work)
    update = own_parameters(c, work.mesh) * (4 * bytes_of(c.param_dtype) + 2 * MOMENTS[work.optimizer])
    return work.micro_batches * passes * 2 * numbers * bytes_of(c.dtype) + update


class Roofline(NamedTuple):
    """Seconds of one device: what each resource needs for its part."""

    compute: float
    memory: float
    network: dict[str, float]  # by mesh axis

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory, or a mesh axis."""
        named = {"compute": self.compute, "memory": self.memory, **self.network}
        return max(named, key=lambda name: named[name])

    @property
    def seconds(self) -> float:
        """If all overlap."""
        return max(self.compute, self.memory, *self.network.values())

    @property
    def serial(self) -> float:
        """If compute and every axis wait for each other."""
        return max(self.compute, self.memory) + sum(self.network.values())


def roofline(
    flops: float, moved: float, sent: tuple[Traffic, ...], place: chips.Topology, mesh: Mapping[str, int]
) -> Roofline:
    """From FLOPs and bytes of one device, its peak rates, and the links along each axis of the mesh."""
    speed = chips.bandwidths(place, mesh)
    network: dict[str, float] = {}
    for one in sent:
        for axis in one.axes:
            network[axis] = network.get(axis, 0.0) + one.bytes / speed[axis]
    return Roofline(flops / place.chip.flops, moved / place.chip.bandwidth, network)


def phases(work: Work, place: chips.Topology) -> dict[str, Roofline]:
    """Rooflines of a step's phases: train; for grpo, prefill and decode before it."""
    devices = math.prod(work.mesh.values())
    parts = train_flops(work)
    flops = (sum(parts.values()) + (empty_places(work) - 1) * (parts["layers"] + parts["attention"])) / devices
    found = {"train": roofline(flops, train_bytes(work), train_traffic(work), place, work.mesh)}
    if work.task == "grpo":
        one, steps = work.sampling, work.completion - 1
        gathers = one.mesh["fsdp"] > 1 and one.zero == 3  # else parameters are read as they are stored
        sent = sample_traffic(one)
        moved = _matrices(one) * bytes_of(one.config.dtype if gathers else one.config.param_dtype)
        many = tuple(x._replace(bytes=x.bytes * steps) for x in sent)
        flops = sample_flops(one)
        read = [x._replace(bytes=x.bytes * _prompt(one)) if x.kind == "all-reduce" else x for x in sent]
        found["prefill"] = roofline(flops["prefill"] / devices, moved, tuple(read), place, one.mesh)
        decode = steps * (moved + cache_bytes(one))
        found["decode"] = roofline(flops["decode"] / devices, decode, many, place, one.mesh)
    return found


def _prompt(work: Work) -> float:
    """Tokens of prompts for each row that decodes."""
    return (work.length - work.completion) / work.group
