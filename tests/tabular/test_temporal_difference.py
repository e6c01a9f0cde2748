"""Updates against float64 loops on fixed streams, identities between methods, the figures of Sutton and Barto."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import td as errors
from jaxrl.tabular import dynamic_programming, gridworld, make_mdp
from jaxrl.tabular import episodes as experience
from jaxrl.tabular import mdp as models
from jaxrl.tabular import temporal_difference as td
from tests.oracles import tabular as oracle

DISCOUNT, STEP_SIZE, EPSILON = 0.9, 0.3, 0.2
TARGETS = {target.__name__: target for target in (td.sarsa, td.expected_sarsa, td.q_learning, td.tree_backup)}


# Longer runs are worth a better compilation than the tests' usual one.
optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@pytest.fixture(scope="module")
def mdp():
    rng = np.random.default_rng(3)
    return make_mdp(rng.dirichlet(np.ones(6), size=(6, 3)), rng.normal(size=(6, 3)), np.arange(6) == 5)


@pytest.fixture(scope="module")
def stream(mdp):
    """58 steps, several episodes, the last of them and another one cut."""
    stream = experience.sample_stream(mdp, jax.random.key(5), models.uniform_policy(mdp), steps=58, discount=DISCOUNT)
    return stream._replace(last=stream.last.at[25].set(True))


def plain(stream):
    rows = zip(*(np.asarray(x).tolist() for x in stream), strict=True)
    return [(s, a, r, discount == 0, successor, b, last) for s, a, r, discount, successor, b, last in rows]


def first_values(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_stream_is_a_fair_test(stream):
    terminated = stream.discount_t == 0
    assert 3 <= terminated.sum() < 20 and not terminated[25] and not terminated[-1] and stream.last[-1]
    follows_on = (stream.s_t[:-1] == stream.s_tm1[1:]) & (stream.a_t[:-1] == stream.a_tm1[1:])
    assert follows_on[~terminated[:-1]].all()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_control_is_the_textbook(stream, target, n):
    q = first_values((6, 3))
    learnt, path = td.control_from_stream(
        stream, q, TARGETS[target], step_size=STEP_SIZE, epsilon=EPSILON, n=n, record=jnp.sum
    )
    expected = oracle.n_step_control(
        plain(stream), q, target=target, n=n, discount=DISCOUNT, step_size=STEP_SIZE, epsilon=EPSILON
    )
    assert np.abs(learnt - expected).max() < 1e-5
    assert path.shape == (58,) and jnp.allclose(path[-1], learnt.sum())


def test_one_step_targets_are_the_losses(stream):
    """An update moves the pair's value by step_size times the error of jaxrl.losses.td."""
    q = jnp.asarray(first_values((6, 3)), jnp.float32)
    one = jax.tree.map(lambda x: x[7:8], stream)
    probs = models.epsilon_greedy(q[one.s_t], EPSILON, ties=0.0)
    rest = (q[one.s_tm1], one.a_tm1, one.r_t, one.discount_t, q[one.s_t])
    expected = {
        td.sarsa: errors.sarsa(*rest, one.a_t),
        td.expected_sarsa: errors.expected_sarsa(*rest, probs),
        td.tree_backup: errors.expected_sarsa(*rest, probs),
        td.q_learning: errors.q_learning(*rest),
    }
    for target, error in expected.items():
        learnt, _ = td.control_from_stream(one, q, target, step_size=STEP_SIZE, epsilon=EPSILON)
        change = jnp.zeros_like(q).at[one.s_tm1[0], one.a_tm1[0]].set(STEP_SIZE * error[0])
        assert jnp.allclose(learnt - q, change, atol=1e-6)


def test_double_q_learning_is_the_textbook(stream):
    q, key, coins = first_values((2, 6, 3)), jax.random.key(8), []
    chain = jax.random.clone(key)
    for _ in range(58):
        chain, coin = jax.random.split(chain)
        coins.append(int(jax.random.bernoulli(coin)))
    learnt, _ = td.double_q_learning_from_stream(stream, key, q, step_size=STEP_SIZE)
    assert 15 < sum(coins) < 45
    expected = oracle.double_q(plain(stream), q, coins, discount=DISCOUNT, step_size=STEP_SIZE)
    assert np.abs(learnt - expected).max() < 1e-5


