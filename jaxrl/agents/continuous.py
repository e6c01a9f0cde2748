"""What actor-critics for continuous actions share: the scale of actions, ensembles of critics.

Inside these agents actions lie in [-1, 1]^dim: so they are remembered, criticised and disturbed. Only the environment
sees its own bounds.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents import networks
from jaxrl.envs.env import Box, Env, Space
from jaxrl.losses import td
from jaxrl.nets import heads
from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.layers import Linear
from jaxrl.nets.mlp import MLP


class Critics(NamedTuple):
    """K networks as one, computed together.

    `init`: `(key) -> params`, leaves [K, ...]. `apply`: `(params, observation [..., *shape], action [..., dim]) ->
    q [K, ...]`.
    """

    init: Callable
    apply: Callable


def critics(env: Env, *, count: int, sizes: Sequence[int] = (64, 64), activation: Callable = nn.relu) -> Critics:
    """K critics q(s, a), an MLP on observation and action each, initialised differently."""
    module = _Critic(tuple(sizes), activation)
    observation = networks.encode(env.observation_space, jnp.zeros(env.observation_space.shape))
    zeros = jnp.zeros(observation.shape[0] + env.action_space.shape[0])
    apply = jax.vmap(module.apply, in_axes=(0, None))

    def values(params, observation, action):
        return apply(params, jnp.concatenate([networks.encode(env.observation_space, observation), action], axis=-1))

    return Critics(lambda key: jax.vmap(lambda key: module.init(key, zeros))(jax.random.split(key, count)), values)


def deterministic_actor(
    env: Env, *, sizes: Sequence[int] = (64, 64), activation: Callable = nn.relu
) -> networks.Network:
    """mu(s) in [-1, 1]^dim: an MLP and tanh."""
    head = Linear(env.action_space.shape[0], use_bias=True, kernel_init=orthogonal(0.01))
    return networks.network(MLP(tuple(sizes), activation), head, env.observation_space, output=jnp.tanh)


def critics_errors(q_tm1: jax.Array, reward: jax.Array, discount: jax.Array, v_t: jax.Array) -> jax.Array:
    """TD errors [K, B] of K critics' values [K, B] towards one target: reward [B] + discount [B] v_t [B]."""
    return jax.vmap(td.td_learning, in_axes=(0, None, None, None))(q_tm1, reward, discount, v_t)


def to_bounds(space: Space, action: jax.Array) -> jax.Array:
    """From [-1, 1]^dim to the space's bounds: [..., dim] -> [..., dim]."""
    assert isinstance(space, Box)
    low, high = (jnp.broadcast_to(jnp.asarray(bound, jnp.float32), action.shape) for bound in space.bounds)
    return low + (action + 1.0) * (0.5 * (high - low))


def check(name: str, env: Env) -> None:
    """Raises ValueError unless actions are vectors within finite bounds."""
    space = env.action_space
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ValueError(f"{name} needs actions in a Box of shape [dim], {env.name} has {space}")
    if not all(np.isfinite(bound).all() for bound in space.bounds):
        raise ValueError(f"{name} needs bounded actions, {env.name} has {space}: clip them in a wrapper")


class _Critic(nn.Module):
    sizes: tuple[int, ...]
    activation: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return heads.Value()(MLP(self.sizes, self.activation)(x))
