import functools
import importlib.util
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # whether races were found is private
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxrl.kernels import aot
from jaxrl.kernels.attention import Window, attention, decode, decode_gpu
from jaxrl.kernels.attention.decode import decode_attention

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
IMPLEMENTATIONS = ("reference", "xla", "pallas")


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_decode", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle, hopper = load("oracles/decode.py"), load("kernels/hopper.py")


class Call(NamedTuple):
    """Shapes and options; `page` divides s."""

    lengths: tuple[int, ...]
    s: int
    page: int
    t: int = 1
    h: int = 4
    k: int = 2
    d: int = 8
    dv: int = 8
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    sinks: bool = False


CALLS = {
    "one_token": Call((1, 70, 33), 70, 10),
    "drafted": Call((80, 5, 17), 80, 16, t=5, h=6, k=1, dv=6),
    "shorter_than_the_queries": Call((0, 2, 3), 16, 8, t=3, soft_cap=0.7),
    "sinks": Call((0, 12), 24, 8, h=3, k=3, sinks=True, scale=0.4),
    "window": Call((130, 0, 64, 6), 136, 8, t=2, window=9, d=16),
    "window_of_one": Call((40, 1), 40, 20, window=1),
    "one_key": Call((1,), 1, 1, h=1, k=1),
    "along_lanes": Call((200, 384, 1, 0), 384, 16, t=3, h=6, k=2, dv=6, soft_cap=2.0, sinks=True),
    "along_lanes_in_a_window": Call((384, 130, 5), 384, 48, h=3, k=3, d=24, window=150),
    "many_tiles": Call((900, 77), 1000, 40, t=2, k=4, d=64, window=700, sinks=True, soft_cap=2.0),
}


@functools.cache
def inputs(name):
    """(q, k, v, lengths, sinks), the cache in pages and its table; what no query sees is NaN."""
    call, rng = CALLS[name], np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    b, lengths = len(call.lengths), np.array(call.lengths, np.int32)
    q, k, v = draw(b, call.t, call.h, call.d), draw(b, call.s, call.k, call.d), draw(b, call.s, call.k, call.dv)
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = np.nan, np.nan
    pages, order = call.s // call.page, rng.permutation(b * (call.s // call.page))
    split = lambda x: x.reshape(b * pages, call.page, *x.shape[2:])[order]
    table = np.argsort(order).reshape(b, pages).astype(np.int32)
    for row, length in enumerate(lengths):
        table[row, -(-length // call.page) :] = (-1, 10**6)[row % 2]
    return (q, k, v, lengths, draw(call.h) if call.sinks else None), (split(k), split(v), table)


def options(name):
    call = CALLS[name]
    return {"window": call.window, "soft_cap": call.soft_cap, "scale": call.scale, "return_lse": True}


@functools.cache
def expected(name, paged):
    (q, k, v, lengths, sinks), (k_pages, v_pages, table) = inputs(name)
    call = CALLS[name]
    scale = call.d**-0.5 if call.scale is None else call.scale
    knobs = {"scale": scale, "window": call.window, "soft_cap": call.soft_cap, "sinks": sinks}
    if paged:
        return oracle.decode(q, k_pages, v_pages, lengths, block_table=table, **knobs)
    return oracle.decode(q, k, v, lengths, **knobs)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation, name, paged):
    (q, k, v, lengths, sinks), (k_pages, v_pages, table) = inputs(name)
    f = quick_jit(functools.partial(decode_attention, implementation=implementation, **options(name)))
    cache = (k_pages, v_pages) if paged else (k, v)
    o, lse = f(q, *cache, lengths, block_table=table if paged else None, sinks=sinks)
    want_o, want_lse = expected(name, paged)
    np.testing.assert_allclose(o, want_o, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("name", ["drafted", "window", "many_tiles", "along_lanes", "along_lanes_in_a_window"])
def test_the_kernel_in_strict_interpretation(name, paged):
    """Reads out of bounds, reads before a copy has come and races are errors; several blocks a row."""
    (q, k, v, lengths, _), (k_pages, v_pages, table) = inputs(name)
    call = CALLS[name]
    settings = decode.Settings(call.d**-0.5 if call.scale is None else call.scale, call.soft_cap, call.window)
    cache = (k_pages, v_pages) if paged else (k, v)
    table = np.clip(table, 0, len(k_pages) - 1) if paged else None
    strict = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    run = functools.partial(decode._kernel_call, settings, interpret=strict, columns=256)
    arrays = (q, *cache, lengths, table)
    if decode._across(*cache, table):  # blocks of 128 keys
        run, arrays = functools.partial(decode._across_call, settings, interpret=strict, number=1), arrays[:-1]
    try:
        o, lse = jax.jit(run)(*arrays)
        jax.block_until_ready(o)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    plain = functools.partial(decode_attention, implementation="reference", **options(name))
    want_o, want_lse = jax.jit(plain)(q, k, v, lengths)
    np.testing.assert_allclose(o, want_o, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize("t", [1, 4])
def test_the_kernel_fetches_the_pages_that_are_seen_and_no_other(t, window):
    page, pages = 8, 6
    settings = decode.Settings(1.0, None, window)
    for length in range(1, page * pages + 1):
        seen = {
            key // page
            for query in range(max(length - t, 0), length)
            for key in range(query + 1)
            if window is None or key > query - window
        }
        fetched = [int(decode._page_at(settings, jnp.int32(length), t, page, n)) for n in range(pages)]
        assert set(fetched) == seen and fetched == sorted(fetched)
    assert int(decode._page_at(settings, jnp.int32(0), t, page, 3)) == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_attention_at_an_offset(implementation):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 40, 2, 4)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, 3, 4, 4)), jnp.float32)
    step = quick_jit(functools.partial(decode_attention, window=9, implementation=implementation))
    for n in (3, 20, 40):
        want = attention(q, k, v, mask=Window(9), q_offset=n - 3, implementation="reference")
        np.testing.assert_allclose(step(q, k, v, jnp.full(2, n)), want, atol=2e-6)


