"""The work that every library does with SmolLM2-135M: the same texts, batches and lengths; standard library only."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

PROMPTS, GROUP, NEW_TOKENS = 8, 4, 64  # GRPO and generation
PAIRS, EXAMPLES, LENGTH = 4, 8, 128  # DPO and SFT; LENGTH in tokens, longer texts are cut
BETA, LEARNING_RATE = 0.04, 1e-6
TASKS = ("generate", "generate_one", "grpo", "sft", "dpo")


def prompts(number: int = 64) -> list[str]:
    """Prompts of equal length, two digits in each number."""
    return [f"What is the sum of {10 + 7 * i % 90} and {10 + 13 * i % 90}? Show every step." for i in range(number)]


def asked(task: str) -> tuple[list[str], int]:
    """Prompts of a generation, and completions of each."""
    return (prompts()[:PROMPTS], GROUP) if task == "generate" else (prompts()[:1], 1)


def texts(number: int = 64) -> list[str]:
    """Texts that are longer than LENGTH tokens."""
    return [" ".join(f"{10 + (7 * i + 3 * j) % 90} and {10 + (5 * i + j) % 90} again," for j in range(40))
            for i in range(number)]  # fmt: skip


def pairs(number: int = 16) -> list[dict]:
    """Prompt, chosen and rejected response, about LENGTH tokens together."""
    sides = texts(2 * number)
    return [
        {"prompt": prompt, "chosen": " " + sides[2 * i][:230], "rejected": " " + sides[2 * i + 1][:230]}
        for i, prompt in enumerate(prompts(number))
    ]


def reward(ids) -> float:
    """Share of even tokens: cheap, and rarely the same for a whole group."""
    return sum(int(token) % 2 == 0 for token in ids) / len(ids)


class Stopwatch:
    """Laps of process CPU time (user + system, all threads) and wall time."""

    def __init__(self):
        self.laps, self.last = [], (time.process_time(), time.perf_counter())

    def lap(self):
        """Ends a lap."""
        now = (time.process_time(), time.perf_counter())
        self.laps.append([b - a for a, b in zip(self.last, now, strict=True)])
        self.last = now


def arguments() -> argparse.Namespace:
    """The flags of the scripts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", type=Path, required=True, help="folder from `jaxrl export smollm2-135m`, or .gguf")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument(
        "--share-prompt", action="store_true", help="jaxrl, grpo: learn with a prompt read once a group"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def report(library: str, options: argparse.Namespace, laps: list, **more):
    """Prints one JSON line; laps are (CPU, wall) seconds of a step."""
    cpu, wall = zip(*laps, strict=True)
    row = {"library": library, "task": options.task, "cpu_s": statistics.median(cpu), "cpu_min_s": min(cpu)}
    row |= {"wall_s": statistics.median(wall), "measured": len(laps), "dtype": options.dtype, **more}
    print(json.dumps(row), file=sys.__stdout__, flush=True)
