"""Every agent on every environment that it has settings for, five seeds each, against the published return.

python benchmarks/agents/learning.py                    # all, into runs/learning, then the table; resumes
python benchmarks/agents/learning.py --only ppo dqn     # these agents; the table holds whatever has been run

A row is what `jaxrl sweep AGENT --env ENV` trains.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from jaxrl import runs
from jaxrl.agents import training
from jaxrl.agents.presets import PRESETS

THRESHOLDS = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -100.0,
    "Pendulum-v1": -200.0,
    "MountainCarContinuous-v0": 90.0,
    ("dqn", "Acrobot-v1"): -110.0,
    **{(agent, "Pendulum-v1"): -250.0 for agent in ("ppo", "trpo", "a2c")},
}
"""Greedy returns near those published for tuned agents (tables of CleanRL and RL Baselines3 Zoo), by environment, or
by agent and environment."""


def row(folder: Path) -> str:
    """The table's line of one finished run."""
    summary = json.loads((folder / runs.SUMMARY).read_text())
    agent, env, group = summary["kind"], summary["config"]["env"], summary["groups"][0]
    threshold = THRESHOLDS.get((agent, env), THRESHOLDS.get(env))
    reached = "" if threshold is None else "yes" if group["mean"] >= threshold else "no"
    returns = ", ".join(f"{member['return']:.0f}" for member in summary["members"])
    cells = [
        agent,
        env,
        f"{summary['env_steps']:,}",
        f"{group['mean']:.1f}",
        f"{group['low']:.1f} .. {group['high']:.1f}",
        returns,
        "" if threshold is None else f"{threshold:g}",
        reached,
        f"{summary['seconds']:.0f}",
        f"`jaxrl sweep {agent} --env {env}`",
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Trains and writes learning.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="agents; empty takes all")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("learning.md"))
    options = parser.parse_args()
    folders = []
    for agent, env in PRESETS:
        folder = options.runs / f"{agent}-{env}"
        wanted = not options.only or agent in options.only
        if wanted and not (folder / runs.SUMMARY).exists():
            run = dataclasses.replace(training.options(agent, env), seeds=5, out=str(folder))
            training.train(agent, run, resume=(folder / runs.CONFIG).exists())
        if (folder / runs.SUMMARY).exists():
            folders.append(folder)
    head = "| agent | environment | env steps | mean | 95 % interval | seeds | published | reached | s | command |"
    text = "\n".join([head, "|---" * 10 + "|", *map(row, folders)])
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
