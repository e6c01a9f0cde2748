"""Rotary embedding against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.rope import DynamicNTK, LinearScaling, Llama3Scaling, Yarn, frequencies, rotate, rotation


def turned(x, positions, base):
    """Each pair (x_i, x_{i + d/2}) as a complex number, times exp(i position base^(-2i/d)), in float64."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angle = positions[:, :, None, None] * base ** (-2.0 * np.arange(half) / x.shape[-1])
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rotation_is_multiplication_by_a_phase():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 300, 2]])
    cos, sin = rotation(jnp.asarray(positions), 8, base=500.0)
    assert cos.shape == sin.shape == (2, 5, 1, 4) and cos.dtype == jnp.float32
    got = rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got, turned(x, positions, 500.0), atol=1e-4)


def test_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(i, j):
        at = lambda x, n: rotate(jnp.asarray(x), *rotation(jnp.array([[n]]), 16))  # noqa: E731
        return float((at(q, i) * at(k, j)).sum())

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_the_angle_is_exact_for_bfloat16_vectors():
    """Positions 256 and 257 are one number in bfloat16; their angles must differ."""
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    got = rotate(x, *rotation(jnp.array([[256, 257]]), 4))
    assert got.dtype == jnp.bfloat16
    want = turned(np.ones((1, 2, 1, 4)), np.array([[256, 257]]), 10_000.0)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.01)


def test_linear_scaling_divides_positions():
    positions = jnp.array([[0, 4, 12]])
    got = rotation(positions, 8, scaling=LinearScaling(4.0))
    np.testing.assert_allclose(got, rotation(positions // 4, 8), atol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_divides_long_ones():
    f = np.asarray(frequencies(64, base=5e5))
    got = np.asarray(frequencies(64, base=5e5, scaling=Llama3Scaling(8.0, 8192)))
    wave = 2 * math.pi / f
    np.testing.assert_allclose(got[wave < 8192 / 4], f[wave < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(got[wave > 8192], f[wave > 8192] / 8, rtol=1e-6)
    between = (wave > 8192 / 4) & (wave < 8192)
    assert between.any() and ((got < f) & (got > f / 8))[between].all()


def test_yarn_ramp_and_temperature():
    scaling = Yarn(factor=4.0, original_length=4096)
    f = np.asarray(frequencies(128))
    ratio = np.asarray(frequencies(128, scaling=scaling)) / f
    turns = 4096 * f / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 0.25, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all()
    cos, sin = rotation(jnp.zeros((1, 1), jnp.int32), 128, scaling=scaling)
    np.testing.assert_allclose(cos, 0.1 * math.log(4) + 1, rtol=1e-6)
    cos, _ = rotation(jnp.zeros((1, 1), jnp.int32), 128, scaling=Yarn(4.0, 4096, attention_factor=1.5))
    np.testing.assert_allclose(cos, 1.5, rtol=1e-6)


def test_dynamic_base_moves_past_the_original_length_for_each_row_alone():
    positions = jnp.array([[0, 1, 2, 7], [0, 1, 2, 15]])
    cos, _ = rotation(positions, 8, scaling=DynamicNTK(2.0, 8))
    plain, _ = rotation(positions, 8)
    np.testing.assert_allclose(cos[0], plain[0], atol=1e-6)  # 8 tokens: unchanged
    base = 10_000.0 * (2.0 * 16 / 8 - 1) ** (8 / 6)
    np.testing.assert_allclose(cos[1], rotation(positions, 8, base=base)[0][1], atol=1e-5)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="head_dim is 7"):
        frequencies(7)
    with pytest.raises(ValueError, match=r"positions have shape \(4,\), expected \[B, T\]"):
        rotation(jnp.arange(4), 8)


def test_gradients_flow_through_the_turn():
    cos, sin = rotation(jnp.array([[3]]), 4)
    weights = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
    grad = jax.grad(lambda x: (rotate(x, cos, sin) * weights).sum())(jnp.ones((1, 1, 1, 4)))
    np.testing.assert_allclose(grad, rotate(weights, cos, -sin), atol=1e-6)  # the inverse turn
