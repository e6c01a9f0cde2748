"""Powers of two as scales, and backward products in 8 bits; the forward ones are in test_quantised.py."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxrl.kernels.quantised import FP8, INT8, Scheme, dequantise, quantise, quantised_matmul, rounding_bound

path = pathlib.Path(__file__).parents[1] / "oracles" / "quantised.py"
spec = importlib.util.spec_from_file_location("quantised_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
E4M3 = jnp.float8_e4m3fn
SMALL = Scheme(E4M3, (1, 4), (4, 4))


def draw(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(np.float32)


def gradients(product):
    """(x, w, dy) -> (y, dx, dw), compiled."""

    @jit
    def run(x, w, dy):
        y, back = jax.vjp(product, x, w)
        return y, *back(dy)

    return run


@pytest.mark.parametrize("power_of_two", [False, True])
def test_deepseek_s_blocks_by_numpy(power_of_two):
    """A 128 x 128 block by its definition: amax / 448, and the cast of ml_dtypes."""
    x = draw(200, 300)
    found = jit(functools.partial(quantise, dtype=E4M3, block=(128, 128), power_of_two=power_of_two))(x)
    for i in range(2):
        for j in range(3):
            part = x[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale = np.abs(part).max() * np.float32(1 / 448)
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            assert found.scales[i, j] == scale
            want = (part / scale).astype(ml_dtypes.float8_e4m3fn)
            got = np.asarray(found.values)[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    back = dequantise(found, block=(128, 128))
    bound = rounding_bound(jnp.asarray(x), dtype=E4M3, block=(128, 128), power_of_two=power_of_two)
    error = np.abs(np.asarray(back) - x)
    assert (error <= bound).all() and (error / bound).max() > 0.9


def test_powers_of_two_are_the_least_that_will_do():
    tops = np.array([1.0, 2.0, np.nextafter(np.float32(2), np.float32(3)), 3.0, 1e-30, 448.0, 449.0], np.float32)
    scales = jit(functools.partial(quantise, dtype=jnp.int8, block=(1, None), power_of_two=True))(tops[:, None]).scales
    plain = jit(functools.partial(quantise, dtype=jnp.int8, block=(1, None)))(tops[:, None]).scales
    mantissa, _ = np.frexp(np.asarray(scales, np.float64))
    assert (mantissa == 0.5).all() and (scales >= plain).all() and (scales < 2 * plain).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 17, 7), (3, 12, 6), (9, 4, 13)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_backward_products_are_the_oracle_s(shape, power_of_two):
    """dx = q(dy) q(w)^T and dw = q(q(x)^T) q(dy), from the formats' definitions, in float64."""
    m, k, n = shape
    scheme = SMALL._replace(power_of_two=power_of_two)
    x, w, dy = draw(m, k), draw(k, n, seed=1), draw(m, n, seed=2)
    product = functools.partial(quantised_matmul, scheme=scheme, quantise_gradient=True)
    y, dx, dw = gradients(product)(x, w, dy)

    def rounded(a, block):
        if not power_of_two:
            return oracle.dequantise(*oracle.quantise(a, "float8_e4m3fn", block), block)
        out = np.zeros(a.shape)
        for r in oracle.blocks(a.shape[0], block[0]):
            for c in oracle.blocks(a.shape[1], block[1]):
                part = np.asarray(a[r, c], np.float32)
                top = max(np.abs(part).max() * np.float32(1 / 448), np.float32(2.0**-60))
                scale = 2.0 ** np.ceil(np.log2(np.float64(top)))
                out[r, c] = np.vectorize(oracle.nearest_e4m3)(part / scale) * scale
        return out

    x8, w8 = rounded(x, (1, 4)), rounded(w, (4, 4))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, x8 @ w8)
    close(dx, rounded(dy, (1, 4)) @ w8.T)
    close(dw, rounded(x8.T, (1, 4)) @ rounded(dy, (4, 1)))


def test_gradient_error_is_that_of_eight_bits():
    """A few per cent of the exact gradients; without scales the same 8 bits hold nothing of gradients this small."""
    x, w, dy = draw(256, 256), draw(256, 128, seed=1), 1e-5 * draw(256, 128, seed=2)
    product = functools.partial(quantised_matmul, quantise_gradient=True)
    _, dx, dw = gradients(product)(x, w, dy)
    for got, want in ((dx, dy @ w.T), (dw, x.T @ dy)):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 0.01 < error < 0.06, error
    naive = lambda a: a.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.linalg.norm(naive(dy) @ naive(w).T - dy @ w.T) > 0.9 * np.linalg.norm(dy @ w.T)


def test_gradients_have_the_types_and_leave_out_a_quantised_kernel():
    x, w = jnp.asarray(draw(3, 8), jnp.bfloat16), jnp.asarray(draw(8, 4, seed=1))
    product = functools.partial(quantised_matmul, scheme=SMALL, quantise_gradient=True)
    dx, dw = jit(jax.grad(lambda x, w: product(x, w).sum().astype(jnp.float32), (0, 1)))(x, w)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    stored = quantise(w, dtype=E4M3, block=(4, 4))
    alone = jit(jax.grad(lambda x: product(x, stored).sum().astype(jnp.float32)))(x)
    np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(dx, np.float32))


@pytest.mark.parametrize("scheme", [INT8, Scheme(E4M3, (1, 4), (4, 3)), Scheme(E4M3, (1, None), (None, None))])
def test_refuses_blocks_that_are_not_square(scheme):
    with pytest.raises(ValueError, match="expected as many rows as columns, as in FP8"):
        quantised_matmul(jnp.ones((2, 8)), jnp.ones((8, 4)), scheme=scheme, quantise_gradient=True)
    assert FP8.w_block == (128, 128)
