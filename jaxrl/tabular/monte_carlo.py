"""Monte Carlo: values as averages of returns, without a model and without bootstrapping.

The model is only drawn from. Where episodes do not end by themselves they are cut after `length` steps, and the return
after step t is cut to length - t rewards. That bias is the book's too; `tail` keeps it below discount^tail.
All functions are jitted and can be vmapped over keys and discounts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.returns import discounted_returns
from jaxrl.tabular import mdp as models
from jaxrl.tabular.episodes import Transition, sample_stream
from jaxrl.tabular.mdp import MDP, draw, greedy, uniform_policy


class Estimate(NamedTuple):
    """`action_values` [S, A], `policy` [S, A] improved by them, `counts` [S, A]: returns averaged so far."""

    action_values: jax.Array
    policy: jax.Array
    counts: jax.Array


@partial(jax.jit, static_argnames=("length", "iterations", "episodes"))
def basic(
    mdp: MDP,
    key: jax.Array,
    *,
    discount: jax.Array | float,
    length: int,
    iterations: int,
    episodes: int = 1,
    policy: jax.Array | None = None,
) -> Estimate:
    """MC Basic: policy iteration whose q(s, a) is the mean return of episodes from (s, a) (Zhao 2025, algorithm 5.1).

    Args:
      mdp: the model to draw from.
      key: consumed.
      discount: gamma.
      length: steps of an episode.
      iterations: improvements.
      episodes: from each pair; one is exact where model and policy are deterministic.
      policy: [S, A] to begin with; always the first action if None.

    Returns:
      Estimate, of the last iteration.
    """
    policy = models.deterministic_policy(mdp, 0) if policy is None else policy
    s, a = jnp.divmod(jnp.arange(mdp.states * mdp.actions), mdp.actions)

    def iterate(policy, key):
        def of_pair(key, s, a):
            stream = sample_stream(mdp, key, policy, steps=length, discount=discount, state=s, action=a)
            return discounted_returns(stream.r_t, stream.discount_t)[0]

        keys = jax.random.split(key, (episodes, s.size))
        returns = jax.vmap(jax.vmap(of_pair), in_axes=(0, None, None))(keys, s, a).mean(axis=0)
        q = jnp.where(mdp.terminal[:, None], 0.0, returns.reshape(mdp.states, mdp.actions))
        return greedy(q).astype(policy.dtype), q

    policy, q = jax.lax.scan(iterate, policy, jax.random.split(key, iterations))
    return Estimate(q[-1], policy, jnp.full(q[-1].shape, episodes))


@partial(jax.jit, static_argnames=("episodes", "length", "first_visit"))
def exploring_starts(
    mdp: MDP,
    key: jax.Array,
    *,
    discount: jax.Array | float,
    episodes: int,
    length: int,
    first_visit: bool = True,
    tail: jax.Array | int = 0,
    values: jax.Array | None = None,
) -> Estimate:
    """Monte Carlo control, every episode beginning with a random state and action (Zhao 2025, algorithm 5.2).

    After each episode the averages of the pairs visited take its returns in and the policy becomes greedy for them.
    Averages keep the returns of old policies, as in the books.

    Args:
      mdp: the model to draw from.
      key: consumed.
      discount: gamma.
      episodes, length: how many, and the steps of each at most.
      first_visit: whether a pair counts at its first visit in an episode only, or at every one.
      tail: visits in the last `tail` steps of an episode that was cut do not count.
      values: [S, A] for pairs not visited yet; zeros if None.

    Returns:
      Estimate.
    """
    return _control(mdp, key, discount, episodes, length, 0.0, True, first_visit, tail, values)


@partial(jax.jit, static_argnames=("episodes", "length", "first_visit"))
def epsilon_greedy(
    mdp: MDP,
    key: jax.Array,
    *,
    discount: jax.Array | float,
    episodes: int,
    length: int,
    epsilon: jax.Array | float,
    first_visit: bool = True,
    tail: jax.Array | int = 0,
    values: jax.Array | None = None,
) -> Estimate:
    """Monte Carlo control that explores by itself, epsilon-greedily (Zhao 2025, algorithm 5.3).

    Finds the best policy among those that take every action with probability epsilon / A, not the best of all:
    `dynamic_programming.value_iteration(epsilon=...)` is its limit.

    Args:
      mdp, key, discount, episodes, length, first_visit, tail, values: as `exploring_starts`, but episodes
        begin as the MDP says.
      epsilon: how often the action is random.

    Returns:
      Estimate, with the epsilon-greedy policy.
    """
    return _control(mdp, key, discount, episodes, length, epsilon, False, first_visit, tail, values)


@partial(jax.jit, static_argnames=("episodes", "length", "first_visit", "weighted"))
def prediction(
    mdp: MDP,
    key: jax.Array,
    policy: jax.Array,
    *,
    discount: jax.Array | float,
    episodes: int,
    length: int,
    first_visit: bool = True,
    tail: jax.Array | int = 0,
    behaviour: jax.Array | None = None,
    weighted: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The value of a policy as the average of returns, on policy or off policy (Sutton and Barto 2018, 5.1 and 5.5).

        v(s) = sum rho G / sum rho (weighted)   or   sum rho G / number (ordinary),   rho = prod_{k >= t} pi / b

    Args:
      mdp: the model to draw from.
      key: consumed.
      policy: [S, A] whose value is sought.
      discount: gamma.
      episodes, length: how many, all in memory at once, and the steps of each at most.
      first_visit: whether a state counts at its first visit in an episode only, or at every one.
      tail: as `exploring_starts`.
      behaviour: [S, A] the policy followed, None for the same. Positive wherever `policy` is.
      weighted: weighted importance sampling (biased, bounded) or ordinary (unbiased, of any variance).

    Returns:
      (values [S], counts [S]): zero where never visited; counts are visits.
    """
    followed = policy if behaviour is None else behaviour
    keys = jax.random.split(key, episodes)

    def of_episode(key):
        stream = sample_stream(mdp, key, followed, steps=length, discount=discount)
        alive, returns = _alive(stream), discounted_returns(stream.r_t, stream.discount_t)
        pair = stream.s_tm1, stream.a_tm1
        ratio = jnp.where(alive, policy[pair] / followed[pair], 1.0)
        rho = jnp.cumprod(ratio[::-1])[::-1]
        counted = _counted(stream.s_tm1, alive & _complete(stream, alive, tail), mdp.states, first_visit)
        tally = lambda x: jnp.zeros(mdp.states).at[stream.s_tm1].add(counted * x)
        return tally(rho * returns), tally(rho), tally(1.0)

    totals, rhos, counts = (x.sum(axis=0) for x in jax.vmap(of_episode)(keys))
    weights = rhos if weighted else counts
    return jnp.where(weights > 0, totals / jnp.where(weights > 0, weights, 1.0), 0.0), counts


