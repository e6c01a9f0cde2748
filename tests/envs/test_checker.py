"""Every fault has a broken environment, made from a sound one."""

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.envs.checker import find_faults

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

SOUND = toys.counter()
CALLS = itertools.count()


def reset_with(change):
    return SOUND._replace(reset=lambda key: change(*SOUND.reset(key)))


def step_with(change):
    """`change(state, timestep)` on what the sound step gives."""
    return SOUND._replace(step=lambda key, state, action: change(*SOUND.step(key, state, action)))


def field(**new):
    return step_with(lambda state, timestep: (state, timestep._replace(**new)))


def seen(change):
    def both(state, timestep):
        return state, timestep._replace(observation=change(timestep.observation), successor=change(timestep.successor))

    return step_with(both)


def branching(key, state, action):
    return SOUND.step(key, state, action) if action == 0 else SOUND.step(key, state, 1 - action)


def forgetting(key):
    return SOUND.reset(jax.random.key(next(CALLS)))


def reusing(key):
    return jax.random.uniform(key), jnp.stack([jax.random.uniform(key), jax.random.normal(key)])


def own_reset(state, timestep):
    return state, timestep._replace(observation=jnp.where(timestep.terminated, 0.5, timestep.observation))


def impure(state, timestep):
    return state, timestep._replace(reward=timestep.reward + next(CALLS))


def unvmappable(key, state, action):
    after, timestep = SOUND.step(key, state, action)
    value = jax.experimental.io_callback(lambda x: np.asarray(x), timestep.reward, timestep.reward, ordered=True)
    return after, timestep._replace(reward=value)


FAULTS = {
    "expected envs.Discrete or envs.Box": SOUND._replace(action_space=3),
    "needs at least one element": SOUND._replace(action_space=envs.Discrete(0)),
    "low or high does not fit shape": SOUND._replace(observation_space=envs.Box((0.0, 0.0, 0.0), 1.0, (2,))),
    "low is not below high everywhere": SOUND._replace(observation_space=envs.Box(1.0, 0.0, (2,))),
    r"reset returns .*, expected \(state, observation\)": SOUND._replace(reset=lambda key: SOUND.reset(key)[1]),
    r"observation of reset is float32\[3\], observation_space says float32\[2\]": reset_with(
        lambda state, x: (state, jnp.append(x, 0.0))
    ),
    r"observation of step is int32\[2\], observation_space says float32": seen(lambda x: x.astype(jnp.int32)),
    "observation of step is a tuple, expected one array": field(observation=(jnp.zeros(2), jnp.zeros(2))),
    r"successor is float32\[1\]": field(successor=jnp.zeros(1)),
    "step returns NoneType, expected": SOUND._replace(step=lambda key, state, action: None),
    "step returns list, expected": step_with(lambda state, timestep: (state, list(timestep))),
    r"reward is int32\[\], expected float32\[\]": field(reward=jnp.int32(1)),
    r"reward is float32\[1\], expected float32\[\]": field(reward=jnp.zeros(1)),
    r"terminated is float32\[\], expected bool\[\]": field(terminated=jnp.float32(0)),
    r"truncated is int32\[\], expected bool\[\]": field(truncated=jnp.int32(0)),
    "cannot be traced.*jnp.where": SOUND._replace(step=branching),
    "step fails for an element of its space: ZeroDivisionError": SOUND._replace(step=lambda *now: 1 / 0),
    "state of another structure": step_with(lambda state, timestep: ((state.count, state.start), timestep)),
    r"state.count is int32\[\] after reset but float32\[\] after step": step_with(
        lambda state, timestep: (state._replace(count=state.count * 1.0), timestep)
    ),
    r"action_mask gives bool\[3\], expected bool\[2\]": SOUND._replace(action_mask=lambda state: jnp.ones(3, bool)),
    "action_mask gives float32": SOUND._replace(action_mask=lambda state: jnp.ones(2)),
    "the actions are not Discrete": SOUND._replace(
        action_mask=lambda state: jnp.ones(2, bool), action_space=envs.Box(0.0, 1.0, ())
    ),
    "a random key is used twice": SOUND._replace(
        reset=lambda key: (SOUND.reset(jax.random.key(0))[0], reusing(key)[1])
    ),
    "reset gives different observations for the same key": SOUND._replace(reset=forgetting),
    "step gives different results for the same key": step_with(impure),
    "leave resets to auto_reset": step_with(own_reset),
    "render gives float64": SOUND._replace(render=lambda state: np.zeros((4, 4, 3))),
    "does not run under vmap and scan": SOUND._replace(step=unvmappable),
    "reward is not finite": step_with(
        lambda state, t: (state, t._replace(reward=jnp.where(state.count == 2, jnp.nan, t.reward)))
    ),
    "successor is not finite": step_with(
        lambda state, t: (state, t._replace(observation=t.observation / 0.0, successor=t.successor / 0.0))
    ),
    "successor holds 3.0, outside observation_space": SOUND._replace(observation_space=envs.Box(0.0, 2.0, (2,))),
    "forbids every action": SOUND._replace(action_mask=lambda state: jnp.arange(2) < state.count - 10),
}


@pytest.mark.parametrize("message", FAULTS)
def test_names_the_fault(message):
    with pytest.raises(ValueError, match=message):
        envs.check(FAULTS[message], steps=8)


def test_sound_environments_pass():
    assert find_faults(SOUND, steps=8) == []
    assert find_faults(envs.make("MaskedChoice"), steps=8) == []


def test_all_faults_of_a_kind_are_named():
    faults = find_faults(field(reward=jnp.int32(1), terminated=jnp.int32(0)))
    assert [fault.split()[0] for fault in faults] == ["reward", "terminated"]
