"""Linear attention beside our tiles of softmax attention, in turn in one process a length: results.json, results.md.

python benchmarks/linear_attention/compare.py
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


def table(rows: list[dict]) -> str:
    """Markdown, a line for each length and pass: CPU milliseconds and temporary megabytes."""
    lines = ["| tokens | pass | " + " | ".join(f"{form}, CPU ms / MB" for form in cases.FORMS)]
    lines = [lines[0] + " | softmax against plain | softmax against by head |", "|---" * (len(cases.FORMS) + 4) + "|"]
    for length, which in dict.fromkeys((row["length"], row["pass"]) for row in rows):
        of = {row["form"]: row for row in rows if (row["length"], row["pass"]) == (length, which)}
        cells = [f"{of[f]['cpu_ms']:.1f} / {of[f]['temporary_mb']:.1f}" if f in of else "" for f in cases.FORMS]
        cells += [f"{of['softmax']['cpu_ms'] / of[form]['cpu_ms']:.1f} x" for form in ("plain", "by head")]
        lines.append(f"| {length} | {which} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(cases.LENGTHS))
    parser.add_argument("--rounds", type=int, default=2, help="processes for each length and pass")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    rows = []
    for length in options.lengths:
        for which in cases.PASSES:
            command = [options.python, str(HERE / "ours.py"), str(length), which]
            runs = [
                turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores())["rows"]
                for _ in range(options.rounds)
            ]
            for measured in zip(*runs, strict=True):
                rows.append(measured[0] | {"cpu_ms": statistics.median(row["cpu_ms"] for row in measured)})
                print(json.dumps(rows[-1]), flush=True)
    about = turns.about(rounds=options.rounds, environment=turns.ONE_THREAD, cores=len(turns.cores()) or None)
    turns.write(options.out, about, rows, table(rows))


if __name__ == "__main__":
    main()
