"""One step of decoding in JAX, all forms in turn in one process: python benchmarks/decode/ours.py 8x2048

"xla" and "paged" are `decode_attention` over a dense cache and over pages of 16 keys; "dense" is `attention` with a
mask over the whole cache; "jax.nn" is JAX's own function.
"""

import argparse
import functools
import json
import statistics
import time

import cases
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Prefix, attention
from jaxrl.kernels.attention.decode import decode_attention


def programs(case: cases.Case) -> dict:
    """(compiled call, its arrays) by form."""
    kq, kk, kv, kp = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(kq, (case.rows, 1, cases.HEADS, cases.SIZE))
    k, v = (jax.random.normal(key, (case.rows, case.length, cases.KEY_HEADS, cases.SIZE)) for key in (kk, kv))
    lengths = jnp.array(case.lengths(), jnp.int32)
    pages = case.rows * case.length // cases.PAGE
    table = jax.random.permutation(kp, pages).astype(jnp.int32)
    paged = [
        jnp.zeros((pages, cases.PAGE, *x.shape[2:])).at[table].set(x.reshape(pages, cases.PAGE, *x.shape[2:]))
        for x in (k, v)
    ]
    table = table.reshape(case.rows, -1)
    dense = lambda q, k, v, n: attention(q, k, v, mask=Prefix(n), implementation="reference")
    forms = {
        "xla": (functools.partial(decode_attention, implementation="xla"), (q, k, v, lengths)),
        "paged": (
            lambda q, k, v, n, table: decode_attention(q, k, v, n, block_table=table, implementation="xla"),
            (q, *paged, lengths, table),
        ),
        "dense": (dense, (q, k, v, lengths)),
        "jax.nn": (
            lambda q, k, v, n: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=n),
            (q, k, v, lengths),
        ),
    }
    return {name: (jax.jit(call).lower(*arrays).compile(), arrays) for name, (call, arrays) in forms.items()}


def main():
    """Prints one JSON line: median CPU milliseconds and temporary megabytes by form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    parser.add_argument("--least", type=float, default=2.0, help="seconds")
    options = parser.parse_args()
    forms = programs(cases.CASES[options.case])
    laps: dict[str, list[float]] = {name: [] for name in forms}
    results = {}
    begun = time.perf_counter()
    while len(laps["xla"]) < 7 or time.perf_counter() - begun < options.least:
        for name, (call, arrays) in forms.items():
            cpu = time.process_time()
            results[name] = jax.block_until_ready(call(*arrays))
            laps[name].append(1e3 * (time.process_time() - cpu))
    assert all(bool(jnp.allclose(x, results["dense"], atol=1e-5)) for x in results.values())
    line = {}
    for name, (call, _) in forms.items():
        memory = call.memory_analysis()
        line[name] = {
            "cpu_ms": statistics.median(laps[name][2:]),
            "temporary_mb": memory and memory.temp_size_in_bytes / 1e6,
        }
    print(json.dumps({"case": options.case, "rounds": len(laps["xla"]), "forms": line}))


if __name__ == "__main__":
    main()
