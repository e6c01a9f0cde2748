"""Deep Q-learning (Mnih et al. 2015), with its improvements as switches.

The target of a transition is

    y = r + discount max_a q'(s', a),     double:  r + discount q'(s', argmax_a q(s', a))

with q' a copy of the network that follows every `target_every` environment steps. `double`: van Hasselt et al. 2016,
arXiv 1509.06461. `dueling`: Wang et al. 2016, arXiv 1511.06581. `n_step` and `prioritised` as in Rainbow, Hessel et al.
2018, arXiv 1710.02298. Deviations: the target may also follow by a fraction (`target_rate`); Adam; a truncated episode
bootstraps.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import devices, networks, on_policy, replay
from jaxrl.agents.agent import Agent
from jaxrl.agents.replay import Batch, Learnt
from jaxrl.envs.env import Discrete, Env
from jaxrl.losses import td
from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.layers import Linear
from jaxrl.nets.mlp import MLP


@dataclasses.dataclass(frozen=True)
class DQNConfig:
    """Deep Q-learning."""

    envs: int = 10
    """Environments side by side."""
    steps: int = 1
    """Steps in each of them between two phases of learning."""
    updates: int = 1
    """Minibatch updates in a phase of learning."""
    batch: int = 128
    """Transitions in a minibatch."""
    rounds: int = 100
    """Rounds of acting and learning in one step of the agent."""
    capacity: int = 10_000
    """Transitions remembered."""
    warmup: int = 5_000
    """Environment steps at random before learning begins."""
    learning_rate: float = 2.5e-4
    """Adam's."""
    anneal: int = 0
    """Steps of the agent over which the learning rate falls linearly to zero; 0: it stays; -1: all of a run."""
    max_grad_norm: float | None = None
    """Global norm above which gradients are scaled down; None leaves them."""
    discount: float = 0.99
    """Worth of a reward one step later."""
    double: bool = False
    """The online network chooses the successor's action, the target network values it."""
    dueling: bool = False
    """The network splits into a state's value and the advantages of actions."""
    n_step: int = 1
    """Rewards in a target before it bootstraps."""
    huber: bool = False
    """Huber's loss instead of the square. No error pulls with more than 1: rare ends of episodes may be outvoted."""
    target_every: int = 500
    """Environment steps between two updates of the target network."""
    target_rate: float = 1.0
    """How far the target then moves to the online network: 1 copies it."""
    epsilon_start: float = 1.0
    """Probability of a random action at the beginning."""
    epsilon_end: float = 0.05
    """Probability of a random action after `epsilon_steps`."""
    epsilon_steps: int = 50_000
    """Environment steps over which it falls linearly."""
    prioritised: bool = False
    """Replay in proportion to the size of TD errors."""
    alpha: float = 0.6
    """Exponent of the priorities: 0 is uniform replay."""
    beta: float = 0.4
    """Exponent of the importance weights: 1 corrects fully for the priorities."""
    hidden: tuple[int, ...] = (64, 64)
    """Features of the hidden layers."""


