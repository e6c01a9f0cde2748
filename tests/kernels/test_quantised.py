import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.quantised import (
    FP8,
    INT8,
    Quantised,
    Scheme,
    dequantise,
    product_bound,
    quantise,
    quantised_grouped_matmul,
    quantised_matmul,
    rounding_bound,
)

path = pathlib.Path(__file__).parents[1] / "oracles" / "quantised.py"
spec = importlib.util.spec_from_file_location("quantised_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
SMALL = Scheme(jnp.float8_e4m3fn, (1, 4), (4, 3))  # FP8 with blocks that a small matrix has several of
SCHEMES = {"int8": INT8, "fp8": FP8, "small_blocks": SMALL, "int8_blocks": Scheme(jnp.int8, (2, 5), (5, None))}
SHAPES = [(1, 1, 1), (5, 17, 7), (3, 12, 6), (2, 130, 3), (0, 3, 2), (3, 0, 2), (3, 2, 0)]


def draw(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(np.float32)


def name(scheme):
    return jnp.dtype(scheme.dtype).name


@functools.cache
def dense(scheme):
    return jit(functools.partial(quantised_matmul, scheme=scheme))


@functools.cache
def bounded(scheme):
    return jit(functools.partial(product_bound, scheme=scheme))


def exact(x, w, scheme):
    return oracle.matmul(x, w, name(scheme), scheme.x_block, scheme.w_block)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 9), (4, 131), (130, 3)])
def test_quantise_is_the_nearest_value(scheme, shape):
    x = draw(*shape)
    for block in (scheme.x_block, scheme.w_block):
        q = jit(functools.partial(quantise, dtype=scheme.dtype, block=block))(x)
        values, scales = oracle.quantise(x, name(scheme), block)
        assert q.values.dtype == scheme.dtype and q.scales.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(q.values, np.float64), values)
        np.testing.assert_array_equal(q.scales, scales)
        want = oracle.dequantise(values, scales, block)
        np.testing.assert_allclose(dequantise(q, block=block), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_ties_and_steps(dtype):
    """Every value, every middle between two neighbours, and what lies next to it, at a scale of 1."""
    grid = np.arange(128.0) if dtype == jnp.int8 else np.array(oracle.E4M3)
    middles = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, middles, np.nextafter(np.float32(middles), 0), np.nextafter(np.float32(middles), 999)])
    x = np.concatenate([x, -x]).astype(np.float32)[None]
    q = quantise(x, dtype=dtype, block=(1, None))
    assert q.scales == 1
    np.testing.assert_array_equal(
        np.asarray(q.values, np.float64), oracle.quantise(x, jnp.dtype(dtype).name, (1, None))[0]
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(scheme, shape):
    m, k, n = shape
    x, w, dy = draw(m, k), draw(k, n, seed=1), draw(m, n, seed=2)

    @jit
    def run(x, w, dy):
        y, vjp = jax.vjp(functools.partial(quantised_matmul, scheme=scheme), x, w)
        return y, *vjp(dy)

    y, x_rounded, w_rounded = exact(x, w, scheme)
    for got, want in zip(run(x, w, dy), (y, dy @ w_rounded.T, x_rounded.T @ dy), strict=True):
        size = max(np.abs(want).max(initial=0), 1)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * size)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_groups(scheme):
    sizes, k, n = (4, 0, 7, 1), 9, 5
    x, w, dy = draw(15, k), draw(4, k, n, seed=1), draw(15, n, seed=2)
    x[12:], dy[12:] = np.nan, np.nan  # rows after the last group

    @jit
    def run(x, w, dy):
        f = functools.partial(quantised_grouped_matmul, group_sizes=np.array(sizes), scheme=scheme)
        y, vjp = jax.vjp(f, x, w)
        return y, *vjp(dy)

    got, row = run(x, w, dy), 0
    if scheme.x_block[0] != 1:  # the last group's row shares a block with a row that is not finite
        got = run(np.nan_to_num(x), w, np.nan_to_num(dy))
        x = np.nan_to_num(x)
    y, dx, dw = np.zeros((15, n)), np.zeros((15, k)), np.zeros((4, k, n))
    x_rounded = oracle.dequantise(*oracle.quantise(x, name(scheme), scheme.x_block), scheme.x_block)
    for group, size in enumerate(sizes):
        rows = slice(row, row + size)
        _, _, w_rounded = exact(x[:1] * 0, w[group], scheme)
        y[rows], dx[rows] = x_rounded[rows] @ w_rounded, dy[rows] @ w_rounded.T
        dw[group] = x_rounded[rows].T @ dy[rows]
        row += size
    for a, b in zip(got, (y, dx, dw), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max())