@pytest.mark.parametrize("trace", ["accumulating", "replacing"])
def test_td_lambda_is_the_textbook(mdp, stream, trace):
    v = first_values(6)
    learner = td._trace_learner(models.uniform_policy(mdp), DISCOUNT, 0.8, trace, None)
    state = (jnp.asarray(v, jnp.float32), jnp.zeros(6))
    (learnt, _), _ = experience.learn_from_stream(stream, jax.random.key(0), learner, state, step_size=STEP_SIZE)
    expected = oracle.td_lambda(
        plain(stream), v, discount=DISCOUNT, lambda_=0.8, step_size=STEP_SIZE, trace=trace
    )  # fmt: skip
    assert np.abs(learnt - expected).max() < 1e-5


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_backward_view_is_forward_view_offline(mdp, stream, lambda_):
    """With the values held still over an episode both views add up to the same change."""
    v, episode = jnp.asarray(first_values(6), jnp.float32), max(oracle.episodes_of(plain(stream)), key=len)
    learner = td._trace_learner(models.uniform_policy(mdp), DISCOUNT, lambda_, "accumulating", None)

    def step(carry, transition):
        z, change = carry
        moved, z = learner.update((v, z), jax.tree.map(lambda x: x[None], transition), 1.0, None)
        return (z, change + moved - v), None

    begin = plain(stream).index(episode[0])
    its = jax.tree.map(lambda x: x[begin : begin + len(episode)], stream)
    (_, change), _ = jax.lax.scan(step, (jnp.zeros(6), jnp.zeros(6)), its)
    expected = oracle.lambda_updates(
        episode, np.asarray(v, np.float64), discount=DISCOUNT, lambda_=lambda_, step_size=1.0
    )
    assert len(episode) > 5 and np.abs(change - expected).max() < 1e-5


def test_prediction_limits_agree(mdp):
    """TD(lambda = 0) is TD(0); n beyond every episode is Monte Carlo, the truncated return where episodes are cut."""
    run = {"discount": DISCOUNT, "step_size": 0.2, "episodes": 20, "max_steps": 30}
    policy = models.uniform_policy(mdp)
    one = td.prediction(mdp, jax.random.key(2), policy, **run)
    zero = td.td_lambda(mdp, jax.random.key(2), policy, lambda_=0.0, **run)
    assert jnp.allclose(one.values, zero.values, atol=1e-6) and (one.lengths == zero.lengths).all()
    assert one.returns.shape == one.lengths.shape == (20,) and one.record is None
    assert one.lengths.max() <= 30


def test_linear_with_one_feature_to_a_state_is_the_table(mdp, stream):
    run = {"discount": DISCOUNT, "step_size": 0.2, "episodes": 10, "max_steps": 30}
    policy, eye = models.uniform_policy(mdp), jnp.eye(6)
    for method in (td.prediction, partial(td.td_lambda, lambda_=0.5, trace="replacing")):
        table = method(mdp, jax.random.key(2), policy, **run).values
        assert jnp.allclose(method(mdp, jax.random.key(2), policy, features=eye, **run).values, table, atol=1e-6)
    q = jnp.asarray(first_values((6, 3)), jnp.float32)
    update = partial(td.control_from_stream, stream, q, td.sarsa, step_size=0.2, n=2)
    assert jnp.allclose(update()[0], update(features=eye)[0], atol=1e-6)


def test_features_generalise(stream):
    """Two states that share a feature learn together, by the gradient of the linear value."""
    features = jnp.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0.5, 0.5], [0, 0]])
    one, w = jax.tree.map(lambda x: x[:1], stream), jnp.zeros((2, 3))
    learnt, _ = td.control_from_stream(one, w, td.q_learning, step_size=0.5, features=features)
    expected = w.at[:, one.a_tm1[0]].set(0.5 * one.r_t[0] * features[one.s_tm1[0]])
    assert jnp.allclose(learnt, expected, atol=1e-6)


