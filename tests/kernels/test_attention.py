import dataclasses
import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.kernels.attention import (
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Segments,
    Window,
    alibi_slopes,
    attention,
    blocked,
    cudnn,
)
from jaxrl.kernels.attention.blocked import blocked_attention
from jaxrl.kernels.attention.dropout import dropout_of, keep_factor
from jaxrl.kernels.attention.tpu import Blocks, Pieces, pallas_attention


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load("oracles/attention.py")
CASES = load("kernels/cases.py").CASES


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


def door(implementation):
    return functools.partial(attention, implementation=implementation, return_lse=True)


def direct(function, **blocks):
    """A blocked implementation with small blocks, in the form of the door."""

    def call(q, k, v, *, scale=None, dropout=0.0, dropout_key=None, **options):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        dropped = dropout_of(dropout, dropout_key)
        o, lse = function(q, k, v, scale=scale, dropout=dropped, **blocks, **options)
        return o, jnp.swapaxes(lse, 1, 2)

    return call


PIECES = Pieces(128, 128, 1)

IMPLEMENTATIONS = {
    "reference": door("reference"),
    "xla": direct(blocked_attention, block_q=64, block_k=32, band=0),
    "pallas": direct(pallas_attention, blocks=Blocks(128, 128, PIECES, PIECES), fused=True),
}
SPLIT = direct(pallas_attention, blocks=Blocks(256, 256, Pieces(128, 128, 2), PIECES), fused=False)
KEY = functools.partial(jax.random.key, 3)


