"""Schedules of our TPU kernels beside those of JAX's splash attention, by the TPU compiler: tpu.json and tpu.md.

No TPU is needed, but the extra `aot`. What is not measured anew stays as it was. python benchmarks/attention/tpu.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LENGTH, SIDE = 8192, 1024
SIZES = {"64": (64, 64), "128": (128, 128), "192 / 128": (192, 128), "256": (256, 256)}
SPLASH_BLOCKS = {
    "v5e": ((1024, 256), (1024, 1024)),
    "v5p": ((1024, 256), (1024, 1024)),
    "v6e": ((1024, 512), (1024, 1024)),
}
"""Side and keys at a time: what Tokamax's tuner chose for v5p, and one more for the backward pass. On v6e it chose a
side of 2048, whose schedule is longer."""


def measured(*command: str) -> list[dict]:
    """The JSON lines of one compilation, or nothing where the compiler refuses."""
    done = subprocess.run([sys.executable, str(HERE / "schedule.py"), *command], capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
        return []
    return [row for row in map(json.loads, done.stdout.splitlines()) if "pass" in row]


def causal_bundles(library: str, rows: dict[str, dict], side: int) -> float:
    """Bundles for one head of a causal sequence, from the first to the last matrix product of each tile."""
    blocks = LENGTH // side
    if library == "splash":
        return rows["causal"]["hot"] * blocks * (blocks + 1) / 2
    full = rows["full"]["hot"]  # the causal kernel holds both forms of a tile, one after the other
    return full * blocks * (blocks - 1) / 2 + (rows["causal"]["hot"] - full) * blocks


def traffic(library: str, which: str, side: int, size: int, value: int) -> float:
    """HBM megabytes of the same, bfloat16, by what the index maps fetch and write."""
    blocks = LENGTH // side
    live, pair = blocks * (blocks + 1) / 2, 2 * (size + value)
    if which == "forward":
        return (LENGTH * pair + live * side * pair) / 1e6
    partial = blocks * LENGTH * size * 2 * 2 if library == "splash" else LENGTH * size * 2  # dq: written and read again
    return (live * side * pair + 2 * LENGTH * pair + partial) / 1e6


def best(chip: str, library: str, size: int, value: int) -> list[dict]:
    """The shortest schedule of each pass."""
    shape = ("--size", str(size), "--value-size", str(value)) + (("--vmem",) if size == value == 128 else ())
    found = []
    for block in (None,) if library == "ours" else SPLASH_BLOCKS[chip]:
        more = ("--block", *map(str, block)) if block else ()
        runs = {mask: measured(chip, library, *shape, *more, "--mask", mask)
                for mask in (("causal", "full") if library == "ours" else ("causal",))}  # fmt: skip
        side = block[0] if block else SIDE
        for which in ("forward", "backward"):
            rows = {mask: row for mask, lines in runs.items() for row in lines if row["pass"] == which}
            if len(rows) < len(runs):
                continue
            found.append(
                {"chip": chip, "library": library, "size": size, "value_size": value, "pass": which}
                | {"block": block or [SIDE], "causal_bundles": causal_bundles(library, rows, side)}
                | {"traffic_mb": traffic(library, which, side, size, value)}
                | {"schedules": {mask: row | {"side": side} for mask, row in rows.items()}}
            )
    best = [min((r for r in found if r["pass"] == which), key=lambda r: r["causal_bundles"], default=None)
            for which in ("forward", "backward")]  # fmt: skip
    return [row for row in best if row]


def table(rows: list[dict]) -> str:
    """Markdown, a line for each chip, size and pass."""
    head = "| chip | head | pass | ours, k bundles | splash, k bundles | ratio | MXU use, ours / splash "
    head += "| spills, ours / splash | VMEM, ours / splash, MB | HBM, ours / splash, MB |"
    lines = [head, "|---" * 10 + "|"]
    for key in dict.fromkeys((r["chip"], r["size"], r["value_size"], r["pass"]) for r in rows):
        pair = {r["library"]: r for r in rows if (r["chip"], r["size"], r["value_size"], r["pass"]) == key}
        if len(pair) < 2:
            continue
        a, b = pair["ours"], pair["splash"]
        x, y = (r["schedules"].get("full", r["schedules"]["causal"]) for r in (a, b))
        size = str(key[1]) if key[1] == key[2] else f"{key[1]} / {key[2]}"
        both = lambda f: " / ".join(f(r) for r in (x, y))
        lines.append(
            f"| {key[0]} | {size} | {key[3]} | {a['causal_bundles'] / 1e3:.0f} | {b['causal_bundles'] / 1e3:.0f} "
            f"| {a['causal_bundles'] / b['causal_bundles']:.2f} | {both(lambda r: format(r['mxu'], '.2f'))} "
            f"| {both(lambda r: format(r['spills'], '.2f'))} "
            f"| {both(lambda r: format(r['vmem'] / 1e6, '.1f')) if y['vmem'] else ''} "
            f"| {a['traffic_mb']:.1f} / {b['traffic_mb']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Compiles and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--out", type=Path, default=HERE / "tpu")
    options = parser.parse_args()
    path = options.out.with_suffix(".json")
    anew = {(chip, *SIZES[name]) for chip in options.chips for name in options.sizes}
    before = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in before if (row["chip"], row["size"], row["value_size"]) not in anew]
    for chip in options.chips:
        for name in options.sizes:
            for library in ("ours", "splash"):
                rows += best(chip, library, *SIZES[name])
                path.write_text(json.dumps(rows, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
