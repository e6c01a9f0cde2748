"""Acting: a policy and N copies of an environment make a trajectory `[T, N]`.

Random numbers are the dearest part of a small environment's step, so whatever does not depend on the past is drawn at
once, before the scan over time: the policy's noise, the keys, and a first state of a new episode for every step that
might need one (a reset depends on its key alone).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs.env import Box, Env, Space


class Interaction(NamedTuple):
    """Where N environments stand; every leaf has a leading axis N.

    `env`: their states. `observation`: what to act on next. `memory`: of the policy, for these observations.
    `episode_return`, `episode_length`: of the episodes so far.
    """

    env: Any
    observation: Any
    memory: Any
    episode_return: jax.Array
    episode_length: jax.Array


class Trajectory(NamedTuple):
    """T steps of N environments; every leaf is [T, N, ...].

    `observation`: acted on. `mask`: actions allowed there, or None. `action`: as the policy gave it, before it was
    clipped to the action space. `reward`, `terminated`, `truncated`, `successor`: see `envs.TimeStep`; the successor is
    the observation the action led to, before any reset. `extras`: what the policy left. `episode_return`,
    `episode_length`: of the episode, up to and with this step.
    """

    observation: Any
    mask: jax.Array | None
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    successor: Any
    extras: Any
    episode_return: jax.Array
    episode_length: jax.Array

    @property
    def done(self) -> jax.Array:
        """Whether the episode ended with this step, either way: bool [T, N]."""
        return self.terminated | self.truncated

    @property
    def starts(self) -> jax.Array:
        """Whether an episode started with this step; false in the first row: bool [T, N]."""
        return jnp.concatenate([jnp.zeros_like(self.done[:1]), self.done[:-1]])


def begin(env: Env, key: jax.Array, envs: int, *, memory: Any = ()) -> Interaction:
    """Resets `envs` environments.

    Args:
      env: one environment, neither vectorised nor with automatic reset.
      key: one for all [] or one for each [N]; consumed.
      envs: N.
      memory: of the policy before the first observation of an episode, without a leading axis.
    """
    states, observations = jax.vmap(env.reset)(key if jnp.ndim(key) else jax.random.split(key, envs))
    return Interaction(states, observations, copies(memory, envs), jnp.zeros(envs), jnp.zeros(envs, jnp.int32))


def collect(
    env: Env,
    act: Callable,
    interaction: Interaction,
    key: jax.Array,
    *,
    steps: int,
    noise: Any = (),
    memory: Any = (),
) -> tuple[Interaction, Trajectory]:
    """Acts for T steps in N environments, each beginning anew in the very step that ends an episode.

    Args:
      env: as in `begin`.
      act: `(observation [N, ...], mask [N, A] or None, memory [N, ...], noise) -> (action [N, ...], memory, extras)`.
      interaction: where the environments stand.
      key: for the environments, one for all [] or one for each [N]; consumed.
      steps: T.
      noise: a pytree of [T, ...], of which `act` gets one slice a step.
      memory: as in `begin`.

    Returns:
      The interaction after the steps, and the trajectory [T, N].
    """
    n = interaction.episode_return.shape[0]
    keys = key if jnp.ndim(key) else jax.random.split(key, n)
    reset_keys, keys = (
        jax.vmap(lambda t: jax.vmap(lambda key: jax.random.fold_in(key, 2 * t + purpose))(keys))(jnp.arange(steps))
        for purpose in range(2)
    )
    fresh = jax.vmap(jax.vmap(env.reset))(reset_keys)
    numbers, to_keys = key_numbers(keys)
    packed, unpack = pack((interaction.env, interaction.observation))
    memories = copies(memory, n)
    record: list[Callable] = []  # how to unpack what a step leaves; known once it is traced

    def step(carry, drawn):
        noise, numbers, fresh = drawn
        (states, observation), memory = unpack(carry[0]), carry[1]
        mask = None if env.action_mask is None else jax.vmap(env.action_mask)(states)
        action, memory, extras = act(observation, mask, memory, noise)
        states, timestep = jax.vmap(env.step)(to_keys(numbers), states, within(env.action_space, action))
        done = timestep.terminated | timestep.truncated
        after, _ = pack((states, timestep.observation))
        left, unpack_left = pack((mask, action, timestep, extras))
        record.append(unpack_left)
        return (where(done, fresh, after), where(done, memories, memory)), left

    first, _ = pack(fresh, axis=2)
    (last, memory), left = jax.lax.scan(step, (packed, interaction.memory), (noise, numbers, first), length=steps)
    mask, action, timestep, extras = record[-1](left)
    done = timestep.terminated | timestep.truncated
    observations = jax.tree.map(
        lambda start, later: jnp.concatenate([start[None], later[:-1]]),
        interaction.observation,
        where(done, fresh[1], timestep.observation),
    )
    (episode_return, episode_length), (returns, lengths) = running_sums(
        (interaction.episode_return, interaction.episode_length),
        (timestep.reward, jnp.ones_like(done, jnp.int32)),
        done,
    )
    states, observation = unpack(last)
    trajectory = Trajectory(
        observation=observations,
        mask=mask,
        action=action,
        reward=timestep.reward,
        terminated=timestep.terminated,
        truncated=timestep.truncated,
        successor=timestep.successor,
        extras=extras,
        episode_return=returns,
        episode_length=lengths,
    )
    return Interaction(states, observation, memory, episode_return, episode_length), trajectory


def running_sums(start: Any, values: Any, done: jax.Array) -> tuple[Any, Any]:
    """Sums of `values` [T, N] over the episode so far, from `start` [N]: those to go on from [N], and all [T, N].

    Of every leaf, in one scan. done: bool [T, N].
    """

    def step(totals, now):
        values, done = now
        totals = jax.tree.map(jnp.add, totals, values)
        return jax.tree.map(lambda total: jnp.where(done, 0, total), totals), totals

    return jax.lax.scan(step, start, (values, done))


def key_numbers(keys: jax.Array) -> tuple[jax.Array, Callable]:
    """The numbers of an array of keys [...], and the way back: what to scan over in place of keys.

    A scan moves its axis to the front, and in a `vmap` that transposes what it runs over. JAX's checker of keys takes a
    transposed array of keys for a second use of them.
    """
    impl = jax.random.key_impl(keys)
    return jax.random.key_data(keys), lambda numbers: jax.random.wrap_key_data(numbers, impl=impl)


def pack(tree: Any, *, axis: int = 1) -> tuple[dict[str, jax.Array], Callable]:
    """The leaves [N, ...] of a tree side by side in one matrix [N, columns] for each dtype, and the way back.

    A loop over time pays for every array it carries, stacks and selects from, however small: on CPU, in a step of
    CartPole, more than for all the arithmetic.

    Args:
      tree: any pytree of arrays with equal leading axes.
      axis: number of leading axes.

    Returns:
      The matrices, and a function from such matrices, with any leading axes, to the tree.
    """
    leaves, treedef = jax.tree.flatten(tree)
    groups: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(str(leaf.dtype), []).append(i)
    shapes = [leaf.shape[axis:] for leaf in leaves]

    def flat(leaf):
        return leaf.reshape(*leaf.shape[:axis], -1)

    def unpack(matrices):
        unpacked: dict[int, jax.Array] = {}
        for dtype, members in groups.items():
            ends = list(itertools.accumulate(math.prod(shapes[i]) for i in members))
            for i, part in zip(members, jnp.split(matrices[dtype], ends[:-1], axis=-1), strict=True):
                unpacked[i] = part.reshape(*part.shape[:-1], *shapes[i])
        return jax.tree.unflatten(treedef, [unpacked[i] for i in range(len(leaves))])

    matrices = {d: jnp.concatenate([flat(leaves[i]) for i in members], axis=-1) for d, members in groups.items()}
    return matrices, unpack


def episodes(
    trajectory: Any, *, counted: jax.Array | None = None, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Metrics of the episodes that ended within a trajectory: their number, mean return and mean length.

    Without any, the means are NaN.

    Args:
      trajectory: anything with `done`, `episode_return` and `episode_length`, [T, N].
      counted: bool [T, N], to look at these steps alone.
      axis_name: a mapped axis of devices, to count the episodes of all of them.
    """
    done = trajectory.done if counted is None else trajectory.done & counted
    sums = jnp.stack(
        [
            done.sum(dtype=jnp.float32),
            jnp.where(done, trajectory.episode_return, 0.0).sum(),
            jnp.where(done, trajectory.episode_length, 0).sum(dtype=jnp.float32),
        ]
    )
    count, returns, lengths = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return {"episode/return": returns / count, "episode/length": lengths / count, "episode/count": count}


def within(space: Space, action: jax.Array) -> jax.Array:
    """The action [..., *space.shape] that the environment gets: clipped to the bounds of a `Box`."""
    if not isinstance(space, Box):
        return action
    low, high = (jnp.broadcast_to(jnp.asarray(bound, space.dtype), action.shape) for bound in space.bounds)
    return jnp.clip(action, low, high)


def where(done: jax.Array, new: Any, old: Any) -> Any:
    """For every leaf [N, ...] of two equal pytrees: rows of `new` where done [N], else of `old`."""

    def select(x, y):
        return jnp.where(done.reshape(done.shape + (1,) * (x.ndim - done.ndim)), x, y)

    return jax.tree.map(select, new, old)


def copies(tree: Any, n: int) -> Any:
    """Every leaf repeated along a new leading axis of length n."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), tree)
