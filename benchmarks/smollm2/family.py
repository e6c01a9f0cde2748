"""Runs of SmolLM2-135M on the arithmetic set, side by side: family.json, family.md and family.png from their folders.

    python problems.py problems.jsonl
    for v in grpo dr_grpo dapo gspo cispo rloo kimi; do
      jaxrl train grpo --init smollm2-135m --data problems.jsonl --reward number --held-out 300 --steps 100 --chunk 5 \\
        --eval-every 20 --save-every 0 --grpo.prompts 32 --grpo.group 16 --grpo.sampling.max-tokens 32 \\
        --optimizer.learning-rate 1e-5 --grpo.variant $v --seed 1 --out runs/$v-1
    done
    python family.py runs/*        # reads metrics.jsonl of each; without arguments draws family.json again
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
NAMES = {"eval/reward": "held-out accuracy, greedy", "reward/mean": "accuracy of samples",
         "policy/entropy": "entropy (nats a token)", "completion/length": "length (tokens)"}  # fmt: skip
LAST = 10  # steps whose mean is the end of a curve


def read(folder: Path) -> dict:
    """The curves of one run, and what it was."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    options = config.get("config", config.get("options", config))
    curves = {name: [[row["step"], round(row[name], 4)] for row in rows if row.get(name) is not None] for name in NAMES}
    samples = sum("reward/mean" in row for row in rows) * options["grpo"]["prompts"] * options["grpo"]["group"]
    about = {"variant": options["grpo"]["variant"], "seed": options["seed"]}
    about |= {"learning_rate": options["optimizer"]["learning_rate"], "seconds": round(rows[-1]["time/elapsed"], 1)}
    return about | {"samples": samples, "curves": curves}


def table(runs: list[dict]) -> str:
    """Markdown: a line for each run."""
    lines = ["| variant | seed | learning rate | held-out accuracy, before / after | samples right | entropy | length "
             "| samples | seconds |", "|---" * 9 + "|"]  # fmt: skip
    for run in runs:
        held_out = run["curves"]["eval/reward"]
        ends = [np.mean([value for _, value in run["curves"][name][-LAST:]]) for name in list(NAMES)[1:]]
        about = f"| {run['variant']} | {run['seed']} | {run['learning_rate']:g} "
        lines.append(
            f"{about}| {held_out[0][1]:.3f} / {held_out[-1][1]:.3f} "
            f"| {ends[0]:.2f} | {ends[1]:.2f} | {ends[2]:.1f} | {run['samples']:,} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict], path: Path) -> None:
    """Four panels, a line for each run."""
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(run["variant"] for run in runs))
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, NAMES.items(), strict=True):
        named = set()
        for run in runs:
            steps, values = np.array(run["curves"][name]).T
            colour, first = f"C{variants.index(run['variant'])}", run["variant"] not in named
            named.add(run["variant"])
            axes.plot(steps, values, color=colour, linewidth=1.2, label=run["variant"] if first else None)
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step of 32 prompts x 16 samples")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct on 1,500 small arithmetic problems", fontsize=11)
    figure.savefig(path, dpi=120)


def main():
    """Reads, writes, draws."""
    file = HERE / "family.json"
    if sys.argv[1:]:
        runs = [read(Path(name)) for name in sys.argv[1:]]
        runs.sort(key=lambda run: (run["learning_rate"], run["variant"], run["seed"]))
        file.write_text(json.dumps(runs) + "\n")
    runs = json.loads(file.read_text())
    (HERE / "family.md").write_text(table(runs) + "\n")
    print(table(runs))
    draw(runs, HERE / "family.png")


if __name__ == "__main__":
    main()
