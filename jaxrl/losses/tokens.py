"""Cross-entropy of tokens, per token."""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape


def negative_log_likelihood(log_probs: jax.Array) -> jax.Array:
    """-log p of every token, from log-probs that a fused kernel has already made.

    Args:
      log_probs: [B, T] log-probs of the target tokens, as of `jaxrl.kernels.log_probs.token_log_probs`.

    Returns:
      [B, T] float32. For z-loss or label smoothing, which need the whole vocabulary, see `cross_entropy`.
    """
    same_shape("[B, T]", log_probs=log_probs)
    return -jnp.asarray(log_probs, jnp.float32)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Cross-entropy of every token with its target, from logits.

    With Z = sum_v exp(logits_v) and e the label smoothing:

        (1 - e) (-log p(target)) + e mean_v (-log p(v)) + z_loss (log Z)^2

    Args:
      logits: [B, T, V], any float type; the work is done in float32. Row t holds the prediction *of* target
        t: shift before the call.
      targets: [B, T] integers in [0, V). Targets under the mask may be anything in that range.
      label_smoothing: e, the share of the target spread evenly over all V outcomes (Szegedy et al. 2016,
        arXiv 1512.00567).
      z_loss: weight of the squared log-normaliser, which keeps logits from drifting (PaLM, Chowdhery et al.
        2022, arXiv 2204.02311: 1e-4).

    Returns:
      [B, T] float32.

    Raises:
      ValueError: shapes that do not fit, or label_smoothing outside [0, 1).
    """
    if jnp.ndim(logits) != 3:
        raise ValueError(f"logits has shape {jnp.shape(logits)}, expected [B, T, V]: add the missing axes")
    same_shape("[B, T]", targets=targets, logits_without_V=logits[..., 0])
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a share in [0, 1)")
    logits = jnp.asarray(logits, jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    values = log_z - chosen
    if label_smoothing:
        values = (1.0 - label_smoothing) * values + label_smoothing * (log_z - logits.mean(axis=-1))
    if z_loss:
        values = values + z_loss * jnp.square(log_z)
    return values
