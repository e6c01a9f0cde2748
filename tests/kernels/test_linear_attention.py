import functools
import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.kernels import linear_attention as module
from jaxrl.kernels.linear_attention import linear_attention, linear_attention_step

path = pathlib.Path(__file__).parents[1] / "oracles" / "linear_attention.py"
spec = importlib.util.spec_from_file_location("linear_attention_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
FORMS = {"recurrent": {"implementation": "recurrent"}, "chunked": {"chunk": 4}, "at once": {"chunk": 4}}


@pytest.fixture(autouse=True)
def all_heads_at_once(request, monkeypatch):
    """The form "at once" is what platforms other than the CPU run."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("form") == "at once":
        monkeypatch.setattr(module, "ONE_BY_ONE", ())


class Case(NamedTuple):
    """One call. heads: those of q, k, v; decay: the axes of log_decay and its number of heads."""

    t: int = 11
    heads: tuple[int, int, int] = (4, 2, 2)
    states: int = 2
    decay: tuple[str, int] | None = None
    strength: float = 0.3
    forgets: float = 0.0
    packed: bool = False
    padded: bool = False
    starts: bool = False
    causal: bool = True
    normalise: bool = False
    d: int = 5
    dv: int = 3


CASES = {
    "plain": Case(starts=True),
    "one_token": Case(t=1, heads=(1, 1, 1), states=1, decay=("bth", 1), starts=True),
    "linear_transformer": Case(t=17, normalise=True, heads=(2, 2, 2)),
    "normalised_from_a_state": Case(normalise=True, starts=True, packed=True, padded=True),
    "retnet": Case(decay=("h", 2), starts=True),
    "decay_of_query_heads": Case(decay=("h", 4), states=4, t=8),
    "mamba2": Case(decay=("bth", 4), heads=(1, 1, 4), states=4, starts=True),
    "six_states": Case(t=9, decay=("bth", 1), heads=(6, 2, 3), states=6),
    "gla": Case(decay=("bthd", 2), starts=True),
    "strong_by_head": Case(decay=("bth", 2), strength=60.0, starts=True),
    "strong_by_channel": Case(decay=("bthd", 2), strength=60.0, starts=True),
    "forgets_by_head": Case(decay=("bth", 2), forgets=0.2, starts=True),
    "forgets_by_channel": Case(decay=("bthd", 2), forgets=0.2, starts=True),
    "packed": Case(packed=True, starts=True),
    "packed_padded_gla": Case(decay=("bthd", 2), packed=True, padded=True, starts=True),
    "packed_padded_decay": Case(decay=("h", 2), packed=True, padded=True, starts=True, normalise=True),
    "every_key": Case(causal=False, padded=True, starts=True, normalise=True, t=17),
}


def inputs(case, seed=0):
    """Differentiable arrays by name, the others, and cotangents for o and the state."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    b, t, d = 2, case.t, case.d
    arrays = {"q": draw(b, t, case.heads[0], d), "k": draw(b, t, case.heads[1], d)}
    arrays["v"] = draw(b, t, case.heads[2], case.dv)
    if case.normalise:
        arrays |= {key: np.abs(arrays[key]) for key in "qk"}
    shape = (b, case.states, d, case.dv + case.normalise)
    if case.starts:
        arrays["state"] = np.abs(draw(*shape)) if case.normalise else draw(*shape)
    if case.decay:
        axes, heads = case.decay
        size = {"h": (heads,), "bth": (b, t, heads), "bthd": (b, t, heads, d)}[axes]
        g = -case.strength * rng.random(size) ** 4  # most weak, few strong
        arrays["log_decay"] = np.where(rng.random(size) < case.forgets, -np.inf, g).astype(np.float32)
    others = {}
    if case.packed:
        others["segments"] = np.sort(rng.integers(0, 4, (b, t)), axis=1).astype(np.int32)
    if case.padded:
        others["valid"] = rng.random((b, t)) < 0.7
    h = max(*case.heads, case.decay[1] if case.decay else 1)
    return arrays, others, draw(b, t, h, case.dv), draw(*shape)


@functools.cache
def program(form, causal, normalise, **options):
    """Compiled once for all calls of the same shapes."""
    options = {"causal": causal, "normalise": normalise} | options

    def run(arrays, others, do, dstate):
        call = functools.partial(linear_attention, return_state=True, **others, **options)
        (o, state), vjp = jax.vjp(lambda arrays: call(**arrays), arrays)
        return o, state, vjp((do.astype(o.dtype), dstate))[0]

    return jit(run)


def value_and_vjp(case, arrays, others, do, dstate, form="chunked", **options):
    options = options or (FORMS[form] if case.causal else {})
    return program(form, case.causal, case.normalise, **options)(arrays, others, do, dstate)


@functools.cache
def expected(name):
    arrays, others, do, dstate = inputs(CASES[name])
    options = {"causal": CASES[name].causal, "normalise": CASES[name].normalise}
    return oracle.linear_attention(**arrays, **others, **options, do=do, dstate=dstate)


def close(value, want, message="", of=2e-6):
    value, want = np.asarray(value, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=of * max(np.abs(want).max(initial=0), 1), err_msg=message)


ARRANGED_ALIKE = {"one_token", "decay_of_query_heads", "six_states", "every_key"}  # one form tells it all
IN_FORM = [("recurrent", name) for name in CASES]
IN_FORM += [("chunked", name) for name in CASES if name not in ARRANGED_ALIKE]
IN_FORM += [("at once", name) for name in ("plain", "mamba2", "gla", "packed_padded_decay")]


@pytest.mark.parametrize(("form", "name"), IN_FORM)
def test_values_and_gradients(form, name):
    case = CASES[name]
    o, state, grads = value_and_vjp(case, *inputs(case), form)
    want_o, want_state, want = expected(name)
    close(o, want_o)
    close(state, want_state)
    assert state.dtype == jnp.float32 and set(grads) <= set(want)
    for key, value in grads.items():
        close(value, want[key], key)


@pytest.mark.parametrize("name", ["normalised_from_a_state", "gla", "packed_padded_decay", "every_key"])
def test_oracle_gradients_by_finite_differences(name):
    case = CASES[name]._replace(t=6, heads=(2, 1, 1), states=1)
    case = case._replace(decay=case.decay and (case.decay[0], 1))
    arrays, others, do, dstate = inputs(case)
    arrays = {key: value.astype(np.float64) for key, value in arrays.items()}

    def total(arrays):
        options = {"causal": case.causal, "normalise": case.normalise}
        o, state, grads = oracle.linear_attention(**arrays, **others, **options, do=do, dstate=dstate)
        return np.sum(o * do) + np.sum(state * dstate), grads

    grads = total(arrays)[1]
    for key, x in arrays.items():
        direction = np.random.default_rng(1).normal(size=x.shape)
        up, down = (total(arrays | {key: x + e * direction})[0] for e in (1e-5, -1e-5))
        np.testing.assert_allclose((up - down) / 2e-5, np.sum(grads[key] * direction), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["strong_by_head", "strong_by_channel"])
def test_default_chunks_equal_the_recurrence(name):
    """Strong decay beside weak: a difference of two sums over a chunk would have lost the weak."""
    case = CASES[name]._replace(t=70)
    arguments = inputs(case)
    got, want = (value_and_vjp(case, *arguments, implementation=form) for form in ("chunked", "recurrent"))
    jax.tree.map(functools.partial(close, of=1e-5), got, want)


@pytest.mark.parametrize("chunk", [1, 64])
def test_any_chunk_gives_the_same(chunk):
    case = CASES["packed_padded_gla"]._replace(t=11)
    arguments = inputs(case)
    got, want = (value_and_vjp(case, *arguments, **more) for more in ({"chunk": chunk}, {"form": "recurrent"}))
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_no_tokens(form):
    case = CASES["gla"]._replace(t=0)
    arrays, others, do, dstate = inputs(case)
    o, state, grads = value_and_vjp(case, arrays, others, do, dstate, form)
    assert o.shape == (2, 0, 4, 3)
    np.testing.assert_array_equal(state, arrays["state"])
    np.testing.assert_array_equal(grads["state"], dstate)


@pytest.mark.parametrize("name", ["linear_transformer", "retnet", "gla"])
def test_steps_after_a_prefix_equal_the_full_pass(name):
    case = CASES[name]._replace(t=12)
    arrays, _, do, dstate = inputs(case)
    q, k, v, decay = arrays["q"], arrays["k"], arrays["v"], arrays.get("log_decay")
    call = functools.partial(linear_attention, normalise=case.normalise, return_state=True, chunk=4)
    want, last = jit(call)(q, k, v, log_decay=decay, state=arrays.get("state"))
    of = lambda part: decay if np.ndim(decay) < 2 else decay[:, part]
    o, state = jit(call)(q[:, :7], k[:, :7], v[:, :7], log_decay=of(slice(0, 7)), state=arrays.get("state", 0 * dstate))
    close(o, want[:, :7])
    step = jit(functools.partial(linear_attention_step, normalise=case.normalise))
    for n in range(7, 12):
        o, state = step(state, q[:, n], k[:, n], v[:, n], log_decay=of(n))
        close(o, want[:, n])
    close(state, last)
    assert o.dtype == jnp.float32 and o.shape == do.shape[:1] + do.shape[2:]


def test_features_of_the_linear_transformer_weigh_like_its_attention_matrix():
    rng = np.random.default_rng(0)
    q, k = (jax.nn.elu(rng.normal(size=(1, 20, 1, 4))) + 1 for _ in range(2))
    weights = np.tril(np.einsum("btd,bsd->bts", q[:, :, 0], k[:, :, 0])[0])
    weights = weights / weights.sum(axis=1, keepdims=True)
    o = linear_attention(q, k, jnp.eye(20)[None, :, None], normalise=True)
    np.testing.assert_allclose(o[0, :, 0], weights, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("segments", "chunked"), ("bth", "chunked"), ("bthd", "at once"), ("bth", "recurrent")],
)
def test_a_document_does_not_feel_the_one_before(kind, form):
    """To the bit, however large what came before; and no gradient flows back."""
    case = CASES["gla" if kind == "bthd" else "mamba2" if kind == "bth" else "plain"]
    case = case._replace(starts=False, t=11)
    arrays, _, do, dstate = inputs(case)
    others = {"segments": np.repeat([[0, 1]], 2, 0).repeat((6, 5), axis=1)} if kind == "segments" else {}
    if kind != "segments":
        arrays["log_decay"][:, 6] = -np.inf
    do = do * (np.arange(11) >= 6)[None, :, None, None]
    o, state, grads = value_and_vjp(case, arrays, others, do, dstate, form)
    loud = arrays | {key: np.where((np.arange(11) < 6)[None, :, None, None], 1e15, arrays[key]) for key in "qkv"}
    loud = {key: np.asarray(x, np.float32) for key, x in loud.items()}
    o_loud, state_loud, grads_loud = value_and_vjp(case, loud, others, do, dstate, form)
    np.testing.assert_array_equal(o[:, 6:], o_loud[:, 6:])
    np.testing.assert_array_equal(state, state_loud)
    for g in (grads, grads_loud):
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(g))
        assert all(np.all(g[key][:, :6] == 0) and np.any(g[key][:, 6:] != 0) for key in "qkv")
        if kind != "segments":
            assert np.all(g["log_decay"][:, :7] == 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(side):
    """Whatever it holds, and though its id differs: a state from before passes through it."""
    case = CASES["packed_padded_gla"]._replace(t=7)
    arrays, others, do, dstate = inputs(case)
    others.pop("valid")
    want_o, want_state, want = value_and_vjp(case, arrays, others, do, dstate)
    pad = (4, 0) if side == "left" else (0, 4)
    widen = lambda x, fill: np.pad(x, ((0, 0), pad) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    wide = {key: x if key == "state" else widen(x, np.nan) for key, x in arrays.items()}
    ids = {"segments": widen(others["segments"], -1), "valid": widen(np.ones((2, 7), bool), False)}
    o, state, grads = value_and_vjp(case, wide, ids, widen(do, 1.0), dstate)
    here = slice(pad[0], pad[0] + 7)
    close(o[:, here], want_o)
    close(state, want_state)
    assert np.all(np.delete(o, np.r_[here], axis=1) == 0)
    for key, x in grads.items():
        close(x if key == "state" else x[:, here], want[key])
        assert key == "state" or np.all(np.delete(x, np.r_[here], axis=1) == 0)


@pytest.mark.parametrize("kind", [None, "bthd"])
def test_nothing_comes_from_the_future(kind):
    case = Case(decay=kind and (kind, 2), t=12)
    arrays, *_ = inputs(case)
    call = jit(functools.partial(linear_attention, chunk=8))
    later = arrays | {key: np.where((np.arange(12) > 5)[None, :, None, None], 3.0, arrays[key]) for key in "qkv"}
    later = {key: np.asarray(x, np.float32) for key, x in later.items()}
    a, b = call(**arrays), call(**later)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.all(a[:, 6:] != b[:, 6:])


@pytest.mark.parametrize(("kind", "form"), [(None, "chunked"), ("bth", "chunked"), ("bthd", "recurrent")])
def test_bfloat16_errs_no_more_than_twice_plain_bfloat16(form, kind):
    """Plain: every pair's weight in one dense matrix, all in bfloat16."""
    case = Case(decay=kind and (kind, 2), heads=(2, 2, 2), d=8, dv=8, t=20, normalise=kind is None)
    arrays, _, do, dstate = inputs(case)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)
    low_do = jnp.asarray(do, jnp.bfloat16)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), (low, low_do))
    options = {"normalise": case.normalise}
    want_o, _, want = oracle.linear_attention(**exact[0], do=exact[1], dstate=0 * dstate, **options)

    def plain(arrays):
        g = arrays.get("log_decay", jnp.zeros((2, 20, 2), jnp.bfloat16))
        total = jnp.cumsum(g if g.ndim == 4 else g[..., None], axis=1)
        kept = jnp.exp(total[:, :, None] - total[:, None])
        weights = jnp.einsum(
            "bthd,bshd,btshd->bths", arrays["q"], arrays["k"], jnp.broadcast_to(kept, (2, 20, 20, 2, 8))
        )
        weights = jnp.where(jnp.tri(20, dtype=bool)[None, :, None], weights, 0)
        o = jnp.einsum("bths,bshv->bthv", weights, arrays["v"])
        return o / jnp.sum(weights, axis=-1, keepdims=True) if case.normalise else o

    plain_o, plain_grads = jit(lambda a, do: (plain(a), jax.vjp(plain, a)[1](do)[0]))(low, low_do)
    o, _, grads = value_and_vjp(case, low, {}, low_do, 0 * dstate, form)
    error = lambda a, b: np.abs(np.asarray(a, np.float64) - b).max()
    assert o.dtype == plain_o.dtype == jnp.bfloat16
    assert 0 < error(o, want_o) <= 2 * error(plain_o, want_o)
    np.testing.assert_allclose(np.asarray(o, np.float32), want_o, rtol=2**-8, atol=1e-5)  # rounded once, at the end
    for key, x in grads.items():
        assert x.dtype == jnp.bfloat16
        assert 0 < error(x, want[key]) <= 2 * error(plain_grads[key], want[key]), key


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_composes_with_vmap_scan_and_remat(form):
    case = CASES["packed_padded_gla"]._replace(t=6, starts=False)
    samples = [inputs(case, seed)[:2] for seed in range(3)]
    arrays, others = jax.tree.map(lambda *xs: np.stack(xs), *samples)

    def loss(arrays, others):
        return jnp.sum(jnp.sin(linear_attention(**arrays, **others, **FORMS[form])))

    grad = jax.value_and_grad(loss)
    one = jit(grad)
    one_by_one = [one(*x) for x in samples]
    mapped = jit(jax.vmap(grad))(arrays, others)
    for n, want in enumerate(one_by_one):
        jax.tree.map(lambda a, b: close(a[n], b), mapped, want)

    def summed(arrays):
        step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, 0.0, (arrays, others))[0]

    value, grads = jit(jax.value_and_grad(summed))(arrays)
    close(value, sum(x for x, _ in one_by_one))
    jax.tree.map(close, grads, mapped[1])


