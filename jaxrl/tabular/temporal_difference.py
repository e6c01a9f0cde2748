"""Temporal differences: prediction by TD(0), n-step TD and TD(lambda), control by the relatives of Sarsa.

Control methods differ only in their target, a small function handed in:

    control(mdp, key, q_learning, discount=0.9, step_size=0.1, epsilon=0.1, episodes=500)
    control(mdp, key, tree_backup, n=4, ...)

Values are tables, v [S] and q [S, A], or linear: with `features` [S, D] the parameters are w [D] and [D, A], and
v(s) = features[s] @ w. A table is the case of one feature to a state. All functions are jitted and can be vmapped over
keys, step sizes, discounts, epsilons and lambdas.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.losses import td as errors
from jaxrl.returns import lambda_returns, retrace
from jaxrl.tabular.episodes import Learner, Learnt, Transition, learn, learn_from_stream
from jaxrl.tabular.mdp import MDP, epsilon_greedy

_STATIC = ("target", "n", "episodes", "record")


def sarsa(q_t, a_t, r_t, discount_t, pi_t, lambda_t) -> jax.Array:
    """n rewards, then q_t[a_t] of the action taken: Sarsa (Rummery and Niranjan 1994), n-step Sarsa.

    All four targets have these arguments.

    Args:
      q_t: [n, A] action values of the states reached.
      a_t: [n] actions chosen there.
      r_t, discount_t: [n] rewards, and discounts, zero where the episode terminated.
      pi_t: [n, A] the policy that is learnt about, at the states reached.
      lambda_t: [n] zero where the episode ended, whatever the reason: bootstrap there. One elsewhere.

    Returns:
      [n] float32, targets for q(s_{t-1}, a_{t-1}). The first is used.
    """
    return lambda_returns(r_t, discount_t, _chosen(q_t, a_t), lambda_=lambda_t)


def expected_sarsa(q_t, a_t, r_t, discount_t, pi_t, lambda_t) -> jax.Array:
    """n rewards, then sum_a pi_t[a] q_t[a] (van Seijen et al. 2009). Arguments as `sarsa`."""
    return lambda_returns(r_t, discount_t, (pi_t * q_t).sum(axis=-1), lambda_=lambda_t)


def q_learning(q_t, a_t, r_t, discount_t, pi_t, lambda_t) -> jax.Array:
    """n rewards, then max_a q_t[a] (Watkins 1989). Arguments as `sarsa`.

    With n = 1 it may learn from any behaviour; with more the rewards between are the behaviour's, uncorrected.
    """
    return lambda_returns(r_t, discount_t, q_t.max(axis=-1), lambda_=lambda_t)


def tree_backup(q_t, a_t, r_t, discount_t, pi_t, lambda_t) -> jax.Array:
    """G_t = r_t + d_t [sum_{a != a_t} pi_t[a] q_t[a] + pi_t[a_t] G_{t+1}], n steps deep (Precup et al. 2000).

    `returns.retrace` with its trace "tree_backup". Learns about pi from any behaviour, for all n. Arguments as `sarsa`.
    """
    return retrace(
        q_t, a_t, r_t, discount_t, pi_t, jnp.ones_like(r_t), lambda_=lambda_t, trace="tree_backup"
    )  # mu is not needed


@partial(jax.jit, static_argnames=_STATIC)
def control(
    mdp: MDP,
    key: jax.Array,
    target: Callable,
    *,
    discount: jax.Array | float,
    step_size: jax.Array | float,
    epsilon: jax.Array | float,
    episodes: int,
    n: int = 1,
    max_steps: jax.Array | int = 10_000,
    behaviour: jax.Array | None = None,
    features: jax.Array | None = None,
    values: jax.Array | None = None,
    record: Callable | None = None,
) -> Learnt:
    """Learns action values by acting: q(s, a) <- q(s, a) + step_size [target - q(s, a)].

    Args:
      mdp: the model to draw from.
      key: consumed.
      target: `sarsa`, `expected_sarsa`, `q_learning`, `tree_backup` or a function like them.
      discount: gamma.
      step_size: alpha, a number or one for each episode.
      epsilon: of the epsilon-greedy policy that is learnt about, and followed unless `behaviour` is given; ties are
        broken at random.
      episodes: how many.
      n: rewards in a target.
      max_steps: where an episode is cut; it bootstraps from the state reached.
      behaviour: [S, A] a policy to follow instead (off-policy; `sarsa` then learns the value of this one).
      features: [S, D] for linear values, None for a table.
      values: [S, A] (or [D, A]) to begin with; zeros if None.
      record: a function of the values, called after each episode.

    Returns:
      Learnt, with values like those given.

    Raises:
      ValueError: n < 1, or arrays of other shapes.
    """
    values = _initial(mdp, values, features, (mdp.actions,))
    learner = _action_learner(target, epsilon, n, features, behaviour)
    run = {"discount": discount, "step_size": step_size, "episodes": episodes, "max_steps": max_steps}
    return learn(mdp, key, learner, values, **run, record=record)


@partial(jax.jit, static_argnames=("target", "n", "record"))
def control_from_stream(
    stream: Transition,
    values: jax.Array,
    target: Callable,
    *,
    step_size: jax.Array | float,
    epsilon: jax.Array | float = 0.0,
    n: int = 1,
    features: jax.Array | None = None,
    record: Callable | None = None,
) -> tuple[jax.Array, Any]:
    """The updates of `control` on recorded transitions, of `episodes.sample_stream` for one.

    Args:
      stream: Transition of [T], made by any policy.
      values: [S, A] (or [D, A]) to begin with.
      target, n, features: as `control`.
      step_size: a number, or one for each transition.
      epsilon: of the policy that is learnt about.
      record: a function of the values, called after each update.

    Returns:
      (values, what record gave, stacked, or None).
    """
    learner = _action_learner(target, epsilon, n, features)
    key = jax.random.key(0)  # nothing is drawn
    return learn_from_stream(stream, key, learner, jnp.asarray(values, jnp.float32), step_size=step_size, record=record)


@partial(jax.jit, static_argnames=("episodes", "record"))
def double_q_learning(
    mdp: MDP,
    key: jax.Array,
    *,
    discount: jax.Array | float,
    step_size: jax.Array | float,
    epsilon: jax.Array | float,
    episodes: int,
    max_steps: jax.Array | int = 10_000,
    values: jax.Array | None = None,
    record: Callable | None = None,
) -> Learnt:
    """Double Q-learning (van Hasselt 2010): two tables; a coin says which learns, the other one values its choice.

        q_i(s, a) <- q_i(s, a) + step_size [r + discount q_j(s', argmax q_i(s', .)) - q_i(s, a)]

    Behaves epsilon-greedily by the mean of the two.

    Args:
      mdp, key, discount, step_size, epsilon, episodes, max_steps, record: as `control`.
      values: [2, S, A] to begin with; zeros if None.

    Returns:
      Learnt, values [2, S, A].
    """
    shape = (2, mdp.states, mdp.actions)
    values = jnp.zeros(shape) if values is None else jnp.asarray(values, jnp.float32)
    if values.shape != shape:
        raise ValueError(f"values has shape {values.shape}, expected [2, S, A] = {list(shape)}")
    run = {"discount": discount, "step_size": step_size, "episodes": episodes, "max_steps": max_steps}
    return learn(mdp, key, _double_learner(epsilon), values, **run, record=record)


@partial(jax.jit, static_argnames="record")
def double_q_learning_from_stream(
    stream: Transition,
    key: jax.Array,
    values: jax.Array,
    *,
    step_size: jax.Array | float,
    record: Callable | None = None,
) -> tuple[jax.Array, Any]:
    """The updates of `double_q_learning` on recorded transitions. The key, consumed, throws the coins.

    Arguments and result as `control_from_stream`, values [2, S, A].
    """
    values = jnp.asarray(values, jnp.float32)
    return learn_from_stream(stream, key, _double_learner(0.0), values, step_size=step_size, record=record)


@partial(jax.jit, static_argnames=("n", "episodes", "record"))
def prediction(
    mdp: MDP,
    key: jax.Array,
    policy: jax.Array,
    *,
    discount: jax.Array | float,
    step_size: jax.Array | float,
    episodes: int,
    n: int = 1,
    max_steps: jax.Array | int = 10_000,
    features: jax.Array | None = None,
    values: jax.Array | None = None,
    record: Callable | None = None,
) -> Learnt:
    """n-step TD, the value of a policy from its episodes: TD(0) for n = 1 (Sutton 1988; Sutton and Barto 2018, 7.1).

        v(s) <- v(s) + step_size [r_t + ... + discount^{n-1} r_{t+n-1} + discount^n v(s_{t+n-1}) - v(s)]

    Args:
      mdp, key, discount, step_size, episodes, n, max_steps, features, record: as `control`.
      policy: [S, A] probabilities.
      values: [S] (or [D]) to begin with; zeros if None.

    Returns:
      Learnt, with values like those given.
    """
    _check_n(n)

    def update(values, window, step_size, key):
        v = lambda values, s: _lookup(values, s, features)
        v_t = jax.vmap(v, in_axes=(None, 0))(values, window.s_t)
        target = lambda_returns(window.r_t, window.discount_t, v_t, lambda_=1.0 - window.last)[0]
        value, gradient = jax.value_and_grad(v)(values, window.s_tm1[0])
        return values + step_size * (target - value) * gradient

    values = _initial(mdp, values, features, ())
    learner = Learner(lambda _, s: policy[s], update, n)
    run = {"discount": discount, "step_size": step_size, "episodes": episodes, "max_steps": max_steps}
    return learn(mdp, key, learner, values, **run, record=record)


@partial(jax.jit, static_argnames=("trace", "episodes", "record"))
def td_lambda(
    mdp: MDP,
    key: jax.Array,
    policy: jax.Array,
    *,
    discount: jax.Array | float,
    step_size: jax.Array | float,
    lambda_: jax.Array | float,
    episodes: int,
    trace: str = "accumulating",
    max_steps: jax.Array | int = 10_000,
    features: jax.Array | None = None,
    values: jax.Array | None = None,
    record: Callable | None = None,
) -> Learnt:
    """TD(lambda), backward view (Sutton 1988): every state learns from every error, as far as its trace remains.

        z <- discount lambda z + grad v(s),     v <- v + step_size [r + discount v(s') - v(s)] z

    Args:
      mdp, key, discount, step_size, episodes, max_steps, features, record: as `control`.
      policy: [S, A] probabilities.
      lambda_: 0 is TD(0); 1 is, but for learning online, Monte Carlo.
      trace: "accumulating" as above; "replacing": where grad v(s) is not zero z is set to it (Singh and Sutton 1996;
        meant for tables and binary features).
      values: [S] (or [D]) to begin with; zeros if None.

    Returns:
      Learnt, with values like those given.

    Raises:
      ValueError: another trace.
    """
    values = _initial(mdp, values, features, ())
    learner = _trace_learner(policy, discount, lambda_, trace, features)
    run = {"discount": discount, "step_size": step_size, "episodes": episodes, "max_steps": max_steps}
    state = (values, jnp.zeros_like(values))
    return learn(mdp, key, learner, state, **run, values=lambda state: state[0], record=record)


def _trace_learner(policy, discount, lambda_, trace, features) -> Learner:
    if trace not in ("accumulating", "replacing"):
        raise ValueError(f"trace is {trace!r}, expected 'accumulating' or 'replacing'")

    def update(state, window, step_size, key):
        values, z = state
        v = lambda values, s: _lookup(values, s, features)
        value, gradient = jax.value_and_grad(v)(values, window.s_tm1[0])
        z = discount * lambda_ * z
        z = z + gradient if trace == "accumulating" else jnp.where(gradient != 0.0, gradient, z)
        error = errors.td_learning(value, window.r_t[0], window.discount_t[0], v(values, window.s_t[0]))
        return values + step_size * error * z, z

    return Learner(lambda _, s: policy[s], update, begin=lambda state: (state[0], jnp.zeros_like(state[1])))


def _action_learner(target, epsilon, n, features, behaviour=None) -> Learner:
    _check_n(n)
    learnt_about = lambda values, s: epsilon_greedy(_lookup(values, s, features), epsilon, ties=0.0)

    def update(values, window, step_size, key):
        q = lambda values, s: _lookup(values, s, features)
        q_t = jax.vmap(q, in_axes=(None, 0))(values, window.s_t)
        pi_t = jax.vmap(learnt_about, in_axes=(None, 0))(values, window.s_t)
        targets = target(q_t, window.a_t, window.r_t, window.discount_t, pi_t, 1.0 - window.last)
        chosen = lambda values: q(values, window.s_tm1[0])[window.a_tm1[0]]
        value, gradient = jax.value_and_grad(chosen)(values)
        return values + step_size * (targets[0] - value) * gradient

    return Learner(learnt_about if behaviour is None else lambda _, s: behaviour[s], update, n)


def _double_learner(epsilon) -> Learner:
    def update(values, window, step_size, key):
        s_tm1, a_tm1, r_t, discount_t, s_t, _, _ = jax.tree.map(lambda x: x[0], window)
        learns = jax.random.bernoulli(key).astype(jnp.int32)
        this, other = values[learns], values[1 - learns]
        error = errors.double_q_learning(this[s_tm1], a_tm1, r_t, discount_t, other[s_t], this[s_t])
        return values.at[learns, s_tm1, a_tm1].add(step_size * error)

    return Learner(lambda values, s: epsilon_greedy(values[:, s].mean(axis=0), epsilon, ties=0.0), update)


def _lookup(values, s, features):
    return values[s] if features is None else features[s] @ values


def _chosen(q_t, a_t):
    return jnp.take_along_axis(q_t, a_t[:, None], axis=1)[:, 0]


def _initial(mdp, values, features, rest):
    if features is not None and (jnp.ndim(features) != 2 or jnp.shape(features)[0] != mdp.states):
        raise ValueError(f"features has shape {jnp.shape(features)}, expected [S, D] with S = {mdp.states}")
    shape = (mdp.states if features is None else jnp.shape(features)[1], *rest)
    values = jnp.zeros(shape) if values is None else values
    if jnp.shape(values) != shape:
        raise ValueError(f"values has shape {jnp.shape(values)}, expected {list(shape)}")
    return jnp.asarray(values, jnp.float32)


def _check_n(n):
    if n < 1:
        raise ValueError(f"n is {n}, expected at least one reward")
