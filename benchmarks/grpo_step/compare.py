"""Runs the GRPO step of three libraries in turn, each in its own process, and writes results.json and results.md.

python benchmarks/grpo_step/compare.py --trl-python ENV/bin/python --tunix-python ENV/bin/python
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


def summary(runs: list[dict]) -> dict:
    """Medians over the runs of one library and case; the least CPU time beside them."""
    middle = {name: statistics.median(run[name] for run in runs) for name in ("cpu_s", "wall_s", "first_step_s")}
    return {**runs[0], **middle, "cpu_min_s": min(run["cpu_min_s"] for run in runs), "runs": len(runs)}


def table(results: list[dict]) -> str:
    """Markdown, one row for each case and library."""
    head = "| case | library | CPU ms per step | least | wall ms | CPU against ours | first step s | tokens |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in results:
        ours = next(r for r in results if r["case"] == row["case"] and r["library"] == "jaxrl")
        times = [f"{1e3 * row[name]:.1f}" for name in ("cpu_s", "cpu_min_s", "wall_s")]
        ratio = f"{row['cpu_s'] / ours['cpu_s']:.1f} x"
        cells = [row["case"], row["library"], *times, ratio, f"{row['first_step_s']:.1f}", str(row["tokens_per_step"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--trl-python", help="interpreter with trl")
    parser.add_argument("--tunix-python", help="interpreter with google-tunix")
    parser.add_argument("--cases", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each library, run in turn")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of a process")
    parser.add_argument("--default-threads", action="store_true", help="use all cores and threads")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()

    libraries = (
        (options.python, "ours.py"),
        (options.trl_python, "with_trl.py"),
        (options.tunix_python, "with_tunix.py"),
    )
    environment = {} if options.default_threads else turns.ONE_THREAD
    cores = set() if options.default_threads else turns.cores()
    results = []
    for case in options.cases:
        runs: dict[str, list[dict]] = {}
        for _ in range(options.rounds):
            for python, script in libraries:
                if python is not None:
                    command = [python, str(HERE / script), case, "--steps", str(options.steps)]
                    row = turns.measure(command, environment=environment, cores=cores)
                    runs.setdefault(script, []).append(row)
                    print(json.dumps(runs[script][-1]), flush=True)
        results += [summary(rows) for rows in runs.values()]
    about = turns.about(rounds=options.rounds, steps=options.steps, environment=environment, cores=len(cores) or None)
    turns.write(options.out, about, results, table(results))


if __name__ == "__main__":
    main()
