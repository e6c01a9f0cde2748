"""Returns against definitions written as sums, against worked fixtures, and against each other at their
limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import returns
from tests.oracles import returns as oracle

T = 7


def stream(seed=0, terminate=(), truncate=()):
    """One stream in which v_t is v_tm1 one step on, except at truncations, where the true successor
    differs."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=T + 1)
    terminated, truncated = np.zeros(T), np.zeros(T)
    terminated[list(terminate)], truncated[list(truncate)] = 1.0, 1.0
    v_t = values[1:].copy()
    v_t[truncated > 0] = rng.normal(size=int(truncated.sum()))
    return dict(
        r_t=rng.normal(size=T),
        discount_t=0.9 * (1.0 - terminated),
        v_tm1=values[:-1],
        v_t=v_t,
        terminated=terminated,
        truncated=truncated,
        rho=np.exp(rng.normal(size=T)),
    )


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-6, **kwargs})


def test_discounted_scan_is_the_recursion():
    x, decay = np.arange(1.0, 5.0), np.array([0.5, 0.0, 2.0, 0.1])
    expected = [1 + 0.5 * 2, 2.0, 3 + 2 * (4 + 0.1 * 10), 4 + 0.1 * 10]
    assert_close(returns.discounted_scan(x, decay, 10.0), expected)


def test_discounted_scan_accumulates_in_float32():
    ones = jnp.ones(600, jnp.bfloat16)
    assert returns.discounted_scan(ones, 1.0)[0] == 600.0


@pytest.mark.parametrize("terminate", [(), (2,), (6,)])
def test_discounted_returns(terminate):
    s = stream(terminate=terminate)
    assert_close(
        returns.discounted_returns(s["r_t"], s["discount_t"], 1.5),
        oracle.discounted(s["r_t"], s["discount_t"], 1.5),
    )


@pytest.mark.parametrize("n", [1, 2, 3, T, T + 5])
def test_n_step_returns(n):
    s = stream(terminate=(3,))
    assert_close(
        returns.n_step_returns(s["r_t"], s["discount_t"], s["v_t"], n=n),
        oracle.n_step(s["r_t"], s["discount_t"], s["v_t"], n),
    )


def test_n_step_limits():
    s = stream()
    one = returns.n_step_returns(s["r_t"], s["discount_t"], s["v_t"], n=1)
    assert_close(one, s["r_t"] + s["discount_t"] * s["v_t"])
    whole = returns.n_step_returns(s["r_t"], s["discount_t"], s["v_t"], n=T)
    assert_close(whole, returns.discounted_returns(s["r_t"], s["discount_t"], s["v_t"][-1]))


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.95, 1.0])
def test_lambda_returns_are_the_forward_view(lambda_):
    s = stream(terminate=(4,))
    assert_close(
        returns.lambda_returns(s["r_t"], s["discount_t"], s["v_t"], lambda_=lambda_),
        oracle.lambda_forward(s["r_t"], s["discount_t"], s["v_t"], lambda_),
    )


def test_lambda_limits():
    s = stream(terminate=(1,))
    at_zero = returns.lambda_returns(s["r_t"], s["discount_t"], s["v_t"], lambda_=0.0)
    at_one = returns.lambda_returns(s["r_t"], s["discount_t"], s["v_t"], lambda_=1.0)
    assert_close(at_zero, s["r_t"] + s["discount_t"] * s["v_t"])
    assert_close(at_one, returns.discounted_returns(s["r_t"], s["discount_t"], s["v_t"][-1]))


# A stream of five with gamma 0.9 and lambda 0.8, worked by hand; the first row is also what rlax 0.1.9
# prints: #   rlax.truncated_generalized_advantage_estimation(r, jnp.full(5, .9), .8, jnp.append(V, .7))
GAE_ROWS = {
    "no end": ((), (), None, [1.185788, -0.297516, 1.600672, 2.6676, 0.83]),
    "terminated": ((2,), (), None, [0.0968, -1.81, -0.5, 2.6676, 0.83]),
    "truncated": ((), (2,), 0.4, [0.283424, -1.5508, -0.14, 2.6676, 0.83]),
    "both": ((2,), (2,), 0.4, [0.0968, -1.81, -0.5, 2.6676, 0.83]),
}


