"""Attention on an NVIDIA GPU, ours beside jax's, cuDNN's and PyTorch's: gpu.json and gpu.md.

python benchmarks/attention/gpu.py                     # all cases
python benchmarks/attention/gpu.py --only "causal 128" --libraries ours torch

Times are the medians of rounds in turn; in each, a program is called until 20 ms of work are queued. TFLOP/s count two
products forward and five backward (the gradients are timed with the forward pass: seven), over the pairs that the
mask allows.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.kernels.attention import Causal, Full, Segments, Tree, Window, attention

HERE = Path(__file__).parent
CASES = {  # mask, B, T, query heads, key heads, D, Dv
    "causal 128": ("causal", 4, 4096, 16, 16, 128, 128),
    "causal 128 long": ("causal", 1, 16384, 16, 16, 128, 128),
    "full 128": ("full", 4, 4096, 16, 16, 128, 128),
    "causal 64": ("causal", 2, 8192, 32, 32, 64, 64),
    "causal 256": ("causal", 2, 8192, 8, 8, 256, 256),
    "causal 128 gqa": ("causal", 4, 4096, 32, 8, 128, 128),
    "mla 192 / 128": ("causal", 4, 4096, 16, 16, 192, 128),
    "window 128": ("window", 2, 8192, 16, 16, 128, 128),
    "packed 128": ("packed", 2, 8192, 16, 16, 128, 128),
    "tree 128": ("tree", 1, 5120, 16, 16, 128, 128),
}
WINDOW, PIECES, PROMPT, GROUP = 512, 8, 1024, 8


def segments(t: int) -> np.ndarray:
    """PIECES documents of unequal lengths in each row."""
    ends = np.cumsum(np.arange(1, PIECES + 1))
    return np.searchsorted(ends * t / ends[-1], np.arange(t), side="right").astype(np.int32)


def ends_of_group(t: int) -> np.ndarray:
    """A prompt of PROMPT tokens and GROUP answers."""
    answer = (t - PROMPT) // GROUP
    k = np.arange(t)
    return np.where(k < PROMPT, t, PROMPT + ((k - PROMPT) // answer + 1) * answer).astype(np.int32)


def mask_of(name: str, b: int, t: int):
    """The mask, and how many pairs it allows in one row."""
    rows = lambda x: np.broadcast_to(x, (b, t))  # noqa: E731
    q, k = np.arange(t)[:, None], np.arange(t)[None]
    ids, end = segments(t), ends_of_group(t)
    masks = {
        "full": (Full(), lambda: t * t),
        "causal": (Causal(), lambda: t * (t + 1) // 2),
        "window": (Window(WINDOW), lambda: np.sum((k <= q) & (q - k < WINDOW))),
        "packed": (Causal() & Segments(rows(ids)), lambda: np.sum((k <= q) & (ids[:, None] == ids[None]))),
        "tree": (Tree(rows(end)), lambda: np.sum((k <= q) & (q < end[None]))),
    }
    mask, pairs = masks[name]
    return mask, int(pairs())


def ours(implementation, name, x):
    mask = mask_of(name, *x[0].shape[:2])[0]
    return jax_program(lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation), x)


def jax_program(f, x):
    """(forward, forward and gradients) as compiled programs without arguments."""
    do = jax.random.normal(jax.random.key(9), jax.eval_shape(f, *x).shape, x[0].dtype)

    def gradients(do, *x):
        return jax.vjp(f, *x)[1](do)

    both = jax.jit(f).lower(*x).compile(), jax.jit(gradients).lower(do, *x).compile()
    return (lambda: both[0](*x), lambda: both[1](do, *x)), jax.block_until_ready


def jax_mosaic(name, x):
    """jax's kernel in the style of FlashAttention 3: float16 only, no causal gradient."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    if name not in ("full", "causal") or x[0].shape[-1] != x[2].shape[-1]:
        raise NotImplementedError(f"{name}, D {x[0].shape[-1]} / {x[2].shape[-1]}")
    wide, causal = x[0].shape[-1] > 128, name == "causal"
    config = attention_mgpu.TuningConfig(64, 64 if wide else 128, 2, causal=causal)
    forward = jax.jit(lambda q, k, v: attention_mgpu.attention(q, k, v, config))
    x = [a.astype(jnp.float16) for a in x]
    compiled = forward.lower(*x).compile()
    return (lambda: compiled(*x), None), jax.block_until_ready


def in_torch(x):
    """The arrays on PyTorch's side, [B, H, T, D]."""
    import torch

    return [torch.from_dlpack(jax.block_until_ready(a)).transpose(1, 2).contiguous().requires_grad_() for a in x]


