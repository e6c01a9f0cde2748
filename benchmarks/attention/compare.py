"""Our tiles, our dense form, jax.nn and PyTorch in turn, each call in its own process: results.json and results.md.

python benchmarks/attention/compare.py --torch-python ENV/bin/python
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import cases

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import turns  # noqa: E402

NAMES = {"xla": "tiles", "reference": "dense", "jax.nn": "jax.nn", "torch": "torch"}
DENSE_PAIRS = 8 * 2048**2
"""Beyond so many pairs in all rows and heads together the dense forms are left out: they take gigabytes."""


def table(rows: list[dict]) -> str:
    """Markdown, a line for each case and pass: CPU milliseconds and, of the JAX forms, temporary megabytes."""
    head = "| case | pass | " + " | ".join(f"{name}, CPU ms / MB" for name in NAMES.values())
    lines = [head + " | tiles against torch |", "|---" * (len(NAMES) + 3) + "|"]
    for case, which in dict.fromkeys((row["case"], row["pass"]) for row in rows):
        of = {row["library"]: row for row in rows if (row["case"], row["pass"]) == (case, which)}
        cells = []
        for name in NAMES:
            row = of.get(name)
            memory = row and row.get("temporary_mb")
            cells.append("" if row is None else f"{row['cpu_ms']:.1f}" + (f" / {memory:.1f}" if memory else ""))
        ratio = f"{of['xla']['cpu_ms'] / of['torch']['cpu_ms']:.2f} x" if "torch" in of else ""
        lines.append(f"| {case} | {which} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--torch-python", help="interpreter with torch; leave it out to leave torch out")
    parser.add_argument("--cases", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each library, run in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        case = cases.CASES[name]
        forms = ["xla"] + (["reference", "jax.nn"] if case.rows * case.length**2 <= DENSE_PAIRS else [])
        commands = [(options.python, "ours.py", ("--form", form)) for form in forms]
        commands += [(options.torch_python, "with_torch.py", ())] if options.torch_python else []
        for which in cases.PASSES:
            runs: dict[str, list[dict]] = {}
            for _ in range(options.rounds):
                for python, script, more in commands:
                    command = [python, str(HERE / script), name, which, *more]
                    row = turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores())
                    runs.setdefault(row["library"], []).append(row)
            for measured in runs.values():
                middle = {key: statistics.median(row[key] for row in measured) for key in ("cpu_ms", "wall_ms")}
                rows.append(measured[0] | middle | {"cpu_min_ms": min(row["cpu_min_ms"] for row in measured)})
                print(json.dumps(rows[-1]), flush=True)
    about = turns.about(rounds=options.rounds, environment=turns.ONE_THREAD, cores=len(turns.cores()) or None)
    turns.write(options.out, about, rows, table(rows))


if __name__ == "__main__":
    main()
