"""Estimators of KL(pi || ref) from the log-probs of sampled actions or tokens.

Schulman 2020, "Approximating KL divergence". With x sampled from pi and d = log pi(x) - log ref(x). What an
estimator is worth as a number, and what it is worth as a loss, differentiated with the samples held fixed,
are two questions:

    name      value          as a number   as a loss, its gradient is on average that of
    k1        d              unbiased      nothing at all: the gradient is zero on average
    k2        d^2 / 2        biased        KL(pi || ref), the reverse KL
    k3        e^-d - 1 + d   unbiased      KL(ref || pi), the forward KL
    k3_ratio  r * k3         unbiased      KL(pi || ref), also where samples come from an older policy

k1 belongs into a reward, where the policy gradient does the differentiating; as a loss it is no regulariser.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape


def _log_ratio(log_probs, ref_log_probs, clamp):
    same_shape("[...]", log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = jnp.asarray(log_probs, jnp.float32) - jax.lax.stop_gradient(jnp.asarray(ref_log_probs, jnp.float32))
    return d if clamp is None else jnp.clip(d, -clamp, clamp)


def k1(
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    *,
    old_log_probs: jax.Array | None = None,
    clamp: float | None = None,
) -> jax.Array:
    """d: unbiased, of high variance, sometimes negative; for rewards, not for losses.

    As a loss its gradient is grad log pi, which is zero on average, whatever the reference.

    Args:
      log_probs: [...] log pi(x) of the sampled x.
      ref_log_probs: [...] log ref(x); no gradient flows into it.
      old_log_probs: not used; accepted so that all estimators are called alike.
      clamp: bound on |d|, beyond which the gradient is zero (verl, Tunix: 20; OpenRLHF: 10). None, as in the
        papers and in TRL: no bound.

    Returns:
      [...] float32.
    """
    return _log_ratio(log_probs, ref_log_probs, clamp)


def k2(
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    *,
    old_log_probs: jax.Array | None = None,
    clamp: float | None = None,
) -> jax.Array:
    """d^2 / 2: biased, never negative; as a loss it has the reverse KL's gradient, d grad log pi.

    Arguments as `k1`.
    """
    return 0.5 * jnp.square(_log_ratio(log_probs, ref_log_probs, clamp))


def k3(
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    *,
    old_log_probs: jax.Array | None = None,
    clamp: float | None = None,
) -> jax.Array:
    """exp(-d) - 1 + d: unbiased, never negative; as a loss it has the forward KL's gradient.

    That gradient is (1 - exp(-d)) grad log pi. The KL term of GRPO (Shao et al. 2024, arXiv 2402.03300).
    Arguments as `k1`.
    """
    d = _log_ratio(log_probs, ref_log_probs, clamp)
    return jnp.expm1(-d) + d


def k3_ratio(
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    *,
    old_log_probs: jax.Array | None = None,
    clamp: float | None = None,
) -> jax.Array:
    """r * k3 with the differentiable ratio r = pi / old: the reverse KL's gradient (DeepSeek-AI 2025, V3.2).

    Its gradient is r (k3 + 1 - exp(-d)) grad log pi = r d grad log pi, and averaging over samples of the old
    policy
    turns r into the change of measure: exact at any distance from it.

    Args:
      log_probs, ref_log_probs, clamp: as `k1`; the clamp bounds d, never r.
      old_log_probs: [...] log old(x) of the policy that sampled x. None: the samples are pi's own, so r has
        the value 1 and still its gradient.

    Returns:
      [...] float32.
    """
    same_shape("[...]", log_probs=log_probs, old_log_probs=old_log_probs)
    new = jnp.asarray(log_probs, jnp.float32)
    old = new if old_log_probs is None else jnp.asarray(old_log_probs, jnp.float32)
    return jnp.exp(new - jax.lax.stop_gradient(old)) * k3(log_probs, ref_log_probs, clamp=clamp)


ESTIMATORS: dict[str, Callable[..., jax.Array]] = {"k1": k1, "k2": k2, "k3": k3, "k3_ratio": k3_ratio}
"""Each is f(log_probs, ref_log_probs, *, old_log_probs=None, clamp=None) -> values of the same shape."""


def categorical(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    """The exact KL(pi || ref) = sum_x pi(x) (log pi(x) - log ref(x)) of categorical distributions.

    Args:
      log_probs, ref_log_probs: [..., V] normalised log-probs of every outcome. Outcomes with pi(x) = 0 add
        nothing.

    Returns:
      [...] float32. Differentiable in both.
    """
    same_shape("[..., V]", log_probs=log_probs, ref_log_probs=ref_log_probs)
    log_p, log_q = jnp.asarray(log_probs, jnp.float32), jnp.asarray(ref_log_probs, jnp.float32)
    possible = log_p > -jnp.inf
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * difference, axis=-1)


def adapted_coefficient(
    coefficient: jax.Array, kl: jax.Array, *, target: float, samples: float, horizon: float
) -> jax.Array:
    """The next weight of a KL penalty, driven so that the KL comes to a target.

        beta' = beta (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon)

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2, with their code's reading of K_beta = samples / horizon.

    Args:
      coefficient: scalar beta of the samples seen.
      kl: scalar, their mean KL(pi || ref), summed over a completion.
      target: the KL wanted, in the same unit.
      samples: completions seen since the last change.
      horizon: completions over which a KL that is 20 % off or more changes beta by a fifth.

    Returns:
      float32 scalar.

    Raises:
      ValueError: a target or horizon that is not positive.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target is {target} and horizon {horizon}, expected both above 0")
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient, jnp.float32) * (1.0 + error * samples / horizon)
