"""Anakin: one agent on all devices, environments and learning together (Hessel et al. 2021, arXiv 2104.06272).

    agent = anakin.shard(ppo.make, ppo.PPOConfig(envs=1024), envs.make("CartPole-v1"), mesh)

Every device steps its share of the environments and learns from them with the same parameters; gradients (and
statistics, KL and metrics) are averaged over the axis `data`. The state is that of one device with all the
environments: what is of an environment lies on its device, the rest on every device, so that checkpoints open on any
number of devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxrl.agents.agent import Agent
from jaxrl.agents.on_policy import State
from jaxrl.envs.env import Env

AXIS = "data"


def shard(make: Callable, config: Any, env: Env, mesh: Mesh, **networks: Any) -> Agent:
    """An on-policy agent whose step is spread over a mesh by `shard_map`.

    Args:
      make: of an on-policy agent, with an `axis_name`.
      config: `envs` is the number of environments on all devices together; minibatches are counted on each device.
      env: as `make` takes it.
      mesh: with an axis `data`; others take no part.
      networks: handed to `make`.

    Returns:
      An Agent. `jax.jit(agent.step)` runs on the mesh wherever the state lies before.

    Raises:
      ValueError: environments that do not divide over the devices.
    """
    whole, part = _agents(make, config, env, mesh.shape[AXIS], networks)

    def step(state, data=None):
        specs = _specs(state)
        mapped = jax.shard_map(
            part.step, mesh=mesh, in_specs=(specs,), out_specs=(specs, PartitionSpec()), check_vma=False
        )
        return mapped(state)

    return whole._replace(step=step)


def pmap(make: Callable, config: Any, env: Env, devices: int, **networks: Any) -> Agent:
    """The same by `jax.pmap`, the form of the paper: arguments and state as `shard`, for `devices` local devices.

    Its step cannot be jitted again or scanned: `pmap` is the whole program.
    """
    whole, part = _agents(make, config, env, devices, networks)

    def split(x):
        return x.reshape(devices, -1, *x.shape[1:])

    def join(x):
        return x.reshape(-1, *x.shape[2:])

    mapped: dict[Any, Callable] = {}

    def step(state, data=None):
        axes = jax.tree.map(lambda spec: 0 if AXIS in spec else None, _specs(state))
        structure = jax.tree.structure(state)
        if structure not in mapped:
            mapped[structure] = jax.pmap(part.step, axis_name=AXIS, in_axes=(axes,), out_axes=(axes, None))
        state, metrics = mapped[structure](_on_environments(split, state))
        return _on_environments(join, state), metrics

    return whole._replace(step=step)


def _agents(make, config, env, devices, networks) -> tuple[Agent, Agent]:
    if config.envs % devices:
        raise ValueError(f"envs is {config.envs}, expected a multiple of the {devices} devices of axis {AXIS!r}")
    share = dataclasses.replace(config, envs=config.envs // devices)
    return make(config, env, **networks), make(share, env, axis_name=AXIS, **networks)


def _on_environments(f: Callable, state: State) -> State:
    """f of every leaf that has a row for each environment."""
    rewards = state.rewards and state.rewards._replace(returns=f(state.rewards.returns))
    return state._replace(
        interaction=jax.tree.map(f, state.interaction),
        critic_memory=jax.tree.map(f, state.critic_memory),
        rewards=rewards,
    )


def _specs(state: State) -> State:
    """Where each leaf lies: rows of environments over the devices, all else on each."""
    everywhere = jax.tree.map(lambda _: PartitionSpec(), state)
    return _on_environments(lambda _: PartitionSpec(AXIS), everywhere)
