"""From scores to advantages, as PPO for language models wants them: arrays in, arrays out, no network in sight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl import returns
from jaxrl.envs import statistics
from jaxrl.envs.statistics import Statistics
from jaxrl.losses import reduce
from jaxrl.posttrain.ppo_config import PPOConfig
from jaxrl.types import Finish


class Judged(NamedTuple):
    """What an iteration's scores have come to.

    `advantages`, `targets`: `[B, C]`, 0 after the end. `scores`: `[B]` as they stand in the reward. `penalties`:
    `[B, C]`, taken off the reward of each token. `score_moments`, `return_moments`: with this iteration in them.
    """

    advantages: jax.Array
    targets: jax.Array
    scores: jax.Array
    penalties: jax.Array
    score_moments: Statistics
    return_moments: Statistics


def judge(
    config: PPOConfig,
    score_moments: Statistics,
    return_moments: Statistics,
    scores: jax.Array,
    finish: jax.Array,
    lengths: jax.Array,
    kl: jax.Array,
    values: jax.Array,
    *,
    kl_coef: jax.Array | float,
) -> Judged:
    """Scores, KL and values to advantages and value targets, by the config's switches.

        r_t = -kl_coef kl_t + s' [t = last]        r_t / std(returns so far), where rewards are scaled
        A = GAE(r, V);  targets = A + V            A whitened and clipped, where wanted; the targets are not

    Args:
      config: the switches.
      score_moments, return_moments: of all iterations before.
      scores: [B], NaN where there is none: that completion gets advantage 0 and is in no moment.
      finish, lengths: [B], as in `Rollout`.
      kl: [B, C] estimates for each token.
      values: [B, C], V of the state before each token.
      kl_coef: the weight of the KL now.

    Returns:
      `Judged`.
    """
    given = ~jnp.isnan(scores)
    lengths = jnp.where(given, lengths, 0)
    shaped, score_moments = shape_scores(
        score_moments,
        scores,
        finish,
        normalise=config.normalise_scores,
        clip=config.score_clip,
        missing_eos_penalty=config.missing_eos_penalty,
    )
    penalties = kl_coef * kl if config.kl_in == "reward" else jnp.zeros_like(kl)
    rewards = returns.token_rewards(jnp.where(given, shaped, 0.0), penalties, lengths)
    if config.scale_rewards:
        decay = jnp.power(config.discount, jnp.arange(rewards.shape[1], dtype=jnp.float32))
        return_moments = record(return_moments, (rewards * decay[None]).sum(axis=1), given)
        rewards = rewards / deviation(return_moments)
    advantages, targets = returns.token_gae(rewards, values, lengths, discount=config.discount, lambda_=config.lambda_)
    if config.normalise_advantages:
        advantages = returns.whiten(advantages, jnp.arange(rewards.shape[1])[None] < lengths[:, None])
    if config.advantage_clip is not None:
        advantages = jnp.clip(advantages, -config.advantage_clip, config.advantage_clip)
    return Judged(advantages, targets, shaped, penalties, score_moments, return_moments)


def record(moments: Statistics, samples: jax.Array, known: jax.Array) -> Statistics:
    """The moments with the known ones of the samples `[B]` taken in: exactly those of all known samples so far."""

    def one(moments, sample):
        value, known = sample
        taken = statistics.update(moments, value[None])
        return jax.tree.map(lambda new, old: jnp.where(known, new, old), taken, moments), None

    return jax.lax.scan(one, moments, (jnp.where(known, samples, 0.0), known))[0]


def deviation(moments: Statistics) -> jax.Array:
    """Their standard deviation, and 1 where nothing has differed yet."""
    return jnp.sqrt(jnp.where(moments.variance > 0, moments.variance, 1.0))


def shape_scores(
    moments: Statistics,
    scores: jax.Array,
    finish: jax.Array,
    *,
    normalise: str = "none",
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> tuple[jax.Array, Statistics]:
    """Scores as they enter the reward of PPO-max: over running moments, which take the batch in first, then clipped.

        s' = clip((s - mean) / std, -clip, clip) - missing_eos_penalty [finish = length]

    Zheng et al. 2023, arXiv 2307.04964; the penalty is that of Huang et al. 2024, arXiv 2403.17031,
    taken off last so that it means the same under every normalisation (TRL takes it off the raw score).

    Args:
      moments: of all scores before.
      scores: [B], NaN where there is none.
      finish: [B], a `Finish`.
      normalise: none, scale (without the mean, as MOSS-RLHF's code has it by default) or normalise.
      clip: bound on |s'| before the penalty; None for none.
      missing_eos_penalty: for completions that hit the token limit.

    Returns:
      `([B] float32, the moments with these scores)`.
    """
    scores = jnp.asarray(scores, jnp.float32)
    moments = record(moments, scores, ~jnp.isnan(scores))
    if normalise == "normalise":
        scores = scores - moments.mean
    if normalise != "none":
        scores = scores / deviation(moments)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    return scores - missing_eos_penalty * (finish == Finish.LENGTH), moments


def explained_variance(targets: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var(targets - values) / Var(targets) over the unmasked: 1 for a perfect critic, 0 for one that says nothing.

    Args:
      targets, values: [B, C].
      mask: [B, C].
    """

    def variance(x):
        return reduce.tokens(jnp.square(x - reduce.tokens(x, mask).mean), mask).mean

    return 1.0 - variance(targets - values) / jnp.maximum(variance(targets), 1e-8)
