"""Classic control moves as Gymnasium's, transition by transition, in float64 to the last digits."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.envs import acrobot, cartpole, mountain_car, pendulum
from jaxrl.envs.wrappers import Timed

GOLDEN = Path(__file__).parents[1] / "golden"
STATES = {
    "CartPole-v1": cartpole.State,
    "Acrobot-v1": acrobot.State,
    "MountainCar-v0": mountain_car.State,
    "MountainCarContinuous-v0": mountain_car.State,
    "Pendulum-v1": lambda angle, speed: pendulum.State(angle, speed, jnp.zeros_like(angle)),
}
NAMES = list(STATES)


def compare(name, rows):
    env, rows = envs.make(name), {kind: np.asarray(values) for kind, values in rows.items()}
    assert rows["terminated"].any() or name == "Pendulum-v1", "no episode ends: the test would see nothing of it"
    with jax.enable_x64(True):
        state = STATES[name](*(jnp.asarray(column) for column in rows["state"].T))
        action = jnp.asarray(rows["action"], env.action_space.dtype)
        time = jnp.asarray(rows["time"], jnp.int32)
        after, timestep = jax.jit(jax.vmap(lambda *now: env.step(jax.random.key(0), *now)))(Timed(state, time), action)
        reached = np.stack(after.env[: rows["after"].shape[1]], axis=-1)
    # The state of Gymnasium's MountainCarContinuous is float32; so are all observations.
    precise = 1e-12 if name != "MountainCarContinuous-v0" else 1e-7
    np.testing.assert_allclose(reached, rows["after"], rtol=precise, atol=precise)
    np.testing.assert_allclose(timestep.observation, rows["observation"], rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(timestep.reward, rows["reward"], rtol=1e-6)
    for flag in ("terminated", "truncated"):
        assert (getattr(timestep, flag) == rows[flag]).all()
    assert (after.time == rows["time"] + 1).all()
    assert timestep.observation.dtype == timestep.reward.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_golden_transitions(name):
    compare(name, json.loads((GOLDEN / "envs.json").read_text())[name])


@pytest.mark.parametrize("name", NAMES)
def test_transitions_of_the_gymnasium_installed(name):
    pytest.importorskip("gymnasium")
    spec = importlib.util.spec_from_file_location("make_envs", GOLDEN / "make_envs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    compare(name, script.play(name, steps=700, seed=3))


@pytest.mark.parametrize("name", NAMES)
def test_spaces_and_starts_are_gymnasiums(name):
    gymnasium = pytest.importorskip("gymnasium")
    other, ours = gymnasium.make(name), envs.make(name)
    for space, theirs in ((ours.observation_space, other.observation_space), (ours.action_space, other.action_space)):
        assert space.shape == theirs.shape
        if isinstance(space, envs.Discrete):
            assert space.n == theirs.n
        else:
            np.testing.assert_allclose(space.bounds[0], theirs.low, rtol=1e-6)
            np.testing.assert_allclose(space.bounds[1], theirs.high, rtol=1e-6)
    starts = np.array([other.reset(seed=seed)[0] for seed in range(400)])
    _, observations = jax.vmap(ours.reset)(jax.random.split(jax.random.key(0), 400))
    width = np.ptp(starts, axis=0)
    np.testing.assert_allclose(observations.min(axis=0), starts.min(axis=0), atol=0.03 * width.max() + 1e-6)
    np.testing.assert_allclose(observations.max(axis=0), starts.max(axis=0), atol=0.03 * width.max() + 1e-6)
    np.testing.assert_allclose(observations.mean(axis=0), starts.mean(axis=0), atol=0.1 * width.max())
