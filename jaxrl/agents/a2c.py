"""Advantage actor-critic, synchronous (Mnih et al. 2016, arXiv 1602.01783).

    agent = a2c.make(a2c.A2CConfig(), envs.make("CartPole-v1"))

One step is a short rollout and one gradient step on all of it. With `lambda_` 0 the advantage is the TD error
r + discount v(s') - v(s), the textbook's form; 1 gives n-step returns minus values.
"""

import dataclasses
from typing import Any

import jax
import optax

from jaxrl import returns
from jaxrl.agents import on_policy
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network, actor_and_critic
from jaxrl.agents.on_policy import Batch, State
from jaxrl.envs.env import Env
from jaxrl.losses import policy_gradient, value_loss


@dataclasses.dataclass(frozen=True)
class A2CConfig:
    """Advantage actor-critic. The defaults suit CartPole."""

    envs: int = 8
    """Environments side by side."""
    steps: int = 16
    """Steps in each environment between updates."""
    learning_rate: float = 2e-3
    """Of Adam."""
    anneal: int = 0
    """Updates over which the learning rate falls linearly to zero; 0: it stays; -1: all updates of a run."""
    discount: float = 0.99
    """Weight of the next step's value, gamma."""
    lambda_: float = 0.95
    """Of generalised advantage estimation: 0 gives TD errors, 1 n-step returns minus values."""
    entropy: float = 0.0
    """Weight of the policy's entropy."""
    value: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm, actor's and critic's together."""
    normalise_advantages: bool = False
    """Shift and scale the advantages of each rollout to mean 0 and standard deviation 1."""
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
    config: A2CConfig,
    env: Env,
    *,
    actor: Network | None = None,
    critic: Network | None = None,
    axis_name: str | None = None,
) -> Agent:
    """A2C on an environment; arguments as `ppo.make`."""
    actor, critic = actor_and_critic(config, env, actor, critic)
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
        if config.normalise_advantages:
            batch = batch._replace(advantage=returns.whiten(batch.advantage, batch.done | True, axis_name=axis_name))
        state, row = on_policy.learn(
            optimizer,
            lambda trained: loss(config, actor, critic, trained, batch),
            rolled,
            rate=on_policy.annealed(config.learning_rate, state.step, config.anneal),
            axis_name=axis_name,
        )
        return state, metrics | row

    return Agent(init, step, on_policy.acting(actor), actor.memory, config.envs * config.steps)


def loss(
    config: A2CConfig, actor: Network, critic: Network, trained: dict[str, Any], batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """mean(-A log pi) - entropy weight * entropy + value weight * value loss, with metrics; arguments as `ppo.loss`."""
    policy, _ = actor.unroll(trained["actor"], batch.observation, batch.starts, batch.actor_memory)
    policy = on_policy.allowed(policy, batch.mask)
    value, _ = critic.unroll(trained["critic"], batch.observation, batch.starts, batch.critic_memory)
    metrics = on_policy.means(
        {
            "policy/loss": policy_gradient(policy.log_prob(batch.action), batch.advantage),
            "policy/entropy": policy.entropy(),
            "value/loss": value_loss(value, batch.target),
        }
    )
    return (
        metrics["policy/loss"] - config.entropy * metrics["policy/entropy"] + config.value * metrics["value/loss"],
        metrics,
    )
