"""Every form at one length: python benchmarks/linear_attention/ours.py 4096 both"""

import argparse
import json
from functools import partial

import cases
import jax

from jaxrl.kernels.attention import attention
from jaxrl.kernels.linear_attention import linear_attention


def call(form: str, t: int):
    """(function of arrays, the arrays)."""
    shape = (1, t, cases.HEADS, cases.SIZE)
    *qkv, noise = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    q, k, v = qkv
    decay = -0.1 * jax.nn.softplus(noise)
    decayed = lambda q, k, v, g: linear_attention(q, k, v, log_decay=g)
    return {
        "plain": (linear_attention, (q, k, v)),
        "normalised": (partial(linear_attention, normalise=True), (jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, v)),
        "by head": (decayed, (q, k, v, decay[..., 0])),
        "by channel": (decayed, (q, k, v, decay)),
        "recurrent": (partial(linear_attention, implementation="recurrent"), (q, k, v)),
        "softmax": (partial(attention, implementation="xla"), (q, k, v)),
    }[form]


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("length", type=int)
    parser.add_argument("which", choices=cases.PASSES)
    options = parser.parse_args()
    rows = []
    for form in cases.FORMS:
        if options.length > cases.LONGEST.get(form, options.length):
            continue
        run, arrays = call(form, options.length)
        if options.which == "both":
            run = jax.value_and_grad(lambda *arrays, run=run: (run(*arrays) ** 2).sum(), tuple(range(len(arrays))))
        program = jax.jit(run).lower(*arrays).compile()
        memory = program.memory_analysis()
        row = {"form": form, "length": options.length, "pass": options.which}
        row |= {"temporary_mb": memory and memory.temp_size_in_bytes / 1e6}
        rows.append(row | {"cpu_ms": cases.timed(lambda: jax.block_until_ready(program(*arrays)))})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
