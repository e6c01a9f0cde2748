"""Trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477).

    agent = trpo.make(trpo.TRPOConfig(), envs.make("CartPole-v1"))

One step is a rollout, one natural-gradient step of the policy within KL(old || new) <= max_kl, and a few epochs of
regression for the critic.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxrl import returns
from jaxrl.agents import on_policy
from jaxrl.agents.agent import Agent
from jaxrl.agents.networks import Network, actor_and_critic
from jaxrl.agents.on_policy import State
from jaxrl.conjugate_gradient import conjugate_gradient
from jaxrl.envs.env import Env
from jaxrl.losses import ppo_clip, value_loss


@dataclasses.dataclass(frozen=True)
class TRPOConfig:
    """Trust region policy optimisation. The defaults suit CartPole."""

    envs: int = 8
    """Environments side by side."""
    steps: int = 128
    """Steps in each environment between updates."""
    max_kl: float = 0.01
    """The trust region: mean KL(old || new) of a step, nats."""
    cg_iterations: int = 10
    """Of conjugate gradients."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    backtracks: int = 10
    """Shorter and shorter steps that are tried; if none will do, the policy stays."""
    shrink: float = 0.8
    """Each is this times the one before."""
    discount: float = 0.99
    """Weight of the next step's value, gamma."""
    lambda_: float = 0.95
    """Of generalised advantage estimation."""
    value_rate: float = 1e-3
    """Learning rate of the critic's Adam."""
    value_epochs: int = 10
    """Times the critic goes through each rollout."""
    value_minibatches: int = 8
    """Gradient steps of the critic in an epoch; divides envs * steps (envs, with memory)."""
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


class Step(NamedTuple):
    """What a trust-region step did: `kl` and `gain` of the surrogate measured at the new parameters, `accepted`, and
    `backtracks`, int32."""

    kl: jax.Array
    gain: jax.Array
    accepted: jax.Array
    backtracks: jax.Array


def make(
    config: TRPOConfig,
    env: Env,
    *,
    actor: Network | None = None,
    critic: Network | None = None,
    axis_name: str | None = None,
) -> Agent:
    """TRPO on an environment; arguments and errors as `ppo.make`."""
    actor, critic = actor_and_critic(config, env, actor, critic)
    whole_streams = actor.recurrent or critic.recurrent
    columns = on_policy.columns(config, whole_streams, config.value_minibatches)
    optimizer = optax.scale_by_adam(eps=1e-5)

    def init(key: jax.Array) -> State:
        return on_policy.init(config, env, actor, critic, optimizer, key, only="critic")

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
        advantage = returns.whiten(batch.advantage, batch.done | True, axis_name=axis_name)

        def policy(theta):
            policy, _ = actor.unroll(theta, batch.observation, batch.starts, batch.actor_memory)
            return on_policy.allowed(policy, batch.mask)

        def surrogate(policy):
            losses, _ = ppo_clip(
                policy.log_prob(batch.action), batch.log_prob, advantage, clip_low=None, clip_high=None
            )
            return -losses.mean()

        theta, done = trust_region_step(
            policy,
            surrogate,
            state.params["actor"],
            max_kl=config.max_kl,
            cg_iterations=config.cg_iterations,
            damping=config.damping,
            backtracks=config.backtracks,
            shrink=config.shrink,
            axis_name=axis_name,
        )
        batch = batch if whole_streams else on_policy.single_steps(batch)
        flat, unflatten = ravel_pytree(state.params["critic"])

        def regress(carry, chosen):
            part = on_policy.take(batch, chosen)

            def loss(flat):
                value, _ = critic.unroll(unflatten(flat), part.observation, part.starts, part.critic_memory)
                mean = value_loss(value, part.target).mean()
                return mean, mean

            flat, optimizer_state, error = on_policy.descend(
                optimizer, loss, *carry, rate=config.value_rate, axis_name=axis_name
            )
            return (flat, optimizer_state), error

        orders = on_policy.shuffles(on_policy.draw_key(state, on_policy.LEARNING), columns, config.value_epochs)
        orders = orders.reshape(config.value_epochs * config.value_minibatches, -1)
        (flat, optimizer_state), errors = jax.lax.scan(regress, (flat, state.optimizer), orders)
        state = rolled._replace(
            step=state.step + 1,
            params=rolled.params | {"actor": theta, "critic": unflatten(flat)},
            optimizer=optimizer_state,
        )
        metrics |= {
            "policy/kl": done.kl,
            "policy/gain": done.gain,
            "policy/accepted": done.accepted.astype(jnp.float32),
            "policy/backtracks": done.backtracks.astype(jnp.float32),
            "policy/entropy": on_policy.mean_over(batch.policy.entropy(), axis_name),
            "value/loss": errors.mean(),
        }
        return state, metrics

    return Agent(init, step, on_policy.acting(actor), actor.memory, config.envs * config.steps)


