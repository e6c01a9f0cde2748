"""The matrix products of our tiles alone, forward, beside the whole of our tiles and of PyTorch, in turn.

python benchmarks/attention/floor.py --torch-python ENV/bin/python; with --products CASE it is one of the programs.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import cases

HERE = Path(__file__).parent
SIDE = 256
sys.path.append(str(HERE.parent))
import turns  # noqa: E402


def products(case: cases.Case):
    """The program and its arrays: for each tile the product with keys, kept in memory, and the one with values."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    n = case.length // SIDE
    heads = case.rows * cases.HEADS
    q, k, v = (jax.random.normal(key, (heads, n, SIDE, cases.SIZE)) for key in jax.random.split(jax.random.key(0), 3))

    def run(q, k, v):
        def one_block(head, i):
            def visit(j, o):
                return o + lax.optimization_barrier(q[head, i] @ k[head, j].T) @ v[head, j]

            return lax.fori_loop(0, i + 1 if case.causal else n, visit, jnp.zeros((SIDE, cases.SIZE)))

        return lax.map(lambda head: lax.map(lambda i: one_block(head, i), jnp.arange(n)), jnp.arange(heads))

    return jax.jit(run).lower(q, k, v).compile(), (q, k, v)


def main():
    """Prints a table, or one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch-python", help="interpreter with torch")
    parser.add_argument("--products", choices=cases.CASES)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.products:
        import jax

        program, arrays = products(cases.CASES[options.products])
        print(json.dumps(cases.timed(lambda: jax.block_until_ready(program(*arrays)))))
        return
    print("| case, forward | products alone, CPU ms | tiles | torch | products against torch |\n|---|---|---|---|---|")
    for name in cases.CASES:
        commands = {
            "products": [sys.executable, str(HERE / "floor.py"), "--products", name],
            "tiles": [sys.executable, str(HERE / "ours.py"), name, "forward"],
            "torch": [options.torch_python, str(HERE / "with_torch.py"), name, "forward"],
        }
        laps: dict[str, list[float]] = {key: [] for key in commands}
        for _ in range(options.rounds):
            for key, command in commands.items():
                row = turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores())
                laps[key].append(row["cpu_ms"])
        ms = {key: statistics.median(values) for key, values in laps.items()}
        cells = " | ".join(f"{ms[key]:.1f}" for key in commands)
        print(f"| {name} | {cells} | {ms['products'] / ms['torch']:.2f} x |", flush=True)


if __name__ == "__main__":
    main()
