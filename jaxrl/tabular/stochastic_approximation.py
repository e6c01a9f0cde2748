"""Stochastic approximation: finding a root from noisy values, of which averages and SGD are cases.

    w_{k+1} = w_k - a_k g(w_k, noise_k)        k = 1, 2, ...

With g rising through its root and noise of mean zero and bounded variance, w_k converges to the root with probability
one if sum a_k is infinite (far enough) and sum a_k^2 is finite (the noise dies away): Robbins and Monro 1951.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def power_schedule(steps: int, *, scale: Any = 1.0, power: Any = 1.0, offset: Any = 0.0) -> jax.Array:
    """Step sizes a_k = scale / (k + offset)^power for k = 1 .. steps: [steps] float32.

    Args:
      steps: how many.
      scale, power: numbers or scalar arrays.
      offset: shortens the first steps: where g is steep far out, 1 / k may diverge and 1 / (k + 2) converge.
    """
    return scale / (jnp.arange(1, steps + 1, dtype=jnp.float32) + offset) ** power


def converges(power: Any) -> jax.Array:
    """Whether a_k ~ 1 / k^power meets the conditions of Robbins and Monro: 1/2 < power <= 1. Bool, like power.

    sum 1 / k^power is infinite for power <= 1, sum 1 / k^(2 power) is finite for power > 1/2. Constant step sizes
    (power 0) do not: they end in a neighbourhood of the root, but follow one that moves.
    """
    power = jnp.asarray(power)
    return (power > 0.5) & (power <= 1.0)


def step_size_sums(step_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of a_k, sum of a_k^2) up to each k, both [K]: the first should grow without end, the second settle."""
    step_sizes = _one_axis(step_sizes)
    return jnp.cumsum(step_sizes), jnp.cumsum(jnp.square(step_sizes))


def robbins_monro(g: Callable, w: Any, step_sizes: jax.Array, key: jax.Array) -> Any:
    """The path of w_{k+1} = w_k - a_k g(w_k, key_k) (Robbins and Monro 1951).

    Everything else in this module is this with another g.

    Args:
      g: (w, key) -> a noisy value of the function whose root is sought, like w.
      w: w_1, an array or a pytree of arrays.
      step_sizes: [K] a_1 .. a_K.
      key: consumed: each step gets a key of its own.

    Returns:
      Like w with a leading axis [K + 1]: w_1 .. w_{K+1}.

    Raises:
      ValueError: step_sizes of another rank.
    """
    step_sizes = _one_axis(step_sizes)
    w = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w)

    def step(carry, step_size):
        key, w = carry
        key, noise_key = jax.random.split(key)
        w = jax.tree.map(lambda x, y: x - step_size * y, w, g(w, noise_key))
        return (key, w), w

    _, path = jax.lax.scan(step, (key, w), step_sizes)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), w, path)


def incremental_mean(x: jax.Array, step_sizes: jax.Array | None = None) -> jax.Array:
    """Running means without storing anything: w <- w - a_k (w - x_k), the root of E[w - x].

    Args:
      x: [K, ...] numbers as they come in.
      step_sizes: [K]; None for 1 / k, which is the mean of x_1 .. x_k exactly. A constant forgets exponentially.

    Returns:
      [K, ...] float32, the estimate after each. The first a_k should be 1: it begins at zero.
    """
    x = jnp.asarray(x, jnp.float32)
    if x.ndim < 1:
        raise ValueError("x is a single number, expected [K, ...]: one entry for each to be averaged")
    step_sizes = power_schedule(x.shape[0]) if step_sizes is None else _one_axis(step_sizes)
    if step_sizes.shape[0] != x.shape[0]:
        raise ValueError(f"{step_sizes.shape[0]} step sizes for {x.shape[0]} entries of x, expected one to each")

    def step(w, given):
        step_size, x = given
        w = w - step_size * (w - x)
        return w, w

    return jax.lax.scan(step, jnp.zeros(x.shape[1:]), (step_sizes, x))[1]


def stochastic_gradient_descent(
    gradient: Callable, w: Any, data: Any, step_sizes: jax.Array, key: jax.Array, *, batch: int | None = 1
) -> Any:
    """SGD as Robbins-Monro: the root of the mean gradient, seen through random examples.

    Args:
      gradient: (w, example) -> gradient of that example's loss, like w.
      w: to begin with.
      data: array or pytree with a leading axis [N] of examples.
      step_sizes: [K].
      key: consumed.
      batch: examples to a step, drawn with replacement: 1 is SGD, more is mini-batch, which divides the noise's
        variance. None: all, without noise: gradient descent.

    Returns:
      The path of w, a leading axis [K + 1].
    """
    (number,) = {jnp.shape(x)[0] for x in jax.tree.leaves(data)}
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, expected at least one example, or None for all")

    def mean_gradient(w, key):
        examples = data
        if batch is not None:
            drawn = jax.random.randint(key, (batch,), 0, number)
            examples = jax.tree.map(lambda x: x[drawn], data)
        gradients = jax.vmap(gradient, in_axes=(None, 0))(w, examples)
        return jax.tree.map(lambda x: x.mean(axis=0), gradients)

    return robbins_monro(mean_gradient, w, step_sizes, key)


def _one_axis(step_sizes):
    step_sizes = jnp.asarray(step_sizes, jnp.float32)
    if step_sizes.ndim != 1:
        raise ValueError(f"step_sizes has shape {step_sizes.shape}, expected [K]: one to each step")
    return step_sizes
