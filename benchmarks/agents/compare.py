"""Whole trainings of jaxrl, PureJaxRL, Rejax and SB3 in turn, each in its own process: results.json and results.md.

python benchmarks/agents/compare.py --rejax-python A/bin/python --purejaxrl CHECKOUT/purejaxrl --sb3-python B/bin/python
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


def summary(rows: list[dict]) -> dict:
    """Medians over the processes of one library and case; the least CPU time beside them."""
    middle = {
        name: statistics.median(row[name] for row in rows) for name in ("trace_s", "compile_s", "cpu_s", "wall_s")
    }
    return {**rows[0], **middle, "cpu_min_s": min(row["cpu_min_s"] for row in rows), "processes": len(rows)}


def table(results: list[dict]) -> str:
    """Markdown, one row for each case and library."""
    head = "| case | library | env steps per CPU s | ours against it | trace + compile s | ours against it |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in results:
        ours = next(r for r in results if r["case"] == row["case"] and r["library"] == "jaxrl")
        built, own = row["trace_s"] + row["compile_s"], ours["trace_s"] + ours["compile_s"]
        lines.append(
            f"| {row['case']} | {row['library']} | {row['steps'] / row['cpu_s']:,.0f} | "
            f"{row['cpu_s'] / row['steps'] / (ours['cpu_s'] / ours['steps']):.2f} x | "
            + (f"{built:.1f} | {built / own:.2f} x |" if built else "none | |")
        )
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--rejax-python", help="interpreter with rejax and gymnax 0.0.9; serves PureJaxRL too")
    parser.add_argument("--purejaxrl", help="folder of a PureJaxRL checkout that holds ppo.py")
    parser.add_argument("--sb3-python", help="interpreter with stable-baselines3")
    parser.add_argument("--cases", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each library, run in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()

    libraries = [(options.python, "ours.py", ())]
    if options.purejaxrl:
        libraries.append((options.rejax_python, "with_purejaxrl.py", ("--source", options.purejaxrl)))
    libraries += [(options.rejax_python, "with_rejax.py", ()), (options.sb3_python, "with_sb3.py", ())]
    results = []
    for name in options.cases:
        runs: dict[str, list[dict]] = {}
        for _ in range(options.rounds):
            for python, script, more in libraries:
                if python is None or (script == "with_purejaxrl.py" and cases.CASES[name].agent != "ppo"):
                    continue
                row = turns.measure(
                    [python, str(HERE / script), name, *more], environment=turns.ONE_THREAD, cores=turns.cores()
                )
                runs.setdefault(script, []).append(row)
                print(json.dumps(row), flush=True)
        results += [summary(rows) for rows in runs.values()]
    about = turns.about(rounds=options.rounds, environment=turns.ONE_THREAD, cores=len(turns.cores()) or None)
    turns.write(options.out, about, results, table(results))


if __name__ == "__main__":
    main()
