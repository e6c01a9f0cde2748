"""Collection and evaluation on an environment whose every number is known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents.agent import Agent
from jaxrl.agents.evaluate import evaluate
from jaxrl.agents.interact import begin, collect, episodes, pack, where
from jaxrl.envs.env import Box, Env, TimeStep

T, N = 12, 3


class State(NamedTuple):
    count: jax.Array
    tag: jax.Array


def counting() -> Env:
    """Observes (count, tag); the tag is drawn at reset; an action above 1 ends the episode, five steps cut it."""

    def observe(state):
        return jnp.stack([state.count.astype(jnp.float32), state.tag])

    def reset(key):
        state = State(jnp.int32(0), jax.random.uniform(key))
        return state, observe(state)

    def step(key, state, action):
        after = state._replace(count=state.count + 1)
        terminated, truncated = action[0] >= 1.0, after.count >= 5
        return after, TimeStep(observe(after), action[0], terminated, truncated, observe(after))

    return Env("Counting", reset, step, Box(0.0, 1.0, (2,)), Box(-1.0, 1.0, (1,)))


def act(observation, mask, memory, noise):
    return noise, memory + 1, {"seen": memory}


def collected():
    env = counting()
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(T, N, 1)), jnp.float32)
    start = begin(env, jax.random.key(0), N, memory=jnp.int32(0))
    after, trajectory = jax.jit(
        lambda start, key: collect(env, act, start, key, steps=T, noise=noise, memory=jnp.int32(0))
    )(start, jax.random.key(1))
    return start, after, jax.tree.map(np.asarray, trajectory), np.asarray(noise)


def test_a_trajectory_is_what_a_loop_would_give():
    start, after, trajectory, noise = collected()
    np.testing.assert_array_equal(trajectory.action, noise)
    for n in range(N):
        count, tag, total = 0, float(start.observation[n, 1]), 0.0
        for t in range(T):
            observation = trajectory.observation[t, n]
            assert observation[0] == count
            if count:
                assert observation[1] == np.float32(tag)
            tag, count = observation[1], count + 1
            np.testing.assert_array_equal(trajectory.successor[t, n], [count, tag])
            reward = np.clip(noise[t, n, 0], -1.0, 1.0)  # the environment gets the action within its bounds
            assert trajectory.reward[t, n] == reward
            assert trajectory.terminated[t, n] == (noise[t, n, 0] >= 1.0)
            assert trajectory.truncated[t, n] == (count == 5)
            assert trajectory.extras["seen"][t, n] == count - 1  # the memory begins anew with the episode
            total += reward
            np.testing.assert_allclose(trajectory.episode_return[t, n], total, rtol=1e-6)
            assert trajectory.episode_length[t, n] == count
            if trajectory.terminated[t, n] or trajectory.truncated[t, n]:
                count, total = 0, 0.0
        assert after.observation[n, 0] == count == after.env.count[n] == after.memory[n] == after.episode_length[n]
    starts = np.concatenate([np.zeros((1, N), bool), trajectory.done[:-1]])
    np.testing.assert_array_equal(trajectory.starts, starts)
    assert trajectory.terminated.any() and (trajectory.truncated & ~trajectory.terminated).any()


def test_no_two_episodes_begin_alike():
    start, _, trajectory, _ = collected()
    tags = np.concatenate([start.observation[:, 1], trajectory.observation[..., 1][trajectory.starts]])
    assert len(tags) > N + 3 and len(np.unique(tags)) == len(tags)


def test_metrics_are_of_the_episodes_that_ended():
    _, _, trajectory, _ = collected()
    metrics = episodes(type(trajectory)(*jax.tree.map(jnp.asarray, tuple(trajectory))))
    assert metrics["episode/count"] == trajectory.done.sum()
    np.testing.assert_allclose(metrics["episode/return"], trajectory.episode_return[trajectory.done].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["episode/length"], trajectory.episode_length[trajectory.done].mean(), rtol=1e-6)


def test_two_halves_make_the_whole():
    env = counting()
    start = begin(env, jax.random.key(0), N, memory=jnp.int32(0))
    run = jax.jit(
        lambda now, key: collect(env, act, now, key, steps=4, noise=jnp.full((4, N, 1), 0.1), memory=jnp.int32(0))
    )
    now, first = run(start, jax.random.key(1))
    now, second = run(now, jax.random.key(2))
    np.testing.assert_array_equal(second.episode_length[:, 0], [5, 1, 2, 3])
    np.testing.assert_allclose(second.episode_return[0], 0.5, rtol=1e-5)
    np.testing.assert_array_equal(second.extras["seen"][:, 0], [4, 0, 1, 2])


def test_pack_goes_there_and_back():
    tree = {
        "a": jnp.arange(6.0).reshape(2, 3),
        "b": jnp.array([1, 2]),
        "c": (jnp.ones((2, 2, 2)), jnp.array([True, False])),
    }
    tree["key"] = jax.random.split(jax.random.key(0), 2)
    matrices, unpack = pack(tree)
    assert {m.ndim for m in matrices.values()} == {2} and len(matrices) == 4
    back = unpack(matrices)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())


def test_where_takes_rows():
    new, old = {"x": jnp.ones((2, 3))}, {"x": jnp.zeros((2, 3))}
    np.testing.assert_array_equal(where(jnp.array([True, False]), new, old)["x"], [[1, 1, 1], [0, 0, 0]])


def test_evaluation_plays_one_episode_in_each_environment():
    def act(params, observation, memory, key):
        ends = observation[0] >= 10 * observation[1] // 2  # episodes of different lengths
        return jnp.where(ends, 1.0, params)[None], memory + 1

    agent = Agent(None, None, act, lambda: jnp.int32(0), 1)  # pyright: ignore
    result = jax.jit(lambda key: evaluate(agent, counting(), 0.25, key, episodes=16))(jax.random.key(0))
    lengths = np.asarray(result.lengths)
    assert result.finished.all() and lengths.max() == 5 and len(np.unique(lengths)) >= 4
    terminated = np.where(result.returns > 0.25 * lengths + 1e-3, 1, 0)
    np.testing.assert_allclose(result.returns, 0.25 * lengths + 0.75 * terminated, rtol=1e-5)
    cut = evaluate(agent, counting(), 0.25, jax.random.key(0), episodes=16, max_steps=2)
    assert (np.asarray(cut.lengths) == np.minimum(lengths, 2)).all() and not cut.finished.all()