def test_truncated_episodes_bootstrap():
    """One state, reward 1 for ever, episodes of 2 steps: the value is 1 / (1 - discount), not 1 + discount."""
    endless = make_mdp(np.ones((1, 1, 1)), np.ones((1, 1, 1)))
    run = {"discount": 0.5, "step_size": 0.5, "episodes": 60, "max_steps": 2}
    for n in (1, 5):
        assert jnp.allclose(
            td.prediction(endless, jax.random.key(0), jnp.ones((1, 1)), n=n, **run).values, 2.0, atol=1e-4
        )
    for target in (td.sarsa, td.tree_backup):
        learnt = td.control(endless, jax.random.key(0), target, n=3, epsilon=0.1, **run)
        assert jnp.allclose(learnt.values, 2.0, atol=1e-4)
        assert (learnt.lengths == 2).all() and (learnt.returns == 2.0).all()


def test_n_steps_online_are_n_steps_on_the_stream():
    """On a chain whose only path is known the acting loop makes exactly the oracle's updates, flush included."""
    length = 5
    transition = np.zeros((length + 1, 1, length + 1))
    transition[range(length), 0, range(1, length + 1)] = transition[length, 0, length] = 1.0
    rewards = np.random.default_rng(0).normal(size=(length + 1, 1))
    chain = make_mdp(transition, rewards, np.arange(length + 1) == length, np.eye(length + 1)[0])
    episode = [(s, 0, float(np.float32(rewards[s, 0])), s == length - 1, s + 1, 0, s == length - 1) for s in range(5)]
    run = {"discount": DISCOUNT, "step_size": STEP_SIZE, "epsilon": 0.0}
    for n in (1, 9):
        learnt = td.control(chain, jax.random.key(0), td.sarsa, episodes=4, n=n, **run).values
        expected = oracle.n_step_control(4 * episode, np.zeros((6, 1)), target="sarsa", n=n, **run)
        assert np.abs(learnt - expected).max() < 1e-6


def test_vmap_over_seeds_and_step_sizes_is_the_loop(mdp):
    run = partial(td.control, mdp, target=td.sarsa, discount=DISCOUNT, epsilon=EPSILON, episodes=5, max_steps=20, n=2)
    sizes = jnp.array([0.1, 0.5])
    grid = jax.vmap(jax.vmap(lambda key, size: run(key=key, step_size=size), (None, 0)), (0, None))(keys(3), sizes)
    assert grid.values.shape == (3, 2, 6, 3)
    alone = run(key=keys(3)[2], step_size=0.5)
    assert jnp.allclose(grid.values[2, 1], alone.values, atol=1e-6)
    assert (grid.returns[2, 1] == alone.returns).all()


def test_step_sizes_of_episodes(mdp):
    run = partial(td.prediction, mdp, policy=models.uniform_policy(mdp), discount=DISCOUNT, max_steps=20)
    half = run(key=jax.random.key(1), step_size=jnp.array([0.3, 0.3, 0.0, 0.0]), episodes=4, record=lambda v: v)
    assert (half.record[1] == half.record[3]).all() and (half.record[0] != half.record[1]).any()
    constant = run(key=jax.random.key(1), step_size=0.3, episodes=4, record=lambda v: v)
    assert (constant.record[1] == half.record[1]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda mdp: td.control(mdp, jax.random.key(0), td.sarsa, n=0, **RUN), "n is 0"),
        (lambda mdp: td.control(mdp, jax.random.key(0), td.sarsa, values=jnp.zeros(6), **RUN), r"expected \[6, 3\]"),
        (
            lambda mdp: td.control(mdp, jax.random.key(0), td.sarsa, features=jnp.zeros((4, 2)), **RUN),
            r"expected \[S, D\] with S = 6",
        ),
        (lambda mdp: td.double_q_learning(mdp, jax.random.key(0), values=jnp.zeros((6, 3)), **RUN), r"\[2, 6, 3\]"),
    ],
)
def test_faults_are_named(mdp, call, message):
    with pytest.raises(ValueError, match=message):
        call(mdp)


RUN = {"discount": 0.9, "step_size": 0.1, "epsilon": 0.1, "episodes": 2}


