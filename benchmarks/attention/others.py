"""Schedules of our other TPU kernels by the TPU compiler, decoding beside JAX's paged attention: others.json and .md.

No TPU is needed, but the extra `aot`. What is not measured anew stays as it was. python benchmarks/attention/others.py;
with --one CHIP NAME it is one of the compilations.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxrl.kernels import aot

HERE = Path(__file__).parent
ROWS, LENGTH, HEADS, KEY_HEADS, SIZE = 16, 8192, 32, 8, 128
TOKENS, VOCABULARY, HIDDEN = 4096, 151_936, 1024
KEYS = 1024
"""Decoding: one token of every row over a cache of this length, bfloat16; counted for this many keys of a row. And the
log-probabilities of so many tokens; a step is one tile of 512 tokens and 512 words of the vocabulary."""


def caches(page: int | None, size: int):
    """q, k, v, lengths and block table of a step of decoding."""
    import jax
    import jax.numpy as jnp

    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    cache = (ROWS, LENGTH) if page is None else (ROWS * LENGTH // page, page)
    table = None if page is None else integers(ROWS, LENGTH // page)
    return of(ROWS, 1, HEADS, size), *[of(*cache, KEY_HEADS, size)] * 2, integers(ROWS), table


def ours(page: int | None, size: int = SIZE):
    """`decode_attention`; a step of its grid works on some keys of all heads."""
    from jaxrl.kernels.attention.decode import COLUMNS, decode_attention

    call = functools.partial(decode_attention, implementation="pallas")
    f = lambda q, k, v, lengths, table: call(q, k, v, lengths, block_table=table)
    fit = COLUMNS // KEY_HEADS if size == SIZE else 1024
    return f, caches(page, size), KEYS / (fit if page is None else page * min(8, fit // page))


def of_jax(page: int, pages: int):
    """JAX's paged attention; a turn of its loop works on so many pages of one key head."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    q, k, _, lengths, table = caches(page, SIZE)
    cache = jax.ShapeDtypeStruct((KEY_HEADS, k.shape[0], page, SIZE), jnp.bfloat16)
    f = functools.partial(paged_attention, pages_per_compute_block=pages)
    one = jax.ShapeDtypeStruct((ROWS, HEADS, SIZE), jnp.bfloat16)
    return f, (one, cache, cache, lengths, table), KEYS / (page * pages) * KEY_HEADS


def log_probs(gradients: bool):
    """`token_log_probs`: a step of a kernel's grid works on one tile of logits."""
    import jax
    import jax.numpy as jnp

    from jaxrl.kernels.log_probs import token_log_probs

    def f(hidden, unembedding, targets):
        log_probs, entropy = token_log_probs(hidden, unembedding, targets, implementation="pallas")[:2]
        return jnp.sum(log_probs) + jnp.sum(entropy)

    hidden = jax.ShapeDtypeStruct((1, TOKENS, HIDDEN), jnp.bfloat16)
    unembedding = jax.ShapeDtypeStruct((HIDDEN, VOCABULARY), jnp.bfloat16)
    return (
        jax.grad(f, (0, 1)) if gradients else f,
        (hidden, unembedding, jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)),
        1,
    )


CASES = {
    "decode": (ours, None),
    "decode, heads of 64": (ours, None, 64),
    "decode, pages of 16": (ours, 16),
    "decode, pages of 128": (ours, 128),
    "jax, pages of 16": (of_jax, 16, 32),
    "jax, pages of 128": (of_jax, 128, 4),
    "log-probs": (log_probs, True),
}


def measure(chip: str, name: str) -> list[dict]:
    """Compiles one case in this process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(aot.dump_options(folder) | {"JAX_PLATFORMS": "cpu"})
        build, *arguments = CASES[name]
        f, arrays, steps = build(*arguments)
        program = aot.compile_for(aot.tpu_mesh(chip), f, *arrays)
        vmem = aot.kernel_vmem(program)
        found = aot.schedules(folder)
        memory = program.memory_analysis()
    return [
        {"chip": chip, "case": name, "kernel": kernel, "steps": steps, **x._asdict(), "vmem": vmem.get(kernel)}
        | {"temporary_mb": memory and memory.temp_size_in_bytes / 1e6}
        for kernel, x in found.items()
    ]


def table(rows: list[dict]) -> str:
    """Markdown, a line for each chip and kernel; bundles of decoding for KEYS keys of a row and all its heads."""
    head = "| chip | case | kernel | bundles, first to last product | all bundles | MXU use | spills | VMEM, MB |"
    lines = [head, "|---" * 8 + "|"]
    for r in rows:
        hot, bundles = (f"{r[key] * r['steps'] / 1e3:.1f} k" for key in ("hot", "bundles"))
        lines.append(
            f"| {r['chip']} | {r['case']} | {r['kernel']} | {hot} | {bundles} "
            f"| {r['mxu']:.2f} | {r['spills']:.2f} | {r['vmem'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Compiles and writes, or prints JSON lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "NAME"))
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, default=HERE / "others")
    options = parser.parse_args()
    if options.one:
        for row in measure(*options.one):
            print(json.dumps(row))
        return
    path = options.out.with_suffix(".json")
    rows = json.loads(path.read_text()) if path.exists() else []
    for chip in options.chips:
        for name in options.cases:
            command = [sys.executable, __file__, "--one", chip, name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{chip}, {name}: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
                continue
            rows = [r for r in rows if (r["chip"], r["case"]) != (chip, name)]
            rows += [r for r in map(json.loads, done.stdout.splitlines()) if r["vmem"] is not None]
            order = list(CASES)
            rows.sort(key=lambda r: (r["chip"], order.index(r["case"])))
            path.write_text(json.dumps(rows, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