def test_gradients_of_groups_are_those_of_each_alone():
    """With both products in 8 bits, too: a group's rows share no block with another's."""
    scheme, sizes = Scheme(jnp.float8_e4m3fn, (1, 4), (4, 4)), (4, 0, 7, 1)
    x, w, dy = draw(15, 9), draw(4, 9, 5, seed=1), draw(15, 5, seed=2)
    options = {"scheme": scheme, "quantise_gradient": True}
    y, back = jax.vjp(lambda x, w: quantised_grouped_matmul(x, w, np.array(sizes), **options), x, w)
    dx, dw = jit(back)(dy)
    row, plain = 0, jit(jax.vjp(lambda x, w: quantised_grouped_matmul(x, w, np.array(sizes), scheme=scheme), x, w)[1])
    for group, size in enumerate(sizes):
        rows = slice(row, row + size)
        alone, one = jax.vjp(lambda x, w: quantised_matmul(x, w, **options), x[rows], w[group])
        for got, want in zip((y[rows], dx[rows], dw[group]), (alone, *one(dy[rows])), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        row += size
    assert not dx[row:].any() and not dw[1].any()
    for rounded, exact in zip((dx, dw), plain(dy), strict=True):
        assert 1e-3 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.1
    with pytest.raises(ValueError, match="quantised_grouped_matmul: blocks of w are .* from both sides"):
        quantised_grouped_matmul(x, w, np.array(sizes), scheme=SMALL, quantise_gradient=True)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weights_may_be_quantised_before(scheme):
    x, dense_w, stack, sizes = draw(6, 9), draw(9, 5), draw(3, 9, 5), np.array([2, 1, 3])
    make = functools.partial(quantise, dtype=scheme.dtype, block=scheme.w_block)
    grouped = lambda x, w: quantised_grouped_matmul(x, w, sizes, scheme=scheme)

    @jit
    def run(f, w):
        value_and_grad = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))))
        return value_and_grad(x, w), value_and_grad(x, make(w))

    for f, w in ((functools.partial(quantised_matmul, scheme=scheme), dense_w), (grouped, stack)):
        for a, b in zip(*run(jax.tree_util.Partial(f), w), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("block", [(1, None), (8, 16)])
def test_the_rounding_bound_holds_and_is_reached(dtype, block):
    for scale in (1.0, 1e-12, 1e-25, 1e30):  # the third is below the least scale
        x = draw(40, 64) * np.float32(scale)
        q = quantise(x, dtype=dtype, block=block)
        error = np.abs(np.asarray(dequantise(q, block=block), np.float64) - x)
        bound = np.asarray(rounding_bound(x, dtype=dtype, block=block), np.float64)
        assert np.all(error <= bound * (1 + 1e-6))
        if scale != 1e-25:
            assert np.max(error / bound) > 0.9


@pytest.mark.parametrize("scheme", [INT8, FP8, SMALL], ids=["int8", "fp8", "small_blocks"])
def test_the_product_bound_holds_and_means_something(scheme):
    def ratio(x, w):
        error = np.abs(np.asarray(dense(scheme)(x, w), np.float64) - x.astype(np.float64) @ w.astype(np.float64))
        bound = np.asarray(bounded(scheme)(x, w), np.float64)
        assert np.all(error <= bound * (1 + 1e-5))
        return np.max(error / bound)

    x, w = draw(20, 300), draw(300, 40, seed=1)
    assert ratio(x, w) > 0.02
    assert ratio(x * np.float32(1e-10), w * np.float32(1e12)) > 0.02
    x[:, 7] = 1e6  # one channel: what is small beside it is lost, and the bound says so
    assert ratio(x, w) > 0.001
    assert np.all(dense(scheme)(0 * x, w) == 0)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_errors_that_agree_come_near_the_product_bound(dtype):
    """Numbers at a scale of 1 that are all rounded up by nearly half a step."""
    rng = np.random.default_rng(0)

    def rounded_up(*shape):
        if dtype == jnp.int8:
            return rng.integers(0, 3, shape) + 0.501
        return 2.0 ** rng.integers(-5, 2, shape) * (1 + 2.0**-4 + 1e-4)

    scheme = Scheme(dtype, (1, None), (None, 1))
    x = np.pad(rounded_up(20, 1024), ((0, 0), (1, 1))).astype(np.float32)
    w = np.pad(rounded_up(1024, 40), ((1, 1), (0, 0))).astype(np.float32)
    x[:, 0] = w[-1] = 127 if dtype == jnp.int8 else 448  # the scales are 1, and no product holds both
    error = np.abs(np.asarray(dense(scheme)(x, w), np.float64) - x.astype(np.float64) @ w.astype(np.float64))
    bound = np.asarray(bounded(scheme)(x, w), np.float64)
    assert np.all(error <= bound) and np.min(error / bound) > 0.85


def test_int8_sums_are_exact():
    rng = np.random.default_rng(0)  # sums far above what float32 counts one by one
    x, w = rng.integers(90, 128, (2, 60_000)), rng.integers(90, 128, (60_000, 3))
    x[:, 0] = w[0] = 127
    y = dense(INT8)(x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_array_equal(y, (x @ w).astype(np.float32))


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_nan_where_it_is_used(scheme, bad):
    x, w = draw(3, 150), draw(150, 4)
    clean = np.asarray(dense(scheme)(x, w))
    x[1, 3] = bad
    y = np.asarray(dense(scheme)(x, w))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    q = quantise(x, dtype=scheme.dtype, block=scheme.x_block)
    assert np.isnan(q.scales[1, 0]) and np.all(np.asarray(q.values[1, :128], np.float32) == 0)
    assert np.isnan(rounding_bound(x, dtype=scheme.dtype, block=scheme.x_block)[1, :128]).all()


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=["int8", "fp8"])
def test_zeros_and_extremes(scheme):
    zeros = np.zeros((2, 130), np.float32)
    w = draw(130, 3)
    f = dense(scheme)
    assert np.all(f(zeros, w) == 0) and np.all(f(draw(2, 130), 0 * w) == 0)
    largest = np.finfo(np.float32).max
    np.testing.assert_allclose(f(zeros + largest, w * 0 + 2.0**-30), np.full((2, 3), 130 * 2.0**98), rtol=1e-5)
    assert np.isfinite(f(zeros + np.finfo(np.float32).tiny, w)).all()


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=["int8", "fp8"])
def test_bfloat16_in_and_out(scheme):
    x, w = jnp.asarray(draw(6, 140), jnp.bfloat16), jnp.asarray(draw(140, 5), jnp.bfloat16)
    loss = lambda x, w: jnp.sum(jnp.sin(quantised_matmul(x, w, scheme=scheme).astype(jnp.float32)))
    dx, dw = jit(jax.grad(loss, (0, 1)))(x, w)
    y = dense(scheme)(x, w)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    want = exact(np.asarray(x, np.float32), np.asarray(w, np.float32), scheme)[0]
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2.0**-8, atol=1e-5)