def test_agrees_with_jax():
    (q, k, v, lengths, _), _ = inputs("one_token")
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    want = jax.jit(jax.nn.dot_product_attention)(q, k, v, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(jax.jit(decode_attention)(q, k, v, lengths), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_errs_no_more_than_twice_plain_bfloat16(implementation):
    call = CALLS["one_token"]
    (q, k, v, lengths, _), _ = inputs("one_token")
    low = [jnp.nan_to_num(jnp.asarray(x, jnp.bfloat16)) for x in (q, k, v)]
    exact = [np.asarray(x, np.float32) for x in low]
    want, _ = oracle.decode(*exact, lengths, scale=call.d**-0.5)

    def plain(q, k, v):
        logits = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) * jnp.bfloat16(call.d**-0.5)
        seen = (jnp.arange(call.s)[None] < lengths[:, None])[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e9), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, 2))

    o = jax.jit(functools.partial(decode_attention, implementation=implementation))(*low, lengths)
    error = lambda a: np.abs(np.asarray(a, np.float64) - want).max()
    assert o.dtype == jnp.bfloat16
    assert 0 < error(o) <= 2 * error(plain(*low))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_composes_with_vmap_scan_and_jit(implementation):
    (q, k, v, lengths, _), _ = inputs("drafted")
    qs, ns = jnp.stack([q, -q]), jnp.stack([lengths, lengths // 2])
    call = functools.partial(decode_attention, implementation=implementation)
    one = quick_jit(call)
    one_by_one = jnp.stack([one(q, k, v, n) for q, n in zip(qs, ns, strict=True)])
    mapped = quick_jit(jax.vmap(lambda q, n: call(q, k, v, n)))(qs, ns)
    scanned = quick_jit(lambda qs, ns: lax.scan(lambda _, x: (None, call(x[0], k, v, x[1])), None, (qs, ns))[1])(qs, ns)
    np.testing.assert_allclose(mapped, one_by_one, atol=1e-6)
    np.testing.assert_allclose(scanned, one_by_one, atol=1e-6)
    np.testing.assert_array_equal(one(q, k, v, lengths), one_by_one[0])  # the same bits twice


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_rows_spread_over_devices(implementation, paged):
    (q, k, v, lengths, _), (k_pages, v_pages, table) = inputs("drafted")
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = P("data"), P()
    call = functools.partial(decode_attention, implementation=implementation)
    if paged:
        f = lambda q, k, v, lengths, table: call(q, k, v, lengths, block_table=table)
        cache, specs, more = (k_pages, v_pages), (rows, whole, whole, rows, rows), (table,)
    else:
        f, cache, specs, more = call, (k, v), (rows,) * 4, ()
    got = quick_jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=rows))(q, *cache, lengths, *more)
    np.testing.assert_allclose(got, quick_jit(f)(q, *cache, lengths, *more), atol=1e-6)


# On a Hopper GPU, here in a model of one. What no query sees must be finite there.


