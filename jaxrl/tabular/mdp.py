"""Finite Markov decision processes as arrays, their Bellman operators, and policies over them.

A policy is an array [S, A] of probabilities, values are [S], action values [S, A]. Everything here is a pure function
of arrays in the precision of the MDP's own (float32, or float64 where jax's x64 mode is on).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class MDP(NamedTuple):
    """A finite MDP with S states and A actions; make one with `make_mdp`, which checks it.

    `transition` [S, A, S]: p(s' | s, a). `reward` [S, A, S]: the reward of going from s to s' by a. `terminal` [S]
    bool: nothing follows once the state is entered; its value is 0, and its own rows are never used. `start` [S]: the
    distribution of the first state of an episode.
    """

    transition: jax.Array
    reward: jax.Array
    terminal: jax.Array
    start: jax.Array

    @property
    def states(self) -> int:
        return self.transition.shape[0]

    @property
    def actions(self) -> int:
        return self.transition.shape[1]


def make_mdp(transition, reward, terminal=None, start=None) -> MDP:
    """An MDP from arrays, checked on the host.

    Args:
      transition: [S, A, S] probabilities of the next state.
      reward: [S, A, S], or [S, A] where it does not depend on the next state.
      terminal: [S] bool; None for a task that goes on for ever.
      start: [S] probabilities of the first state; None for uniform over the states that are not terminal.

    Returns:
      MDP.

    Raises:
      ValueError: shapes that do not fit, rows that are no distributions, rewards that are not finite.
    """
    transition, reward = np.asarray(transition, np.float64), np.asarray(reward, np.float64)
    if transition.ndim != 3 or transition.shape[0] != transition.shape[2] or 0 in transition.shape:
        raise ValueError(f"transition has shape {transition.shape}, expected [S, A, S]: p[state, action, next state]")
    states, actions, _ = transition.shape
    if reward.shape == (states, actions):
        reward = np.broadcast_to(reward[:, :, None], transition.shape)
    if reward.shape != transition.shape:
        raise ValueError(
            f"reward has shape {reward.shape}, transition {transition.shape}, expected [S, A, S] (reward of each "
            "transition) or [S, A]"
        )
    terminal = np.zeros(states, bool) if terminal is None else np.asarray(terminal, bool)
    if terminal.shape != (states,):
        raise ValueError(f"terminal has shape {terminal.shape}, expected [S] = [{states}]")
    if terminal.all():
        raise ValueError("every state is terminal: an episode needs somewhere to begin")
    start = ~terminal / (~terminal).sum() if start is None else np.asarray(start, np.float64)
    if start.shape != (states,):
        raise ValueError(f"start has shape {start.shape}, expected [S] = [{states}]")
    for name, rows, axes in (("transition", transition, "[state, action]"), ("start", start[None], "")):
        bad = (rows < 0).any(axis=-1) | ~(np.abs(rows.sum(axis=-1) - 1.0) < 1e-5)
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{name} is no distribution{f' at {axes} = {list(at)}' if axes else ''}: probabilities must not be "
                f"negative and must add up to 1, here they add up to {rows[at].sum():g}"
            )
    if not np.isfinite(reward).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(reward))[0]]
        raise ValueError(f"reward at [state, action, next state] = {at} is {reward[tuple(at)]}, expected a number")
    dtype = jnp.result_type(float)
    return MDP(
        jnp.asarray(transition, dtype), jnp.asarray(reward, dtype), jnp.asarray(terminal), jnp.asarray(start, dtype)
    )


def action_values(mdp: MDP, values: jax.Array, *, discount: jax.Array | float) -> jax.Array:
    """One look ahead: q(s, a) = sum_s' p(s' | s, a) [r(s, a, s') + discount v(s')].

    The one place where the model meets values; both Bellman operators are a choice among the actions of this. Terminal
    states have q = 0, and v(s') counts as 0 there.

    Args:
      mdp: the model.
      values: [S].
      discount: gamma, a number or a scalar array.

    Returns:
      [S, A].

    Raises:
      ValueError: values of another shape.
    """
    if jnp.shape(values) != (mdp.states,):
        raise ValueError(f"values has shape {jnp.shape(values)}, expected [S] = [{mdp.states}]: one to each state")
    going_on = jnp.where(mdp.terminal, 0.0, values)
    q = (mdp.transition * (mdp.reward + discount * going_on[None, None])).sum(axis=-1)
    return jnp.where(mdp.terminal[:, None], 0.0, q)


def bellman(mdp: MDP, policy: jax.Array, values: jax.Array, *, discount: jax.Array | float) -> jax.Array:
    """The Bellman operator of a policy: (T_pi v)(s) = sum_a pi(a | s) q_v(s, a).

    A contraction in the maximum norm with factor `discount`; its fixed point is the value of the policy.

    Args:
      mdp, values, discount: as `action_values`.
      policy: [S, A] probabilities.

    Returns:
      [S].
    """
    _check_policy(mdp, policy)
    return (policy * action_values(mdp, values, discount=discount)).sum(axis=-1)


def bellman_optimality(mdp: MDP, values: jax.Array, *, discount: jax.Array | float) -> jax.Array:
    """The Bellman optimality operator: (T v)(s) = max_a q_v(s, a). A contraction too (Bellman 1957). Returns [S]."""
    return action_values(mdp, values, discount=discount).max(axis=-1)


def evaluate_policy(mdp: MDP, policy: jax.Array, *, discount: jax.Array | float) -> jax.Array:
    """The value of a policy, exactly: solves (I - discount P_pi) v = r_pi.

    Args:
      mdp: the model.
      policy: [S, A] probabilities.
      discount: gamma; 1 only if the policy reaches a terminal state from everywhere (otherwise infinities or NaN).

    Returns:
      [S].
    """
    _check_policy(mdp, policy)
    zero = jnp.zeros(mdp.states, mdp.transition.dtype)
    rewards = bellman(mdp, policy, zero, discount=discount)
    follows = jnp.where(
        mdp.terminal[:, None] | mdp.terminal[None], 0.0, jnp.einsum("sa,san->sn", policy, mdp.transition)
    )
    return jnp.linalg.solve(jnp.eye(mdp.states, dtype=follows.dtype) - discount * follows, rewards)


def uniform_policy(mdp: MDP) -> jax.Array:
    """Every action with the same probability, [S, A]."""
    return jnp.full((mdp.states, mdp.actions), 1.0 / mdp.actions, mdp.transition.dtype)


def deterministic_policy(mdp: MDP, actions) -> jax.Array:
    """The policy that takes `actions`: [S] integers, or one for all states. Returns [S, A]."""
    return jax.nn.one_hot(
        jnp.broadcast_to(jnp.asarray(actions), (mdp.states,)), mdp.actions, dtype=mdp.transition.dtype
    )


def greedy(q: jax.Array, *, ties: float | None = None) -> jax.Array:
    """The greedy policy: [..., A] -> [..., A].

    Args:
      q: [..., A] action values.
      ties: None: the first of the best actions, a deterministic policy. A number: equal shares to all actions that
        close to the best. 0.0 is for exploring; rounding makes ties of computed values unequal, so that about 1e-4
        shows all that are optimal. Compare values of policies, never the policies.

    Returns:
      [..., A] probabilities.
    """
    if ties is None:
        return jax.nn.one_hot(q.argmax(axis=-1), q.shape[-1], dtype=q.dtype)
    best = q >= q.max(axis=-1, keepdims=True) - ties
    return best / best.sum(axis=-1, keepdims=True, dtype=q.dtype)


def epsilon_greedy(q: jax.Array, epsilon: jax.Array | float, *, ties: float | None = None) -> jax.Array:
    """(1 - epsilon) greedy + epsilon uniform: [..., A] -> [..., A] probabilities. `ties` as `greedy`."""
    return (1.0 - epsilon) * greedy(q, ties=ties) + epsilon / q.shape[-1]


def draw(key: jax.Array, probs: jax.Array) -> jax.Array:
    """An index drawn from probs [N]: int32 []. Never one of probability zero. The key is consumed."""
    heights = jnp.cumsum(probs)
    return jnp.argmax(heights > jax.random.uniform(key, dtype=probs.dtype) * heights[-1]).astype(jnp.int32)


def step(key: jax.Array, mdp: MDP, state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One transition drawn from the model: (next state int32 [], reward [], terminated bool []). Consumes the key."""
    successor = draw(key, mdp.transition[state, action])
    return successor, mdp.reward[state, action, successor], mdp.terminal[successor]


def _check_policy(mdp, policy):
    if jnp.shape(policy) != (mdp.states, mdp.actions):
        raise ValueError(
            f"policy has shape {jnp.shape(policy)}, expected [S, A] = [{mdp.states}, {mdp.actions}] probabilities: "
            "deterministic_policy(mdp, actions) makes it from actions"
        )
