"""Eight devices learn what one device with all the environments learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.agents import a2c, anakin, catalogue, dpg, ppo, qac, reinforce, replay, trpo
from jaxrl.agents import off_policy_actor_critic as opac
from jaxrl.agents.evaluate import evaluate
from jaxrl.agents.presets import PRESETS
from jaxrl.buffers import prioritised
from jaxrl.parallel import make_mesh

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
JIT = functools.partial(jax.jit, compiler_options=QUICK)

CASES = {
    "a2c": (a2c.make, a2c.A2CConfig(envs=8, steps=4, hidden=(4,), normalise_observations=True, normalise_rewards=True)),
    "ppo": (ppo.make, ppo.PPOConfig(envs=8, steps=4, hidden=(4,), epochs=2, minibatches=1, recurrent=3)),
    "trpo": (trpo.make, trpo.TRPOConfig(envs=8, steps=4, hidden=(4,), value_epochs=1, value_minibatches=1)),
    "reinforce": (reinforce.make, reinforce.ReinforceConfig(envs=8, steps=12, hidden=(4,))),
    "qac": (qac.make, qac.QACConfig(envs=8, steps=4, hidden=(4,), normalise_rewards=True)),
    "off_policy_actor_critic": (opac.make, opac.OffPolicyActorCriticConfig(envs=8, steps=4, hidden=(4,))),
    "dpg": (dpg.make, dpg.DPGConfig(envs=16, rounds=3, hidden=(4,))),
}
"""Agents that learn from all they just did: eight devices do exactly what one does."""


def close(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@functools.cache
def run(name):
    """A start, and one step from it on one device and on eight."""
    make, config = CASES[name]
    env = envs.make("Pendulum-v1" if name == "dpg" else "CartPole-v1")
    one, many = make(config, env), anakin.shard(make, config, env, make_mesh("data=8"))
    assert many.env_steps == one.env_steps == config.envs * getattr(config, "steps", 3)
    start, alone = JIT(lambda key: (state := one.init(key), one.step(state)))(jax.random.key(0))
    return start, alone, JIT(many.step)(start)


@pytest.mark.parametrize(
    "name",
    [
        *("a2c", "off_policy_actor_critic"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ppo", "trpo", "reinforce", "qac", "dpg")),
    ],
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
SPREAD["sac discrete"] = (REPLAY, "CartPole-v1")


def small(name, **changes):
    """(make, config, environment)."""
    options, env_name = SPREAD[name]
    entry = catalogue.find(name.split()[0])
    known = {field.name for field in dataclasses.fields(entry.config)}
    config = entry.config(**{key: value for key, value in options.items() if key in known})
    return entry.make, dataclasses.replace(config, **changes), envs.make(env_name)


@pytest.mark.parametrize(
    "name", ["dqn", *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(SPREAD) if n != "dqn")]
)
def test_every_agent_spreads(name):
    """Two steps on eight devices, with the random numbers of one; memories lie where their environments do."""
    make, config, env = small(name)

    def two(agent):
        def run(key):
            state, _ = agent.step(agent.init(key))
            return agent.step(state)

        return JIT(run)(jax.random.key(0))

    spread = anakin.spread(make, config, env, make_mesh("data=8"))
    alone, together = two(make(config, env)), two(spread)
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


WITH_REPLAY = ("dqn", "sac", "sac discrete", "td3", "ddpg", "dpg")


def some(names, *quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def learner_of(monkeypatch, name, *, batch, **options):
    make, config, env = small(name, **({"envs": batch} if name == "dpg" else {"batch": batch}))
    with monkeypatch.context() as patch:
        patch.setattr(replay, "make", lambda env, learner, *_, **__: learner)
        return make(config, env, **options), config, env


@pytest.mark.parametrize("name", some(WITH_REPLAY, "dqn", "sac"))
def test_learning_from_a_divided_batch_is_learning_from_all_of_it(name, monkeypatch):
    """Three updates by hand-made minibatches: parameters, slow copies, optimizers, temperature, errors, metrics."""
    rng, updates, rows = np.random.default_rng(0), 3, 16
    learner, config, env = learner_of(monkeypatch, name, batch=rows)
    part, _, _ = learner_of(monkeypatch, name, batch=rows // 8, axis_name="data")
    learnt = JIT(learner.init)(jax.random.key(0))
    shape = (updates, rows, *env.observation_space.shape)
    observation, successor = (np.float32(rng.normal(size=shape)) for _ in range(2))
    rows_of_all = observation.reshape(-1, *shape[2:])
    _, action = JIT(lambda o: learner.uniform(learnt.params, o, jax.random.key(2), 0))(rows_of_all)
    batch = replay.Batch(
        observation,
        action.reshape(*shape[:2], *action.shape[1:]),
        reward=np.float32(rng.normal(size=shape[:2])),
        discount=np.float32(rng.uniform(size=shape[:2])),
        successor=successor,
        weights=np.float32(rng.uniform(size=shape[:2])),
    )
    noise = jax.vmap(learner.noise)(jax.random.split(jax.random.key(1), updates))
    before, after = 0, getattr(config, "target_every", 8)
    alone, errors, row = JIT(learner.learn)(learnt, batch, noise, before, after)
    halves = lambda tree: jax.tree.map(lambda x: x.reshape(updates, 8, rows // 8, *x.shape[2:]), tree)
    learn = jax.pmap(part.learn, axis_name="data", in_axes=(None, 1, 1, None, None), out_axes=(0, 1, 0))
    many, many_errors, rows_of = learn(learnt, halves(batch), halves(noise), before, after)
    for leaf in jax.tree.leaves(many):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))  # the same on each
    moved = jax.tree.map(lambda new, old: bool(np.any(new != old)), (alone.params, alone.target), (learnt[:2]))
    assert all(any(jax.tree.leaves(m)) for m in (*parts_of(moved[0]), moved[1])), moved
    close(jax.tree.map(lambda x: x[0], many), alone)
    close(many_errors.reshape(errors.shape), errors)
    close(jax.tree.map(lambda x: x.mean(), rows_of), row)


@pytest.mark.parametrize("name", some(WITH_REPLAY, "dqn", "sac"))
def test_actions_are_those_of_one_device(name, monkeypatch):
    """At random and by the policy, whose noise is an environment's own."""
    learner, _, env = learner_of(monkeypatch, name, batch=16)
    part, _, _ = learner_of(monkeypatch, name, batch=2, axis_name="data")
    params = JIT(learner.init)(jax.random.key(0)).params
    observation = np.float32(np.random.default_rng(0).normal(size=(16, *env.observation_space.shape)))
    divided = observation.reshape(8, 2, *observation.shape[1:])
    for act, act_of in ((learner.uniform, part.uniform), (learner.explore, part.explore)):
        alone, _ = JIT(lambda key, act=act: act(params, observation, key, 25_000))(jax.random.key(1))
        many, _ = jax.pmap(lambda o, f=act_of: f(params, o, jax.random.key(1), 25_000), axis_name="data")(divided)
        np.testing.assert_allclose(many.reshape(alone.shape), alone, rtol=1e-5)
        assert len(np.unique(alone)) > 1


