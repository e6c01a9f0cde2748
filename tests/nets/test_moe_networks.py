"""Networks with experts: first dense layers, cached decode, recomputation, the loops, adapters, published sizes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import config as configuration
from jaxrl import loop
from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets import adapters, presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.layers import FeedForward
from jaxrl.nets.linear_attention import LinearConfig
from jaxrl.nets.moe import GATINGS, MoE, MoEConfig, experts
from jaxrl.nets.multi_token import over_rows
from jaxrl.nets.transformer import TransformerConfig, router_statistics, tallies
from jaxrl.nets.weights.configs import to_hugging_face
from jaxrl.posttrain import distill, grpo, kto, online, ppo, preference, reward_model, sft, update
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.score import layout_of, log_probs_of
from jaxrl.types import Labelled, Pairs, Prompts, TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
replace = dataclasses.replace


def draw(*shape, seed=0, std=1.0):
    return np.random.default_rng([seed, *shape]).normal(0, std, shape).astype(np.float32)


DECODER = {"vocab_size": 16, "width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 24, "max_length": 32}
GATING = replace(GATINGS["deepseek_v3"], experts=12, top_k=4, ffn=6, shared=6, groups=4, top_groups=2, first_dense=1)


@functools.cache
def network(gating=GATING, **changes):
    """(config, model, params), kernels spread out."""
    config = TransformerConfig(**(DECODER | changes), experts=gating)
    model = language_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    scale = lambda path, x: jnp.asarray(
        (path[-1].key == "scale") + draw(*x.shape, seed=len(jax.tree_util.keystr(path)), std=0.2), x.dtype
    )
    return config, model, jax.tree.map_with_path(scale, shapes)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 10)), jnp.int32)


def test_the_tree_and_the_first_dense_layers():
    _, _, params = network()
    assert set(params["dense_layers"]) == {"attention_norm", "attention", "ffn_norm", "ffn"}
    assert params["dense_layers"]["ffn"]["up"]["kernel"].shape == (1, 16, 24)
    assert params["layers"]["moe"]["gate"].shape == (2, 12, 16, 6)
    assert params["layers"]["moe"]["bias"].dtype == jnp.float32
    all_dense = jax.eval_shape(network(replace(GATING, first_dense=3))[1].init, jax.random.key(0))
    assert "layers" not in all_dense and all_dense["dense_layers"]["ffn"]["up"]["kernel"].shape == (3, 16, 24)


def test_two_stacks_are_the_same_network_as_one():
    """Experts that are copies of the dense layer, weighted by 1: as if every layer were dense."""
    copies = MoEConfig(3, 2, 24, normalise=True, first_dense=1)
    _, model, params = network(copies)
    plain, whole = language_model(TransformerConfig(**DECODER)), dict(params)
    first, rest = whole.pop("dense_layers"), dict(params["layers"])
    rest.pop("moe")
    ffn = jax.tree.map(lambda a: jnp.concatenate([a, a, a]), first["ffn"])
    moe_params = {name: jnp.repeat(ffn[name]["kernel"][:2, None], 3, axis=1) for name in ("gate", "up", "down")}
    params = params | {"layers": params["layers"] | {"moe": params["layers"]["moe"] | moe_params}}
    whole["layers"] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), {**first, "ffn": None}, {**rest, "ffn": None})
    whole["layers"]["ffn"] = ffn
    want, got = jit(lambda p: plain.apply(p, TOKENS)[0])(whole), jit(lambda p: model.apply(p, TOKENS)[0])(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@functools.cache
def full_forward():
    _, model, params = network()
    return jit(model.apply)(params, TOKENS)[0]


def test_cached_decode_equals_the_full_forward():
    _, model, params = network()
    apply, full = jit(model.apply), full_forward()
    cache, out = model.init_cache(2, 10), []
    for start, end in ((0, 8), (8, 9), (9, 10)):
        hidden, cache = apply(params, TOKENS[:, start:end], cache=cache)
        out.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), full, atol=2e-5)


@functools.cache
def sft_gradient(micro_batches=1, **changes):
    """Loss, metrics and gradient of a row of 6 tokens and one of 10."""
    _, model, params = network(**changes)
    batch = TokenBatch(TOKENS, jnp.ones((2, 10)).at[0, 6:].set(0))
    value = functools.partial(update.value_and_grad, functools.partial(sft.loss, model), micro_batches=micro_batches)
    return jit(value)(params, batch)


def assert_close(got, want):
    """Each leaf within 1e-4 of its largest entry."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(abs(b).max())), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_remat_changes_no_gradient(remat):
    got, want = sft_gradient(layers=2, remat=remat)[2], sft_gradient(layers=2)[2]
    assert_close(got, want)


