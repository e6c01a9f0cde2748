"""Experience from an MDP, and the one loop in which all temporal-difference methods learn from it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.tabular import mdp as models
from jaxrl.tabular.mdp import MDP


class Transition(NamedTuple):
    """One step, or a stream of them with a leading axis [T].

    `s_tm1`, `a_tm1`: the state acted on and the action. `r_t`: the reward. `discount_t`: gamma, zero where the episode
    terminated. `s_t`, `a_t`: the state reached and the action chosen there. `last`: whether the episode ended here, for
    whatever reason; what follows belongs to another one.
    """

    s_tm1: jax.Array
    a_tm1: jax.Array
    r_t: jax.Array
    discount_t: jax.Array
    s_t: jax.Array
    a_t: jax.Array
    last: jax.Array


class Learner(NamedTuple):
    """A method: three functions and the number of steps its targets reach.

    `policy`: `(state, s) -> probabilities [A]`, how to behave. `update`: `(state, window, step_size, key) -> state`,
    learns the value at the first of the window's `n` transitions; those beyond a `last` are to be ignored. `begin`:
    `state -> state`, at the start of an episode.
    """

    policy: Callable
    update: Callable
    n: int = 1
    begin: Callable = lambda state: state


class Learnt(NamedTuple):
    """`values`: what was learnt. `returns`, `lengths` [episodes]: sums of rewards, undiscounted, and steps. `record`:
    what `record(values)` gave after each episode, stacked, or None."""

    values: Any
    returns: jax.Array
    lengths: jax.Array
    record: Any


@partial(jax.jit, static_argnames="steps")
def sample_stream(
    mdp: MDP,
    key: jax.Array,
    policy: jax.Array,
    *,
    steps: int,
    discount: jax.Array | float,
    state: jax.Array | int | None = None,
    action: jax.Array | int | None = None,
) -> Transition:
    """Steps of one policy, episode after episode.

    Args:
      mdp: the model to draw from.
      key: consumed.
      policy: [S, A] probabilities.
      steps: T, how many.
      discount: gamma.
      state, action: how to begin; None: drawn from mdp.start and from the policy.

    Returns:
      Transition of [T]. `last` is true at terminations and at the end of the stream; after a termination the next
      episode begins in a state drawn from mdp.start.
    """
    key, state_key, action_key = jax.random.split(key, 3)
    state = models.draw(state_key, mdp.start) if state is None else jnp.asarray(state, jnp.int32)
    action = models.draw(action_key, policy[state]) if action is None else jnp.asarray(action, jnp.int32)

    def step(carry, _):
        key, s, a = carry
        key, step_key, action_key, start_key, first_key = jax.random.split(key, 5)
        transition, terminated = _transition(step_key, action_key, mdp, s, a, lambda s: policy[s], discount)
        start = models.draw(start_key, mdp.start)
        s = jnp.where(terminated, start, transition.s_t)
        a = jnp.where(terminated, models.draw(first_key, policy[start]), transition.a_t)
        return (key, s, a), transition

    _, stream = jax.lax.scan(step, (key, state, action), length=steps)
    return stream._replace(last=stream.last.at[-1].set(True))


def learn(
    mdp: MDP,
    key: jax.Array,
    learner: Learner,
    state: Any,
    *,
    discount: jax.Array | float,
    step_size: jax.Array | float,
    episodes: int,
    max_steps: jax.Array | int,
    values: Callable = lambda state: state,
    record: Callable | None = None,
) -> Learnt:
    """Acts and learns, episode by episode (the loop of Sutton and Barto 2018, 7.2).

    Step t: go to s_t, choose a_t there, then learn the value at the transition n - 1 steps ago, if there is one. After
    the end of an episode the last n - 1 are learnt. Actions are chosen before the update, for every method.

    Args:
      mdp: the model to draw from.
      key: consumed.
      learner: the method.
      state: what it begins with.
      discount: gamma.
      step_size: a number, or one for each episode.
      episodes: how many.
      max_steps: where an episode is cut. The value then bootstraps from the state reached.
      values: from the learner's state to what is handed back.
      record: a function of that, called after each episode.

    Returns:
      Learnt.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}, expected at least 1")
    step_sizes = jnp.broadcast_to(jnp.asarray(step_size, jnp.float32), (episodes,))

    def episode(carry, step_size):
        key, state = carry
        key, start_key, action_key, loop_key = jax.random.split(key, 4)
        state = learner.begin(state)
        s = models.draw(start_key, mdp.start)
        a = models.draw(action_key, learner.policy(state, s))

        def goes_on(carry):
            return carry["after"] < learner.n

        def step(carry):
            key, step_key, action_key, update_key = jax.random.split(carry["key"], 4)
            over = carry["after"] > 0
            policy = lambda s: learner.policy(carry["state"], s)
            new, terminated = _transition(step_key, action_key, mdp, carry["s"], carry["a"], policy, discount)
            new = new._replace(last=over | terminated | (carry["length"] + 1 >= max_steps))
            window = jax.tree.map(lambda old, x: jnp.concatenate([old[1:], x[None]]), carry["window"], new)
            learnt = learner.update(carry["state"], window, step_size, update_key)
            due = carry["steps"] >= learner.n - 1
            return {
                "key": key,
                "s": new.s_t,
                "a": new.a_t,
                "window": window,
                "state": jax.tree.map(lambda x, y: jnp.where(due, x, y), learnt, carry["state"]),
                "steps": carry["steps"] + 1,  # those after the end included
                "after": carry["after"] + new.last,
                "length": carry["length"] + ~over,
                "total": carry["total"] + jnp.where(over, 0.0, new.r_t),
            }

        zero = jnp.int32(0)
        numbers, integers = jnp.zeros(learner.n), jnp.zeros(learner.n, jnp.int32)
        empty = Transition(
            integers, integers, numbers.astype(jnp.float32), numbers.astype(jnp.float32), integers, integers,
            jnp.zeros(learner.n, bool),
        )  # fmt: skip
        counters = {"steps": zero, "after": zero, "length": zero, "total": jnp.float32(0)}
        end = jax.lax.while_loop(
            goes_on, step, {"key": loop_key, "s": s, "a": a, "window": empty, "state": state, **counters}
        )
        kept = None if record is None else record(values(end["state"]))
        return (key, end["state"]), (end["total"], end["length"], kept)

    (_, state), (returns, lengths, kept) = jax.lax.scan(episode, (key, state), step_sizes)
    return Learnt(values(state), returns, lengths, kept)