@pytest.mark.parametrize("row", GAE_ROWS)
def test_gae_fixture(row):
    terminate, truncate, final_value, expected = GAE_ROWS[row]
    r_t, values = np.array([1, 0, -1, 2, 0.5]), np.array([0.5, 1, -0.5, 0.2, 0.3])
    v_t, terminated, truncated = np.append(values[1:], 0.7), np.zeros(5, bool), np.zeros(5, bool)
    terminated[list(terminate)], truncated[list(truncate)] = True, True
    if final_value is not None:
        v_t[2] = final_value
    estimates = returns.gae(values, r_t, v_t, terminated, truncated, discount=0.9, lambda_=0.8)
    assert_close(estimates.advantages, expected, rtol=1e-5)
    assert_close(estimates.targets, expected + values, rtol=1e-5)


@pytest.mark.parametrize("ends", [((), ()), ((1,), (4,)), ((6,), ()), ((), (6,)), ((3,), (3,))])
def test_gae_is_the_sum_of_td_errors(ends):
    s = stream(3, *ends)
    actual = returns.gae(s["v_tm1"], s["r_t"], s["v_t"], s["terminated"], s["truncated"], discount=0.9, lambda_=0.7)
    expected = oracle.gae(s["v_tm1"], s["r_t"], s["v_t"], s["terminated"], s["truncated"], 0.9, 0.7)
    assert_close(actual.advantages, expected)


def test_gae_is_lambda_returns_minus_values():
    s = stream(4, (1,), (4,))
    actual = returns.gae(s["v_tm1"], s["r_t"], s["v_t"], s["terminated"], s["truncated"], discount=0.9, lambda_=0.7)
    cut = 0.7 * (1 - s["truncated"])
    assert_close(actual.targets, returns.lambda_returns(s["r_t"], s["discount_t"], s["v_t"], lambda_=cut))


@pytest.mark.parametrize("clips", [(1.0, 1.0, 1.0), (2.0, 0.7, 1.5)])
@pytest.mark.parametrize("lambda_", [1.0, 0.8])
def test_vtrace(clips, lambda_):
    s = stream(5, terminate=(3,))
    clip_rho, clip_c, clip_pg_rho = clips
    actual = returns.vtrace(
        s["v_tm1"],
        s["r_t"],
        s["discount_t"],
        s["v_t"],
        s["rho"],
        lambda_=lambda_,
        clip_rho=clip_rho,
        clip_c=clip_c,
        clip_pg_rho=clip_pg_rho,
    )
    targets, advantages, q = oracle.vtrace(
        s["v_tm1"], s["r_t"], s["discount_t"], s["v_t"], s["rho"], lambda_, clip_rho, clip_c, clip_pg_rho
    )
    assert_close(actual.errors, targets - s["v_tm1"])
    assert_close(actual.advantages, advantages)
    assert_close(actual.q_estimates, q)


def test_vtrace_on_policy_is_lambda_returns_also_past_a_truncation():
    s = stream(6, terminate=(1,), truncate=(4,))
    cut = 0.8 * (1 - s["truncated"])
    actual = returns.vtrace(s["v_tm1"], s["r_t"], s["discount_t"], s["v_t"], np.ones(T), lambda_=cut)
    expected = returns.lambda_returns(s["r_t"], s["discount_t"], s["v_t"], lambda_=cut)
    assert_close(actual.errors + s["v_tm1"], expected)
    assert_close(actual.q_estimates, expected)


def test_vtrace_targets_are_constants():
    s = stream(7)

    def errors(v_tm1, v_t):
        return returns.vtrace(v_tm1, s["r_t"], s["discount_t"], v_t, s["rho"]).errors.sum()

    grad_tm1, grad_t = jax.grad(errors, (0, 1))(jnp.float32(s["v_tm1"]), jnp.float32(s["v_t"]))
    assert_close(grad_tm1, -np.ones(T))
    assert not grad_t.any()


def action_values(seed=8, terminate=()):
    """States 0..T of one stream: q [T + 1, A], actions [T + 1], policies pi and mu [T + 1, A]."""
    rng = np.random.default_rng(seed)
    s = stream(seed, terminate)
    q, actions = rng.normal(size=(T + 1, 3)), rng.integers(3, size=T + 1)
    pi, mu = (rng.dirichlet(np.ones(3), size=T + 1) for _ in range(2))
    return s, q, actions, pi, mu


