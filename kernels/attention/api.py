"""The one door to attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import cudnn, masks, tpu
from jaxrl.kernels.attention.alibi import alibi_bias
from jaxrl.kernels.attention.blocked import blocked_attention
from jaxrl.kernels.attention.checks import check_arrays, check_per_head, check_soft_cap
from jaxrl.kernels.attention.dropout import dropout_of, keep_factor
from jaxrl.kernels.attention.reference import dense_attention
from jaxrl.kernels.platform import platform

IMPLEMENTATIONS = ("reference", "xla", "pallas", "mosaic_gpu", "cudnn")
DENSE_PAIRS = 128 * 128  # up to here the dense form is at least as fast as tiles on CPU, with gradients


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: masks.Mask = masks.Causal(),  # noqa: B008  (immutable)
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v over the keys that the mask allows.

        s = scale * q k^T;  s = soft_cap * tanh(s / soft_cap);  s = s + bias - alibi |q - k|
        s = -inf where the mask forbids
        o = sum_k kept_k exp(s_k - lse) v_k,   lse = log(sum_k exp(s_k) + exp(sink))

    The bias is added after the soft cap, so that a bias of -inf masks. Softmax and sums are float32 whatever
    the inputs. A query that sees no key gets zeros, lse about -1e30 (or the sink), and zero gradients.

    Args:
      q: queries [B, T, H, D].
      k: keys [B, S, K, D] with H a multiple of K; query head h uses key head h // (H / K).
      v: values [B, S, K, Dv]; Dv may differ from D.
      mask: which key each query may see (`Causal`, `Full`, `Window`, `Prefix`, `Segments`, `Chunked`, `Tree`,
        `BlockDiffusion`, `Dense`, and their `&` and `|`).
      q_offset: query i stands at row q_offset + i of the mask; int or traced int32 (a KV cache's length).
      scale: factor on q k^T; default D ** -0.5.
      soft_cap: bound on the logits (Gemma 2), or None.
      bias: added to the logits, [B|1, H|1, T|1, S|1], or None. Differentiable.
      alibi: slopes [H] that make keys count less with their distance from the query, or None (`alibi_slopes` has the
        published ones). Constants: they get no gradient.
      sinks: one logit per head, [H], that takes probability and has no value (gpt-oss), or None.
        Differentiable.
      dropout: share of the weights that is dropped, in [0, 1); kept_k is 0 or 1 / (1 - dropout).
      dropout_key: key for that, needed where dropout is not 0. What is dropped depends on the key and on the pair's
        batch row, head, query and key alone, so all implementations drop the same; give the shards of a batch keys of
        their own.
      implementation: None picks the best one for platform and shape. "reference": dense, O(T S) memory.
        "xla": tiles and online softmax, O(T) memory forward and backward. "pallas": TPU kernel (interpreted
        on CPU). "mosaic_gpu": kernel for Hopper GPUs. "cudnn": NVIDIA's own, through `jax.nn`.
      return_lse: also return the log-sum-exp.

    Returns:
      o [B, T, H, Dv] in q's dtype; with return_lse, (o, lse [B, T, H] float32). lse includes the sink.

    Raises:
      ValueError: shapes that do not fit, or a named implementation that does not serve the call.
    """
    shape = _check(q, k, v, bias, alibi, sinks, soft_cap)
    if not isinstance(mask, masks.Mask):
        raise ValueError(
            f"attention: mask is {type(mask).__name__}, expected a mask such as Causal(); "
            "wrap an array as Dense(array)."
        )
    mask.check(shape, q_offset)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"attention: implementation={implementation!r}, expected None or {IMPLEMENTATIONS}.")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    dropped = dropout_of(dropout, dropout_key)
    chosen = implementation or _choose(q, k, v, mask, scale, soft_cap, bias, alibi, dropped)
    alibi = None if alibi is None else jax.lax.stop_gradient(jnp.asarray(alibi, jnp.float32))
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
    if chosen == "reference":
        pairs = _pairs(shape, mask, q_offset, bias, alibi, dropped)
        o, lse = dense_attention(q, k, v, **pairs, **options)
    elif chosen == "cudnn":
        others = {"sinks": sinks, "alibi": alibi, "dropout": dropped}
        reason = cudnn.refusal(q, k, mask, q_offset, scale, soft_cap, others, return_lse)
        if reason:
            raise ValueError(f'attention: implementation="cudnn": {reason}.')
        return cudnn.cudnn_attention(q, k, v, mask=mask, scale=scale, bias=bias)
    else:
        options |= {"mask": mask, "q_offset": q_offset, "bias": bias, "alibi": alibi, "dropout": dropped}
        o, lse = _tiled(chosen)(q, k, v, **options)
    return (o, jnp.swapaxes(lse, 1, 2)) if return_lse else o


def _tiled(name: str):
    if name == "mosaic_gpu":
        from jaxrl.kernels.attention import gpu  # where it is wanted: its back end is large

        return gpu.mosaic_gpu_attention
    return {"xla": blocked_attention, "pallas": tpu.pallas_attention}[name]


def _pairs(shape, mask, q_offset, bias, alibi, dropped) -> dict[str, Any]:
    """What the dense form takes for each pair of query and key."""
    b, h, t, s = shape
    whole = masks.Tile(q_offset, t, 0, s, s)
    allowed = None if isinstance(mask, masks.Full) else mask.allowed(whole)
    heads = jnp.arange(h).reshape(1, h, 1, 1)
    if alibi is not None:
        distance = alibi_bias(alibi[heads], whole.q, whole.k)
        bias = distance if bias is None else bias + distance
    kept = None
    if dropped is not None:
        rows = jnp.arange(b).reshape(b, 1, 1, 1)
        kept = keep_factor(dropped.rate, dropped.seed, rows, heads, whole.q, whole.k)
    return {"allowed": allowed, "bias": bias, "kept": kept}


def _choose(q, k, v, mask, scale, soft_cap, bias, alibi, dropped) -> str:
    """The implementation that None stands for."""
    t, s, target = q.shape[1], k.shape[1], platform()
    dynamic = not (isinstance(scale, int | float) and isinstance(soft_cap, int | float | None))
    if dynamic or t < 16 or t * s <= DENSE_PAIRS:
        return "reference"
    if target == "tpu" and tpu.refusal(q, k, v, mask, scale, soft_cap, bias) is None:
        return "pallas"
    if target == "gpu":
        from jaxrl.kernels.attention import gpu

        if gpu.refusal(q, k, v, mask, scale, soft_cap, bias, alibi, dropped) is None:
            return "mosaic_gpu"
    return "xla"


def _check(q, k, v, bias, alibi, sinks, soft_cap) -> tuple[int, int, int, int]:
    """(B, H, T, S) of the call, or ValueError."""
    full = check_arrays("attention", q, k, v)
    if bias is not None and not (
        jnp.ndim(bias) == 4 and all(n in (1, m) for n, m in zip(bias.shape, full, strict=True))
    ):
        raise ValueError(
            f"attention: bias has shape {jnp.shape(bias)}, expected [B, H, T, S] = {full}, any axis may be 1."
        )
    check_per_head("attention", full[1], alibi=alibi, sinks=sinks)
    check_soft_cap("attention", soft_cap)
    return full
