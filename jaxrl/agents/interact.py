"""Acting: a policy and N copies of an environment make a trajectory `[T, N]`.

Random numbers are the dearest part of a small environment's step, so whatever does not depend on the past is drawn at
once, before the scan over time: the policy's noise, the keys, and a first state of a new episode for every step that
might need one (a reset depends on its key alone).
"""

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
      key: consumed.
      envs: N.
      memory: of the policy before the first observation of an episode, without a leading axis.
    """
    states, observations = jax.vmap(env.reset)(jax.random.split(key, envs))
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
    reset_keys, keys = (keys.T for keys in jax.vmap(lambda key: jax.random.split(key, (2, steps)), out_axes=1)(keys))
    fresh = jax.vmap(jax.vmap(env.reset))(reset_keys)
    memories = copies(memory, n)

    def step(now: Interaction, drawn):
        noise, keys, (fresh_env, fresh_observation) = drawn
        mask = None if env.action_mask is None else jax.vmap(env.action_mask)(now.env)
        action, later, extras = act(now.observation, mask, now.memory, noise)
        states, timestep = jax.vmap(env.step)(keys, now.env, within(env.action_space, action))
        done = timestep.terminated | timestep.truncated
        episode_return, episode_length = now.episode_return + timestep.reward, now.episode_length + 1
        then = Interaction(
            env=where(done, fresh_env, states),
            observation=where(done, fresh_observation, timestep.observation),
            memory=where(done, memories, later),
            episode_return=jnp.where(done, 0.0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
        )
        return then, Trajectory(
            observation=now.observation,
            mask=mask,
            action=action,
            reward=timestep.reward,
            terminated=timestep.terminated,
            truncated=timestep.truncated,
            successor=timestep.successor,
            extras=extras,
            episode_return=episode_return,
            episode_length=episode_length,
        )

    return jax.lax.scan(step, interaction, (noise, keys, fresh), length=steps)


def episodes(trajectory: Trajectory, *, axis_name: str | None = None) -> dict[str, jax.Array]:
    """Metrics of the episodes that ended within a trajectory: their number, mean return and mean length.

    Without any, the means are NaN. With `axis_name`, of all the devices on that mapped axis together.
    """
    done = trajectory.done
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
