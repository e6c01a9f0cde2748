"""Returns from streams that another policy has made."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.returns.recursions import discounted_scan, streams


class VTrace(NamedTuple):
    """errors [T] = targets - v_tm1, advantages [T] for the policy gradient, q_estimates [T] behind them."""

    errors: jax.Array
    advantages: jax.Array
    q_estimates: jax.Array


def vtrace(
    v_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    v_t: jax.Array,
    rho_tm1: jax.Array,
    *,
    lambda_: jax.Array | float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    clip_pg_rho: float = 1.0,
) -> VTrace:
    """V-trace off-policy corrections (Espeholt et al. 2018, IMPALA, arXiv 1802.01561).

        delta_t = min(clip_rho, rho_t) (r_t + d_t v_t - v_tm1)
        errors_t = delta_t + d_t lambda_t min(clip_c, rho_t) errors_{t+1}
        q_t = r_t + d_t (v_t + lambda_t errors_{t+1}),     advantages_t = min(clip_pg_rho, rho_t) (q_t -
        v_tm1)

    On policy (rho 1) the targets v_tm1 + errors are lambda-returns. Gradients pass through nothing here but
    v_tm1 in `errors` and `advantages`: targets are constants.

    Args:
      v_tm1, r_t, v_t: [T] values of the observations acted on, rewards, values of the true successors.
      discount_t: [T] or a number, zero where the episode terminated.
      rho_tm1: [T] pi(a) / mu(a), the importance ratio of the action taken; a constant.
      lambda_: [T] or a number; zero where the episode was truncated cuts the recursion and keeps the
        bootstrap.
      clip_rho, clip_c, clip_pg_rho: the three bounds; jnp.inf for none.

    Returns:
      VTrace(errors, advantages, q_estimates), [T] float32.
    """
    v_tm1, r_t, discount_t, v_t, rho, lambda_ = streams(
        v_tm1=v_tm1, r_t=r_t, discount_t=discount_t, v_t=v_t, rho_tm1=rho_tm1, lambda_=lambda_
    )
    delta_t = jnp.minimum(clip_rho, rho) * (r_t + discount_t * v_t - v_tm1)
    errors = discounted_scan(delta_t, discount_t * lambda_ * jnp.minimum(clip_c, rho))
    later = jnp.concatenate([errors[1:], jnp.zeros(1)])
    targets = jax.lax.stop_gradient(v_tm1 + errors)
    q_estimates = jax.lax.stop_gradient(r_t + discount_t * (v_t + lambda_ * later))
    return VTrace(targets - v_tm1, jnp.minimum(clip_pg_rho, rho) * (q_estimates - v_tm1), q_estimates)


def off_policy_returns(
    q_t: jax.Array, v_t: jax.Array, r_t: jax.Array, discount_t: jax.Array | float, c_t: jax.Array
) -> jax.Array:
    """Targets for q of the earlier step, corrected off policy (Munos et al. 2016, arXiv 1606.02647, eq. 3).

        G_t = r_t + d_t [ v_t - c_t q_t + c_t G_{t+1} ],     and G_T = r_T + d_T v_T at the end of the stream

    Args:
      q_t: [T] q(s_t, a_t) of the successor and the action taken there. The last entry is never used.
      v_t: [T] sum_a pi(a | s_t) q(s_t, a).
      r_t: [T] rewards.
      discount_t: [T] or a number, zero where the episode terminated.
      c_t: [T] how much of the trace is kept, a function of `TRACES`. Zero cuts it (put it there at
        truncations). The last entry is never used.

    Returns:
      [T] float32, targets for q(s_{t-1}, a_{t-1}).
    """
    q_t, v_t, r_t, discount_t, c_t = streams(q_t=q_t, v_t=v_t, r_t=r_t, discount_t=discount_t, c_t=c_t)
    q_t, c_t = q_t.at[-1].set(0.0), c_t.at[-1].set(0.0)
    return discounted_scan(r_t + discount_t * (v_t - c_t * q_t), discount_t * c_t)


TRACES = {
    # Munos et al. 2016: safe at any distance between the policies, and long where they agree.
    "retrace": lambda pi_t, mu_t, lambda_: lambda_ * jnp.minimum(1.0, pi_t / mu_t),
    # Precup et al. 2000: needs no behaviour policy.
    "tree_backup": lambda pi_t, mu_t, lambda_: lambda_ * pi_t,
    # Harutyunyan et al. 2016, arXiv 1602.04951: no correction of the trace; right for policies close
    # together.
    "q_lambda": lambda pi_t, mu_t, lambda_: lambda_ * jnp.ones_like(pi_t),
    # Precup et al. 2000: unbiased, with unbounded variance.
    "importance": lambda pi_t, mu_t, lambda_: lambda_ * pi_t / mu_t,
}
"""The trace coefficient c_t from pi(a_t | s_t) and mu(a_t | s_t), both [T], and lambda."""


def retrace(
    q_t: jax.Array,
    a_t: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    pi_t: jax.Array,
    mu_t: jax.Array,
    *,
    lambda_: jax.Array | float = 1.0,
    trace: str = "retrace",
) -> jax.Array:
    """Retrace(lambda) targets; tree backup, Q(lambda) and importance sampling by another `trace`.

    `off_policy_returns` with v_t = sum_a pi_t q_t and c_t = TRACES[trace] (Munos et al. 2016, arXiv
    1606.02647).

    Args:
      q_t: [T, A] action values of the successors.
      a_t: [T] actions taken there. The last entry (the action after the stream) is never used.
      r_t: [T] rewards.
      discount_t: [T] or a number, zero where the episode terminated.
      pi_t: [T, A] probabilities of the target policy at the successors.
      mu_t: [T] probability under the behaviour policy of a_t. The last entry is never used.
      lambda_: [T] or a number; zero where the episode was truncated cuts the trace and keeps the bootstrap.
      trace: a key of `TRACES`.

    Returns:
      [T] float32, targets for q(s_{t-1}, a_{t-1}).

    Raises:
      ValueError: shapes that do not fit, or an unknown trace.
    """
    if jnp.ndim(q_t) != 2 or jnp.shape(q_t) != jnp.shape(pi_t):
        raise ValueError(f"q_t has shape {jnp.shape(q_t)}, pi_t {jnp.shape(pi_t)}, expected [T, A] for both")
    if trace not in TRACES:
        raise ValueError(f"trace is {trace!r}, expected one of {', '.join(map(repr, TRACES))}")
    q_t, pi_t = jnp.asarray(q_t, jnp.float32), jnp.asarray(pi_t, jnp.float32)
    taken = jnp.asarray(a_t)[:, None]
    chosen_q = jnp.take_along_axis(q_t, taken, axis=1)[:, 0]
    chosen_pi = jnp.take_along_axis(pi_t, taken, axis=1)[:, 0]
    chosen_pi, mu_t, lambda_ = streams(pi_t=chosen_pi, mu_t=mu_t, lambda_=lambda_)
    return off_policy_returns(
        chosen_q, (pi_t * q_t).sum(axis=1), r_t, discount_t, TRACES[trace](chosen_pi, mu_t, lambda_)
    )
