"""The two sizes that every library runs, and how a run is timed and reported; standard library only."""

import argparse
import dataclasses
import json
import statistics
import time


@dataclasses.dataclass(frozen=True)
class Case:
    """A Qwen2-like decoder and the batch of one GRPO step."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    new_tokens: int
    prompts: int = 2
    group: int = 4
    prompt_tokens: int = 8
    beta: float = 0.04
    learning_rate: float = 1e-6
    clip_norm: float = 1.0

    @property
    def eos(self) -> int:
        """One past the model's vocabulary: it cannot be drawn, so every completion has `new_tokens` tokens."""
        return self.vocabulary

    def prompt_ids(self, number: int) -> list[list[int]]:
        """`number` prompts that begin with id 1 (Tunix wants a BOS) and hold no id 0 (it pads)."""
        span = self.vocabulary - 1
        return [[1] + [1 + (7 * i + 3 * j + i * j) % span for j in range(1, self.prompt_tokens)] for i in range(number)]


CASES = {
    "tiny": Case(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=64, new_tokens=16),
    "small": Case(layers=4, width=256, heads=4, kv_heads=2, ffn=1024, vocabulary=2048, new_tokens=64),
}


def reward(ids) -> float:
    """Share of even tokens: cheap, and rarely the same for a whole group."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


class Stopwatch:
    """Laps of process CPU time (user + system, all threads) and wall time."""

    def __init__(self):
        self.laps, self.last = [], (time.process_time(), time.perf_counter())

    def lap(self, steps: int = 1):
        """Ends a lap of `steps` equal steps."""
        now = (time.process_time(), time.perf_counter())
        self.laps.append([(b - a) / steps for a, b in zip(self.last, now, strict=True)])
        self.last = now


def arguments() -> argparse.Namespace:
    """The flags of the three scripts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, default=40, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=10, help="steps (the first one apart) that are not measured")
    return parser.parse_args()


def report(library: str, case: str, laps: list, first: float, *, tokens: int, versions: dict, **more):
    """Prints one JSON line: laps are (CPU, wall) seconds of a step, `first` the first step's wall seconds."""
    cpu, wall = zip(*laps, strict=True)
    print(
        json.dumps(
            {
                "library": library,
                "case": case,
                "cpu_s": statistics.median(cpu),
                "cpu_min_s": min(cpu),
                "wall_s": statistics.median(wall),
                "first_step_s": first,
                "measured": len(laps),
                "tokens_per_step": tokens,
                "versions": versions,
                **more,
            }
        )
    )
