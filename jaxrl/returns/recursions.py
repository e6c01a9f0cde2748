"""Recursions backwards over one stream of time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def discounted_scan(x_t: jax.Array, decay_t: jax.Array | float, init: jax.Array | float = 0.0) -> jax.Array:
    """The one backward recursion: y_t = x_t + decay_t y_{t+1}, with y_T = init.

    Discounted and lambda-returns, GAE, V-trace and Retrace are all this with their own x and decay.

    Args:
      x_t: [T].
      decay_t: [T], or one number for all steps. Zero cuts the recursion.
      init: what follows the last step, a scalar.

    Returns:
      [T] float32, accumulated in float32.

    Raises:
      ValueError: arguments of other shapes.
    """
    x_t, decay_t = streams(x_t=x_t, decay_t=decay_t)

    def step(later, now):
        x, decay = now
        y = x + decay * later
        return y, y

    return jax.lax.scan(step, jnp.asarray(init, jnp.float32), (x_t, decay_t), reverse=True)[1]


def discounted_returns(r_t: jax.Array, discount_t: jax.Array | float, bootstrap: jax.Array | float = 0.0) -> jax.Array:
    """Monte-Carlo returns G_t = r_t + discount_t G_{t+1}, with `bootstrap` the value after the last step.

    Args:
      r_t: [T] rewards.
      discount_t: [T] or a number, zero where the episode terminated.
      bootstrap: scalar, the value of the observation after the last step.

    Returns:
      [T] float32.
    """
    return discounted_scan(r_t, discount_t, bootstrap)


def n_step_returns(r_t: jax.Array, discount_t: jax.Array | float, v_t: jax.Array, *, n: int) -> jax.Array:
    """n-step returns: n rewards, then the value of the observation reached (Sutton and Barto 2018, 7.1).

        G_t = r_t + d_t r_{t+1} + d_t d_{t+1} r_{t+2} + ... + d_t ... d_{t+n-1} v_{t+n-1}

    with d the discount; v_{t+n-1} belongs to the observation after r_{t+n-1}. Steps nearer to the end of the
    stream than n take what rewards there are and bootstrap from the last value.

    Args:
      r_t: [T] rewards.
      discount_t: [T] or a number, zero where the episode terminated. To cut at a truncation as well, use
        `lambda_returns`, or end the stream there.
      v_t: [T] values of the successors.
      n: number of rewards, at least 1. n >= T gives discounted returns bootstrapped from v_t[-1].

    Returns:
      [T] float32.

    Raises:
      ValueError: streams of different lengths, or n < 1.
    """
    r_t, discount_t, v_t = streams(r_t=r_t, discount_t=discount_t, v_t=v_t)
    if n < 1:
        raise ValueError(f"n is {n}, expected at least one reward")
    length = r_t.shape[0]
    n = min(n, length)
    # Past the end: no reward, discount 1, so that the last value is handed back unchanged.
    r_t = jnp.concatenate([r_t, jnp.zeros(n - 1)])
    discount_t = jnp.concatenate([discount_t, jnp.ones(n - 1)])
    last_value = jnp.concatenate([v_t[n - 1 :], jnp.full(n - 1, v_t[-1])])

    def one_step_back(i, later):
        reward = jax.lax.dynamic_slice(r_t, (n - 1 - i,), (length,))
        return reward + jax.lax.dynamic_slice(discount_t, (n - 1 - i,), (length,)) * later

    return jax.lax.fori_loop(0, n, one_step_back, last_value)


def lambda_returns(
    r_t: jax.Array, discount_t: jax.Array | float, v_t: jax.Array, *, lambda_: jax.Array | float = 1.0
) -> jax.Array:
    """TD(lambda) targets: G_t = r_t + d_t [(1 - lambda_t) v_t + lambda_t G_{t+1}], with G_T = v_t[-1].

    Sutton 1988. lambda 0 gives r + d v, one-step targets; lambda 1 gives discounted returns bootstrapped from
    v_t[-1].

    Args:
      r_t: [T] rewards.
      discount_t: [T] or a number, zero where the episode terminated.
      v_t: [T] values of the successors (of the true last observation where the episode was truncated).
      lambda_: [T] or a number. Zero where the episode was truncated cuts the recursion and keeps the
        bootstrap.

    Returns:
      [T] float32.
    """
    r_t, discount_t, v_t, lambda_ = streams(r_t=r_t, discount_t=discount_t, v_t=v_t, lambda_=lambda_)
    return discounted_scan(r_t + discount_t * (1.0 - lambda_) * v_t, discount_t * lambda_, v_t[-1])


class Estimates(NamedTuple):
    """Advantages [T] for the policy, and targets [T] for the value function."""

    advantages: jax.Array
    targets: jax.Array


def gae(
    v_tm1: jax.Array,
    r_t: jax.Array,
    v_t: jax.Array,
    terminated_t: jax.Array,
    truncated_t: jax.Array,
    *,
    discount: float,
    lambda_: float,
) -> Estimates:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

        delta_t = r_t + discount (1 - terminated_t) v_t - v_tm1
        A_t = delta_t + discount lambda (1 - terminated_t) (1 - truncated_t) A_{t+1},      targets = A + v_tm1

    The recursion is cut at either end of an episode, the bootstrap is dropped at termination only; where a
    step is both, termination wins.

    Args:
      v_tm1: [T] values of the observations acted on.
      r_t: [T] rewards.
      v_t: [T] values of the true successors: at a truncation that of the final observation, not of the reset
        one.
      terminated_t: [T] true where the task ended, and nothing follows.
      truncated_t: [T] true where a time limit (or anything outside the task) cut the episode.
      discount: gamma.
      lambda_: 0 gives TD errors, 1 gives returns minus values.

    Returns:
      Estimates(advantages [T], targets [T]), float32, with the gradient of the values in them: stop it, or
      take values that carry none.
    """
    v_tm1, r_t, v_t, terminated, truncated = streams(
        v_tm1=v_tm1, r_t=r_t, v_t=v_t, terminated_t=terminated_t, truncated_t=truncated_t
    )
    discount_t = discount * (1.0 - terminated)
    delta_t = r_t + discount_t * v_t - v_tm1
    advantages = discounted_scan(delta_t, discount_t * lambda_ * (1.0 - truncated))
    return Estimates(advantages, advantages + v_tm1)


def streams(**given) -> tuple[jax.Array, ...]:
    """The streams in float32, single numbers repeated; raises ValueError unless all have one length."""
    (first, standard), *rest = given.items()
    if jnp.ndim(standard) != 1 or jnp.shape(standard)[0] == 0:
        raise ValueError(
            f"{first} has shape {jnp.shape(standard)}, expected one stream [T] of at least one step: "
            "use jax.vmap for several"
        )
    for name, stream in rest:
        if jnp.shape(stream) not in ((), jnp.shape(standard)):
            raise ValueError(
                f"{name} has shape {jnp.shape(stream)} but {first} has shape {jnp.shape(standard)}, "
                "expected [T] for both: one entry to a transition"
            )
    return tuple(jnp.broadcast_to(jnp.asarray(x, jnp.float32), jnp.shape(standard)) for x in given.values())
