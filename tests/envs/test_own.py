"""Our own tasks have the values they promise; every environment has a name and a picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.envs import bandits, canvas, catch, masked, memory, probes, tabular
from jaxrl.tabular import gridworld


def transitions(env, policy, *, copies=200, steps=8):
    """(observations acted on, TimeStep), [steps, copies, ...], under actions `policy(observation, mask)`."""
    many = envs.vectorise(envs.auto_reset(env), copies)

    def run(key):
        reset_key, loop_key = jax.random.split(key)

        def move(carry, key):
            state, observation = carry
            mask = jnp.ones((copies, 1), bool) if many.action_mask is None else many.action_mask(state)
            state, timestep = many.step(key, state, jax.vmap(policy)(observation, mask))
            return (state, timestep.observation), (observation, timestep)

        return jax.lax.scan(move, many.reset(reset_key), jax.random.split(loop_key, steps))[1]

    return jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("name", probes.PROBES)
def test_values_of_probes(name, continuous):
    """The best actions, played; then v(s) = mean of r + discount v(s'), s' the successor, 0 after termination."""
    probe = probes.PROBES[name](continuous=continuous)
    best, places = jnp.maximum(jnp.asarray(probe.actions), 0), jnp.asarray(probe.observations)

    def policy(observation, mask):
        choice = best[jnp.argmin(jnp.abs(places - observation[None])[:, 0])]
        return (2.0 * choice[None] - 1.0).astype(jnp.float32) if continuous else choice

    seen, steps = transitions(probe.env, policy)
    at, to = (np.abs(x - probe.observations[:, 0]).argmin(axis=-1) for x in (seen, steps.successor))
    assert set(at.ravel()) == set(range(len(probe.observations)))
    assert np.isin(seen, probe.observations).all()
    discount, values = 0.8, np.zeros(len(probe.observations))
    for _ in range(100):
        targets = steps.reward + discount * np.where(steps.terminated, 0.0, values[to])
        values = np.array([targets[at == place].mean() for place in range(len(values))])
    np.testing.assert_allclose(values, probe.values(discount), atol=1e-5)


def test_worse_actions_of_probes_are_worse():
    for name in ("Probe-Action", "Probe-Policy", "Probe-Loss"):
        probe = probes.PROBES[name]()
        for observation, value, best in zip(probe.observations, probe.values(0.9), probe.actions, strict=True):
            key, state = jax.random.key(0), probes.State(jnp.float32(observation[0]), jnp.int32(0))
            with jax.debug_key_reuse(False):
                rewards = [float(probe.env.step(key, state, jnp.int32(action))[1].reward) for action in (0, 1)]
            assert rewards[best] == value > rewards[1 - best]


def test_truncation_and_successor_probes_flag_as_they_say():
    _, steps = transitions(probes.truncation().env, lambda *_: jnp.int32(0), copies=2)
    assert steps.truncated[:, 0].tolist() == [False, False, False, True] * 2 and not steps.terminated.any()
    seen, steps = transitions(probes.successor().env, lambda *_: jnp.int32(0), copies=50)
    assert steps.truncated.all() and (steps.terminated == (seen[..., 0] == 1)).all()


def test_catch_follows_the_ball():
    def follow(board, mask):
        ball = jnp.argmax(board[:-1].sum(axis=0) + 0.1 * board[-1])
        return jnp.sign(ball - jnp.argmax(board[-1])).astype(jnp.int32) + 1

    seen, steps = transitions(catch.make(rows=4, columns=3), follow, copies=40, steps=6)
    assert steps.terminated[:, 0].tolist() == [False, False, True] * 2
    assert steps.reward[steps.terminated].min() == 1.0 and (steps.reward[~steps.terminated] == 0).all()
    assert set(seen[0].argmax(axis=1).max(axis=-1).ravel()) and len(np.unique(seen[0][:, 0].argmax(axis=-1))) == 3
    _, missed = transitions(catch.make(rows=4, columns=3), lambda *_: jnp.int32(0), copies=60, steps=3)
    ends = missed.reward[missed.terminated]
    assert set(ends.tolist()) == {-1.0, 1.0} and 0.1 < (ends == 1).mean() < 0.6


def test_arms_pay_what_they_promise():
    arm = lambda i: lambda *_: jnp.int32(i)
    _, steps = transitions(bandits.gaussian([1.0, -2.0], std=[0.5, 0.1]), arm(1))
    assert steps.terminated.all() and abs(steps.reward.mean() + 2) < 0.01 and abs(steps.reward.std() - 0.1) < 0.01
    _, steps = transitions(bandits.bernoulli([0.9, 0.25]), arm(1))
    assert set(steps.reward.ravel()) == {0.0, 1.0} and abs(steps.reward.mean() - 0.25) < 0.04
    table = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    seen, steps = transitions(bandits.contextual(table), arm(1))
    np.testing.assert_array_equal(steps.reward, table[seen.argmax(axis=-1), 1])
    assert abs(seen.mean() - 1 / 3) < 0.01 and seen.mean(axis=(0, 1)).min() > 0.25
    with pytest.raises(ValueError, match=r"expected \[k\]"):
        bandits.gaussian([[1.0]])
    with pytest.raises(ValueError, match=r"expected \[contexts, k\]"):
        bandits.contextual([1.0])


def test_recall_shows_the_cue_once_and_asks_at_the_end():
    seen, steps = transitions(memory.make(length=3, cues=2), lambda *_: jnp.int32(1), copies=30, steps=3)
    assert seen[:, :, 2].all(axis=1).tolist() == [False, False, True]
    assert (seen[0, :, :2].sum(axis=-1) == 1).all() and not seen[1:, :, :2].any()
    np.testing.assert_array_equal(steps.reward[2], seen[0, :, 1])
    assert not steps.reward[:2].any() and steps.terminated.all(axis=1).tolist() == [False, False, True]


def test_masked_choice_pays_the_best_that_is_allowed():
    highest = lambda _, mask: jnp.argmax(jnp.arange(5) * mask).astype(jnp.int32)
    _, steps = transitions(masked.make(actions=5), highest, copies=400, steps=10)
    assert not steps.terminated.any()
    assert abs(steps.reward.mean() - masked.best(5)) < 0.012
    _, careless = transitions(masked.make(actions=5), lambda *_: jnp.int32(4), steps=10)
    assert ((careless.reward == -1) == careless.terminated).all() and 0.3 < careless.terminated.mean() < 0.5


def test_from_mdp_is_the_mdp():
    mdp = gridworld.grid_world(episodic=True)
    right = lambda *_: jnp.int32(1)
    seen, steps = transitions(tabular.from_mdp(mdp), right, copies=100, steps=4)
    assert steps.successor.dtype == np.int32
    np.testing.assert_allclose(steps.reward, np.asarray(mdp.reward)[seen, 1, steps.successor])
    assert (np.asarray(mdp.transition)[seen, 1, steps.successor] > 0).all()
    np.testing.assert_array_equal(steps.terminated, np.asarray(mdp.terminal)[steps.successor])
    assert steps.terminated.any() and not np.asarray(mdp.terminal)[seen].any()
    with pytest.raises(ValueError, match="4 x 12 cells, the MDP 25 states"):
        tabular.grid_world(gridworld.CLIFF, mdp)


@pytest.mark.parametrize("name", envs.ENVS)
def test_every_name_makes_an_environment_with_a_picture(name):
    env = envs.make(name)
    assert env.name == name
    state, observation = env.reset(jax.random.key(0))
    assert (observation.shape, observation.dtype) == (env.observation_space.shape, env.observation_space.dtype)
    picture = env.render(state)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and len(np.unique(picture)) > 2


def test_pictures_show_the_state():
    env = envs.make("CartPole-v1")
    state, _ = env.reset(jax.random.key(0))
    moved = state._replace(env=state.env._replace(position=jnp.float32(1.0)))

    def cart(state):
        return np.argwhere((env.render(state) == canvas.BLACK).all(axis=-1)).mean(axis=0)[1]

    assert cart(moved) - cart(state) == pytest.approx(480 / 5.6 * (1.0 - float(state.env.position)), abs=1.0)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ValueError, match="no environment 'Cartpole'; did you mean 'CartPole-v1'"):
        envs.make("Cartpole")


def test_shapes_cover_what_they_should():
    picture = canvas.blank(40, 30)
    canvas.rectangle(picture, (12, 20), (4, 10), colour=(0, 0, 0))
    wanted = np.full((30, 40, 3), 255)
    wanted[10:20, 4:12] = 0
    np.testing.assert_array_equal(picture, wanted)

    def area(draw):
        picture = canvas.blank(60, 60, (0, 0, 0))
        draw(picture)
        return picture[..., 0].sum() / 255

    white = canvas.WHITE
    assert area(lambda p: canvas.circle(p, (30, 30), 10, colour=white)) == pytest.approx(np.pi * 100, rel=0.01)
    bent = [(10, 10), (50, 10), (50, 50), (30, 20)]
    assert area(lambda p: canvas.polygon(p, bent, colour=white)) == pytest.approx(600, rel=0.02)
    line = area(lambda p: canvas.line(p, (10, 10), (40, 50), width=4, colour=white))
    assert line == pytest.approx(50 * 4 + np.pi * 4, rel=0.02)
    assert area(lambda p: canvas.arrow(p, (10, 30), (40, 30), width=4, colour=white)) > 150
    assert area(lambda p: canvas.circle(p, (-30, 30), 10, colour=white)) == 0
    view = canvas.View((-1.0, -1.0), (1.0, 1.0), (200, 100))
    assert view(0.0, 0.0) == (100.0, 50.0) and view(1.0, 1.0) == (150.0, 0.0)
