"""Temporal-difference errors: target minus estimate, element by element.

The names are RLax's. Values `v` are [...], action values `q` are [..., A], actions `a` are [...] integers;
[T] for a stream, [] for one transition. `discount_t` is zero where the episode terminated, and only there: a
truncated step bootstraps from the true last observation. Targets are constants unless stop_target_gradients
is False (then this is the residual gradient). Square the errors, or take `huber`, for a loss.
"""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape
from jaxrl.returns import n_step_returns


def td_learning(
    v_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    v_t: jax.Array,
    *,
    stop_target_gradients: bool = True,
) -> jax.Array:
    """TD(0) error: r_t + discount_t v_t - v_tm1 (Sutton 1988).

    Args:
      v_tm1: [...] values of the observations acted on.
      r_t: [...] rewards.
      discount_t: [...] or a number, zero where the episode terminated.
      v_t: [...] values of the true successors.
      stop_target_gradients: whether the target is a constant (semi-gradient).

    Returns:
      [...] float32.

    Raises:
      ValueError: different shapes.
    """
    return _one_step_target(r_t, discount_t, v_t, stop_target_gradients) - _estimate(v_tm1, r_t)


def sarsa(
    q_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    q_t: jax.Array,
    a_t: jax.Array,
    *,
    stop_target_gradients: bool = True,
) -> jax.Array:
    """Sarsa error: r_t + discount_t q_t[a_t] - q_tm1[a_tm1], a_t being the action really taken next.

    Rummery and Niranjan 1994.

    Args:
      q_tm1, q_t: [..., A] action values of the observation acted on and of its true successor.
      a_tm1, a_t: [...] the actions taken there.
      r_t, discount_t, stop_target_gradients: as `td_learning`.

    Returns:
      [...] float32.
    """
    return td_learning(
        _chosen(q_tm1, a_tm1), r_t, discount_t, _chosen(q_t, a_t), stop_target_gradients=stop_target_gradients
    )


def expected_sarsa(
    q_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    q_t: jax.Array,
    probs_a_t: jax.Array,
    *,
    stop_target_gradients: bool = True,
) -> jax.Array:
    """Expected Sarsa error: r_t + discount_t sum_a probs_a_t[a] q_t[a] - q_tm1[a_tm1].

    Van Seijen et al. 2009. With the greedy policy's probabilities it is Q-learning.

    Args:
      q_tm1, a_tm1, r_t, discount_t, q_t, stop_target_gradients: as `sarsa`.
      probs_a_t: [..., A] the target policy at the successor.

    Returns:
      [...] float32.
    """
    same_shape("[..., A]", q_t=q_t, probs_a_t=probs_a_t)
    v_t = jnp.sum(jnp.asarray(probs_a_t, jnp.float32) * jnp.asarray(q_t, jnp.float32), axis=-1)
    return td_learning(_chosen(q_tm1, a_tm1), r_t, discount_t, v_t, stop_target_gradients=stop_target_gradients)


def q_learning(
    q_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    q_t: jax.Array,
    *,
    stop_target_gradients: bool = True,
) -> jax.Array:
    """Q-learning error: r_t + discount_t max_a q_t[a] - q_tm1[a_tm1] (Watkins 1989; DQN, Mnih et al. 2015).

    Arguments as `sarsa`; q_t may come from a target network. Returns [...] float32.
    """
    return td_learning(
        _chosen(q_tm1, a_tm1),
        r_t,
        discount_t,
        jnp.max(jnp.asarray(q_t, jnp.float32), axis=-1),
        stop_target_gradients=stop_target_gradients,
    )


def double_q_learning(
    q_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    q_t_value: jax.Array,
    q_t_selector: jax.Array,
    *,
    stop_target_gradients: bool = True,
) -> jax.Array:
    """Double Q-learning error: r_t + discount_t q_t_value[argmax_a q_t_selector[a]] - q_tm1[a_tm1].

    Van Hasselt et al. 2016, arXiv 1509.06461: one network (the online one) chooses, the other (the target)
    values, so that noise is not selected for.

    Args:
      q_tm1, a_tm1, r_t, discount_t, stop_target_gradients: as `sarsa`.
      q_t_value, q_t_selector: [..., A] action values of the successor from the two networks.

    Returns:
      [...] float32.
    """
    same_shape("[..., A]", q_t_value=q_t_value, q_t_selector=q_t_selector)
    v_t = _chosen(q_t_value, jnp.argmax(q_t_selector, axis=-1))
    return td_learning(_chosen(q_tm1, a_tm1), r_t, discount_t, v_t, stop_target_gradients=stop_target_gradients)


def n_step_td_learning(
    v_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array | float,
    v_t: jax.Array,
    *,
    n: int,
    stop_target_gradients: bool = True,
) -> jax.Array:
    """n-step TD error over a stream: `returns.n_step_returns`(r_t, discount_t, v_t) - v_tm1.

    For n-step Sarsa hand in q_tm1[a_tm1] and q_t[a_t] as v; for n-step Q-learning q_tm1[a_tm1] and max_a
    q_t[a].

    Args:
      v_tm1, r_t, v_t: [T].
      discount_t: [T] or a number, zero where the episode terminated.
      n: number of rewards; 1 is `td_learning`.
      stop_target_gradients: whether the target is a constant.

    Returns:
      [T] float32.
    """
    target = n_step_returns(r_t, discount_t, v_t, n=n)
    return (jax.lax.stop_gradient(target) if stop_target_gradients else target) - _estimate(v_tm1, r_t)


def squared(errors: jax.Array) -> jax.Array:
    """Half the square of every error: [...] -> [...] float32. Its gradient is the error."""
    return 0.5 * jnp.square(jnp.asarray(errors, jnp.float32))


def huber(errors: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Half the square up to |error| = delta, then straight: delta (|error| - delta / 2).

    Huber 1964. [...] -> [...] float32. Its gradient is clip(error, -delta, delta).
    """
    magnitude = jnp.abs(jnp.asarray(errors, jnp.float32))
    inside = jnp.minimum(magnitude, delta)
    return 0.5 * jnp.square(inside) + delta * (magnitude - inside)


def _one_step_target(r_t, discount_t, v_t, stop_target_gradients):
    same_shape("[...]", r_t=r_t, v_t=v_t, discount_t=discount_t if jnp.ndim(discount_t) else None)
    r_t, v_t = jnp.asarray(r_t, jnp.float32), jnp.asarray(v_t, jnp.float32)
    target = r_t + jnp.asarray(discount_t, jnp.float32) * v_t
    return jax.lax.stop_gradient(target) if stop_target_gradients else target


def _estimate(v_tm1, r_t):
    same_shape("[...]", r_t=r_t, v_tm1=v_tm1)
    return jnp.asarray(v_tm1, jnp.float32)


def _chosen(q, a):
    """q[a] along the last axis: [..., A], [...] -> [...]."""
    if jnp.shape(q)[:-1] != jnp.shape(a) or jnp.ndim(q) == 0:
        raise ValueError(
            f"action values have shape {jnp.shape(q)}, actions {jnp.shape(a)}, expected [..., A] and [...]: "
            "one action to each row of values"
        )
    return jnp.take_along_axis(jnp.asarray(q, jnp.float32), jnp.asarray(a)[..., None], axis=-1)[..., 0]
