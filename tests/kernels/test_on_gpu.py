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

from jaxrl.kernels.attention import Causal, Full, Segments, Tree, Window, attention

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
