"""What `jaxrl plan` counts beside what the compiler makes of the real programs, for chips that are not there.

    python benchmarks/plan/compare.py [CASE ...]     # all cases, or those named; one process each
    python benchmarks/plan/compare.py --table        # the table of what is there, counted anew

Writes results.json (cases that were not run stay) and results.md beside this file. Needs the compilers: pip
install 'jaxrl[aot]'. A large case takes minutes of CPU time and some gigabytes.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SMALL = {"width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536, "vocab_size": 4096}
CASES = {
    # options of `jaxrl plan`, and changes of the model
    "8B, v5e:16x16": ({"mesh": "fsdp=32,tensor=8"}, {}),
    "8B, v5p:4x4x4, fsdp": ({"topology": "v5p:4x4x4", "mesh": "data=2,fsdp=32", "batch": 64}, {}),
    "8B, v5p:4x4x4, dots": (
        {"topology": "v5p:4x4x4", "mesh": "fsdp=16,tensor=4", "batch": 128, "remat": "dots"},
        {},
    ),
    "8B, v5p:4x4x4, context": (
        {"topology": "v5p:4x4x4", "mesh": "fsdp=16,context=4", "batch": 16, "length": 8193},
        {},
    ),
    "8B, v5p:4x4x4, stages": (
        {"topology": "v5p:4x4x4", "mesh": "stage=4,fsdp=16", "batch": 128},
        {},
    ),
    "8B, h100:1x8": ({"topology": "h100:1x8", "mesh": "fsdp=8", "batch": 8}, {}),
    "8B, h100:4x8": ({"topology": "h100:4x8", "mesh": "fsdp=8,tensor=4", "batch": 64}, {}),
    "70B grpo, v5p:8x8x8": (
        {"model": "llama-70b", "topology": "v5p:8x8x8", "mesh": "fsdp=64,tensor=8", "sampler_mesh": "data=64,tensor=8",
         "task": "grpo", "batch": 512},
        {},
    ),
    "V2-Lite, v5p:2x4x4": (
        {"model": "deepseek-v2-lite", "topology": "v5p:2x4x4", "mesh": "fsdp=8,expert=4", "batch": 64, "length": 4096},
        {},
    ),
    "2 layers": ({"topology": "v5e:2x2", "mesh": "fsdp=4", "batch": 8}, {**SMALL, "layers": 2}),
    "2 layers, full effort": (
        {"topology": "v5e:2x2", "mesh": "fsdp=4", "batch": 8, "effort": "full"},
        {**SMALL, "layers": 2},
    ),
    "8 layers": ({"topology": "v5e:2x2", "mesh": "fsdp=4", "batch": 8}, {**SMALL, "layers": 8}),
    "32 layers": ({"topology": "v5e:2x2", "mesh": "fsdp=4", "batch": 8}, {**SMALL, "layers": 32}),
    "4096 tokens": ({"topology": "v5e:2x2", "mesh": "fsdp=4", "batch": 8, "length": 4096}, {**SMALL, "layers": 8}),
    "32 rows": ({"topology": "v5e:2x2", "mesh": "fsdp=4", "batch": 32}, {**SMALL, "layers": 8}),
    "64 devices": ({"topology": "v5e:8x8", "mesh": "data=16,fsdp=4", "batch": 128}, {**SMALL, "layers": 8}),
}  # fmt: skip


def step(case: str):
    """A case's step, and its chips."""
    from jaxrl.plan import chips, command
    from jaxrl.plan.options import Plan

    given, changes = CASES[case]
    options = Plan(**given)
    place = chips.topology(options.topology)
    one = command.work_of(options, place)
    return dataclasses.replace(one, config=dataclasses.replace(one.config, **changes)), place


def measure(case: str) -> list[dict]:
    """What the compiler says: a row for each program of a case."""
    from jaxrl.plan import compiled

    rows = []
    for name, make in compiled.programs(*step(case)).items():
        before = resource.getrusage(resource.RUSAGE_SELF)
        got = compiled.compile_program(name, make(), quick=CASES[case][0].get("effort") != "full")
        after = resource.getrusage(resource.RUSAGE_SELF)
        row = {"case": case, "program": name, "seconds": got.seconds, "gigabytes": after.ru_maxrss / 2**20}
        row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row |= {"memory": got.memory, "flops": got.counts.flops, "kernels": got.counts.kernels}
        rows.append(row | {"traffic": [x._asdict() for x in got.counts.traffic]})
    return rows


def along(traffic, axis: str) -> float:
    """Bytes sent along one axis alone, in MB."""
    return sum(x["bytes"] for x in traffic if list(x["axes"]) == [axis]) / 1e6


def table(rows: list[dict]) -> str:
    """Markdown of the train steps beside what is counted, and of the sampler's programs."""
    from jaxrl.plan import memory, traffic, work

    columns = ["case", "compile s", "CPU s", "GB", "FLOPs of products", "GiB counted", "compiled", "counted / compiled"]
    for axis in ("fsdp", "tensor", "context", "expert"):
        columns += [f"{axis} MB, least", "compiled"]
    columns += ["all MB, least", "compiled"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    others = ["", "| case | program | compile s | CPU s | GiB compiled | MB sent |", "|" + "---|" * 6]
    for row in rows:
        cost, size = [f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}"], row["memory"] / 2**30
        if row["program"] != "train":
            sent = sum(x["bytes"] for x in row["traffic"]) / 1e6
            others.append(f"| {row['case']} | {row['program']} | {' | '.join(cost)} | {size:.2f} | {sent:,.0f} |")
            continue
        one, place = step(row["case"])
        parts = work.train_flops(one)  # attention is a kernel, and on TPUs the head is one, too
        products = parts["layers"] * work.empty_places(one) + (parts["unembed"] if place.chip.kind == "gpu" else 0.0)
        exact = row["flops"] / products * place.devices
        counted = sum(memory.train_memory(one).values()) / 2**30
        cells = [row["case"], *cost, f"{row['gigabytes']:.1f}", f"{exact:.4f} x", f"{counted:.2f}", f"{size:.2f}"]
        cells.append(f"{counted / size:.3f}")
        least = [x._asdict() for x in traffic.train_traffic(one)]
        for axis in ("fsdp", "tensor", "context", "expert"):
            mb = along(least, axis)
            cells += [f"{mb:,.0f}", f"{along(row['traffic'], axis) / mb:.3f} x"] if mb else ["", ""]
        whole, sent = (sum(x["bytes"] for x in found) / 1e6 for found in (least, row["traffic"]))
        cells += [f"{whole:,.0f}", f"{sent / whole:.3f} x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + (others if len(others) > 3 else [])) + "\n"


def main(cases: list[str]) -> None:
    """Runs the cases, each in a process of its own."""
    path = HERE / "results.json"
    found = json.loads(path.read_text()) if path.exists() else []
    for case in cases:
        done = subprocess.run(
            [sys.executable, __file__, "--one", case],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows = json.loads(done.stdout.splitlines()[-1])
        found = [row for row in found if row["case"] != case] + rows
        order = list(CASES)
        found.sort(key=lambda row: order.index(row["case"]))
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(table(rows), flush=True)
    (HERE / "results.md").write_text(table(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main([] if sys.argv[1:] == ["--table"] else sys.argv[1:] or list(CASES))
