"""The protocol: an agent is a few pure functions, made from a frozen config and an environment.

    agent = ppo.make(ppo.PPOConfig(), envs.make("CartPole-v1"))
    state = agent.init(key)
    state, metrics = jax.jit(agent.step)(state)

The state is one pytree that holds all there is (parameters, optimizer, environments, buffer, key, counters): a
checkpoint of it is a checkpoint of the run, `vmap(agent.init)` over keys is a batch of seeds.
"""

from collections.abc import Callable
from typing import NamedTuple


class Agent(NamedTuple):
    """An agent.

    `init`: `(key) -> state`, where `state.step` counts updates and `state.params` is what `act` takes.
    `step`: `(state, data=None) -> (state, metrics)`, one round of acting and learning; metrics are scalars. `data` is
    for `loop.run`, which hands every step the same; agents take none.
    `act`: `(params, observation, memory, key, mask=None) -> (action, memory)` for one observation, no batch axis; a key
    of None means the greedy action, `mask` bool [n] the actions allowed.
    `memory`: `() -> memory` before the first observation of an episode; () for policies that have none.
    `env_steps`: environment steps one `step` takes, all environments together.
    """

    init: Callable
    step: Callable
    act: Callable
    memory: Callable
    env_steps: int
