"""Running means and variances: of observations, and of discounted returns to scale rewards by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """`count` [] of the samples seen, their `mean` and (population) `variance`, of one sample's shape."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def moments(shape: tuple[int, ...] = ()) -> Moments:
    """Of no samples: mean 0, variance 1, with which `standardise` changes nothing."""
    return Moments(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def update(old: Moments, samples: jax.Array, *, axis_name: str | None = None) -> Moments:
    """The moments of the samples so far and of new ones together (Chan et al. 1979; exact, not a moving average).

    Args:
      old: of samples of shape [*shape].
      samples: [..., *shape], the leading axes all count as samples.
      axis_name: a mapped axis whose samples are counted as well.
    """
    samples = jnp.asarray(samples, jnp.float32).reshape(-1, *old.mean.shape)
    over_axis = (lambda x: x) if axis_name is None else (lambda x: jax.lax.pmean(x, axis_name))
    count = samples.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    mean = over_axis(samples.mean(axis=0))
    variance = over_axis(jnp.square(samples - mean[None]).mean(axis=0))
    total = old.count + count
    shift = mean - old.mean
    share = count / total
    spread = old.variance * (1.0 - share) + variance * share + jnp.square(shift) * share * (1.0 - share)
    return Moments(total, old.mean + shift * share, spread)


def standardise(moments: Moments, x: jax.Array, *, clip: float = 10.0, eps: float = 1e-8) -> jax.Array:
    """(x - mean) / sqrt(variance + eps), clipped to [-clip, clip]: [..., *shape] -> [..., *shape]."""
    mean, variance = (jnp.broadcast_to(m, x.shape) for m in (moments.mean, moments.variance))
    return jnp.clip((x - mean) * jax.lax.rsqrt(variance + eps), -clip, clip)


class RewardScale(NamedTuple):
    """`returns` [N]: discounted sums of the rewards of the episodes so far. `moments`: of all such sums seen."""

    returns: jax.Array
    moments: Moments


def reward_scale(envs: int) -> RewardScale:
    """Before the first reward of N environments."""
    return RewardScale(jnp.zeros(envs), moments())


def scale_rewards(
    scale: RewardScale,
    rewards: jax.Array,
    done: jax.Array,
    *,
    discount: jax.Array | float,
    clip: float = 10.0,
    eps: float = 1e-8,
    axis_name: str | None = None,
) -> tuple[RewardScale, jax.Array]:
    """Rewards over the standard deviation of the running discounted sum, not centred, clipped.

        G <- discount G + r;  moments take in G;  r' = r / sqrt(variance + eps);  G <- 0 where the episode ended

    The order is Stable-Baselines3's: the sum that includes the last reward counts, and nothing of it reaches the next
    episode. The moments take in all [T, N] at once, so the first rewards of a trajectory are scaled with its last ones.

    Args:
      scale: so far.
      rewards: [T, N].
      done: bool [T, N], where the episode ended, either way.
      discount: the agent's.
      axis_name: as in `update`.

    Returns:
      The scale after the rewards, and the scaled rewards [T, N].
    """

    def step(returns, now):
        reward, done = now
        returns = discount * returns + reward
        return jnp.where(done, 0.0, returns), returns

    last, returns = jax.lax.scan(step, scale.returns, (rewards, done))
    after = update(scale.moments, returns, axis_name=axis_name)
    return RewardScale(last, after), jnp.clip(rewards * jax.lax.rsqrt(after.variance + eps), -clip, clip)
