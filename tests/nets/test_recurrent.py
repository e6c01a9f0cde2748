"""The GRU against a loop in numpy, over streams with several episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.recurrent import GRU


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_unroll_equals_a_loop_with_resets():
    T, N, D, H = 5, 3, 2, 4
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(T, N, D)), rng.normal(size=(N, H))
    starts = rng.random((T, N)) < 0.4
    gru = GRU(H)
    params = gru.init(jax.random.key(0), jnp.zeros((N, D)), jnp.zeros((N, H)))
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases away from zero
    w = jax.tree.map(np.asarray, params["params"])
    out = gru.apply(params, jnp.asarray(x, jnp.float32), starts, jnp.asarray(h, jnp.float32), method="unroll")
    for t in range(T):
        h = np.where(starts[t][:, None], 0.0, h)
        from_x = x[t] @ w["input"]["kernel"] + w["input"]["bias"]
        from_h = h @ w["memory"]["kernel"] + w["memory"]["bias"]
        r, z = sigmoid(from_x[:, :H] + from_h[:, :H]), sigmoid(from_x[:, H : 2 * H] + from_h[:, H : 2 * H])
        c = np.tanh(from_x[:, 2 * H :] + r * from_h[:, 2 * H :])
        h = (1 - z) * c + z * h
        np.testing.assert_allclose(out[t], h, rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_named():
    gru = GRU(4)
    params = gru.init(jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"\[T, N, D\]"):
        gru.apply(params, jnp.zeros((5, 3, 2)), jnp.zeros(5, bool), jnp.zeros((3, 4)), method="unroll")
