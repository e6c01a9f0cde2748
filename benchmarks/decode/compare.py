"""A step of decoding over caches of several sizes, forms in turn, each case in its own process: results.json and .md.

python benchmarks/decode/compare.py
"""

import argparse
import json
import sys
from pathlib import Path

import cases

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import turns  # noqa: E402


def table(rows: list[dict]) -> str:
    """Markdown, a line for each case: CPU milliseconds and temporary megabytes of each form."""
    names = list(rows[0]["forms"])
    head = "| rows x cache | " + " | ".join(f"{name}, CPU ms / MB" for name in names)
    lines = [head + " | xla against dense | paged against dense |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        forms = row["forms"]
        cells = [f"{form['cpu_ms']:.3f} / {form['temporary_mb']:.1f}" for form in forms.values()]
        ratios = [f"{forms[name]['cpu_ms'] / forms['dense']['cpu_ms']:.2f} x" for name in ("xla", "paged")]
        lines.append(f"| {row['case']} | " + " | ".join(cells + ratios) + " |")
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--cases", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--least", default="2.0", help="seconds for each case")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        command = [options.python, str(HERE / "ours.py"), name, "--least", options.least]
        rows.append(turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores()))
        print(json.dumps(rows[-1]), flush=True)
    about = turns.about(environment=turns.ONE_THREAD, cores=len(turns.cores()) or None)
    turns.write(options.out, about, rows, table(rows))


if __name__ == "__main__":
    main()
