"""The simplest actor-critic: action values learned by Sarsa weigh the policy gradient (Sutton et al. 2000).

    agent = qac.make(qac.QACConfig(), envs.make("CartPole-v1"))

        theta <- theta + rate q(s, a) grad log pi(a | s),     w <- w + rate [r + discount q(s', a') - q(s, a)] grad q

Actions must be discrete. a' is the action really taken next; where none is, after a truncation or the last step of a
rollout, one is drawn from the policy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import interact, on_policy
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network, action_values, actor_and_critic
from jaxrl.agents.on_policy import State
from jaxrl.envs.env import Env
from jaxrl.losses import policy_gradient, sarsa


@dataclasses.dataclass(frozen=True)
class QACConfig:
    """Actor-critic with action values. The defaults suit CartPole."""

    envs: int = 8
    """Environments side by side."""
    steps: int = 16
    """Steps in each environment between updates."""
    learning_rate: float = 1e-3
    """Of Adam."""
    anneal: int = 0
    """Updates over which the learning rate falls linearly to zero; 0: it stays."""
    discount: float = 0.99
    """Weight of the next step's value, gamma."""
    entropy: float = 0.01
    """Weight of the policy's entropy."""
    value: float = 0.5
    """Weight of the critic's loss."""
    baseline: bool = False
    """Subtract sum_a pi(a | s) q(s, a) from q(s, a) in the actor's step: no bias, less variance."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm, actor's and critic's together."""
    normalise_observations: bool = False
    """Standardise observations by running moments."""
    hidden: tuple[int, ...] = (64, 64)
    """Layers of the actor and of the critic."""

    normalise_rewards = False
    recurrent = 0
    log_std = 0.0


def make(
    config: QACConfig,
    env: Env,
    *,
    actor: Network | None = None,
    critic: Network | None = None,
    axis_name: str | None = None,
) -> Agent:
    """QAC on an environment.

    Args:
      config, env, axis_name: as `ppo.make`.
      actor, critic: networks in place of the config's, without memory; the critic's output is [..., A].

    Raises:
      ValueError: continuous actions, action masks, or networks with memory.
    """
    critic = critic or action_values(env.observation_space, env.action_space, sizes=config.hidden)
    actor, critic = actor_and_critic(config, env, actor, critic)
    if env.action_mask is not None or actor.recurrent or critic.recurrent:
        raise ValueError("QAC takes neither action masks nor networks with memory: use A2C or PPO")
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=1e-5))

    def init(key: jax.Array) -> State:
        return on_policy.init(config, env, actor, critic, optimizer, key)

    def step(state: State, data: Any = None) -> tuple[State, dict[str, jax.Array]]:
        rolled, trajectory, noise = on_policy.gather(env, actor, state, steps=config.steps, axis_name=axis_name)
        seen, successor = (on_policy.see(state.params, x) for x in (trajectory.observation, trajectory.successor))
        after, _ = actor.step(state.params["actor"], successor, ())
        drawn = after.sample(jnp.broadcast_to(noise, (config.steps, *noise.shape)))
        taken = jnp.concatenate([trajectory.action[1:], drawn[-1:]])
        a_t = jnp.where(trajectory.done, drawn, taken)
        q_t, _ = critic.step(state.params["critic"], successor, ())
        discount_t = config.discount * (1.0 - trajectory.terminated)

        def loss(trained):
            policy, _ = actor.step(trained["actor"], seen, ())
            q_tm1, _ = critic.step(trained["critic"], seen, ())
            errors = sarsa(q_tm1, trajectory.action, trajectory.reward, discount_t, q_t, a_t)
            weight = jnp.take_along_axis(q_tm1, trajectory.action[..., None], axis=-1)[..., 0]
            if config.baseline:
                weight = weight - jnp.sum(jax.nn.softmax(policy.logits) * q_tm1, axis=-1)
            metrics = on_policy.means(
                {
                    "policy/loss": policy_gradient(policy.log_prob(trajectory.action), weight),
                    "policy/entropy": policy.entropy(),
                    "value/loss": 0.5 * jnp.square(errors),
                    "q/mean": weight,
                }
            )
            total = metrics["policy/loss"] - config.entropy * metrics["policy/entropy"]
            return total + config.value * metrics["value/loss"], metrics

        observations = on_policy.watched(state.params, trajectory, axis_name=axis_name)
        rolled = rolled._replace(params=rolled.params | {"observations": observations})
        rate = on_policy.annealed(config.learning_rate, state.step, config.anneal)
        state, row = on_policy.learn(optimizer, loss, rolled, rate=rate, axis_name=axis_name)
        return state, interact.episodes(trajectory, axis_name=axis_name) | row

    return Agent(init, step, on_policy.acting(actor), actor.memory, config.envs * config.steps)
