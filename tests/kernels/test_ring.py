import collections
import dataclasses
import functools
import importlib.util
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.kernels import aot
from jaxrl.kernels.attention import (
    BlockDiffusion,
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Prefix,
    Segments,
    Tree,
    Window,
    attention,
)
from jaxrl.kernels.attention.ring import ring_attention, unzigzag, zigzag


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_ring", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load("oracles/attention.py")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
BLOCKS = {"block_q": 16, "block_k": 8}

RNG = np.random.default_rng(0)
LENGTH = 96
IDS = np.sort(RNG.integers(0, 4, (1, LENGTH)), axis=1).astype(np.int32)
KEY_IDS = np.where(RNG.random((1, LENGTH)) < 0.3, 7, IDS).astype(np.int32)
LENGTHS = np.array([50, 0], np.int32)
END = np.minimum(np.arange(LENGTH) + RNG.integers(1, 70, (1, LENGTH)), LENGTH).astype(np.int32)
ARRAY = RNG.random((1, 4, LENGTH, LENGTH)) < 0.3
ARRAY[:, :, ::7] = False  # rows masked whole
ARRAY[:, :, :, 24:48] = False  # parts masked whole


def block_diffusion(row, head, q, k):
    q_clean, k_clean = q >= LENGTH // 2, k >= LENGTH // 2
    q_block, k_block = q % (LENGTH // 2) // 7, k % (LENGTH // 2) // 7
    if not k_clean:
        return not q_clean and q_block == k_block
    return k_block <= q_block if q_clean else k_block < q_block


CASES = {
    "causal": (Causal(), lambda b, h, q, k: k <= q),
    "full": (Full(), lambda b, h, q, k: True),
    "window": (Window(20), lambda b, h, q, k: 0 <= q - k < 20),
    "chunked": (Causal() & Chunked(33), lambda b, h, q, k: k <= q and q // 33 == k // 33),
    "prefix": (Causal() | Prefix(LENGTHS[:1]), lambda b, h, q, k: k <= q or k < LENGTHS[0]),
    "packed": (Causal() & Segments(IDS), lambda b, h, q, k: k <= q and IDS[0, q] == IDS[0, k]),
    "two_ids": (Segments(IDS, KEY_IDS), lambda b, h, q, k: IDS[0, q] == KEY_IDS[0, k]),
    "tree": (Tree(END), lambda b, h, q, k: k <= q < END[0, k]),
    "block_diffusion": (BlockDiffusion(7), block_diffusion),
    "dense": (Dense(ARRAY), lambda b, h, q, k: ARRAY[0, h, q, k]),
}


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class EachRow(Mask):
    """Another mask for each row of the batch: one program tries them all."""

    each: tuple[Mask, ...]

    def _of(self, what, tile):
        tiles = [getattr(mask, what) for mask in self.each]
        return [lambda f=f: jnp.asarray(f(tile._replace(row=0)), bool) for f in tiles]

    def allowed(self, tile):
        whole = lambda f: lambda: jnp.broadcast_to(f(), (1, 1, tile.q_size, tile.k_size))
        return lax.switch(tile.row, [whole(f) for f in self._of("allowed", tile)])

    def live(self, tile):
        live = self._of("live", tile)
        return functools.reduce(jnp.logical_or, [f() for f in live]) if tile.row is None else lax.switch(tile.row, live)

    def full(self, tile):
        return lax.switch(tile.row, self._of("full", tile))


def each_row(row, head, q, k):
    return list(CASES.values())[row][1](0, head, q, k)


class Call(NamedTuple):
    """A mask of the whole sequence, what it means, and the options of the call."""

    mask: Mask
    predicate: Any
    b: int = 2
    h: int = 4
    k: int = 2
    s: int = LENGTH
    scale: float = 8**-0.5
    soft_cap: float | None = None
    sinks: bool = False


CALLS = {
    "each_row": Call(EachRow(tuple(mask for mask, _ in CASES.values())), each_row, b=len(CASES), sinks=True),
    "causal": Call(Causal(), CASES["causal"][1], k=4),
    "prefix": Call(Prefix(LENGTHS), lambda b, h, q, k: k < LENGTHS[b], soft_cap=1.5),
    "cross": Call(Full(), lambda b, h, q, k: True, sinks=True, scale=0.7, k=1, s=32),
    "dense": Call(Causal() & Dense(ARRAY), lambda b, h, q, k: k <= q and ARRAY[0, h, q, k], b=1),
}


@functools.cache
def inputs(name):
    """Arrays by name, and cotangents of o and lse."""
    call, rng = CALLS[name], np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    arrays = {"q": draw(call.b, LENGTH, call.h, 8)}
    arrays |= {"k": draw(call.b, call.s, call.k, 8), "v": draw(call.b, call.s, call.k, 6)}
    if call.sinks:
        arrays["sinks"] = draw(call.h)
    return arrays, draw(call.b, LENGTH, call.h, 6), draw(call.b, LENGTH, call.h)


def expected(name):
    call = CALLS[name]
    arrays, do, dlse = inputs(name)
    allowed = oracle.dense(call.predicate, call.b, call.h, LENGTH, call.s)
    return oracle.attention(**arrays, allowed=allowed, do=do, dlse=dlse, scale=call.scale, soft_cap=call.soft_cap)


def ring_mesh(n, data=1, heads=1):
    axes = ("data", "ring", "heads")
    devices = jax.devices()[: n * data * heads]
    return jax.make_mesh((data, n, heads), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


@functools.cache
def over(mesh, *, order=False, **options):
    """(arrays by name, mask) -> o, lse of the whole sequence, by the ring; `order` for zig-zag."""
    part, n = P("data", "ring", "heads"), mesh.shape["ring"]

    def call(arrays, mask):
        specs = {name: P("heads") if name == "sinks" else part for name in arrays}
        local = lambda arrays, mask: ring_attention(
            arrays["q"], arrays["k"], arrays["v"], axis_name="ring", mask=mask, sinks=arrays.get("sinks"),
            zigzag=order, return_lse=True, **BLOCKS, **options,
        )  # fmt: skip
        f = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, P("data") if mesh.shape["data"] > 1 else P()),
            out_specs=(part, part),
            check_vma=False,
        )
        if not order:
            return f(arrays, mask)
        ordered = {name: x if name == "sinks" else zigzag(x, n) for name, x in arrays.items()}
        return tuple(unzigzag(x, n) for x in f(ordered, mask))

    return call


@functools.partial(quick_jit, static_argnums=0)
def value_and_vjp(f, arrays, mask, do, dlse):
    out, vjp = jax.vjp(lambda arrays: f(arrays, mask), arrays)
    return *out, vjp((do.astype(out[0].dtype), dlse))[0]


def run(name, mesh, order, **options):
    call = CALLS[name]
    arrays, do, dlse = inputs(name)
    ring = over(mesh, order=order, scale=call.scale, soft_cap=call.soft_cap, **options)
    return value_and_vjp(ring, arrays, call.mask, do, dlse)


@pytest.mark.parametrize(
    ("name", "n", "data", "heads", "order"),
    [
        ("each_row", 4, 1, 1, True),
        ("each_row", 8, 1, 1, False),
        ("each_row", 2, 1, 1, True),
        ("prefix", 2, 2, 2, False),
        ("cross", 4, 1, 1, True),
        ("dense", 4, 1, 1, True),
    ],
)
def test_equals_attention_on_one_device(name, n, data, heads, order):
    check(name, *run(name, ring_mesh(n, data, heads), order))


@pytest.mark.parametrize(("name", "n", "order"), [("prefix", 2, True), ("cross", 4, False)])
def test_the_tpu_kernels_see_the_same_mask(name, n, order):
    check(name, *run(name, ring_mesh(n), order, implementation="pallas"))


def check(name, o, lse, grads):
    want_o, want_lse, want = expected(name)
    np.testing.assert_allclose(o, want_o, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-6)
    assert set(grads) == set(want)
    for key, value in want.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(grads[key], value, rtol=1e-5, atol=2e-6 * max(size, 1), err_msg=key)


def test_a_ring_over_two_axes_of_the_mesh():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    arrays, _, _ = inputs("causal")
    part = P(None, ("a", "b"))
    f = functools.partial(ring_attention, axis_name=("a", "b"), **BLOCKS)
    f = jax.shard_map(f, mesh=mesh, in_specs=(part,) * 3, out_specs=part, check_vma=False)
    o = quick_jit(f)(arrays["q"], arrays["k"], arrays["v"])
    np.testing.assert_allclose(o, attention(**arrays, implementation="reference"), atol=2e-6)


@pytest.mark.parametrize(("part", "order"), [(1, False), (17, False)])
def test_awkward_lengths(part, order):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4 * part, 2, 4)), jnp.float32) for _ in range(3))
    o, _ = quick_jit(over(ring_mesh(4), order=order))({"q": q, "k": k, "v": v}, Causal())
    np.testing.assert_allclose(o, attention(q, k, v, implementation="reference"), atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_empty(shape):
    x = jnp.ones((*shape, 2, 4))
    o, lse = over(ring_mesh(2))({"q": x, "k": x, "v": x}, Causal())
    assert o.shape == x.shape and lse.shape == x.shape[:3]


def test_zigzag():
    x = jnp.arange(24).reshape(1, 24, 1)
    placed = zigzag(x, 3)[0, :, 0].reshape(3, 2, 4)
    for r in range(3):
        np.testing.assert_array_equal(placed[r, 0], np.arange(4) + 4 * r)
        np.testing.assert_array_equal(placed[r, 1], np.arange(4) + 4 * (5 - r))
    np.testing.assert_array_equal(unzigzag(zigzag(x, 3), 3), x)
    turned = jnp.swapaxes(x, 1, 2)
    np.testing.assert_array_equal(zigzag(turned, 3, axis=2), jnp.swapaxes(zigzag(x, 3), 1, 2))
    with pytest.raises(ValueError, match="axis 1 has length 24, expected a multiple of 2 n = 14; pad"):
        zigzag(x, 7)


VISITS = collections.Counter()


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Counted(Causal):
    """Counts by device the tiles that are worked on."""

    def allowed(self, tile):
        jax.debug.callback(lambda device: VISITS.update([int(device)]), lax.axis_index("ring"))
        return super().allowed(tile)

    def full(self, tile):
        return False


def test_zigzag_balances_causal_attention_and_plain_order_does_not():
    x = jnp.ones((1, 256, 1, 4))

    def tiles(order, transform):
        f = lambda x: jnp.sum(over(ring_mesh(4), order=order)({"q": x, "k": x, "v": x}, Counted())[0] ** 2)
        VISITS.clear()
        jax.block_until_ready(quick_jit(transform(f))(x))
        jax.effects_barrier()
        return [VISITS[device] for device in range(4)]

    plain, both_passes = tiles(False, lambda f: f), tiles(True, jax.grad)
    columns = 2 * np.arange(1, 17)  # live tiles of 8 keys for each row of tiles of 16 queries
    assert plain == [part.sum() for part in columns.reshape(4, 4)]
    assert max(both_passes) - min(both_passes) <= 2
    assert sum(both_passes) == 2 * columns.sum()


def test_parts_that_the_mask_empties_are_not_computed():
    """NaN in keys that nobody sees does not reach the result."""
    x = jnp.ones((1, 64, 2, 4))
    poisoned = x.at[:, 16:].set(jnp.nan)
    mask = Prefix(jnp.array([16], jnp.int32))
    f = over(ring_mesh(4))
    o, _, grads = value_and_vjp(f, {"q": x, "k": poisoned, "v": poisoned}, mask, x, jnp.ones(x.shape[:3]))
    assert np.all(o == 1) and np.all(np.isfinite(grads["q"])) and np.all(np.isfinite(grads["k"]))


COLLECTIVE = r" = (\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def traffic(program) -> list[tuple[str, str, int]]:
    """(collective, type, times that it runs) of a compiled program; the loop is known by its trip count."""
    computation, found, bodies = "", [], {}
    for line in program.as_text().splitlines():
        if re.match(r"\S.*\{$", line):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        if match := re.search(COLLECTIVE, line):
            found.append((computation, match[2], match[1].split("{")[0]))
        if match := re.search(r"while\(.*body=%?([\w.\-]+).*known_trip_count\D+(\d+)", line):
            bodies[match[1]] = int(match[2])
    return [(kind, type_, bodies.get(computation, 1)) for computation, kind, type_ in found]


def test_a_forward_pass_moves_keys_and_values_n_minus_1_times_and_nothing_else():
    n = 4
    q, k, v = (jax.ShapeDtypeStruct((2, 16 * n, h, d), jnp.float32) for h, d in ((4, 8), (2, 8), (2, 6)))
    f = functools.partial(ring_attention, axis_name="ring", zigzag=True, **BLOCKS)
    part = P(None, "ring")
    f = jax.shard_map(f, mesh=ring_mesh(n), in_specs=(part,) * 3, out_specs=part, check_vma=False)
    moved = traffic(quick_jit(f).lower(q, k, v).compile())
    expected = [("collective-permute", f"f32[2,16,2,{d}]", n - 1) for d in (6, 8)]
    assert sorted(moved) == expected

    loss = lambda *qkv: jnp.sum(f(*qkv) ** 2)
    moved = traffic(quick_jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile())
    assert {kind for kind, _, _ in moved} == {"collective-permute"}
    of_k = sum(times for _, type_, times in moved if type_ == "f32[2,16,2,8]")
    of_dk = sum(times for _, type_, times in moved if type_ == "f32[2,2,8,2,8]")
    assert (of_k, of_dk) == (2 * (n - 1), n + 1)


def test_bfloat16_errs_no_more_than_twice_plain_bfloat16():
    arrays, do, dlse = inputs("causal")
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
    do = np.asarray(jnp.asarray(do, jnp.bfloat16), np.float32)
    allowed = oracle.dense(CALLS["causal"].predicate, 2, 4, LENGTH, LENGTH)
    want_o, _, want = oracle.attention(**exact, allowed=allowed, do=do, dlse=0 * dlse, scale=8**-0.5)

    def plain(arrays):
        logits = jnp.einsum("bthd,bshd->bhts", arrays["q"], arrays["k"]) * jnp.bfloat16(8**-0.5)
        weights = jax.nn.softmax(jnp.where(jnp.tri(LENGTH, dtype=bool)[None, None], logits, -1e9), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, arrays["v"])

    plain_o, vjp = jax.vjp(plain, low)
    (plain_grads,) = vjp(jnp.asarray(do, jnp.bfloat16))
    o, _, grads = value_and_vjp(over(ring_mesh(4), order=True), low, Causal(), do, 0 * dlse)
    error = lambda a, b: np.abs(np.asarray(a, np.float64) - b).max()
    assert o.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in grads.values())
    assert 0 < error(o, want_o) <= 2 * error(plain_o, want_o)
    for key in "qkv":
        assert 0 < error(grads[key], want[key]) <= 2 * error(plain_grads[key], want[key])


