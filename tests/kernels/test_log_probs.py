import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.log_probs import select_log_probs, token_log_probs
from jaxrl.kernels.log_probs.blocked import blocked_statistics
from jaxrl.kernels.log_probs.reference import dense_statistics
from jaxrl.kernels.log_probs.tpu import pallas_statistics

path = pathlib.Path(__file__).parents[1] / "oracles" / "log_probs.py"
spec = importlib.util.spec_from_file_location("log_probs_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 7, 5)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(5, 11)).astype(np.float32)
TARGETS = RNG.integers(0, 11, (3, 7)).astype(np.int32)

FORMS = {
    "reference": dense_statistics,
    "xla": functools.partial(blocked_statistics, tokens=16, vocabulary=64),
    "pallas": functools.partial(pallas_statistics, tokens=16, vocabulary=128),
}
SHAPES = {  # tokens, D, V: tiles that fit and tiles that overhang
    "one": (1, 1, 1),
    "few": (1, 5, 11),
    "even": (32, 8, 256),
    "uneven": (17, 24, 300),
    "none": (0, 3, 7),
}
KNOBS = {"plain": {}, "cold": {"temperature": 0.7}, "capped": {"soft_cap": 1.5, "temperature": 1.3}}


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


def test_select_forward_mode_is_the_transpose_of_reverse_mode():
    x, dx = HIDDEN[0], RNG.normal(size=HIDDEN[0].shape).astype(np.float32)
    f = lambda x: select_log_probs(x @ UNEMBEDDING, TARGETS[0])  # noqa: E731
    (out, tangent), (_, vjp) = jax.jvp(f, (x,), (dx,)), jax.vjp(f, x)
    ct = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)), out)
    forward = sum(jnp.vdot(a, b) for a, b in zip(ct, tangent, strict=True))
    np.testing.assert_allclose(forward, jnp.vdot(vjp(ct)[0], dx), rtol=1e-5)


def test_bad_targets_of_select():
    with pytest.raises(ValueError, match=r"targets have shape \(2, 7\), expected that of logits \(3, 7, 5\)"):
        select_log_probs(HIDDEN, TARGETS[:2])
    with pytest.raises(ValueError, match="select_log_probs: targets are float32, expected integers"):
        select_log_probs(HIDDEN, HIDDEN[..., 0])


def inputs(shape, knobs, seed=0):
    """hidden [1, N, D], unembedding, targets, the temperature of each token, and cotangents of the three results."""
    n, d, v = shape
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    temperature = np.full((1, n), knobs.get("temperature", 1.0), np.float32) * (
        1 + 0.1 * np.arange(n, dtype=np.float32)
    )
    return draw(1, n, d), draw(d, v), rng.integers(0, v, (1, n)).astype(np.int32), temperature, draw(3, 1, n)


