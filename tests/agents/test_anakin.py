"""Eight devices learn what one device with all the environments learns."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.agents import a2c, anakin, catalogue, ppo, reinforce, trpo
from jaxrl.parallel import make_mesh

CASES = {
    "a2c": (a2c.make, a2c.A2CConfig(envs=8, steps=4, hidden=(4,), normalise_observations=True, normalise_rewards=True)),
    "ppo": (ppo.make, ppo.PPOConfig(envs=8, steps=4, hidden=(4,), epochs=2, minibatches=1, recurrent=3)),
    "trpo": (trpo.make, trpo.TRPOConfig(envs=8, steps=4, hidden=(4,), value_epochs=1, value_minibatches=1)),
    "reinforce": (reinforce.make, reinforce.ReinforceConfig(envs=8, steps=12, hidden=(4,))),
}


def close(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@functools.cache
def run(name):
    """A start, and one step from it on one device and on eight."""
    make, config = CASES[name]
    env = envs.make("CartPole-v1")
    one, many = make(config, env), anakin.shard(make, config, env, make_mesh("data=8"))
    assert many.env_steps == one.env_steps == config.envs * config.steps
    start, alone = jax.jit(lambda key: (state := one.init(key), one.step(state)))(jax.random.key(0))
    return start, alone, jax.jit(many.step)(start)


@pytest.mark.parametrize(
    "name", ["a2c", "ppo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("trpo", "reinforce"))]
)
def test_eight_devices_equal_one(name):
    start, (alone, row), (spread, spread_row) = run(name)
    close(alone.params, spread.params)
    close(alone.interaction.observation, spread.interaction.observation)
    close({k: v for k, v in row.items()}, {k: v for k, v in spread_row.items()})
    assert len(spread.interaction.observation.sharding.device_set) == 8


def test_pmap_equals_shard_map():
    make, config = CASES["a2c"]
    env = envs.make("CartPole-v1")
    mapped = anakin.pmap(make, config, env, 8)
    start, _, (state, row) = run("a2c")
    other, other_row = mapped.step(start)
    close((state.params, state.interaction, state.rewards), (other.params, other.interaction, other.rewards))
    close(row, other_row)
    mapped.step(other)


def test_environments_that_do_not_divide():
    make, config = CASES["a2c"]
    with pytest.raises(ValueError, match="multiple of the 8 devices"):
        anakin.shard(make, dataclasses.replace(config, envs=12), envs.make("CartPole-v1"), make_mesh("data=8"))


SMALL = {"envs": 8, "steps": 4, "hidden": (4,)}
REPLAY = {"envs": 8, "steps": 2, "hidden": (4,), "updates": 2, "batch": 16, "capacity": 256, "warmup": 16, "rounds": 4}
SPREAD = {
    "dqn": (REPLAY | {"prioritised": True, "n_step": 2}, "CartPole-v1"),
    "off_policy_actor_critic": (SMALL, "CartPole-v1"),
    "sac": (REPLAY, "Pendulum-v1"),
    "td3": (REPLAY, "Pendulum-v1"),
    "ddpg": (REPLAY, "Pendulum-v1"),
    "dpg": ({"envs": 8, "hidden": (4,)}, "Pendulum-v1"),
    "qac": (SMALL, "CartPole-v1"),
    "a2c": (SMALL, "CartPole-v1"),
    "ppo": (SMALL | {"minibatches": 2}, "CartPole-v1"),
    "trpo": (SMALL, "CartPole-v1"),
    "reinforce": (SMALL | {"steps": 12}, "CartPole-v1"),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


@pytest.mark.parametrize(
    "name", ["dqn", *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(catalogue.AGENTS) if n != "dqn")]
)
def test_every_agent_spreads(name):
    """Two steps on eight devices, with the random numbers of one; memories lie where their environments do."""
    options, env_name = SPREAD[name]
    entry, env = catalogue.find(name), envs.make(env_name)
    known = {field.name for field in dataclasses.fields(entry.config)}
    config = entry.config(**{key: value for key, value in options.items() if key in known})
    jit = functools.partial(jax.jit, compiler_options=QUICK)

    def two(agent):
        def run(key):
            state, _ = agent.step(agent.init(key))
            return agent.step(state)

        return jit(run)(jax.random.key(0))

    spread = anakin.spread(entry.make, config, env, make_mesh("data=8"))
    alone, together = two(entry.make(config, env)), two(spread)
    close(jax.tree.map(floats, alone), jax.tree.map(floats, together))
    observation = jax.tree.leaves(together[0].interaction.observation)[0]
    assert {shard.data.shape[0] for shard in observation.addressable_shards} == {1}
    if hasattr(together[0], "buffer"):
        rewards = together[0].buffer.items if hasattr(together[0].buffer, "items") else together[0].buffer.ring.items
        leaf = rewards.reward
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


def floats(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_minibatches_that_do_not_divide():
    entry = catalogue.find("dqn")
    with pytest.raises(ValueError, match="batch is 12, expected a multiple of the 8 devices"):
        anakin.spread(entry.make, entry.config(envs=8, batch=12), envs.make("CartPole-v1"), make_mesh("data=8"))
