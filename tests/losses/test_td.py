"""TD errors against loops, and where their gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import td
from tests.oracles import losses as oracle
from tests.oracles import returns as returns_oracle
from tests.oracles.losses_group import gradient

T, A = 6, 3
RNG = np.random.default_rng(0)
Q_TM1, Q_T, OTHER = (RNG.normal(size=(T, A)) for _ in range(3))
A_TM1, A_T = RNG.integers(A, size=T), RNG.integers(A, size=T)
R, PROBS = RNG.normal(size=T), RNG.dirichlet(np.ones(A), size=T)
D = np.array([0.9, 0.9, 0.0, 0.9, 0.9, 0.9])
CALLS = {
    "sarsa": (lambda q, f, **k: td.sarsa(q, A_TM1, R, D, f, A_T, **k), dict(a_t=A_T)),
    "expected_sarsa": (lambda q, f, **k: td.expected_sarsa(q, A_TM1, R, D, f, PROBS, **k), dict(probs=PROBS)),
    "q_learning": (lambda q, f, **k: td.q_learning(q, A_TM1, R, D, f, **k), {}),
    "double_q_learning": (
        lambda q, f, **k: td.double_q_learning(q, A_TM1, R, D, f, OTHER, **k),
        dict(selector=OTHER),
    ),
}


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-6, **kwargs})


@pytest.mark.parametrize("name", CALLS)
def test_errors_of_action_values(name):
    call, extra = CALLS[name]

    def expected(q_tm1, q_t):
        return oracle.td_errors(name, q_tm1, A_TM1, R, D, q_t, **extra)

    assert_close(call(Q_TM1, Q_T), expected(Q_TM1, Q_T))

    for stop in (True, False):
        grads = jax.grad(lambda q, f, stop=stop: call(q, f, stop_target_gradients=stop).sum(), (0, 1))(
            jnp.float32(Q_TM1), jnp.float32(Q_T)
        )
        assert_close(grads[0], gradient(lambda q: expected(q, Q_T).sum(), Q_TM1))
        through = gradient(lambda q: expected(Q_TM1, q).sum(), Q_T)
        assert_close(grads[1], np.zeros_like(Q_T) if stop else through)
        assert through.any()


def test_td_learning():
    v_tm1, v_t = Q_TM1[:, 0], Q_T[:, 0]
    assert_close(td.td_learning(v_tm1, R, D, v_t), R + D * v_t - v_tm1)
    assert_close(td.td_learning(v_tm1, R, 0.5, v_t), R + 0.5 * v_t - v_tm1)
    assert_close(td.td_learning(v_tm1[0], R[0], D[0], v_t[0]), R[0] + D[0] * v_t[0] - v_tm1[0])
    grads = jax.grad(lambda *v: td.td_learning(v[0], R, D, v[1]).sum(), (0, 1))(jnp.float32(v_tm1), jnp.float32(v_t))
    assert_close(grads[0], -np.ones(T))
    assert not grads[1].any()


def test_greedy_expected_sarsa_is_q_learning():
    greedy = np.eye(A)[Q_T.argmax(1)]
    assert_close(
        td.expected_sarsa(Q_TM1, A_TM1, R, D, Q_T, greedy),
        td.q_learning(Q_TM1, A_TM1, R, D, Q_T),
        rtol=0,
        atol=0,
    )


def test_double_q_learning_with_one_network_is_q_learning():
    assert_close(
        td.double_q_learning(Q_TM1, A_TM1, R, D, Q_T, Q_T),
        td.q_learning(Q_TM1, A_TM1, R, D, Q_T),
        rtol=0,
        atol=0,
    )


def test_n_step_errors():
    v_tm1, v_t = Q_TM1[:, 0], Q_T[:, 0]
    assert_close(td.n_step_td_learning(v_tm1, R, D, v_t, n=3), returns_oracle.n_step(R, D, v_t, 3) - v_tm1)
    assert_close(td.n_step_td_learning(v_tm1, R, D, v_t, n=1), td.td_learning(v_tm1, R, D, v_t))
    grads = jax.grad(lambda *v: td.n_step_td_learning(v[0], R, D, v[1], n=3).sum(), (0, 1))(
        jnp.float32(v_tm1), jnp.float32(v_t)
    )
    assert_close(grads[0], -np.ones(T))
    assert not grads[1].any()
    through = jax.grad(lambda v: td.n_step_td_learning(v_tm1, R, D, v, n=3, stop_target_gradients=False).sum())(
        jnp.float32(v_t)
    )
    assert_close(through, gradient(lambda v: returns_oracle.n_step(R, D, v, 3).sum(), v_t))


def test_vmap_over_streams_is_a_loop():
    q = jnp.float32(np.stack([Q_TM1, OTHER]))
    together = jax.jit(jax.vmap(lambda q: td.q_learning(q, A_TM1, R, D, Q_T)))(q)
    for i in range(2):
        assert_close(together[i], td.q_learning(q[i], A_TM1, R, D, Q_T))


def test_squared_and_huber():
    errors = np.array([-3.0, -0.5, 0.0, 0.2, 2.0])
    for delta in (1.0, 0.4):
        assert_close(td.huber(errors, delta=delta), oracle.huber(errors, delta))
        grad = jax.grad(lambda e, delta=delta: td.huber(e, delta=delta).sum())(jnp.float32(errors))
        assert_close(grad, np.clip(errors, -delta, delta))
    assert_close(td.squared(errors), errors**2 / 2)
    assert td.squared(jnp.bfloat16(errors)).dtype == td.huber(jnp.bfloat16(errors)).dtype == jnp.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: td.td_learning(np.ones(3), np.ones(3), np.ones(2), np.ones(3)),
            r"discount_t has shape \(2,\)",
        ),
        (lambda: td.td_learning(np.ones(2), np.ones(3), 0.9, np.ones(3)), r"v_tm1 has shape \(2,\)"),
        (lambda: td.q_learning(Q_TM1, A_TM1[:2], R, D, Q_T), "one action to each row"),
        (lambda: td.expected_sarsa(Q_TM1, A_TM1, R, D, Q_T, PROBS[:, :2]), "probs_a_t"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
