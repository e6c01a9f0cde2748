"""Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv 1509.02971), and all that TD3 adds to it.

    critics:  q_k(s, a) -> r + discount min_j q'_j(s', a'),     a' = mu'(s') + smoothing noise
    actor:    theta follows dq_1/da (s, mu(s)) dmu/dtheta

with q' and mu' slow copies. DDPG is one critic without smoothing noise, updated together with the actor; `td3` has
other values of `critics`, `actor_every` and `target_noise`. Deviations: the noise of exploration is Gaussian, not an
Ornstein-Uhlenbeck process, but may stay the same for some steps (`hold`), which serves the same end; the action enters
the critic's first layer; no batch normalisation, no weight decay. A truncated episode bootstraps.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import continuous, devices, replay
from jaxrl.agents.agent import Agent
from jaxrl.agents.replay import Batch, Learnt
from jaxrl.envs.env import Env
from jaxrl.losses import td
from jaxrl.losses.continuous import deterministic_policy_gradient, smallest


@dataclasses.dataclass(frozen=True)
class DDPGConfig:
    """Deep deterministic policy gradient. Noises are in units of half the range of actions."""

    envs: int = 1
    """Environments side by side."""
    steps: int = 1
    """Steps in each of them between two phases of learning."""
    updates: int = 1
    """Minibatch updates in a phase of learning."""
    batch: int = 100
    """Transitions in a minibatch."""
    rounds: int = 100
    """Rounds of acting and learning in one step of the agent."""
    capacity: int = 100_000
    """Transitions remembered."""
    warmup: int = 1_000
    """Environment steps at random before learning begins."""
    learning_rate: float = 1e-3
    """Adam's, of the critics."""
    actor_learning_rate: float = 1e-3
    """Adam's, of the actor."""
    discount: float = 0.99
    """Worth of a reward one step later."""
    n_step: int = 1
    """Rewards in a target before it bootstraps."""
    target_rate: float = 0.005
    """Fraction by which the slow copies move at each update."""
    noise: float = 0.1
    """Standard deviation of the exploring noise."""
    hold: int = 1
    """Steps of an environment through which the exploring noise, and a random action of the warm-up, stays the same."""
    critics: int = 1
    """Critics, of which the smallest value is the target."""
    actor_every: int = 1
    """Updates of the critics to one of the actor and of the slow copies."""
    target_noise: float = 0.0
    """Standard deviation of the noise that smooths the target's action."""
    target_noise_clip: float = 0.5
    """Largest size of that noise."""
    hidden: tuple[int, ...] = (64, 64)
    """Features of the hidden layers."""


def make(
    config: DDPGConfig,
    env: Env,
    *,
    memory: replay.Memory | None = None,
    constrain: Callable = lambda batch: batch,
    axis_name: str | None = None,
) -> Agent:
    """The agent; `memory` is uniform replay if not given, the others as in `replay.make`."""
    continuous.check("ddpg", env)
    critics = continuous.critics(env, count=config.critics, sizes=config.hidden)
    actor = continuous.deterministic_actor(env, sizes=config.hidden)
    optimizers = {
        "actor": optax.flatten(optax.adam(config.actor_learning_rate)),
        "critic": optax.flatten(optax.adam(config.learning_rate)),
    }
    optimizers = {part: devices.averaging(own, axis_name) for part, own in optimizers.items()}
    dim = env.action_space.shape[0]
    mu = lambda params, observation: actor.step(params, observation, ())[0]

    def init(key):
        actor_key, critic_key = jax.random.split(key)
        params = {"actor": actor.init(actor_key), "critic": critics.init(critic_key)}
        optimizer = {part: optimizers[part].init(params[part]) for part in params}
        return Learnt(params, jax.tree.map(jnp.copy, params), optimizer, jnp.int32(0))

    def act(params, observation, memory, key):
        return continuous.to_bounds(env.action_space, mu(params["actor"], observation)), memory

    def uniform(params, observation, key, env_steps):
        n = jax.tree.leaves(observation)[0].shape[0]
        draw = lambda n: jax.random.uniform(key, (n, dim), minval=-1.0, maxval=1.0)
        action = devices.rows(draw, n, axis_name)
        return continuous.to_bounds(env.action_space, action), action

    def explore(params, observation, key, env_steps):
        action = mu(params["actor"], observation)
        noise = devices.rows(lambda n: jax.random.normal(key, (n, dim)), action.shape[0], axis_name)
        action = jnp.clip(action + config.noise * noise, -1.0, 1.0)
        return continuous.to_bounds(env.action_space, action), action

    def noise(key):
        return jax.random.normal(key, (config.batch, dim))

    def update(learnt: Learnt, batch: Batch, noise: jax.Array):
        successor_action = smoothed(
            mu(learnt.target["actor"], batch.successor), noise, std=config.target_noise, clip=config.target_noise_clip
        )
        v_t = smallest(critics.apply(learnt.target["critic"], batch.successor, successor_action))

        def critic_loss(params):
            q = critics.apply(params, batch.observation, batch.action)
            errors = continuous.critics_errors(q, batch.reward, batch.discount, v_t)
            return jnp.mean(batch.weights * td.squared(errors).sum(axis=0)), (errors[0], q.mean())

        (loss, (errors, q)), gradient = jax.value_and_grad(critic_loss, has_aux=True)(learnt.params["critic"])
        learnt = replay.descend(learnt, "critic", gradient, optimizers["critic"])

        def follow(learnt: Learnt) -> Learnt:
            first = jax.tree.map(lambda x: x[:1], learnt.params["critic"])
            value = lambda action: critics.apply(first, batch.observation, action).sum()

            def actor_loss(params):
                action = mu(params, batch.observation)
                return jnp.mean(deterministic_policy_gradient(action, jax.grad(value)(jax.lax.stop_gradient(action))))

            learnt = replay.descend(learnt, "actor", jax.grad(actor_loss)(learnt.params["actor"]), optimizers["actor"])
            return learnt._replace(target=replay.polyak(learnt.target, learnt.params, config.target_rate))

        if config.actor_every == 1:
            learnt = follow(learnt)
        else:
            due = learnt.updates % config.actor_every == config.actor_every - 1
            learnt = jax.lax.cond(due, follow, lambda learnt: learnt, learnt)
        return learnt._replace(updates=learnt.updates + 1), errors, {"q/loss": loss, "q/mean": q}

    def learn(learnt, batch, noise, before, after):
        return replay.over_minibatches(update, learnt, batch, noise)

    learner = replay.Learner(init, explore, uniform, noise, learn, act, config.hold)
    memory = memory or replay.uniform(config.n_step)
    return replay.make(env, learner, config, memory, constrain=constrain, axis_name=axis_name)


def smoothed(action: jax.Array, noise: jax.Array, *, std: jax.Array | float, clip: jax.Array | float) -> jax.Array:
    """clip(action + clip(std noise, -clip, clip), -1, 1): target policy smoothing, [..., dim]."""
    return jnp.clip(action + jnp.clip(std * noise, -clip, clip), -1.0, 1.0)
