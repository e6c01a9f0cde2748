"""What a compiled program does, read from its text: collectives and matrix products, as often as its loops run them.

XLA's own count (`cost_analysis`) sees the body of a loop once, and says nothing of collectives.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line: its result, what it does, to what, and the rest of the line."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Traffic(NamedTuple):
    """Collectives of one kind along the same mesh axes: bytes that each device sends, and how often."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float


class Counts(NamedTuple):
    """Of one device, for one call of the program."""

    flops: float  # of matrix products, those inside of kernels left out
    traffic: tuple[Traffic, ...]
    kernels: dict[str, float]  # calls of kernels that are no XLA operations, by name
    unknown_loops: int  # loops whose number of rounds could not be read; counted once


def shapes(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """(bits of an element, sizes) of each array in a shape, which may be a tuple."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return [(_bits(kind), tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in found]


def size_of(text: str) -> float:
    """Bytes of a shape."""
    return sum(bits * math.prod(sizes) for bits, sizes in shapes(text)) / 8


def _bits(kind: str) -> int:
    number = re.match(r"[a-z]+(\d+)", kind)
    return BITS[kind] if kind in BITS else int(number[1]) if number else 0


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the first one to run."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opening:closing]))
    return Instruction(head[2], shape, rest[:opening], operands, rest[opening:], bool(head[1]))


def _closing(text: str, opening: int) -> int:
    """Place after the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def count(text: str, mesh: Mapping[str, int]) -> Counts:
    """Counts a program's matrix products and collectives.

    Bytes of a collective are those that each device must send over a ring of `n` devices: `(n - 1)/n` of the whole
    array for all-gather, reduce-scatter and all-to-all, twice that for all-reduce, the array for a permutation. A
    ragged all-to-all counts as if every device sent all its rows, evenly. Both branches of a condition count.

    Args:
      text: `compiled.as_text()`.
      mesh: axis names and sizes, in the order of its devices.
    """
    computations, entry = parse(text)
    tables = {name: {i.name: i for i in body} for name, body in computations.items()}
    unknown = set()

    @functools.cache
    def total(name: str) -> tuple[float, dict, dict, dict]:
        flops, sent, calls, kernels = 0.0, defaultdict(float), defaultdict(float), defaultdict(float)
        table, seen = tables[name], set()
        for one in computations[name]:
            kind = one.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU's way to write it
                kind = "reduce-scatter"
            if kind in KINDS:
                axes, n = _group(one, mesh)
                size = sum(size_of(table[x].shape) for x in one.operands)
                if kind == "ragged-all-to-all":  # rows and their place, one of which has room for those of all devices
                    kind, size = "all-to-all", min(size_of(table[x].shape) for x in one.operands[:2])
                sent[kind, axes] += size * _share(kind, n)
                calls[kind, axes] += 1
            elif kind == "dot":
                flops += _dot(one, table)
            elif kind == "convolution":
                flops += _convolution(one, table)
            elif kind == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', one.rest)
                kernels[re.sub(r"\.\d+$", "", one.name) if target and "tpu" in target[1] else (target or " ")[1]] += 1
            for child, times in _children(one, table, tables, unknown):
                inner = total(child)
                flops += times * inner[0]
                # TPUs: a collective beside other work stands in the fusions that begin and end it, and in those between
                parts = _fused(computations[child]) if one.opcode == "fusion" else set()
                again = bool(parts) and (parts <= seen or child.startswith("async_collective_fusion"))
                seen |= parts
                for mine, theirs in zip(
                    (sent, calls, kernels), ({}, {}, inner[3]) if again else inner[1:], strict=True
                ):
                    for key, value in theirs.items():
                        mine[key] += times * value
        return flops, sent, calls, kernels

    flops, sent, calls, kernels = total(entry)
    most = sorted(sent, key=lambda key: -sent[key])
    traffic = tuple(Traffic(kind, axes, sent[kind, axes], calls[kind, axes]) for kind, axes in most)
    return Counts(flops, traffic, dict(kernels), len(unknown))


def _fused(body: list[Instruction]) -> set[tuple[str, ...]]:
    """The collectives that stand in a fusion: kind, channel and shape."""
    found = [(i, re.search(r"channel_id=\d+", i.rest)) for i in body if i.opcode.removesuffix("-start") in KINDS]
    return {(i.opcode, channel[0] if channel else i.name, i.shape) for i, channel in found}


def _children(one: Instruction, table, tables, unknown: set) -> list[tuple[str, float]]:
    """Computations that an instruction calls, and how often."""
    if one.opcode == "while":
        names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", one.rest))
        rounds = _rounds(one, names["condition"], names["body"], table, tables)
        if rounds is None:
            unknown.add(one.name)
        return [(names["body"], 1.0 if rounds is None else rounds)]
    if one.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)
        return [(name.strip().lstrip("%"), 1.0) for name in (branches[1].split(",") if branches else named)]
    if one.opcode in ("fusion", "call", "async-start"):
        return [(name, 1.0) for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", one.rest)]
    return []


def _rounds(one: Instruction, condition: str, body: str, table, tables) -> float | None:
    """Rounds of a loop: written on it, or read from `counter < limit` (at most, where more is asked)."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', one.rest)
    if known:
        return float(known[1])
    test = tables[condition]
    limits = [n for i in test.values() if (n := _constant(i)) is not None]
    places = [
        int(i.rest.rsplit("index=", 1)[1].split(",")[0]) for i in test.values() if "get-tuple-element" in i.opcode
    ]
    if not limits or not places:
        return None
    place = places[0]
    first = _constant(_nth(table.get(one.operands[0]), place, table)) or 0
    root = next(i for i in tables[body].values() if i.root)
    step, after = 1, _nth(root, place, tables[body])
    if after is not None and after.opcode == "add":
        step = next((n for x in after.operands if (n := _constant(tables[body][x]))), 1)
    return float(max(-(-(max(limits) - first) // max(step, 1)), 0))


def _constant(one: Instruction | None) -> int | None:
    found = re.match(r"\((-?\d+)\)", one.rest) if one is not None and one.opcode == "constant" else None
    return int(found[1]) if found else None


def _nth(one: Instruction | None, place: int, table) -> Instruction | None:
    """What stands at a place of a tuple, behind copies."""
    if one is None or one.opcode != "tuple" or place >= len(one.operands):
        return None
    found = table.get(one.operands[place])
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = table.get(found.operands[0])
    return found


def _share(kind: str, n: int) -> float:
    """Bytes sent for each byte of a device's operand."""
    return {
        "all-gather": n - 1.0,
        "all-reduce": 2.0 * (n - 1) / n,
        "reduce-scatter": (n - 1.0) / n,
        "all-to-all": (n - 1.0) / n,
        "collective-permute": 1.0,
    }[kind]


def _group(one: Instruction, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Mesh axes along which a collective goes, and the number of devices that take part with each other."""
    ids = _ids(one.rest)
    whole = math.prod(mesh.values())
    ids = np.arange(whole)[None] if ids is None or not ids.size else ids
    if ids.max() >= whole:
        return ("?",), ids.shape[-1]
    at = np.stack(np.unravel_index(ids, tuple(mesh.values())))
    moves = (at != at[..., :1]).reshape(len(mesh), -1).any(-1)
    return tuple(name for name, moved in zip(mesh, moves, strict=True) if moved), ids.shape[-1]


def _ids(rest: str) -> np.ndarray | None:
    """Groups of devices [groups, members] of a collective, in any of the forms in which they are written; None: all."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return _lists(pairs[1])
    if written := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return _lists(written[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", rest
    ):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        sizes = [int(n) for _, n in axes]
        ids = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(sizes))
        taken = [i for i, (name, _) in enumerate(axes) if f"'{name}'" in named[4]]
        left = [i for i in range(len(axes)) if i not in taken]
        members = math.prod(sizes[i] for i in taken)
        return ids.reshape(sizes).transpose(left + taken).reshape(-1, members)
    return None


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _lists(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)", "{" + text)])


def _sizes(one: Instruction) -> tuple[int, ...]:
    return shapes(one.shape)[0][1]


def _dot(one: Instruction, table) -> float:
    """2 x elements of the result x terms of each."""
    left = _sizes(table[one.operands[0]])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    terms = math.prod(left[i] for i in _numbers(contracted[1])) if contracted and contracted[1] else 1
    return 2.0 * math.prod(_sizes(one)) * terms


def _convolution(one: Instruction, table) -> float:
    """As `_dot`: TPUs write products as convolutions, batch axes as windows that mostly read padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    left, right, out = (_sizes(x) for x in (table[one.operands[0]], table[one.operands[1]], one))
    assert labels, one.rest
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or ["", ""])[1]))
    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    field = lambda name, default: window[name].split("x") if name in window else [default] * 9
    for i in range(len(labels[1]) - 2):
        pad = int(field("pad", "0_0")[i].split("_")[0])
        step, wide, spread = (int(field(name, "1")[i]) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        read = (np.arange(out[labels[3].index(str(i))]) * step)[:, None] - pad
        read = read + np.arange(right[labels[2].index(str(i))])[None] * wide
        inside = (read >= 0) & (read < (left[labels[1].index(str(i))] - 1) * spread + 1) & (read % spread == 0)
        total *= float(inside.sum())
    return total


def by_kind_and_axis(traffic: Sequence[Traffic]) -> dict[str, float]:
    """`{"all-gather fsdp": bytes, ...}`."""
    return {f"{one.kind} {'+'.join(one.axes) or '-'}": one.bytes for one in traffic}
