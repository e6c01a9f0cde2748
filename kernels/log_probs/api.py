"""The one door from hidden states to log-probabilities."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.log_probs import sharded
from jaxrl.kernels.log_probs.blocked import blocked_statistics
from jaxrl.kernels.log_probs.reference import dense_statistics, from_start
from jaxrl.kernels.log_probs.tpu import pallas_statistics, refusal
from jaxrl.kernels.platform import platform
from jaxrl.kernels.varying import vary_alike

IMPLEMENTATIONS = ("reference", "xla", "pallas")
DENSE_LOGITS = 2 * 2**20  # up to here all logits at once take no more time on CPU, with gradients


def token_log_probs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> tuple[jax.Array, ...]:
    """Log-probabilities of tokens from hidden states, without ever holding the logits of all of them.

        x = hidden @ unembedding;  x = soft_cap * tanh(x / soft_cap);  x = x / temperature
        log p(y) = x_y - lse(x);   H = lse(x) - sum_v softmax(x)_v x_v

    (Online sums over the vocabulary as in Milakov and Gimelshein 2018, arXiv:1805.02867; fused with the product as in
    Wijmans et al. 2024, arXiv:2411.09009, but with exact gradients and an entropy.) Softmax and sums are float32
    whatever the inputs. Neither pass holds a [B, T, V] array, unless it is small: see `implementation`.

    Inside `jax.shard_map`, with `axis_name`, every device holds a slice of the vocabulary. Leave check_vma=True, or
    differentiate through the shard_map: with check_vma=False, a gradient taken inside is each device's own part.

    Args:
      hidden: [B, T, D], the last hidden states (after the final norm).
      unembedding: [D, V]; with axis_name this device's columns [D, V / n], in the order of the devices.
      targets: int [B, T] in [0, V), of the whole vocabulary: the token that hidden[:, t] predicts. This cannot be
        checked under jit: a negative id counts from the end and an id of V or more gives NaN.
      temperature: the sampling temperature: a positive number, or an array, of any shape that broadcasts to [B, T].
      soft_cap: bound on the logits before the temperature (Gemma 2), or None.
      chunk: tokens whose logits are held at once, at most; None chooses.
      axis_name: the mesh axis, or axes, over which the vocabulary is spread; None for the whole of it.
      implementation: None picks the best one for platform and shape. "reference": all logits at once. "xla": tiles
        of tokens and vocabulary, forward and backward; first derivatives only, in reverse mode. "pallas": TPU kernel
        with the same derivatives (interpreted on CPU).
      return_lse: also return the log-sum-exp.

    Returns:
      log_probs [B, T] and entropy [B, T] of the tempered distribution, in nats, float32; with return_lse also
      lse [B, T], the log-sum-exp of x.

    Raises:
      ValueError: shapes that do not fit; a temperature, soft_cap or chunk that is not positive; an axis_name outside
        shard_map; a named implementation that does not serve the call.
    """
    _check(hidden, unembedding, targets, temperature, soft_cap, chunk)
    b, t, d = hidden.shape
    part = unembedding.shape[1]
    vocabulary = part * _axis_size(axis_name)
    forms = {
        "reference": dense_statistics,
        "xla": functools.partial(blocked_statistics, tokens=chunk),
        "pallas": pallas_statistics,
    }
    form = forms[_choose(implementation, hidden, unembedding, soft_cap, chunk)]
    temperature = jnp.asarray(temperature, jnp.promote_types(hidden.dtype, jnp.float32))
    scale = jnp.broadcast_to(1.0 / temperature, (b, t)).reshape(b * t)
    h, y = hidden.reshape(b * t, d), from_start(targets, vocabulary).reshape(b * t)
    known = y < vocabulary
    h, w, y, scale = vary_alike(h, unembedding, y, scale)
    if axis_name is not None:
        y = y - lax.axis_index(axis_name) * part
    statistics: Any = form(h, w, y, scale, soft_cap=soft_cap)
    if axis_name is not None:
        statistics = sharded.merge(statistics, (y >= 0) & (y < part), axis_name)
    log_probs, entropy, lse = statistics
    log_probs = jnp.where(known, log_probs, jnp.nan)
    out = (log_probs, entropy, lse) if return_lse else (log_probs, entropy)
    return tuple(x.reshape(b, t) for x in out)


def _choose(implementation, hidden, unembedding, soft_cap, chunk) -> str:
    """The implementation that None stands for, or the named one if it serves the call."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"token_log_probs: implementation={implementation!r}, expected None or {IMPLEMENTATIONS}.")
    fixed = isinstance(soft_cap, int | float | None)
    if implementation == "xla" and not fixed:
        raise ValueError(
            'token_log_probs: implementation="xla" needs soft_cap as a Python number, got '
            f'{type(soft_cap).__name__}; use implementation="reference".'
        )
    if implementation == "pallas" and (reason := refusal(hidden, unembedding, soft_cap)):
        raise ValueError(f'token_log_probs: implementation="pallas": {reason}.')
    if implementation is not None:
        return implementation
    tokens = hidden.shape[0] * hidden.shape[1]
    if not fixed or (tokens * unembedding.shape[1] <= DENSE_LOGITS and (chunk is None or tokens <= chunk)):
        return "reference"
    if platform() == "tpu" and refusal(hidden, unembedding, soft_cap) is None:
        return "pallas"
    return "xla"


def _axis_size(axis_name) -> int:
    if axis_name is None:
        return 1
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"token_log_probs: axis_name = {axis_name!r} is no mesh axis here; call it inside jax.shard_map over a "
            "mesh that has it, or leave it out."
        ) from None


def _check(hidden, unembedding, targets, temperature, soft_cap, chunk):
    if jnp.ndim(hidden) != 3 or jnp.ndim(unembedding) != 2 or hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            f"token_log_probs: hidden {jnp.shape(hidden)} and unembedding {jnp.shape(unembedding)}, "
            "expected [B, T, D] and [D, V] with the same D (transpose an embedding table [V, D])."
        )
    if unembedding.shape[1] == 0:
        raise ValueError("token_log_probs: unembedding has V = 0 columns, expected at least 1.")
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(f"token_log_probs: targets are {jnp.result_type(targets)}, expected integers.")
    if jnp.shape(targets) != hidden.shape[:2]:
        raise ValueError(
            f"token_log_probs: targets have shape {jnp.shape(targets)}, expected [B, T] = {hidden.shape[:2]}."
        )
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(
            f"token_log_probs: temperature = {temperature}, expected a positive number; for greedy sampling, "
            "score with the untempered distribution (temperature=1)."
        )
    shape = jnp.shape(temperature)
    fits = len(shape) <= 2 and all(n in (1, m) for n, m in zip(shape[::-1], hidden.shape[1::-1], strict=False))
    if not fits:
        raise ValueError(
            f"token_log_probs: temperature has shape {shape}, expected one that broadcasts to [B, T] = "
            f"{hidden.shape[:2]}."
        )
    if isinstance(soft_cap, int | float) and soft_cap <= 0:
        raise ValueError(f"token_log_probs: soft_cap = {soft_cap}, expected a positive number or None.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"token_log_probs: chunk = {chunk} tokens, expected at least 1.")
