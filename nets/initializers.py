"""Initialisers that are safe to vmap."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def orthogonal(scale: float = 1.0) -> Callable:
    """Random matrices with orthonormal rows or columns, uniform over the orthogonal group, times `scale`.

    Made of Householder reflections of Gaussian vectors (Stewart 1980, "The efficient generation of random
    orthogonal matrices"), one matrix-vector product per column, with no QR.
    `jax.nn.initializers.orthogonal` calls LAPACK's QR, and under `jit(vmap(init))` (a batch of seeds) XLA's
    CPU backend can deadlock: every thread of its pool waits inside the batched call. Same distribution,
    other draws.

    Returns:
      init(key, shape, dtype=float32) -> array of `shape`; leading axes count as rows, the last as columns.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(f"an orthogonal matrix of shape {tuple(shape)} was asked for, expected [..., in, out]")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        n, m = max(rows, columns), min(rows, columns)
        draws = jax.random.normal(key, (m, n))

        def reflect(i, q):
            k = m - 1 - i
            x = jnp.where(jnp.arange(n) >= k, draws[k], 0.0)
            sign = jnp.where(x[k] < 0, -1.0, 1.0)
            v = x.at[k].add(sign * jnp.linalg.norm(x))
            q = q - jnp.outer(v, 2 * (v @ q) / (v @ v))
            return q.at[:, k].multiply(-sign)

        q = jax.lax.fori_loop(0, m, reflect, jnp.eye(n, m))
        return (scale * (q if rows >= columns else q.T)).reshape(shape).astype(dtype)

    return init