def test_unknown_trace_and_ragged_stream(mdp, stream):
    with pytest.raises(ValueError, match="'dutch', expected 'accumulating' or 'replacing'"):
        td._trace_learner(None, 0.9, 0.5, "dutch", None)
    with pytest.raises(ValueError, match=r"expected \[T\] for all"):
        td.control_from_stream(stream._replace(r_t=stream.r_t[:4]), jnp.zeros((6, 3)), td.sarsa, step_size=0.1)


# Learning: averages over many runs against published ones, and against the same averages by plain loops.


def walk_error(n, step_size, runs):
    """Mean and standard error of the root mean square error over the first 10 episodes (figure 7.2)."""
    walk = gridworld.random_walk()
    truth = jnp.arange(-9, 10) / 10
    run = lambda key: td.prediction(
        walk, key, models.uniform_policy(walk), discount=1.0, step_size=step_size, episodes=10, n=n,
        record=lambda v: jnp.sqrt(jnp.mean((v[1:-1] - truth) ** 2)),
    ).record.mean()  # fmt: skip
    of_run = optimised(jax.vmap(run))(keys(runs))
    return float(of_run.mean()), float(of_run.std() / runs**0.5)


@pytest.mark.slow
def test_random_walk_as_the_plain_loop():
    mean, standard_error = walk_error(4, 0.4, 600)
    expected = oracle.random_walk_error(np.random.default_rng(0), n=4, step_size=0.4, runs=300)
    assert standard_error < 0.0025 and abs(mean - expected) < 4 * (standard_error**2 + 0.048**2 / 300) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "n, step_size, published", [(1, 0.8, 0.343), (2, 0.6, 0.269), (4, 0.4, 0.254), (16, 0.2, 0.316), (64, 0.05, 0.410)]
)
def test_random_walk_n_step_errors(n, step_size, published):
    """Published: means of 60 runs, so uncertain by 0.007 themselves."""
    mean, standard_error = walk_error(n, step_size, 1000)
    assert standard_error < 0.002 and abs(mean - published) < 0.015


@pytest.mark.slow
def test_random_walk_lambda_errors():
    """Lowest error over step sizes, of 30 runs where published; intermediate lambdas beat both ends."""
    walk, truth = gridworld.random_walk(), jnp.arange(-9, 10) / 10
    policy = models.uniform_policy(walk)
    sizes = jnp.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
    record = lambda v: jnp.sqrt(jnp.mean((v[1:-1] - truth) ** 2))

    def error(lambda_, size):
        run = lambda key: td.td_lambda(
            walk, key, policy, discount=1.0, step_size=size, lambda_=lambda_, episodes=10, record=record
        ).record.mean()
        return jnp.nan_to_num(jax.vmap(run)(keys(400)).mean(), nan=jnp.inf)

    published = {0.0: 0.348, 0.4: 0.285, 0.8: 0.271, 0.9: 0.298, 0.95: 0.339, 1.0: 0.523}
    lambdas = jnp.array(list(published))
    best = optimised(jax.vmap(jax.vmap(error, (None, 0)), (0, None)))(lambdas, sizes).min(axis=1)
    expected = jnp.array(list(published.values()))
    assert (jnp.abs(best - expected) < jnp.array([0.015, 0.015, 0.015, 0.015, 0.015, 0.04])).all(), best
    assert best.argmin() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, late, early", [("sarsa", -26.7, -72.5), ("q_learning", -50.8, -81.3), ("expected_sarsa", -21.1, -56.8)]
)
def test_cliff_walking(target, late, early):
    """Mean returns of episodes 401-500 and 1-100 (figure 6.4, example 6.6); published: 50 runs, +- 1."""
    run = lambda key: (
        td.control(
            gridworld.cliff_walking(), key, TARGETS[target], discount=1.0, step_size=0.5, epsilon=0.1, episodes=500
        ).returns
    )
    returns = optimised(jax.vmap(run))(keys(100))
    assert abs(returns[:, 400:].mean() - late) < 3.5
    assert abs(returns[:, :100].mean() - early) < 4.0


