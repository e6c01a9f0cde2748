"""Soft actor-critic with a learned temperature (Haarnoja et al. 2018, arXiv 1801.01290 and 1812.05905).

    v(s) = min_k q_k(s, a) - alpha log pi(a | s),     a drawn from pi(. | s)
    critics:      q_k(s, a) -> r + discount v'(s'),   v' with slow copies of the critics
    actor:        maximises v(s) by reparameterisation
    temperature:  alpha rises while the entropy is below its target

For discrete actions (Christodoulou 2019, arXiv 1910.07207) v(s) is an exact expectation. Deviations: the temperature is
the exponential of what is learnt; a truncated episode bootstraps. Log-probs are those of actions in [-1, 1]^dim, before
they are stretched to the environment's bounds.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import continuous, devices, networks, replay
from jaxrl.agents.agent import Agent
from jaxrl.agents.replay import Batch, Learnt
from jaxrl.distributions import Categorical, TanhGaussian
from jaxrl.envs.env import Discrete, Env
from jaxrl.losses import td
from jaxrl.losses.continuous import expected_soft_value, soft_value, temperature_loss
from jaxrl.nets import heads
from jaxrl.nets.mlp import MLP


@dataclasses.dataclass(frozen=True)
class SACConfig:
    """Soft actor-critic with a learned temperature."""

    envs: int = 1
    """Environments side by side."""
    steps: int = 1
    """Steps in each of them between two phases of learning."""
    updates: int = 1
    """Minibatch updates in a phase of learning."""
    batch: int = 256
    """Transitions in a minibatch."""
    rounds: int = 100
    """Rounds of acting and learning in one step of the agent."""
    capacity: int = 100_000
    """Transitions remembered."""
    warmup: int = 1_000
    """Environment steps at random before learning begins."""
    learning_rate: float = 1e-3
    """Adam's, of critics and temperature."""
    actor_learning_rate: float = 1e-3
    """Adam's, of the actor."""
    discount: float = 0.99
    """Worth of a reward one step later."""
    n_step: int = 1
    """Rewards in a target before it bootstraps."""
    target_rate: float = 0.005
    """Fraction by which the slow copies move at each update."""
    hold: int = 1
    """Steps of an environment through which the noise of a draw, and a random action of the warm-up, stays the same."""
    critics: int = 2
    """Critics, of which the smallest value is believed."""
    temperature: float = 1.0
    """Reward that a nat of entropy is worth in the beginning."""
    target_entropy: float | None = None
    """Entropy in nats below which the temperature rises; None: -dim, or 0.7 log A for A discrete actions."""
    hidden: tuple[int, ...] = (64, 64)
    """Features of the hidden layers."""


class Soft(NamedTuple):
    """What continuous and discrete actions do differently.

    `actor`: a `Network`. `init`: `(key) -> params` of the critics. `q`: `(params, observation, action) -> [K, B]`.
    `noise`: `(key) -> noise` of one `value`. `value`: `(critic params, distribution, observation, noise, temperature)
    -> (v [B], entropy [B])`, the entropy exact or estimated from the draw. `uniform`: `(key, n) -> action`, `numbers`:
    `(key, *n) -> noise` of n draws (of one, without n), `draw`: `(distribution, noise) -> action`, `mode`:
    `(distribution) -> action`, as they are remembered; `to_env`: from that to the environment's.
    """

    actor: networks.Network
    init: Callable
    q: Callable
    noise: Callable
    value: Callable
    uniform: Callable
    numbers: Callable
    draw: Callable
    mode: Callable
    to_env: Callable
    target_entropy: float


