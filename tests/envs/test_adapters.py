import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.envs.adapters.convert import space_of
from jaxrl.envs.adapters.gymnasium import from_gymnasium

STEPS, COPIES = 40, 3


def play(env, actions, key):
    """(first observations [N], TimeStep [T, N]) under actions [T, N, ...], in one program."""
    many = envs.vectorise(env, COPIES)

    def run(key):
        reset_key, loop_key = jax.random.split(key)
        state, first = many.reset(reset_key)
        return first, jax.lax.scan(
            lambda state, now: many.step(now[0], state, now[1]), state, (jax.random.split(loop_key, STEPS), actions)
        )[1]

    return jax.jit(run)(key)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_gymnasium_in_a_program_is_gymnasium_in_a_loop(name):
    gymnasium = pytest.importorskip("gymnasium")
    seeds = []

    class Noting(gymnasium.Wrapper):
        def reset(self, *, seed=None, options=None):
            observation, info = super().reset(seed=seed)
            seeds.append((seed, observation))
            return observation, info

    env = from_gymnasium(lambda: Noting(gymnasium.make(name, max_episode_steps=15)))
    space = env.action_space
    actions = jax.vmap(jax.vmap(space.sample))(jax.random.split(jax.random.key(5), (STEPS, COPIES)))
    first, steps = play(envs.auto_reset(env), actions, jax.random.key(0))
    by_start = {tuple(observation.tolist()): seed for seed, observation in seeds}
    ends = 0
    for copy in range(COPIES):
        alone = gymnasium.make(name, max_episode_steps=15)
        start = first[copy]
        alone.reset(seed=by_start[tuple(start.tolist())])
        for t in range(STEPS):
            observation, reward, terminated, truncated, _ = alone.step(np.asarray(actions[t, copy]))
            np.testing.assert_array_equal(steps.successor[t, copy], observation)
            assert steps.reward[t, copy] == np.float32(reward)
            assert (steps.terminated[t, copy], steps.truncated[t, copy]) == (terminated, truncated)
            if terminated or truncated:
                ends += 1
                start = steps.observation[t, copy]
                alone.reset(seed=by_start[tuple(start.tolist())])
                assert not np.array_equal(start, observation)
            else:
                np.testing.assert_array_equal(steps.observation[t, copy], observation)
    assert ends >= 3


