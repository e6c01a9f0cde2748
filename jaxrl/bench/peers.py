"""What our kernels are measured against: the plain way to write it, and other libraries."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Outside(NamedTuple):
    """A form that JAX does not compile. `prepare(arrays, gradients)` gives a call that ends when its work is done."""

    prepare: Callable[[dict[str, jax.Array], bool], Callable[[], Any]]


def naive_log_probs(hidden, unembedding, targets):
    """All logits at once, left to autodiff: log p(y) and entropies, [B, T].

    Tokens are one axis, and there is no second array of the logits' size: XLA:CPU takes more than twice the time
    forward where the product is an einsum of three axes.
    """
    x = (hidden.reshape(-1, hidden.shape[-1]) @ unembedding).astype(jnp.float32)
    lse = jax.nn.logsumexp(x, axis=-1)
    chosen = jnp.take_along_axis(x, targets.reshape(-1, 1), axis=-1)[:, 0]
    entropy = lse - jnp.sum(jnp.exp(x - lse[:, None]) * x, axis=-1)
    return (chosen - lse).reshape(targets.shape), entropy.reshape(targets.shape)


def dense_experts(a: dict[str, jax.Array]) -> jax.Array:
    """Every expert sees every token: y_t = sum_e weight_te down_e(silu(gate_e x_t) * up_e x_t), weights mostly 0."""
    spread = jnp.sum(jax.nn.one_hot(a["experts"], len(a["gate"]), dtype=a["x"].dtype) * a["weights"][..., None], axis=1)
    gate, up = (jnp.einsum("td,edf->tef", a["x"], a[name]) for name in ("gate", "up"))
    return jnp.einsum("tef,efd->td", jax.nn.silu(gate) * up * spread[..., None], a["down"])


def splash(a: dict[str, jax.Array], *, causal: bool) -> jax.Array:
    """JAX's attention kernel for TPU, with its own sizes of blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    _, length, heads, size = a["q"].shape
    mask = (library.CausalMask if causal else library.FullMask)((length, length))
    kernel = library.make_splash_mha_single_device(library.MultiHeadMask([mask] * heads))
    q, k, v = (jnp.swapaxes(a[name], 1, 2) for name in ("q", "k", "v"))
    o: Any = jax.vmap(kernel)(q * size**-0.5, k, v)
    return jnp.swapaxes(o, 1, 2)


def torch_attention(causal: bool) -> Outside:
    """PyTorch's scaled_dot_product_attention, on a GPU where JAX has one and PyTorch sees it."""

    def prepare(arrays, gradients):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # its threads would spin into the next program's time
        import torch  # pyright: ignore[reportMissingImports]

        attend = torch.nn.functional.scaled_dot_product_attention
        device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, arrays["q"].dtype.name)
        take = lambda x: torch.tensor(np.swapaxes(np.asarray(x, np.float32), 1, 2)).to(device, dtype)
        q, k, v = (take(arrays[name]).requires_grad_(gradients) for name in ("q", "k", "v"))

        def call():
            o = attend(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
            made = torch.autograd.grad(o.float().square().sum() / 2, (q, k, v)) if gradients else o
            if device == "cuda":
                torch.cuda.synchronize()
            return made

        return call

    return Outside(prepare)