@pytest.mark.parametrize("name", ["one_token", "pages", "large_pages", "parts", "shorter_than_the_queries"])
def test_the_kernel_for_hopper(name):
    b, t, s, h, heads, d, page, window, lengths = {
        "one_token": (2, 1, 264, 4, 2, 64, None, None, (264, 100)),
        "pages": (2, 3, 512, 6, 2, 64, 16, None, (512, 2)),
        "large_pages": (1, 2, 1024, 4, 1, 64, 256, 300, (900,)),
        "parts": (2, 1, 2048, 2, 1, 64, None, None, (2048, 1030)),
        "shorter_than_the_queries": (3, 5, 128, 3, 3, 64, 8, None, (0, 3, 100)),
    }[name]
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=x).astype(np.float16) for x in ((b, t, h, d), (b, s, heads, d), (b, s, heads, d)))
    lengths, sinks = np.array(lengths, np.int32), rng.normal(size=h).astype(np.float32)
    knobs = {"scale": 0.2, "window": window, "soft_cap": 1.5, "sinks": sinks}
    want, want_lse = oracle.decode(*(x.astype(np.float32) for x in (q, k, v)), lengths, **knobs)
    table, cache = None, (k, v)
    if page:
        order = rng.permutation(b * s // page)
        cache = tuple(x.reshape(-1, page, heads, d)[order] for x in (k, v))
        table = np.argsort(order).reshape(b, -1).astype(np.int32)
    call = functools.partial(decode_attention, implementation="mosaic_gpu", return_lse=True, **knobs)
    (o, lse), _ = hopper.run(lambda q, k, v, n, table: call(q, k, v, n, block_table=table), q, *cache, lengths, table)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(o, np.float32), want, atol=2e-3 * np.abs(want).max())


def test_parts_of_a_row_fill_the_chip():
    assert decode_gpu._parts(4 * 8, 16384, 1) == 16
    assert decode_gpu._parts(512, 16384, 1) == 1
    assert decode_gpu._parts(8, 16384, 256) == 32
    assert decode_gpu._parts(8, 1000, 1) == 1


H = jnp.zeros((2, 1, 4, 64), jnp.bfloat16)
NOT_FOR_HOPPER = [
    ({"q": H.astype(jnp.float32)}, "bfloat16 or float16, not float32"),
    ({"q": jnp.zeros((2, 65, 4, 64), jnp.bfloat16)}, "up to 128 queries for each key head, not 65 x 2"),
    ({"k": H[:, :, :2].repeat(12, 1), "v": H[:, :, :2].repeat(12, 1)}, "S is no multiple of 8, as 12"),
    ({"q": H[..., :32], "k": H[:, :, :2, :32].repeat(16, 1)}, "no multiple of 64, as 32 and 64"),
    ({"block_table": jnp.zeros((2, 3), jnp.int32), "k": H[:, :, :2].repeat(24, 1), "v": H[:, :, :2].repeat(24, 1)},
     "pages of 8, 16, 32, 64 or a multiple of 128 tokens, not 24"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), NOT_FOR_HOPPER)
