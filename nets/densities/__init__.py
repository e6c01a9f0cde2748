"""Autoregressive densities of binary vectors: log p(x) = sum_i log Bernoulli(x_i; s(l_i)), l_i of x's predecessors."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Density(NamedTuple):
    """Pure functions; x is float [..., n] of 0 and 1, images in raster order.

    init(key) -> params: a plain nested dict of arrays.

    logits(params, x, **given) -> [..., n]: those of x_i = 1, from the predecessors of i alone.

    log_prob(params, x, **given) -> [...]: nats, normalised exactly.

    sample(params, key, number, **given) -> [number, n].

    loss(params, x, key) -> [...]: what to minimise; -log_prob, or its estimate by draws from the key.

    What may be given, such as an order, is said where a density is made.
    """

    init: Callable
    logits: Callable
    log_prob: Callable
    sample: Callable
    loss: Callable


def bernoulli(logits: jax.Array, x: jax.Array) -> jax.Array:
    """log Bernoulli(x; s(logits)) of each entry."""
    return x * logits - jax.nn.softplus(logits)


def density(init: Callable, logits: Callable, *, order: Callable, sample: Callable | None = None, loss=None) -> Density:
    """A `Density` of its conditionals.

    Args:
      init, logits: as in `Density`.
      order: (**given) -> int [n], the entries as they come.
      sample: a better one than n passes through `logits`.
      loss: another one than -log_prob.
    """

    def log_prob(params, x, **given):
        return bernoulli(logits(params, x, **given), x).sum(-1)

    def passes(params, key, number, **given):
        entries = order(**given)
        noise = jax.random.logistic(key, (len(entries), number))

        def draw(x, now):
            entry, noise = now
            return x.at[:, entry].set(logits(params, x, **given)[:, entry] > noise), None

        return lax.scan(draw, jnp.zeros((number, len(entries))), (entries, noise))[0]

    return Density(init, logits, log_prob, sample or passes, loss or (lambda params, x, key: -log_prob(params, x)))