def torch_program(f, q, k, v):
    import torch

    do = torch.randn_like(f(q, k, v))

    def forward():
        with torch.no_grad():
            return f(q, k, v)

    return (forward, lambda: torch.autograd.grad(f(q, k, v), (q, k, v), do)), lambda _: torch.cuda.synchronize()


def torch_sdpa(backend, name, x):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name not in ("full", "causal"):
        raise NotImplementedError(name)
    attend = torch.nn.functional.scaled_dot_product_attention

    def f(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return attend(q, k, v, is_causal=name == "causal", enable_gqa=q.shape[1] != k.shape[1])

    return torch_program(f, *in_torch(x))


def torch_flex(name, x):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, t = x[0].shape[:2]
    ids, end = (torch.from_numpy(a(t)).cuda() for a in (segments, ends_of_group))
    allowed = {
        "full": None,
        "causal": lambda b, h, q, k: k <= q,
        "window": lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
        "packed": lambda b, h, q, k: (k <= q) & (ids[q] == ids[k]),
        "tree": lambda b, h, q, k: (k <= q) & (q < end[k]),
    }[name]
    blocks = None if allowed is None else create_block_mask(allowed, None, None, t, t, device="cuda")
    torch._dynamo.reset()  # else it gives up compiling after eight cases
    attend = torch.compile(flex_attention, dynamic=False)
    gqa = x[0].shape[2] != x[1].shape[2]
    return torch_program(lambda q, k, v: attend(q, k, v, block_mask=blocks, enable_gqa=gqa), *in_torch(x))


LIBRARIES: dict[str, Callable] = {
    "ours": functools.partial(ours, "mosaic_gpu"),
    "ours, XLA": functools.partial(ours, "xla"),
    "cuDNN by jax": functools.partial(ours, "cudnn"),
    "jax Mosaic (f16)": jax_mosaic,
    "torch cuDNN": functools.partial(torch_sdpa, "CUDNN_ATTENTION"),
    "torch flash": functools.partial(torch_sdpa, "FLASH_ATTENTION"),
    "torch flex": torch_flex,
}


def in_turn(calls: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, float]:
    """Median milliseconds of a call, by name."""
    counts, laps = {}, {name: [] for name in calls}
    for name, (call, wait) in calls.items():
        wait(call())
        begun = time.perf_counter()
        wait(call())
        counts[name] = max(3, min(100, round(0.02 / (time.perf_counter() - begun))))
    for _ in range(rounds):
        for name, (call, wait) in calls.items():
            begun = time.perf_counter()
            for _ in range(counts[name]):
                made = call()
            wait(made)
            laps[name].append(1e3 * (time.perf_counter() - begun) / counts[name])
    return {name: statistics.median(x) for name, x in laps.items()}


def rows_of(case: str, libraries: list[str], rounds: int) -> list[dict]:
    name, b, t, h, kh, d, dv = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (b, t, h, d), (b, t, kh, d), (b, t, kh, dv)
    x = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    pairs = b * h * mask_of(name, b, t)[1]
    programs, rows = {}, {}
    for library in libraries:
        rows[library] = {"case": case, "library": library}
        try:
            programs[library] = LIBRARIES[library](name, x)
        except Exception as error:  # noqa: BLE001  (a library's way to say no)
            rows[library]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    flops = {"forward": 2 * pairs * (d + dv), "gradients": 2 * pairs * (4 * d + 3 * dv)}
    for n, which in enumerate(flops):
        calls = {library: (both[n], wait) for library, (both, wait) in programs.items() if both[n]}
        for library, ms in in_turn(calls, rounds).items():
            rows[library] |= {f"{which}_ms": ms, f"{which}_tflops": flops[which] / ms / 1e9}
    return list(rows.values())


def table(rows: list[dict]) -> str:
    lines = ["| case | library | forward ms | TFLOP/s | with gradients ms | TFLOP/s |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["case"], row["library"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/")[:60], "", "", ""]
        else:
            for which in ("forward", "gradients"):
                ms, rate = row.get(f"{which}_ms"), row.get(f"{which}_tflops")
                cells += [f"{ms:.3f}", f"{rate:.0f}"] if ms else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE, help="where gpu.json and gpu.md go")
    options = parser.parse_args()
    present = [x for x in options.libraries if not x.startswith("torch") or importlib.util.find_spec("torch")]
    rows, device = [], jax.devices()[0].device_kind
    for case in options.only:
        rows += rows_of(case, present, options.rounds)
        print(table(rows[-len(present) :]), flush=True)
        found = {"device": device, "jax": jax.__version__, "rows": rows}
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "gpu.md").write_text(f"{device}, bfloat16; jax {jax.__version__}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