def learn_from_stream(
    stream: Transition,
    key: jax.Array,
    learner: Learner,
    state: Any,
    *,
    step_size: jax.Array | float,
    record: Callable | None = None,
) -> tuple[Any, Any]:
    """Learns from recorded transitions, one after the other, without acting.

    Args:
      stream: Transition of [T]; its last one counts as the end of an episode.
      key: consumed.
      learner: the method; its policy is not used.
      state: what it begins with.
      step_size: a number, or one for each transition.
      record: a function of the state, called after each update.

    Returns:
      (state, what record gave, stacked, or None).

    Raises:
      ValueError: fields of different lengths.
    """
    shapes = {name: jnp.shape(x) for name, x in stream._asdict().items()}
    if len(set(shapes.values())) != 1 or len(shapes["r_t"]) != 1:
        raise ValueError(f"the stream's fields have shapes {shapes}, expected [T] for all")
    (length,) = shapes["r_t"]
    stream = stream._replace(last=jnp.asarray(stream.last).at[-1].set(True))
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], learner.n - 1, axis=0)]), stream)
    step_sizes = jnp.broadcast_to(jnp.asarray(step_size, jnp.float32), (length,))

    def step(carry, given):
        key, state = carry
        key, update_key = jax.random.split(key)
        at, step_size = given
        begins = (at == 0) | padded.last[at - 1]
        state = jax.tree.map(lambda x, y: jnp.where(begins, x, y), learner.begin(state), state)
        window = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, learner.n), padded)
        state = learner.update(state, window, step_size, update_key)
        return (key, state), None if record is None else record(state)

    (_, state), kept = jax.lax.scan(step, (key, state), (jnp.arange(length), step_sizes))
    return state, kept


def _transition(step_key, action_key, mdp, s, a, policy, discount) -> tuple[Transition, jax.Array]:
    successor, reward, terminated = models.step(step_key, mdp, s, a)
    action = models.draw(action_key, policy(successor))
    discount_t = jnp.where(terminated, 0.0, discount).astype(jnp.float32)
    return Transition(s, a, reward.astype(jnp.float32), discount_t, successor, action, terminated), terminated