def value_and_vjp(form, hidden, unembedding, targets, temperature, cotangents, soft_cap=None):
    """Three results [1, N], and the gradients of hidden, unembedding and temperature."""

    @jit
    def run(h, w, y, t, cotangents):
        f = lambda h, w, t: form(h[0], w, y[0], 1 / t[0], soft_cap=soft_cap)
        out, vjp = jax.vjp(f, h, w, t)
        return [x[None] for x in out], vjp(tuple(c[0] for c in cotangents))

    return run(hidden, unembedding, targets, temperature, cotangents)


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, shape, knobs):
    h, w, y, t, ct = inputs(SHAPES[shape], KNOBS[knobs])
    options = {"temperature": t, "soft_cap": KNOBS[knobs].get("soft_cap")}
    out, grads = value_and_vjp(FORMS[form], h, w, y, t, ct, options["soft_cap"])
    for a, b in zip(out, oracle.token_log_probs(h, w, y, **options, return_lse=True), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
    for a, b in zip(grads, oracle.gradients(h, w, y, ct, **options), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * max(np.abs(b).max(initial=0), 1))


@pytest.mark.parametrize("knobs", KNOBS)
def test_oracle_gradients_by_finite_differences(knobs):
    h, w, y, t, ct = inputs((6, 5, 11), KNOBS[knobs])
    arrays = [x.astype(np.float64) for x in (h, w, t)]
    soft_cap = KNOBS[knobs].get("soft_cap")

    def total(h, w, t):
        out = oracle.token_log_probs(h, w, y, temperature=t, soft_cap=soft_cap, return_lse=True)
        return np.sum(ct * np.stack(out))

    for n, grad in enumerate(oracle.gradients(h, w, y, ct, temperature=t, soft_cap=soft_cap)):
        for at in np.ndindex(grad.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arrays]
                moved[n][at] += step
                ends.append(total(*moved))
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, grad[at], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("chunk", [None, 1, 4, 21])
def test_the_door_is_the_formula(chunk, knobs):
    knobs = KNOBS[knobs]
    f = jit(functools.partial(token_log_probs, chunk=chunk, return_lse=True, **knobs))
    got = f(HIDDEN, UNEMBEDDING, TARGETS)
    want = oracle.token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, return_lse=True, **knobs)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32 and a.shape == TARGETS.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    assert len(token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, chunk=chunk, **knobs)) == 2


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("shape", [(), (7,), (3, 1), (1, 7), (3, 7)])
def test_a_temperature_of_any_shape(shape, implementation):
    temperature = RNG.uniform(0.5, 2.0, shape).astype(np.float32)

    @jit
    def run(temperature):
        f = lambda t: token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, temperature=t, implementation=implementation)
        out, vjp = jax.vjp(f, temperature)
        return out, vjp(tuple(jnp.ones_like(x) for x in out))[0]

    out, grad = run(temperature)
    want = oracle.token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, temperature=temperature)
    for a, b in zip(out, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    ct = np.stack([np.ones((3, 7)), np.ones((3, 7)), np.zeros((3, 7))])
    each = oracle.gradients(HIDDEN, UNEMBEDDING, TARGETS, ct, temperature=temperature)[2]
    padded = (1,) * (2 - len(shape)) + shape
    axes = tuple(n for n in range(2) if padded[n] == 1)
    np.testing.assert_allclose(grad, each.sum(axes, keepdims=True).reshape(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_ids_from_the_end_and_ids_outside(implementation):
    targets = jnp.array([[-1, 10, 11, -12, 3]])
    f = functools.partial(token_log_probs, implementation=implementation)
    hidden = jnp.broadcast_to(HIDDEN[:1, :1], (1, 5, 5))

    @jit
    def run(hidden):
        (log_probs, entropy), vjp = jax.vjp(lambda h: f(h, UNEMBEDDING, targets), hidden)
        return log_probs[0], entropy[0], vjp((jnp.ones((1, 5)), jnp.zeros((1, 5))))[0]

    log_probs, entropy, grad = run(hidden)
    assert log_probs[0] == log_probs[1] and np.isnan(log_probs[2:4]).all() and np.isfinite(entropy).all()
    np.testing.assert_array_equal(grad[0, 0], grad[0, 1])
    assert np.isfinite(grad).all()
    if implementation == "reference":
        outside = select_log_probs(hidden[0] @ UNEMBEDDING, targets[0])[0]
        np.testing.assert_allclose(outside, log_probs, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_large_logits(form):
    """Sharp distributions: differences to the largest logit count, not its size."""
    h = jnp.array([[1.0], [1.0], [-1.0]])
    w = jnp.linspace(-3e4, 3e4, 300)[None]
    y = jnp.array([299, 298, 0])
    log_probs, entropy, lse = jit(FORMS[form])(h, w, y, jnp.ones(3))
    np.testing.assert_allclose(log_probs, [0, -6e4 / 299, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)
    np.testing.assert_allclose(lse, 3e4, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_errs_no_more_than_twice_plain_bfloat16(form):
    h, w, y, t, ct = inputs((40, 24, 300), {})
    h, w = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16) * 0.3
    exact_h, exact_w = np.asarray(h, np.float64), np.asarray(w, np.float64)
    want = oracle.token_log_probs(exact_h, exact_w, y, temperature=t, return_lse=True)
    want_grads = oracle.gradients(exact_h, exact_w, y, ct, temperature=t)

    def plain(h, w, y, scale, soft_cap=None):
        x = (h @ w) * scale[:, None].astype(jnp.bfloat16)
        log_p = jax.nn.log_softmax(x, axis=-1)
        log_probs = jnp.take_along_axis(log_p, y[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return tuple(z.astype(jnp.float32) for z in (log_probs, entropy, jax.nn.logsumexp(x, axis=-1)))

    ours, ours_grads = value_and_vjp(FORMS[form], h, w, y, t, ct)
    theirs, theirs_grads = value_and_vjp(plain, h, w, y, t, ct)
    assert ours_grads[0].dtype == ours_grads[1].dtype == jnp.bfloat16
    error = lambda a, b: np.abs(np.asarray(a, np.float64) - b).max()  # noqa: E731
    for a, b, exact in zip(ours, theirs, want, strict=True):
        assert error(a, exact) <= 0.1 * error(b, exact)  # logits are float32 here
    for a, b, exact in zip(ours_grads, theirs_grads, want_grads, strict=True):
        assert 0 < error(a, exact) <= 2 * error(b, exact)


@pytest.mark.parametrize("form", ["xla", "pallas"])
def test_gradient_of_a_bfloat16_unembedding_is_summed_in_float32(form):
    rng = np.random.default_rng(1)
    hidden, targets = rng.normal(size=(1024, 8)), jnp.asarray(rng.integers(0, 16, 1024), jnp.int32)
    h, w = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16)

    def grad(form, h, w):
        return jit(jax.grad(lambda w: jnp.sum(form(h, w, targets, jnp.ones(1024))[0])))(w)

    exact = grad(dense_statistics, h.astype(jnp.float32), w.astype(jnp.float32))
    error = lambda g: np.abs(np.asarray(g, np.float64) - exact).max()  # noqa: E731
    assert error(grad(FORMS[form], h, w)) <= 2 * error(grad(dense_statistics, h, w))


@pytest.mark.parametrize("implementation", FORMS)
def test_composes_with_vmap_scan_and_remat(implementation):
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(3, 1, 20, 6)).astype(np.float32), rng.normal(size=(3, 6, 30)).astype(np.float32)
    y, t = rng.integers(0, 30, (3, 1, 20)).astype(np.int32), np.array([0.5, 1.0, 2.0], np.float32)

    def loss(h, w, t, y):
        out = token_log_probs(h, w, y, temperature=t, implementation=implementation, return_lse=True)
        return sum(jnp.sum(jnp.sin(x)) for x in out)

    grad = jit(jax.value_and_grad(loss, (0, 1, 2)))
    one_by_one = [grad(*args) for args in zip(h, w, t, y, strict=True)]
    mapped = jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))(h, w, t, y)
    for n, want in enumerate(one_by_one):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5), mapped, want)

    def summed(h, w, t):
        step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, 0.0, (h, w, t, y))[0]

    value, grads = jit(jax.value_and_grad(summed, (0, 1, 2)))(h, w, t)
    np.testing.assert_allclose(value, sum(x for x, _ in one_by_one), rtol=1e-5)
    for a, b in zip(grads, mapped[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_twice(form):
    h, w, y, t, ct = inputs((40, 8, 300), {})
    first, second = (value_and_vjp(FORMS[form], h, w, y, t, ct) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def compiled(chunk=None, tokens=2048, vocabulary=8192, argnums=(0, 1), **options):
    shapes = (1, tokens, 16), (16, vocabulary)
    h, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    y = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(h, w, y):
        return sum(jnp.sum(x) for x in token_log_probs(h, w, y, chunk=chunk, **options))

    return jit(jax.grad(loss, argnums) if argnums else loss).lower(h, w, y).compile()


def temporary_bytes(*args, **options):
    return compiled(*args, **options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("argnums", [(), (0, 1)])
def test_tiles_save_memory(argnums):
    direct = temporary_bytes(argnums=argnums, implementation="reference")
    assert direct >= 2048 * 8192 * 4
    tiled = temporary_bytes(argnums=argnums)
    assert tiled < direct / 8
    assert temporary_bytes(64, argnums=argnums) < tiled / 4
    assert temporary_bytes(tokens=4096, argnums=argnums) < 1.3 * tiled  # one tile of logits however many tokens


def test_what_nobody_asked_for_is_not_computed():
    """Each gradient costs its own product: two for both besides the logits twice, one less for a frozen unembedding."""
    products = [compiled(argnums=argnums).as_text().count(" dot(") for argnums in ((), (0,), (1,), (0, 1))]
    assert products == [1, 3, 3, 4]


@pytest.mark.parametrize("outer", [jax.grad, lambda f: lambda h: jax.jvp(f, (h,), (h,))])
def test_second_derivatives_are_refused_where_there_are_none(outer):
    def slope(implementation, h):
        f = lambda h: jnp.sum(token_log_probs(h, UNEMBEDDING, TARGETS, implementation=implementation)[0])
        return jnp.sum(jax.grad(f)(h) ** 2)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outer(functools.partial(slope, "reference"))(HIDDEN)))
    for name in ("xla", "pallas"):
        with pytest.raises(ValueError, match=f'"{name}" has no second derivatives; use implementation="reference"'):
            outer(functools.partial(slope, name))(HIDDEN)


def test_none_chooses_by_size():
    def tiled(tokens, vocabulary, chunk=None, **options):
        h, w, y = jnp.ones((1, tokens, 1)), jnp.ones((1, vocabulary)), jnp.zeros((1, tokens), jnp.int32)
        f = lambda h: token_log_probs(h, w, y, chunk=chunk, **options)
        return "custom_vjp" in str(jax.make_jaxpr(f)(h))

    assert tiled(512, 8192)
    assert not tiled(256, 8192)
    assert tiled(256, 8192, chunk=128)
    assert not tiled(256, 8192, chunk=256)
    assert not tiled(512, 8192, soft_cap=jnp.float32(2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN[0]}, r"hidden \(7, 5\) and unembedding \(5, 11\), expected \[B, T, D\]"),
        ({"unembedding": UNEMBEDDING.T}, "transpose an embedding table"),
        ({"unembedding": UNEMBEDDING[:, :0]}, "V = 0 columns, expected at least 1"),
        ({"targets": TARGETS[:2]}, r"targets have shape \(2, 7\), expected \[B, T\] = \(3, 7\)"),
        ({"targets": HIDDEN[..., 0]}, "targets are float32, expected integers"),
        ({"temperature": 0.0}, "temperature = 0.0, expected a positive number; for greedy sampling"),
        ({"temperature": jnp.ones(3)}, r"temperature has shape \(3,\), expected one that broadcasts to \[B, T\]"),
        ({"temperature": jnp.ones((1, 3, 7))}, r"temperature has shape \(1, 3, 7\)"),
        ({"soft_cap": -1.0}, "soft_cap = -1.0, expected a positive number"),
        ({"chunk": 0}, "chunk = 0 tokens, expected at least 1"),
        ({"implementation": "cuda"}, "implementation='cuda', expected None or"),
        ({"axis_name": "model"}, "axis_name = 'model' is no mesh axis here; call it inside jax.shard_map"),
    ],
)
def test_bad_input(change, message):
    arguments = {"hidden": HIDDEN, "unembedding": UNEMBEDDING, "targets": TARGETS} | change
    with pytest.raises(ValueError, match=message):
        token_log_probs(**arguments)


@pytest.mark.parametrize(
    ("implementation", "change", "message"),
    [
        ("xla", {"soft_cap": jnp.float32(1.0)}, 'needs soft_cap as a Python number, got .*; use implementation="ref'),
        ("pallas", {"soft_cap": jnp.float32(1.0)}, 'soft_cap as a Python number; use implementation="reference"'),
        ("pallas", {"hidden": HIDDEN.astype(np.float16)}, "not float16 and float32; use implementation"),
        (
            "pallas",
            {"hidden": np.ones((3, 7, 2**15), np.float32), "unembedding": np.ones((2**15, 11), np.float32)},
            "32768",
        ),
    ],
)
def test_named_implementations_refuse_loudly(implementation, change, message):
    arguments = {"hidden": HIDDEN, "unembedding": UNEMBEDDING, "targets": TARGETS} | change
    with pytest.raises(ValueError, match=message):
        token_log_probs(**arguments, implementation=implementation)
    token_log_probs(**arguments)  # None always works
