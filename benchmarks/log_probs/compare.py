"""Log-probabilities from hidden states: all logits at once against our tiles, on one core: results.json and results.md.

python benchmarks/log_probs/compare.py
"""

import argparse
import json
import sys
from pathlib import Path

import forms

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import turns  # noqa: E402

NAMES = {"naive": "naive", "reference": "reference", "xla": "tiles"}


def table(results: list[dict]) -> str:
    """Markdown, a line for each case and pass."""
    head = "| case | tokens, D, V | pass | " + " | ".join(f"{name}, CPU ms / MB" for name in NAMES.values())
    head += " | tiles against naive: time | memory | against reference: time | memory |"
    lines = [head, "|---" * (len(NAMES) + 7) + "|"]
    for result in results:
        of = {row["form"]: row for row in result["rows"]}
        cells = [f"{of[name]['cpu_ms']:.0f} / {of[name]['temporary_mb']:.1f}" for name in NAMES]
        for name in ("naive", "reference"):
            time, memory = (of["xla"][key] / of[name][key] for key in ("cpu_ms", "temporary_mb"))
            cells += [f"{time:.2f} x", f"1/{1 / memory:.0f}"]
        shape = ", ".join(str(n) for n in forms.CASES[result["case"]])
        lines.append(f"| {result['case']} | {shape} | {result['pass']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", default=list(forms.CASES), choices=forms.CASES)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each form, run in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    results = []
    for case in options.cases:
        for which in forms.PASSES:
            command = [sys.executable, str(HERE / "forms.py"), case, which, "--rounds", str(options.rounds)]
            results.append(turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores()))
            print(json.dumps(results[-1]), flush=True)
            about = turns.about(rounds=options.rounds, environment=turns.ONE_THREAD, cores=len(turns.cores()) or None)
            options.out.with_suffix(".json").write_text(
                json.dumps({"about": about, "results": results}, indent=1) + "\n"
            )
            options.out.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