@pytest.mark.parametrize(("axis", "form"), [("rows", "chunked"), ("heads", "recurrent")])
def test_shards_over_rows_and_heads(axis, form):
    case = Case(decay=("bth", 2), heads=(4, 2, 2), t=6)
    arrays, *_ = inputs(case)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    part = P("x") if axis == "rows" else P(None, None, "x")
    of_state = P("x") if axis == "rows" else P(None, "x")
    call = functools.partial(linear_attention, return_state=True, **FORMS[form])
    local = lambda q, k, v, g: call(q, k, v, log_decay=g)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(part,) * 4, out_specs=(part, of_state))

    def value_and_grads(f):
        def loss(*args):
            o, state = f(*args)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state)), (o, state)

        return jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
            *(arrays[x] for x in ("q", "k", "v", "log_decay"))
        )

    jax.tree.map(close, value_and_grads(sharded), value_and_grads(local))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_same_bits_twice(form):
    case = CASES["packed_padded_gla"]
    arguments = inputs(case)
    first, second = (value_and_vjp(case, *arguments, form) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(("kind", "form"), [("bth", "chunked"), ("bthd", "at once")])
def test_second_derivatives_and_forward_mode(kind, form):
    """Of the chunked form as of the recurrence, resets included."""
    case = Case(decay=(kind, 2), t=5, packed=True, starts=True)
    arrays, others, *_ = inputs(case)
    tangent, _, *_ = inputs(case, seed=1)

    def both(**options):
        def loss(arrays):
            return jnp.sum(jnp.sin(linear_attention(**arrays, **others, **options)))

        slope = lambda arrays: jax.jvp(loss, (arrays,), (tangent,))[1]
        return jit(jax.value_and_grad(slope))(arrays)

    got, want = both(chunk=2), both(implementation="recurrent")
    jax.tree.map(functools.partial(close, of=1e-5), got, want)


def temporary_bytes(t, **options):
    x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
    f = lambda q, k, v: jnp.sum(linear_attention(q, k, v, **options) ** 2)
    compiled = jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_and_keeps_no_state_per_token():
    assert temporary_bytes(2048) < 2.2 * temporary_bytes(1024)
    assert temporary_bytes(2048) < temporary_bytes(2048, implementation="recurrent") / 5
    states = 2 * 16 * 16 * 4 * 2048  # one state per token
    assert temporary_bytes(2048, implementation="recurrent") > states > 2 * temporary_bytes(2048)


def test_none_chooses_by_shape():
    def program(t):
        x = jnp.ones((1, t, 1, 4))
        return str(jax.make_jaxpr(lambda x: linear_attention(x, x, x))(x))

    assert "checkpoint" not in program(1) and "remat" not in program(1)
    assert "checkpoint" in program(2) or "remat" in program(2)


X = jnp.ones((2, 6, 4, 8))
IDS = jnp.ones((2, 6), jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X[0]}, r"q has shape \(6, 4, 8\), expected \[B, T, heads, D\]"),
        ({"k": X[:1]}, r"k has B, T, D = \(1, 6, 8\), expected q's \(2, 6, 8\); apply the same feature map"),
        ({"k": X[..., :3]}, r"k has B, T, D = \(2, 6, 3\)"),
        ({"v": X[:, :3]}, r"v has B, T = \(2, 3\), expected q's \(2, 6\)"),
        ({"q": X[:, :, :3]}, r"heads are {'q': 3, 'k': 4, 'v': 4}, expected each number to divide the largest, 4"),
        ({"k": X[:, :, :0]}, "expected each number to divide the largest, 4"),
        ({"log_decay": jnp.zeros((2, 6))}, r"log_decay has shape \(2, 6\), expected \[heads\], \[B, T, heads\]"),
        ({"log_decay": jnp.zeros((2, 6, 4, 7))}, r"B, T, D = \(2, 6, 8\)"),
        ({"log_decay": jnp.zeros((2, 5, 4))}, r"log_decay has shape \(2, 5, 4\)"),
        ({"log_decay": jnp.zeros(3)}, "'log_decay': 3}, expected each number to divide the largest, 4"),
        ({"segments": IDS[:1]}, r"segments is int32 \(1, 6\), expected integer \[B, T\] = \(2, 6\)"),
        ({"segments": IDS.astype(jnp.float32)}, "segments is float32"),
        ({"valid": IDS}, r"valid is int32 \(2, 6\), expected bool"),
        (
            {"state": jnp.ones((2, 4, 8, 7))},
            r"state has shape \(2, 4, 8, 7\), expected \[B, R, D, Dv\] = \(2, 4, 8, 8\)",
        ),
        ({"state": jnp.ones((2, 4, 8, 8)), "normalise": True}, r"\[B, R, D, Dv \+ 1\] with normalise = \(2, 4, 8, 9\)"),
        ({"implementation": "pallas"}, "implementation='pallas', expected None or one of"),
        ({"chunk": 48}, "chunk = 48 tokens, expected a power of two"),
        ({"chunk": 0}, "chunk = 0 tokens"),
        ({"causal": False, "segments": IDS, "chunk": 4}, "causal=False takes no segments, chunk"),
        ({"eps": -1.0}, "eps = -1.0, expected"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match="linear_attention: .*" + message):
        linear_attention(**({"q": X, "k": X, "v": X} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X}, r"q has shape \(2, 6, 4, 8\), expected \[B, heads, D\]: one token"),
        ({"state": jnp.ones((2, 4, 8))}, r"state has shape \(2, 4, 8\), expected \[B, R, D, Dv\] = \(2, 4, 8, 8\)"),
        ({"log_decay": jnp.zeros((2, 4, 7))}, r"log_decay has shape \(2, 1, 4, 7\), expected \[heads\]"),
    ],
)
def test_bad_input_of_a_step(change, message):
    x = X[:, 0]
    with pytest.raises(ValueError, match="linear_attention_step.*: " + message):
        linear_attention_step(**({"state": jnp.ones((2, 4, 8, 8)), "q": x, "k": x, "v": x} | change))
