"""Experts on meshes: the values and gradients of one device, whatever is divided."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import parallel
from jaxrl.kernels import aot
from jaxrl.nets import moe
from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel.experts import experts_on
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
slow = lambda spec: pytest.param(spec, marks=pytest.mark.slow)
B, T, D, E, K, F = 8, 4, 8, 8, 2, 6


def mesh_of(spec):
    """A mesh of as many devices as the text says."""
    count = int(np.prod([int(part.split("=")[1]) for part in spec.split(",")]))
    return parallel.make_mesh(spec, devices=jax.devices()[:count])


@functools.cache
def inputs():
    """x, weights, matrices and ids, some of which are no expert."""
    draw = np.random.default_rng(0)
    shapes = (B, T, D), (B, T, K), (E, D, F), (E, D, F), (E, F, D)
    arrays = [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]
    return *arrays, jnp.asarray(draw.integers(0, E + 1, (B, T, K)), jnp.int32)


def value_and_gradients(f, rows=B, length=T):
    x, weights, *matrices, ids = inputs()
    x, weights, ids = (a[:rows, :length] for a in (x, weights, ids))

    @jit
    def run(x, weights, *matrices):
        loss = lambda *arrays: jnp.sum(jnp.sin(f(arrays[0], ids, *arrays[1:])))
        return f(x, ids, weights, *matrices), jax.grad(loss, (0, 1, 2, 3, 4))(x, weights, *matrices)

    return run(x, weights, *matrices)


@functools.cache
def one_device(rows=B, length=T):
    return value_and_gradients(moe.experts, rows, length)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(b).max())), got, want)


FAST = ["expert=4", "data=2,expert=2,tensor=2", "fsdp=2,expert=2,context=2"]
SLOW = ["expert=2", "expert=8", "data=8", "tensor=2", "context=4,expert=2", "data=2,fsdp=2,expert=2"]


@pytest.mark.parametrize("spec", [*FAST, *map(slow, SLOW)])
def test_experts_equal_those_of_one_device(spec):
    close(value_and_gradients(experts_on(mesh_of(spec))), one_device())


@pytest.mark.parametrize("spec", ["expert=2,tensor=2", slow("data=2,expert=4")])
def test_experts_without_a_gate(spec):
    x, weights, _, up, down, ids = inputs()
    run = lambda f: jit(lambda *a: f(a[0], ids, a[1], None, *a[2:], activation=jax.nn.relu))(x, weights, up, down)
    close(run(experts_on(mesh_of(spec))), run(moe.experts))


@pytest.mark.parametrize(
    ("spec", "rows", "length"),
    [("expert=2,tensor=2", 1, 4), ("data=2,expert=2,context=2", 8, 1), *[
        pytest.param(*case, marks=pytest.mark.slow) for case in [("data=2,expert=4", 2, 1), ("expert=4", 1, 3)]
    ]],
)  # fmt: skip
def test_few_rows_stay_where_they_are(spec, rows, length):
    """Rows that `expert` does not divide, and single tokens on a mesh that divides sequences."""
    close(value_and_gradients(experts_on(mesh_of(spec)), rows, length), one_device(rows, length))


def test_bfloat16_is_summed_in_float32_over_devices():
    """Over tensor and expert: no more than one rounding apart from one device."""
    x, weights, *matrices, ids = inputs()
    x, matrices = x.astype(jnp.bfloat16), [w.astype(jnp.bfloat16) for w in matrices]
    run = lambda f: jit(f)(x[:1], ids[:1], weights[:1], *matrices)
    got, want = run(experts_on(mesh_of("expert=4,tensor=2"))), run(moe.experts)
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got - want, np.float32))
    np.testing.assert_array_less(error, 2.0**-6 * np.abs(np.asarray(want, np.float32)).max())


@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
@pytest.mark.parametrize("stages", [1, 2])
def test_tpus_send_only_the_rows_there_are(stages):
    """Compiled for four v5e chips, both passes; in a pipeline under its map over stages, too."""
    sizes = [{"stage": stages, "expert": 4 // stages}.get(axis, 1) for axis in parallel.AXES]
    mesh = aot.tpu_mesh("v5e", sizes, parallel.AXES)
    form = experts_on(mesh)
    shapes = (8, 64, 128), (8, 64, 2), (8, 64, 2), (8, 128, 256), (8, 128, 256), (8, 256, 128)
    dtypes = "bfloat16", "int32", "float32", *["bfloat16"] * 3
    if stages > 1:
        form = jax.vmap(form, spmd_axis_name="stage")
        shapes = [(stages, *shape) for shape in shapes]
    given = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    loss = lambda *arrays: jnp.sum(form(*arrays).astype(jnp.float32))
    text = aot.compile_for(mesh, jax.value_and_grad(loss, (0, 2, 3, 4, 5)), *given).as_text()
    assert len(re.findall(r"= \S+ ragged-all-to-all", text)) == 4


# networks


GATING = MoEConfig(
    8, 2, 8, shared=8, score="sigmoid", normalise=True, scale=2.5, groups=4, top_groups=2, group_score=2, bias=True,
    sequence_coef=0.1, z_coef=0.01,
)  # fmt: skip
CONFIG = TransformerConfig(
    vocab_size=16, width=16, layers=2, heads=4, kv_heads=4, ffn=24, max_length=32, experts=GATING, remat="none"
)


@functools.cache
def alone(config=CONFIG):
    model = language_model(config)
    return model, jax.tree.map(lambda p: 8 * p, jit(model.init)(jax.random.key(0)))


@functools.cache
def batch():
    tokens = jax.random.randint(jax.random.key(1), (8, 13), 0, 16)
    return TokenBatch(tokens, jnp.ones((8, 13)).at[:4, 7:].set(0))


def gradient_of(model, config=CONFIG, place=lambda tree: tree):
    value = functools.partial(update.value_and_grad_of, model, sft.loss, key=jax.random.key(0), number=0)
    return jax.device_get(jit(value)(place(alone(config)[1]), batch()))


@functools.cache
def expected(config=CONFIG):
    return gradient_of(alone(config)[0], config)


def on(spec, config=CONFIG, **options):
    mesh = mesh_of(spec)
    place = lambda tree: jax.device_put(tree, parallel.state_shardings(tree, mesh))
    return parallel.model_on(config, mesh, **options), place


MESHES = ["fsdp=2,expert=2,tensor=2"]
MORE = ["expert=8", "data=2,expert=4", "expert=2,context=2,tensor=2", "stage=2,expert=2,tensor=2", "tensor=4,fsdp=2"]


@pytest.mark.parametrize("spec", [*MESHES, *map(slow, MORE)])
def test_supervised_gradients_are_those_of_one_device(spec):
    """Auxiliary losses, the load in the place of the bias's gradient and router figures; rows of 12, half padded."""
    model, place = on(spec)
    got, want = gradient_of(model, place=place), expected()
    close(got, want)
    bias = want[2]["layers"]["moe"]["bias"]
    assert np.any(bias) and not np.any(np.sign(got[2]["layers"]["moe"]["bias"]) != np.sign(bias))


