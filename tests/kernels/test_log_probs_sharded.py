"""The vocabulary spread over devices equals the vocabulary on one, values and gradients."""

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

from jaxrl.kernels.log_probs import token_log_probs

path = pathlib.Path(__file__).parents[1] / "oracles" / "log_probs.py"
spec = importlib.util.spec_from_file_location("log_probs_oracle_for_shards", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)

B, T, D, V = 2, 9, 5, 48
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
COTANGENTS = RNG.normal(size=(3, B, T)).astype(np.float32)
TEMPERATURE = np.float32(1.3)


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, ("data", "model"))


def sharded(mesh, implementation, soft_cap=None, check_vma=True):
    """The call over a mesh: batch over "data", vocabulary over "model"."""
    rows, columns = P("data"), P(None, "model")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, columns, rows, P()),
        out_specs=(rows, rows, rows),
        check_vma=check_vma,
    )
    def run(h, w, y, t):
        options = {"temperature": t, "soft_cap": soft_cap, "axis_name": "model", "implementation": implementation}
        return token_log_probs(h, w, y, return_lse=True, **options)

    return run


def value_and_vjp(f, targets=TARGETS):
    @jit
    def run(h, w, t):
        out, vjp = jax.vjp(lambda h, w, t: f(h, w, targets, t), h, w, t)
        return out, vjp(tuple(COTANGENTS))

    return run(HIDDEN, UNEMBEDDING, TEMPERATURE)


def check(out, grads, soft_cap=None):
    options = {"temperature": TEMPERATURE, "soft_cap": soft_cap}
    for a, b in zip(out, oracle.token_log_probs(HIDDEN, UNEMBEDDING, TARGETS, **options, return_lse=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    *want, each = oracle.gradients(HIDDEN, UNEMBEDDING, TARGETS, COTANGENTS, **options)
    for a, b in zip(grads, (*want, each.sum()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4)])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_one_device(implementation, sizes):
    soft_cap = 2.0 if sizes == (2, 2) else None
    check(*value_and_vjp(sharded(mesh_of(*sizes), implementation, soft_cap)), soft_cap)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_equals_one_device_where_types_do_not_track_axes(implementation):
    check(*value_and_vjp(sharded(mesh_of(2, 4), implementation, check_vma=False)))


def test_the_kernel_is_refused_where_types_track_axes_and_it_is_interpreted():
    with pytest.raises(ValueError, match="check_vma=False"):
        value_and_vjp(sharded(mesh_of(1, 2), "pallas"))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_taken_inside(implementation):
    """With check_vma=True, what is the same on all devices of an axis has its gradient summed over it."""
    mesh = mesh_of(2, 4)

    @jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("data"), P("data"), P()),
        out_specs=(P("data"), P(None, "model"), P()),
    )
    def grads(h, w, y, ct, t):
        def loss(h, w, t):
            out = token_log_probs(
                h, w, y, temperature=t, axis_name="model", implementation=implementation, return_lse=True
            )
            return sum(jnp.sum(a * ct[:, n]) for n, a in enumerate(out))

        return jax.grad(lambda *x: jax.lax.psum(loss(*x), "data"), (0, 1, 2))(h, w, t)

    got = grads(HIDDEN, UNEMBEDDING, TARGETS, np.moveaxis(COTANGENTS, 0, 1), TEMPERATURE)
    *want, each = oracle.gradients(HIDDEN, UNEMBEDDING, TARGETS, COTANGENTS, temperature=TEMPERATURE)
    for a, b in zip(got, (*want, each.sum()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_two_axes_together():
    mesh = mesh_of(2, 4)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(None, ("data", "model")), P(), P()), out_specs=(P(), P(), P())
    )
    def run(h, w, y, t):
        options = {"axis_name": ("data", "model"), "implementation": "xla", "return_lse": True}
        return token_log_probs(h, w, y, temperature=t, **options)

    check(*value_and_vjp(run))


def test_ids_from_the_end_and_ids_outside():
    targets = np.full((B, T), 3, np.int32)
    targets[0, :4] = -1, V - 1, V, -V - 1
    out = jit(sharded(mesh_of(1, 4), "xla"))(HIDDEN[:, :1].repeat(T, 1), UNEMBEDDING, targets, TEMPERATURE)
    log_probs = np.asarray(out[0][0])
    assert log_probs[0] == log_probs[1] and np.isnan(log_probs[2:4]).all() and np.isfinite(log_probs[4:]).all()
    assert np.isfinite(out[1]).all()


def test_a_shard_without_weight_does_no_harm():
    """Logits of one shard that underflow to no probability leave no NaN behind."""
    w = UNEMBEDDING.copy()
    w[:, : V // 2] = -1e4 * np.sign(HIDDEN[0, 0])[:, None]
    h = np.broadcast_to(HIDDEN[:1, :1], HIDDEN.shape)
    y = np.full((B, T), V - 1, np.int32)

    @jit
    def run(h, w):
        f = lambda h, w: sharded(mesh_of(1, 4), "xla")(h, w, y, np.float32(1.0))
        out, vjp = jax.vjp(f, h, w)
        return out, vjp(tuple(COTANGENTS))

    out, grads = run(h, w)
    want = oracle.token_log_probs(h, w, y, return_lse=True)
    for a, b in zip(out, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    assert all(np.isfinite(x).all() for x in grads)


def test_only_what_belongs_to_tokens_is_sent():
    """Arrays [B, T], and the gradient of the hidden states [B, T, D]."""
    run = sharded(mesh_of(1, 8), "xla")

    def both(h, w, t):
        return jax.vjp(lambda h, w, t: run(h, w, TARGETS, t), h, w, t)[1](tuple(COTANGENTS))

    text = jit(both).lower(HIDDEN, UNEMBEDDING, TEMPERATURE).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"))
    results = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    shapes = [shape for result in results for shape in re.findall(r"f32\[([\d,]*)\]", result)]
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    assert sizes and max(sizes) == B * T * D
