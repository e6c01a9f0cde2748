import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.envs import statistics

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)


def test_time_limit_cuts_and_counts_from_zero_again():
    env = envs.auto_reset(envs.time_limit(toys.counter(end=100), 4))
    _, steps = toys.rollout(env, 9)
    assert steps.truncated.tolist() == [False, False, False, True] * 2 + [False]
    assert not steps.terminated.any()
    assert steps.successor[:, 1].tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert steps.observation[:, 1].tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_ending_at_the_limit_sets_both_flags():
    _, steps = toys.rollout(envs.time_limit(toys.counter(end=3), 3), 3)
    assert steps.terminated.tolist() == steps.truncated.tolist() == [False, False, True]


def test_auto_reset_keeps_the_last_observation_and_starts_anew():
    first, steps = toys.rollout(envs.auto_reset(toys.counter(end=3)), 7)
    assert steps.terminated.tolist() == [False, False, True, False, False, True, False]
    assert steps.reward.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert steps.successor[:, 1].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert steps.observation[:, 1].tolist() == [1, 2, 0, 1, 2, 0, 1]
    starts = [float(first[0]), float(steps.observation[2, 0]), float(steps.observation[5, 0])]
    assert len(set(starts)) == 3, "every episode has a start of its own"
    assert steps.successor[:, 0].tolist() == [starts[0]] * 3 + [starts[1]] * 3 + [starts[2]]


def test_auto_reset_draws_reset_and_step_from_different_keys():
    def draw(key, *_):
        noise = jax.random.uniform(key, (1,))
        return noise, noise

    def step(key, state, action):
        noise, yes = jax.random.uniform(key, (1,)), jnp.ones((), bool)
        return noise, envs.TimeStep(noise, jnp.float32(0), yes, ~yes, noise)

    env = envs.Env("Noise", draw, step, envs.Box(0.0, 1.0, (1,)), envs.Discrete(1))
    _, steps = toys.rollout(envs.auto_reset(env), 8)
    assert (steps.observation != steps.successor).all()


def test_vectorise_is_each_copy_alone():
    one = envs.auto_reset(envs.time_limit(toys.counter(end=5), 3))
    many = envs.vectorise(one, 3)
    key = jax.random.key(1)
    state, observation = many.reset(key)
    with jax.debug_key_reuse(False):
        alone = [one.reset(k) for k in jax.random.split(key, 3)]
        np.testing.assert_array_equal(observation, np.stack([o for _, o in alone]))
        states = [s for s, _ in alone]
        for _ in range(4):
            state, timestep = many.step(key, state, jnp.zeros(3, jnp.int32))
            each = [one.step(k, s, jnp.int32(0)) for k, s in zip(jax.random.split(key, 3), states, strict=True)]
            states = [s for s, _ in each]
            for name in envs.TimeStep._fields:
                np.testing.assert_array_equal(getattr(timestep, name), np.stack([getattr(t, name) for _, t in each]))
    assert many.observation_space == one.observation_space and many.action_space == one.action_space


