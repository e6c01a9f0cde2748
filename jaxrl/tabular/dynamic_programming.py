"""Planning with a known model: one iteration, improve then evaluate, and three ways to evaluate.

Value iteration evaluates the improved policy by one sweep, truncated policy iteration by some, policy iteration to the
end. All three are `_plan` with another `evaluate`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.tabular.mdp import MDP, action_values, bellman, epsilon_greedy, evaluate_policy


class Solution(NamedTuple):
    """What planning found.

    `values` [S]. `action_values` [S, A], one look ahead from `values`. `policy` [S, A], greedy for them. `iterations`
    int32 [], how many were made. `changes` [max_iterations]: max_s |v_k - v_{k-1}| of each, NaN for those not made.
    With discount gamma < 1, `values` of value iteration are within changes[-1] gamma / (1 - gamma) of the optimum.
    """

    values: jax.Array
    action_values: jax.Array
    policy: jax.Array
    iterations: jax.Array
    changes: jax.Array


@partial(jax.jit, static_argnames="max_iterations")
def value_iteration(
    mdp: MDP,
    *,
    discount: jax.Array | float,
    tolerance: jax.Array | float = 1e-6,
    max_iterations: int = 1000,
    epsilon: jax.Array | float = 0.0,
    values: jax.Array | None = None,
) -> Solution:
    """Value iteration: v <- max_a sum_s' p(s' | s, a) [r + discount v(s')] (Bellman 1957).

    Intermediate values belong to no policy.

    Args:
      mdp: the model.
      discount: gamma.
      tolerance: stop when no value changed by this much in an iteration. Zero: only max_iterations stops.
      max_iterations: the most iterations.
      epsilon: above zero, the best among the policies that take every action with probability epsilon / A at least:
        what Monte Carlo control with epsilon-greedy exploration can reach.
      values: [S] to begin with; zeros if None.

    Returns:
      Solution.
    """
    return _plan(mdp, _sweeps(1), discount, tolerance, max_iterations, epsilon, values)


@partial(jax.jit, static_argnames=("sweeps", "max_iterations"))
def truncated_policy_iteration(
    mdp: MDP,
    *,
    discount: jax.Array | float,
    sweeps: int,
    tolerance: jax.Array | float = 1e-6,
    max_iterations: int = 1000,
    epsilon: jax.Array | float = 0.0,
    values: jax.Array | None = None,
) -> Solution:
    """Modified policy iteration: improve the policy, then evaluate it by `sweeps` of v <- r_pi + discount P_pi v.

    Puterman and Shin 1978. One sweep is value iteration, many are policy iteration.

    Args:
      mdp, discount, tolerance, max_iterations, epsilon, values: as `value_iteration`.
      sweeps: how many, at least 1.

    Returns:
      Solution; an iteration is an improvement with its sweeps.
    """
    if sweeps < 1:
        raise ValueError(f"sweeps is {sweeps}, expected at least 1")
    return _plan(mdp, _sweeps(sweeps), discount, tolerance, max_iterations, epsilon, values)


@partial(jax.jit, static_argnames="max_iterations")
def policy_iteration(
    mdp: MDP,
    policy: jax.Array,
    *,
    discount: jax.Array | float,
    tolerance: jax.Array | float = 1e-6,
    max_iterations: int = 100,
    epsilon: jax.Array | float = 0.0,
) -> Solution:
    """Policy iteration: evaluate exactly, improve, until the values stay (Howard 1960).

    Args:
      mdp, discount, epsilon: as `value_iteration`.
      policy: [S, A] to begin with. Undiscounted, it must reach a terminal state from everywhere.
      tolerance: stop when no value changed by this much. (Policies may alternate between actions that are equally
        good, values do not.) Rounding is about 1e-7 of the largest value in float32.
      max_iterations: the most improvements.

    Returns:
      Solution; the last iteration is the one that changed nothing.
    """
    values = evaluate_policy(mdp, policy, discount=discount)
    evaluate = lambda mdp, policy, values, discount: evaluate_policy(mdp, policy, discount=discount)
    return _plan(mdp, evaluate, discount, tolerance, max_iterations, epsilon, values)


def _sweeps(number: int) -> Callable:
    def evaluate(mdp, policy, values, discount):
        return jax.lax.fori_loop(0, number, lambda _, v: bellman(mdp, policy, v, discount=discount), values)

    return evaluate


def _plan(mdp, evaluate, discount, tolerance, max_iterations, epsilon, values) -> Solution:
    dtype = mdp.transition.dtype
    values = jnp.zeros(mdp.states, dtype) if values is None else jnp.asarray(values, dtype)
    improve = lambda v: epsilon_greedy(action_values(mdp, v, discount=discount), epsilon)

    def goes_on(carry):
        _, number, changes = carry
        last = jnp.where(number == 0, jnp.inf, changes[number - 1])
        return (number < max_iterations) & (last >= tolerance)

    def iterate(carry):
        v, number, changes = carry
        new = evaluate(mdp, improve(v), v, discount)
        return new, number + 1, changes.at[number].set(jnp.abs(new - v).max())

    carry = (values, jnp.int32(0), jnp.full(max_iterations, jnp.nan, dtype))
    values, iterations, changes = jax.lax.while_loop(goes_on, iterate, carry)
    q = action_values(mdp, values, discount=discount)
    return Solution(values, q, epsilon_greedy(q, epsilon), iterations, changes)
