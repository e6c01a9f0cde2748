"""What masks save: completions that share their prompt, and a sliding window, in our XLA form; CPU milliseconds.

OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 1 python benchmarks/attention/masks.py
"""

import json
import statistics
import time

import cases
import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import Causal, Tree, Window
from jaxrl.kernels.attention.blocked import BAND, blocked_attention

PROMPT, COMPLETION, GROUP = 1024, 128, 8
LENGTH, WINDOW = 8192, 512


def program(mask, rows: int, length: int, gradients: bool, **options):
    """(the compiled call, its arrays)."""
    shape = (rows, length, cases.HEADS, cases.SIZE)
    q, k, v, weights = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    run = lambda q, k, v: blocked_attention(q, k, v, mask=mask, scale=cases.SIZE**-0.5, **options)[0]
    loss = lambda q, k, v: (run(q, k, v) * weights).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)) if gradients else run).lower(q, k, v).compile(), (q, k, v)


def products(gradients: bool):
    """The matrix products of the window alone, 64 queries with the 576 keys that they may see: (call, arrays)."""
    side, held = BAND["cpu"], lax.optimization_barrier
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), (*shape, cases.SIZE))
    blocks = cases.HEADS * LENGTH // side
    arrays = draw(0, blocks, side), draw(1, blocks, side), draw(2, WINDOW + side), draw(3, WINDOW + side)

    def run(q, do, k, v):
        def step(sums, block):
            q, do = block
            o = held(q @ k.T) @ v
            if not gradients:
                return sums, o
            p, ds = held((do @ k.T, do @ v.T))
            return (q.T @ ds, do.T @ p), o + ds @ k

        return lax.scan(step, (jnp.zeros_like(k.T), jnp.zeros_like(k.T)), (q, do))

    return jax.jit(run).lower(*arrays).compile(), arrays


def in_turn(programs: dict, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each, run in turn."""
    laps: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, (call, arrays) in programs.items():
            begun = time.process_time()
            jax.block_until_ready(call(*arrays))
            laps[name].append(1e3 * (time.process_time() - begun))
    return {name: round(statistics.median(times[1:]), 1) for name, times in laps.items()}


def main():
    """Prints a JSON line for each mask and pass."""
    total = PROMPT + GROUP * COMPLETION
    own_end = PROMPT + (jnp.arange(GROUP * COMPLETION, dtype=jnp.int32) // COMPLETION + 1) * COMPLETION
    tree = Tree(jnp.concatenate([jnp.full(PROMPT, total, jnp.int32), own_end])[None])
    for gradients in (False, True):
        shared = {
            "one tree": program(tree, 1, total, gradients),
            "rows": program(Causal(), GROUP, PROMPT + COMPLETION, gradients),
        }
        near = {
            "window": program(Window(WINDOW), 1, LENGTH, gradients),
            "in tiles": program(Window(WINDOW), 1, LENGTH, gradients, band=0),
            "products": products(gradients),
            "causal": program(Causal(), 1, LENGTH, gradients),
        }
        print(json.dumps({"gradients": gradients} | in_turn(shared, 5) | in_turn(near, 5)), flush=True)


if __name__ == "__main__":
    main()
