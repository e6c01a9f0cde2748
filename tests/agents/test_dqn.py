"""DQN's targets against loops in numpy, its exploration, its networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents import dqn, networks, replay
from jaxrl.envs import make as make_env

RNG = np.random.default_rng(0)
ENV = make_env("CartPole-v1")


def test_targets_against_a_loop():
    """Terminated, truncated (bootstraps from the successor), and both at once (termination wins)."""
    rows = 6
    terminated = np.array([0, 1, 0, 1, 0, 0], bool)
    truncated = np.array([0, 0, 1, 1, 0, 1], bool)
    q, q_value, q_selector = (jnp.float32(RNG.normal(size=(rows, 3))) for _ in range(3))
    action, reward = RNG.integers(3, size=rows), jnp.float32(RNG.normal(size=rows))
    sequences = replay.Transition(
        jnp.zeros((rows, 1)),
        action[:, None],
        reward[:, None],
        terminated[:, None],
        truncated[:, None],
        jnp.zeros((rows, 1)),
    )
    batch = replay.Batch(
        *jax.vmap(lambda s: replay.n_step_transition(s, discount=0.9))(sequences), weights=jnp.ones(rows)
    )
    for selector in (q_selector, q_value):
        expected = [
            reward[i] + (0 if terminated[i] else 0.9 * q_value[i, np.argmax(selector[i])]) - q[i, action[i]]
            for i in range(rows)
        ]
        np.testing.assert_allclose(dqn.td_errors(q, batch, q_value, selector), expected, rtol=1e-5, atol=1e-6)
    assert (np.argmax(q_selector, 1) != np.argmax(q_value, 1)).any()


def test_epsilon_falls_and_rests():
    config = dqn.DQNConfig(epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100)
    np.testing.assert_allclose([dqn.epsilon(config, n) for n in (0, 50, 100, 1000)], [0.9, 0.5, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("anneal", [0, 2])
def test_learning_rate_falls_to_zero(anneal):
    """Over two steps of the agent: the third changes nothing. With 0 it stays."""
    config = dqn.DQNConfig(envs=2, rounds=3, batch=4, capacity=64, warmup=2, hidden=(4,), anneal=anneal)
    agent = dqn.make(config, ENV)
    step, states = jax.jit(agent.step), [jax.jit(agent.init)(jax.random.key(0))]
    for _ in range(3):
        states.append(step(states[-1])[0])
    sizes = [
        sum(float(jnp.abs(x - y).sum()) for x, y in zip(*map(jax.tree.leaves, (a.params, b.params)), strict=True))
        for a, b in zip(states[:-1], states[1:], strict=True)
    ]
    assert sizes[0] > 0 and sizes[1] > 0 and (sizes[2] == 0) == bool(anneal)


def test_dueling():
    """The mean over actions is the value; shifting all advantages changes nothing."""
    head = dqn.Dueling(3)
    x = jnp.float32(RNG.normal(size=(4, 5)))
    params = head.init(jax.random.key(0), x)
    kernel, bias = params["params"]["streams"]["kernel"], params["params"]["streams"]["bias"]
    assert kernel.shape == (5, 4)
    streams = np.asarray(x) @ np.asarray(kernel) + np.asarray(bias)
    q = head.apply(params, x)
    np.testing.assert_allclose(q, streams[:, :1] + streams[:, 1:] - streams[:, 1:].mean(1, keepdims=True), atol=1e-5)
    shifted = {"params": {"streams": {"kernel": kernel, "bias": bias.at[1:].add(7.0)}}}
    np.testing.assert_allclose(head.apply(shifted, x), q, atol=1e-5)


def test_target_follows_every_so_many_environment_steps():
    """3 environments and a target every 7 steps: it moves in the rounds in which a multiple of 7 falls."""
    config = dqn.DQNConfig(envs=3, updates=1, batch=4, rounds=1, capacity=60, warmup=3, target_every=7, hidden=(4,))
    agent = dqn.make(config, ENV)
    step = jax.jit(agent.step)
    state = jax.jit(agent.init)(jax.random.key(0))
    for round_ in range(1, 13):
        before, (state, _) = state.learnt.target, step(state)
        moved = any(
            not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (before, state.learnt.target)), strict=True)
        )
        assert moved == (round_ * 3 // 7 != (round_ - 1) * 3 // 7)
        if moved:
            for x, y in zip(*map(jax.tree.leaves, (state.params, state.learnt.target)), strict=True):
                np.testing.assert_array_equal(x, y)
    assert int(state.buffer.size) == 12


def test_a_network_of_ones_own():
    network = networks.action_values(ENV.observation_space, ENV.action_space, sizes=(3,))
    agent = dqn.make(dqn.DQNConfig(rounds=1, batch=2, warmup=10), ENV, network=network)
    state = agent.init(jax.random.key(0))
    assert jax.tree.structure(state.params) == jax.tree.structure(network.init(jax.random.key(0)))


def test_refuses_continuous_actions():
    with pytest.raises(ValueError, match="dqn needs discrete actions"):
        dqn.make(dqn.DQNConfig(), make_env("Pendulum-v1"))
