"""What only concerns the TPU kernel: several tiles, its visits, and compilation for TPUs that are not there."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels import aot
from jaxrl.kernels import grouped_matmul_tpu as module
from jaxrl.kernels.grouped_matmul import grouped_matmul
from jaxrl.plan import hlo

path = pathlib.Path(__file__).parents[1] / "oracles" / "grouped_matmul.py"
spec = importlib.util.spec_from_file_location("grouped_matmul_oracle_for_tpu", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
SIZES = {  # rows, group sizes; tiles have 16 rows
    "straddling": (150, (33, 0, 64, 1, 40)),  # the last 12 rows have no group
    "small_groups": (40, (1, 0, 9, 17, 2, 0, 8, 3)),
    "empty_ends": (70, (0, 0, 70, 0)),
    "whole_tiles": (64, (16, 32, 0, 16)),
    "no_group_has_rows": (33, (0, 0, 0)),
}


def arrays_of(m, groups, k=130, n=257, dtype=np.float32):
    rng = np.random.default_rng(m)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (groups, k, n), (m, n))]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "COLUMNS", 128)


@pytest.mark.parametrize("name", SIZES)
def test_many_tiles(small_tiles, name):
    m, sizes = SIZES[name]
    x, w, y = arrays_of(m, len(sizes))
    rows = sum(sizes)
    x, y = (a.at[rows:].set(jnp.nan) for a in (x, y))
    got = module.outer(x, y, jnp.array(sizes, jnp.int32), dtype=jnp.float32, interpret=True)
    want = oracle.grouped_matmul(x.at[rows:].set(0), w, sizes, y.at[rows:].set(0))[2]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_visits_cover_every_row_once(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, (2, 20, 300, 1000)[seed], 9) * rng.integers(0, 2, 9)
    rows, m = 16, int(sizes.sum()) + int(rng.integers(1, 40))
    group, tile, start, stop = (np.asarray(a) for a in module.visits(jnp.asarray(sizes, jnp.int32), m, rows))
    assert np.array_equal(group, np.sort(group)) and set(group) == set(range(9))  # each one's visits follow each other
    assert tile.min() >= 0 and tile.max() <= (m - 1) // rows
    covered = [
        (g, r)
        for g, t, first, last in zip(group, tile, start, stop, strict=True)
        for r in range(max(first, t * rows), min(last, (t + 1) * rows))
    ]
    assert covered == list(zip(np.repeat(np.arange(9), sizes), range(sizes.sum()), strict=True))


def test_refuses_other_numbers():
    x, w, _ = arrays_of(8, 2, 4, 4, np.float16)
    with pytest.raises(ValueError, match='takes bfloat16 or float32, not float16 and float16; use "ragged_dot"'):
        jax.grad(lambda w: grouped_matmul(x, w, jnp.array([3, 5]), implementation="pallas_tpu").sum())(w)


@pytest.mark.parametrize("check_vma", [False, True])
def test_traces_under_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def gradients(x, w, dy, sizes):
        return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)[1](dy)

    f = jax.shard_map(gradients, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=check_vma)
    x, w, dy = arrays_of(64, 4, dtype=jnp.bfloat16)
    text = jax.jit(f).trace(x, w, dy, jnp.ones(4, jnp.int32)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 1


@needs_compiler
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_and_leaves_no_dense_products(generation):
    shape = jax.ShapeDtypeStruct
    arguments = shape((4096, 2048), jnp.bfloat16), shape((16, 2048, 1408), jnp.bfloat16), shape((16,), jnp.int32)

    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: grouped_matmul(x, w, sizes).astype(jnp.float32).sum(), (0, 1))(x, w)

    mesh = aot.tpu_mesh(generation)
    counts = hlo.count(aot.compile_for(mesh, gradients, *arguments).as_text(), dict(mesh.shape))
    assert counts.flops == 0 and counts.kernels["grouped_matmul_outer"] == 1
