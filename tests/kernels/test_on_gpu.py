"""What the other tests show of the kernels for Hopper GPUs on a model, shown on one: skipped where there is none.

JAX_PLATFORMS=cuda pytest tests/kernels/test_on_gpu.py
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal, Full, Segments, Tree, Window, attention, decode_attention

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda pytest tests/kernels/test_on_gpu.py"
)


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_on_gpu", pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = load("test_gpu")
hopper_only = pytest.mark.skipif(
    getattr(jax.devices()[0], "compute_capability", "") != "9.0", reason="needs a Hopper GPU, compute capability 9.0"
)


def run(f, *args):
    return jax.jit(f)(*args)


@hopper_only
@pytest.mark.parametrize("name", [*model.SMALL, *model.LONG])
def test_values_and_gradients(name):
    model.check((model.SMALL | model.LONG)[name], run=run)


IDS = np.sort(np.random.default_rng(0).integers(0, 5, (2, 2048)), axis=1).astype(np.int32)
END = np.minimum(np.arange(2048) + np.random.default_rng(1).integers(1, 900, (2, 2048)), 2048).astype(np.int32)
REAL = {
    "full": (Full(), 16, 16, 128, 128),
    "causal": (Causal(), 16, 4, 128, 128),
    "causal_64": (Causal(), 9, 3, 64, 64),
    "window": (Window(500), 8, 2, 128, 128),
    "packed": (Causal() & Segments(IDS), 8, 8, 64, 64),
    "tree": (Tree(END), 8, 1, 128, 128),
    "mla": (Causal(), 16, 16, 192, 128),
    "wide": (Causal(), 8, 4, 256, 256),
}


def drawn(name, length=2048):
    mask, h, k, d, dv = REAL[name]
    shapes = (2, length, h, d), (2, length, k, d), (2, length, k, dv), (2, length, h, dv)
    keys = jax.random.split(jax.random.key(0), 4)
    return mask, [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(implementation, mask, q, k, v, do):
    f = lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation)  # noqa: E731
    o, vjp = jax.vjp(f, q, k, v)
    return dict(zip(("o", "q", "k", "v"), (o, *vjp(do)), strict=True))


@hopper_only
@pytest.mark.parametrize("name", REAL)
def test_shapes_of_models_against_the_dense_form(name):
    """Each error is at most twice that of the dense form of bfloat16 products."""
    mask, (*x, do) = drawn(name)
    exact = [a.astype(jnp.float32) for a in (*x, do)]
    with jax.default_matmul_precision("highest"):
        want = run(functools.partial(with_gradients, "reference", mask), *exact)
    ours, plain = (run(functools.partial(with_gradients, form, mask), *x, do) for form in ("mosaic_gpu", "reference"))
    for key, value in want.items():
        error, allowed = (float(jnp.abs(got[key].astype(jnp.float32) - value).max()) for got in (ours, plain))
        assert error <= 2 * allowed + 1e-3, (key, error, allowed)


@hopper_only
@pytest.mark.parametrize("name", ["causal", "packed", "mla"])
def test_the_same_bits_every_time(name):
    mask, x = drawn(name)
    f = jax.jit(functools.partial(with_gradients, "mosaic_gpu", mask))
    first = f(*x)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, f(*x), first)


@pytest.mark.parametrize("heads", [16, 4])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(300)], ids=["full", "causal", "window"])
def test_cudnn_equals_the_dense_form(mask, heads):
    _, (q, k, v, do) = drawn("causal", 512)
    x = q[:, :, :heads], k, v, do[:, :, :heads]
    want, got = (run(functools.partial(with_gradients, form, mask), *x) for form in ("reference", "cudnn"))
    for key, value in want.items():
        error = float(jnp.abs(got[key].astype(jnp.float32) - value.astype(jnp.float32)).max())
        assert error < 0.02 * float(jnp.abs(value).max()), (key, error)


DECODED = {  # T, S, H, K, D, page, window, lengths
    "one_token": (1, 4096, 32, 8, 128, None, None, (4096, 1, 0, 1000)),
    "drafted": (5, 1024, 12, 4, 64, None, None, (1024, 3, 500, 6)),
    "pages": (1, 2048, 32, 8, 128, 16, None, (2048, 17, 1000, 0)),
    "large_pages": (2, 1536, 16, 2, 64, 256, 300, (1536, 700, 300, 2)),
    "wide": (1, 1024, 8, 2, 256, 64, None, (1024, 1, 65, 128)),
}


@hopper_only
@pytest.mark.parametrize("name", DECODED)
def test_decoding(name):
    t, s, h, heads, d, page, window, lengths = DECODED[name]
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    q, k, v = draw(keys[0], 4, t, h, d), draw(keys[1], 4, s, heads, d), draw(keys[2], 4, s, heads, d)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    lengths, options = jnp.asarray(lengths, jnp.int32), {"window": window, "return_lse": True, "soft_cap": 20.0}
    with jax.default_matmul_precision("highest"):
        want, want_lse = run(
            functools.partial(decode_attention, implementation="reference", **options), *exact, lengths
        )
    table = None
    if page:
        order = jax.random.permutation(keys[3], 4 * s // page)
        k, v = (x.reshape(-1, page, heads, d)[order] for x in (k, v))
        table = jnp.argsort(order).reshape(4, s // page).astype(jnp.int32)
    ours = functools.partial(decode_attention, implementation="mosaic_gpu", **options)
    o, lse = run(lambda q, k, v, lengths, table: ours(q, k, v, lengths, block_table=table), q, k, v, lengths, table)
    np.testing.assert_allclose(lse, want_lse, atol=2e-2, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(o, np.float32), want, atol=2e-2)


@hopper_only
def test_none_picks_the_kernels_where_they_serve():
    picked = lambda dtype, **options: (  # noqa: E731
        "mosaic_gpu" in jax.jit(functools.partial(attention, **options)).lower(*3 * (x.astype(dtype),)).as_text()
    )
    x = jnp.zeros((1, 512, 4, 64))
    assert picked(jnp.bfloat16) and picked(jnp.float16, mask=Tree(END[:1, :512]))
    assert not picked(jnp.float32)
    assert not picked(jnp.bfloat16, alibi=jnp.ones(4))
    assert not picked(jnp.bfloat16, dropout=0.1, dropout_key=jax.random.key(0))


@hopper_only
def test_composes():
    mask, (*x, do) = drawn("causal", 256)
    plain = functools.partial(with_gradients, "mosaic_gpu", mask)
    want = run(plain, *x, do)
    one = lambda *x: jax.tree.map(lambda y: y[0], plain(*(y[None] for y in x)))  # noqa: E731
    mapped = run(jax.vmap(one), *x, do)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    sharded = run(jax.shard_map(plain, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False), *x, do)
    _, scanned = run(lambda *x: jax.lax.scan(lambda c, _: (c, jax.checkpoint(plain)(*x)), 0, length=3), *x, do)
    for got in (mapped, sharded, jax.tree.map(lambda y: y[2], scanned)):
        for key, value in want.items():  # XLA sums do * o in another order
            np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got[key], value)), atol=1e-2, err_msg=key)