def test_frame_stack_repeats_the_first_and_forgets_the_last_episode():
    first, steps = toys.rollout(envs.auto_reset(envs.frame_stack(toys.counter(end=3), 3)), 5)
    assert first[:, 1].tolist() == [0, 0, 0]
    assert steps.observation[:, :, 1].tolist() == [[0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert steps.successor[2, :, 1].tolist() == [1, 2, 3]
    env = envs.frame_stack(toys.counter(), 3)
    assert env.observation_space.shape == (3, 2)
    assert env.observation_space.bounds[1].tolist() == [[1, 1000]] * 3


def test_statistics_of_batches_are_those_of_all():
    samples = np.random.default_rng(0).normal(3.0, 2.0, (7, 5, 2)).astype(np.float32)
    running = statistics.statistics((2,))
    assert statistics.normalise(running, jnp.array([3.0, -4.0])).tolist() == [3.0, -4.0]
    for batch in (samples[:1], samples[1:4], samples[4:]):
        running = statistics.update(running, jnp.asarray(batch))
    every = samples.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(running.mean, every.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(running.variance, every.var(axis=0), rtol=1e-5)
    assert running.count == 35
    wanted = np.clip((samples - every.mean(axis=0)) / np.sqrt(every.var(axis=0) + 1e-8), -1, 1)
    np.testing.assert_allclose(statistics.normalise(running, jnp.asarray(samples), clip=1.0), wanted, atol=1e-5)
    np.testing.assert_allclose(
        statistics.scale(running, jnp.asarray(samples), clip=2.0),
        np.clip(samples / np.sqrt(every.var(axis=0)), -2, 2),
        rtol=1e-5,
    )


def test_statistics_over_a_mapped_axis_are_those_of_all():
    samples = jax.random.normal(jax.random.key(0), (4, 6, 3))
    start = statistics.update(statistics.statistics((3,)), samples[0] * 2.0)
    together = statistics.update(start, samples)
    apart = jax.vmap(lambda x: statistics.update(start, x, axis_name="devices"), axis_name="devices")(samples)
    for whole, part in zip(together, apart, strict=True):
        np.testing.assert_allclose(part, np.broadcast_to(whole, part.shape), rtol=1e-5, atol=1e-6)


def test_statistics_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"samples have shape \(3, 4\)"):
        statistics.update(statistics.statistics((2,)), jnp.zeros((3, 4)))


def test_normalised_observations_take_in_what_is_seen():
    env = envs.normalise_observations(envs.vectorise(envs.auto_reset(toys.counter(end=3)), 2), clip=1.2)
    first, steps = toys.rollout(env, 4, action=[0, 0])
    plain, raw = toys.rollout(envs.vectorise(envs.auto_reset(toys.counter(end=3)), 2), 4, action=[0, 0])
    seen = np.asarray(plain, np.float64)
    for t in range(4):
        seen = np.concatenate([seen, raw.observation[t]])
        for name in ("observation", "successor"):
            wanted = (np.asarray(getattr(raw, name)[t]) - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-8)
            np.testing.assert_allclose(getattr(steps, name)[t], np.clip(wanted, -1.2, 1.2), atol=2e-5)
    assert env.observation_space.bounds[1].tolist() == [1.2, 1.2]


def test_normalised_rewards_in_the_order_of_stable_baselines():
    plain = envs.vectorise(envs.auto_reset(envs.time_limit(toys.counter(end=4), 3)), 2)
    _, raw = toys.rollout(plain, 8, action=[0, 0])
    _, steps = toys.rollout(envs.normalise_rewards(plain, discount=0.9), 8, action=[0, 0])
    returns, seen = np.zeros(2), []
    for t in range(8):
        returns = 0.9 * returns + np.asarray(raw.reward[t], np.float64)
        seen.extend(returns)
        wanted = np.clip(np.asarray(raw.reward[t]) / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        np.testing.assert_allclose(steps.reward[t], wanted, rtol=1e-4)
        returns[np.asarray(raw.truncated[t])] = 0.0
    assert raw.truncated.any() and not raw.terminated.any()


def test_normalisation_works_without_a_batch():
    env = envs.normalise_rewards(envs.normalise_observations(envs.auto_reset(toys.counter())), discount=0.9)
    first, steps = toys.rollout(env, 4)
    assert first.tolist() == [0.0, 0.0] and steps.reward.shape == (4,)
    assert np.isfinite(steps.observation).all() and np.isfinite(steps.reward).all()


def echo(space):
    """Observes the action that it got."""

    def step(key, state, action):
        never = jnp.zeros((), bool)
        return state, envs.TimeStep(action, action.sum(), never, never, action)

    def reset(key):
        return jnp.int32(0), jnp.zeros(space.shape)

    return envs.Env("Echo", reset, step, space, space)


def test_actions_are_clipped_and_stretched():
    box, key = envs.Box((-2.0, 0.0), (2.0, 1.0), (2,)), jax.random.key(0)
    clipped = envs.clip_actions(echo(box)).step(key, jnp.int32(0), jnp.array([-5.0, 0.25]))[1]
    assert clipped.observation.tolist() == [-2.0, 0.25]
    env = envs.rescale_actions(echo(box))
    assert env.action_space == envs.Box(-1.0, 1.0, (2,))
    for action, wanted in (([-1.0, -1.0], [-2.0, 0.0]), ([1.0, 1.0], [2.0, 1.0]), ([0.5, 0.0], [1.0, 0.5])):
        assert env.step(key, jnp.int32(0), jnp.array(action))[1].observation.tolist() == wanted


def test_masks_add_up_and_pass_through_wrappers():
    env = envs.mask_actions(toys.counter(), lambda state: jnp.array([True, False]) | (state.count > 0))
    env = envs.mask_actions(env, lambda state: jnp.array([True, True]))
    env = envs.vectorise(envs.auto_reset(envs.time_limit(env, 9)), 2)
    state, _ = env.reset(jax.random.key(0))
    assert env.action_mask(state).tolist() == [[True, False]] * 2
    state, _ = env.step(jax.random.key(1), state, jnp.zeros(2, jnp.int32))
    assert env.action_mask(state).tolist() == [[True, True]] * 2
    one = envs.mask_actions(toys.counter(), lambda state: jnp.array([False, True]))
    both = envs.mask_actions(one, lambda state: jnp.array([True, False]))
    assert not both.action_mask(toys.counter().reset(jax.random.key(0))[0]).any()


@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda env: envs.time_limit(env, 0), "steps is 0, expected at least 1"),
        (lambda env: envs.vectorise(env, 0), "n is 0, expected at least 1"),
        (lambda env: envs.frame_stack(env, 0), "n is 0, expected at least 1"),
        (lambda env: envs.clip_actions(env), "clip_actions needs a Box of actions"),
        (lambda env: envs.rescale_actions(env), "rescale_actions needs a Box of actions"),
        (lambda env: envs.normalise_observations(env), "needs a Box of observations"),
        (lambda env: envs.mask_actions(echo(envs.Box(0.0, 1.0, (1,))), None), "needs discrete actions"),
        (lambda env: envs.rescale_actions(echo(envs.Box(0.0, np.inf, (1,)))), "bounds on both sides"),
        (lambda env: envs.rescale_actions(echo(envs.Box(0.0, 1.0, (1,))), low=1.0), "expected low < high"),
    ],
)
def test_what_wrappers_refuse(wrap, message):
    env = toys.counter()._replace(observation_space=envs.Discrete(2)) if "observations" in message else toys.counter()
    with pytest.raises(ValueError, match=message):
        wrap(env)
