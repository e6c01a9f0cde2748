"""Anakin: one agent on all devices, environments and learning together (Hessel et al. 2021, arXiv 2104.06272).

    agent = anakin.shard(ppo.make, ppo.PPOConfig(envs=1024), envs.make("CartPole-v1"), mesh)

Every device steps its share of the environments and learns from them with the same parameters; gradients (and
statistics, KL and metrics) are averaged over the axis `data`. The state is that of one device with all the
environments: what is of an environment lies on its device, the rest on every device, so that checkpoints open on any
number of devices. All three forms are for every agent:

- `spread` leaves the dividing of a step to the compiler. Random numbers and results are those of one device.
- `shard` and `pmap` divide it by hand. Environments get the random numbers of one device. What is drawn for learning
  (minibatches from a replay memory, orders of a rollout's columns) each device draws of its own environments alone, and
  nothing but gradients and a few numbers goes between devices.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.agents.agent import Agent
from jaxrl.buffers import prioritised, ring
from jaxrl.buffers.prioritised import Prioritised
from jaxrl.envs.env import Env

AXIS = "data"


def spread(make: Callable, config: Any, env: Env, mesh: Mesh, **options: Any) -> Agent:
    """An agent whose environments and what it remembers of them are divided over a mesh by the compiler.

    Minibatches that are drawn from a memory are divided too.

    Args:
      make: of an agent.
      config: `envs` is the number of environments on all devices together.
      env: as `make` takes it.
      mesh: with an axis `data`; others take no part.
      options: handed to `make`.

    Raises:
      ValueError: environments or minibatches that do not divide over the devices.
    """
    share(config, mesh.shape[AXIS])

    def lay(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    if "constrain" in inspect.signature(make).parameters:
        options["constrain"] = lambda batch: jax.tree.map(lambda x: lay(x, None, AXIS), batch)
    agent = make(config, env, **options)
    twice, key = make(doubled(config), env, **options), jax.random.key(0)
    specs = layout(lambda: agent.init(key), lambda: twice.init(key))

    def placed(state):
        return jax.tree.map(lambda x, spec: lay(x, *spec), state, specs)

    def step(state, data=None):
        state, metrics = agent.step(placed(state), data)
        return placed(state), metrics

    return agent._replace(init=lambda key: placed(agent.init(key)), step=step)


def shard(make: Callable, config: Any, env: Env, mesh: Mesh, **options: Any) -> Agent:
    """An agent whose step is spread over a mesh by `shard_map`.

    Each device has its share of `envs`, and of `capacity` and `batch` where there is a replay memory; environment steps
    (of a warm-up, say) are those of all devices together.

    Args:
      make: of an agent, with an `axis_name`.
      config: of all devices together, but for the number of minibatches of a rollout: each device makes so many of its
        own.
      env: as `make` takes it.
      mesh: with an axis `data`; others take no part.
      options: handed to `make`.

    Returns:
      An Agent. `jax.jit(agent.step)` runs on the mesh wherever the state lies before.

    Raises:
      ValueError: environments or minibatches that do not divide over the devices.
    """
    whole, part, specs = _agents(make, config, env, mesh.shape[AXIS], options)
    out = (specs, PartitionSpec())
    mapped = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)

    def step(state, data=None):
        state, metrics = mapped(_flat(state))
        return _trees(state), metrics

    return whole._replace(step=step)


def pmap(make: Callable, config: Any, env: Env, devices: int, **options: Any) -> Agent:
    """The same by `jax.pmap`, the form of the paper: arguments and state as `shard`, for `devices` local devices.

    Its step cannot be jitted again or scanned: `pmap` is the whole program.
    """
    whole, part, specs = _agents(make, config, env, devices, options)
    axes = jax.tree.map(lambda spec: len(spec) - 1 if spec else None, specs)  # the axis stands last
    mapped = jax.pmap(part, axis_name=AXIS, in_axes=(axes,), out_axes=(axes, None))

    def split(x, spec):
        i = len(spec) - 1
        return x.reshape(*x.shape[:i], devices, x.shape[i] // devices, *x.shape[i + 1 :]) if spec else x

    def join(x, spec):
        i = len(spec) - 1
        return x.reshape(*x.shape[:i], x.shape[i] * x.shape[i + 1], *x.shape[i + 2 :]) if spec else x

    mesh = Mesh(np.asarray(jax.local_devices()[:devices]), (AXIS,))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    before = jax.jit(lambda state: jax.tree.map(split, _flat(state), specs))
    after = jax.jit(lambda state: _trees(jax.tree.map(join, state, specs)))

    def step(state, data=None):
        state, metrics = mapped(jax.device_put(before(state), places))
        return after(state), metrics

    return whole._replace(step=step)


def share(config: Any, devices: int) -> Any:
    """The config of one device: its part of environments, memory and minibatches.

    Raises:
      ValueError: environments or minibatches that do not divide.
    """
    sizes = {name: getattr(config, name) for name in ("envs", "batch", "capacity") if hasattr(config, name)}
    for name, size in sizes.items():
        if name != "capacity" and size % devices:
            raise ValueError(f"{name} is {size}, expected a multiple of the {devices} devices of axis {AXIS!r}")
    return dataclasses.replace(config, **{name: size // devices for name, size in sizes.items()})


def doubled(config: Any) -> Any:
    """The config with twice the environments, and so much more memory of them."""
    names = [name for name in ("envs", "capacity", "warmup") if hasattr(config, name)]
    return dataclasses.replace(config, **{name: 2 * getattr(config, name) for name in names})


def layout(init: Callable, twice: Callable) -> Any:
    """Where each leaf of a state lies, as PartitionSpecs: what is of an environment over the devices, all else on each.

    A dimension that grows with the number of environments is theirs.

    Args:
      init: `() -> state`.
      twice: the same of the `doubled` config.
    """

    def spec(x, other):
        grown = [i for i, (n, m) in enumerate(zip(x.shape, other.shape, strict=True)) if m != n]
        return PartitionSpec(*[None] * grown[0], AXIS) if grown else PartitionSpec()

    return jax.tree.map(spec, jax.eval_shape(init), jax.eval_shape(twice))


def _agents(make, config, env, devices, options) -> tuple[Agent, Callable, Any]:
    """The agent of all devices, the step of one, and the layout of the state between the two."""
    whole, twice = (make(c, env, **options) for c in (config, doubled(config)))
    part = make(share(config, devices), env, axis_name=AXIS, **options)

    def step(state):
        state, metrics = part.step(_trees(state))
        return _flat(state), metrics

    key = jax.random.key(0)
    return whole, step, layout(lambda: _flat(whole.init(key)), lambda: _flat(twice.init(key)))


def _flat(state: Any) -> Any:
    """The state with priorities [slots, streams] in the place of their sum tree, in which streams cannot be told."""

    def flat(x):
        if not isinstance(x, Prioritised):
            return x
        slots, streams = ring.shape(x.ring)
        return x._replace(tree=prioritised.priorities(x, jnp.arange(slots * streams)).reshape(slots, streams))

    return jax.tree.map(flat, state, is_leaf=lambda x: isinstance(x, Prioritised))


def _trees(state: Any) -> Any:
    """The inverse of `_flat`."""

    def tree(x):
        if not isinstance(x, Prioritised):
            return x
        slots, streams = x.tree.shape
        empty = prioritised.init((), slots=slots, streams=streams)
        filled = prioritised.update(empty, jnp.arange(x.tree.size), x.tree.reshape(-1))
        return x._replace(tree=filled.tree)

    return jax.tree.map(tree, state, is_leaf=lambda x: isinstance(x, Prioritised))
