"""What NVIDIA's compiler says of attention kernels for the H100, ours and jax's: h100.json and h100.md.

JAX_PLATFORMS=cpu python benchmarks/attention/h100.py

Needs the packages that `kernels/aot_gpu.py` names, and absl-py for jax's own kernel; no GPU. It says nothing of
speed, but what forbids it: spills, products that wait for registers, blocks that do not fit.
"""

import functools
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl.kernels import aot_gpu
from jaxrl.kernels.attention import Causal, Full
from jaxrl.kernels.attention.gpu import mosaic_gpu_attention

HERE = Path(__file__).parent
LENGTH, HEADS, BATCH = 4096, 16, 4
CASES = {"full, D 64": (Full(), 64), "full, D 128": (Full(), 128), "causal, D 64": (Causal(), 64)}
CASES |= {"causal, D 128": (Causal(), 128), "causal, D 256": (Causal(), 256)}
PACKAGES = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


def ours(q, k, v, mask):
    return mosaic_gpu_attention(q, k, v, mask=mask, scale=q.shape[-1] ** -0.5)[0]


def jax_mosaic(q, k, v, mask):
    """jax's kernel in the style of FlashAttention 3: float16 only, no causal gradient."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    causal, wide = isinstance(mask, Causal), q.shape[-1] > 128
    backward = dict.fromkeys(("block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"), 64)
    config = attention_mgpu.TuningConfig(64, 64 if wide else 128, 2, causal=causal, **({} if causal else backward))
    return attention_mgpu.attention(q, k, v, config)


def jax_triton(q, k, v, mask):
    from jax.experimental.pallas.ops.gpu import attention

    sizes = attention.BlockSizes.get_default()
    return attention.mha(q, k, v, segment_ids=None, causal=isinstance(mask, Causal), block_sizes=sizes)


LIBRARIES: dict[str, Callable] = {"ours": ours, "jax Mosaic": jax_mosaic, "jax Triton": jax_triton}
NAMES = {"ours": "attention_", "jax Mosaic": ("entry", "anonymous"), "jax Triton": "mha_"}
FORWARD = ("attention_forward", "entry", "mha_forward")


def rows() -> list[dict]:
    """One for each kernel of each library and case; forward kernels once."""
    mesh, found = aot_gpu.gpu_mesh(), []
    for case, (mask, d) in CASES.items():
        x = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, d), jnp.float16)
        for library, call in LIBRARIES.items():
            f = functools.partial(call, mask=mask)
            for which in ("forward", "gradients"):
                loss = lambda *x, f=f: jnp.sum(f(*x).astype(jnp.float32))  # noqa: E731
                program = f if which == "forward" else jax.grad(loss, (0, 1, 2))
                row = {"case": case, "library": library, "pass": which}
                try:
                    _, kernels = aot_gpu.compile_kernels(mesh, program, x, x, x)
                except Exception as error:  # noqa: BLE001  (what does not compile is a result)
                    found.append(row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]})
                    continue
                for kernel in kernels:
                    if kernel.name.startswith(NAMES[library]) and (which == "forward" or kernel.name not in FORWARD):
                        found.append(row | kernel._asdict() | {"blocks_per_core": kernel.blocks_per_core})
                print(row, flush=True)
    return found


def table(rows: list[dict]) -> str:
    """Markdown, one line for each kernel."""
    head = ["case", "library", "kernel", "registers", "spilled bytes", "shared KiB", "wgmma", "TMA", "blocks a core"]
    lines = ["| " + " | ".join([*head, "warnings"]) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        if "error" in row:
            cells = [f"{row['pass']}: not compiled", *[""] * 6, row["error"].replace("|", "/")]
        else:
            spills = f"{row['spill_stores']} / {row['spill_loads']}"
            shared = f"{row['shared'] / 1024:.0f}" if row["shared"] else "?"
            words = ", ".join(sorted({w.split(")")[0] for w in row["warnings"]}))
            cells = [row["name"], row["registers"], spills, shared, row["products"], row["copies"]]
            cells += [row["blocks_per_core"] if row["shared"] else "?", words]
        lines.append("| " + " | ".join(map(str, [row["case"], row["library"], *cells])) + " |")
    return "\n".join(lines)


def main():
    found = rows()
    versions = {name: version(name) for name in PACKAGES}
    shape = f"float16 [{BATCH}, {LENGTH}, {HEADS}, D]"
    (HERE / "h100.json").write_text(json.dumps({"versions": versions, "shape": shape, "rows": found}, indent=1) + "\n")
    words = ", ".join(f"{name} {number}" for name, number in versions.items())
    (HERE / "h100.md").write_text(f"{shape}; {words}\n\n{table(found)}\n")
    print(table(found))


if __name__ == "__main__":
    main()
