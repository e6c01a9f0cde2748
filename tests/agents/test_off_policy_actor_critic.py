"""Importance weights: exact expectations over enumerated actions, A2C's gradient where behaviour and policy agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import returns
from jaxrl.agents import networks
from jaxrl.agents import off_policy_actor_critic as opac
from jaxrl.distributions import Categorical
from jaxrl.envs import make as make_env
from jaxrl.envs import probes
from jaxrl.losses import policy_gradient, value_loss

RNG = np.random.default_rng(0)
ENV = make_env("CartPole-v1")
CONFIG = opac.OffPolicyActorCriticConfig(hidden=(4,), vtrace=False, discount=0.9)
ACTOR = networks.actor(ENV.observation_space, ENV.action_space, sizes=(4,))
CRITIC = networks.critic(ENV.observation_space, sizes=(4,))
T, N = 5, 2


def parameters():
    return {"actor": ACTOR.init(jax.random.key(0)), "critic": CRITIC.init(jax.random.key(1))}


def batch_of(params, log_prob=None):
    observation, successor = (jnp.float32(RNG.normal(size=(T, N, 4))) for _ in range(2))
    action = jnp.asarray(RNG.integers(2, size=(T, N)))
    terminated = jnp.asarray(RNG.random((T, N)) < 0.3)
    truncated = jnp.asarray(RNG.random((T, N)) < 0.3)
    own = ACTOR.step(params["actor"], observation, ())[0].log_prob(action)
    reward = jnp.float32(RNG.normal(size=(T, N)))
    log_prob = own if log_prob is None else log_prob
    return opac.Batch(observation, None, action, log_prob, reward, terminated, truncated, successor)


@functools.partial(jax.jit, static_argnums=0)
def gradient(config, params, batch):
    return jax.grad(lambda p: opac.loss(config, ACTOR, CRITIC, p, batch)[0])(params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def a2c(config, params, batch, lambda_):
    """The gradient of advantage actor-critic, with the estimates of `returns.gae`."""

    def loss(p):
        policy = ACTOR.step(p["actor"], batch.observation, ())[0]
        v_tm1, v_t = (CRITIC.step(p["critic"], o, ())[0] for o in (batch.observation, batch.successor))
        streams = (v_tm1, batch.reward, v_t, batch.terminated, batch.truncated)
        gae = lambda *s: returns.gae(*s, discount=config.discount, lambda_=lambda_)
        estimates = jax.lax.stop_gradient(jax.vmap(gae, in_axes=1, out_axes=1)(*streams))
        actor = policy_gradient(policy.log_prob(batch.action), estimates.advantages).mean()
        critic = value_loss(v_tm1, estimates.targets).mean()
        return actor - config.entropy * policy.entropy().mean() + config.value * critic

    return jax.grad(loss)(params)


def assert_trees_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_on_policy_it_is_a2c():
    params = parameters()
    batch = batch_of(params)
    expected = a2c(CONFIG, params, batch, 0.0)
    assert_trees_close(gradient(CONFIG, params, batch), expected)
    vtrace = dataclasses.replace(CONFIG, vtrace=True, lambda_=0.0)
    assert_trees_close(gradient(vtrace, params, batch), expected)


def test_weights_scale_each_step():
    """Halving beta(a | s) of one step doubles its part in the gradient, and nothing else."""
    config = dataclasses.replace(CONFIG, entropy=0.0)
    params = parameters()
    batch = batch_of(params)
    base = gradient(config, params, batch)
    halved = gradient(config, params, batch._replace(log_prob=batch.log_prob.at[2, 1].add(-jnp.log(2.0))))
    one = jax.tree.map(lambda x: x[2:3, 1:2], batch)
    part = jax.tree.map(lambda g: g / (T * N), gradient(config, params, one))
    assert_trees_close(jax.tree.map(jnp.subtract, halved, base), part)


def test_expectation_under_the_behaviour_is_that_under_the_policy():
    """All actions of a state enumerated: sum_a beta(a) rho(a) delta(a) dlog pi(a) = sum_a pi(a) delta(a) dlog pi(a)."""
    config = dataclasses.replace(CONFIG, entropy=0.0)
    params = parameters()
    params["actor"] = jax.tree.map(lambda x: 20 * x, params["actor"])  # far from uniform
    observation = jnp.float32(RNG.normal(size=4))
    policy = ACTOR.step(params["actor"], observation, ())[0]
    behaviour = opac.mixed(policy, 0.6)
    both = jnp.arange(2)
    flags = jnp.zeros((1, 2), bool)
    rows = lambda x: jnp.broadcast_to(x, (1, 2, 4))
    batch = opac.Batch(
        rows(observation),
        None,
        both[None],
        behaviour.logits[None],
        jnp.array([[1.0, -2.0]]),
        flags,
        flags,
        rows(observation + 1),
    )

    def expectation(weights, batch):
        parts = [jax.tree.map(lambda x, i=i: x[:, i : i + 1], batch) for i in range(2)]
        grads = [gradient(config, params, part) for part in parts]
        return jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *grads)

    under_behaviour = expectation(jnp.exp(batch.log_prob[0]), batch)
    own = jnp.log(jax.nn.softmax(policy.logits))
    under_policy = expectation(jnp.exp(own), batch._replace(log_prob=own[None]))
    assert_trees_close(under_behaviour, under_policy)
    assert float(jnp.abs(behaviour.logits - own).max()) > 0.05


def test_mixed():
    policy = Categorical(jnp.array([1.0, 2.0, -jnp.inf]))
    p = np.exp(opac.mixed(policy, 0.4).logits)
    np.testing.assert_allclose(
        p, 0.6 * np.asarray(jax.nn.softmax(policy.logits)) + 0.4 * np.array([0.5, 0.5, 0]), rtol=1e-5
    )
    np.testing.assert_allclose(opac.mixed(policy, 0.0).logits[:2], jax.nn.log_softmax(policy.logits)[:2], rtol=1e-5)


@pytest.mark.parametrize("vtrace", [False, True])
def test_learns_from_a_uniform_behaviour(vtrace):
    known = probes.delay()
    config = opac.OffPolicyActorCriticConfig(
        envs=8, steps=8, hidden=(16,), learning_rate=1e-2, discount=0.8, entropy=0.0, vtrace=vtrace
    )
    uniform = lambda policy, observation: Categorical(jnp.zeros_like(policy.logits))
    agent = opac.make(config, known.env, behaviour=uniform)
    state, _ = jax.jit(lambda key: jax.lax.scan(agent.step, agent.init(key), length=300))(jax.random.key(0))
    assert int(agent.act(state.params, jnp.zeros(1), (), None)[0]) == 1
    critic = networks.critic(known.env.observation_space, sizes=(16,))
    values = critic.step(state.params["critic"], jnp.asarray(known.observations), ())[0]
    np.testing.assert_allclose(values, known.values(0.8), atol=0.25)


def test_refuses_continuous_actions():
    with pytest.raises(ValueError, match="needs discrete actions"):
        opac.make(CONFIG, make_env("Pendulum-v1"))
