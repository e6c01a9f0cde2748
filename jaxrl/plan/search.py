"""Which mesh: all that divide, counted; the best of those that fit."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxrl import parallel
from jaxrl.plan import chips
from jaxrl.plan.memory import memories, peak
from jaxrl.plan.sizes import own_parameters
from jaxrl.plan.traffic import cut_fine, phases
from jaxrl.plan.work import Work, rows_parts

REMATS = ("none", "dots", "full")
PARTS = (1, 2, 4, 8, 16)
"""Micro-batches that are tried."""


class Candidate(NamedTuple):
    """One way to run the step."""

    work: Work
    memory: float  # bytes on a device at the worst moment
    seconds: float  # of a step, all phases, if all overlaps
    serial: float  # if nothing does


def evaluate(work: Work, place: chips.Topology) -> Candidate:
    """Memory and time of a step, counted."""
    each = phases(work, place).values()
    return Candidate(work, peak(work), sum(one.seconds for one in each), sum(one.serial for one in each))


def misfit(work: Work) -> str | None:
    """What does not divide, or None: what `jaxrl.parallel` and the step would refuse, before anything is made."""
    for mesh in (work.mesh, work.sampling.mesh):
        if reason := _indivisible(work, mesh):
            return reason
    parts = rows_parts(work.mesh) * work.micro_batches
    if work.batch % parts:
        over = f" in {work.micro_batches} micro-batches" if work.micro_batches > 1 else ""
        return (
            f"a batch of {work.batch}{over} does not divide over the {rows_parts(work.mesh)} devices of data, fsdp and "
            f"expert; give a multiple of {parts}, or devices to tensor or context"
        )
    return None


def _indivisible(work: Work, mesh: Mapping[str, int]) -> str | None:
    c = work.config
    tables = {
        "tensor": {"heads": c.heads, "kv_heads": c.kv_heads, "ffn": c.ffn},
        "fsdp": {"width": c.width},
        "stage": {"layers": c.layers},
    }
    if c.experts is not None:
        tables["expert"] = {"experts": c.experts.experts}
        tables["tensor"] |= {"experts.ffn": c.experts.ffn, "experts.shared": c.experts.shared}
    for axis, sizes in tables.items():
        for name, size in sizes.items():
            if size % mesh[axis]:
                return f"{name} is {size}, which the {mesh[axis]} devices of mesh axis {axis!r} do not divide"
    if c.dense_layers and mesh["stage"] > 1:
        return f"the first {c.dense_layers} layers are dense, and stages must be alike; choose a mesh without stages"
    try:
        own_parameters(c, mesh)
    except ValueError as error:
        return str(error)
    return None


def meshes(place: chips.Topology, *, experts: bool = False) -> Iterator[dict[str, int]]:
    """Sizes of data, fsdp, context, tensor and, if asked for, expert, whose product is the number of devices.

    All are powers of two but fsdp.
    """
    powers = [2**i for i in range(place.devices.bit_length())]
    for tensor, context, data, expert in itertools.product(powers, powers, powers, powers if experts else [1]):
        taken = tensor * context * data * expert
        if place.devices % taken == 0:
            given = {"data": data, "context": context, "tensor": tensor, "expert": expert}
            given["fsdp"] = place.devices // taken
            yield {axis: given.get(axis, 1) for axis in parallel.AXES}


def search(work: Work, place: chips.Topology, *, own_sampler: bool = False) -> list[Candidate]:
    """All meshes, remats and micro-batches that divide and fit into the chips' memory, the shortest step first.

    A step's time is taken half way between all and nothing overlapping. Meshes that cut finer than a TPU's tiles come
    last.

    Args:
      work: the step; its mesh, remat and micro-batches do not matter.
      place: the chips.
      own_sampler: give each mesh the best `sampler_mesh` beside it.
    """
    found = []
    for sizes in meshes(place, experts=work.config.experts is not None):
        if not _reaches(sizes, place):
            continue
        on_mesh = dataclasses.replace(work, mesh=sizes, micro_batches=1)
        if misfit(on_mesh):
            continue
        if own_sampler:
            on_mesh = dataclasses.replace(on_mesh, sampler_mesh=sampler_mesh(on_mesh, place))
        for parts, remat in itertools.product(PARTS, REMATS):
            config = dataclasses.replace(work.config, remat=remat)
            one = dataclasses.replace(on_mesh, config=config, micro_batches=parts)
            if not misfit(one) and peak(one) <= place.chip.memory:
                found.append(evaluate(one, place))
    fine = lambda one: place.chip.kind == "tpu" and cut_fine(one.work)
    return sorted(found, key=lambda one: (fine(one), one.seconds + one.serial, one.memory))


def sampler_mesh(work: Work, place: chips.Topology) -> dict[str, int] | None:
    """The mesh of data and tensor on which sampling is quickest and fits beside what training holds; None: none."""
    best: tuple[float, dict[str, int] | None] = (math.inf, None)
    for sizes in meshes(place, experts=work.config.experts is not None):
        one = dataclasses.replace(work, sampler_mesh=sizes)
        if sizes["fsdp"] > 1 or sizes["context"] > 1 or misfit(one) or work.batch % rows_parts(sizes):
            continue
        moments = memories(one)
        if max(sum(moments[name].values()) for name in ("sample", "lay out")) <= place.chip.memory:
            each = phases(one, place)
            best = min(best, (each["prefill"].serial + each["decode"].serial, sizes), key=lambda pair: pair[0])
    return best[1]


def _reaches(sizes: Mapping[str, int], place: chips.Topology) -> bool:
    """Whether tensor stays where links are fast, and an axis may cross the slices."""
    if sizes["tensor"] > (place.shape[1] if place.chip.kind == "gpu" else 16):
        return False
    return place.slices == 1 or any(sizes[axis] % place.slices == 0 for axis in ("data", "fsdp"))
