"""Losses of actor-critics with replay: the deterministic policy gradient and soft actor-critic, element by element.

Action values come from an ensemble of K critics, [K, ...], of which the smallest is believed (clipped double
Q-learning, Fujimoto et al. 2018, arXiv 1802.09477); one critic is K = 1. Critics learn by `td.td_learning` towards the
values of the successor made here. Losses never touch a critic's parameters: an actor's loss takes numbers.
"""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape


def smallest(q: jax.Array) -> jax.Array:
    """min over critics: [K, ...] -> [...] float32, the value of TD3 and SAC against overestimation."""
    if jnp.ndim(q) == 0:
        raise ValueError("q has shape (), expected [K, ...]: stack the K critics' values along a first axis")
    return jnp.min(jnp.asarray(q, jnp.float32), axis=0)


def deterministic_policy_gradient(
    actions: jax.Array, dq_da: jax.Array, *, clip: jax.Array | float | None = None
) -> jax.Array:
    """-a . dq/da, whose gradient is -dq/da da/dtheta (Silver et al. 2014; DDPG, Lillicrap et al. 2016, arXiv
    1509.02971).

    dq/da is a constant, so nothing reaches the critic. The value means nothing, only its gradient does.

    Args:
      actions: [..., dim], a = mu(s), differentiable.
      dq_da: [..., dim], the critic's gradient with respect to the action, at (s, a).
      clip: bound on the Euclidean norm of each dq/da, or None.

    Returns:
      [...] float32.

    Raises:
      ValueError: different shapes.
    """
    same_shape("[..., dim]", actions=actions, dq_da=dq_da)
    dq_da = jax.lax.stop_gradient(jnp.asarray(dq_da, jnp.float32))
    if clip is not None:
        norm = jnp.sqrt(jnp.sum(jnp.square(dq_da), axis=-1, keepdims=True))
        dq_da = dq_da * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
    return -jnp.sum(jnp.asarray(actions, jnp.float32) * dq_da, axis=-1)


def soft_value(q: jax.Array, log_probs: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """min_k q_k(s, a) - temperature log pi(a | s), for an action drawn from pi (Haarnoja et al. 2018, arXiv
    1801.01290).

    Args:
      q: [K, ...] values of the action by the K critics.
      log_probs: [...] of the action.
      temperature: alpha, in units of reward per nat.

    Returns:
      [...] float32.
    """
    value = smallest(q)
    same_shape("[...]", q=value, log_probs=log_probs)
    return value - temperature * jnp.asarray(log_probs, jnp.float32)


def expected_soft_value(q: jax.Array, log_probs: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """sum_a pi(a | s) (min_k q_k(s, a) - temperature log pi(a | s)): no sampling where actions can be counted.

    Christodoulou 2019, arXiv 1910.07207.

    Args:
      q: [K, ..., A] values of all actions by the K critics.
      log_probs: [..., A] of all actions; -inf marks impossible ones, which add nothing.
      temperature: alpha.

    Returns:
      [...] float32.
    """
    value = smallest(q)
    same_shape("[..., A]", q=value, log_probs=log_probs)
    log_probs = jnp.asarray(log_probs, jnp.float32)
    possible = log_probs > -jnp.inf
    finite = jnp.where(possible, log_probs, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(finite) * (value - temperature * finite), 0.0), axis=-1)


def soft_actor(q: jax.Array, log_probs: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """temperature log pi(a | s) - min_k q_k(s, a): minus `soft_value`, the action drawn by reparameterisation.

    Its gradient flows through a into q and log pi; hold the critics' parameters constant where q is computed. The
    temperature is a constant here.
    """
    return -soft_value(q, log_probs, jax.lax.stop_gradient(temperature))


def expected_soft_actor(q: jax.Array, log_probs: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Minus `expected_soft_value`: q and temperature are constants, the gradient is that of the probabilities."""
    return -expected_soft_value(jax.lax.stop_gradient(q), log_probs, jax.lax.stop_gradient(temperature))


def temperature_loss(log_temperature: jax.Array, entropy: jax.Array, target_entropy: jax.Array | float) -> jax.Array:
    """alpha (H - H_target), alpha = exp(log_temperature): raises the temperature while entropy lacks.

    Haarnoja et al. 2018, arXiv 1812.05905, eq. 18. For one drawn action, -log pi(a | s) stands for the entropy H. Some
    implementations differentiate log_temperature in alpha's place, which points the same way.

    Args:
      log_temperature: scalar, differentiable.
      entropy: [...] of the policy, or -log_probs; constants.
      target_entropy: usually -dim(A) for continuous actions, a fraction of log |A| for counted ones.

    Returns:
      [...] float32.
    """
    missing = jnp.asarray(entropy, jnp.float32) - target_entropy
    return jnp.exp(jnp.asarray(log_temperature, jnp.float32)) * jax.lax.stop_gradient(missing)
