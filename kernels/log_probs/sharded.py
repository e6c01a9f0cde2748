"""The statistics of a vocabulary that is spread over a mesh axis, inside `jax.shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def merge(
    statistics: tuple[jax.Array, jax.Array, jax.Array], here: jax.Array, axis_name: str | tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Statistics of the whole vocabulary from those of its parts.

        lse = log sum_k exp(lse_k);   w_k = exp(lse_k - lse);   H = sum_k w_k (H_k - log w_k)
        log p(y) = log p_k(y) + log w_k   of the part k that y is in

    Args:
      statistics: log_probs, entropy and lse, each [N], of this device's part.
      here: bool [N], whether the target is in this part.
      axis_name: the mesh axis, or axes, over which the parts are spread.
    """
    log_probs, entropy, lse = statistics
    top = lax.pmax(lax.stop_gradient(lse), axis_name)
    whole = top + jnp.log(lax.psum(jnp.exp(lse - top), axis_name))
    log_w = lse - whole
    log_probs = lax.psum(jnp.where(here, log_probs + log_w, 0.0), axis_name)
    return log_probs, lax.psum(jnp.exp(log_w) * (entropy - log_w), axis_name), whole
