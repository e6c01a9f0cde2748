"""Chips and what connects them, as published; and the short names of machines, such as `v5e:16x16`.

Figures of TPUs: Google Cloud's pages of each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). A
link is half of "bidirectional ICI bandwidth per chip" divided by the links; v4's 2400 Gbps a chip likewise. `memory` is
what libtpu 0.0.42 lets a program use, as it says when one needs more. H100: NVIDIA's data sheet (SXM5, 80 GB, bfloat16
without sparsity, 400 Gbps of InfiniBand a GPU).
"""

import difflib
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device, as JAX counts them."""

    name: str
    kind: str  # "tpu", "gpu" or "cpu"
    flops: float  # bfloat16, a second
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes a second to and from them
    link: float  # bytes a second over one link, one way; of a GPU, over all of NVLink
    network: float  # bytes a second between slices or hosts
    torus: int = 0  # dimensions; two links each
    wraps: int = 0  # dimensions that are a multiple of so many chips are rings, others lines
    largest: tuple[int, ...] = ()
    per_chip: int = 1  # devices of a chip
    options: tuple[tuple[str, str], ...] = ()  # of the topology, for the compiler


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 30.75 * GIB, 1228e9, 50e9, 6.25e9, 3, 4, (16, 16, 16), 1,
             (("chip_config_name", "megacore"),)),
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 2, 16, (16, 16)),
        Chip("v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, 3, 4, (16, 16, 24)),
        Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, 2, 16, (16, 16)),
        Chip("tpu7x", "tpu", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9 / 2, 12.5e9 / 2, 3, 4, (16, 24, 24), 2),
        Chip("h100", "gpu", 989.4e12, 79.1 * GIB, 3352e9, 450e9, 50e9),
        Chip("cpu", "cpu", 50e9, 2 * GIB, 10e9, 5e9, 5e9),
    )
}  # fmt: skip
"""By name. `cpu`: made-up figures of one fake device; only its counts mean something."""


class Topology(NamedTuple):
    """Chips of one kind: slices of a torus of TPUs, hosts x GPUs, or fake CPU devices."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return math.prod(self.shape) * self.chip.per_chip * self.slices

    @property
    def name(self) -> str:
        """As `topology` reads it."""
        times = f"{self.slices}x" if self.slices > 1 else ""
        return f"{times}{self.chip.name}:{'x'.join(map(str, self.shape))}"


def topology(name: str) -> Topology:
    """Reads `v5e:16x16`, `v5p:8x8x8`, `2xv5e:16x16` (two slices), `h100:4x8` (hosts x GPUs of a host) or `cpu:8`.

    Raises:
      ValueError: an unknown chip, with the nearest; a shape with other dimensions than the chip's, or too large.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name.strip().lower())
    kind = found[2] if found else name.strip().lower().partition(":")[0]
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"topology {name!r}: unknown chip {kind!r}, expected one of {', '.join(CHIPS)}{hint}")
    if not found:
        raise ValueError(
            f"topology {name!r}; expected CHIP:SHAPE, such as {example(CHIPS[kind])} (2x before it: slices)"
        )
    chip, shape, slices = CHIPS[kind], tuple(int(n) for n in found[3].split("x")), int(found[1] or 1)
    dimensions = {"tpu": chip.torus, "gpu": 2, "cpu": 1}[chip.kind]
    if len(shape) != dimensions or 0 in shape or slices < 1:
        raise ValueError(
            f"topology {name!r} has the shape {found[3]}; {kind} takes {dimensions} positive sizes, such as "
            f"{example(chip)}"
        )
    if chip.largest and any(n > most for n, most in zip(sorted(shape), sorted(chip.largest), strict=True)):
        most = "x".join(map(str, chip.largest))
        raise ValueError(f"topology {name!r} is larger than one slice of {kind}, {most}; give several: 2x{kind}:{most}")
    if slices > 1 and chip.kind != "tpu":
        raise ValueError(f"topology {name!r}: only TPUs come in slices; give {kind}:{found[3]} a larger shape")
    return Topology(chip, shape, slices)


def example(chip: Chip) -> str:
    """A topology of the chip."""
    if chip.kind == "tpu":
        return f"{chip.name}:{'x'.join(['4'] * chip.torus)}"
    return "h100:2x8" if chip.kind == "gpu" else "cpu:8"


def bandwidths(place: Topology, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes a second that a device can send along each mesh axis with more than one device.

    TPUs: an axis that covers whole dimensions of the torus uses both links of each (one, where the dimension is no
    ring); one that shares a dimension with others has a line in it. The last axes get the first dimensions that fit,
    as `jax.make_mesh` lays them out. GPUs: NVLink while an axis and those after it fit into a host, else the host's
    network. Across slices, the outermost axis that the slices divide goes over the data-centre network.
    """
    chip, found, inner, inside = place.chip, {}, 1, place.chip.per_chip
    crossing = over_slices(place, mesh)
    dimensions = [place.shape[i] for i in range(chip.torus)]
    for axis in reversed(list(mesh)):
        n = mesh[axis]
        if n == 1:
            continue
        inner *= n
        if axis == crossing:
            found[axis] = chip.network
        elif chip.kind == "gpu":
            found[axis] = chip.link if inner <= place.shape[1] else chip.network
        elif chip.kind == "cpu":
            found[axis] = chip.link
        else:
            inside, n = (1, n // inside) if n % inside == 0 else (inside, n)  # the devices of a chip first
            taken = _covering(dimensions, n)
            for size in taken:
                dimensions.remove(size)
            rings = sum(2 if size % chip.wraps == 0 else 1 for size in taken)
            found[axis] = chip.link * max(rings, 1)
    return found


def over_slices(place: Topology, mesh: Mapping[str, int]) -> str | None:
    """The mesh axis that goes from slice to slice.

    Raises:
      ValueError: no axis of the batch or of layers is a multiple of the slices.
    """
    if place.slices == 1:
        return None
    for axis in ("stage", "data", "fsdp"):
        if mesh[axis] % place.slices == 0:
            return axis
    raise ValueError(
        f"{place.name} has {place.slices} slices, and none of stage, data and fsdp is a multiple of that; give data "
        f"{place.slices}"
    )


def _covering(dimensions: list[int], n: int) -> list[int]:
    """The fewest dimensions whose product is n; none if there are none."""
    for mask in sorted(range(1, 2 ** len(dimensions)), key=int.bit_count):
        chosen = [size for i, size in enumerate(dimensions) if mask >> i & 1]
        if math.prod(chosen) == n:
            return chosen
    return []