def test_composes_with_vmap_scan_and_remat():
    x, w = draw(3, 2, 4, 9), draw(3, 9, 9)
    loss = lambda x, w: jnp.sum(jnp.sin(quantised_matmul(x, w, scheme=SMALL)))
    grad = jit(jax.value_and_grad(loss, (0, 1)))
    one_by_one = [grad(*arrays) for arrays in zip(x, w, strict=True)]
    mapped = jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(x, w)
    for n, want in enumerate(one_by_one):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5), mapped, want)

    def summed(x, w):
        step = jax.checkpoint(lambda total, xw: (total + loss(*xw), None))
        return jax.lax.scan(step, 0.0, (x, w))[0]

    grads = jit(jax.grad(summed, (0, 1)))(x, w)
    for a, b in zip(grads, mapped[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rows_spread_over_devices_sum_the_gradient_of_shared_weights():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x, w = draw(8, 9), draw(9, 5)
    f = functools.partial(quantised_matmul, scheme=SMALL)
    spread = jax.shard_map(f, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    got, want = (jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(g(x, w))), (0, 1)))(x, w) for g in (spread, f))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward_pass_is_in_8_bits():
    x, w = jnp.ones((256, 512)), jnp.ones((512, 128))
    for f in (
        lambda x, w: quantised_matmul(x, w),
        lambda x, w: quantised_grouped_matmul(x, w[None], jnp.array([256])),
    ):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(f, x, w)[1], x, w))
        assert sum(a.size * a.dtype.itemsize for a in kept) < 1.1 * (x.size + w.size)


