"""Adapters under SFT: what moves and what does not, micro-batches, devices, resume, memory."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl import checkpoint, loop, parallel
from jaxrl.nets import adapters
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch
from tests.nets import adapter_cases as cases

SPEC = adapters.AdaLoRAConfig(rank=3, target_rank=2, steps=6, warmup=1, final=2, every=1)
KINDS = {
    "lora": lambda: adapters.lora(adapters.LoRAConfig(rank=3)),
    "dora": lambda: adapters.lora(adapters.LoRAConfig(rank=3, magnitude=True)),
    "adalora": lambda: adapters.adalora(SPEC),
    "bottleneck": lambda: adapters.bottleneck(adapters.BottleneckConfig(width=4)),
    "prompt": lambda: adapters.prompt(adapters.PromptConfig(length=2, encoder="mlp", hidden=4)),
    "prefix": lambda: adapters.prefix(adapters.PrefixConfig(length=2)),
}
SGD = optax.sgd(0.3)


def optimizer_of(kind):
    return adapters.allocate(SPEC, optax.adam(3e-2)) if kind == "adalora" else SGD


def ready(kind):
    _, model, base = cases.network()
    adapter = KINDS[kind]()
    return model, base, adapter, adapter.init(jax.random.key(1), model, base)


@functools.cache
def batch():
    draw = np.random.default_rng(1)
    mask = np.arange(7)[None] < draw.integers(3, 8, 8)[:, None]
    return TokenBatch(jnp.asarray(draw.integers(2, 16, (8, 7)), jnp.int32), jnp.asarray(mask, jnp.float32))


def fit(kind, data, *, steps=6, constrain=lambda x: x, base=None, place=lambda x: x, chunk=3, **config):
    """(final state, metrics) of SFT on the whole of `data` with an adapter."""
    model, plain, adapter, params = ready(kind)
    config, optimizer = sft.SFTConfig(batch=8, **config), optimizer_of(kind)
    build = lambda model: sft.make(config, model, optimizer, constrain=constrain)
    state = place(build(model).init(jax.random.key(0), params))
    step = adapters.over_base(lambda model: build(model).step, model, adapter)
    given = adapters.Based(place(plain if base is None else base), data)
    *_, last = rows = list(loop.run(step, state, given, steps=steps, chunk=chunk))
    return last.state, [metrics for row in rows for metrics in row.metrics]


@functools.cache
def fitted(kind):
    """`fit` with nothing special, once for all tests."""
    return fit(kind, batch())


@pytest.mark.parametrize("kind", KINDS)
def test_sft_learns_and_leaves_the_base_alone(kind):
    model, base, _, params = ready(kind)
    before = jax.device_get(base)
    state, metrics = fitted(kind)
    losses = [row["train/loss"] for row in metrics]
    assert losses[-1] < losses[0] - 0.02, losses
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("kind", ["lora"])
def test_micro_batches_and_devices_change_nothing(kind):
    whole, metrics = fitted(kind)
    mesh = parallel.make_mesh("data=2,fsdp=2,tensor=2")
    rules = (*adapters.RULES, *parallel.RULES)
    place = lambda tree: jax.device_put(tree, parallel.state_shardings(tree, mesh, rules=rules))
    for options in (
        {"micro_batches": 4},
        {"constrain": partial(parallel.shard_batch, mesh=mesh), "place": place},
    ):
        state, rows = fit(kind, batch(), **options)
        close = partial(np.testing.assert_allclose, atol=3e-5)
        jax.tree.map(close, jax.device_get(state.params), jax.device_get(whole.params))
        for row, expected in zip(rows, metrics, strict=True):
            np.testing.assert_allclose(row["train/loss"], expected["train/loss"], rtol=1e-5)


def test_rules_place_every_state_and_base():
    """Adam's moments and quantised bases too; a LoRA pair lies as the sides of its kernel."""
    mesh, rules = parallel.make_mesh("data=1,fsdp=4,tensor=2"), (*adapters.RULES, *parallel.RULES)
    _, model, base = cases.network(tie_embeddings=False)
    for kind in (*KINDS, "prefix_mlp", "lstm"):
        more = {
            "prefix_mlp": lambda: adapters.prefix(adapters.PrefixConfig(length=2, hidden=4)),
            "lstm": lambda: adapters.prompt(adapters.PromptConfig(length=2, encoder="lstm", hidden=4)),
        }
        adapter = (KINDS | more)[kind]()
        optimizer = adapters.allocate(SPEC, optax.adam(1e-3)) if kind == "adalora" else optax.adam(1e-3)
        init = sft.make(sft.SFTConfig(), model, optimizer).init
        params = adapter.init(jax.random.key(0), model, base)
        shapes = jax.eval_shape(init, jax.random.key(0), params)
        placed = parallel.state_shardings(shapes, mesh, rules=rules)
        if kind == "lora":
            pair = placed.opt_state[0].mu["layers"]["attention"]["q"]
            assert pair["a"].spec == P("stage", "fsdp", None) and pair["b"].spec == P("stage", None, "tensor")
    for form in ("nf4", "int8"):
        placed = parallel.state_shardings(adapters.quantise_base(base, form=form), mesh, rules=rules)
        kernel = placed["layers"]["ffn"]["down"]["kernel"]
        assert kernel[0].spec == P("stage", "tensor", "fsdp")
        assert placed["embed"]["embedding"].spec == P("tensor", "fsdp")


