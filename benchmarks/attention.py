"""Attention on this machine: our dense and tiled forms beside `jax.nn.dot_product_attention`, run in turn.

python benchmarks/attention.py
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, attention

HERE = Path(__file__).parent
FORMS = {
    "dense": partial(attention, mask=Causal(), implementation="reference"),
    "tiled": partial(attention, mask=Causal(), implementation="xla"),
    "jax.nn": partial(jax.nn.dot_product_attention, is_causal=True),
}


def temporary_mb(program) -> float:
    """Megabytes that a compiled program takes beside its arguments and results; NaN where the platform does not say."""
    memory = program.memory_analysis()
    return float("nan") if memory is None else memory.temp_size_in_bytes / 1e6


def compiled(form, backward: bool, arrays):
    """The program of one form, forward or forward and gradients."""
    run = jax.grad(lambda *qkv: form(*qkv).sum(), argnums=(0, 1, 2)) if backward else form
    return jax.jit(run).lower(*arrays).compile()


def measure(length: int, backward: bool, *, rows: int, heads: int, kv_heads: int, size: int, rounds: int) -> list[dict]:
    """Median CPU and wall milliseconds and temporary memory of every form at one length, run in turn."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    programs = {name: compiled(form, backward, arrays) for name, form in FORMS.items()}
    times: dict[str, list] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return [
        {
            "length": length,
            "pass": "forward + backward" if backward else "forward",
            "form": name,
            "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in times[name][1:]),
            "wall_ms": 1e3 * statistics.median(wall for _, wall in times[name][1:]),
            "temporary_mb": temporary_mb(program),
        }
        for name, program in programs.items()
    ]


def table(results: list[dict]) -> str:
    """Markdown: CPU milliseconds and temporary megabytes, one column for each form."""
    lines = ["| T | pass | " + " | ".join(f"{n}, CPU ms / MB" for n in FORMS) + " |", "|" + "---|" * (2 + len(FORMS))]
    for first in range(0, len(results), len(FORMS)):
        rows = results[first : first + len(FORMS)]
        cells = [f"{row['cpu_ms']:.1f} / {row['temporary_mb']:.1f}" for row in rows]
        lines.append(f"| {rows[0]['length']} | {rows[0]['pass']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "attention_results")
    options = parser.parse_args()
    sizes = {"rows": 2, "heads": 8, "kv_heads": 2, "size": 64}
    results = [
        row
        for length in options.lengths
        for backward in (False, True)
        for row in measure(length, backward, rounds=options.rounds, **sizes)
    ]
    about = {
        **sizes,
        "dtype": str(jnp.float32.dtype),
        "rounds": options.rounds,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
    options.out.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