def test_same_bits_twice():
    one, other = (run("each_row", ring_mesh(4), True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_composes_with_vmap_scan_and_remat():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 1, 16, 2, 4)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(rng.integers(0, 2, (2, 3, 1, 16)), jnp.int32)
    ring = over(ring_mesh(2), order=True)
    reference = lambda arrays, mask: (attention(**arrays, mask=mask, implementation="reference"), None)

    def summed(call, q, k, v):
        one = lambda q, k, v, ids: jnp.sum(jnp.sin(call({"q": q, "k": k, "v": v}, Causal() & Segments(ids))[0]))
        step = jax.checkpoint(lambda total, x: (total + jnp.sum(jax.vmap(one)(*x)), None))
        return lax.scan(step, 0.0, (q, k, v, ids))[0]

    grad = lambda call: quick_jit(jax.value_and_grad(functools.partial(summed, call), (0, 1, 2)))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), grad(ring), grad(reference))


def test_gradients_taken_on_each_device_are_the_same():
    arrays, _, _ = inputs("causal")
    arrays = arrays | {"sinks": np.linspace(-1, 1, 4, dtype=np.float32)}
    specs = {name: P() if name == "sinks" else P("data", "ring") for name in arrays}

    def inside(arrays):
        loss = lambda arrays: jnp.sum(jnp.sin(ring_attention(**arrays, axis_name="ring", **BLOCKS)))
        grads = jax.grad(loss)(arrays)
        return grads | {"sinks": lax.psum(grads["sinks"], ("ring", "data"))}

    inside = jax.shard_map(inside, mesh=ring_mesh(2, data=2), in_specs=(specs,), out_specs=specs, check_vma=False)
    want = jax.grad(lambda arrays: jnp.sum(jnp.sin(attention(**arrays, implementation="reference"))))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, quick_jit(inside)(arrays), quick_jit(want)(arrays))


