"""Rotary embedding against its closed form."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.linear_attention import LinearConfig
from jaxrl.nets.rope import DynamicNTK, LinearScaling, Llama3Scaling, Yarn, frequencies, rotate, rotation
from jaxrl.nets.transformer import rotations


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


def partly(x, positions, base, size):
    """Heads of which the first `size` numbers turn, in float64."""
    x = np.asarray(x, np.float64)
    return np.concatenate([turned(x[..., :size], positions, base), x[..., size:]], axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_numbers_of_a_head_turn_and_the_others_pass(dtype):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 3, 9)), dtype)
    positions = np.array([[0, 1, 2, 30], [7, 0, 1, 300]])
    got = rotate(x, *rotation(jnp.asarray(positions), 6, base=500.0))
    assert got.shape == x.shape and got.dtype == x.dtype
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
    want = partly(x, positions, 500.0, 6)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1e-4 if dtype == "float32" else 0.02)
    with pytest.raises(ValueError, match="turns 10 numbers of a head, but x has shape"):
        rotate(x, *rotation(jnp.asarray(positions), 10))


PARTIAL = TransformerConfig(11, 16, 1, 4, 2, 24, head_dim=6, rotary_dim=4, rope_base=50.0, max_length=16)
KERNELS = {
    "softmax": (None, lambda scores: np.exp(scores / 6**0.5), lambda x: x),
    "linear": (LinearConfig("elu+1", eps=0.0), lambda scores: scores, lambda x: np.where(x > 0, x + 1, np.exp(x))),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_layers_turn_a_part_of_their_heads_also_with_a_cache(kind):
    """One layer against a loop in float64: weights of pairs, softmax or feature maps, of turned queries and keys."""
    linear, weight, features = KERNELS[kind]
    model = language_model(replace(PARTIAL, linear=linear))
    draw = np.random.default_rng(3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0.3, 0.4, x.shape), jnp.float32), shapes)
    tokens, positions = draw.integers(0, 11, (2, 7)), np.array([[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 9, 10, 11]])

    stack = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["linear_layers" if linear else "layers"])
    normed = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    x = embedding[tokens]
    q, k, v = (
        (normed(x, stack["attention_norm"]["scale"]) @ stack["attention"][name]["kernel"]).reshape(2, 7, -1, 6)
        for name in "qkv"
    )
    q, k = (features(partly(y, positions, 50.0, 4)) for y in (q, k))
    y = np.zeros((2, 7, 4, 6))
    for b, t, h in np.ndindex(2, 7, 4):
        weights = weight(k[b, : t + 1, h // 2] @ q[b, t, h])
        y[b, t, h] = weights @ v[b, : t + 1, h // 2] / weights.sum()
    x = x + y.reshape(2, 7, 24) @ stack["attention"]["o"]["kernel"]
    z, ffn = normed(x, stack["ffn_norm"]["scale"]), {name: y["kernel"] for name, y in stack["ffn"].items()}
    gate = z @ ffn["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (z @ ffn["up"])) @ ffn["down"]
    want = normed(x, np.asarray(params["norm"]["scale"], np.float64))

    run = jax.jit(model.apply)
    given = jnp.asarray(tokens), jnp.asarray(positions)
    np.testing.assert_allclose(run(params, given[0], positions=given[1])[0], want, atol=1e-4)
    cache, pieces = model.init_cache(2, 7), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        hidden, cache = run(params, given[0][:, part], positions=given[1][:, part], cache=cache)
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=1e-4)


def test_scaled_frequencies_are_those_of_the_numbers_that_turn():
    for scaling in (None, LinearScaling(4.0), DynamicNTK(2.0, 8), Llama3Scaling(8.0, 8), Yarn(4.0, 8)):
        part = replace(PARTIAL, rope_scaling=scaling)
        whole = replace(part, head_dim=4, rotary_dim=None)
        positions = jnp.array([[0, 1, 2, 15]])
        jax.tree.map(np.testing.assert_array_equal, rotations(part, positions), rotations(whole, positions))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim is 3, but rotary embedding turns pairs"),
        ({"rotary_dim": 0}, "rotary_dim is 0 of 6"),
        ({"rotary_dim": 6}, "rotary_dim is 6 of 6, .*None: all numbers turn"),
        ({"rotary_dim": 8}, "rotary_dim is 8 of 6"),
        ({"rope_sections": (1, 1)}, r"rope_sections \(1, 1\) and no latent attention: expected"),
        ({"positions": "learned"}, "positions 'learned'.*: expected an even part of a head, rotary positions"),
        ({"kv_heads": 4, "latent": LatentConfig(8, 4, 2, 4)}, "and latent attention: expected"),
    ],
)
def test_a_part_that_cannot_turn_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PARTIAL, **changes)


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
