"""Advantages by comparison: with the other answers to a prompt, or with the rest of the batch.

Group functions take the rewards of the G answers to one prompt along the last axis.
"""

import jax
import jax.numpy as jnp


def group_relative(
    rewards: jax.Array,
    *,
    scale: str = "std",
    valid: jax.Array | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
) -> jax.Array:
    """Advantage of each answer over the others to the same prompt: A = (R - mean of group) / (std + eps).

    Shao et al. 2024 (GRPO, arXiv 2402.03300). Equal rewards give exactly zero. The paper has no eps and does
    not say which std; every implementation takes ddof = 1. Their eps: 1e-4 TRL, 1e-6 verl and Tunix, 1e-8
    Dr.GRPO's.

    Args:
      rewards: [G] one group, or [P, G] for P prompts with G answers each.
      scale: "std": the group's own std. "none": not divided (Dr.GRPO, Liu et al. 2025, arXiv 2503.20783,
        since the division favours questions that are too easy or too hard). "batch": the std of all rewards
        given.
      valid: like rewards, false where an answer has no reward; NaN rewards are always invalid. Invalid
        answers get advantage zero and take no part in mean and std, and neither does a group with a single
        valid answer.
      ddof: what is subtracted from the count in the std: 1 unbiased, 0 population.
      eps: added to the std, so that rounding noise is not blown up to +-1.

    Returns:
      Like rewards, float32.

    Raises:
      ValueError: fewer than two answers in a group, or an unknown scale.
    """
    rewards, valid = _groups(rewards, valid)
    centred = _centred(rewards, valid)
    if scale == "none":
        return centred
    if scale == "std":
        count = valid.sum(axis=-1, keepdims=True)
        std = jnp.sqrt(jnp.square(centred).sum(axis=-1, keepdims=True) / jnp.maximum(count - ddof, 1))
    elif scale == "batch":
        of_batch = _centred(rewards.reshape(-1), valid.reshape(-1))
        std = jnp.sqrt(jnp.square(of_batch).sum() / jnp.maximum(valid.sum() - ddof, 1))
    else:
        raise ValueError(f"scale is {scale!r}, expected 'std', 'none' or 'batch'")
    return jnp.where(centred == 0.0, 0.0, centred / jnp.where(std > 0.0, std + eps, 1.0))


def leave_one_out(rewards: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
    """Advantage over the mean of the *other* answers: A_i = R_i - mean_{j != i} R_j.

    This is n / (n - 1) (R_i - mean R) with n valid answers.

    Kool et al. 2019; RLOO, Ahmadian et al. 2024, arXiv 2402.14740. An unbiased baseline.

    Args:
      rewards: [G] or [P, G].
      valid: as in `group_relative`.

    Returns:
      Like rewards, float32. Zero where invalid and in groups with a single valid answer.

    Raises:
      ValueError: fewer than two answers in a group.
    """
    rewards, valid = _groups(rewards, valid)
    count = valid.sum(axis=-1, keepdims=True)
    return _centred(rewards, valid) * (count / jnp.maximum(count - 1, 1))


def _groups(rewards, valid) -> tuple[jax.Array, jax.Array]:
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim not in (1, 2):
        raise ValueError(f"rewards has shape {rewards.shape}, expected [G] or [P, G]: reshape flat rewards to [P, G]")
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards has shape {rewards.shape}: groups (the last axis) of {rewards.shape[-1]} answer(s). "
            "An answer is judged against the others to the same prompt, which takes at least 2: sample more "
            "answers to each prompt, or use a value baseline"
        )
    has_reward = ~jnp.isnan(rewards)
    if valid is not None:
        if jnp.shape(valid) != rewards.shape:
            raise ValueError(f"valid has shape {jnp.shape(valid)}, rewards {rewards.shape}: they must agree")
        has_reward = has_reward & jnp.asarray(valid, bool)
    return jnp.where(has_reward, rewards, 0.0), has_reward


def _centred(rewards, valid):
    """rewards - mean over the last axis. The smallest is taken away first: equal rewards are exactly zero."""
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=-1, keepdims=True)
    above = jnp.where(valid, rewards - jnp.where(jnp.isinf(lowest), 0.0, lowest), 0.0)
    mean = above.sum(axis=-1, keepdims=True) / jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)
    return jnp.where(valid, above - mean, 0.0)


def whiten(
    x: jax.Array,
    mask: jax.Array,
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    axis_name: str | None = None,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over all unmasked elements; masked ones become zero.

    Args:
      x: [...] of any shape, usually advantages [B, T] or [T].
      mask: like x, true where an element counts.
      shift_mean: False keeps the mean: (x - mean) / sqrt(var + eps) + mean, as for rewards in PPO.
      ddof: 1 (Bessel's correction, as the implementations of PPO for language models) or 0.
      eps: added to the variance.
      axis_name: a mapped axis (shard_map, vmap) to take the statistics over as well. None: they are local,
        which inside shard_map means one mean and one variance to each shard.

    Returns:
      Like x, float32.

    Raises:
      ValueError: x and mask of different shapes.
    """
    if jnp.shape(x) != jnp.shape(mask):
        raise ValueError(f"x has shape {jnp.shape(x)}, mask {jnp.shape(mask)}: they must agree")
    mask = jnp.asarray(mask, bool)
    x = jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)

    def total(values):
        local = jnp.where(mask, values, 0.0).sum()
        return local if axis_name is None else jax.lax.psum(local, axis_name)

    # Equal elements must give exactly zero, so an element is taken away before the mean is rounded.
    lowest = jnp.min(jnp.where(mask, x, jnp.inf))
    lowest = lowest if axis_name is None else jax.lax.pmin(lowest, axis_name)
    above = jnp.where(mask, x - lowest, 0.0)
    count = total(jnp.ones_like(x))
    mean = total(above) / jnp.maximum(count, 1.0)
    variance = total(jnp.square(above - mean)) / jnp.maximum(count - ddof, 1.0)
    whitened = (above - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask, whitened if shift_mean else whitened + mean + lowest, 0.0)