def test_micro_batches_add_up():
    """Exactly, as balance is counted in rows here; over the whole pass it would be that of each part."""
    whole = sft_gradient(layers=2)[2]
    assert_close(sft_gradient(2, layers=2)[2], whole)
    assert np.any(whole["layers"]["moe"]["bias"])


@pytest.mark.slow
def test_padding_does_not_count():
    """Rows are padded on the right: their loads, like their gradients, are those of the rows without padding."""
    _, model, params = network(layers=2)
    whole = sft_gradient(layers=2)[2]
    alone = [TokenBatch(TOKENS[:1, :6], jnp.ones((1, 6))), TokenBatch(TOKENS[1:], jnp.ones((1, 10)))]
    total = lambda p, batch: sft.loss(model, p, batch)[0].total
    summed = [jit(jax.grad(total))(params, batch) for batch in alone]
    for name in ("bias", "router"):
        got, a, b = (tree["layers"]["moe"][name] for tree in (whole, *summed))
        assert_close(jax.tree.map(lambda g: g * (5 + 9), got), jax.tree.map(jnp.add, a, b))


def test_sft_trains_experts_and_evens_them_out():
    """The loops are what they were; the loss falls, and the bias moves by its rate."""
    config, model, params = network(layers=2)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2, router_bias_rate=0.05))
    recipe = sft.make(sft.SFTConfig(batch=2), model, optimizer)
    data = TokenBatch(TOKENS, jnp.ones((2, 10)))
    state = recipe.init(jax.random.key(0), params)
    run = jit(lambda state: jax.lax.scan(lambda s, _: recipe.step(s, data), state, length=30))
    state, metrics = run(state)
    assert metrics["train/loss"][-1] < 0.5 * metrics["train/loss"][0] and int(state.skipped) == 0
    moved = np.asarray(state.params["layers"]["moe"]["bias"] - params["layers"]["moe"]["bias"])
    np.testing.assert_allclose(moved / 0.05, np.round(moved / 0.05), atol=1e-3)
    assert np.abs(moved).max() > 0.2
    statistics = jit(lambda p: router_statistics(config, p, TOKENS))
    before, after = statistics(params), statistics(state.params)
    assert before.load.shape == (1, 12) and after.max_violation[0] < before.max_violation[0]


@pytest.mark.slow
def test_grpo_trains_experts():
    """Sampler and trainer agree on policy, the reward (even tokens) rises, and the biases move."""
    _, model, params = network(layers=2)
    problems = grpo.Problems(Prompts(TOKENS[:, :4], jnp.array([2, 4])), jnp.zeros(2))
    config = grpo.GRPOConfig(prompts=2, group=8, kl_coef=0.0, sampling=Sampling(max_tokens=8))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    recipe = grpo.make(config, model, optimizer, eos_id=1, pad_id=0)
    even = lambda rollout, _: ((rollout.completions % 2 == 0) * rollout.mask).sum(1) / rollout.lengths
    step = grpo.fused(recipe, even, config)
    (result,) = loop.run(step, recipe.init(jax.random.key(0), params), problems, steps=30, chunk=30)
    np.testing.assert_allclose(result.metrics[0]["policy/ratio_mean"], 1.0, atol=1e-4)
    assert result.metrics[-1]["reward/mean"] > result.metrics[0]["reward/mean"] + 0.2
    assert np.any(result.state.params["layers"]["moe"]["bias"] != params["layers"]["moe"]["bias"])


