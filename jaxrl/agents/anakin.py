"""Anakin: one agent on all devices, environments and learning together (Hessel et al. 2021, arXiv 2104.06272).

    agent = anakin.shard(ppo.make, ppo.PPOConfig(envs=1024), envs.make("CartPole-v1"), mesh)

Every device steps its share of the environments and learns from them with the same parameters; gradients (and
statistics, KL and metrics) are averaged over the axis `data`. The state is that of one device with all the
environments: what is of an environment lies on its device, the rest on every device, so that checkpoints open on any
number of devices.

`spread` is for every agent, and leaves the dividing of its step to the compiler; `shard` and `pmap` are for agents that
learn from what they just did, and divide it by hand.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.agents.agent import Agent
from jaxrl.agents.on_policy import State
from jaxrl.envs.env import Env

AXIS = "data"


def spread(make: Callable, config: Any, env: Env, mesh: Mesh, **options: Any) -> Agent:
    """Any agent, its environments and what it remembers of them divided over a mesh by the compiler.

    Minibatches that are drawn from a memory are divided too. Random numbers and results are those of one device.

    Args:
      make: of an agent.
      config: `envs` is the number of environments on all devices together.
      env: as `make` takes it.
      mesh: with an axis `data`; others take no part.
      options: handed to `make`.

    Raises:
      ValueError: environments or minibatches that do not divide over the devices.
    """
    parts = mesh.shape[AXIS]
    for name, size in (("envs", config.envs), ("batch", getattr(config, "batch", parts))):
        if size % parts:
            raise ValueError(f"{name} is {size}, expected a multiple of the {parts} devices of axis {AXIS!r}")

    def lay(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    if "constrain" in inspect.signature(make).parameters:
        options["constrain"] = lambda batch: jax.tree.map(lambda x: lay(x, None, AXIS), batch)
    agent = make(config, env, **options)
    doubled = {name: 2 * getattr(config, name) for name in ("envs", "capacity", "warmup") if hasattr(config, name)}
    twice = make(dataclasses.replace(config, **doubled), env, **options)

    def place(x, other):
        """A dimension that doubles with the environments is theirs."""
        grown = [i for i, (n, m) in enumerate(zip(x.shape, other.shape, strict=True)) if m == 2 * n]
        return lay(x, *[AXIS if i in grown[:1] else None for i in range(x.ndim)])

    def placed(state):
        return jax.tree.map(place, state, jax.eval_shape(twice.init, jax.random.key(0)))

    def step(state, data=None):
        state, metrics = agent.step(placed(state), data)
        return placed(state), metrics

    return agent._replace(init=lambda key: placed(agent.init(key)), step=step)


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
