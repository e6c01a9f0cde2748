"""MLP torsos, heads, and the QR-free orthogonal initialiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets import heads
from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.layers import FeedForward, RMSNorm
from jaxrl.nets.mlp import MLP


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (2, 3, 4)])
def test_orthogonal_matrices_are_orthogonal(shape):
    w = np.asarray(orthogonal(2.0)(jax.random.key(0), shape)).reshape(-1, shape[-1]) / 2
    rows, columns = w.shape
    gram = w.T @ w if rows >= columns else w @ w.T
    np.testing.assert_allclose(gram, np.eye(min(rows, columns)), atol=1e-5)


def test_orthogonal_is_uniform_and_safe_to_vmap():
    """Moments of the Haar measure: E w_ij = 0, E w_ij^2 = 1/n, and for the trace E tr = 0, E tr^2 = 1."""
    draw = jax.jit(jax.vmap(lambda key: orthogonal()(key, (3, 3))))
    w = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(w.mean(axis=0), 0, atol=0.04)
    np.testing.assert_allclose((w**2).mean(axis=0), 1 / 3, atol=0.025)
    trace = np.trace(w, axis1=1, axis2=2)
    np.testing.assert_allclose([trace.mean(), (trace**2).mean()], [0, 1], atol=0.08)
    assert 0.4 < (np.linalg.det(w) > 0).mean() < 0.6
    with pytest.raises(ValueError, match="expected"):
        orthogonal()(jax.random.key(0), (3,))


def test_mlp_is_its_formula():
    x = jax.random.normal(jax.random.key(1), (5, 3))
    for final in (True, False):
        mlp = MLP((8, 4), activation=nn.relu, activate_final=final)
        params = mlp.init(jax.random.key(0), x)["params"]
        assert set(params) == {"layer_0", "layer_1"}
        np.testing.assert_allclose(np.linalg.norm(params["layer_1"]["kernel"], axis=0), np.sqrt(2), rtol=1e-4)
        y = np.asarray(x)
        for i, name in enumerate(("layer_0", "layer_1")):
            y = y @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
            y = np.maximum(y, 0) if i == 0 or final else y
        np.testing.assert_allclose(mlp.apply({"params": params}, x), y, atol=1e-5)


def test_heads_shapes_values_and_types():
    x = jax.random.normal(jax.random.key(1), (2, 3, 8)).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float32)

    def run(head):
        params = head.init(jax.random.key(0), x)["params"]
        return params, head.apply({"params": params}, x)

    params, logits = run(heads.Categorical(5))
    assert logits.shape == (2, 3, 5) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wide @ np.asarray(params["logits"]["kernel"]), atol=1e-5)
    assert np.abs(logits).max() < 0.1  # near uniform at the start
    params, value = run(heads.Value())
    assert value.shape == (2, 3) and value.dtype == jnp.float32
    np.testing.assert_allclose(value, (wide @ np.asarray(params["value"]["kernel"]))[..., 0], atol=1e-5)


def test_gaussian_head_forms_and_bounds():
    x = jax.random.normal(jax.random.key(1), (4, 8))
    head = heads.Gaussian(2, initial_log_std=-0.5)
    params = head.init(jax.random.key(0), x)["params"]
    assert params["log_std"].shape == (2,)
    mean, log_std = head.apply({"params": params}, x)
    assert mean.shape == log_std.shape == (4, 2)
    np.testing.assert_array_equal(log_std, np.full((4, 2), -0.5, np.float32))
    head = heads.Gaussian(2, state_dependent=True, bounds=(-1.0, 1.0), kernel_init=nn.initializers.normal(3.0))
    params = head.init(jax.random.key(0), x)["params"]
    assert params["log_std"]["kernel"].shape == (8, 2)
    _, log_std = head.apply({"params": params}, x)
    raw = np.asarray(x) @ np.asarray(params["log_std"]["kernel"])
    assert np.abs(raw).max() > 1
    np.testing.assert_allclose(log_std, np.clip(raw, -1, 1), atol=1e-5)


def test_reward_is_read_at_the_last_real_token():
    hidden = jax.random.normal(jax.random.key(1), (4, 5, 8))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    head = heads.Reward()
    params = head.init(jax.random.key(0), hidden, mask)["params"]
    score = np.asarray(hidden)[[0, 1, 2], [4, 1, 3]] @ np.asarray(params["reward"]["kernel"])[:, 0]
    np.testing.assert_allclose(head.apply({"params": params}, hidden, mask), [*score, 0.0], atol=1e-6)
    assert set(params["reward"]) == {"kernel"}
    with pytest.raises(ValueError, match=r"mask has shape \(4, 4\)"):
        head.apply({"params": params}, hidden, mask[:, :4])


def test_norm_statistics_are_float32():
    """In bfloat16 the mean of 300 squares near 256 would be off by percents."""
    x = (16 + jax.random.normal(jax.random.key(0), (2, 300))).astype(jnp.bfloat16)
    scale = jnp.linspace(0.5, 1.5, 300)
    got = RMSNorm(dtype="bfloat16").apply({"params": {"scale": scale}}, x)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * np.asarray(scale)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.012)
    np.testing.assert_allclose((np.asarray(got, np.float64) / want).mean(), 1, atol=1e-3)


def test_norm_adds_eps_to_the_mean_square():
    got = RMSNorm(eps=0.75).apply({"params": {"scale": jnp.ones(4)}}, jnp.full((1, 4), 0.5))
    np.testing.assert_allclose(got, 0.5, rtol=1e-6)  # 0.5 / sqrt(0.25 + 0.75)


def test_swiglu_is_its_formula():
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    ffn = FeedForward(6)
    params = ffn.init(jax.random.key(0), x)["params"]
    gate, up, down = (np.asarray(params[n]["kernel"], np.float64) for n in ("gate", "up", "down"))
    g = np.asarray(x) @ gate
    want = (g / (1 + np.exp(-g)) * (np.asarray(x) @ up)) @ down
    np.testing.assert_allclose(ffn.apply({"params": params}, x), want, atol=1e-7)
