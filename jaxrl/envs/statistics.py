"""Running means and variances as pure functions, for normalisation.

The statistics belong to what is learned: keep them in the state that is saved, and normalise what is stored with those
that were used to act on it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
    """`mean` and (population) `variance` of one sample's shape, float32; `count` [] of the samples, float32."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


def statistics(shape: tuple[int, ...] = ()) -> Statistics:
    """Of no samples yet: mean 0, variance 1, so that `normalise` changes nothing."""
    return Statistics(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))


def update(old: Statistics, samples: jax.Array, *, axis_name: str | None = None) -> Statistics:
    """Takes in a batch: exactly the statistics of all samples seen, not a moving average.

        delta = mean_batch - mean;  total = count + n;  mean += delta n / total
        variance = (count variance + n variance_batch + delta^2 count n / total) / total

    Chan, Golub and LeVeque, 1979, Updating formulae and a pairwise algorithm for computing sample variances.

    Args:
      old: of samples of some shape [*shape].
      samples: [..., *shape]; all leading axes count as samples.
      axis_name: a mapped axis whose samples are taken in as well.

    Returns:
      Statistics.

    Raises:
      ValueError: samples of another shape.
    """
    shape = old.mean.shape
    if samples.shape[samples.ndim - len(shape) :] != shape or samples.size == 0:
        raise ValueError(f"samples have shape {samples.shape}, expected [..., *{list(shape)}], at least one sample")
    samples = samples.astype(jnp.float32).reshape(-1, *shape)
    count, mean = jnp.float32(samples.shape[0]), samples.mean(axis=0)
    if axis_name is not None:
        count, mean = jax.lax.psum(count, axis_name), jax.lax.pmean(mean, axis_name)
    variance = jnp.square(samples - mean[None]).mean(axis=0)
    if axis_name is not None:
        variance = jax.lax.pmean(variance, axis_name)
    total = old.count + count
    share, delta = count / total, mean - old.mean
    return Statistics(
        old.mean + share * delta,
        (1.0 - share) * old.variance + share * variance + share * (1.0 - share) * jnp.square(delta),
        total,
    )


def normalise(statistics: Statistics, x: jax.Array, *, clip: float = 10.0, eps: float = 1e-8) -> jax.Array:
    """(x - mean) / sqrt(variance + eps), clipped to [-clip, clip]; float32.

    Args:
      statistics: of samples [*shape].
      x: [..., *shape].
    """
    mean, variance = (jnp.broadcast_to(moment, x.shape) for moment in statistics[:2])
    return jnp.clip((x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + eps), -clip, clip)


def scale(statistics: Statistics, x: jax.Array, *, clip: float = 10.0, eps: float = 1e-8) -> jax.Array:
    """x / sqrt(variance + eps), clipped to [-clip, clip]: as `normalise`, without centring."""
    variance = jnp.broadcast_to(statistics.variance, x.shape)
    return jnp.clip(x.astype(jnp.float32) * jax.lax.rsqrt(variance + eps), -clip, clip)