def test_gymnasium_same_key_same_episodes():
    pytest.importorskip("gymnasium")
    actions = jnp.ones((STEPS, COPIES), jnp.int32)
    env = envs.auto_reset(envs.make("gymnasium:CartPole-v1"))
    one, two, other = (play(env, actions, jax.random.key(seed))[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.observation, two.observation)
    assert not np.array_equal(one.observation, other.observation)


def test_gymnasium_episodes_are_kept_apart():
    """Many are reset, few are played, and in another order."""
    pytest.importorskip("gymnasium")
    env = envs.make("gymnasium:Acrobot-v1")
    starts = [env.reset(key) for key in jax.random.split(jax.random.key(3), 80)]
    right, key = jnp.int32(1), jax.random.key(0)
    for place in (79, 0, 40, 0):
        state, observation = starts[place]
        with jax.debug_key_reuse(False):
            _, timestep = env.step(key, state, right)
        np.testing.assert_allclose(timestep.observation[:4], observation[:4], atol=0.1)
        assert np.abs(np.asarray(timestep.observation) - np.asarray(observation)).max() > 1e-4


def test_gymnasium_repeats_an_answer_but_does_not_go_back():
    pytest.importorskip("gymnasium")
    env = envs.make("gymnasium:CartPole-v1")
    first, _ = env.reset(jax.random.key(0))
    with jax.debug_key_reuse(False):
        key = jax.random.key(1)
        second, one = env.step(key, first, jnp.int32(1))
        _, again = env.step(key, first, jnp.int32(1))
        np.testing.assert_array_equal(one.observation, again.observation)
        with pytest.raises(Exception, match="cannot go back to step 0"):
            jax.block_until_ready(env.step(key, first, jnp.int32(0)))
        env.step(key, second, jnp.int32(1))


def test_gymnasium_after_the_end_and_too_many_episodes():
    pytest.importorskip("gymnasium")
    env = from_gymnasium("CartPole-v1", instances=1, max_episode_steps=2)
    with jax.debug_key_reuse(False):
        key, left = jax.random.key(1), jnp.int32(0)
        state, _ = env.reset(jax.random.key(0))
        state, one = env.step(key, state, left)
        state, two = env.step(key, state, left)
        assert (one.truncated, two.truncated) == (False, True)
        _, over = env.step(key, state, left)
        assert over.terminated and over.reward == 0 and not over.observation.any()
        first, _ = env.step(key, env.reset(jax.random.key(0))[0], left)
        env.step(key, env.reset(jax.random.key(1))[0], left)
        with pytest.raises(Exception, match="raise `instances`"):
            jax.block_until_ready(env.step(key, first, left))


def test_gymnasium_spaces():
    gymnasium = pytest.importorskip("gymnasium")
    spaces = gymnasium.spaces
    assert space_of(spaces.Discrete(3, start=1)) == envs.Discrete(3)
    assert space_of(spaces.Box(0, 255, (2, 2), np.uint8)) == envs.Box(0.0, 255.0, (2, 2), jnp.dtype("uint8"))
    assert space_of(spaces.Box(np.float32([0, -1]), np.float32([1, 1]))).low == (0.0, -1.0)
    assert space_of(spaces.Box(-np.inf, np.inf, (2,), np.float64)).dtype == jnp.float32
    for space in (spaces.Dict({"a": spaces.Discrete(2)}), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(3)):
        with pytest.raises(ValueError, match="neither Discrete nor Box"):
            space_of(space)


def test_gymnasium_discrete_actions_that_do_not_start_at_zero():
    gymnasium = pytest.importorskip("gymnasium")

    class Shifted(gymnasium.Env):
        action_space, observation_space = gymnasium.spaces.Discrete(2, start=5), gymnasium.spaces.Discrete(3, start=1)
        render_mode = "rgb_array"

        def reset(self, *, seed=None, options=None):
            return 1, {}

        def step(self, action):
            return int(action) - 4, float(action), False, False, {}

        def render(self):
            return np.full((2, 2, 3), 7, np.uint8)

    env = from_gymnasium(Shifted)
    state, observation = env.reset(jax.random.key(0))
    assert observation == 0 and env.render(state).max() == 7
    state, timestep = env.step(jax.random.key(1), state, jnp.int32(1))
    assert timestep.reward == 6 and timestep.observation == 1
    assert env.render(state).shape == (2, 2, 3)


def test_gymnax_is_gymnax():
    gymnax = pytest.importorskip("gymnax")
    other, params = gymnax.make("CartPole-v1")
    env = envs.vectorise(envs.auto_reset(envs.make("gymnax:CartPole-v1")), COPIES)
    actions = jnp.ones((COPIES,), jnp.int32)

    def run(key):
        reset_key, loop_key = jax.random.split(key)
        state, first = env.reset(reset_key)
        theirs = jax.tree.map(lambda x: x[0], state)

        def move(carry, key):
            state, theirs = carry
            state, timestep = env.step(key, state, actions)
            alone = jax.random.split(key, COPIES)[0]
            observation, theirs, reward, terminated, truncated, info = other.step(alone, theirs, actions[0], params)
            pair = (timestep.observation[0], timestep.reward[0], timestep.terminated[0], timestep.truncated[0])
            return (state, theirs), (
                (*pair, timestep.successor[0]),
                (observation, reward, terminated, truncated, info["final_observation"]),
            )

        return jax.lax.scan(move, (state, theirs), jax.random.split(loop_key, STEPS))[1]

    with jax.debug_key_reuse(False):
        ours, theirs = jax.jit(run)(jax.random.key(0))
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    assert ours[2].sum() >= 2


def test_gymnax_time_limit_is_a_truncation():
    gymnax = pytest.importorskip("gymnax")
    params = gymnax.make("CartPole-v1")[1].replace(max_steps_in_episode=3)
    env = envs.adapters.gymnax.from_gymnax("CartPole-v1", params=params)
    state, _ = env.reset(jax.random.key(0))
    for step in range(1, 4):
        state, timestep = env.step(jax.random.key(step), state, jnp.int32(step % 2))
        assert (timestep.terminated, timestep.truncated) == (False, step == 3)


@pytest.mark.parametrize("library", ["gymnax", "gymnasium"])
def test_unknown_names_of_other_libraries(library):
    pytest.importorskip(library)
    with pytest.raises(ValueError, match="has no environment 'Carpole-v7'"):
        envs.make(f"{library}:Carpole-v7")


@pytest.mark.parametrize("library", ["gymnax", "gymnasium", "brax"])
def test_a_missing_library_is_named(library, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"(?i){library} cannot be imported"):
        envs.make(f"{library}:CartPole-v1")


def test_brax_runs():
    pytest.importorskip("brax")
    env = envs.make("brax:fast")
    state, observation = jax.jit(env.reset)(jax.random.key(0))
    state, timestep = jax.jit(env.step)(jax.random.key(1), state, jnp.zeros(env.action_space.shape))
    assert timestep.observation.shape == observation.shape == env.observation_space.shape
    assert timestep.reward.shape == () and timestep.terminated.dtype == bool
