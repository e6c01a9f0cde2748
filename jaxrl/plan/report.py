"""The figures of a plan as one dictionary, and as tables."""

import math
from collections.abc import Mapping
from typing import Any

from jaxrl.display import Display
from jaxrl.plan import chips, hlo
from jaxrl.plan.compiled import Compiled
from jaxrl.plan.memory import held, largest_batch, memories, sampler_copy
from jaxrl.plan.sizes import parameters
from jaxrl.plan.traffic import LANES, cut_fine, phases, train_traffic
from jaxrl.plan.work import Work, model_flops, train_flops

GIB = 2**30


def mesh_name(sizes: Mapping[str, int]) -> str:
    """`fsdp=64,tensor=4`; axes of size 1 left out."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"


def figures(work: Work, place: chips.Topology, done: Mapping[str, Compiled | str]) -> dict[str, Any]:
    """All figures of one way to run a step.

    Args:
      work: the step.
      place: the chips.
      done: compiled programs by name, or why one does not fit; empty where nothing was compiled.
    """
    counts, each, memory = parameters(work.config), phases(work, place), memories(work)
    seconds = sum(one.seconds for one in each.values())
    copy = sum(sampler_copy(work).values())
    beside = sum(held(work).values()) - (0 if copy else held(work)["parameters"])  # while sampling
    said = {
        name: one if isinstance(one, str) else read(one, copy if name == "train" else beside)
        for name, one in done.items()
    }
    needed = [math.inf if isinstance(one, str) else one["memory"] + one["code"] for one in said.values()]
    worst = max([*needed, *(sum(parts.values()) for name, parts in memory.items() if not done or name == "lay out")])
    return {
        "topology": place.name,
        "devices": place.devices,
        "mesh": mesh_name(work.mesh),
        "sampler_mesh": mesh_name(work.sampling.mesh) if work.task == "grpo" else None,
        "remat": work.config.remat,
        "micro_batches": work.micro_batches,
        "parameters": {**counts, "all": sum(counts.values())},
        "memory_limit": place.chip.memory,
        "memory": memory,
        "fits": worst <= place.chip.memory,
        "largest_batch": largest_batch(work, place.chip.memory),
        "train_flops": {name: flops / place.devices for name, flops in train_flops(work).items()},
        "train_traffic": hlo.by_kind_and_axis(train_traffic(work)),
        "phases": {name: {**one._asdict(), "bound": one.bound, "seconds": one.seconds, "serial": one.serial}
                   for name, one in each.items()},
        "step_seconds": seconds,
        "step_seconds_serial": sum(one.serial for one in each.values()),
        "tokens_per_second": work.rows * (work.length - 1) / seconds,
        "most_mfu": model_flops(work) / place.devices / place.chip.flops / each["train"].seconds,
        "compiled": said,
        "hints": hints(work, place),
    }  # fmt: skip


def read(one: Compiled, beside: float = 0.0) -> dict[str, Any]:
    """What the compiler says; `memory` with what lives beside the program, as in the counted phases."""
    counts = one.counts
    return {
        **{name: value for name, value in one._asdict().items() if name not in ("name", "counts")},
        "beside": beside,
        "memory": one.memory + beside,
        "flops": counts.flops,
        "traffic": hlo.by_kind_and_axis(counts.traffic),
        "kernels": counts.kernels,
        "unknown_loops": counts.unknown_loops,
    }


def hints(work: Work, place: chips.Topology) -> list[str]:
    """What the sizes alone let one expect to go badly."""
    found = []
    fsdp, width = work.mesh["fsdp"], work.config.width
    if place.chip.kind == "tpu" and cut_fine(work):
        found.append(
            f"fsdp={fsdp} cuts width {width} into pieces of {width // fsdp}, no multiple of {LANES}: the compiler "
            f"gathers them by all-reduce, which sends twice as much; at most fsdp={width // LANES} avoids it"
        )
    one = work.sampling
    if work.task == "grpo" and one.mesh["fsdp"] > 1 and one.zero == 3:
        found.append(
            "every drawn token gathers all parameters over fsdp; --sampler-mesh auto finds a mesh that does not"
        )
    return found


def show(found: Mapping[str, Any], title: str, display: Display) -> None:
    """Prints the tables of one way."""
    parts = f"{found['micro_batches']} micro-batch{'es' if found['micro_batches'] > 1 else ''}"
    sampling = f", sampling on {found['sampler_mesh']}" if found["sampler_mesh"] not in (None, found["mesh"]) else ""
    display.note(
        f"{title}: {found['parameters']['all']:,} parameters on {found['devices']} devices of {found['topology']}; "
        f"{found['mesh']}{sampling}, remat {found['remat']}, {parts}"
    )
    tables(found, display)
    for hint in found["hints"]:
        display.note(f"hint: {hint}")
    verdict = "fits" if found["fits"] else "does not fit"
    least, most = found["step_seconds"], found["step_seconds_serial"]
    display.note(
        f"{verdict}; largest batch that fits, counted: {found['largest_batch']:,}. A step takes at least {least:.3g} s "
        f"({most:.3g} s if nothing overlaps): at most {found['tokens_per_second']:,.0f} tokens/s, and "
        f"{100 * found['most_mfu']:.0f} % MFU in training"
    )


def tables(found: Mapping[str, Any], display: Display) -> None:
    """Memory, FLOPs and traffic, and seconds."""
    _memory(found, display)
    _train(found, display)
    _time(found, display)


def _memory(found: Mapping[str, Any], display: Display) -> None:
    limit = found["memory_limit"]
    cells = lambda size: (f"{size / GIB:.3f}", f"{100 * size / limit:.1f} %")
    rows = []
    for phase, parts in found["memory"].items():
        rows += [(phase, kind, *cells(size)) for kind, size in parts.items()]
        rows.append((phase, "all, counted", *cells(sum(parts.values()))))
    for program, one in found["compiled"].items():
        if isinstance(one, str):
            rows.append((program, one, "-", "too much"))
            continue
        parts = ("arguments", "temporaries", "code", "beside")
        rows += [(program, f"compiled: {name}", *cells(one[name])) for name in parts if one[name]]
        rows.append((program, "all, compiled", *cells(one["memory"])))
    display.table(f"memory of one device: {limit / GIB:.2f} GiB", ("phase", "kind", "GiB", "of it"), rows)


def _train(found: Mapping[str, Any], display: Display) -> None:
    train = found["compiled"].get("train")
    read = train if isinstance(train, dict) else {"traffic": {}, "kernels": {}, "unknown_loops": 0}
    rows = [(f"FLOPs of {name}", f"{flops:.4g}", "") for name, flops in found["train_flops"].items()]
    if "flops" in read:
        where = "FLOPs outside of kernels" if any(name.islower() for name in read["kernels"]) else "FLOPs"
        rows.append((where, "", f"{read['flops']:.4g}"))
    counted, seen = found["train_traffic"], read["traffic"]
    for name in dict.fromkeys([*counted, *(name for name, size in seen.items() if size > 1e-3 * max(seen.values()))]):
        left, right = (f"{side[name] / 1e6:,.1f}" if name in side else "" for side in (counted, seen))
        rows.append((f"MB sent, {name}", left, right))
    if read["unknown_loops"]:
        rows.append(("loops of unknown length, counted once", "", str(read["unknown_loops"])))
    display.table("one device's train step", ("", "counted", "compiled"), rows)


def _time(found: Mapping[str, Any], display: Display) -> None:
    each = found["phases"]
    axes = list(dict.fromkeys(axis for one in each.values() for axis in one["network"]))
    rows = []
    for phase, one in each.items():
        network = [f"{one['network'][axis]:.3g}" if axis in one["network"] else "" for axis in axes]
        rows.append((phase, f"{one['compute']:.3g}", f"{one['memory']:.3g}", *network, one["bound"]))
    display.table("seconds of a step at peak rates", ("phase", "compute", "memory", *axes, "bound"), rows)


def compare(results: list[dict[str, Any]], display: Display) -> None:
    """A line for each way."""
    rows = []
    for one in results:
        counted = max(sum(parts.values()) for parts in one["memory"].values())
        read = [x["memory"] for x in one["compiled"].values() if isinstance(x, dict)]
        size = f"{max(read) / GIB:.2f}" if read else "-"
        fits = "yes" if one["fits"] else "no"
        seconds = (f"{one['step_seconds']:.3g}", f"{one['step_seconds_serial']:.3g}")
        rows.append(
            (one["mesh"], one["remat"], str(one["micro_batches"]), f"{counted / GIB:.2f}", size, fits, *seconds)
        )
    columns = ("mesh", "remat", "parts", "GiB counted", "compiled", "fits", "step s", "serial")
    display.table("the best, compiled", columns, rows)