def _control(mdp, key, discount, episodes, length, epsilon, explore_starts, first_visit, tail, values) -> Estimate:
    shape = (mdp.states, mdp.actions)
    values = jnp.zeros(shape) if values is None else jnp.asarray(values, jnp.float32)
    if values.shape != shape:
        raise ValueError(f"values has shape {values.shape}, expected [S, A] = {list(shape)}")
    if episodes < 1 or length < 1:
        raise ValueError(f"{episodes} episodes of {length} steps: expected at least one of each")
    going_on = ~mdp.terminal / (~mdp.terminal).sum()

    def averages(sums, counts):
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), values)

    def improve(q):
        return models.epsilon_greedy(q, epsilon, ties=0.0)

    def episode(carry, key):
        sums, counts = carry
        policy = improve(averages(sums, counts))
        state_key, action_key, key = jax.random.split(key, 3)
        begin = {}
        if explore_starts:
            begin = {"state": draw(state_key, going_on), "action": draw(action_key, uniform_policy(mdp)[0])}
        stream = sample_stream(mdp, key, policy, steps=length, discount=discount, **begin)
        returns = discounted_returns(stream.r_t, stream.discount_t)
        pair = stream.s_tm1, stream.a_tm1
        alive = _alive(stream)
        number = stream.s_tm1 * mdp.actions + stream.a_tm1
        counted = _counted(number, alive & _complete(stream, alive, tail), values.size, first_visit)
        return (sums.at[pair].add(counted * returns), counts.at[pair].add(counted)), None

    zeros = jnp.zeros(shape, jnp.float32)
    (sums, counts), _ = jax.lax.scan(episode, (zeros, zeros), jax.random.split(key, episodes))
    q = averages(sums, counts)
    return Estimate(q, improve(q), counts)


def _alive(stream: Transition) -> jax.Array:
    """[T] bool, true within the first episode."""
    return jnp.cumsum(stream.last) - stream.last == 0


def _complete(stream: Transition, alive: jax.Array, tail) -> jax.Array:
    """[T] bool, true where the return is that of an episode that terminated, or has more than `tail` rewards."""
    terminated = (alive & (stream.discount_t == 0.0)).any()
    return terminated | (jnp.arange(alive.size) < alive.size - tail)


def _counted(visited, alive, number, first_visit) -> jax.Array:
    """[T] float32, one where the visit to visited[t], below `number`, counts."""
    if first_visit:
        time = jnp.arange(visited.size)
        first = jnp.full(number, visited.size).at[visited].min(time)
        alive = alive & (first[visited] == time)
    return alive.astype(jnp.float32)
