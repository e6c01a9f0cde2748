"""What holds for every agent with replay: known values are learnt, runs repeat, batch and resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import checkpoint
from jaxrl.agents import continuous, ddpg, dpg, dqn, networks, sac, td3
from jaxrl.envs import probes

SMALL = dict(hidden=(16,), rounds=250, envs=4, batch=16, capacity=4_000, warmup=40, discount=0.8, learning_rate=1e-2)
ACTOR = dict(actor_learning_rate=5e-3, target_rate=0.05)
CONFIGS = {
    "dqn": dqn.DQNConfig(
        **SMALL, target_every=40, epsilon_end=0.3, epsilon_steps=100, double=True, dueling=True, huber=True
    ),
    "dqn plain": dqn.DQNConfig(
        **SMALL,
        target_every=40,
        epsilon_end=0.3,
        epsilon_steps=100,
    ),
    "dqn n-step prioritised": dqn.DQNConfig(
        **SMALL, target_every=40, epsilon_end=0.1, epsilon_steps=100, n_step=2, prioritised=True
    ),
    "ddpg": ddpg.DDPGConfig(**SMALL, **ACTOR, noise=0.5),
    "td3": td3.TD3Config(**SMALL, **ACTOR, noise=0.5, target_noise=0.02),
    "sac": sac.SACConfig(**SMALL, **ACTOR, temperature=0.01, target_entropy=-9.0),
    "sac discrete": sac.SACConfig(**SMALL, **ACTOR, temperature=0.01, target_entropy=0.0),
}
PAIRS = [
    ("dqn", "Probe-Delay"),
    pytest.param("dqn plain", "Probe-Policy", marks=pytest.mark.slow),
    pytest.param("dqn n-step prioritised", "Probe-Successor", marks=pytest.mark.slow),
    pytest.param("ddpg", "Probe-Successor", marks=pytest.mark.slow),
    ("td3", "Probe-Policy"),
    ("sac", "Probe-Delay"),
    pytest.param("sac discrete", "Probe-Delay", marks=pytest.mark.slow),
]


def make(name, env, **changes):
    module = {"dqn": dqn, "ddpg": ddpg, "td3": td3, "sac": sac}[name.split()[0]]
    return module.make(dataclasses.replace(CONFIGS[name], **changes), env)


def is_continuous(name):
    return name in ("ddpg", "td3", "sac")


def trained(agent, steps, key=0):
    program = jax.jit(lambda key: jax.lax.scan(agent.step, agent.init(key), length=steps))
    return program(jax.random.key(key))


def values(name, env, params, observations):
    """What the agent thinks that its best actions are worth."""
    config = CONFIGS[name]
    if name.startswith("dqn"):
        q = dqn.q_network(config, env).step(params, observations, ())[0]
        return q.max(axis=-1)
    if name == "sac discrete":
        critic = networks.action_values(
            env.observation_space, env.action_space, sizes=config.hidden, activation=jax.nn.relu
        )
        return jax.vmap(lambda p: critic.step(p, observations, ())[0])(params["critic"]).min(axis=0).max(axis=-1)
    critics = continuous.critics(env, count=config.critics, sizes=config.hidden)
    if name == "sac":
        actor = sac.gaussian(config, env).actor
        action = jnp.tanh(actor.step(params["actor"], observations, ())[0].mean)
    else:
        action = continuous.deterministic_actor(env, sizes=config.hidden).step(params["actor"], observations, ())[0]
    return critics.apply(params["critic"], observations, action).min(axis=0)


@pytest.mark.parametrize(("name", "probe"), PAIRS)
def test_probes_are_solved(name, probe):
    known = probes.PROBES[probe](continuous=is_continuous(name))
    agent = make(name, known.env)
    state, metrics = trained(agent, 4)
    observations = jnp.asarray(known.observations)
    expected = known.values(0.8)
    np.testing.assert_allclose(values(name, known.env, state.params, observations), expected, atol=0.12)
    for observation, best in zip(observations, known.actions, strict=True):
        action, _ = agent.act(state.params, observation, (), None)
        if best >= 0:
            assert (float(action[0]) > 0.8) == bool(best) if is_continuous(name) else int(action) == best
    assert np.isfinite(np.asarray(metrics["q/loss"])[-1])


def test_dpg_learns_without_replay():
    known = probes.policy(continuous=True)
    config = dpg.DPGConfig(hidden=(16,), learning_rate=1e-2, actor_learning_rate=3e-3, rounds=250, noise=0.5)
    agent = dpg.make(config, known.env)
    state, _ = trained(agent, 4)
    observations, best = jnp.asarray(known.observations), jnp.array([[-1.0], [1.0]])
    actions = jax.vmap(lambda o: agent.act(state.params, o, (), None)[0])(observations)
    np.testing.assert_allclose(actions, best, atol=0.2)
    q = continuous.critics(known.env, count=1, sizes=(16,)).apply(state.params["critic"], observations, best)[0]
    np.testing.assert_allclose(q, known.values(0.8), atol=0.15)


def bits(tree):
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    return [raw(x) for x in jax.tree.leaves(tree)]


def assert_same(a, b):
    for x, y in zip(bits(a), bits(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "name",
    [
        "dqn n-step prioritised",
        pytest.param("td3", marks=pytest.mark.slow),
        pytest.param("sac", marks=pytest.mark.slow),
    ],
)
def test_runs_repeat_and_resume_bitwise(name, tmp_path):
    known = probes.delay(continuous=is_continuous(name))
    agent = make(name, known.env, rounds=15)
    init, step = jax.jit(agent.init), jax.jit(agent.step)
    start = init(jax.random.key(0))
    first, _ = step(start)
    second, metrics = step(first)
    assert_same(second, step(step(init(jax.random.key(0)))[0])[0])
    assert int(second.step) == 2
    assert int(second.learnt.updates) == 2 * 15 - 40 // 4 + 1  # none before the warm-up's end
    checkpoint.save(tmp_path, 1, first)
    restored, _ = checkpoint.restore(tmp_path, jax.eval_shape(agent.init, jax.random.key(0)))
    assert_same(step(restored)[0], second)

    other = init(jax.random.key(1))
    same = [np.array_equal(x, y) for x, y in zip(bits(other.params), bits(start.params), strict=True)]
    kernels = [s for s, x in zip(same, bits(start.params), strict=True) if x.ndim >= 2 and x.any()]
    assert kernels and not any(kernels)  # another seed begins elsewhere


def test_a_batch_of_seeds_and_rates_is_so_many_runs():
    name = "ddpg"
    known = probes.delay(continuous=is_continuous(name))

    def run(key, rate):
        agent = make(name, known.env, learning_rate=rate, discount=0.5 + rate, rounds=15, hidden=(4,))
        state, metrics = agent.step(agent.init(key))
        return state.params, metrics

    keys, rates = jax.random.split(jax.random.key(0), 3), jnp.array([1e-3, 1e-2, 1e-1])
    together = jax.jit(jax.vmap(run))(keys, rates)
    one = jax.jit(run)
    for i in range(3):
        alone = one(keys[i], rates[i])
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("ddpg", marks=pytest.mark.slow), "sac"])
def test_the_actor_loss_leaves_the_critic_alone(name):
    """With the critic's rate at 0 nothing moves the critic, though the actor learns."""
    agent = make(name, probes.delay(continuous=True).env, learning_rate=0.0, rounds=15)
    state, after = jax.jit(lambda key: (state := agent.init(key), agent.step(state)[0]))(jax.random.key(0))
    assert_same(after.params["critic"], state.params["critic"])
    parts = zip(bits(after.params["actor"]), bits(state.params["actor"]), strict=True)
    assert not any(np.array_equal(x, y) for x, y in parts)


def test_td3_follows_at_every_second_update():
    """Actor and slow copies rest at odd updates, the critics never do."""
    agent = make("td3", probes.delay(continuous=True).env, rounds=1, warmup=4)
    follow = lambda state, _: (agent.step(state)[0], state)
    rows = jax.jit(lambda key: jax.lax.scan(follow, agent.init(key), length=6)[1].learnt)(jax.random.key(0))
    states = [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(6)]
    pairs = list(zip(states, states[1:], strict=False))
    moved = lambda part: [
        any(not np.array_equal(x, y) for x, y in zip(bits(part(a)), bits(part(b)), strict=True)) for a, b in pairs
    ]
    assert moved(lambda s: s.params["critic"]) == [True] * 5
    assert moved(lambda s: s.params["actor"]) == [False, True, False, True, False]
    assert moved(lambda s: s.target) == [False, True, False, True, False]
    assert not np.array_equal(*(bits(states[0].params["critic"])[1][i] for i in (0, 1)))  # twins are no copies
