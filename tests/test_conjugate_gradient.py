"""Conjugate gradients against a dense solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.conjugate_gradient import conjugate_gradient


def system(n=6, seed=0):
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(n, n))
    return m @ m.T + np.eye(n), rng.normal(size=n)


def test_equals_the_dense_solve():
    a, b = system()
    solution = conjugate_gradient(lambda x: jnp.asarray(a, jnp.float32) @ x, jnp.asarray(b, jnp.float32), iterations=20)
    np.testing.assert_allclose(solution.x, np.linalg.solve(a, b), rtol=1e-3, atol=1e-4)
    assert solution.residual <= 1e-8 * (b @ b) and 6 <= solution.iterations < 20


def test_takes_any_pytree():
    a, b = system()
    matrix = jnp.asarray(a, jnp.float32)

    def matvec(tree):
        y = matrix @ jnp.concatenate([tree["p"].reshape(-1), tree["q"]])
        return {"p": y[:4].reshape(2, 2), "q": y[4:]}

    right = {"p": jnp.asarray(b[:4], jnp.float32).reshape(2, 2), "q": jnp.asarray(b[4:], jnp.float32)}
    x = conjugate_gradient(matvec, right, iterations=20).x
    flat = np.concatenate([np.ravel(x["p"]), x["q"]])
    np.testing.assert_allclose(flat, np.linalg.solve(a, b), rtol=1e-3, atol=1e-4)


def test_first_iterate_is_the_steepest_descent_step():
    a, b = system()
    x = conjugate_gradient(lambda x: jnp.asarray(a, jnp.float32) @ x, jnp.asarray(b, jnp.float32), iterations=1).x
    np.testing.assert_allclose(x, (b @ b) / (b @ a @ b) * b, rtol=1e-5)


def test_zero_right_side_and_bad_matrices_give_no_nan():
    zero = conjugate_gradient(lambda x: x, jnp.zeros(3))
    assert zero.iterations == 0 and (np.asarray(zero.x) == 0).all()
    negative = jax.jit(lambda b: conjugate_gradient(lambda x: -x, b))(jnp.ones(3))
    assert np.isfinite(negative.x).all() and (np.asarray(negative.x) == 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        conjugate_gradient(lambda x: x, jnp.ones(3), iterations=0)
