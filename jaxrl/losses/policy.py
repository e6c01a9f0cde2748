"""Policy-gradient and actor-critic losses, element by element.

Every function takes arrays of one shape, `[T]` for a stream or `[B, T]` for tokens, and returns losses (to be
minimised) of that shape in float32. Advantages and targets are constants: no gradient flows into them.
"""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape

Diagnostics = dict[str, jax.Array]


def clipped_surrogate(
    ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): the one clipped surrogate of PPO and the GRPO
    family.

    Schulman et al. 2017 (PPO, arXiv 1707.06347); clip_high > clip_low is DAPO's clip-higher (Yu et al. 2025,
    arXiv 2503.14476). With A > 0 the gradient is exactly zero where r > 1 + clip_high, with A < 0 where
    r < 1 - clip_low. dual_clip = c > 1 also bounds the loss by -c A where A < 0 (Ye et al. 2020, arXiv
    1912.09729), and the gradient is zero where r > c.

    Args:
      ratio: [...] r = pi(a) / pi_old(a), differentiable.
      advantages: [...] A.
      clip_low, clip_high: distances of the clip from 1; None leaves that side open.
      dual_clip: c, or None for none (as PPO and GRPO; verl always has 3).

    Returns:
      ([...] losses, {"clipped_low", "clipped_high", "clipped_dual"}: [...] 1.0 where that bound is in force).

    Raises:
      ValueError: different shapes, or dual_clip not above 1.
    """
    same_shape("[...]", ratio=ratio, advantages=advantages)
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(
            f"dual_clip is {dual_clip}, expected a bound on the ratio above 1 (3 is usual) or None"
        )
    ratio = jnp.asarray(ratio, jnp.float32)
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
    lowest, highest = clip_bounds(clip_low, clip_high)
    values = -jnp.minimum(ratio * advantages, jnp.clip(ratio, lowest, highest) * advantages)
    diagnostics = {
        "clipped_low": (advantages < 0) & (ratio < lowest),
        "clipped_high": (advantages > 0) & (ratio > highest),
        "clipped_dual": jnp.zeros_like(ratio, bool),
    }
    if dual_clip is not None:
        values = jnp.where(advantages < 0, jnp.minimum(values, -dual_clip * advantages), values)
        diagnostics["clipped_dual"] = (advantages < 0) & (ratio > dual_clip)
    return values, {name: flag.astype(jnp.float32) for name, flag in diagnostics.items()}


def clip_bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """The interval [1 - clip_low, 1 + clip_high] in which a ratio is left alone; None opens that side."""
    return (-jnp.inf if clip_low is None else 1.0 - clip_low), (
        jnp.inf if clip_high is None else 1.0 + clip_high
    )
