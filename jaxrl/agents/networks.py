"""What agents ask of a network, and the networks they take when none is given.

A `Network` is a function of an observation and a memory, with one memory less for those that have none. Agents call it
in two ways: `step` while acting, `unroll` over a whole trajectory while learning.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl import distributions
from jaxrl.envs.env import Discrete, Env, Space
from jaxrl.nets import heads
from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.mlp import MLP
from jaxrl.nets.recurrent import CELLS, Recurrent


class Network(NamedTuple):
    """A function of observations, with memory.

    `init`: `(key) -> params`.
    `step`: `(params, observation [..., *shape], memory [..., *]) -> (output [..., *], memory)`, any batch axes.
    `unroll`: `(params, observation [T, N, *shape], starts [T, N], memory [N, *]) -> (output [T, N, *], memories
    [T, N, *])`: T steps, with the memory after each; it is forgotten before an observation whose `starts` is true.
    `memory`: `() -> memory` before the first observation of an episode, no batch axis; () if there is none.

    The output is a distribution for a policy, an array [...] for a value function.
    """

    init: Callable
    step: Callable
    unroll: Callable
    memory: Callable

    @property
    def recurrent(self) -> bool:
        """Whether there is a memory."""
        return bool(jax.tree.leaves(jax.eval_shape(self.memory)))


def actor(
    observations: Space,
    actions: Space,
    *,
    sizes: Sequence[int] = (64, 64),
    activation: Callable = nn.tanh,
    recurrent: int = 0,
    cell: str = "gru",
    initial_log_std: float = 0.0,
) -> Network:
    """A stochastic policy: MLP, then a categorical or (for a `Box`) a Gaussian with learned std.

    Args:
      observations, actions: spaces of the environment. Discrete observations become one-hot, others flat vectors.
      sizes, activation: of the MLP.
      recurrent: features of a recurrent layer after the MLP, or 0 for none.
      cell: of that layer: gru, lstm, tanh or relu.
      initial_log_std: of the Gaussian, which does not depend on the observation.
    """
    if isinstance(actions, Discrete):
        head, output = heads.Categorical(actions.n), distributions.Categorical
    elif len(actions.shape) == 1:
        head = heads.Gaussian(actions.shape[0], initial_log_std=initial_log_std)
        output = lambda parameters: distributions.Gaussian(*parameters)
    else:
        raise ValueError(f"the action space is {actions}, expected Discrete or a Box of shape [dim]")
    return network(MLP(tuple(sizes), activation), head, observations, recurrent=recurrent, cell=cell, output=output)


def critic(
    observations: Space,
    *,
    sizes: Sequence[int] = (64, 64),
    activation: Callable = nn.tanh,
    recurrent: int = 0,
    cell: str = "gru",
) -> Network:
    """A state-value function; arguments as `actor`."""
    return network(MLP(tuple(sizes), activation), heads.Value(), observations, recurrent=recurrent, cell=cell)


def actor_and_critic(config: Any, env: Env, actor_: Network | None, critic_: Network | None) -> tuple[Network, Network]:
    """The networks an agent was given, or those of its config's `hidden`, `recurrent`, `cell` and `log_std`."""
    sizes: dict[str, Any] = {"sizes": config.hidden, "recurrent": config.recurrent, "cell": config.cell}
    return (
        actor_ or actor(env.observation_space, env.action_space, **sizes, initial_log_std=config.log_std),
        critic_ or critic(env.observation_space, **sizes),
    )


def nothing() -> Network:
    """A value function that is zero everywhere, without parameters."""
    zero = lambda observation, axes: jnp.zeros(jax.tree.leaves(observation)[0].shape[:axes])
    return Network(
        init=lambda key: {},
        step=lambda params, observation, memory: (zero(observation, 2), memory),
        unroll=lambda params, observation, starts, memory: (zero(observation, 2), memory),
        memory=lambda: (),
    )


def action_values(
    observations: Space,
    actions: Space,
    *,
    sizes: Sequence[int] = (64, 64),
    activation: Callable = nn.tanh,
    recurrent: int = 0,
) -> Network:
    """Values [..., A] of all actions; arguments as `actor`."""
    if not isinstance(actions, Discrete):
        raise ValueError(f"the action space is {actions}, expected Discrete: one value for each action")
    head = heads.Categorical(actions.n, kernel_init=orthogonal(1.0))
    return network(MLP(tuple(sizes), activation), head, observations, recurrent=recurrent)


def network(
    torso: nn.Module,
    head: nn.Module,
    observations: Space,
    *,
    recurrent: int = 0,
    cell: str = "gru",
    output: Callable = lambda x: x,
) -> Network:
    """A `Network` of Flax modules: output(head(torso(observation))), with a recurrent layer after the torso if wanted.

    Args:
      torso: maps [..., D] to [..., F].
      head: maps [..., F] to what `output` takes.
      observations: the space; decides D.
      recurrent: features H of the layer, or 0. Its memory is forgotten where an episode starts.
      cell: name in `nets.recurrent.CELLS`; an LSTM's memory is [2 H].
      output: such as a distribution's constructor.

    Raises:
      ValueError: an unknown cell.
    """
    if cell not in CELLS:
        raise ValueError(f"cell is {cell!r}; expected one of {', '.join(CELLS)}")
    zeros = jnp.zeros((1, 1, *observations.shape), observations.dtype)
    if not recurrent:
        plain = _Feedforward(torso, head)

        def apply(params, observation):
            return output(plain.apply(params, encode(observations, observation)))

        return Network(
            init=lambda key: plain.init(key, encode(observations, zeros)),
            step=lambda params, observation, memory: (apply(params, observation), memory),
            unroll=lambda params, observation, starts, memory: (apply(params, observation), memory),
            memory=lambda: (),
        )
    module, width = _Recurrent(torso, Recurrent(recurrent, cell), head), CELLS[cell].states * recurrent

    def step(params, observation, memory):
        out, memory = module.apply(params, encode(observations, observation), memory)
        return output(out), memory

    def unroll(params, observation, starts, memory):
        out, memories = module.apply(params, encode(observations, observation), starts, memory, method="unroll")
        return output(out), memories

    return Network(
        init=lambda key: module.init(key, encode(observations, zeros), jnp.zeros((1, 1, width))),
        step=step,
        unroll=unroll,
        memory=lambda: jnp.zeros(width),
    )


def encode(space: Space, observation: jax.Array) -> jax.Array:
    """Observations [..., *space.shape] as float vectors [..., D]: one-hot if discrete, else flat."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(observation, space.n)
    batch = observation.shape[: observation.ndim - len(space.shape)]
    return observation.astype(jnp.float32).reshape(*batch, -1)


class _Feedforward(nn.Module):
    torso: nn.Module
    head: nn.Module

    def __call__(self, x: jax.Array) -> Any:
        return self.head(self.torso(x))


class _Recurrent(nn.Module):
    torso: nn.Module
    layer: Recurrent
    head: nn.Module

    def __call__(self, x: jax.Array, memory: jax.Array) -> Any:
        memory = self.layer(self.torso(x), memory)
        return self.head(memory[..., : self.layer.features]), memory

    def unroll(self, x: jax.Array, starts: jax.Array, memory: jax.Array) -> Any:
        memories = self.layer.unroll(self.torso(x), starts, memory)
        return self.head(memories[..., : self.layer.features]), memories
