"""Our expert layer against forms that waste or drop, and against a dense layer of the same FLOP: results.json and .md.

python benchmarks/moe/compare.py
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
    """Markdown, a line for each case and pass: CPU milliseconds and temporary megabytes of each form."""
    head = "| case | pass | " + " | ".join(f"{form}, CPU ms / MB" for form in cases.FORMS)
    others = cases.FORMS[1:]
    lines = [head + " | " + " | ".join(f"{form} against ours" for form in others) + " |"]
    lines.append("|---" * (2 + len(cases.FORMS) + len(others)) + "|")
    for case, which in dict.fromkeys((row["case"], row["pass"]) for row in rows):
        of = {row["form"]: row for row in rows if (row["case"], row["pass"]) == (case, which)}
        cells = [f"{of[form]['cpu_ms']:.1f} / {of[form]['temporary_mb'] or 0:.1f}" for form in cases.FORMS]
        cells += [f"{of[form]['cpu_ms'] / of['grouped']['cpu_ms']:.2f} x" for form in others]
        lines.append(f"| {case} | {which} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--cases", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each form, run in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        for which in cases.PASSES:
            command = [options.python, str(HERE / "layers.py"), case, which, "--rounds", str(options.rounds)]
            measured = turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores())
            rows += measured
            print(*map(json.dumps, measured), sep="\n", flush=True)
    about = turns.about(rounds=options.rounds, environment=turns.ONE_THREAD, cores=len(turns.cores()) or None)
    turns.write(options.out, about, rows, table(rows))


if __name__ == "__main__":
    main()