@pytest.mark.parametrize("outer", [jax.grad, lambda f: lambda q: jax.jvp(f, (q,), (q,))])
def test_second_derivatives_are_refused(outer):
    ring = over(ring_mesh(2))
    slope = jax.grad(lambda q: jnp.sum(jnp.sin(ring({"q": q, "k": q, "v": q}, Causal())[0])))
    with pytest.raises(ValueError, match="ring_attention: no second derivatives; gather the sequence"):
        jax.eval_shape(outer(lambda q: jnp.sum(slope(q) ** 2)), jnp.ones((1, 8, 1, 3)))


X = jnp.ones((2, 12, 4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X[0]}, r"q has shape \(6, 4, 8\), expected \[B, T, H, D\]"),
        ({"k": X[:1], "v": X[:1]}, r"k has B, D = 1, 8, expected q's B, D = 2, 8"),
        ({"v": X[:, :8]}, r"v has B, S, K = \(2, 4, 4\), expected k's \(2, 6, 4\)"),
        ({"q": X[:, :, :3]}, r"H = 3 heads, expected a multiple of k's K = 4"),
        ({"sinks": jnp.ones(3)}, r"sinks has shape \(3,\), expected \[H\] = \(4,\)"),
        ({"scale": jnp.float32(1.0)}, "scale is .*, expected a Python number"),
        ({"soft_cap": 0.0}, "soft_cap = 0.0, expected a positive number"),
        ({"mask": jnp.ones((12, 12), bool)}, r"expected a mask such as Causal\(\)"),
        ({"mask": Segments(jnp.ones((2, 6), jnp.int32))}, r"Segments: q_ids has shape \(2, 6\), .*at least 12"),
        ({"mask": BlockDiffusion(2), "k": X[:, :10], "v": X[:, :10]}, None),
        ({"zigzag": True, "q": X[:, :10]}, r"zigzag=True with T, S = 5, 6 on each device, expected even"),
        ({"axis_name": "sequence"}, "axis_name = 'sequence' is no mesh axis here; call it inside jax.shard_map"),
        ({"check_vma": True}, "check_vma=True, .* pass check_vma=False to shard_map"),
    ],
)
def test_bad_input(change, message):
    arguments = {"q": X, "k": X, "v": X, "axis_name": "ring", "check_vma": False} | change
    checked, q, k, v = (arguments.pop(name) for name in ("check_vma", "q", "k", "v"))
    parts = tuple(P(None, "ring") if x.ndim == 4 else P("ring") for x in (q, k, v))
    f = functools.partial(ring_attention, **arguments)
    f = jax.shard_map(f, mesh=ring_mesh(2), in_specs=parts, out_specs=P(None, "ring"), check_vma=checked)
    if message is None:
        jax.eval_shape(f, q, k, v)
    else:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(f, q, k, v)


def test_outside_of_shard_map():
    with pytest.raises(ValueError, match="axis_name = 'ring' is no mesh axis here; call it inside jax.shard_map"):
        ring_attention(X, X, X, axis_name="ring")


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_compiles_for_tpus(implementation):
    mesh = aot.tpu_mesh("v5e", (4,), ("ring",))
    part = P(None, "ring")
    f = functools.partial(ring_attention, axis_name="ring", zigzag=True, implementation=implementation)
    f = jax.shard_map(f, mesh=mesh, in_specs=(part,) * 3, out_specs=part, check_vma=False)
    sharding = NamedSharding(mesh, part)
    q, k = (jax.ShapeDtypeStruct((1, 2048, h, 128), jnp.bfloat16, sharding=sharding) for h in (2, 1))
    text = aot.compile_for(mesh, f, q, k, k).as_text()
    assert ("attention_forward" in text) == (implementation == "pallas")
    moved = re.findall(COLLECTIVE.replace(r"(\S+)", r"\((\w+\[[\d,]*\]).*?"), text)
    assert moved == [("bf16[1,512,1,128]", "collective-permute")] * 2
