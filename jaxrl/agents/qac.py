"""The simplest actor-critic: action values learned by Sarsa weigh the policy gradient (Sutton et al. 2000).

    agent = qac.make(qac.QACConfig(), envs.make("CartPole-v1"))

        theta <- theta + rate_theta q(s, a) grad log pi(a | s)
        w     <- w + rate_w [r + discount q(s', a') - q(s, a)] grad q(s, a)

with Adam in place of plain gradients. Two step sizes, because the critic must keep up with the policy it judges.
Actions must be discrete. a' is the action really taken next; where none is, after a truncation or the last step of a
rollout, one is drawn from the policy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import interact, networks, on_policy
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network
from jaxrl.agents.on_policy import State
from jaxrl.envs.env import Env
from jaxrl.losses import policy_gradient, sarsa, td


@dataclasses.dataclass(frozen=True)
class QACConfig:
    """Actor-critic with action values. The defaults suit CartPole."""

    envs: int = 8
    """Environments side by side."""
    steps: int = 16
    """Steps in each environment between updates."""
    learning_rate: float = 2e-4
    """Adam's, of the actor."""
    critic_learning_rate: float = 3e-3
    """Adam's, of the critic."""
    anneal: int = 0
    """Updates over which both learning rates fall linearly to zero; 0: they stay; -1: all updates of a run."""
    discount: float = 0.99
    """Weight of the next step's value, gamma."""
    entropy: float = 0.1
    """Weight of the policy's entropy."""
    baseline: bool = False
    """Subtract sum_a pi(a | s) q(s, a) from q(s, a) in the actor's step: no bias, less variance."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm, those of actor and critic each by themselves."""
    normalise_observations: bool = False
    """Standardise observations by running moments."""
    normalise_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden: tuple[int, ...] = (64, 64)
    """Layers of the actor and of the critic."""


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
    critic = critic or networks.action_values(env.observation_space, env.action_space, sizes=config.hidden)
    actor = actor or networks.actor(env.observation_space, env.action_space, sizes=config.hidden)
    if env.action_mask is not None or actor.recurrent or critic.recurrent:
        raise ValueError("QAC takes neither action masks nor networks with memory: use A2C or PPO")
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=1e-5))

    def init(key: jax.Array) -> State:
        state = on_policy.init(config, env, actor, critic, optimizer, key)
        return state._replace(
            optimizer={part: optimizer.init(p) for part, p in on_policy.trained(state.params).items()}
        )

    def step(state: State, data: Any = None) -> tuple[State, dict[str, jax.Array]]:
        params = state.params
        rolled, trajectory, noise = on_policy.gather(env, actor, state, steps=config.steps, axis_name=axis_name)
        scale, rewards = on_policy.scaled(state, trajectory, discount=config.discount, axis_name=axis_name)
        seen, successor = (on_policy.see(params, x) for x in (trajectory.observation, trajectory.successor))
        after, _ = actor.step(params["actor"], successor, ())
        drawn = after.sample(jnp.broadcast_to(noise, (config.steps, *noise.shape)))
        taken = jnp.concatenate([trajectory.action[1:], drawn[-1:]])
        a_t = jnp.where(trajectory.done, drawn, taken)
        q_tm1, q_t = (critic.step(params["critic"], x, ())[0] for x in (seen, successor))
        discount_t = config.discount * (1.0 - trajectory.terminated)
        weight = jnp.take_along_axis(q_tm1, trajectory.action[..., None], axis=-1)[..., 0]
        if config.baseline:
            weight = weight - jnp.sum(jax.nn.softmax(trajectory.extras.logits) * q_tm1, axis=-1)

        def actor_loss(params):
            policy, _ = actor.step(params, seen, ())
            metrics = on_policy.means(
                {
                    "policy/loss": policy_gradient(policy.log_prob(trajectory.action), weight),
                    "policy/entropy": policy.entropy(),
                }
            )
            return metrics["policy/loss"] - config.entropy * metrics["policy/entropy"], metrics

        def critic_loss(params):
            q, _ = critic.step(params, seen, ())
            errors = sarsa(q, trajectory.action, rewards, discount_t, q_t, a_t)
            loss = jnp.mean(td.squared(errors))
            return loss, {"value/loss": loss, "q/mean": q.mean()}

        parts = {
            "actor": (actor_loss, config.learning_rate),
            "critic": (critic_loss, config.critic_learning_rate),
        }
        moved, optimizers, row = {}, {}, {}
        for part, (loss, rate) in parts.items():
            rate = on_policy.annealed(rate, state.step, config.anneal)
            moved[part], optimizers[part], metrics = on_policy.descend(
                optimizer, loss, params[part], state.optimizer[part], rate=rate, axis_name=axis_name
            )
            row |= metrics
        observations = on_policy.watched(params, trajectory, axis_name=axis_name)
        rolled = rolled._replace(
            step=state.step + 1,
            params=moved | {"observations": observations},
            optimizer=optimizers,
            rewards=scale,
        )
        return rolled, interact.episodes(trajectory, axis_name=axis_name) | row

    return Agent(init, step, on_policy.acting(actor), actor.memory, config.envs * config.steps)