def test_training_through_the_rounding():
    """Straight through: descent on the rounded product fits targets that a product in 8 bits can reach."""
    x, target = draw(64, 16), draw(16, 4, seed=1)

    def loss(w):
        return jnp.mean((quantised_matmul(x, w, scheme=INT8) - x @ target) ** 2)

    step = lambda w, _: (w - 0.02 * jax.grad(loss)(w), loss(w))
    losses = jit(lambda w: jax.lax.scan(step, w, None, 300))(jnp.zeros((16, 4)))[1]
    assert losses[-1] < losses[0] / 1000


def test_same_bits_twice():
    x, w = draw(40, 300), draw(300, 17)
    for f in (quantised_matmul, functools.partial(quantised_matmul, scheme=INT8)):
        np.testing.assert_array_equal(jit(f)(x, w), jit(f)(x, w))


X, W = jnp.ones((6, 4)), jnp.ones((4, 2))
PREPARED = quantise(W, dtype=jnp.int8, block=(None, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantised_matmul(X, W.T), r"quantised_matmul: x \(6, 4\) and w \(2, 4\), expected \[..., K\]"),
        (lambda: quantised_matmul(X, W[None]), r"w \(1, 4, 2\), expected \[..., K\] and \[K, N\]"),
        (lambda: quantised_grouped_matmul(X, W, jnp.ones(1, jnp.int32)), r"and w \(4, 2\), expected \[M, K\]"),
        (
            lambda: jax.eval_shape(quantised_grouped_matmul, X, W[None], jnp.ones(2, jnp.int32)),
            "group_sizes are int32",
        ),
        (lambda: quantised_matmul(X, PREPARED), "w has values int8 and scales .* expected float8_e4m3fn and"),
        (lambda: quantised_matmul(X, Quantised(PREPARED.values, X), scheme=INT8), r"scales \(6, 4\), expected int8"),
        (lambda: quantised_matmul(X, W, scheme=INT8._replace(w_block=(2, 1))), "None wide and blocks of w 2 high"),
        (
            lambda: quantised_matmul(X[:, :1], W[:1], scheme=INT8._replace(dtype=jnp.int4)),
            "dtype = int4, expected int8",
        ),
        (lambda: quantise(X[0], dtype=jnp.int8, block=(1, 1)), r"x has shape \(4,\), expected \[..., R, C\]"),
        (lambda: quantise(X, dtype=jnp.int8, block=(0, 1)), r"block = \(0, 1\), expected sides of at least 1"),
        (
            lambda: jax.eval_shape(
                functools.partial(quantised_matmul, scheme=INT8), jnp.ones((1, 140_000)), jnp.ones((140_000, 1))
            ),
            "K = 140000 in one block, expected at most 133144 for sums in int32",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