@pytest.mark.slow
def test_dpo_trains_experts():
    _, model, params = network(layers=2)
    ones = jnp.ones((2, 10)).at[:, :4].set(0)
    pairs = Pairs(TokenBatch(TOKENS, ones), TokenBatch(TOKENS.at[:, 4:].set(TOKENS[::-1, 4:]), ones))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-3))
    recipe = preference.make(preference.DPOConfig(batch=2), model, optimizer)
    data = recipe.reference(params, pairs)
    (result,) = loop.run(recipe.step, recipe.init(jax.random.key(0), params), data, steps=20, chunk=20)
    losses = [row["train/loss"] for row in result.metrics]
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-4)
    assert losses[-1] < 0.5 * losses[0]


def test_adapters_on_the_attention_of_experts():
    _, model, params = network()
    adapter = adapters.lora(adapters.LoRAConfig(rank=2, targets=("q", "v")))
    adapted = adapters.adapt(model, params, adapter)
    own = adapted.init(jax.random.key(0))
    assert set(own) == {"dense_layers", "layers"}
    np.testing.assert_allclose(jit(adapted.apply)(own, TOKENS)[0], full_forward(), rtol=1e-5, atol=1e-6)


# draws of training

NOISY = MoEConfig(4, 2, 6, normalise=True, jitter=0.5, random_second=True)
ROWS = TokenBatch(TOKENS, jnp.ones((2, 10)))


QUIET = replace(NOISY, jitter=0.0, random_second=False)


def test_a_gradient_has_the_noise_of_its_step_and_a_score_has_none():
    """Two micro-batches of one row each: either draws its own."""
    _, model, params = network(NOISY, layers=1)
    _, quiet, _ = network(QUIET, layers=1)
    twice = jax.tree.map(lambda x: x[:1].repeat(2, axis=0), ROWS)

    def loss(model, params, batch):
        value, metrics = sft.loss(model, params, batch)
        return value, {**metrics, "square": value._replace(total=value.total**2 / value.weight)}

    @jit
    def run(numbers):
        of = functools.partial(update.value_and_grad_of, model, loss, params, twice, key=jax.random.key(0))
        losses, metrics, _ = jax.lax.map(lambda n: of(number=n, micro_batches=2), numbers)
        return losses, metrics["square"], *(log_probs_of(m, params, ROWS)[0] for m in (model, quiet))

    losses, squares, *scores = run(jnp.array([0, 0, 1]))
    assert losses[0] == losses[1] != losses[2]
    assert np.all(squares - losses**2 > 1e-6)  # the variance over micro-batches
    np.testing.assert_array_equal(*scores)


def test_models_without_experts_are_given_neither_key_nor_tally():
    """The program is that of a gradient that knows of neither."""
    _, model, params = network(None, layers=1)
    of = functools.partial(update.value_and_grad_of, model, sft.loss, batch=ROWS, key=jax.random.key(0), number=3)
    plain = lambda p: update.value_and_grad(functools.partial(sft.loss, model), p, ROWS)
    text = lambda f: re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(f)(params)))
    assert text(of) == text(plain)


def watched(model):
    """The model, and a list of whether each of its passes had a key."""
    keys = []

    def apply(*args, key=None, **options):
        keys.append(key is not None)
        return model.apply(*args, key=key, **options)

    return model._replace(apply=apply), keys