def trust_region_step(
    policy: Callable,
    surrogate: Callable,
    theta: Any,
    *,
    max_kl: jax.Array | float,
    cg_iterations: int = 10,
    damping: jax.Array | float = 0.1,
    backtracks: int = 10,
    shrink: jax.Array | float = 0.8,
    weights: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[Any, Step]:
    """One step uphill within a trust region.

        g = grad surrogate,  D = F + damping I,  x = D^-1 g by conjugate gradients,  step = sqrt(2 max_kl / x^T D x) x

    then step, shrink step, shrink^2 step ... until KL(old || new) <= max_kl and the surrogate has grown. Without such a
    step, or where the gradient is zero, theta stays as it is.

    Args:
      policy: theta -> a distribution with batch axes [...].
      surrogate: distribution -> scalar to be increased.
      theta: a pytree of parameters.
      weights: [...] of the elements in the mean KL, summing to one; None: all equal.
      axis_name: a mapped axis over which surrogate, gradient and KL are averaged.
      The rest: see `TRPOConfig`.

    Returns:
      The new theta and a `Step`.
    """
    mean = lambda x: on_policy.mean_over(x if weights is None else weights * x, axis_name, total=weights is not None)
    objective = lambda theta: on_policy.mean_over(surrogate(policy(theta)), axis_name)
    flat, unflatten = ravel_pytree(theta)
    old, gradient = objective(theta), ravel_pytree(jax.grad(lambda t: surrogate(policy(t)))(theta))[0]
    gradient = gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)
    before = jax.lax.stop_gradient(policy(theta))
    fisher = fisher_product(lambda flat: policy(unflatten(flat)), flat, weights=weights, axis_name=axis_name)
    damped = lambda v: fisher(v) + damping * v
    direction = conjugate_gradient(damped, gradient, iterations=cg_iterations).x
    curvature = direction @ damped(direction)
    sound = curvature > 0.0  # not where the gradient is zero, or rounding has the better of it
    full = jnp.where(sound, jnp.sqrt(2.0 * max_kl / jnp.where(sound, curvature, 1.0)), 0.0) * direction

    def judge(i):
        new = flat + shrink**i * full
        return mean(before.kl(policy(unflatten(new)))), objective(unflatten(new)) - old

    def unfinished(carry):
        i, kl, gain = carry
        return (i < backtracks) & ~((kl <= max_kl) & (gain > 0.0))

    def shorter(carry):
        i = carry[0] + 1
        return i, *judge(i)

    i, kl, gain = jax.lax.while_loop(unfinished, shorter, (jnp.int32(0), *judge(jnp.int32(0))))
    accepted = sound & (kl <= max_kl) & (gain > 0.0)
    new = jnp.where(accepted, flat + shrink**i * full, flat)
    return unflatten(new), Step(jnp.where(accepted, kl, 0.0), jnp.where(accepted, gain, 0.0), accepted, i)


def fisher_product(
    policy: Callable, theta: jax.Array, *, weights: jax.Array | None = None, axis_name: str | None = None
) -> Callable:
    """v -> F v, the Fisher matrix at theta times a vector, in the Gauss-Newton form J^T H J v.

    J is the Jacobian of the distribution's parameters (logits, say), H the Hessian of mean KL(old || new) in them. At
    new = old this is the Hessian of the KL in theta, never has a negative eigenvalue, and costs one forward and one
    backward pass (Martens 2020, arXiv 1412.1193).

    Args:
      policy: theta -> a distribution with batch axes [...].
      theta: a vector, or any pytree.
      weights, axis_name: as `trust_region_step`.
    """
    old, push = jax.linearize(policy, theta)
    pull = jax.linear_transpose(push, theta)

    def kl(new):
        divergence = jax.lax.stop_gradient(old).kl(new)
        return divergence.mean() if weights is None else (weights * divergence).sum()

    def product(v):
        (image,) = pull(jax.jvp(jax.grad(kl), (old,), (push(v),))[1])
        return image if axis_name is None else jax.lax.pmean(image, axis_name)

    return product