def inputs(case, seed=0):
    """Arrays by name, and cotangents for o and lse."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    b, t, s, h, k = case.b, case.t, case.s, case.h, case.k
    arrays = {"q": draw(b, t, h, case.d), "k": draw(b, s, k, case.d), "v": draw(b, s, k, case.dv)}
    if case.sinks:
        arrays["sinks"] = draw(h)
    if case.bias:
        arrays["bias"] = draw(*case.bias)
    if case.alibi:
        arrays["alibi"] = np.asarray(alibi_slopes(h))
    return arrays, draw(b, t, h, case.dv), draw(b, t, h)


@functools.cache
def expected(name):
    return expected_of(CASES[name], *inputs(CASES[name]))


def expected_of(case, arrays, do, dlse):
    allowed = oracle.dense(case.predicate, case.b, case.h, case.t, case.s, case.q_offset)
    scale = case.d**-0.5 if case.scale is None else case.scale
    options = {"scale": scale, "soft_cap": case.soft_cap, "q_offset": case.q_offset}
    if case.dropout:
        seed = np.asarray(jax.random.bits(KEY(), (2,), jnp.uint32))
        options["kept"] = oracle.kept(case.dropout, seed, case.b, case.h, case.t, case.s, case.q_offset)
    return oracle.attention(**arrays, allowed=allowed, do=do, dlse=dlse, **options)


def value_and_vjp(call, case, arrays, do, dlse):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, mask, q_offset, do, dlse):
        def f(arrays):
            options = {"mask": mask, "q_offset": q_offset, "soft_cap": case.soft_cap, "scale": case.scale}
            if case.dropout:
                options |= {"dropout": case.dropout, "dropout_key": KEY()}
            return call(**arrays, **options)

        out, vjp = jax.vjp(f, arrays)
        return *out, vjp((do.astype(out[0].dtype), dlse))[0]

    call = functools.partial(positional, call)
    return run(arrays, case.mask, case.q_offset, do, dlse)


def positional(call, q, k, v, **options):
    return call(q, k, v, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, name):
    case = CASES[name]
    if implementation == "pallas" and not case.pallas:
        pytest.skip("refused, see test_refusals")
    check(IMPLEMENTATIONS[implementation], case, expected(name))


@pytest.mark.parametrize("name", ["causal", "cross", "packed", "dropout"])
def test_two_backward_kernels_with_several_pieces_to_a_tile(name):
    check(SPLIT, CASES[name], expected(name))


def check(call, case, expected):
    o, lse, grads = value_and_vjp(call, case, *inputs(case))
    want_o, want_lse, want = expected
    np.testing.assert_allclose(o, want_o, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-6)
    assert set(grads) - {"alibi"} == set(want)
    for key, value in want.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(grads[key], value, rtol=1e-5, atol=2e-6 * max(size, 1), err_msg=key)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Near(Mask):
    """A query sees the keys around it."""

    n: int = dataclasses.field(metadata={"static": True})

    def allowed(self, tile):
        return jnp.abs(tile.q - tile.k) < self.n

    def live(self, tile):
        return (tile.k_first < tile.q_last + self.n) & (tile.k_last > tile.q_first - self.n)

    def reach(self):
        return self.n


NEAR = {
    "window": (Window(33), lambda q, k: 0 <= q - k < 33),
    "window_of_one": (Window(1), lambda q, k: q == k),
    "whole_blocks": (Window(32), lambda q, k: 0 <= q - k < 32),
    "both_sides": (Near(20), lambda q, k: abs(q - k) < 20),
}


BANDS = [(name, "window") for name, case in CASES.items() if not case.bias and case.s >= 16]
BANDS += [
    ("before_the_keys", "window_of_one"),
    ("tree", "whole_blocks"),
    ("span", "both_sides"),
    ("dropout", "both_sides"),
]


@pytest.mark.parametrize(("name", "near"), BANDS)
def test_a_band_of_keys(name, near):
    """Every mask of the table, cut down to what is near: values and gradients."""
    case, (mask, close) = CASES[name], NEAR[near]
    case = case._replace(mask=case.mask & mask, predicate=lambda b, h, q, k: close(q, k) and predicate(b, h, q, k))
    predicate = CASES[name].predicate
    arrays, do, dlse = inputs(case)
    check(direct(blocked_attention, band=16), case, expected_of(case, arrays, do, dlse))


@pytest.mark.parametrize(("t", "s", "q_offset"), [(1, 40, 30), (17, 300, 200), (50, 16, 0), (5, 64, 300)])
def test_a_band_over_other_lengths(t, s, q_offset):
    """One query, few late in a long sequence, queries behind the last key, one block of keys."""
    case = CASES["window"]._replace(t=t, s=s, q_offset=q_offset)
    check(direct(blocked_attention, band=16), case, expected_of(case, *inputs(case)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_band_over_the_shards_of_a_batch_and_under_vmap(check_vma):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(2, 40, heads, 8)), jnp.float32) for heads in (2, 1))
    sinks, ids = jnp.array([0.3, -0.2]), jnp.asarray(np.sort(rng.integers(0, 2, (2, 40)), axis=1), jnp.int32)

    def loss(band, q, k, sinks, ids):
        mask = Window(20) & Segments(ids)
        o, lse = blocked_attention(q, k, k, mask=mask, scale=0.4, sinks=sinks, band=band)
        return jnp.sum(o**2, axis=(1, 2, 3)) + jnp.sum(lse, axis=(1, 2))

    rows, mesh = P("data"), Mesh(np.array(jax.devices()[:2]), "data")
    specs = {"in_specs": (rows, rows, P(), rows), "out_specs": rows, "check_vma": check_vma}
    sharded = jax.shard_map(functools.partial(loss, 16), mesh=mesh, **specs)
    mapped = jax.vmap(lambda q, k, sinks, ids: loss(16, q[None], k[None], sinks, ids[None])[0], (0, 0, None, 0))
    grads = lambda f: jax.jit(jax.value_and_grad(lambda *x: f(*x, ids).sum(), (0, 1, 2)), compiler_options=QUICK)
    want = grads(functools.partial(loss, 0))(q, k, sinks)
    for f in (sharded, mapped):
        got = grads(f)(q, k, sinks)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


def test_a_band_is_chosen_where_the_reach_is_short(monkeypatch):
    seen = []
    attend = blocked._attention
    monkeypatch.setattr(blocked, "_attention", lambda settings, *x: seen.append(settings.band) or attend(settings, *x))

    def band(mask, t=1024, s=1024, **options):
        q, k = (jax.ShapeDtypeStruct((1, n, 1, 4), jnp.float32) for n in (t, s))
        jax.eval_shape(lambda q, k: attention(q, k, k, mask=mask, implementation="xla", **options), q, k)
        return seen[-1]

    assert band(Window(20)) == band(Causal() & Window(448)) == band(Window(20), t=64) == 64
    assert band(Window(449)) == band(Window(20), t=63) == band(Window(20), s=167) == band(Window(1025), s=8192) == 0
    assert band(Causal()) == band(Causal() | Window(20)) == band(Window(20), bias=jnp.zeros((1, 1, 1, 1024))) == 0


@pytest.mark.parametrize(("mask", "s", "options"), [
    (Causal(), 32, {}), (Window(3), 15, {}), (Window(3), 32, {"bias": jnp.zeros((1, 1, 32, 32))}),
])  # fmt: skip
def test_a_band_that_cannot_serve(mask, s, options):
    q, k = jnp.ones((1, 32, 1, 4)), jnp.ones((1, s, 1, 4))
    with pytest.raises(ValueError, match="a band of 16 needs a mask with a reach .* use band=0"):
        blocked_attention(q, k, k, mask=mask, scale=1.0, band=16, **options)


def test_keys_beyond_the_reach_are_not_read():
    """NaN in keys that no query sees does not reach the result."""
    x = jnp.ones((1, 300, 1, 4))
    poisoned = x.at[:, :200].set(jnp.nan)
    call = jax.jit(functools.partial(blocked_attention, mask=Window(30), q_offset=250, scale=1.0, band=16))
    assert np.all(np.isfinite(call(x[:, :50], poisoned, poisoned)[0]))


def test_dropout_keeps_the_share_it_should_and_no_pattern():
    grid = [jnp.arange(n, dtype=jnp.int32).reshape(shape) for n, shape in
            ((3, (3, 1, 1, 1)), (4, (1, 4, 1, 1)), (200, (1, 1, 200, 1)), (300, (1, 1, 1, 300)))]  # fmt: skip
    kept = np.asarray(keep_factor(0.3, jax.random.bits(KEY(), (2,), jnp.uint32), *grid)) > 0
    deviation = (0.3 * 0.7) ** 0.5
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3), (2,), (3,)):
        share, count = kept.mean(axis=axes), np.prod([kept.shape[a] for a in axes])
        assert np.abs(share - 0.7).max() < 6 * deviation / count**0.5
    signs = np.where(kept, deviation / 0.7, -0.7 / deviation) * deviation  # mean 0
    for axis in range(4):  # neighbours along any axis have nothing to do with each other
        pairs = np.take(signs, range(1, signs.shape[axis]), axis) * np.take(signs, range(signs.shape[axis] - 1), axis)
        assert abs(pairs.mean()) < 5 * pairs.std() / pairs.size**0.5


def test_dropout_of_other_keys_is_another():
    f = jax.jit(lambda key: attention(X, X, X, dropout=0.5, dropout_key=key))
    same, other = f(KEY()), f(jax.random.key(4))
    np.testing.assert_array_equal(f(KEY()), same)
    assert not np.allclose(same, other)


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])  # those of two, then one of four's
    slopes = alibi_slopes(4)
    np.testing.assert_array_equal(jax.grad(lambda a: attention(X, X, X, alibi=a).sum())(slopes), 0)


def test_oracle_gradients_by_finite_differences():
    case = CASES["empty_segments"]._replace(bias=(1, 4, 1, 40), sinks=True, soft_cap=1.0)
    arrays, do, dlse = inputs(case)
    arrays = {key: value.astype(np.float64) for key, value in arrays.items()}
    allowed = oracle.dense(case.predicate, 2, 4, 17, 40)

    def total(arrays):
        o, lse, grads = oracle.attention(**arrays, allowed=allowed, do=do, dlse=dlse, scale=0.5, soft_cap=case.soft_cap)
        return np.sum(o * do) + np.sum(lse * dlse), grads

    grads = total(arrays)[1]
    for key, x in arrays.items():
        direction = np.random.default_rng(1).normal(size=x.shape)
        up, down = (total(arrays | {key: x + e * direction})[0] for e in (1e-5, -1e-5))
        np.testing.assert_allclose((up - down) / 2e-5, np.sum(grads[key] * direction), rtol=1e-6)


@pytest.mark.parametrize("name", ["causal", "window", "cross"])
def test_agrees_with_jax(name):
    case = CASES[name]._replace(soft_cap=None, sinks=False, q_offset=0)
    if name == "window":
        case = case._replace(s=case.t)
    options = {"causal": {"is_causal": True}, "window": {"local_window_size": (19, 0)}, "cross": {}}[name]
    f = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)  # noqa: E731
    case = case._replace(dv=case.d)
    arrays, do, _ = inputs(case)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def value_and_vjp_of_jax(q, k, v, do):
        o, vjp = jax.vjp(f, q, k, v)
        return o, vjp(do)

    want, want_grads = value_and_vjp_of_jax(arrays["q"], arrays["k"], arrays["v"], do)
    for call in (IMPLEMENTATIONS["reference"], IMPLEMENTATIONS["xla"]):
        o, _, grads = value_and_vjp(call, case, arrays, do, np.zeros(want.shape[:3], np.float32))
        np.testing.assert_allclose(o, want, rtol=1e-5, atol=2e-6)
        for key, value in zip("qkv", want_grads, strict=True):
            np.testing.assert_allclose(grads[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(name, jnp.bfloat16) for name in IMPLEMENTATIONS] + [(name, jnp.float16) for name in ("reference", "xla")],
)
def test_half_precision_errs_no_more_than_twice_plain_half_precision(implementation, dtype):
    case = CASES["causal"]._replace(dv=8)
    arrays, do, dlse = inputs(case)
    low = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
    allowed = oracle.dense(case.predicate, case.b, case.h, case.t, case.s)
    do = np.asarray(jnp.asarray(do, dtype), np.float32)
    want_o, _, want = oracle.attention(**exact, allowed=allowed, do=do, dlse=0 * dlse, scale=case.d**-0.5)

    def plain(q, k, v):
        q, k, v = q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * dtype(case.d**-0.5)
        weights = jax.nn.softmax(jnp.where(jnp.tri(130, dtype=bool)[None, None], logits, -1e4), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def plain_value_and_vjp(arrays, do):
        out, vjp = jax.vjp(plain, *(arrays[key] for key in "qkv"))
        return out, dict(zip("qkv", vjp(do), strict=True))

    plain_o, plain_grads = plain_value_and_vjp(low, jnp.asarray(do, dtype))
    o, _, grads = value_and_vjp(IMPLEMENTATIONS[implementation], case, low, jnp.asarray(do), 0 * dlse)
    error = lambda a, b: np.abs(np.asarray(a, np.float64) - b).max()  # noqa: E731
    assert o.dtype == dtype and grads["q"].dtype == dtype
    assert 0 < error(o, want_o) <= 2 * error(plain_o, want_o)
    for key in "qkv":
        assert 0 < error(grads[key], want[key]) <= 2 * error(plain_grads[key], want[key])


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_rows_without_keys_are_zero_with_zero_gradients(implementation):
    q, k, v = (jnp.ones((1, 3, 2, 4)) for _ in range(3))
    mask = Segments(jnp.array([[0, 1, 5]]), jnp.array([[0, 1, 1]]))
    f = lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation, return_lse=True)  # noqa: E731

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v):
        (o, lse), vjp = jax.vjp(f, q, k, v)
        return o, lse, vjp((jnp.ones_like(o), jnp.ones_like(lse)))

    o, lse, (dq, dk, dv) = run(q, k, v)
    assert np.all(o[:, 2] == 0) and np.all(o[:, :2] == 1)
    assert np.all(lse[:, 2] < -1e29) and np.all(np.isfinite(lse))
    assert np.all(dq[:, 2] == 0)
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_bias_of_minus_infinity_masks(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 20, 2, 4)), jnp.float32) for _ in range(3))
    bias = jnp.where(jnp.tri(20, dtype=bool), 0.0, -jnp.inf)[None, None].at[:, :, 0].set(-jnp.inf)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(mask, bias):
        f = functools.partial(attention, soft_cap=1.0, implementation=implementation, mask=mask, bias=bias)
        o, vjp = jax.vjp(f, q, k, v)
        return o, vjp(o)

    masked, dense = run(Full(), bias), run(Causal() & Dense(jnp.isfinite(bias)), None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), masked, dense)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_composes_with_vmap_scan_and_remat(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 1, 20, 2, 4)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(rng.integers(0, 2, (3, 1, 20)), jnp.int32)

    def loss(q, k, v, ids):
        o = attention(q, k, v, mask=Causal() & Segments(ids), implementation=implementation)
        return jnp.sum(jnp.sin(o))

    jit = functools.partial(jax.jit, compiler_options=QUICK)
    grad = jit(jax.value_and_grad(loss, (0, 1, 2)))
    one_by_one = [grad(*args) for args in zip(q, k, v, ids, strict=True)]
    mapped = jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))(q, k, v, ids)
    for n, want in enumerate(one_by_one):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5), mapped, want)

    def summed(q, k, v):
        step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, 0.0, (q, k, v, ids))[0]

    value, grads = jit(jax.value_and_grad(summed, (0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(value, sum(x for x, _ in one_by_one), rtol=1e-5)
    for a, b in zip(grads, mapped[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_decoding_against_a_cache_equals_the_full_pass(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 20, 2, 4)), jnp.float32) for _ in range(3))
    mask = Causal() & Segments(jnp.asarray(rng.integers(0, 2, (2, 20)), jnp.int32))
    full = jax.jit(functools.partial(attention, mask=mask, implementation="reference"))(q, k, v)
    step = jax.jit(lambda q, n: attention(q, k, v, mask=mask, q_offset=n, implementation=implementation))
    for n, width in ((0, 1), (7, 1), (19, 1), (11, 9)):
        np.testing.assert_allclose(step(q[:, n : n + width], n), full[:, n : n + width], atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_same_bits_twice(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 130, 2, 4)), jnp.float32) for _ in range(3))
    call = functools.partial(IMPLEMENTATIONS[implementation], mask=Causal())
    run = jax.jit(jax.grad(lambda *qkv: jnp.sum(call(*qkv)[0] ** 2), (0, 1, 2)), compiler_options=QUICK)
    jax.tree.map(np.testing.assert_array_equal, run(q, k, v), run(q, k, v))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_shards_of_a_batch_equal_the_whole(shared, check_vma):
    """Values, and gradients of what the shards share (sinks, and with `shared` also bias) or have for themselves."""
    b, t, h = 4, 70, 4
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (1 if shared else b, t + 5)), axis=1), jnp.int32)
    arrays = {"q": draw(b, t, h, 8), "k": draw(b, t + 5, 2, 8), "v": draw(b, t + 5, 2, 6), "sinks": draw(h)}
    arrays["bias"] = draw(1, h, 1, t + 5) if shared else draw(b, 1, t, t + 5)
    weights, lse_weights = draw(b, t, h, 6), draw(b, t, h)

    def run(call, arrays, ids, q_offset):
        mask = (Causal() if shared else Window(30)) & Segments(ids)
        return positional(call, **arrays, mask=mask, q_offset=q_offset, soft_cap=2.0, alibi=alibi_slopes(h))

    row, own = P("data"), P() if shared else P("data")
    specs = {"q": row, "k": row, "v": row, "sinks": P(), "bias": own}
    mesh = Mesh(np.array(jax.devices()[:4]), "data")
    sharded = jax.shard_map(
        functools.partial(run, IMPLEMENTATIONS["xla"]),
        mesh=mesh,
        in_specs=(specs, own, P()),
        out_specs=row,
        check_vma=check_vma,
    )

    def value_and_grad(f):
        def loss(arrays, ids, q_offset):
            o, lse = f(arrays, ids, q_offset)
            return jnp.sum(o * weights) + jnp.sum(lse * lse_weights), (o, lse)

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(arrays, ids, 5)

    got, want = value_and_grad(sharded), value_and_grad(functools.partial(run, IMPLEMENTATIONS["reference"]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


def test_gradients_inside_of_shards_are_summed_over_them():
    x, sinks = X[:, :, :2], jnp.array([0.3, -0.2])
    loss = lambda name, x, sinks: jnp.sum(IMPLEMENTATIONS[name](x, x, x, mask=Causal(), sinks=sinks)[0] ** 2)
    mesh = Mesh(np.array(jax.devices()[:2]), "data")
    inside = jax.shard_map(
        lambda x, sinks: jax.grad(functools.partial(loss, "xla"), (0, 1))(x, sinks),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=(P("data"), P()),
    )
    got = jax.jit(inside, compiler_options=QUICK)(x, sinks)
    want = jax.grad(functools.partial(loss, "reference"), (0, 1))(x, sinks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


@pytest.mark.parametrize(
    ("mask", "side"),
    [
        (Window(20), 64),
        (Causal() & Window(512), 128),
        (Window(5000), 256),
        (Causal() | Window(20), 256),
        (Causal(), 256),
    ],
)
def test_tiles_are_small_where_the_mask_has_a_short_reach(mask, side, monkeypatch):
    seen = []
    attend = blocked._attention
    monkeypatch.setattr(blocked, "_attention", lambda settings, *x: seen.append(settings) or attend(settings, *x))
    q = jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32)
    jax.eval_shape(lambda q: attention(q, q, q, mask=mask, implementation="xla"), q)
    assert [(x.block_q, x.block_k) for x in seen] == [(side, side)]


def temporary_bytes(implementation, t):
    x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
    f = lambda q, k, v: jnp.sum(attention(q, k, v, implementation=implementation) ** 2)  # noqa: E731
    compiled = jax.jit(jax.grad(f, (0, 1, 2)), compiler_options=QUICK).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly():
    assert temporary_bytes("xla", 2048) < 2.3 * temporary_bytes("xla", 1024)
    assert temporary_bytes("reference", 1024) > 3.5 * temporary_bytes("xla", 1024)


def test_dead_tiles_are_not_computed():
    """NaN in keys that only dead tiles would read does not reach the result."""
    x = jnp.ones((1, 256, 1, 4))
    poisoned = x.at[:, 128:].set(jnp.nan)
    for call in (IMPLEMENTATIONS["xla"], IMPLEMENTATIONS["pallas"]):
        o, _ = jax.jit(functools.partial(call, mask=Causal()))(x[:, :128], poisoned, poisoned)
        assert np.all(np.isfinite(o))


@pytest.mark.parametrize("outer", [jax.grad, lambda f: lambda q: jax.jvp(f, (q,), (q,))])
def test_second_derivatives_are_refused_where_there_are_none(outer):
    q = jnp.ones((1, 9, 1, 3))

    def slope(name, q):
        call = lambda q: jnp.sum(jnp.sin(IMPLEMENTATIONS[name](q, q, q, mask=Causal())[0]))
        return jnp.sum(jax.grad(call)(q) ** 2)

    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(outer(functools.partial(slope, "reference"))(q)))
    with pytest.raises(ValueError, match='no second derivatives; use implementation="reference"'):
        outer(functools.partial(slope, "xla"))(q)
    with pytest.raises(ValueError, match='"pallas" has no second derivatives; use implementation="reference"'):
        outer(functools.partial(slope, "pallas"))(q)


X = jnp.arange(384.0).reshape(2, 6, 4, 8) / 384
HALF = X.astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X[0]}, r"q has shape \(6, 4, 8\), expected \[B, T, H, D\]"),
        ({"k": X[:1]}, r"k has B, D = 1, 8"),
        ({"v": X[:, :3]}, r"v has B, S, K = \(2, 3, 4\)"),
        ({"q": X[:, :, :3]}, r"H = 3 heads, expected a multiple of k's K = 4"),
        ({"bias": jnp.ones((6, 6))}, r"bias has shape \(6, 6\), expected \[B, H, T, S\]"),
        ({"bias": jnp.ones((2, 3, 6, 6))}, r"bias has shape \(2, 3, 6, 6\)"),
        ({"sinks": jnp.ones(3)}, r"sinks has shape \(3,\), expected \[H\]"),
        ({"alibi": jnp.ones(3)}, r"alibi has shape \(3,\), expected \[H\]"),
        ({"dropout": 1.0}, r"dropout = 1.0, expected a number in \[0, 1\)"),
        ({"dropout": 0.1}, "dropout = 0.1 needs dropout_key"),
        ({"soft_cap": 0.0}, "soft_cap = 0.0, expected a positive number"),
        ({"implementation": "cuda"}, "implementation='cuda', expected None"),
        ({"mask": jnp.ones((6, 6), bool)}, r"expected a mask such as Causal\(\); wrap an array as Dense"),
        ({"mask": Segments(jnp.ones((2, 5), jnp.int32))}, r"Segments: q_ids has shape \(2, 5\)"),
        ({"mask": Causal(), "q_offset": 1, "k": X[:, :5], "v": X[:, :5]}, None),
        ({"mask": Dense(jnp.ones((2, 4, 6, 6)))}, "Dense: array has dtype float32, expected bool"),
        ({"mask": Dense(jnp.ones((2, 4, 6, 6), bool)), "q_offset": 1}, "at least 7"),
    ],
)
def test_bad_input(change, message):
    call = functools.partial(attention, **({"q": X, "k": X, "v": X} | change))
    if message is None:
        call()
    else:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("implementation", "change", "message"),
    [
        ("pallas", {"bias": jnp.zeros((1, 1, 6, 6))}, r"takes no bias \(but alibi\); use implementation"),
        ("pallas", {"mask": Dense(jnp.ones((1, 1, 6, 6), bool))}, "cannot cut the mask's 'array'"),
        ("pallas", {"mask": Causal() | Dense(jnp.ones((1, 1, 6, 6), bool))}, "cannot cut the mask's 'array'"),
        ("pallas", {"q": X.astype(jnp.float16)}, "takes float32 or bfloat16, not float16"),
        ("pallas", {"q": HALF}, "takes float32 or bfloat16, not bfloat16, float32, float32"),
        ("pallas", {"scale": jnp.float32(1.0)}, "scale and soft_cap as Python numbers"),
        ("xla", {"scale": jnp.float32(1.0)}, "needs scale as a Python number"),
        ("cudnn", {}, "cuDNN runs on NVIDIA GPUs, not on cpu; use implementation"),
        ("mosaic_gpu", {}, "takes bfloat16 or float16, not float32"),
        ("mosaic_gpu", {"alibi": jnp.ones(4)}, "takes no alibi"),
    ],
)
def test_named_implementations_refuse_loudly(implementation, change, message):
    arguments = {"q": X, "k": X, "v": X} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments, implementation=implementation)
    attention(**arguments)  # None always works


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"mask": Window(3)}, None),
        ({"mask": Full(), "k": HALF[:, :5]}, None),
        ({"q": X}, "takes bfloat16 and float16"),
        ({"mask": Segments(jnp.ones((2, 6), int))}, r"takes Full\(\), Causal\(\) and Window\(n\), not Segments"),
        ({"k": HALF[:, :5]}, "with T = S and q_offset = 0 only"),
        ({"q_offset": 1}, "with T = S and q_offset = 0 only"),
        ({"others": {"sinks": X}}, "takes no sinks"),
        ({"soft_cap": 2.0}, "takes no soft_cap"),
        ({"return_lse": True}, "no return_lse"),
    ],
)
def test_what_cudnn_refuses_on_a_gpu(change, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    call = {"q": HALF, "k": HALF, "mask": Causal(), "q_offset": 0, "scale": 1.0, "soft_cap": None, "others": {}}
    reason = cudnn.refusal(**(call | {"return_lse": False} | change))
    assert reason is None if message is None else re.search(message, reason)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(3)])
def test_cudnn_is_asked_for_the_same_mask(mask, monkeypatch):
    plain = functools.partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **o: plain(*x, **(o | {"implementation": "xla"})))
    o = cudnn.cudnn_attention(X, X + 1, X, mask=mask, scale=0.2)
    np.testing.assert_allclose(o, attention(X, X + 1, X, mask=mask, scale=0.2), rtol=1e-5)


def test_none_chooses_by_shape():
    def primitives(t, s, **options):
        q, k = jnp.ones((1, t, 1, 4)), jnp.ones((1, s, 1, 4))
        return str(jax.make_jaxpr(lambda q, k: attention(q, k, k, mask=Full(), **options))(q, k))

    assert "custom_vjp" in primitives(256, 256)
    assert "custom_vjp" not in primitives(32, 32)
    assert "custom_vjp" not in primitives(1, 65536)
    assert "custom_vjp" not in primitives(256, 256, scale=jnp.float32(1.0))


def test_masks_are_arguments_of_jit():
    q = jnp.ones((1, 8, 1, 4))
    f = jax.jit(lambda mask: attention(q, q, q, mask=mask))
    for mask in (Causal(), Window(3), Causal() & Chunked(4)):
        np.testing.assert_allclose(f(mask), attention(q, q, q, mask=mask), atol=1e-6)
