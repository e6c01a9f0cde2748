"""NVIDIA's own attention, through `jax.nn`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import masks

OTHER = 'use implementation="xla" or None'


def refusal(q, k, mask, q_offset, scale, soft_cap, others, return_lse) -> str | None:
    """Why cuDNN cannot serve a call, or None if it can; `others` are options by name that it does not take."""
    if jax.default_backend() != "gpu":
        return f"cuDNN runs on NVIDIA GPUs, not on {jax.default_backend()}; {OTHER}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {q.dtype}; {OTHER}"
    if not isinstance(mask, masks.Full | masks.Causal | masks.Window):
        return f"cuDNN takes Full(), Causal() and Window(n), not {type(mask).__name__}; {OTHER}"
    if not isinstance(mask, masks.Full) and not (
        isinstance(q_offset, int) and q_offset == 0 and q.shape[1] == k.shape[1]
    ):
        return f"cuDNN takes Causal() and Window(n) with T = S and q_offset = 0 only; {OTHER}"
    if not isinstance(scale, int | float):
        return 'cuDNN needs scale as a Python number; use implementation="reference"'
    for name, option in ({"soft_cap": soft_cap} | others).items():
        if option is not None:
            return f"cuDNN, as jax.nn offers it, takes no {name}; {OTHER}"
    if return_lse:
        return f"jax.nn rounds cuDNN's log-sum-exp to {q.dtype}: no return_lse; {OTHER}"
    return None


def cudnn_attention(q, k, v, *, mask: masks.Mask, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """`jax.nn.dot_product_attention(implementation="cudnn")` for a mask that `refusal` lets pass: o [B, T, H, Dv]."""
    window = (mask.n - 1, 0) if isinstance(mask, masks.Window) else None
    causal = not isinstance(mask, masks.Full)  # with a window and is_causal=False, cuDNN's gradient of k is wrong
    options = {"scale": scale, "is_causal": causal, "local_window_size": window, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, bias, **options)
