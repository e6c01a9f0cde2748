import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.log_probs import select_log_probs, token_log_probs

path = pathlib.Path(__file__).parents[1] / "oracles" / "log_probs.py"
spec = importlib.util.spec_from_file_location("log_probs_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 7, 5)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(5, 11)).astype(np.float32)
TARGETS = RNG.integers(0, 11, (3, 7)).astype(np.int32)
WEIGHTS = RNG.normal(size=(2, 3, 7))
KNOBS = [{}, {"temperature": 0.7}, {"soft_cap": 1.5, "temperature": 1.3}]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_select_is_the_formula(shape):
    logits = 5 * RNG.normal(size=(*shape, 9)).astype(np.float32)
    targets = RNG.integers(0, 9, shape).astype(np.int32)
    got, want = select_log_probs(logits, targets), oracle.select_log_probs(logits, targets)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_select_computes_in_float32(dtype):
    logits = jnp.asarray(5 * RNG.normal(size=(4, 300)), dtype)
    targets = jnp.arange(4)
    exact = oracle.select_log_probs(np.asarray(logits, np.float64), np.arange(4))
    for a, b in zip(select_log_probs(logits, targets), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


def test_select_survives_extremes():
    logits = jnp.array([[1e30, 0.0, -1e30], [-jnp.inf, 0.0, 0.0], [3e4, 3e4, 3e4], [-jnp.inf, 1.0, -jnp.inf]])
    targets = jnp.array([0, 1, 2, 1])
    log_probs, entropy = select_log_probs(logits, targets)
    np.testing.assert_allclose(log_probs, [0, -np.log(2), -np.log(3), 0], atol=1e-6)
    np.testing.assert_allclose(entropy, [0, np.log(2), np.log(3), 0], atol=1e-6)
    grads = jax.grad(lambda x: sum(jnp.sum(y) for y in select_log_probs(x, targets)))(logits)
    assert np.all(np.isfinite(grads))


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("chunk", [None, 1, 4, 21])
def test_tokens_are_the_formula(chunk, knobs):
    got = token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, chunk=chunk, **knobs)
    for a, b in zip(got, oracle.token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, **knobs), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_by_finite_differences(chunk, knobs):
    def loss(hidden, unembedding):
        out = token_log_probs(hidden, unembedding, TARGETS, chunk=chunk, **knobs)
        return sum(jnp.sum(w * x) for w, x in zip(WEIGHTS.astype(np.float32), out, strict=True))

    def exact(hidden, unembedding):
        return np.sum(WEIGHTS * np.stack(oracle.token_log_probs(hidden, unembedding, TARGETS, **knobs)))

    arrays = [HIDDEN.astype(np.float64), UNEMBEDDING.astype(np.float64)]
    grads = jax.jit(jax.grad(loss, (0, 1)))(HIDDEN, UNEMBEDDING)
    for n, grad in enumerate(grads):
        want = np.zeros(grad.shape)
        for at in np.ndindex(grad.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arrays]
                moved[n][at] += step
                ends.append(exact(*moved))
            want[at] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(grad, want, rtol=2e-5, atol=2e-5)


def test_forward_mode_is_the_transpose_of_reverse_mode():
    f = functools.partial(select_log_probs, targets=TARGETS[0])
    x, dx = HIDDEN[0], RNG.normal(size=HIDDEN[0].shape).astype(np.float32)
    f = lambda x: select_log_probs(x @ UNEMBEDDING, TARGETS[0])  # noqa: E731
    (out, tangent), (_, vjp) = jax.jvp(f, (x,), (dx,)), jax.vjp(f, x)
    ct = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)), out)
    forward = sum(jnp.vdot(a, b) for a, b in zip(ct, tangent, strict=True))
    np.testing.assert_allclose(forward, jnp.vdot(vjp(ct)[0], dx), rtol=1e-5)


def test_gradient_of_a_bfloat16_unembedding_is_summed_in_float32():
    rng = np.random.default_rng(1)
    hidden, targets = rng.normal(size=(4, 256, 8)), rng.integers(0, 16, (4, 256))
    h, w = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16)

    def grad(w, h, chunk):
        return jax.grad(lambda w: jnp.sum(token_log_probs(h, w, targets, chunk=chunk)[0]))(w)

    exact = grad(w.astype(jnp.float32), h.astype(jnp.float32), None)
    error = lambda g: np.abs(np.asarray(g, np.float64) - exact).max()  # noqa: E731
    assert error(grad(w, h, 2)) <= 2 * error(grad(w, h, None))


def test_vmap_and_a_traced_temperature():
    f = jax.jit(lambda t: token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, temperature=t, chunk=4)[0])
    both = jax.vmap(f)(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(both[0], f(0.5), rtol=1e-6)
    np.testing.assert_allclose(both[1], f(2.0), rtol=1e-6)


def temporary_bytes(chunk, tokens=1024, vocabulary=8192):
    shapes = (1, tokens, 16), (16, vocabulary)
    h, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    y = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(h, w, y):
        log_probs, entropy = token_log_probs(h, w, y, chunk=chunk)
        return jnp.sum(log_probs + entropy)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(h, w, y).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunks_save_memory():
    direct = temporary_bytes(1024)
    assert direct >= 1024 * 8192 * 4
    assert temporary_bytes(64) < direct / 4
    assert temporary_bytes(None) < direct  # 8M logits are above the default chunk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN[0]}, r"hidden \(7, 5\) and unembedding \(5, 11\), expected \[B, T, D\]"),
        ({"unembedding": UNEMBEDDING.T}, "transpose an embedding table"),
        ({"targets": TARGETS[:2]}, r"targets have shape \(2, 7\), expected \[B, T\] = \(3, 7\)"),
        ({"targets": HIDDEN[..., 0]}, "targets are float32, expected integers"),
        ({"temperature": 0.0}, "temperature = 0.0, expected a positive number; for greedy sampling"),
        ({"soft_cap": -1.0}, "soft_cap = -1.0, expected a positive number"),
        ({"chunk": 0}, "chunk = 0 tokens, expected at least 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"hidden": HIDDEN, "unembedding": UNEMBEDDING, "targets": TARGETS} | change
    with pytest.raises(ValueError, match=message):
        token_log_probs(**arguments)


def test_bad_targets_of_select():
    with pytest.raises(ValueError, match=r"targets have shape \(2, 7\), expected that of logits \(3, 7, 5\)"):
        select_log_probs(HIDDEN, TARGETS[:2])
