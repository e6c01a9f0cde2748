"""Attention for Hopper GPUs: values and gradients on a model of a multiprocessor, and what the compiler says."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxrl.kernels import aot_gpu
from jaxrl.kernels.attention import (
    BlockDiffusion,
    Causal,
    Chunked,
    Dense,
    Full,
    Prefix,
    Segments,
    Tree,
    Window,
    gpu,
    gpu_kernels,
)
from jaxrl.kernels.attention.gpu import mosaic_gpu_attention
from jaxrl.kernels.attention.gpu_kernels import Settings


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hopper, oracle, cases = load("kernels/hopper.py"), load("oracles/attention.py"), load("kernels/cases.py")
Case, SERVED = cases.Case, ("causal", "one_token", "cross", "window", "chunked", "prefix", "packed", "tree", "span")
SERVED += ("empty_segments", "block_diffusion")
SMALL = {name: cases.CASES[name]._replace(h=2, k=1) for name in SERVED}
SMALL["one_token"] = cases.CASES["one_token"]  # with two key heads, of two query heads each
BEFORE = lambda b, h, q, k: k <= q  # noqa: E731
END = np.minimum(np.arange(300) + np.random.default_rng(1).integers(1, 200, (1, 300)), 300).astype(np.int32)
LONG = {
    # more tiles than buffers, of every kind; lengths that are no multiples of 8
    "full": Case(Full(), lambda b, h, q, k: True, b=1, t=131, s=397, h=2, k=1, d=64, dv=64),
    "tree": Case(Tree(END), lambda b, h, q, k: k <= q < END[b, k], b=1, t=300, s=300, h=1, k=1, d=64, dv=64),
    "causal": Case(Causal(), BEFORE, b=1, t=300, s=300, h=2, k=1, d=64, dv=64),
    # gradients of k and of v in kernels of their own
    "mla": Case(Causal(), BEFORE, b=1, t=140, s=140, h=2, k=2, d=192, dv=128),
    "wide": Case(Causal(), BEFORE, b=1, t=40, s=300, q_offset=260, h=1, k=1, d=256, dv=256),
    "capped": Case(Window(90), lambda b, h, q, k: 0 <= q - k < 90, b=1, t=140, s=140, h=2, k=1, d=128, dv=128,
                   soft_cap=0.7),
}  # fmt: skip


def inputs(case, dtype, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    b, t, s, h, k = case.b, case.t, case.s, case.h, case.k
    arrays = {"q": draw(b, t, h, case.d), "k": draw(b, s, k, case.d), "v": draw(b, s, k, case.dv)}
    if case.sinks:
        arrays["sinks"] = draw(h).astype(jnp.float32)
    return arrays, draw(b, t, h, case.dv), draw(b, h, t).astype(jnp.float32)


def scale_of(case):
    return case.d**-0.5 if case.scale is None else case.scale


def call(case, **arrays):
    options = {"mask": case.mask, "q_offset": case.q_offset, "scale": scale_of(case), "soft_cap": case.soft_cap}
    return mosaic_gpu_attention(**arrays, **options)


def with_gradients(case, arrays, do, dlse):
    (o, lse), vjp = jax.vjp(lambda arrays: call(case, **arrays), arrays)
    return o, lse, vjp((do, dlse))[0]


def expected(case, arrays, do, dlse):
    """By the oracle, of the same rounded inputs."""
    allowed = oracle.dense(case.predicate, case.b, case.h, case.t, case.s, case.q_offset)
    options = {"allowed": allowed, "scale": scale_of(case), "soft_cap": case.soft_cap}
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    do, dlse = np.asarray(do, np.float64), np.swapaxes(np.asarray(dlse), 1, 2)
    o, lse, grads = oracle.attention(**arrays, do=do, dlse=dlse, **options)
    return o, np.swapaxes(lse, 1, 2), grads


def on_the_model(f, *args):
    return hopper.run(f, *args)[0]


def check(case, dtype=jnp.float16, tolerance=2e-3, run=on_the_model):
    arrays, do, dlse = inputs(case, dtype)
    o, lse, grads = run(functools.partial(with_gradients, case), arrays, do, dlse)
    want_o, want_lse, want = expected(case, arrays, do, dlse)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    for key, got, value in [("o", o, want_o), *((name, grads[name], want[name]) for name in want)]:
        size = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(got, np.float64), value, rtol=0, atol=tolerance * size, err_msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients(name):
    check(SMALL[name])


@pytest.mark.parametrize("name", LONG)
def test_values_and_gradients_of_many_and_of_wide_tiles(name):
    check(LONG[name])


def test_bfloat16_is_as_good_as_plain_bfloat16():
    case = Case(Causal(), BEFORE, b=1, t=136, s=136, h=2, k=1, d=64, dv=64)
    arrays, do, dlse = inputs(case, jnp.bfloat16)
    arrays = {name: 2 * x for name, x in arrays.items()}

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * scale_of(case)
        logits = jnp.where(jnp.tri(136, dtype=bool)[None, None], logits, -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)

    dlse = jnp.zeros_like(dlse)
    (o, _, grads), _ = hopper.run(functools.partial(with_gradients, case), arrays, do, dlse)
    plain_o, vjp = jax.vjp(lambda arrays: plain(**arrays), arrays)
    plain_grads = vjp(do)[0]
    want_o, _, want = expected(case, arrays, do, dlse)
    ours, plains = {"o": o, **grads}, {"o": plain_o, **plain_grads}
    for name, value in {"o": want_o, **want}.items():
        error, allowed = (np.abs(np.asarray(x[name], np.float64) - value).max() for x in (ours, plains))
        assert error <= 2 * allowed, (name, error, allowed)


def test_every_interleaving_gives_the_same_bits():
    case = Case(Causal(), BEFORE, b=1, t=200, s=200, h=2, k=1, d=64, dv=64)
    arrays, do, dlse = inputs(case, jnp.bfloat16)
    first, *others = (
        hopper.run(functools.partial(with_gradients, case), arrays, do, dlse, seed=n)[0] for n in range(3)
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_tiles_without_a_pair_are_not_visited_and_full_ones_not_masked():
    case = Case(Causal(), BEFORE, b=1, t=512, s=512, h=1, k=1, d=64, dv=64)
    arrays, *_ = inputs(case, jnp.float16)
    _, executed = hopper.run(lambda arrays: call(case, **arrays), arrays)
    assert executed["wgmma_ref"] == 2 * 2 * (4 + 3 + 2 + 1)  # products, warpgroups, tiles of the four blocks
    assert executed["le"] == 2 * 4  # k <= q in each warpgroup's last tile


def test_under_vmap_with_a_mask_for_each():
    case = Case(Causal(), BEFORE, b=1, t=40, s=40, h=2, k=1, d=64, dv=64)
    arrays, *_ = inputs(case._replace(b=2), jnp.float16)
    arrays = {name: x[:, None] for name, x in arrays.items()}
    lengths = jnp.asarray([[7], [30]])

    def one(arrays, lengths):
        return mosaic_gpu_attention(**arrays, mask=Prefix(lengths), scale=0.3)

    got, _ = hopper.run(jax.vmap(one), arrays, lengths)
    for n in range(2):
        want, _ = hopper.run(one, {name: x[n] for name, x in arrays.items()}, lengths[n])
        jax.tree.map(np.testing.assert_array_equal, (got[0][n], got[1][n]), want)


BUGS = {
    "barrier_wait": (lambda *_: None, "nan"),
    "barrier_arrive": (lambda *_: None, "deadlock"),
    "commit_smem": (lambda: None, "not committed"),
    "wait_smem_to_gmem": (lambda *_: None, "never waited for"),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_model_notices(monkeypatch, name):
    case = Case(Full(), lambda b, h, q, k: True, b=1, t=64, s=384, h=1, k=1, d=64, dv=64)
    arrays, *_ = inputs(case, jnp.float16)
    stub, message = BUGS[name]
    monkeypatch.setattr(gpu_kernels.plgpu, name, stub)
    with pytest.raises(Exception, match=message):
        (o, _), _ = hopper.run(lambda arrays: call(case, **arrays), arrays)
        assert not np.isnan(o).any(), "nan"


# The mathematics of a tile.

RNG = np.random.default_rng(2)
CAPPED = Settings(0.3, 2.0, 1, 1, 1, 64, 64, 2)


def test_online_softmax_is_softmax():
    x, values = RNG.normal(size=(3, 96)).astype(np.float32) * 20, RNG.normal(size=(96, 5))
    x[0, :40], x[1] = -np.inf, -np.inf  # a row that sees its first key late, and one that sees none
    m, total, acc = jnp.full(3, -1e30), jnp.zeros(3), np.zeros((3, 5))
    for n in range(0, 96, 32):
        p, decay, m, total = gpu_kernels.softmax_step(jnp.asarray(x[:, n : n + 32]), 0.7, m, total)
        acc = acc * np.asarray(decay)[:, None] + np.asarray(p) @ values[n : n + 32]
    inverse, lse = gpu_kernels.softmax_end(m, total)
    for row in (0, 2):
        logits = np.float64(x[row]) * 0.7 * np.log(2)
        top = logits.max()
        want = top + np.log(np.exp(logits - top).sum())
        np.testing.assert_allclose(lse[row], want, rtol=1e-6)
        np.testing.assert_allclose(acc[row] * inverse[row], np.exp(logits - want) @ values, rtol=1e-4, atol=1e-6)
    assert lse[1] == np.float32(-1e30) and inverse[1] == 0 and not acc[1].any()


def test_weights_and_the_slope_of_the_soft_cap():
    products = RNG.normal(size=(4, 6))
    natural = lambda x: 2.0 * np.tanh(0.3 * x / 2.0)  # noqa: E731
    x, slope = gpu_kernels.bend(jnp.asarray(products, jnp.float32), CAPPED)
    lse = np.full((4, 6), 0.4, np.float32)
    p, w = gpu_kernels.weights(x, slope, jnp.asarray(lse), CAPPED)
    np.testing.assert_allclose(p, np.exp(natural(products) - 0.4 * np.log(2)), rtol=1e-5)
    h = 1e-6
    difference = (natural(products + h) - natural(products - h)) / (2 * h) / 0.3
    np.testing.assert_allclose(w, p * difference, rtol=1e-5)


def test_order_of_the_visit():
    live, full = gpu.tiles.LIVE, gpu.tiles.LIVE | gpu.tiles.FULL
    kinds = jnp.asarray([[[live, 0, full, full], [0, 0, live, 0], [0, 0, 0, 0]]])
    order, counts = gpu.visiting_order(kinds)
    np.testing.assert_array_equal(counts, [[[2, 3], [0, 1], [0, 0]]])
    np.testing.assert_array_equal(order[0, 0, :3], [2, 3, 0])
    np.testing.assert_array_equal(order[0, 1, :1], [2])


# What the door would refuse.

X = jnp.zeros((1, 16, 2, 64), jnp.bfloat16)
REFUSED = {
    "bias": ({"bias": jnp.zeros((1, 1, 16, 16))}, "takes no bias"),
    "scale": ({"scale": -0.5}, "positive scale, not -0.5"),
    "traced": ({"scale": jnp.ones(())}, "scale and soft_cap as Python numbers"),
    "dense": ({"mask": Dense(jnp.ones((1, 1, 16, 16), bool))}, "cannot cut the mask's 'array'"),
    "float32": ({"q": X.astype(jnp.float32)}, "bfloat16 or float16, not float32, bfloat16"),
    "mixed": ({"k": X.astype(jnp.float16)}, "bfloat16 or float16, not bfloat16, float16"),
    "wide": ({"q": jnp.zeros((1, 16, 2, 320), jnp.bfloat16)}, "up to 256, not 320"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, message = REFUSED[name]
    arguments = {"q": X, "k": X, "v": X, "mask": Causal(), "scale": 1.0} | options
    with pytest.raises(ValueError, match=message):
        mosaic_gpu_attention(**arguments)


@pytest.mark.parametrize(("t", "s"), [(0, 16), (16, 0)])
def test_empty(t, s):
    o, lse = mosaic_gpu_attention(X[:, :t], X[:, :s], X[:, :s], mask=Full(), scale=1.0, sinks=jnp.ones(2))
    assert o.shape == (1, t, 2, 64) and not o.any()
    np.testing.assert_array_equal(lse, np.ones((1, 2, t)))


def test_second_derivatives_are_refused():
    f = lambda x: jnp.sum(mosaic_gpu_attention(x, x, x, mask=Causal(), scale=1.0)[0])  # noqa: E731
    with pytest.raises(ValueError, match="no second derivatives"):
        jax.make_jaxpr(jax.jacfwd(jax.grad(lambda x: f(x).astype(jnp.float32))))(X)


# Lowering, which needs no compiler of NVIDIA's, and compiling, which does.

IDS = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
MASKS = {
    "full": lambda ids: Full(),
    "causal": lambda ids: Causal(),
    "packed_window": lambda ids: Window(300) & Segments(ids),
    "prefix": lambda ids: Causal() | Prefix(ids[:, 0]),
    "tree": lambda ids: Tree(ids),
    "chunked": lambda ids: (Causal() & Chunked(100)) | Full(),
    "block_diffusion": lambda ids: BlockDiffusion(16),
}


def loss(mask, q, k, v, ids, **options):
    f = jax.checkpoint(lambda *x: mosaic_gpu_attention(*x, mask=MASKS[mask](ids), scale=0.1, **options)[0])
    return jnp.sum(f(q, k, v).astype(jnp.float32))


def shapes(d=64, dv=None, dtype=jnp.bfloat16, t=1024):
    return [jax.ShapeDtypeStruct((2, t, h, n), dtype) for h, n in ((4, d), (2, d), (2, dv or d))]


@pytest.mark.parametrize("mask", MASKS)
def test_lowers_for_cuda(mask):
    f = jax.jit(jax.grad(functools.partial(loss, mask), (0, 1, 2)))
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(f, platforms=["cuda"], disabled_checks=unchecked)(*shapes(), IDS)
    assert exported.mlir_module().count("custom_call @mosaic_gpu_v2") == 3  # forward, dq, dk and dv


@pytest.mark.parametrize("check_vma", [True, False])
def test_lowers_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    specs = {"mesh": mesh, "in_specs": rows, "out_specs": rows, "check_vma": check_vma}
    f = jax.shard_map(jax.grad(functools.partial(loss, "packed_window"), (0, 1, 2)), **specs)
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(f), platforms=["cuda"], disabled_checks=unchecked)(*shapes(), IDS)
    assert exported.mlir_module().count("custom_call @mosaic_gpu_v2") == 3


COMPILED = {
    "full": ("full", shapes(128), {}),
    "causal": ("causal", shapes(128), {}),
    "packed_window": ("packed_window", shapes(128), {}),
    "tree_64_f16": ("tree", shapes(64, dtype=jnp.float16), {}),
    "odd_length": ("causal", shapes(64, t=1001), {}),
    "soft_cap": ("causal", shapes(128), {"soft_cap": 30.0}),
    "mla": ("causal", shapes(192, 128), {}),
    "wide": ("causal", shapes(256), {}),
}


def attention_kernels(name):
    reason = aot_gpu.missing()
    if reason:
        pytest.skip(reason)
    mask, arrays, options = COMPILED[name]
    f = jax.value_and_grad(functools.partial(loss, mask, **options), (0, 1, 2))
    _, kernels = aot_gpu.compile_kernels(aot_gpu.gpu_mesh(), f, *arrays, IDS)
    kernels = {kernel.name: kernel for kernel in kernels if kernel.name.startswith("attention")}
    for kernel in kernels.values():
        assert kernel.warnings == () and kernel.products > 0 and kernel.copies > 0, kernel
        assert kernel.shared <= aot_gpu.SHARED_PER_BLOCK and kernel.blocks_per_core >= 1, kernel
    return kernels


@pytest.mark.parametrize("name", sorted(COMPILED.keys() - {"wide"}))
def test_compiles_for_h100_without_spills(name):
    kernels = attention_kernels(name)
    split = name in ("soft_cap", "mla")
    assert set(kernels) == {f"attention_{x}" for x in ("forward", "dq", *(("dk", "dv") if split else ("dkv",)))}
    for kernel in kernels.values():
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel


def test_heads_of_256_spill_a_little_backward():
    spilled = {name: kernel.spill_stores for name, kernel in attention_kernels("wide").items()}
    assert spilled["attention_forward"] == spilled["attention_dv"] == 0
    assert max(spilled["attention_dq"], spilled["attention_dk"]) < 300  # bytes


def test_what_the_assembler_says(tmp_path):
    body = ".maxntid 384, 1, 1\n{\nwgmma.mma_async a;\nwgmma.mma_async b;\ncp.async.bulk.tensor.2d c;\n}"
    (tmp_path / "k.ptx").write_text(f".visible .entry k_mosaic_gpu_kernel(\n.param .u64 x\n)\n{body}\n")
    (tmp_path / "k.mlir-passes.log").write_text("threads(%a) in (%c384) dynamic_shared_memory_size %c168024_i32 {")
    (tmp_path / "k.ptxas").write_text(
        "ptxas info    : (C7511) Potential Performance Loss: wgmma\n"
        "ptxas info    : Compiling entry function 'k_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem\n"
    )
    (kernel,) = aot_gpu._read(tmp_path / "k.ptx")
    assert kernel == ("k", 168, 28, 24, 168024, 384, 2, 1, ("C7511) Potential Performance Loss: wgmma",))
    assert kernel.blocks_per_core == 1  # by registers, and by shared memory
    assert kernel._replace(registers=32, threads=256, shared=20000).blocks_per_core == 8  # by threads
    assert kernel._replace(registers=32, threads=128, shared=100000).blocks_per_core == 2  # by shared memory


def test_the_absent_compiler_is_named(monkeypatch):
    monkeypatch.setattr(aot_gpu, "_path", lambda module: None)
    with pytest.raises(ImportError, match="pip install 'jaxrl\\[aot\\]'"):
        aot_gpu.gpu_mesh()