COEFFICIENTS = {
    "retrace": lambda pi, mu: 0.9 * min(1.0, pi / mu),
    "tree_backup": lambda pi, mu: 0.9 * pi,
    "q_lambda": lambda pi, mu: 0.9,
    "importance": lambda pi, mu: 0.9 * pi / mu,
}


@pytest.mark.parametrize("trace", returns.TRACES)
def test_retrace(trace):
    s, q, actions, pi, mu = action_values(terminate=(2,))
    row = np.arange(T + 1)
    c = [COEFFICIENTS[trace](pi[t, actions[t]], mu[t, actions[t]]) for t in row[1:]]
    expected = oracle.off_policy(
        q[row, actions][:-1], None, (pi * q).sum(1)[1:], s["r_t"], s["discount_t"], np.array(c)
    )
    actual = returns.retrace(
        q[1:], actions[1:], s["r_t"], s["discount_t"], pi[1:], mu[row, actions][1:], lambda_=0.9, trace=trace
    )
    assert_close(actual, expected)


def test_retrace_limits():
    s, q, actions, pi, _ = action_values()
    taken = pi[np.arange(T + 1), actions]
    one_step = s["r_t"] + s["discount_t"] * (pi * q).sum(1)[1:]
    args = (q[1:], actions[1:], s["r_t"], s["discount_t"], pi[1:], taken[1:])
    assert_close(returns.retrace(*args, lambda_=0.0), one_step)
    for trace in ("retrace", "importance"):  # on policy both are q_lambda
        assert_close(returns.retrace(*args, trace=trace), returns.retrace(*args, trace="q_lambda"))


def test_importance_sampling_of_a_sure_policy_is_monte_carlo():
    """With all probability on the actions taken, c = 1, v = q(a), and the estimates cancel."""
    s, q, actions, _, _ = action_values()
    sure = np.eye(3)[actions]
    actual = returns.retrace(q[1:], actions[1:], s["r_t"], s["discount_t"], sure[1:], np.ones(T), trace="importance")
    assert_close(actual, returns.discounted_returns(s["r_t"], s["discount_t"], q[T, actions[T]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trace", returns.TRACES)
def test_the_last_action_may_be_unknown(trace):
    s, q, actions, pi, mu = action_values()
    mu_t = mu[np.arange(T + 1), actions][1:]
    args = (q[1:], actions[1:], s["r_t"], s["discount_t"], pi[1:])
    known = returns.retrace(*args, mu_t, trace=trace)
    mu_t[-1], actions[-1] = 0.0, (actions[-1] + 1) % 3
    assert_close(returns.retrace(*args, mu_t, trace=trace), known, rtol=0, atol=0)


def test_streams_vmap_and_jit():
    a, b = stream(1), stream(2, terminate=(3,))
    batch = [jnp.stack([jnp.float32(a[k]), jnp.float32(b[k])]) for k in ("r_t", "discount_t", "v_t")]
    together = jax.jit(jax.vmap(lambda r, d, v: returns.lambda_returns(r, d, v, lambda_=0.9)))(*batch)
    for i, s in enumerate((a, b)):
        alone = returns.lambda_returns(s["r_t"], s["discount_t"], s["v_t"], lambda_=0.9)
        assert_close(together[i], alone)


REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [0.3, -2.0, 0.7, 5.0], [0.1, 0.1, 0.1, 0.1]])


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_relative(scale, ddof):
    actual = returns.group_relative(REWARDS, scale=scale, ddof=ddof)
    assert_close(actual, oracle.group_relative(REWARDS, scale, ddof))


def test_group_relative_of_one_group_and_of_pairs():
    assert_close(returns.group_relative(REWARDS[1]), oracle.group_relative(REWARDS[1:2])[0])
    half = 0.5**0.5  # G = 2: +-1/sqrt(2) with ddof 1, whatever the distance
    assert_close(returns.group_relative(np.array([3.0, 7.0])), [-half, half])


def test_group_relative_eps_is_added_to_the_std():
    binary = np.array([1.0, 0.0])
    std = 0.5**0.5
    assert_close(returns.group_relative(binary, eps=1e-2)[0], 0.5 / (std + 1e-2))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.3])
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_equal_rewards_give_exactly_zero(value, scale):
    for eps in (1e-6, 0.0):
        assert not returns.group_relative(jnp.full((2, 7), value), scale=scale, eps=eps).any()
    assert not returns.leave_one_out(jnp.full((2, 7), value)).any()


