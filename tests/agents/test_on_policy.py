"""The on-policy agents: exact relations on tiny programs, probes with known values, and (slow) learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import envs
from jaxrl.agents import a2c, networks, on_policy, ppo, qac, reinforce, trpo
from jaxrl.agents.evaluate import evaluate
from jaxrl.envs import probes
from jaxrl.envs.env import Box, Discrete, Env, TimeStep

TINY = ppo.PPOConfig(envs=4, steps=8, epochs=2, minibatches=2, hidden=(8,), learning_rate=1e-2)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny():
    agent = ppo.make(TINY, envs.make("CartPole-v1"))
    return agent, jax.jit(agent.init), jax.jit(agent.step)


def judged(env, actor, critic, state, **knobs):
    return jax.jit(lambda state: on_policy.rollout(env, actor, critic, state, **knobs))(state)


def fixture_env() -> Env:
    """The worked example of truncated GAE: rewards and values by time; cut at the third step, at a value of 0.4."""
    rewards, values = jnp.array([1.0, 0.0, -1.0, 2.0, 0.5]), jnp.array([0.5, 1.0, -0.5, 0.2, 0.3, 0.7])

    def reset(key):
        return jnp.int32(3), values[3:4]

    def step(key, time, action):
        successor = jnp.where(time == 2, 0.4, values[time + 1])[None]
        return time + 1, TimeStep(successor, rewards[time], jnp.zeros((), bool), time == 2, successor)

    return Env("Fixture", reset, step, Box(-1.0, 1.0, (1,)), Discrete(2))


def test_a_truncated_episode_bootstraps_from_its_successor():
    env = fixture_env()
    actor = networks.actor(env.observation_space, env.action_space, sizes=(4,))
    reader = lambda params, x, *rest: (x[..., 0], rest[-1])  # the critic reads the value off the observation
    critic = networks.Network(lambda key: {}, reader, reader, lambda: ())
    agent = a2c.make(a2c.A2CConfig(envs=2, steps=5), env, actor=actor, critic=critic)
    state = jax.jit(agent.init)(jax.random.key(0))
    start = state.interaction._replace(env=jnp.zeros(2, jnp.int32), observation=jnp.full((2, 1), 0.5))
    state = state._replace(interaction=start)
    _, batch, _ = judged(env, actor, critic, state, steps=5, discount=0.9, lambda_=0.8)
    np.testing.assert_allclose(batch.advantage[:, 0], [0.283424, -1.5508, -0.14, 2.6676, 0.83], rtol=1e-5)
    np.testing.assert_allclose(batch.target, batch.advantage + batch.value, rtol=1e-6)


@pytest.mark.parametrize(
    ("recurrent", "cell"),
    [
        pytest.param(0, "gru", marks=SLOW),
        pytest.param(4, "gru", marks=SLOW),
        (4, "lstm"),
        pytest.param(4, "tanh", marks=SLOW),
    ],
)
def test_the_first_minibatch_is_on_policy(recurrent, cell):
    own = {"recurrent": recurrent, "cell": cell}
    config = dataclasses.replace(
        TINY, epochs=1, minibatches=1, **own, normalise_observations=True, normalise_rewards=True
    )
    agent = ppo.make(config, envs.make("CartPole-v1"))
    run = jax.jit(lambda key: jax.lax.scan(agent.step, agent.init(key), length=3))
    state, rows = run(jax.random.key(0))
    assert (rows["policy/kl"] >= 0).all() and (rows["policy/kl"] < 1e-10).all() and not rows["policy/clip"].any()
    assert state.params["observations"].count == 3 * 32
    assert np.abs(np.asarray(state.params["observations"].mean)).max() > 0


def test_the_gradient_of_a2c_is_that_of_ppo_before_its_first_step(tiny):
    env = envs.make("CartPole-v1")
    config = dataclasses.replace(TINY, entropy=0.02, normalise_advantages=False)
    plain = a2c.A2CConfig(envs=4, steps=8, hidden=(8,), entropy=0.02)
    actor, critic = networks.actor_and_critic(config, env, None, None)
    _, init, _ = tiny
    state = init(jax.random.key(0))

    @jax.jit
    def gradients(state):
        _, batch, _ = on_policy.rollout(env, actor, critic, state, steps=8, discount=0.99, lambda_=0.95)
        losses = (
            (lambda p: ppo.loss(config, actor, critic, p, batch)[0]),
            (lambda p: a2c.loss(plain, actor, critic, p, batch)[0]),
        )
        return [jax.grad(loss)(on_policy.trained(state.params)) for loss in losses]

    clipped, basic = gradients(state)
    for x, y in zip(jax.tree.leaves(clipped), jax.tree.leaves(basic), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(basic)) > 1e-2


def same(x, y):
    leaves = lambda tree: [
        jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in jax.tree.leaves(tree)
    ]
    return all(bool((a == b).all()) for a, b in zip(leaves(x), leaves(y), strict=True))


def test_a_seed_repeats_itself_and_another_differs(tiny):
    _, init, step = tiny
    first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    kernel = lambda state: state.params["actor"]["params"]["torso"]["layer_0"]["kernel"]
    assert same(first, again) and not (kernel(first) == kernel(other)).any()
    assert not (first.interaction.observation == other.interaction.observation).any()
    one, two = step(step(first)[0]), step(step(again)[0])
    assert same(one, two) and one[0].step == 2


def test_a_run_goes_on_bitwise_from_its_state(tiny):
    _, init, step = tiny
    state, _ = step(init(jax.random.key(0)))
    saved = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    restored = jax.tree.map(jnp.asarray, saved)
    restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
    assert same(step(state), step(restored))


def test_seeds_and_learning_rates_run_side_by_side(tiny):
    _, init, step = tiny
    env = envs.make("CartPole-v1")

    def run(key, rate):
        agent = ppo.make(
            dataclasses.replace(TINY, learning_rate=rate, discount=TINY.discount + rate - TINY.learning_rate), env
        )
        return agent.step(agent.init(key))[0].params["actor"]

    keys, rates = jax.random.split(jax.random.key(0), 3), jnp.array([3e-3, TINY.learning_rate, 0.0])
    together = jax.jit(jax.vmap(run))(keys, rates)
    start = init(keys[1])
    alone, still = step(start)[0].params["actor"], init(keys[2]).params["actor"]
    for x, y, z in zip(*map(jax.tree.leaves, (together, alone, still)), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(x[2], z, rtol=1e-6, atol=1e-7)  # with a rate of 0 nothing moves
        assert not np.allclose(x[0], x[1], rtol=1e-3, atol=1e-4)


def test_shuffles_are_permutations():
    orders = np.asarray(on_policy.shuffles(jax.random.key(0), 300, 3))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(300), (3, 1)))
    assert len({tuple(order) for order in orders}) == 3
    first = np.asarray(on_policy.shuffles(jax.random.key(1), 7, 4000))[:, 0]  # each index comes first equally often
    np.testing.assert_allclose(np.bincount(first, minlength=7) / 4000, 1 / 7, atol=4 * np.sqrt(1 / 7 * 6 / 7 / 4000))


def test_target_kl_stops_an_update(tiny):
    _, init, step = tiny
    start = init(jax.random.key(0))
    bounded = ppo.make(dataclasses.replace(TINY, target_kl=0.0), envs.make("CartPole-v1"))
    assert step(start)[0].optimizer[1].count == 4
    assert 1 <= jax.jit(bounded.step)(start)[0].optimizer[1].count < 4


def test_an_annealed_rate_ends_at_zero():
    assert on_policy.annealed(0.1, jnp.int32(0), 10) == pytest.approx(0.1)
    assert on_policy.annealed(0.1, jnp.int32(5), 10) == pytest.approx(0.05)
    assert on_policy.annealed(0.1, jnp.int32(12), 10) == 0.0
    assert on_policy.annealed(0.1, jnp.int32(12), 0) == 0.1
    with pytest.raises(ValueError, match="anneal is -1; give the number of updates"):
        on_policy.annealed(0.1, jnp.int32(0), -1)


def test_state_numbers_are_not_normalised():
    agent = ppo.make(ppo.PPOConfig(envs=2, normalise_observations=True), envs.make("GridWorld-5x5"))
    with pytest.raises(ValueError, match="GridWorld-5x5 observes .* cannot be normalised"):
        jax.eval_shape(agent.init, jax.random.key(0))


def test_episodes_begin_again_without_old_returns():
    env = envs.make("CartPole-v1")
    config = reinforce.ReinforceConfig(envs=2, normalise_rewards=True, hidden=(4,))
    actor, critic = networks.actor_and_critic(config, env, None, None)
    optimizer = optax.identity()
    state = on_policy.init(config, env, actor, critic, optimizer, jax.random.key(0))
    state = state._replace(rewards=state.rewards._replace(returns=jnp.array([4.9, 4.9])))
    again = on_policy.begin_again(env, actor, critic, state)
    assert again.rewards.returns.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", [ppo.make, pytest.param(trpo.make, marks=SLOW)])
def test_forbidden_actions_are_never_taken(make):
    env = envs.make("MaskedChoice")
    config = {
        ppo.make: TINY,
        trpo.make: trpo.TRPOConfig(envs=4, steps=8, hidden=(8,), value_epochs=1, value_minibatches=1),
    }[make]
    agent = make(config, env)
    actor, _ = networks.actor_and_critic(config, env, None, None)

    @jax.jit
    def run(key):
        state, metrics = agent.step(agent.init(key))
        return state, metrics, on_policy.gather(env, actor, state, steps=32)[1]

    state, metrics, trajectory = run(jax.random.key(0))
    allowed = jnp.take_along_axis(trajectory.mask, trajectory.action[..., None], axis=-1)
    assert allowed.all() and not trajectory.mask.all()
    assert all(np.isfinite(v) for name, v in metrics.items() if not name.startswith("episode"))
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(state.params))


def test_reinforce_looks_at_first_episodes_only():
    done = jnp.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]], bool)
    whole, cut = (reinforce.first_episodes(done, whole=whole) for whole in (True, False))
    np.testing.assert_array_equal(whole.T, [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(cut.T, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_learns_from_cut_episodes_if_a_baseline_stands_for_the_rest(baseline):
    config = reinforce.ReinforceConfig(envs=2, steps=4, baseline=baseline, hidden=(4,))
    agent = reinforce.make(config, envs.make("Pendulum-v1"))  # its episodes have 200 steps
    before = jax.jit(agent.init)(jax.random.key(0))
    after, metrics = jax.jit(agent.step)(before)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before.params["actor"], after.params["actor"])
    assert set(jax.tree.leaves(moved)) == {baseline}
    assert metrics["episode/count"] == 0


def test_reinforce_without_baseline_weighs_by_plain_returns():
    env = probes.discount().env
    config = reinforce.ReinforceConfig(envs=2, steps=4, baseline=False, hidden=(4,), discount=0.5)
    actor, critic = networks.actor_and_critic(config, env, None, networks.nothing())
    agent = reinforce.make(config, env)
    state = jax.jit(agent.init)(jax.random.key(0))
    _, batch, _ = judged(env, actor, critic, state, steps=4, discount=0.5, lambda_=1.0)
    np.testing.assert_allclose(batch.target[:, 0], [0.5, 1.0, 0.5, 1.0])
    _, metrics = jax.jit(agent.step)(state)
    assert metrics["episode/count"] == 2 and metrics["episode/return"] == 1.0 and metrics["episode/length"] == 2.0


def test_faults_are_named():
    cart, pendulum = envs.make("CartPole-v1"), envs.make("Pendulum-v1")
    with pytest.raises(ValueError, match="expected a divisor of 32"):
        ppo.make(dataclasses.replace(TINY, minibatches=5), cart)
    with pytest.raises(ValueError, match="whole streams"):
        ppo.make(dataclasses.replace(TINY, recurrent=4, minibatches=8), cart)
    with pytest.raises(ValueError, match="expected Discrete"):
        qac.make(qac.QACConfig(), pendulum)
    with pytest.raises(ValueError, match="neither action masks"):
        qac.make(qac.QACConfig(), envs.make("MaskedChoice"))


AGENTS = {
    "ppo": (ppo.make, ppo.PPOConfig(envs=8, steps=16, hidden=(16,), learning_rate=1e-2, entropy=0.0), 60),
    "a2c": (a2c.make, a2c.A2CConfig(envs=8, steps=16, hidden=(16,), learning_rate=1e-2), 300),
    "trpo": (trpo.make, trpo.TRPOConfig(envs=8, steps=16, hidden=(16,), max_kl=0.03, value_rate=1e-2), 60),
    "reinforce": (
        reinforce.make,
        reinforce.ReinforceConfig(envs=32, steps=4, hidden=(16,), learning_rate=1e-2, value=1.0),
        300,
    ),
    "qac": (
        qac.make,
        qac.QACConfig(envs=8, steps=16, hidden=(16,), learning_rate=1e-2, critic_learning_rate=1e-2),
        400,
    ),
}
PROBES = {name: make for name, make in probes.PROBES.items() if name != "Probe-Loss"}


def check_probe(agent_name, probe):
    make, config, updates = AGENTS[agent_name]
    config = dataclasses.replace(config, discount=0.8)
    agent = make(config, probe.env)
    run = jax.jit(lambda key: jax.lax.scan(lambda s, _: agent.step(s), agent.init(key), length=updates)[0])
    params = run(jax.random.key(0)).params
    observations = jnp.asarray(probe.observations)
    actions = jax.vmap(lambda x: agent.act(params, x, agent.memory(), None)[0])(observations)
    known = probe.actions >= 0
    np.testing.assert_array_equal(np.asarray(actions)[known], probe.actions[known])
    space = probe.env.observation_space, probe.env.action_space
    if agent_name == "qac":
        q, _ = networks.action_values(*space, sizes=config.hidden).step(params["critic"], observations, ())
        values = jnp.take_along_axis(q, actions[:, None], axis=-1)[:, 0]
    else:
        values, _ = networks.critic(space[0], sizes=config.hidden).step(params["critic"], observations, ())
    np.testing.assert_allclose(values, probe.values(0.8), atol=0.15 * max(1.0, np.abs(probe.values(0.8)).max()))


@pytest.mark.parametrize("agent", ["ppo", "reinforce", "qac"])
def test_probes_that_tell_actions_apart(agent):
    check_probe(agent, probes.policy())


@pytest.mark.slow
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("agent", AGENTS)
def test_every_probe(agent, probe):
    if agent == "reinforce" and probe == "Probe-Truncation":
        pytest.skip("its baseline is the mean of its own returns: it has nothing to bootstrap from")
    check_probe(agent, PROBES[probe]())


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_memory_solves_what_a_glance_cannot(cell):
    env = envs.make("Recall-5")
    config = ppo.PPOConfig(envs=16, steps=20, minibatches=4, hidden=(16,), learning_rate=5e-3, cell=cell)
    returns = {}
    for recurrent in (0, 16):
        agent = ppo.make(dataclasses.replace(config, recurrent=recurrent), env)

        def run(key, agent=agent):
            state, _ = jax.lax.scan(lambda s, _: agent.step(s), agent.init(key), length=150)
            return evaluate(agent, env, state.params, key, episodes=200).returns.mean()

        returns[recurrent] = float(jax.jit(run)(jax.random.key(0)))
    assert returns[16] >= 0.95 and 0.35 <= returns[0] <= 0.65, returns


@pytest.mark.slow
def test_ppo_learns_cart_pole():
    env = envs.make("CartPole-v1")
    agent = ppo.make(ppo.PPOConfig(envs=64, steps=16, learning_rate=2.5e-3, anneal=488), env)

    def run(key):
        state, _ = jax.lax.scan(lambda s, _: agent.step(s), agent.init(key), length=488)
        return evaluate(agent, env, state.params, key, episodes=32).returns.mean()

    assert np.mean([jax.jit(run)(jax.random.key(seed)) for seed in range(3)]) >= 470