def test_loops_give_keys_to_gradients_alone():
    optimizer, key = optax.sgd(0.1), jax.random.key(0)
    _, model, params = network(NOISY, layers=1)
    model, keys = watched(model)

    def passes(function, *args):
        keys.clear()
        result = jax.eval_shape(function, *args)
        return result, set(keys)

    recipe = sft.make(sft.SFTConfig(batch=2, micro_batches=2), model, optimizer)
    assert passes(recipe.step, recipe.init(key, params), ROWS)[1] == {True}

    recipe = preference.make(preference.DPOConfig(batch=2), model, optimizer)
    data, had = passes(recipe.reference, params, Pairs(ROWS, ROWS))
    assert had == {False} and passes(recipe.margins, params, data)[1] == {False}
    assert passes(recipe.step, recipe.init(key, params), data)[1] == {True}

    config = grpo.GRPOConfig(prompts=2, group=2, kl_coef=0.1, sampling=Sampling(max_tokens=4))
    recipe = grpo.make(config, model, optimizer, eos_id=1, pad_id=0)
    problems = grpo.Problems(Prompts(TOKENS[:, :4], jnp.array([2, 4])), jnp.zeros(2))
    (state, completions, _), had = passes(recipe.sample, recipe.init(key, params), problems)
    assert had == {False}
    (_, metrics), had = passes(recipe.learn, state, completions, jnp.zeros(4))
    assert had == {True, False} and "router/entropy" in metrics  # the reference has none

    config = online.OnlineConfig(prompts=2, group=2, sampling=Sampling(max_tokens=4))
    recipe = online.make(config, model, optimizer, eos_id=1, pad_id=0)
    (_, metrics), had = passes(recipe.learn, recipe.init(key, params), completions, jnp.zeros(4))
    assert had == {True, False} and "router/entropy" in metrics

    recipe = kto.make(kto.KTOConfig(batch=2), model, optimizer)
    data, had = passes(recipe.reference, params, Labelled(ROWS, jnp.array([True, False])), ROWS)
    assert had == {False}
    (_, metrics), had = passes(recipe.step, recipe.init(key, params), data)
    assert had == {True, False} and "router/entropy" in metrics  # the reference point has none

    recipe = reward_model.make(reward_model.RMConfig(batch=2), model, optimizer)
    (_, metrics), had = passes(recipe.step, recipe.init(key, params), Pairs(ROWS, ROWS))
    assert had == {True} and "router/entropy" in metrics

    config = distill.DistillConfig(prompts=2, group=1, sampling=Sampling(max_tokens=4), on_policy=0)
    recipe = distill.make(config, model, network(None, layers=1)[1], optimizer, eos_id=1, pad_id=0)
    data = distill.Data(problems.prompts, network(None, layers=1)[2], ROWS)
    (_, metrics), had = passes(recipe.step, recipe.init(key, params), data)
    assert had == {True} and "router/entropy" in metrics

    for critic in ("shared", "separate"):
        config = ppo.PPOConfig(prompts=2, group=2, critic=critic, ptx_coef=0.1, ptx_batch=2, sampling=Sampling(4))
        recipe = ppo.make(config, model, optimizer, eos_id=1, pad_id=0)
        (_, metrics), had = passes(recipe.learn, recipe.init(key, params), completions, jnp.zeros(4), ROWS)
        assert had == {True, False} and "router/entropy" in metrics  # neither the reference nor old values have one


def test_adapters_pass_keys_on():
    _, model, params = network(NOISY, layers=1)
    adapted = adapters.adapt(model, params, adapters.lora(adapters.LoRAConfig(rank=2, targets=("q", "v"))))
    own = adapted.init(jax.random.key(0))
    assert adapted.routers == model.routers
    run = jit(lambda key: adapted.apply(own, TOKENS, key=key)[0])
    one, again, other, none = (run(key) for key in (*map(jax.random.key, (0, 0, 1)), None))
    assert jnp.array_equal(one, again) and not jnp.array_equal(one, other)
    np.testing.assert_allclose(none, jit(model.apply)(params, TOKENS)[0], rtol=1e-5, atol=1e-6)


# figures of a run


def router_figures(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("router/")}


def test_metrics_say_how_routers_spread_tokens_and_change_no_gradient():
    """Those of a pass over the same tokens, micro-batches or not; the tokens that count are those of the balance."""
    gating = replace(TIGHT, jitter=0.0, bias=True, score="sigmoid")
    config, model, params = network(gating, layers=2)
    batch = TokenBatch(TOKENS, jnp.ones((2, 10)).at[0, 6:].set(0))
    of = functools.partial(update.value_and_grad_of, model, sft.loss, key=jax.random.key(0), number=0)

    @jit
    def run(params):
        plain = update.value_and_grad(functools.partial(sft.loss, model), params, batch)
        whole, halves = (of(params, batch, micro_batches=n) for n in (1, 2))
        mask, positions = layout_of(model, batch)
        seen = router_statistics(config, params, batch.tokens[:, :-1], mask=mask, positions=positions)
        return plain, whole, halves[1], seen

    plain, whole, halves, seen = run(params)
    jax.tree.map(np.testing.assert_array_equal, (whole[0], whole[2]), (plain[0], plain[2]))
    got = router_figures(whole[1])
    assert set(got) == {"router/max_violation", "router/dropped", "router/entropy"}
    for name, value in got.items():
        np.testing.assert_allclose(value, getattr(seen, name.removeprefix("router/")).mean(), rtol=1e-5)
        np.testing.assert_allclose(halves[name], value, rtol=1e-5)
    assert got["router/dropped"] > 0.2 and got["router/max_violation"] > 0.1