def test_leave_one_out():
    assert_close(returns.leave_one_out(REWARDS), oracle.leave_one_out(REWARDS))
    assert_close(returns.leave_one_out(REWARDS), 4 / 3 * oracle.group_relative(REWARDS, "none"))


@pytest.mark.parametrize("how", ["nan", "valid"])
def test_answers_without_reward_take_no_part(how):
    kept = np.array([[True, True, False, True], [True, False, False, False]])
    rewards = np.array([[1.0, 0.0, 9.0, 0.5], [3.0, 1.0, 2.0, 4.0]])
    if how == "nan":
        given, valid = np.where(kept, rewards, np.nan), None
    else:
        given, valid = rewards, kept
    expected = np.zeros((2, 4))
    expected[0, [0, 1, 3]] = oracle.group_relative(rewards[:1, [0, 1, 3]])[0]
    assert_close(returns.group_relative(given, valid=valid), expected)
    expected[0, [0, 1, 3]] = oracle.leave_one_out(rewards[:1, [0, 1, 3]])[0]
    assert_close(returns.leave_one_out(given, valid=valid), expected)


def test_a_group_without_any_reward_is_zero():
    assert not returns.group_relative(np.full((2, 3), np.nan)).any()
    assert not returns.group_relative(np.full((2, 3), np.nan), scale="batch").any()


def test_whiten():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3.0, 2.0, size=(4, 5)), rng.random((4, 5)) > 0.3
    for shift_mean in (True, False):
        for ddof in (0, 1):
            actual = returns.whiten(x, mask, shift_mean=shift_mean, ddof=ddof)
            assert_close(actual, oracle.whiten(x, mask, shift_mean, ddof))
    garbage = np.where(mask, x, np.nan)
    assert_close(returns.whiten(garbage, mask), oracle.whiten(x, mask))


def test_whiten_of_equal_few_or_no_elements():
    assert not returns.whiten(jnp.full((3, 3), 0.1), jnp.ones((3, 3))).any()
    assert not returns.whiten(jnp.ones((2, 2)), jnp.zeros((2, 2))).any()
    assert not returns.whiten(jnp.ones((2, 2)), jnp.eye(2)).any()
    assert returns.whiten(jnp.full((2, 2), 4.0), jnp.ones((2, 2)), shift_mean=False).tolist() == [[4.0, 4.0]] * 2


def test_whiten_over_devices_is_whiten_of_the_whole():
    rng = np.random.default_rng(1)
    x, mask = jnp.float32(rng.normal(size=(8, 3))), jnp.array(rng.random((8, 3)) > 0.3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    sharded = jax.shard_map(
        lambda x, mask: returns.whiten(x, mask, axis_name="data"), mesh=mesh, in_specs=rows, out_specs=rows
    )
    assert_close(sharded(x, mask), returns.whiten(x, mask))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: returns.group_relative(np.ones((3, 1))), "at least 2"),
        (lambda: returns.leave_one_out(np.ones(1)), "at least 2"),
        (lambda: returns.group_relative(np.ones((2, 2, 2))), r"\[P, G\]"),
        (lambda: returns.group_relative(np.ones((2, 2)), scale="group"), "'std', 'none' or 'batch'"),
        (lambda: returns.group_relative(np.ones((2, 2)), valid=np.ones(2)), "must agree"),
        (lambda: returns.whiten(np.ones(3), np.ones(2)), "must agree"),
        (lambda: returns.discounted_returns(np.ones((2, 3)), 0.9), "jax.vmap"),
        (lambda: returns.discounted_returns(np.ones(0), 0.9), "at least one step"),
        (lambda: returns.lambda_returns(np.ones(3), 0.9, np.ones(4)), r"v_t has shape \(4,\)"),
        (lambda: returns.n_step_returns(np.ones(3), 0.9, np.ones(3), n=0), "n is 0"),
        (lambda: returns.retrace(np.ones(3), 0, np.ones(3), 0.9, np.ones(3), np.ones(3)), r"\[T, A\]"),
        (
            lambda: returns.retrace(
                np.ones((3, 2)), np.zeros(3, int), np.ones(3), 0.9, np.ones((3, 2)), np.ones(3), trace="x"
            ),
            "'tree_backup'",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