def make(
    config: DQNConfig,
    env: Env,
    *,
    network: networks.Network | None = None,
    constrain: Callable = lambda batch: batch,
    axis_name: str | None = None,
) -> Agent:
    """The agent; `network` maps observations to values [..., A] (default: an MLP), the others as `replay.make`."""
    if not isinstance(env.action_space, Discrete):
        raise ValueError(f"dqn needs discrete actions, {env.name} has {env.action_space}; use ddpg, td3 or sac")
    network = network or q_network(config, env)
    actions = env.action_space.n
    optimizer = optax.flatten(optax.scale_by_adam())
    if config.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    optimizer = devices.averaging(optimizer, axis_name)
    q = lambda params, observation: network.step(params, observation, ())[0]

    def init(key):
        params = network.init(key)
        return Learnt(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))

    def act(params, observation, memory, key):
        return jnp.argmax(q(params, observation), axis=-1).astype(jnp.int32), memory

    def uniform(params, observation, key, env_steps):
        n = jax.tree.leaves(observation)[0].shape[0]
        action = devices.rows(lambda n: jax.random.randint(key, (n,), 0, actions), n, axis_name)
        return action, action

    def explore(params, observation, key, env_steps):
        random_key, which_key = jax.random.split(key)
        random, _ = uniform(params, observation, random_key, env_steps)
        greedy = jnp.argmax(q(params, observation), axis=-1).astype(jnp.int32)
        chance = devices.rows(lambda n: jax.random.uniform(which_key, (n,)), greedy.shape[0], axis_name)
        action = jnp.where(chance < epsilon(config, env_steps), random, greedy)
        return action, action

    def update(rate, learnt, now, noise):
        batch, q_target = now

        def loss(params):
            errors = td_errors(
                q(params, batch.observation),
                batch,
                q_target,
                q(jax.lax.stop_gradient(params), batch.successor) if config.double else q_target,
            )
            losses = td.huber(errors) if config.huber else td.squared(errors)
            return jnp.mean(batch.weights * losses), errors

        (value, errors), gradient = jax.value_and_grad(loss, has_aux=True)(learnt.params)
        updates, optimizer_state = optimizer.update(gradient, learnt.optimizer)
        params = jax.tree.map(lambda p, u: p - rate * u, learnt.params, updates)
        learnt = Learnt(params, learnt.target, optimizer_state, learnt.updates + 1)
        return learnt, errors, {"q/loss": value, "q/target": q_target.mean()}

    def learn(learnt, batch, noise, before, after):
        q_target = q(learnt.target, batch.successor)  # the target network rests during a round
        done = before / (config.envs * config.steps * config.rounds * devices.count(axis_name))
        paced = functools.partial(update, on_policy.annealed(config.learning_rate, done, config.anneal))
        learnt, errors, metrics = replay.over_minibatches(paced, learnt, (batch, q_target), noise)
        due = replay.crossings(before, after, config.target_every) > 0
        target = replay.polyak(learnt.target, learnt.params, jnp.where(due, config.target_rate, 0.0))
        return learnt._replace(target=target), errors, metrics | {"q/epsilon": epsilon(config, before)}

    memory = replay.uniform(config.n_step)
    if config.prioritised:
        memory = replay.proportional(config.n_step, alpha=config.alpha, beta=config.beta, axis_name=axis_name)
    learner = replay.Learner(init, explore, uniform, lambda key: (), learn, act)
    return replay.make(env, learner, config, memory, constrain=constrain, axis_name=axis_name)


def td_errors(q_tm1: jax.Array, batch: Batch, q_value: jax.Array, q_selector: jax.Array) -> jax.Array:
    """Double Q-learning's errors [B], Q-learning's where both are the target network's.

    Args:
      q_tm1: [B, A] values of the observations acted on.
      batch: leaves [B, ...].
      q_value, q_selector: [B, A] values of the successors, by the network that values and the one that chooses.
    """
    return td.double_q_learning(q_tm1, batch.action, batch.reward, batch.discount, q_value, q_selector)


def epsilon(config: DQNConfig, env_steps: jax.Array | int) -> jax.Array:
    """Probability of a random action after so many environment steps."""
    done = jnp.minimum(jnp.asarray(env_steps, jnp.float32) / config.epsilon_steps, 1.0)
    return config.epsilon_start + done * (config.epsilon_end - config.epsilon_start)


class Dueling(nn.Module):
    """q(s, a) = v(s) + adv(s, a) - mean_b adv(s, b), both linear in the features.

    The paper gives each stream a hidden layer of its own. Parameters: streams/kernel [D, 1 + actions], streams/bias.
    """

    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., actions]."""
        x = Linear(1 + self.actions, use_bias=True, kernel_init=orthogonal(1.0), name="streams")(x)
        value, advantage = x[..., :1], x[..., 1:]
        return advantage + (value - advantage.mean(axis=-1, keepdims=True))


def q_network(config: DQNConfig, env: Env) -> networks.Network:
    """The default: hidden layers with ReLU, dueling or plain."""
    assert isinstance(env.action_space, Discrete)
    spaces = env.observation_space, env.action_space
    if not config.dueling:
        return networks.action_values(*spaces, sizes=config.hidden, activation=nn.relu)
    return networks.network(MLP(config.hidden, nn.relu), Dueling(env.action_space.n), env.observation_space)