@pytest.mark.slow
def test_windy_grid_world():
    """Episodes completed in 8000 steps of Sarsa (example 6.5): mean 160, of 142 to 176."""
    run = lambda key: (
        td.control(
            gridworld.windy_grid_world(), key, td.sarsa, discount=1.0, step_size=0.5, epsilon=0.1, episodes=230
        ).lengths
    )
    lengths = optimised(jax.vmap(run))(keys(50))
    completed = (jnp.cumsum(lengths, axis=1) <= 8000).sum(axis=1)
    assert abs(completed.mean() - 160) < 5 and completed.min() > 125 and completed.max() < 190
    assert lengths.min() == 15


@pytest.mark.slow
def test_sarsa_and_q_learning_on_the_grid():
    """Sections 7.2 and 7.3 of Zhao: from the top left corner to the target; the best return is -10."""
    layout = dataclasses.replace(gridworld.ZHAO, start=(0, 0))
    mdp = gridworld.grid_world(
        layout, target_reward=0.0, forbidden_reward=-10.0, boundary_reward=-10.0, step_reward=-1.0, episodic=True
    )
    assert dynamic_programming.value_iteration(mdp, discount=1.0).values[0] == -10
    for target in (td.sarsa, td.expected_sarsa, td.q_learning):
        run = lambda key, target=target: td.control(
            mdp, key, target, discount=0.9, step_size=0.1, epsilon=0.1, episodes=500
        )
        learnt = optimised(jax.vmap(run))(keys(5))
        late = learnt.returns[:, 400:].mean(axis=1)
        assert (late >= -22).all() and (late <= -10).all()
        if target is td.q_learning:
            # Greedy from the start: each of the policies earns the best return within 11 moves.
            policies = models.greedy(learnt.values)
            values = jax.vmap(lambda policy: models.bellman(mdp, policy, jnp.zeros(25), discount=1.0))(policies)
            for _ in range(11):
                back = jax.vmap(lambda policy, v: models.bellman(mdp, policy, v, discount=1.0))
                values = back(policies, values)
            assert (values[:, 0] == -10).all()


@pytest.mark.slow
def test_off_policy_q_learning():
    """Figure 7.4 of Zhao: one episode of 100,000 steps of the uniform policy finds the optimal values."""
    mdp = gridworld.grid_world()
    best = dynamic_programming.value_iteration(mdp, discount=0.9).values
    uniform = models.uniform_policy(mdp)
    stream = experience.sample_stream(mdp, jax.random.key(0), uniform, steps=100_000, discount=0.9)
    error = lambda q: jnp.sqrt(jnp.mean((q.max(axis=1) - best) ** 2))
    for first, below_one, final in ((0.0, (22_000, 36_000), 0.01), (10.0, (1000, 7000), 1e-4)):
        _, path = td.control_from_stream(stream, jnp.full((25, 5), first), td.q_learning, step_size=0.1, record=error)
        steps = int((path > 1.0).sum())
        assert below_one[0] < steps < below_one[1] and path[-1] < final


@pytest.mark.slow
def test_double_q_learning_is_not_fooled_by_noise():
    """Example 6.7 of Sutton and Barto: going left earns -0.1 on average, sometimes 1; Q-learning falls for it."""
    transition, reward = np.zeros((4, 10, 4)), np.zeros((4, 10, 4))
    transition[0, :5, 2], transition[0, 5:, 1] = 1.0, 1.0  # right to the end, left to the state of ten arms
    transition[1, :, 2] = transition[1, :, 3] = 0.5
    reward[1, :, 2], reward[1, :, 3] = 0.9, -1.1
    transition[2:, :, 2] = 1.0
    mdp = make_mdp(transition, reward, [False, False, True, True], [1, 0, 0, 0])
    run = {"discount": 1.0, "step_size": 0.1, "epsilon": 0.1, "episodes": 100}
    left = lambda learnt: float((learnt.lengths == 2).mean())
    single = left(optimised(jax.vmap(lambda key: td.control(mdp, key, td.q_learning, **run)))(keys(300)))
    double = left(optimised(jax.vmap(lambda key: td.double_q_learning(mdp, key, **run)))(keys(300)))
    assert single > double + 0.1, (single, double)