def test_what_the_kernel_for_hopper_refuses(change, message):
    cache = H[:, :, :2].repeat(16, 1)
    call = {"q": H, "k": cache, "v": cache, "lengths": jnp.zeros(2, jnp.int32)} | change
    with pytest.raises(ValueError, match=message):
        decode_attention(**call, implementation="mosaic_gpu")
    decode_attention(**call)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lengths_that_do_not_fit_are_clipped(implementation):
    q, k = jnp.ones((2, 1, 2, 4)), jnp.arange(2 * 24.0).reshape(2, 6, 1, 4)
    f = functools.partial(decode_attention, q, k, k, implementation=implementation)
    np.testing.assert_array_equal(f(jnp.array([9, -3])), f(jnp.array([6, 0])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pages_that_do_not_exist_are_clipped(implementation):
    q, pages, lengths = jnp.ones((2, 1, 2, 4)), jnp.arange(72.0).reshape(3, 6, 1, 4), jnp.array([6, 9])
    f = functools.partial(decode_attention, q, pages, pages, lengths, implementation=implementation)
    given, clipped = jnp.array([[-2, 7], [99, 1]]), jnp.array([[0, 2], [2, 1]])
    np.testing.assert_array_equal(f(block_table=given), f(block_table=clipped))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("t", "s"), [(0, 6), (1, 0)])
def test_empty(implementation, t, s):
    q, k = jnp.ones((2, t, 2, 4)), jnp.ones((2, s, 1, 4))
    options = {"implementation": implementation, "return_lse": True}
    o, lse = decode_attention(q, k, k, jnp.zeros(2, jnp.int32), **options)
    assert o.shape == q.shape and np.all(o == 0) and np.all(lse < -1e29)


def test_derivatives():
    q, k, lengths = jnp.ones((1, 1, 2, 4)), jnp.arange(24.0).reshape(1, 6, 1, 4), jnp.array([5])
    loss = lambda q, name: jnp.sum(decode_attention(q, k, k, lengths, implementation=name))
    assert np.all(np.isfinite(jax.grad(loss)(q, "reference")))
    for name in ("xla", "pallas"):
        with pytest.raises(ValueError, match=f'implementation="{name}" has no derivatives; train with attention'):
            jax.grad(loss)(q, name)


def test_none_reads_no_more_than_the_length():
    """The loop over tiles ends at a row's own length: its bound is data, not the size of the cache."""
    q, k = jnp.ones((1, 1, 2, 64)), jnp.ones((1, 4096, 2, 64))
    text = str(jax.make_jaxpr(decode_attention)(q, k, k, jnp.array([3])))
    assert "while[" in text and "4096,2,64]" in text and not re.search(r"f32\[1,(2,1|2),4096\]", text)


X = jnp.ones((2, 6, 4, 8))
Q = X[:, :1]
ONES = jnp.ones(2, jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q has shape \(1, 4, 8\), expected \[B, T, H, D\]"),
        ({"k": X[0]}, r"k has shape \(6, 4, 8\), expected \[B, S, K, D\]"),
        ({"v": X[0], "block_table": ONES[:, None]}, r"v has shape \(6, 4, 8\), expected \[P, page, K, Dv\]"),
        ({"k": X[..., :4]}, "k has D = 4, expected q's D = 8"),
        ({"k": X[:1], "v": X[:1]}, "k has B = 1, expected q's B = 2; pages need a block_table"),
        ({"v": X[:, :3]}, r"v has B, S, K = \(2, 3, 4\), expected k's \(2, 6, 4\)"),
        ({"q": Q[:, :, :3]}, "H = 3 heads, expected a multiple of k's K = 4"),
        ({"lengths": ONES[:1]}, r"lengths has shape \(1,\), expected \[B\] = \(2,\)"),
        ({"lengths": jnp.ones(2)}, "lengths is float32, expected integers"),
        ({"block_table": ONES}, r"block_table has shape \(2,\), expected \[B, N\] with B = 2"),
        ({"block_table": jnp.ones((2, 3))}, "block_table is float32, expected integers"),
        ({"sinks": jnp.ones(3)}, r"sinks has shape \(3,\), expected \[H\] = \(4,\)"),
        ({"window": 0}, "window = 0, expected an int of at least 1"),
        ({"scale": jnp.float32(1.0)}, "scale is .*, expected a Python number"),
        ({"soft_cap": -1.0}, "soft_cap = -1.0, expected a positive number"),
        ({"implementation": "cuda"}, "implementation='cuda', expected None"),
        ({"implementation": "pallas", "q": Q.astype(jnp.float16)}, "takes float32 or bfloat16, not float16"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match="decode_attention: .*" + message):
        decode_attention(**({"q": Q, "k": X, "v": X, "lengths": ONES} | change))


def for_tpu(chip, cache, page=None, **options):
    """A step of decoding over a cache of this shape, compiled."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16 if len(sizes) == 4 else jnp.int32)
    q, k = shape(4, 2, 4 * cache[2], cache[3]), shape(*cache)
    call = functools.partial(decode_attention, implementation="pallas", **options)
    f = lambda q, k, v, lengths, table: call(q, k, v, lengths, block_table=table)
    table = None if page is None else shape(4, cache[0] // 4)
    return aot.compile_for(aot.tpu_mesh(chip), f, q, k, k, shape(4), table)


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("page", [None, 16])
def test_compiles_for_tpus(chip, page):
    cache = (4, 4096, 8, 128) if page is None else (1024, page, 8, 128)
    program = for_tpu(chip, cache, page, window=1500, soft_cap=30.0)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    ("heads", "width", "in_place"),
    [(8, 128, True), (2, 128, True), (3, 128, False), (2, 256, False), (8, 256, True), (8, 64, True), (8, 192, True)],
)
def test_reads_the_cache_in_place_where_it_says_so(heads, width, in_place):
    cache = (4, 32768, heads, width)
    temporary = for_tpu("v5e", cache).memory_analysis().temp_size_in_bytes
    of_shape = np.empty(cache, "V0")
    assert decode._in_place(of_shape, of_shape, None) == in_place
    assert (temporary < np.prod(cache)) == in_place  # half the bytes of the keys


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("chip", ["v5p", "v6e", "tpu7x"])
def test_keys_along_lanes_compile_for_tpus(chip):
    program = for_tpu(chip, (4, 4096, 8, 64), window=1500, soft_cap=30.0)
    assert set(aot.kernel_vmem(program)) == {"decode_attention_across"}
