"""The parts that agents with replay share, against loops and the returns of `jaxrl.returns`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import returns
from jaxrl.agents import ddpg, dqn, replay
from jaxrl.agents.replay import Transition
from jaxrl.envs import make as make_env

RNG = np.random.default_rng(0)
COLLAPSE = jax.jit(jax.vmap(lambda sequence: replay.n_step_transition(sequence, discount=0.9)))


def stream(length, terminated=(), truncated=()):
    flags = lambda steps: np.isin(np.arange(length), steps)
    numbers = jnp.arange(length, dtype=jnp.float32)
    reward = jnp.float32(RNG.normal(size=length))
    return Transition(numbers, numbers, reward, flags(terminated), flags(truncated), numbers + 100)


def windows(stream, n):
    starts = np.arange(stream.reward.shape[0] - n + 1)
    return jax.tree.map(lambda x: jnp.asarray(x)[starts[:, None] + np.arange(n)[None]], stream)


@pytest.mark.parametrize("n", [1, 3])
def test_n_step_is_that_of_the_returns(n):
    one = stream(12, terminated=[4, 9])
    observation, action, reward, discount, successor = COLLAPSE(windows(one, n))
    values = jnp.float32(RNG.normal(size=12))
    expected = returns.n_step_returns(one.reward, 0.9 * (1.0 - one.terminated), values, n=n)
    np.testing.assert_allclose(
        reward + discount * values[successor.astype(int) - 100], expected[: 12 - n + 1], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(observation, np.arange(12 - n + 1))
    np.testing.assert_array_equal(action, observation)


def test_n_step_stops_at_truncation_and_bootstraps_there():
    one = stream(6, terminated=[1], truncated=[1, 4])
    r = np.asarray(one.reward)
    _, _, reward, discount, successor = COLLAPSE(windows(one, 3))
    np.testing.assert_allclose(reward[0], r[0] + 0.9 * r[1], rtol=1e-6)  # both flags: termination wins
    assert discount[0] == 0
    np.testing.assert_allclose(reward[3], r[3] + 0.9 * r[4], rtol=1e-6)
    np.testing.assert_allclose(discount[3], 0.9**2, rtol=1e-6)
    assert successor[3] == 104
    np.testing.assert_allclose(reward[2], r[2] + 0.9 * r[3] + 0.81 * r[4], rtol=1e-6)
    np.testing.assert_allclose(discount[2], 0.9**3, rtol=1e-6)


def test_crossings_count_every_multiple():
    """However rounds and multiples fall: the sum is the number of multiples passed."""
    for every, per_round in ((7, 10), (10, 10), (500, 30), (3, 10), (1000, 7)):
        before = jnp.arange(200) * per_round
        counts = replay.crossings(before, before + per_round, every)
        assert int(counts.sum()) == 200 * per_round // every
        for b, c in zip(np.asarray(before), np.asarray(counts), strict=True):
            assert c == sum(1 for step in range(b + 1, b + per_round + 1) if step % every == 0)


def test_polyak():
    target, params = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    np.testing.assert_allclose(replay.polyak(target, params, 0.25)["w"], 0.75 * target["w"] + 0.25 * params["w"])
    np.testing.assert_array_equal(replay.polyak(target, params, 0.0)["w"], target["w"])
    np.testing.assert_array_equal(replay.polyak(target, params, 1.0)["w"], params["w"])


def test_the_latest_is_each_transition_once():
    memory = replay.latest()
    one = jax.tree.map(lambda x: jnp.asarray(x)[0], stream(1))
    buffer = memory.init(one, 2, 3)
    items = jax.tree.map(lambda x: jnp.asarray(x).reshape(2, 3), stream(6))
    drawn, weights, _ = memory.draw(memory.extend(buffer, items), jax.random.key(0), 6)
    np.testing.assert_array_equal(drawn.observation, np.arange(6.0)[:, None])
    np.testing.assert_array_equal(weights, np.ones(6))


def test_refuses_sizes_that_do_not_fit():
    env = make_env("CartPole-v1")
    with pytest.raises(ValueError, match="capacity is 10"):
        dqn.make(dqn.DQNConfig(envs=20, capacity=10), env)
    with pytest.raises(ValueError, match="updates is 0"):
        dqn.make(dqn.DQNConfig(updates=0), env)
    with pytest.raises(ValueError, match="warmup is 5"):
        dqn.make(dqn.DQNConfig(warmup=5), env)
    with pytest.raises(ValueError, match="action masks"):
        dqn.make(dqn.DQNConfig(), env._replace(action_mask=lambda state: jnp.ones(2, bool)))


def test_noise_is_held_for_so_many_steps():
    """Random actions of the warm-up change at every third step of an environment, and not in between."""
    config = ddpg.DDPGConfig(envs=2, batch=2, rounds=7, capacity=40, warmup=40, hold=3, hidden=(4,))
    agent = ddpg.make(config, make_env("Pendulum-v1"))
    state = jax.jit(lambda key: agent.step(agent.init(key))[0])(jax.random.key(0))
    actions = np.asarray(state.buffer.items.action)[:7, :, 0]
    changes = (actions[1:] != actions[:-1]).all(axis=1)
    np.testing.assert_array_equal(changes, [False, False, True, False, False, True])
    assert (actions[:, 0] != actions[:, 1]).all()
