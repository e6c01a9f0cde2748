"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347).

    agent = ppo.make(ppo.PPOConfig(), envs.make("CartPole-v1"))

One step is a rollout of T steps in N environments, advantages by GAE, and a few epochs of gradient steps on
minibatches of it. A minibatch is a set of columns: single steps, or whole streams [T] if the policy has a memory, which
then starts from what it was at the beginning of the rollout (back-propagation through time stops there).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxrl import returns
from jaxrl.agents import on_policy
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network, actor_and_critic
from jaxrl.agents.on_policy import Batch, State
from jaxrl.envs.env import Env
from jaxrl.losses import ppo_clip, value_loss


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation. The defaults suit CartPole."""

    envs: int = 4
    """Environments side by side."""
    steps: int = 128
    """Steps in each environment between updates."""
    epochs: int = 4
    """Times each rollout is gone through."""
    minibatches: int = 4
    """Gradient steps in an epoch; divides envs * steps (envs, with a recurrent policy)."""
    learning_rate: float = 2.5e-4
    """Of Adam."""
    anneal: int = 0
    """Updates over which the learning rate falls linearly to zero; 0: it stays; -1: all updates of a run."""
    discount: float = 0.99
    """Weight of the next step's value, gamma."""
    lambda_: float = 0.95
    """Of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    clip: float = 0.2
    """How far the probability ratio may move from 1 before its gradient stops."""
    value_clip: float | None = None
    """How far a value may move from its old one, in units of value; none: no bound."""
    entropy: float = 0.01
    """Weight of the policy's entropy."""
    value: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm, actor's and critic's together."""
    normalise_advantages: bool = True
    """Shift and scale the advantages of each minibatch to mean 0 and standard deviation 1."""
    target_kl: float | None = None
    """Leave out the rest of an update once KL(old || new) exceeds this; none: never."""
    normalise_observations: bool = False
    """Standardise observations by running moments."""
    normalise_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden: tuple[int, ...] = (64, 64)
    """Layers of the actor and of the critic."""
    recurrent: int = 0
    """Features of a recurrent layer in actor and critic; 0: none."""
    cell: str = "gru"
    """Of that layer: gru, lstm, tanh or relu."""
    log_std: float = 0.0
    """Initial log standard deviation of continuous actions."""


def make(
    config: PPOConfig,
    env: Env,
    *,
    actor: Network | None = None,
    critic: Network | None = None,
    axis_name: str | None = None,
) -> Agent:
    """PPO on an environment.

    Args:
      config: its floats may be traced.
      env: one environment with its time limit.
      actor, critic: networks in place of the config's; both or neither with a memory.
      axis_name: a mapped axis of devices, each with `config.envs` environments, that learn together.

    Raises:
      ValueError: minibatches that do not divide the rollout.
    """
    actor, critic = actor_and_critic(config, env, actor, critic)
    whole_streams = actor.recurrent or critic.recurrent
    columns = on_policy.columns(config, whole_streams, config.minibatches)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=1e-5))

    def init(key: jax.Array) -> State:
        return on_policy.init(config, env, actor, critic, optimizer, key)

    def step(state: State, data: Any = None) -> tuple[State, dict[str, jax.Array]]:
        rolled, batch, metrics = on_policy.rollout(
            env,
            actor,
            critic,
            state,
            steps=config.steps,
            discount=config.discount,
            lambda_=config.lambda_,
            axis_name=axis_name,
        )
        batch = batch if whole_streams else on_policy.single_steps(batch)
        rate = on_policy.annealed(config.learning_rate, state.step, config.anneal)
        key = on_policy.draw_key(state, on_policy.LEARNING)
        flat, unflatten = ravel_pytree(on_policy.trained(state.params))

        def update(carry, columns):
            flat, optimizer_state, stopped = carry
            minibatch = on_policy.take(batch, columns)
            if config.normalise_advantages:
                advantage = minibatch.advantage
                advantage = returns.whiten(advantage, jnp.ones_like(advantage, bool), ddof=0, axis_name=axis_name)
                minibatch = minibatch._replace(advantage=advantage)
            new, new_state, row = on_policy.descend(
                optimizer,
                lambda flat: loss(config, actor, critic, unflatten(flat), minibatch),
                flat,
                optimizer_state,
                rate=rate,
                axis_name=axis_name,
            )
            if config.target_kl is not None:
                stopped = stopped | (row["policy/kl"] > config.target_kl)
                new, new_state = jax.tree.map(
                    lambda old, new: jnp.where(stopped, old, new), (flat, optimizer_state), (new, new_state)
                )
            return (new, new_state, stopped), row

        orders = on_policy.shuffles(key, columns, config.epochs).reshape(config.epochs * config.minibatches, -1)
        (flat, optimizer_state, _), rows = jax.lax.scan(update, (flat, state.optimizer, jnp.zeros((), bool)), orders)
        state = rolled._replace(step=state.step + 1, params=rolled.params | unflatten(flat), optimizer=optimizer_state)
        return state, metrics | jax.tree.map(jnp.mean, rows)

    return Agent(init, step, on_policy.acting(actor), actor.memory, config.envs * config.steps)


def loss(
    config: PPOConfig, actor: Network, critic: Network, trained: dict[str, Any], batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """mean(clipped surrogate) - entropy weight * entropy + value weight * value loss, with metrics.

    Args:
      config: the weights and clips.
      trained: {"actor", "critic"} parameters.
      batch: [T, B, ...] with the memories [B, ...] before the first step; advantages normalised already.
    """
    policy, _ = actor.unroll(trained["actor"], batch.observation, batch.starts, batch.actor_memory)
    policy = on_policy.allowed(policy, batch.mask)
    value, _ = critic.unroll(trained["critic"], batch.observation, batch.starts, batch.critic_memory)
    surrogate, diagnostics = ppo_clip(
        policy.log_prob(batch.action), batch.log_prob, batch.advantage, clip_low=config.clip, clip_high=config.clip
    )
    elements = {
        "policy/loss": surrogate,
        "policy/entropy": policy.entropy(),
        "value/loss": value_loss(value, batch.target, old_values=batch.value, clip=config.value_clip),
        "policy/kl": diagnostics["kl_old"],
        "policy/clip": diagnostics["clipped_low"] + diagnostics["clipped_high"],
    }
    metrics = on_policy.means(elements)
    return (
        metrics["policy/loss"] - config.entropy * metrics["policy/entropy"] + config.value * metrics["value/loss"],
        metrics,
    )
