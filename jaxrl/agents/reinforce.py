"""REINFORCE: Monte-Carlo policy gradients, with or without a baseline (Williams 1992).

    agent = reinforce.make(reinforce.ReinforceConfig(), envs.make("CartPole-v1"))

One step plays one episode in each environment, always from its beginning, so that long episodes count as often as short
ones. What an environment does after its first episode is not looked at. An episode that is not over after `steps` steps
is cut there: with a baseline, which stands for the rest, it counts; without one its return is not known and it is left
out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import interact, on_policy
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network, actor_and_critic, nothing
from jaxrl.agents.on_policy import Batch, State
from jaxrl.envs.env import Env
from jaxrl.losses import reinforce, value_loss
from jaxrl.losses.reduce import elements


@dataclasses.dataclass(frozen=True)
class ReinforceConfig:
    """REINFORCE. The defaults suit CartPole."""

    envs: int = 8
    """Episodes to an update."""
    steps: int = 500
    """The longest episode; without a baseline, one that has not ended by then is left out."""
    baseline: bool = True
    """Subtract a learned state value from the return; it also stands for what a truncation has cut off."""
    learning_rate: float = 3e-3
    """Of Adam."""
    anneal: int = 0
    """Updates over which the learning rate falls linearly to zero; 0: it stays; -1: all updates of a run."""
    discount: float = 0.99
    """Weight of the next reward, gamma. The factor discount^t of the theory is dropped, as everywhere."""
    entropy: float = 0.0
    """Weight of the policy's entropy."""
    value: float = 0.5
    """Weight of the baseline's loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    normalise_observations: bool = False
    """Standardise observations by running moments."""
    normalise_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden: tuple[int, ...] = (64, 64)
    """Layers of the actor and of the baseline."""
    recurrent: int = 0
    """Features of a recurrent layer in actor and baseline; 0: none."""
    cell: str = "gru"
    """Of that layer: gru, lstm, tanh or relu."""
    log_std: float = 0.0
    """Initial log standard deviation of continuous actions."""


def make(
    config: ReinforceConfig,
    env: Env,
    *,
    actor: Network | None = None,
    critic: Network | None = None,
    axis_name: str | None = None,
) -> Agent:
    """REINFORCE on an environment; arguments as `ppo.make`, with the baseline for a critic."""
    actor, critic = actor_and_critic(config, env, actor, critic if config.baseline else nothing())
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=1e-5))

    def init(key: jax.Array) -> State:
        return on_policy.init(config, env, actor, critic, optimizer, key)

    def step(state: State, data: Any = None) -> tuple[State, dict[str, jax.Array]]:
        # lambda 1: the advantage is the return less the baseline, and without one (zero) the return itself
        rolled, batch, _ = on_policy.rollout(
            env,
            actor,
            critic,
            on_policy.begin_again(env, actor, critic, state, axis_name=axis_name),
            steps=config.steps,
            discount=config.discount,
            lambda_=1.0,
            axis_name=axis_name,
        )
        counted = first_episodes(batch.done, whole=not config.baseline)
        state, row = on_policy.learn(
            optimizer,
            lambda trained: loss(config, actor, critic, trained, batch, counted, axis_name=axis_name),
            rolled,
            rate=on_policy.annealed(config.learning_rate, state.step, config.anneal),
            axis_name=axis_name,
        )
        return state, interact.episodes(batch, counted=counted, axis_name=axis_name) | row

    return Agent(init, step, on_policy.acting(actor), actor.memory, config.envs * config.steps)


def loss(
    config: ReinforceConfig,
    actor: Network,
    critic: Network,
    trained: dict[str, Any],
    batch: Batch,
    counted: jax.Array,
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-(G - b) log pi - entropy weight * entropy + value weight * baseline's loss, mean over the steps that count.

    Args:
      counted: bool [T, N].
      axis_name: a mapped axis over which the steps that count are averaged, so that the mean over devices of this loss
        is the loss of all of them together.
      The rest as `ppo.loss`.
    """
    policy, _ = actor.unroll(trained["actor"], batch.observation, batch.starts, batch.actor_memory)
    policy = on_policy.allowed(policy, batch.mask)
    value, _ = critic.unroll(trained["critic"], batch.observation, batch.starts, batch.critic_memory)

    def mean(values):
        total, weight = elements(values, counted)
        weight = weight if axis_name is None else jax.lax.pmean(weight, axis_name)
        return total / jnp.maximum(weight, 1.0)

    metrics = {
        "policy/loss": mean(reinforce(policy.log_prob(batch.action), batch.target, batch.value)),
        "policy/entropy": mean(policy.entropy()),
        "value/loss": mean(value_loss(value, batch.target)),
    }
    return (
        metrics["policy/loss"] - config.entropy * metrics["policy/entropy"] + config.value * metrics["value/loss"],
        metrics,
    )


def first_episodes(done: jax.Array, *, whole: bool) -> jax.Array:
    """Steps of the first episode of each environment, or only where it ended: bool [T, N] -> bool [T, N]."""
    first = jnp.cumsum(done, axis=0) - done == 0
    return first & done.any(axis=0)[None] if whole else first