def test_a_shrunk_mixtral_is_watched_in_training():
    """And in any order of kinds of layers every layer with experts has its row of the tally."""
    config = presets.shrunk(presets.mixtral_8x7b(), 16, width=16, layers=2, ffn=24, max_length=32)
    model = language_model(config)
    recipe = sft.make(sft.SFTConfig(batch=2), model, optax.sgd(0.0))
    state = recipe.init(jax.random.key(0), jit(model.init)(jax.random.key(1)))
    (state, metrics), seen = jit(lambda s: (recipe.step(s, ROWS), router_statistics(config, s.params, TOKENS[:, :-1])))(
        state
    )
    for name, value in router_figures(metrics).items():
        np.testing.assert_allclose(value, getattr(seen, name.removeprefix("router/")).mean(), rtol=1e-5)
    assert metrics["router/dropped"] == 0 and 0 < metrics["router/entropy"] <= np.log(8)


def test_every_layer_with_experts_has_its_row_of_a_tally():
    linear = LinearConfig("elu+1")
    config = TransformerConfig(
        **(DECODER | {"layers": 7}), experts=replace(QUIET, first_dense=1), linear=linear, linear_layers=(1, 2, 4, 5)
    )
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    rows = jnp.arange(6.0)[:, None].repeat(6, axis=1)
    leaves = jax.tree.leaves(tallies(shapes, rows))
    assert sorted(row for leaf in leaves for row in np.asarray(leaf[..., 0]).ravel()) == list(range(6))


# layers of other kinds

RELU = replace(QUIET, gated=False, activation="relu")


def test_experts_need_not_be_swiglu():
    """Copies of the dense layer, which is as they are, or is not: its own settings say so. No checkpoint is so."""
    same = replace(RELU, ffn=24, first_dense=1)
    _, _, params = network(same, layers=2, gated=False, activation="relu")
    moe = params["layers"]["moe"]
    assert set(moe) == {"router", "up", "down"} and "gate" not in params["dense_layers"]["ffn"]
    config, _, mixed = network(same, layers=2)
    assert "gate" in mixed["dense_layers"]["ffn"] and "gate" not in mixed["layers"]["moe"]
    dense = {name: {"kernel": moe[name][0, 0]} for name in ("up", "down")}
    copies = moe | {name: jnp.repeat(moe[name][:, :1], 4, axis=1) for name in ("up", "down")}
    x = jnp.asarray(draw(1, 5, 16))
    plain = FeedForward(24, gated=False, activation="relu")
    run = jit(lambda p, d: (MoE(same).apply({"params": p}, x), plain.apply({"params": d}, x)))
    np.testing.assert_allclose(*run(jax.tree.map(lambda a: a[0], copies), dense), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="experts are not SwiGLU layers"):
        to_hugging_face(config)


def test_rows_of_many_calls_are_those_of_one_without_a_gate_too():
    shapes = (3, 1, 2, 16), (3, 1, 2, 2), (4, 16, 6), (4, 6, 16)
    x, weights, up, down = (jnp.asarray(draw(*shape)) for shape in shapes)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 1, 2, 2)), jnp.int32)
    one = lambda f: lambda x, ids, weights: f(x, ids, weights, None, up, down, activation=jax.nn.relu)
    got = jit(jax.vmap(one(over_rows(experts))))(x, ids, weights)
    np.testing.assert_allclose(got, jit(one(experts))(x, ids, weights), rtol=1e-4, atol=1e-5)


# capacity

TIGHT = MoEConfig(4, 2, 6, normalise=True, capacity_factor=0.6)


