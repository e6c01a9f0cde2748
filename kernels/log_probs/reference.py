"""The formulas, on logits that are all there at once: every derivative, O(N V) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def _of_logits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _parts(logits, targets)[0]


def _parts(logits, targets):
    """(log_prob, entropy, lse), and log p of the whole vocabulary (to be fused into what uses it)."""
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top = jnp.max(x, axis=-1, keepdims=True)
    z = x - top
    e = jnp.exp(z)
    total = jnp.sum(e, axis=-1)
    log_total = jnp.log(total)
    mean_z = jnp.sum(jnp.where(e > 0, e * z, 0.0), axis=-1) / total
    chosen = (jnp.take_along_axis(x, targets[..., None], axis=-1) - top)[..., 0]
    return (chosen - log_total, log_total - mean_z, top[..., 0] + log_total), z - log_total[..., None]


@_of_logits.defjvp
def _of_logits_jvp(primals, tangents):
    """d log p_y = sum_v (1[v = y] - p_v) dx_v;  dH = -sum_v p_v (log p_v + H) dx_v;  dlse = sum_v p_v dx_v."""
    logits, targets = primals
    out, log_p = _parts(logits, targets)
    dx = tangents[0].astype(log_p.dtype)
    p = jnp.exp(log_p)
    hit = lax.broadcasted_iota(targets.dtype, log_p.shape, log_p.ndim - 1) == targets[..., None]
    d_log_prob = jnp.sum((hit - p) * dx, axis=-1)
    d_entropy = -jnp.sum(jnp.where(p > 0, p * (log_p + out[1][..., None]), 0.0) * dx, axis=-1)
    return out, (d_log_prob, d_entropy, jnp.sum(p * dx, axis=-1))


def select_log_probs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target under softmax(logits), and the entropy of that distribution.

        log p(y) = x_y - lse(x);   H = lse(x) - sum_v softmax(x)_v x_v

    Computed in float32. Logits of -inf (tokens that a sampler has ruled out) have probability 0 and add
    nothing to the entropy. Differentiable in both modes.

    Args:
      logits: [..., V], any float dtype.
      targets: int [...], token ids in [0, V). This cannot be checked under jit: a negative id counts from the
        end and an id of V or more gives NaN.

    Returns:
      log_probs [...] and entropy [...], both in nats, float32.

    Raises:
      ValueError: targets that are not integers or do not have the shape of logits without its last axis.
    """
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(f"select_log_probs: targets are {jnp.result_type(targets)}, expected integers.")
    if jnp.ndim(logits) < 1 or jnp.shape(targets) != jnp.shape(logits)[:-1]:
        raise ValueError(
            f"select_log_probs: targets have shape {jnp.shape(targets)}, expected that of logits "
            f"{jnp.shape(logits)} without its last axis V."
        )
    return _of_logits(logits, from_start(targets, jnp.shape(logits)[-1]))[:2]


def from_start(targets: jax.Array, vocabulary: int) -> jax.Array:
    """Ids as int32, negative ones counted from the end of the vocabulary; V or more for those outside it."""
    targets = jnp.asarray(targets, jnp.int32)
    targets = jnp.where(targets < 0, targets + vocabulary, targets)
    return jnp.where(targets < 0, vocabulary, targets)


def dense_statistics(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, scale: jax.Array, *, soft_cap: float | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the target, entropy and log-sum-exp of each token, from all logits at once.

    Args:
      hidden: [N, D]. unembedding: [D, V]. targets: int32 [N]. scale: [N], factor on the logits after the soft cap.
      soft_cap: bound on the logits before the scale, or None.

    Returns:
      log_probs [N] (of no meaning where the target is outside [0, V)), entropy [N] and lse [N], float32.
    """
    x = jnp.matmul(hidden, unembedding, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
    if soft_cap is not None:
        x = soft_cap * jnp.tanh(x / soft_cap)
    return _of_logits(x * scale[:, None].astype(x.dtype), targets)
