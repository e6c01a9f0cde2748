"""Sums over the sequences of a batch, one to a row or several packed into a row.

`B` rows, `T` columns. `segment_ids [B, T]` tells packed sequences apart: the tokens of one sequence are
contiguous and neighbours in a row have different ids. None means one sequence to a row.
"""

import jax
import jax.numpy as jnp


def sequence_sums(values: jax.Array, mask: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
    """Sum of the unmasked values of every sequence, in float32.

    Args:
      values: [B, T].
      mask: [B, T], true (or non-zero) where a token counts. Values elsewhere are never read.
      segment_ids: [B, T] integers or None, see the module's docstring.

    Returns:
      [B, 1] without segment_ids. [B, T] with: column j holds the row's j-th run of equal ids (padding is a
      run too), and zeros follow the last run.
    """
    counted = jnp.where(jnp.asarray(mask, bool), jnp.asarray(values, jnp.float32), 0.0)
    if segment_ids is None:
        return counted.sum(axis=1, keepdims=True)
    length = counted.shape[1]
    return jax.vmap(lambda x, run: jax.ops.segment_sum(x, run, length))(counted, _runs(segment_ids))


def spread(sums: jax.Array, *, length: int, segment_ids: jax.Array | None = None) -> jax.Array:
    """Hands every token the sum of its sequence: what `sequence_sums` returned, to [B, T = length]."""
    if segment_ids is None:
        return jnp.broadcast_to(sums, (sums.shape[0], length))
    return jnp.take_along_axis(sums, _runs(segment_ids), axis=1)


def _runs(segment_ids: jax.Array) -> jax.Array:
    """0 for the first run of equal ids in a row, 1 for the second ...: [B, T]."""
    ids = jnp.asarray(segment_ids)
    changes = jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return jnp.cumsum(changes.astype(jnp.int32), axis=1)