def test_padding_on_the_left_changes_nothing_under_a_capacity():
    """Nor does what follows the last token to be predicted."""
    config, model, params = network(TIGHT, layers=2)
    left = jnp.pad(TOKENS, ((0, 0), (5, 0)))
    columns = jnp.arange(15)[None]
    where = {"positions": jnp.maximum(columns - 5, 0), "mask": Causal() & Segments((columns >= 5).astype(jnp.int32))}
    where["positions"] = jnp.broadcast_to(where["positions"], left.shape)
    right = TokenBatch(jnp.pad(TOKENS, ((0, 0), (0, 6))), jnp.pad(ROWS.loss_mask, ((0, 0), (0, 6))))

    @jit
    def run(params):
        plain, padded = model.apply(params, TOKENS)[0], model.apply(params, left, **where)[0][:, 5:]
        scores = log_probs_of(model, params, ROWS)[0], log_probs_of(model, params, right)[0][:, :9]
        return (plain, padded), scores, router_statistics(config, params, left, **where).dropped

    both, scores, dropped = run(params)
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)
    assert np.all(dropped > 0.2)


@pytest.mark.parametrize(
    ("loop", "config"),
    [
        (grpo, grpo.GRPOConfig(prompts=2, group=2)),
        (online, online.OnlineConfig(prompts=2, group=2)),
        (ppo, ppo.PPOConfig(prompts=2, group=2)),
    ],
)
def test_reinforcement_learning_refuses_to_drop(loop, config):
    """Unless an expert has room for all tokens, which is no capacity."""
    make = functools.partial(loop.make, config, optimizer=optax.sgd(0.1), eos_id=1, pad_id=0)
    with pytest.raises(ValueError, match="capacity_factor: the sampler"):
        make(network(TIGHT)[1])
    make(language_model(TransformerConfig(**DECODER, experts=replace(TIGHT, capacity_factor=2.0))))


def equations(jaxpr):
    inner = [v for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values())) if hasattr(v, "jaxpr")]
    return len(jaxpr.eqns) + sum(equations(getattr(v, "jaxpr", v)) for v in inner)


def test_the_program_does_not_grow_with_depth():
    sizes = set()
    for layers, first in ((3, 1), (40, 3)):
        model = language_model(
            TransformerConfig(**(DECODER | {"layers": layers}), experts=replace(GATING, first_dense=first))
        )
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        sizes.add(equations(jax.make_jaxpr(jax.grad(lambda p: model.apply(p, TOKENS)[0].sum()))(shapes).jaxpr))  # noqa: B023
    assert len(sizes) == 1


def test_configs_survive_json():
    config = TransformerConfig(**DECODER, experts=GATING)
    assert configuration.from_json(TransformerConfig, configuration.to_json(config)) == config


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameters_of_published_models():
    """Mixtral 8x7B, Qwen1.5-MoE-A2.7B, Qwen3-30B-A3B whole; DeepSeek-V2-Lite with its attention counted by hand."""
    published = {
        46_702_792_704: {"vocab_size": 32000, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14336,
                         "experts": GATINGS["mixtral"]},
        14_315_784_192: {"vocab_size": 151936, "width": 2048, "layers": 24, "heads": 16, "kv_heads": 16, "ffn": 5632,
                         "qkv_bias": True, "experts": GATINGS["qwen_moe"]},
        30_532_122_624: {"vocab_size": 151936, "width": 2048, "layers": 48, "heads": 32, "kv_heads": 4, "head_dim": 128,
                         "qk_norm": True, "ffn": 6144, "experts": GATINGS["qwen3_moe"]},
    }  # fmt: skip
    for number, sizes in published.items():
        assert count(jax.eval_shape(language_model(TransformerConfig(**sizes)).init, jax.random.key(0))) == number
    lite = TransformerConfig(vocab_size=102400, width=2048, layers=27, heads=16, kv_heads=16, ffn=10944,
                             experts=GATINGS["deepseek_v2_lite"])  # fmt: skip
    tree = jax.eval_shape(language_model(lite).init, jax.random.key(0))
    ours = count(tree) - sum(count(tree[stack]["attention"]) for stack in ("dense_layers", "layers"))
    latent = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    assert ours + 27 * latent == 15_706_484_224


def test_more_dense_layers_than_layers():
    with pytest.raises(ValueError, match="first_dense is 4, but there are 3 layers"):
        TransformerConfig(**DECODER, experts=replace(GATING, first_dense=4))
