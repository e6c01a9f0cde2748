"""Grouped products for Hopper GPUs: on a model of a multiprocessor, by what the compiler says, and on a GPU.

JAX_PLATFORMS=cuda pytest tests/kernels/test_grouped_matmul_gpu.py
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels import aot_gpu
from jaxrl.kernels import grouped_matmul_gpu as module
from jaxrl.kernels.grouped_matmul import grouped_matmul


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_grouped_matmul", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


hopper, oracle = load("kernels/hopper.py"), load("oracles/grouped_matmul.py")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the model runs on CPU")
CASES = {  # M, K, N, group sizes
    "straddling": (150, 128, 320, (33, 0, 64, 1, 40)),  # the last 12 rows have no group
    "many_steps": (64, 448, 64, (3, 61)),  # more than there are buffers
    "small_groups": (40, 64, 64, (1, 0, 9, 17, 2, 0, 8, 3)),
    "empty_ends": (264, 64, 128, (0, 0, 264, 0)),
    "long_groups": (509, 64, 64, (100, 301, 7)),
    "one_row": (1, 64, 64, (0, 1)),
    "no_group_has_rows": (9, 64, 64, (0, 0, 0)),
}


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """So that each has several tiles."""
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(module, "BLOCKS", 3)


def arrays_of(m, k, n, groups, dtype=jnp.float16, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (groups, k, n), (m, n))]


def with_gradients(x, w, dy, sizes, implementation="mosaic_gpu"):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *vjp(dy)


def on_the_model(f, *args):
    return hopper.run(f, *args)[0]


def on_the_device(f, *args):
    return jax.jit(f)(*args)


def check(case, run=on_the_model, dtype=jnp.float16, tolerance=1e-3):
    m, k, n, sizes = case
    x, w, dy = arrays_of(m, k, n, len(sizes), dtype)
    got = run(with_gradients, x, w, dy, jnp.asarray(sizes, jnp.int32))
    for a, b in zip(got, oracle.grouped_matmul(x, w, sizes, dy), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@on_cpu
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    check(CASES[name])


@on_cpu
def test_bfloat16():
    check(CASES["straddling"], dtype=jnp.bfloat16, tolerance=2.0**-8)


@on_cpu
def test_second_derivatives():
    m, k, n, sizes = CASES["small_groups"]
    x, w, dy = arrays_of(m, k, n, len(sizes))
    sizes = jnp.asarray(sizes, jnp.int32)

    def gradients(x, w, dy, implementation):
        def loss(x, w, dy):
            _, dx, dw = with_gradients(x / 8, w, dy, sizes, implementation)
            return jnp.sum(jnp.sin(dx.astype(jnp.float32))) + jnp.sum(jnp.cos(dw.astype(jnp.float32)))

        return jax.grad(loss, (0, 1, 2))(x, w, dy)

    want = jax.jit(functools.partial(gradients, implementation="tiles"))(x, w, dy)
    got = on_the_model(functools.partial(gradients, implementation="mosaic_gpu"), x, w, dy)
    for a, b in zip(got, want, strict=True):
        size = np.abs(np.asarray(b, np.float32)).max()
        np.testing.assert_allclose(np.asarray(a, np.float32) / size, np.asarray(b, np.float32) / size, atol=5e-3)


@on_cpu
def test_rows_of_others_are_not_read():
    m, k, n, sizes = CASES["straddling"]
    x, w, dy = (np.array(a) for a in arrays_of(m, k, n, len(sizes)))
    sizes = jnp.asarray(sizes, jnp.int32)
    clean = on_the_model(with_gradients, x, w, dy, sizes)
    x[int(sizes.sum()) :], dy[int(sizes.sum()) :] = np.nan, np.inf
    for a, b in zip(on_the_model(with_gradients, x, w, dy, sizes), clean, strict=True):
        np.testing.assert_array_equal(a, b)
    x[33], dy[33] = np.nan, np.inf  # the first row of the third group, in reach of the first group's last tile
    for seed in range(3):
        (y, dx, dw), _ = hopper.run(with_gradients, x, w, dy, sizes, seed=seed)
        assert np.isfinite(np.delete(y, 33, 0)).all() and np.isfinite(np.delete(dx, 33, 0)).all()
        assert np.isfinite(np.delete(dw, 2, 0)).all() and not np.isfinite(dw[2]).any()


@on_cpu
def test_every_interleaving_gives_the_same_bits():
    m, k, n, sizes = CASES["straddling"]
    arguments = *arrays_of(m, k, n, len(sizes)), jnp.asarray(sizes, jnp.int32)
    first, *others = (hopper.run(with_gradients, *arguments, seed=n)[0] for n in range(3))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@on_cpu
def test_under_vmap_with_groups_for_each():
    x, w, dy = (jnp.stack([a, -2 * a]) for a in arrays_of(24, 64, 64, 2))
    sizes = jnp.asarray([[5, 19], [16, 0]], jnp.int32)
    got = on_the_model(jax.vmap(with_gradients), x, w, dy, sizes)
    for n in range(2):
        want = on_the_model(with_gradients, x[n], w[n], dy[n], sizes[n])
        jax.tree.map(np.testing.assert_array_equal, [a[n] for a in got], list(want))


@on_cpu
@pytest.mark.parametrize("check_vma", [False, True])
def test_traces_under_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    f = jax.shard_map(with_gradients, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=check_vma)
    x, w, dy = arrays_of(64, 64, 128, 4)
    traced = jax.jit(f).trace(x, w, dy, jnp.ones(4, jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 3


BUGS = {
    "barrier_wait": (lambda *_: None, "nan"),
    "barrier_arrive": (lambda *_: None, "deadlock"),
    "commit_smem": (lambda: None, "not committed"),
    "wait_smem_to_gmem": (lambda *_, **__: None, "never waited for"),
    "wgmma_wait": (lambda _: None, "nan"),
}


@on_cpu
@pytest.mark.parametrize("name", BUGS)
def test_the_model_notices(monkeypatch, name):
    stub, message = BUGS[name]
    x, w, dy = arrays_of(64, 448, 64, 2)
    sizes = jnp.asarray([3, 61], jnp.int32)
    want = oracle.grouped_matmul(x, w, (3, 61), dy)[0]
    monkeypatch.setattr(module.plgpu, name, stub)
    with pytest.raises(Exception, match=message):
        y = on_the_model(lambda x, w: module.rows(x, w, sizes, transposed=False, dtype=x.dtype), x, w)
        assert np.allclose(y, want, atol=0.1), "nan, or what a later copy left"


@pytest.mark.parametrize("seed", range(4))
def test_visits_cover_every_row_once(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, (2, 20, 300, 1000)[seed], 9) * rng.integers(0, 2, 9)
    sizes[4] += 1
    m = int(sizes.sum())
    group, row, start, stop, count = (np.asarray(a) for a in module.visits(jnp.asarray(sizes, jnp.int32), m))
    assert 0 < count[0] <= group.shape[0]
    covered = [(group[n], row[n] + r) for n in range(count[0]) for r in range(start[n], stop[n])]
    assert covered == list(zip(np.repeat(np.arange(9), sizes), range(m), strict=True))
    assert not (row[: count[0]] % 8).any() and (stop - start)[: count[0]].min() > 0


X, W, SIZES = jnp.zeros((16, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16), jnp.array([3, 5])
REFUSED = {
    "float32": ({"x": X.astype(jnp.float32), "w": W.astype(jnp.float32)}, "not x, w and dtype float32, float32"),
    "dtype": (
        {"dtype": jnp.float32},
        'not x, w and dtype bfloat16, bfloat16, float32; use implementation="ragged_dot"',
    ),
    "k": ({"x": X[:, :40], "w": W[:, :40]}, "K and N that are multiples of 64, not 40 and 128"),
    "n": ({"w": W[:, :, :8]}, "multiples of 64, not 64 and 8"),
    "none": ({"x": X[:, :0], "w": W[:, :0]}, "multiples of 64, not 0 and 128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f'grouped_matmul: implementation="mosaic_gpu": .*{message}'):
        grouped_matmul(**({"x": X, "w": W, "group_sizes": SIZES, "implementation": "mosaic_gpu"} | options))


@pytest.mark.parametrize(("platform", "capability"), [("gpu", "8.0"), ("gpu", "10.0"), ("tpu", "")])
def test_refuses_other_machines(monkeypatch, platform, capability):
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    reason = module.refusal(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, 64, 64)
    assert f"not {capability or platform}; use" in reason


def test_no_rows():
    y, dx, dw = with_gradients(X[:0], W, jnp.zeros((0, 128), jnp.bfloat16), 0 * SIZES)
    assert y.shape == (0, 128) and dx.shape == (0, 64) and dw.shape == W.shape and not dw.any()


def lowered(x, w):
    f = jax.value_and_grad(lambda x, w, s: jnp.sum(grouped_matmul(x, w, s).astype(jnp.float32)), (0, 1))
    return jax.jit(f).trace(x, w, SIZES).lower(lowering_platforms=("cuda",)).as_text()


def test_none_picks_the_kernels_where_they_serve(monkeypatch):
    hopper_gpu = type("Device", (), {"compute_capability": "9.0"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [hopper_gpu])
    count = lambda text: (text.count("@mosaic_gpu_v2"), text.count('"chlo.ragged_dot"'))  # noqa: E731
    assert count(lowered(X, W)) == (3, 0)
    assert count(lowered(X.astype(jnp.float32), W.astype(jnp.float32)))[0] == 0
    hopper_gpu.compute_capability = "8.0"
    assert count(lowered(X, W))[0] == 0


SHAPES = {"odd_columns": (24576, 2048, 1408, 64), "odd_rows": (1001, 192, 64, 3)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_h100_without_spills(name, dtype, monkeypatch):
    reason = aot_gpu.missing()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(module, "BLOCKS", 132)
    m, k, n, groups = SHAPES[name]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, k), (groups, k, n), (m, n))]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    _, kernels = aot_gpu.compile_kernels(aot_gpu.gpu_mesh(), with_gradients, *shapes, sizes)
    kernels = [kernel for kernel in kernels if kernel.name.startswith("grouped_matmul")]
    assert [kernel.name for kernel in kernels] == [f"grouped_matmul_{name}" for name in ("outer", "rows", "rows")]
    for kernel in kernels:
        # ptxas puts in the warpgroup.arrive of each step itself (C7519); what would cost time are C7510 and its like
        assert all(warning.startswith("C7519") for warning in kernel.warnings), kernel
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert kernel.products > 0 and kernel.copies > 0 and kernel.threads == 384, kernel
        assert kernel.shared <= aot_gpu.SHARED_PER_BLOCK and kernel.blocks_per_core >= 1, kernel


# On a GPU.

hopper_only = pytest.mark.skipif(
    jax.default_backend() != "gpu" or getattr(jax.devices()[0], "compute_capability", "") != "9.0",
    reason="needs a Hopper GPU, compute capability 9.0",
)
LARGE = {
    "odd_columns": (5000, 448, 1408, (700, 0, 1, 1999, 130, 2000, 7)),
    "many_groups": (4096, 256, 512, tuple(int(n) for n in np.random.default_rng(0).multinomial(4000, [1 / 64] * 64))),
}


@hopper_only
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_on_a_gpu(name, dtype):
    check(CASES[name], run=on_the_device, dtype=dtype, tolerance=2.0**-8)


@hopper_only
@pytest.mark.parametrize("name", LARGE)
def test_large_products_on_a_gpu(name):
    """Against products of each group in float32, and the same bits every time."""
    m, k, n, sizes = LARGE[name]
    x, w, dy = arrays_of(m, k, n, len(sizes), jnp.bfloat16)
    f = jax.jit(with_gradients)
    got = f(x, w, dy, jnp.asarray(sizes, jnp.int32))
    x64, w64, dy64 = (np.asarray(a, np.float32) for a in (x, w, dy))
    y, dx, dw = np.zeros((m, n), np.float32), np.zeros_like(x64), np.zeros_like(w64)
    for group, end in enumerate(np.cumsum(sizes)):
        part = slice(end - sizes[group], end)
        y[part], dx[part] = x64[part] @ w64[group], dy64[part] @ w64[group].T
        dw[group] = x64[part].T @ dy64[part]
    for a, b in zip(got, (y, dx, dw), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=2.0**-8 * np.abs(b).max())
    for _ in range(10):
        again = f(x, w, dy, jnp.asarray(sizes, jnp.int32))
        jax.tree.map(np.testing.assert_array_equal, got, again)
