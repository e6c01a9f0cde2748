"""Evaluation inside the program: whole episodes of an agent's policy, jitted, vmapped or in the body of a scan."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.agents.agent import Agent
from jaxrl.agents.interact import begin, within
from jaxrl.envs.env import Env


class Evaluation(NamedTuple):
    """`returns` [n] float32, undiscounted, and `lengths` [n] int32 of the episodes; `finished` [n] bool."""

    returns: jax.Array
    lengths: jax.Array
    finished: jax.Array

    def metrics(self) -> dict[str, jax.Array]:
        """Means over the episodes: {"eval/return", "eval/length"}."""
        return {"eval/return": self.returns.mean(), "eval/length": self.lengths.mean(dtype=jnp.float32)}


def evaluate(
    agent: Agent,
    env: Env,
    params: Any,
    key: jax.Array,
    *,
    episodes: int = 32,
    greedy: bool = True,
    max_steps: int = 100_000,
) -> Evaluation:
    """The first episode of each of n environments, side by side, until the last has ended.

    One per environment: the first n episodes to *end* would be the short ones.

    Args:
      agent: its `act` and `memory` are used.
      env: one environment, with its time limit, neither vectorised nor with automatic reset.
      params: `state.params` of the agent.
      key: consumed.
      episodes: n.
      greedy: the most probable action, or a draw from the policy.
      max_steps: where to stop if an episode does not end by itself.

    Returns:
      An `Evaluation`; an episode cut by `max_steps` counts with what it had until then, and is not `finished`.
    """
    begin_key, loop_key = jax.random.split(key)
    start = begin(env, begin_key, episodes, memory=agent.memory())

    def act(state, observation, memory, key):
        mask = () if env.action_mask is None else (env.action_mask(state),)
        return agent.act(params, observation, memory, None if greedy else key, *mask)

    def unfinished(carry):
        return (carry[0] < max_steps) & ~carry[2].all()

    def step(carry):
        time, now, finished = carry
        act_key, env_key = jax.random.split(jax.random.fold_in(loop_key, time))
        action, memory = jax.vmap(act)(now.env, now.observation, now.memory, jax.random.split(act_key, episodes))
        states, timestep = jax.vmap(env.step)(
            jax.random.split(env_key, episodes), now.env, within(env.action_space, action)
        )
        then = now._replace(
            env=states,
            observation=timestep.observation,
            memory=memory,
            episode_return=now.episode_return + jnp.where(finished, 0.0, timestep.reward),
            episode_length=now.episode_length + ~finished,
        )
        return time + 1, then, finished | timestep.terminated | timestep.truncated

    _, end, finished = jax.lax.while_loop(unfinished, step, (jnp.int32(0), start, jnp.zeros(episodes, bool)))
    return Evaluation(end.episode_return, end.episode_length, finished)
