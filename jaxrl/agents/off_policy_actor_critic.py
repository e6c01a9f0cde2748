"""Off-policy actor-critic by importance weights (Degris et al. 2012, arXiv 1205.4839; Zhao, Mathematical Foundations of
RL, 10.3).

    rho = pi(a | s) / beta(a | s),     delta = r + discount v(s') - v(s)
    w     follows  rho delta dv/dw
    theta follows  rho delta dlog pi(a | s)/dtheta

Actions come from a behaviour beta, here the policy mixed with the uniform one or whatever is given. The weights correct
the choice of actions, not how often states are visited. `vtrace` bounds the weights and looks further than one step
(Espeholt et al. 2018, arXiv 1802.01561). With beta = pi this is A2C.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl import returns
from jaxrl.agents import devices, interact, networks
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network
from jaxrl.distributions import Categorical
from jaxrl.envs.env import Discrete, Env
from jaxrl.losses import policy_gradient, td
from jaxrl.losses.policy import importance_ratio


@dataclasses.dataclass(frozen=True)
class OffPolicyActorCriticConfig:
    """Off-policy actor-critic."""

    envs: int = 16
    """Environments side by side."""
    steps: int = 16
    """Steps in each environment between updates."""
    learning_rate: float = 2e-3
    """Of Adam."""
    discount: float = 0.99
    """Weight of the next step's value."""
    explore: float = 0.1
    """Share of uniformly random actions in the behaviour."""
    vtrace: bool = True
    """Bounded weights and longer returns (V-trace) instead of one-step errors times the weights."""
    lambda_: float = 0.95
    """Of V-trace: 0 looks one step ahead."""
    entropy: float = 0.01
    """Weight of the policy's entropy."""
    value: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm, actor's and critic's together."""
    hidden: tuple[int, ...] = (64, 64)
    """Layers of the actor and of the critic."""


class State(NamedTuple):
    """All there is of a run. `step`: int32, updates done. `key`: never changes. `params`: {"actor", "critic"}."""

    step: jax.Array
    key: jax.Array
    params: Any
    optimizer: Any
    interaction: interact.Interaction


class Batch(NamedTuple):
    """Steps of a behaviour, leaves [T, N, ...]. `mask`: actions allowed, or None. `log_prob`: under the behaviour."""

    observation: Any
    mask: jax.Array | None
    action: jax.Array
    log_prob: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    successor: Any


def make(
    config: OffPolicyActorCriticConfig,
    env: Env,
    *,
    behaviour: Callable | None = None,
    axis_name: str | None = None,
) -> Agent:
    """The agent.

    Args:
      config: its floats may be traced.
      env: one environment with its time limit; discrete actions.
      behaviour: `(policy, observation [N, ...]) -> Categorical`, never zero where the policy is not; None mixes the
        policy with the uniform one.
      axis_name: a mapped axis of devices, each with `config.envs` environments, that learn together.
    """
    if not isinstance(env.action_space, Discrete):
        raise ValueError(f"off_policy_actor_critic needs discrete actions, {env.name} has {env.action_space}")
    actor = networks.actor(env.observation_space, env.action_space, sizes=config.hidden)
    critic = networks.critic(env.observation_space, sizes=config.hidden)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.learning_rate, eps=1e-5))
    optimizer = devices.averaging(optimizer, axis_name)
    actions = env.action_space.n
    behaviour = behaviour or (lambda policy, observation: mixed(policy, config.explore))

    def init(key: jax.Array) -> State:
        actor_key, critic_key, env_key = (jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3))
        params = {"actor": actor.init(actor_key), "critic": critic.init(critic_key)}
        interaction = interact.begin(env, env_key, config.envs)
        return State(jnp.int32(0), key, params, optimizer.init(params), interaction)

    def policy_of(params, observation, mask=None) -> Categorical:
        policy = actor.step(params["actor"], observation, ())[0]
        return policy if mask is None else policy.masked(mask)

    def act(params, observation, memory, key=None, mask=None):
        policy = policy_of(params, observation, mask)
        return policy.mode() if key is None else jax.random.categorical(key, policy.logits), memory

    def step(state: State, data: Any = None) -> tuple[State, dict[str, jax.Array]]:
        noise_key, env_key = jax.random.split(jax.random.fold_in(state.key, state.step + 1))
        noise, to_key = interact.key_numbers(jax.random.split(noise_key, config.steps))
        env_keys = devices.rows(lambda n: jax.random.split(env_key, n), config.envs, axis_name)

        def behave(observation, mask, memory, noise):
            chosen = behaviour(policy_of(state.params, observation, mask), observation)
            drawn = devices.rows(lambda n: Categorical.noise(to_key(noise), (n, actions)), config.envs, axis_name)
            action = chosen.sample(drawn)
            return action, (), chosen.log_prob(action)

        interaction, seen = interact.collect(env, behave, state.interaction, env_keys, steps=config.steps, noise=noise)
        flags = seen.terminated, seen.truncated
        batch = Batch(seen.observation, seen.mask, seen.action, seen.extras, seen.reward, *flags, seen.successor)
        gradient, metrics = jax.grad(lambda params: loss(config, actor, critic, params, batch), has_aux=True)(
            state.params
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        row = devices.mean(metrics, axis_name) | interact.episodes(seen, axis_name=axis_name)
        return State(state.step + 1, state.key, params, optimizer_state, interaction), row

    return Agent(init, step, act, lambda: (), config.envs * config.steps)


def loss(
    config: OffPolicyActorCriticConfig,
    actor: Network,
    critic: Network,
    params: dict[str, Any],
    batch: Batch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Actor's and critic's loss, whose gradient is the two rules above, averaged; with metrics.

    Args:
      config: weights and switches.
      params: {"actor", "critic"}.
      batch: what the behaviour did.
    """
    policy = actor.step(params["actor"], batch.observation, ())[0]
    policy = policy if batch.mask is None else policy.masked(batch.mask)
    log_prob = policy.log_prob(batch.action)
    v_tm1 = critic.step(params["critic"], batch.observation, ())[0]
    v_t = jax.lax.stop_gradient(critic.step(params["critic"], batch.successor, ())[0])
    rho = jax.lax.stop_gradient(importance_ratio(log_prob - batch.log_prob))
    discount = config.discount * (1.0 - batch.terminated)
    if config.vtrace:
        lambda_ = config.lambda_ * (1.0 - batch.truncated)
        streams = (v_tm1, batch.reward, discount, v_t, rho, lambda_)
        estimate = lambda v, r, d, v_t, rho, lambda_: returns.vtrace(v, r, d, v_t, rho, lambda_=lambda_)
        errors, advantages, _ = jax.vmap(estimate, in_axes=1, out_axes=1)(*streams)
        errors = td.squared(errors)
    else:
        delta = td.td_learning(v_tm1, batch.reward, discount, v_t)
        errors, advantages = rho * td.squared(delta), rho * delta
    policy_loss, entropy, value_loss = (
        policy_gradient(log_prob, advantages).mean(),
        policy.entropy().mean(),
        errors.mean(),
    )
    metrics = {
        "policy/loss": policy_loss,
        "policy/entropy": entropy,
        "policy/ratio": rho.mean(),
        "value/loss": value_loss,
    }
    return policy_loss - config.entropy * entropy + config.value * value_loss, metrics


def mixed(policy: Categorical, share: jax.Array | float) -> Categorical:
    """(1 - share) policy + share uniform, over the actions that the policy allows."""
    log_probs = jax.nn.log_softmax(policy.logits)
    possible = policy.logits > -jnp.inf
    uniform = possible / possible.sum(axis=-1, keepdims=True)
    return Categorical(jnp.log((1.0 - share) * jnp.exp(log_probs) + share * uniform))
