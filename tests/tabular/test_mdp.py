"""MDPs: checks, exact values against float64 loops, Bellman operators as contractions, policies, drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.tabular import gridworld, make_mdp
from jaxrl.tabular import mdp as models
from tests.oracles import tabular as oracle


def random_mdp(seed=0, states=6, actions=3, terminal=(5,)):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), size=(states, actions))
    return make_mdp(transition, rng.normal(size=transition.shape), np.isin(np.arange(states), terminal))


def random_policy(seed=0, states=6, actions=3):
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(actions), size=states), jnp.float32)


@pytest.mark.parametrize("terminal", [(), (5,), (0, 3)])
def test_policy_evaluation_is_the_linear_solve(terminal):
    mdp, policy = random_mdp(terminal=terminal), random_policy(1)
    arrays = [np.asarray(x, np.float64) for x in (mdp.transition, mdp.reward)]
    expected = oracle.policy_values(*arrays, np.asarray(mdp.terminal), np.asarray(policy, np.float64), 0.9)
    exact = models.evaluate_policy(mdp, policy, discount=0.9)
    swept = jax.lax.fori_loop(
        0, 300, lambda _, v: models.bellman(mdp, policy, v, discount=0.9), jnp.full(mdp.states, 3.0)
    )
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(exact - expected).max() < 1e-6 * scale
    assert np.abs(swept - expected).max() < 1e-6 * scale


def test_exact_to_1e_6_in_float64_on_the_grid():
    with jax.enable_x64(True):
        mdp = gridworld.grid_world()
        policy = models.uniform_policy(mdp)
        values = models.evaluate_policy(mdp, policy, discount=0.9)
        assert values.dtype == jnp.float64
        arrays = [np.asarray(x) for x in (mdp.transition, mdp.reward, mdp.terminal, policy)]
        assert np.abs(np.asarray(values) - oracle.policy_values(*arrays, 0.9)).max() < 1e-12
        residual = values - models.bellman(mdp, policy, values, discount=0.9)
        assert np.abs(np.asarray(residual)).max() < 1e-12


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
def test_both_operators_contract(discount):
    mdp, policy = random_mdp(), random_policy()
    u, v = jax.random.normal(jax.random.key(1), (2, mdp.states, 40)) * 5
    distance = jnp.abs(u - v).max(axis=0)
    for operator in (lambda x: models.bellman(mdp, policy, x, discount=discount),
                     lambda x: models.bellman_optimality(mdp, x, discount=discount)):  # fmt: skip
        after = jnp.abs(jax.vmap(operator, 1, 1)(u) - jax.vmap(operator, 1, 1)(v)).max(axis=0)
        assert (after <= discount * distance + 1e-5).all()
    # The factor is reached: a constant shift shrinks by exactly the discount where nothing is terminal.
    endless = random_mdp(terminal=())
    shift = models.bellman(endless, policy, u[:, 0] + 1.0, discount=discount) - models.bellman(
        endless, policy, u[:, 0], discount=discount
    )
    assert jnp.allclose(shift, discount, atol=1e-5)


def test_affine_rewards_shift_and_scale_values_of_endless_tasks():
    mdp, policy = random_mdp(terminal=()), random_policy()
    values = models.evaluate_policy(mdp, policy, discount=0.9)
    changed = mdp._replace(reward=2.0 * mdp.reward + 1.0)
    assert jnp.allclose(models.evaluate_policy(changed, policy, discount=0.9), 2.0 * values + 10.0, atol=1e-5)


def test_terminal_states_are_worth_nothing_whatever_their_rows_say():
    mdp = random_mdp(terminal=(2,))
    anything = jnp.full(mdp.states, 7.0)
    assert (models.action_values(mdp, anything, discount=0.9)[2] == 0.0).all()
    richer = mdp._replace(reward=mdp.reward.at[2].set(100.0))
    assert jnp.allclose(
        models.evaluate_policy(mdp, random_policy(), discount=0.9),
        models.evaluate_policy(richer, random_policy(), discount=0.9),
    )
    other = models.action_values(mdp, anything.at[2].set(-50.0), discount=0.9)
    assert jnp.allclose(other, models.action_values(mdp, anything, discount=0.9))


def test_policies():
    q = jnp.array([[1.0, 3.0, 3.0], [2.0, 1.0, 1.99999]])
    assert models.greedy(q).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert models.greedy(q, ties=0.0).tolist() == [[0, 0.5, 0.5], [1, 0, 0]]
    assert models.greedy(q, ties=1e-4).tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5]]
    assert jnp.allclose(models.epsilon_greedy(q, 0.3)[0], jnp.array([0.1, 0.8, 0.1]))
    assert jnp.allclose(models.epsilon_greedy(q, 0.3, ties=0.0)[0], jnp.array([0.1, 0.45, 0.45]))


def test_draws_follow_the_probabilities():
    probs = jnp.array([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    drawn = jax.vmap(models.draw, in_axes=(0, None))(jax.random.split(jax.random.key(0), 20_000), probs)
    frequencies = jnp.bincount(drawn, length=6) / drawn.size
    assert jnp.abs(frequencies - probs).max() < 4 * 0.5 / 20_000**0.5
    assert (frequencies[probs == 0] == 0).all()


def test_step_agrees_with_the_model():
    mdp = random_mdp()
    keys = jax.random.split(jax.random.key(1), 5000)
    successor, reward, terminated = jax.vmap(lambda key: models.step(key, mdp, jnp.int32(1), jnp.int32(2)))(keys)
    assert (reward == mdp.reward[1, 2, successor]).all() and (terminated == mdp.terminal[successor]).all()
    frequencies = jnp.bincount(successor, length=6) / 5000
    assert jnp.abs(frequencies - mdp.transition[1, 2]).max() < 4 * 0.5 / 5000**0.5


GOOD = np.full((2, 1, 2), 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((2, 2)), np.zeros((2, 2))), r"transition has shape \(2, 2\), expected \[S, A, S\]"),
        ((np.zeros((2, 1, 3)), np.zeros((2, 1, 3))), r"expected \[S, A, S\]"),
        ((GOOD * 1.1, GOOD), r"no distribution at \[state, action\] = \[0, 0\].*add up to 1.1"),
        ((np.array([[[0.5, 0.5]], [[1.5, -0.5]]]), GOOD), r"\[1, 0\].*not be negative"),
        ((GOOD, np.zeros(3)), r"reward has shape \(3,\)"),
        ((GOOD, np.array([[[0, 1]], [[np.nan, 0]]])), r"= \[1, 0, 0\] is nan"),
        ((GOOD, GOOD, np.zeros(3, bool)), r"terminal has shape \(3,\)"),
        ((GOOD, GOOD, np.ones(2, bool)), "every state is terminal"),
        ((GOOD, GOOD, None, np.ones(3)), r"start has shape \(3,\)"),
        ((GOOD, GOOD, None, np.ones(2)), "start is no distribution.*add up to 2"),
    ],
)
def test_make_mdp_names_the_fault(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_mdp(*arguments)


def test_make_mdp_fills_in():
    mdp = make_mdp(GOOD, [[1.0], [2.0]], terminal=[True, False])
    assert mdp.reward.tolist() == [[[1, 1]], [[2, 2]]] and mdp.start.tolist() == [0, 1]
    assert (mdp.states, mdp.actions) == (2, 1)


def test_operators_name_the_fault():
    mdp = random_mdp()
    with pytest.raises(ValueError, match=r"values has shape \(5,\), expected \[S\] = \[6\]"):
        models.action_values(mdp, jnp.zeros(5), discount=0.9)
    with pytest.raises(ValueError, match=r"policy has shape \(6,\).*deterministic_policy"):
        models.evaluate_policy(mdp, jnp.zeros(6, int), discount=0.9)