@pytest.mark.slow
def test_balance_over_the_whole_pass_on_a_mesh():
    """f and P are means over all devices, with first layers that are dense."""
    gating = dataclasses.replace(GATING, aux_coef=0.3, first_dense=1, bias=False)
    config = dataclasses.replace(CONFIG, experts=gating)
    model, place = on("data=2,expert=2,tensor=2", config)
    close(gradient_of(model, config, place), expected(config))


@pytest.mark.slow
def test_decoding_on_a_mesh():
    model, place = on("data=2,expert=2,context=2")
    tokens, params = batch().tokens[:, :9], alone()[1]

    def steps(model, params):
        cache = model.init_cache(8, 9)
        first, cache = model.apply(params, tokens[:, :8], cache=cache)
        last, _ = model.apply(params, tokens[:, 8:], cache=cache)
        return jnp.concatenate([first, last], axis=1)

    got = jit(functools.partial(steps, model))(place(params))
    np.testing.assert_allclose(got, jit(alone()[0].apply)(params, tokens)[0], atol=2e-5)


def test_every_parameter_of_experts_has_a_rule():
    gating = dataclasses.replace(GATING, shared_gate=True, first_dense=1)
    config = dataclasses.replace(CONFIG, experts=gating, layers=3)
    tree = jax.eval_shape(language_model(config).init, jax.random.key(0))
    mesh = parallel.make_mesh("fsdp=2,expert=2,tensor=2")
    spec = jax.tree.map(lambda s: tuple(s.spec), parallel.state_shardings(tree, mesh))
    at = spec["layers"]["moe"]
    assert at["gate"] == at["up"] == ("stage", "expert", "fsdp", "tensor")
    assert at["down"] == ("stage", "expert", "tensor", "fsdp")
    assert at["router"]["kernel"] == at["shared_gate"]["kernel"] == ("stage", "fsdp", None)
    assert at["bias"] == ("stage", None)
    assert at["shared"]["up"]["kernel"] == spec["dense_layers"]["ffn"]["up"]["kernel"] == ("stage", "fsdp", "tensor")
    assert "expert, fsdp, tensor" in parallel.report(tree, mesh)


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (
            "expert=8",
            {"experts": 12},
            "experts.experts is 12 and does not divide over the 8 devices of mesh axis 'expert'",
        ),
        ("tensor=4", {"ffn": 6}, "experts.ffn is 6 and does not divide over the 4 devices of mesh axis 'tensor'"),
        ("tensor=4", {"shared": 6}, "experts.shared is 6 and does not divide"),
        ("stage=2", {"first_dense": 1}, "the first 1 layers are dense, and stages must be alike"),
        ("context=2", {"capacity_factor": 1.0}, "the mesh axis 'context' changes their order"),
    ],
)
def test_what_a_mesh_cannot_serve(spec, changes, message):
    with pytest.raises(ValueError, match=message):
        on(spec, dataclasses.replace(CONFIG, experts=dataclasses.replace(GATING, **changes)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=2,expert=2", "stage=2,data=2"])
def test_routers_draw_on_meshes(spec):
    """What they draw on one device; stages draw each its own."""
    config = dataclasses.replace(CONFIG, experts=MoEConfig(4, 2, 8, normalise=True, jitter=0.5))
    model, mesh = language_model(config), mesh_of(spec)
    params, tokens = jit(model.init)(jax.random.key(0)), jnp.arange(32).reshape(4, 8) % 16
    run = lambda model, key: jit(lambda p: model.apply(p, tokens, key=key)[0])(params)
    on_mesh = parallel.model_on(config, mesh)
    got, plain = run(on_mesh, jax.random.key(1)), run(model, None)
    assert not np.allclose(got, plain, atol=1e-4)
    if "stage" in spec:
        close(run(on_mesh, None), plain)
    else:
        close(got, run(model, jax.random.key(1)))