def parts_of(params):
    """Actor, critic, temperature, one by one."""
    return [params] if "params" in params else list(params.values())


@pytest.mark.parametrize("name", some(WITH_REPLAY, "dqn"))
def test_replay_on_eight_devices(name):
    """Through the warm-up they do what one device does, then pmap does what shard_map does, step by step."""
    make, config, env = small(name, **({} if name == "dpg" else {"warmup": 32, "rounds": 1}))
    one, many = make(config, env), anakin.shard(make, config, env, make_mesh("data=8"))
    paired = anakin.pmap(make, config, env, 8)
    step, single = JIT(many.step), JIT(one.step)
    start = JIT(one.init)(jax.random.key(0))
    alone, state, other = start, start, start
    for i in range(4):
        (state, row), (other, other_row) = step(state), paired.step(other)
        assert jax.tree.structure(state) == jax.tree.structure(start)
        close(jax.tree.map(floats, (state, row)), jax.tree.map(floats, (other, other_row)))
        if i == 0:
            alone, alone_row = single(alone)
            of_environments = lambda state: jax.tree.map(floats, (state.interaction, state.buffer))
            close(of_environments(alone), of_environments(state))
            close(alone_row, {key: row[key] for key in alone_row})
    assert int(state.learnt.updates) == (100 * 4 if name == "dpg" else 2 * 3)
    assert np.isfinite(row["q/loss"])
    observation = np.asarray(state.interaction.observation)
    assert len(np.unique(observation, axis=0)) == config.envs  # no two environments go the same way
    largest = getattr(state.buffer, "largest", ())
    for leaf in jax.tree.leaves((state.learnt, state.step, row, largest)):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8 and all(np.array_equal(copy, copies[0], equal_nan=True) for copy in copies)
    state, _ = single(jax.device_put(state, jax.devices()[0]))  # one device goes on
    if name == "dqn":
        tree = np.asarray(state.buffer.tree)
        np.testing.assert_allclose(tree[1], tree[len(tree) // 2 :].sum(), rtol=1e-5)


@pytest.mark.parametrize(("slots", "streams"), [(32, 8), (5, 3)])
def test_priorities_come_back_as_the_tree_they_were(slots, streams):
    values = np.float32(np.random.default_rng(0).uniform(size=slots * streams))
    buffer = prioritised.init(jnp.zeros(()), slots=slots, streams=streams)
    buffer = JIT(prioritised.update)(buffer, np.arange(slots * streams), values)
    flat = JIT(anakin._flat)({"buffer": buffer})["buffer"]
    np.testing.assert_array_equal(flat.tree, values.reshape(slots, streams))
    back = JIT(anakin._trees)({"buffer": flat})["buffer"]
    np.testing.assert_array_equal(back.tree, buffer.tree)
    assert back.largest == buffer.largest


def test_devices_draw_for_themselves():
    """Keys of minibatches and of learning's noise are of one device alone; all agree on the count of steps."""
    env = envs.make("CartPole-v1")
    bits = lambda key: jax.random.bits(key, (), np.uint32).astype(np.float32)
    empty = replay.Learnt({"seen": np.zeros((8, 2), np.float32), "steps": np.int32(0)}, (), (), np.int32(0))

    def learn(learnt, batch, noise, before, after):
        seen = jax.lax.all_gather(jnp.stack([batch.weights[0, 0], noise[0]]), "data")
        return learnt._replace(params={"seen": seen, "steps": after}), batch.reward, {}

    random = lambda params, observation, key, env_steps: (jnp.zeros(len(observation), np.int32),) * 2
    learner = replay.Learner(lambda key: empty, random, random, bits, learn, None)
    drawn = replay.uniform()
    memory = drawn._replace(
        draw=lambda buffer, key, n: (
            drawn.draw(buffer, jax.random.key(0), n)[0],
            jnp.full(n, bits(key)),
            np.zeros(n, np.int32),
        )
    )
    make = lambda config, env, axis_name=None: replay.make(env, learner, config, memory, axis_name=axis_name)
    config = small("dqn", warmup=8, rounds=1, updates=1)[1]
    agent = anakin.shard(make, config, env, make_mesh("data=8"))
    state, _ = JIT(lambda key: agent.step(agent.init(key)))(jax.random.key(0))
    seen = np.asarray(state.params["seen"])
    assert all(len(np.unique(column)) == 8 for column in seen.T)
    assert int(state.params["steps"]) == config.envs * config.steps == agent.env_steps


@pytest.mark.parametrize(
    ("form", "count"),
    [("shard", 4), ("pmap", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("shard", 2), ("pmap", 4)))],
)
def test_two_and_four_devices(form, count):
    make, config = CASES["off_policy_actor_critic"]
    env, (start, (alone, row), _) = envs.make("CartPole-v1"), run("off_policy_actor_critic")
    mesh = make_mesh(f"data={count}", devices=jax.devices()[:count])
    agent = anakin.shard(make, config, env, mesh) if form == "shard" else anakin.pmap(make, config, env, count)
    state, other = JIT(agent.step)(start) if form == "shard" else agent.step(start)
    close(jax.tree.map(floats, (alone, row)), jax.tree.map(floats, (state, other)))


@pytest.mark.slow
def test_dqn_learns_cartpole_on_two_devices():
    """With the settings of one device and half their steps, to where they lead on one: nearly 500 steps upright."""
    env = envs.make("CartPole-v1")
    config, steps = PRESETS["dqn", "CartPole-v1"]
    mesh = make_mesh("data=2", devices=jax.devices()[:2])
    updates = steps // 2 // (config.envs * config.rounds)
    agent = anakin.shard(catalogue.find("dqn").make, dataclasses.replace(config, anneal=updates), env, mesh)
    state = jax.jit(lambda key: jax.lax.scan(agent.step, agent.init(key), length=updates)[0])(jax.random.key(0))
    params = jax.device_put(state.params, jax.devices()[0])
    returns = jax.jit(lambda key: evaluate(agent, env, params, key).returns)(jax.random.key(1))
    assert returns.mean() > 450