def make(
    config: SACConfig, env: Env, *, constrain: Callable = lambda batch: batch, axis_name: str | None = None
) -> Agent:
    """The agent; `constrain` and `axis_name` as in `replay.make`."""
    soft = discrete(config, env) if isinstance(env.action_space, Discrete) else gaussian(config, env)
    target_entropy = soft.target_entropy if config.target_entropy is None else config.target_entropy
    optimizers = {
        "actor": optax.flatten(optax.adam(config.actor_learning_rate)),
        "critic": optax.flatten(optax.adam(config.learning_rate)),
        "log_temperature": optax.adam(config.learning_rate),
    }
    optimizers = {part: devices.averaging(own, axis_name) for part, own in optimizers.items()}
    policy = lambda params, observation: soft.actor.step(params, observation, ())[0]

    def init(key):
        actor_key, critic_key = jax.random.split(key)
        log_temperature = jnp.log(jnp.asarray(config.temperature, jnp.float32))
        params = {
            "actor": soft.actor.init(actor_key),
            "critic": soft.init(critic_key),
            "log_temperature": log_temperature,
        }
        optimizer = {part: optimizers[part].init(params[part]) for part in params}
        return Learnt(params, jax.tree.map(jnp.copy, params["critic"]), optimizer, jnp.int32(0))

    def act(params, observation, memory, key):
        distribution = policy(params["actor"], observation)
        action = soft.mode(distribution) if key is None else soft.draw(distribution, soft.numbers(key))
        return soft.to_env(action), memory

    def uniform(params, observation, key, env_steps):
        n = jax.tree.leaves(observation)[0].shape[0]
        action = devices.rows(lambda n: soft.uniform(key, n), n, axis_name)
        return soft.to_env(action), action

    def explore(params, observation, key, env_steps):
        n = jax.tree.leaves(observation)[0].shape[0]
        noise = devices.rows(lambda n: soft.numbers(key, n), n, axis_name)
        action = soft.draw(policy(params["actor"], observation), noise)
        return soft.to_env(action), action

    def noise(key):
        successor_key, actor_key = jax.random.split(key)
        return soft.noise(successor_key), soft.noise(actor_key)

    def update(learnt: Learnt, batch: Batch, noise: Any):
        successor_noise, actor_noise = noise
        temperature = jnp.exp(learnt.params["log_temperature"])
        then = policy(learnt.params["actor"], batch.successor)
        v_t, _ = soft.value(learnt.target, then, batch.successor, successor_noise, temperature)

        def critic_loss(params):
            q = soft.q(params, batch.observation, batch.action)
            errors = continuous.critics_errors(q, batch.reward, batch.discount, v_t)
            return jnp.mean(batch.weights * td.squared(errors).sum(axis=0)), (errors[0], q.mean())

        (loss, (errors, q)), gradient = jax.value_and_grad(critic_loss, has_aux=True)(learnt.params["critic"])
        learnt = replay.descend(learnt, "critic", gradient, optimizers["critic"])

        def actor_loss(params):
            now = policy(params, batch.observation)
            value, entropy = soft.value(learnt.params["critic"], now, batch.observation, actor_noise, temperature)
            return -value.mean(), entropy.mean()

        gradient, entropy = jax.grad(actor_loss, has_aux=True)(learnt.params["actor"])
        learnt = replay.descend(learnt, "actor", gradient, optimizers["actor"])
        gradient = jax.grad(temperature_loss)(learnt.params["log_temperature"], entropy, target_entropy)
        learnt = replay.descend(learnt, "log_temperature", gradient, optimizers["log_temperature"])
        target = replay.polyak(learnt.target, learnt.params["critic"], config.target_rate)
        metrics = {"q/loss": loss, "q/mean": q, "policy/entropy": entropy, "policy/temperature": temperature}
        return learnt._replace(target=target, updates=learnt.updates + 1), errors, metrics

    def learn(learnt, batch, noise, before, after):
        return replay.over_minibatches(update, learnt, batch, noise)

    learner = replay.Learner(init, explore, uniform, noise, learn, act, config.hold)
    memory = replay.uniform(config.n_step)
    return replay.make(env, learner, config, memory, constrain=constrain, axis_name=axis_name)


def gaussian(config: SACConfig, env: Env) -> Soft:
    """Continuous actions: tanh of a Gaussian, one draw for each expectation."""
    continuous.check("sac", env)
    dim = env.action_space.shape[0]
    head = heads.Gaussian(dim, state_dependent=True, bounds=(-5.0, 2.0))
    output = lambda parameters: TanhGaussian(*parameters)
    critics = continuous.critics(env, count=config.critics, sizes=config.hidden)

    def value(params, distribution, observation, noise, temperature):
        u = distribution.sample(noise)
        log_prob = distribution.log_prob(u)
        q = critics.apply(params, observation, distribution.squash(u))
        return soft_value(q, log_prob, temperature), -log_prob

    return Soft(
        actor=networks.network(MLP(config.hidden, nn.relu), head, env.observation_space, output=output),
        init=critics.init,
        q=critics.apply,
        noise=lambda key: TanhGaussian.noise(key, (config.batch, dim)),
        value=value,
        uniform=lambda key, n: jax.random.uniform(key, (n, dim), minval=-1.0, maxval=1.0),
        numbers=lambda key, *n: TanhGaussian.noise(key, (*n, dim)),
        draw=lambda policy, noise: policy.squash(policy.sample(noise)),
        mode=lambda policy: policy.squash(policy.mode()),
        to_env=lambda action: continuous.to_bounds(env.action_space, action),
        target_entropy=-float(dim),
    )


def discrete(config: SACConfig, env: Env) -> Soft:
    """Discrete actions: a softmax, expectations exact."""
    assert isinstance(env.action_space, Discrete)
    actions = env.action_space.n
    spaces = env.observation_space, env.action_space
    critic = networks.action_values(*spaces, sizes=config.hidden, activation=nn.relu)
    values = jax.vmap(lambda params, observation: critic.step(params, observation, ())[0], in_axes=(0, None))

    def q(params, observation, action):
        q = values(params, observation)
        return jnp.take_along_axis(q, jnp.broadcast_to(action, q.shape[:-1])[..., None], axis=-1)[..., 0]

    def value(params, distribution, observation, noise, temperature):
        q = values(params, observation)
        return expected_soft_value(q, jax.nn.log_softmax(distribution.logits), temperature), distribution.entropy()

    return Soft(
        actor=networks.actor(*spaces, sizes=config.hidden, activation=nn.relu),
        init=lambda key: jax.vmap(critic.init)(jax.random.split(key, config.critics)),
        q=q,
        noise=lambda key: (),
        value=value,
        uniform=lambda key, n: jax.random.randint(key, (n,), 0, actions),
        numbers=lambda key, *n: Categorical.noise(key, (*n, actions)),
        draw=lambda policy, noise: policy.sample(noise),
        mode=lambda policy: policy.mode(),
        to_env=lambda action: action,
        target_entropy=0.7 * math.log(actions),
    )
