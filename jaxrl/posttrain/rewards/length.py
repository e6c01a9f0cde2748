"""Rewards for length, in tokens: as formulas on arrays, and as Python rewards built on them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.posttrain.rewards.combine import check_columns

Reward = Callable[..., Sequence[float | None]]


def soft_overlong(lengths: jax.Array, *, limit: int, buffer: int) -> jax.Array:
    """DAPO's punishment of completions that come near the limit (Yu et al. 2025, arXiv 2503.14476, equation 13).

        0 up to limit - buffer tokens; then ((limit - buffer) - length) / buffer; -1 beyond the limit

    Args:
      lengths: `[...]` tokens, the EOS included.
      limit: tokens at most.
      buffer: tokens before the limit in which the punishment rises.

    Returns:
      float32 in [-1, 0].
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong buffer is {buffer} tokens; expected 1 to the limit of {limit}")
    return jnp.clip((limit - buffer - lengths.astype(jnp.float32)) / buffer, -1.0, 0.0)


def relative_length(lengths: jax.Array, correct: jax.Array) -> jax.Array:
    """Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3): short answers of a group are better.

        l = 1/2 - (length - shortest) / (longest - shortest);  l if correct, min(0, l) if not; 0 where all are as long

    Args:
      lengths: `[P, G]` tokens.
      correct: `[P, G]` bool.

    Returns:
      `[P, G]` float32 in [-1/2, 1/2], to be added to the reward with a weight.
    """
    lengths = lengths.astype(jnp.float32)
    shortest, longest = lengths.min(1, keepdims=True), lengths.max(1, keepdims=True)
    spread = longest - shortest
    value = 0.5 - (lengths - shortest) / jnp.maximum(spread, 1.0)
    return jnp.where(spread > 0, jnp.where(correct, value, jnp.minimum(value, 0.0)), 0.0)


def cosine_length(
    lengths: jax.Array,
    correct: jax.Array,
    *,
    limit: int,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> jax.Array:
    """Cosine reward of Yeo et al. 2025 (arXiv 2502.03373, appendix C.1): right answers be short, wrong ones long.

        r_L + (r_0 - r_L) (1 + cos(pi length / limit)) / 2, with its own r_0, r_L for right and wrong;
        `exceeded` from the limit on

    The paper's formula has its two ends the other way round than its text and figure, which we follow. Its rewards are
    right (2, 1), wrong (-10, 0), exceeded -10; the defaults here are those of Open-R1 and TRL.

    Args:
      lengths: `[...]` tokens, the EOS included.
      correct: `[...]` bool.
      limit: tokens at most.
      right: rewards of a right answer of no length, and at the limit.
      wrong: the same of a wrong one.
      exceeded: reward at the limit and beyond.

    Returns:
      float32 like `lengths`.
    """
    if limit < 1:
        raise ValueError(f"cosine: the limit is {limit} tokens; expected at least 1")
    correct = jnp.asarray(correct, bool)
    ends = [jnp.where(correct, of_right, of_wrong) for of_right, of_wrong in zip(right, wrong, strict=True)]
    share = (1 + jnp.cos(jnp.pi * lengths.astype(jnp.float32) / limit)) / 2
    return jnp.where(lengths >= limit, exceeded, ends[1] + (ends[0] - ends[1]) * share).astype(jnp.float32)


def overlong_reward(*, limit: int, buffer: int) -> Reward:
    """`soft_overlong` as a Python reward."""
    soft_overlong(jnp.zeros(1), limit=limit, buffer=buffer)  # what is wrong with them is found here
    return lambda *, lengths, **_: np.asarray(soft_overlong(jnp.asarray(lengths), limit=limit, buffer=buffer)).tolist()


def cosine_reward(
    accuracy: Reward,
    *,
    limit: int,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> Reward:
    """`cosine_length` as a Python reward, for answers that another reward finds right (above 1/2) or wrong.

    Args:
      accuracy: such as `number_reward()`; where it has no value there is none.
      limit, right, wrong, exceeded: as in `cosine_length`; a completion cut off earns `exceeded` at any length.
    """
    knobs = {"limit": limit, "right": tuple(right), "wrong": tuple(wrong), "exceeded": exceeded}
    cosine_length(jnp.zeros(1), jnp.zeros(1, bool), **knobs)

    def cosine(*, lengths, finish_reasons=None, **inputs) -> list[float | None]:
        if finish_reasons is not None:
            inputs["finish_reasons"] = finish_reasons
        check_columns("accuracy", accuracy, {"lengths": lengths, **inputs})
        scores = accuracy(lengths=lengths, **inputs)
        correct = jnp.asarray([score is not None and score > 0.5 for score in scores], bool)
        reasons = finish_reasons or ["eos"] * len(scores)
        reached = jnp.asarray([reason == "length" for reason in reasons], bool)
        values = cosine_length(jnp.where(reached, limit, jnp.asarray(lengths, jnp.int32)), correct, **knobs).tolist()
        return [None if score is None else value for score, value in zip(scores, values, strict=True)]

    return cosine
