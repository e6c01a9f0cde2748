"""Many runs in one program: every combination of hyper-parameters with every seed."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents.evaluate import evaluate
from jaxrl.envs.env import Env


class Members(NamedTuple):
    """`step`: int32, rounds done. `agents`: states of the members, leading axis M."""

    step: jax.Array
    agents: Any


class Population(NamedTuple):
    """M agents that know nothing of each other.

    `init`: `() -> Members`. `round`: `(Members, data=None) -> (Members, metrics)`, some updates of every member, for
    `loop.run`; metrics are means over members and updates, of those that are numbers. `evaluate`: `(Members, key) ->
    returns [M, episodes]`. `env_steps`: environment steps of one member in a round.
    """

    init: Callable
    round: Callable
    evaluate: Callable
    env_steps: int


def combinations(grid: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[dict[str, float]]:
    """One dict for each member: every combination of the grid's values, and its "seed"; seeds change fastest."""
    return [dict(zip((*grid, "seed"), values, strict=True)) for values in itertools.product(*grid.values(), seeds)]


def make(
    make_agent: Callable,
    config: Any,
    env: Env,
    members: Sequence[Mapping[str, float]],
    *,
    updates: int,
    episodes: int = 32,
    side_by_side: bool | None = None,
) -> Population:
    """A population of agents that differ in seed and in floats of their config.

    A member is the very agent that a run of its own with this seed and these values would train.

    Args:
      make_agent: `(config, env) -> Agent`.
      config: of all members; must be a frozen dataclass.
      env: one environment with its time limit.
      members: for each its "seed" and the fields of `config` in which it differs; all have the same fields.
      updates: of each member in a round.
      episodes: greedy episodes of an evaluation.
      side_by_side: True runs members as one batch (`vmap`), False one after another within the program. None takes
        the batch on accelerators and not on CPU, where it gains little and takes up to twice as long to compile.

    Raises:
      ValueError: a field that the config does not have, or that is not a float.
    """
    for name in members[0]:
        if name != "seed":
            _check_float(config, name)
    if side_by_side is None:
        side_by_side = jax.default_backend() != "cpu"
    values = {name: np.asarray([m[name] for m in members], np.float32) for name in members[0] if name != "seed"}

    def each(function, *trees):
        if side_by_side:
            return jax.vmap(function)(values, *trees)
        return jax.lax.map(lambda arguments: function(*arguments), (values, *trees))

    def agent(own):
        return make_agent(dataclasses.replace(config, **own), env)

    def init():
        keys = jnp.stack([jax.random.key(int(member["seed"])) for member in members])
        return Members(jnp.int32(0), each(lambda own, key: agent(own).init(key), keys))

    def round(population: Members, data: Any = None):
        def one(own, state):
            state, rows = jax.lax.scan(lambda state, _: agent(own).step(state), state, length=updates)
            return state, jax.tree.map(jnp.nanmean, rows)

        agents, metrics = each(one, population.agents)
        return Members(population.step + 1, agents), jax.tree.map(jnp.nanmean, metrics)

    def returns(population: Members, key: jax.Array):
        one = lambda own, state, key: evaluate(agent(own), env, state.params, key, episodes=episodes).returns
        return each(one, population.agents, jax.random.split(key, len(members)))

    return Population(init, round, returns, updates * make_agent(config, env).env_steps)


def _check_float(config: Any, name: str) -> None:
    floats = [field.name for field in dataclasses.fields(config) if isinstance(getattr(config, field.name), float)]
    if name not in floats:
        raise ValueError(
            f"{name!r} cannot vary inside one program; expected a number with a fraction: {', '.join(floats)} "
            "(other fields change the program itself: start a run for each value)"
        )
