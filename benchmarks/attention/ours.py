"""Attention in JAX: python benchmarks/attention/ours.py causal-1x2048 both --form xla"""

import argparse
import json
from functools import partial

import cases
import jax

from jaxrl.kernels.attention import Causal, Full, attention

FORMS = ("xla", "reference", "jax.nn")


def form(name: str, causal: bool):
    """`attention` by a named implementation, or JAX's own function."""
    if name == "jax.nn":
        return partial(jax.nn.dot_product_attention, is_causal=causal)
    return partial(attention, mask=Causal() if causal else Full(), implementation=name)


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    parser.add_argument("which", choices=cases.PASSES)
    parser.add_argument("--form", choices=FORMS, default="xla")
    options = parser.parse_args()
    case = cases.CASES[options.case]
    shape = (case.rows, case.length, cases.HEADS, cases.SIZE)
    q, k, v, weights = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    run = form(options.form, case.causal)
    if options.which == "both":
        run = jax.value_and_grad(lambda q, k, v: (form(options.form, case.causal)(q, k, v) * weights).sum(), (0, 1, 2))
    program = jax.jit(run).lower(q, k, v).compile()
    memory = program.memory_analysis()
    line = {"library": options.form, "case": options.case, "pass": options.which}
    line |= {"temporary_mb": memory and memory.temp_size_in_bytes / 1e6}
    print(json.dumps(line | cases.timed(lambda: jax.block_until_ready(program(q, k, v)))))


if __name__ == "__main__":
    main()