@pytest.mark.parametrize("kind", ["adalora"])
def test_resume_is_bitwise(kind, tmp_path):
    whole, _ = fitted(kind)
    half, _ = fit(kind, batch(), steps=3)
    checkpoint.save(tmp_path, 3, half)
    model, base, adapter, params = ready(kind)
    optimizer = optimizer_of(kind)
    build = lambda model: sft.make(sft.SFTConfig(batch=8), model, optimizer)
    state, done = checkpoint.restore(tmp_path, jax.eval_shape(build(model).init, jax.random.key(0), params))
    step = adapters.over_base(lambda model: build(model).step, model, adapter)
    (last,) = loop.run(step, state, adapters.Based(base, batch()), steps=6, chunk=3)
    assert done == 3
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), last.state, whole)


def test_over_a_quantised_base_too():
    _, _, base = cases.network()
    _, metrics = fit("lora", batch(), base=adapters.quantise_base(base))
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 0.02


def test_memory_of_a_step():
    """The base is an argument, once; gradient and moments are the adapter's; no merged kernel and no constant."""
    config = TransformerConfig(
        vocab_size=32, width=128, layers=8, heads=2, kv_heads=2, ffn=512, max_length=16, tie_embeddings=True
    )
    model, adapter = language_model(config), adapters.lora(adapters.LoRAConfig(rank=1))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(shapes)) * 4
    data = TokenBatch(jnp.zeros((4, 8), jnp.int32), jnp.ones((4, 8)))
    build = lambda model: sft.make(sft.SFTConfig(batch=4, micro_batches=2), model, optax.adam(1e-3))
    params = jax.eval_shape(lambda key: adapter.init(key, model, shapes), jax.random.key(0))
    state = jax.eval_shape(build(model).init, jax.random.key(0), params)
    step = adapters.over_base(lambda model: build(model).step, model, adapter)
    given = adapters.Based(shapes, jax.eval_shape(lambda: data))
    memory = jax.jit(step, donate_argnums=0).lower(state, given).compile().memory_analysis()
    assert size < memory.argument_size_in_bytes < 1.15 * size
    assert memory.temp_size_in_bytes < 0.35 * size


def test_remat_dots_does_not_keep_the_low_rank_product():
    """Residuals of a gradient: with a pair on `gate` as many numbers as without, but for the rank's own."""
    _, model, base = cases.network(remat="dots")
    adapter = adapters.lora(adapters.LoRAConfig(rank=1, targets=("gate",)))
    params = adapter.init(jax.random.key(0), model, base)
    ids = cases.tokens(2, 8)
    kept = lambda function, *given: sum(x.size for x in jax.tree.leaves(jax.vjp(function, *given)[1]))
    beside = kept(lambda params: adapters.adapt(model, base, adapter).apply(params, ids)[0], params)
    prompt = adapters.prefix(adapters.PrefixConfig(length=1))
    start = prompt.init(jax.random.key(0), model, base)
    without = kept(lambda params: adapters.adapt(model, base, prompt).apply(params, ids)[0], start)
    assert beside < without + 2 * 16 * 24
