"""Policy-gradient and actor-critic losses, element by element.

Every function takes arrays of one shape, `[T]` for a stream or `[B, T]` for tokens, and returns losses (to be
minimised) of that shape in float32. Advantages and targets are constants: no gradient flows into them.
"""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape
from jaxrl.losses.kl import k3

Diagnostics = dict[str, jax.Array]


def clipped_surrogate(
    ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), for PPO and the GRPO family alike.

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
        raise ValueError(f"dual_clip is {dual_clip}, expected a bound on the ratio above 1 (3 is usual) or None")
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
    return (-jnp.inf if clip_low is None else 1.0 - clip_low), (jnp.inf if clip_high is None else 1.0 + clip_high)


def importance_ratio(log_ratio: jax.Array) -> jax.Array:
    """exp(log_ratio), held below float32's largest number: [...] -> [...].

    An infinite ratio would turn the zero gradient of a clipped element into NaN. Above e^80 the gradient is
    zero.
    """
    return jnp.exp(jnp.minimum(log_ratio, 80.0))


def policy_gradient(log_probs: jax.Array, advantages: jax.Array) -> jax.Array:
    """-A log pi(a): the actor's loss of A2C, and of every actor-critic whose A is a TD error.

    Sutton et al. 2000; A2C, Mnih et al. 2016, arXiv 1602.01783. Its value means nothing, only its gradient
    does. The factor discount^t of the theory is dropped, as everywhere.

    Args:
      log_probs: [...] of the actions taken.
      advantages: [...] A.

    Returns:
      [...] float32.
    """
    same_shape("[...]", log_probs=log_probs, advantages=advantages)
    return -jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32)) * jnp.asarray(log_probs, jnp.float32)


def reinforce(log_probs: jax.Array, returns: jax.Array, baseline: jax.Array | None = None) -> jax.Array:
    """-(G - b) log pi(a): REINFORCE with an optional baseline (Williams 1992).

    Args:
      log_probs: [...] of the actions taken.
      returns: [...] G, the return from each action on.
      baseline: [...] b, which must not depend on the action; a constant here. None: none.

    Returns:
      [...] float32.
    """
    same_shape("[...]", log_probs=log_probs, returns=returns, baseline=baseline)
    return policy_gradient(log_probs, returns if baseline is None else returns - baseline)


def ppo_clip(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """PPO's clipped loss from log-probs: `clipped_surrogate` with r = exp(log_probs - old_log_probs).

    At r = 1 its gradient is that of `policy_gradient`. clip_low = clip_high = None gives the surrogate
    of TRPO, -r A.

    Args:
      log_probs, old_log_probs: [...] of the actions taken, now and when they were taken (a constant).
      advantages: [...] A, normalised by the caller where wanted.
      clip_low, clip_high, dual_clip: see `clipped_surrogate`.

    Returns:
      ([...] losses, diagnostics of `clipped_surrogate` with "ratio" and "kl_old", an estimate of KL(old ||
      new)); the diagnostics carry no gradient.
    """
    same_shape("[...]", log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    old = jax.lax.stop_gradient(jnp.asarray(old_log_probs, jnp.float32))
    ratio = importance_ratio(jnp.asarray(log_probs, jnp.float32) - old)
    values, diagnostics = clipped_surrogate(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    diagnostics |= {"ratio": ratio, "kl_old": approx_kl(log_probs, old_log_probs)}
    return values, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def approx_kl(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """(r - 1) - log r: estimates KL(old || new) from samples of the old policy; never negative.

    This is `kl.k3` seen from the old policy, under which the samples were drawn.

    Args:
      log_probs, old_log_probs: [...] of the actions taken.

    Returns:
      [...] float32 without gradient.
    """
    return jax.lax.stop_gradient(k3(old_log_probs, log_probs))


def value_loss(
    values: jax.Array,
    targets: jax.Array,
    *,
    old_values: jax.Array | None = None,
    clip: float | None = None,
) -> jax.Array:
    """Half the squared error of the value function, with PPO's clip if wanted.

        1/2 max( (v - G)^2, (v_old + clip(v - v_old, -clip, clip) - G)^2 )

    The paper has no clip, which is off by default. Many implementations take the policy's epsilon for it,
    which makes it depend on the scale of the rewards; here it is a number of its own, in units of value.

    Args:
      values: [...] v.
      targets: [...] G, constants.
      old_values: [...] v_old, constants; needed with `clip`.
      clip: how far v counts away from v_old, or None.

    Returns:
      [...] float32.

    Raises:
      ValueError: different shapes, or a clip without old_values.
    """
    same_shape("[...]", values=values, targets=targets, old_values=old_values)
    values = jnp.asarray(values, jnp.float32)
    targets = jax.lax.stop_gradient(jnp.asarray(targets, jnp.float32))
    loss = jnp.square(values - targets)
    if clip is not None:
        if old_values is None:
            raise ValueError(f"clip is {clip} but old_values is None: pass the values the batch was collected with")
        old = jax.lax.stop_gradient(jnp.asarray(old_values, jnp.float32))
        loss = jnp.maximum(loss, jnp.square(old + jnp.clip(values - old, -clip, clip) - targets))
    return 0.5 * loss


def entropy_from_log_probs(log_probs: jax.Array) -> jax.Array:
    """Entropy -sum_a p log p, in nats, from normalised log-probs.

    Args:
      log_probs: [..., A]. -inf marks impossible actions, which add nothing.

    Returns:
      [...] float32.
    """
    log_probs = jnp.asarray(log_probs, jnp.float32)
    finite = jnp.where(log_probs > -jnp.inf, log_probs, 0.0)
    return -jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(finite) * finite, 0.0), axis=-1)


def entropy_from_logits(logits: jax.Array) -> jax.Array:
    """Entropy in nats of softmax(logits): [..., A] -> [...] float32. -inf marks impossible actions."""
    return entropy_from_log_probs(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1))
