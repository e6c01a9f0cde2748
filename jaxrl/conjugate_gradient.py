"""Conjugate gradients: solve A x = b where A is only known by what it does to a vector."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Solution(NamedTuple):
    """`x`, like b; `residual`: |b - A x|^2 as the iteration tracks it; `iterations` done, int32."""

    x: Any
    residual: jax.Array
    iterations: jax.Array


def conjugate_gradient(matvec: Callable, b: Any, *, iterations: int = 10, tolerance: float = 1e-10) -> Solution:
    """Hestenes and Stiefel 1952, from x = 0.

    Args:
      matvec: x -> A x on pytrees like b, with A symmetric and positive definite.
      b: a pytree of float arrays.
      iterations: at most; with exact arithmetic the number of distinct eigenvalues of A is enough.
      tolerance: ends once |b - A x|^2 <= tolerance * |b|^2. b = 0 gives x = 0 at once.

    Returns:
      A `Solution`. Where p^T A p <= 0 comes up (A is not positive definite, by rounding perhaps) the iteration ends
      with the x it has.

    Raises:
      ValueError: less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1")
    limit = tolerance * dot(b, b)

    def unfinished(carry):
        _, _, _, square, i = carry
        return (i < iterations) & (square > limit)

    def step(carry):
        x, residual, p, square, i = carry
        image = matvec(p)
        curvature = dot(p, image)
        sound = curvature > 0.0
        length = jnp.where(sound, square / jnp.where(sound, curvature, 1.0), 0.0)
        x, residual = axpy(length, p, x), axpy(-length, image, residual)
        after = dot(residual, residual)
        p = axpy(after / square, p, residual)
        return x, residual, p, jnp.where(sound, after, -1.0), i + 1

    zero = jax.tree.map(jnp.zeros_like, b)
    x, residual, _, _, done = jax.lax.while_loop(unfinished, step, (zero, b, b, dot(b, b), jnp.int32(0)))
    return Solution(x, dot(residual, residual), done)


def dot(x: Any, y: Any) -> jax.Array:
    """The inner product of two pytrees, float32."""
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), x, y)
    return jax.tree.reduce(jnp.add, products, jnp.float32(0.0))


def axpy(a: jax.Array, x: Any, y: Any) -> Any:
    """a x + y."""
    return jax.tree.map(lambda x, y: a * x + y, x, y)
