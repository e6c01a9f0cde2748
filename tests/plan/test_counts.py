"""What is counted from sizes alone, against published figures, the model's own shapes, XLA's count and sums by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import parallel
from jaxrl.losses import reduce
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.plan import chips, command, memory, report, search, sizes, traffic, work
from jaxrl.plan.options import MODELS
from jaxrl.posttrain import update

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama2-7b": 6_738_415_616,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-7b": 6_910_365_696,
    "deepseek-67b": 67_425_001_472,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "moonlight-16b-a3b": 15_960_110_208,
    "minimax-text-01": 456_089_655_296,
}
"""Parameters as the models' checkpoints hold them, a tied embedding once."""

SMALL = TransformerConfig(vocab_size=96, width=64, layers=4, heads=8, kv_heads=4, ffn=160, max_length=512)


MIXTURE = dataclasses.replace(
    SMALL,
    kv_heads=8,
    latent=LatentConfig(kv_rank=32, nope=12, rope=4, value=8, q_rank=48),
    experts=MoEConfig(8, 2, 32, shared=64, first_dense=1, score="sigmoid", normalise=True, bias=True),
)


def axes(**given):
    """All axes of a mesh."""
    return {axis: given.get(axis, 1) for axis in parallel.AXES}


def a_work(task="sft", batch=16, length=65, config=SMALL, mesh=None, **changes):
    return work.Work(config, task, batch, length, axes(**(mesh or {})), **changes)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_ones_and_the_models_own(name):
    config = getattr(presets, MODELS[name])()
    counted = sum(sizes.parameters(config).values())
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    assert counted == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert counted == PUBLISHED.get(name, counted)


@pytest.mark.parametrize(
    "options", [{}, {"vocab_size": 97}, {"tie_embeddings": True, "qk_norm": True}, {"qkv_bias": True, "head_dim": 24}]
)
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"stage": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_a_device_holds_is_what_the_rules_say(options, mesh, zero):
    config = dataclasses.replace(SMALL, **options)
    spec = ",".join(f"{axis}={n}" for axis, n in mesh.items())
    optimizer = update.make_optimizer(update.OptimizerConfig())
    params = jax.eval_shape(language_model(config).init, jax.random.key(0))
    state = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    places = parallel.state_shardings(state, parallel.make_mesh(spec), zero=zero)
    own = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)) if x.ndim else 0, state, places)
    held = memory.held(a_work(config=config, mesh=mesh, zero=zero))
    assert held["parameters"] == 4 * sum(jax.tree.leaves(own["params"]))
    assert held["optimizer"] == 4 * sum(jax.tree.leaves(own["opt_state"]))


@pytest.mark.parametrize("mesh", [{"expert": 4, "tensor": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}])
def test_what_a_device_holds_of_a_mixture(mesh):
    test_what_a_device_holds_is_what_the_rules_say(
        {name: getattr(MIXTURE, name) for name in ("kv_heads", "latent", "experts")}, mesh, 3
    )


def test_a_token_of_deepseek_v3_meets_37b_of_671b():
    """arXiv:2412.19437, section 1, counts the embedding and the head in."""
    config = presets.deepseek_v3()
    assert sizes.layer_matrices(config, active=True) + 2 * sizes.table_entries(config, axes()) == pytest.approx(
        37e9, rel=0.02
    )
    lite = presets.deepseek_v2_lite()  # 15.7B and 2.4B (arXiv:2405.04434, appendix B)
    assert sizes.layer_matrices(lite, active=True) + sizes.table_entries(lite, axes()) == pytest.approx(2.4e9, rel=0.03)


def test_experts_and_latents_by_hand():
    """Two tokens' rows go to other devices of the axis, and a token's cache is its latent and its rotated key."""
    one = a_work(config=MIXTURE, mesh={"expert": 4})
    sent = [x for x in traffic.train_traffic(one) if x.axes == ("expert",) and x.kind == "all-to-all"]
    stream = 16 / 4 * 64 * 64 * 4
    assert [x.bytes for x in sent] == [3 * 6 * 2 * stream * 3 / 4]  # 3 layers; there and back, backward, again
    cache = memory.cache_bytes(a_work("grpo", config=MIXTURE, completion=32, group=4))
    assert cache == 4 * 16 * (32 + 4) * 65 * 4
    dense = dataclasses.replace(SMALL, kv_heads=8)
    scores = lambda c, width: 2 * 16 * work.pairs(c, 64) * width
    assert work.train_flops(one)["attention"] / 4.5 == scores(MIXTURE, 8 * (16 + 8))
    assert work.train_flops(a_work(config=dense))["attention"] / 4.5 == scores(dense, 8 * (8 + 8))


def test_the_largest_layer_of_a_period():
    minimax = presets.minimax_text_01()
    one, mean = sizes.one_layer(minimax, axes()), sizes.layer_matrices(minimax) / minimax.layers
    assert mean < one < 1.02 * mean  # both kinds have 32 experts of the same width


def test_linear_layers_cost_the_same_at_any_length():
    config = presets.linear_transformer(96, 64, 4, heads=4, kv_heads=4)
    short, long = (a_work("grpo", config=config, length=n, completion=32, group=4) for n in (65, 1025))
    assert work.pairs(config, 64) == 0
    assert memory.cache_bytes(short) == memory.cache_bytes(long) == 4 * 4 * 16 * 4 * 16 * 17  # L rows H D (Dv + 1)
    each = lambda one: work.train_flops(one)["attention"] / (one.length - 1)
    assert each(short) == each(long) == 4.5 * 16 * 4 * 4 * (4 * 16 * 17 + 128 * (16 + 17))


def test_a_pipeline_computes_on_empty_places():
    assert work.empty_places(a_work()) == 1.0
    assert work.empty_places(a_work(mesh={"stage": 4})) == (16 + 3) / 16  # 16 rows, one at a time
    place = chips.topology("v5e:2x2")
    llama = presets.llama31_8b(dtype="bfloat16")
    alone = traffic.phases(a_work(batch=4, length=2049, config=llama, mesh={"fsdp": 4}), place)["train"].compute
    staged = traffic.phases(a_work(batch=4, length=2049, config=llama, mesh={"stage": 4}), place)["train"].compute
    assert 1.5 < staged / alone < 1.75  # four rows in four micro-batches: 7 / 4, but for the head


@pytest.mark.parametrize(("window", "layers"), [(None, None), (5, None), (5, (1, 2)), (99, None)])
def test_pairs_are_those_that_the_mask_allows(window, layers):
    config = dataclasses.replace(SMALL, window=window, window_layers=layers)
    total = 0
    for layer in range(config.layers):
        near = window if layers is None or layer in layers else None
        total += sum(1 for q in range(17) for k in range(17) if k <= q and (near is None or q - k < near))
    assert work.pairs(config, 17) == total
    assert work.pairs(config, 17, causal=False) == config.layers * 17 * 17


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_flops_are_those_of_the_unrolled_step(remat):
    """XLA counts everything, products and the rest: a few per cent more at this size."""
    config = dataclasses.replace(SMALL, remat=remat, unroll=SMALL.layers, attention="reference")
    model = language_model(config)
    one = a_work(batch=2, length=129, config=config)

    def loss(params, tokens):
        hidden, _ = model.apply(params, tokens[:, :-1])
        log_probs, _ = model.log_probs(hidden, model.unembedding(params), tokens[:, 1:])
        return reduce.tokens(-log_probs, jnp.ones_like(log_probs)).mean

    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 129), jnp.int32)
    # "recompute" must not be merged with the first computation by the compiler, so it is counted before it
    counted = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()
    assert counted is not None
    products = sum(work.train_flops(one, dense=True).values())
    assert products < counted["flops"] < 1.15 * products


def test_flops_of_the_tasks():
    sft = work.train_flops(a_work())
    dpo = work.train_flops(a_work("dpo"))
    assert {name: 2 * flops for name, flops in sft.items()} == dpo  # two rows a pair
    grpo = work.train_flops(a_work("grpo", completion=32, group=4, reference=True))
    assert grpo["layers"] == sft["layers"] and grpo["unembed"] == sft["unembed"] * 32 / 64
    needed = work.model_flops(a_work())
    full = dataclasses.replace(SMALL, remat="full")
    assert needed == work.model_flops(a_work(config=full)) < sum(work.train_flops(a_work(config=full)).values())
    parts = 6 * sizes.layer_matrices(SMALL) + 6 * SMALL.width * SMALL.vocab_size
    attention = 12 * 16 * work.pairs(SMALL, 64) * SMALL.heads * SMALL.head_size
    assert needed == pytest.approx(16 * 64 * parts + attention)


def test_the_cache_is_the_samplers():
    one = a_work("grpo", completion=32, group=4, mesh={"fsdp": 2, "context": 2, "tensor": 2})
    for kind in (None, "float32", "bfloat16", "int8"):
        config = dataclasses.replace(SMALL, cache_dtype=kind)
        cache = jax.eval_shape(lambda config=config: language_model(config).init_cache(16, 65))
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
        assert memory.cache_bytes(dataclasses.replace(one, config=config)) == whole / 8


def test_more_of_anything_takes_more_memory():
    base = a_work("grpo", completion=32, group=4, mesh={"fsdp": 4, "tensor": 2}, batch=64)
    for changes in ({"batch": 128}, {"length": 129}, {"reference": True}, {"zero": 2}):
        assert memory.peak(dataclasses.replace(base, **changes)) > memory.peak(base), changes
    for changes in ({"micro_batches": 4}, {"optimizer": "int8"}):
        assert memory.peak(dataclasses.replace(base, **changes)) < memory.peak(base), changes
    by_remat = [memory.peak(dataclasses.replace(base, config=dataclasses.replace(SMALL, remat=remat)))
                for remat in ("none", "dots", "full")]  # fmt: skip
    assert by_remat == sorted(by_remat, reverse=True) and len(set(by_remat)) == 3


def test_the_largest_batch_fits_and_the_next_does_not():
    one = a_work("grpo", completion=32, group=6, mesh={"fsdp": 4, "tensor": 2}, micro_batches=2, batch=24)
    limit = 3 * memory.peak(one)
    best = memory.largest_batch(one, limit)
    step = math.lcm(4 * 2, 6)
    assert best % step == 0 and best > 24
    assert memory.peak(dataclasses.replace(one, batch=best)) <= limit
    assert memory.peak(dataclasses.replace(one, batch=best + step)) > limit
    assert memory.largest_batch(one, 1000) == 0


def test_traffic_by_hand():
    """A mesh of fsdp, tensor and data: every term, for float32."""
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    config = dataclasses.replace(SMALL, remat="full")
    sent = {(x.kind, x.axes[0]): x.bytes for x in traffic.train_traffic(a_work(config=config, mesh=mesh))}
    layers, table = sizes.layer_matrices(SMALL) / 2 * 4, 96 * 64 / 2 * 4
    stream = 16 / 8 * 64 * 64 * 4
    assert sent == {
        ("all-gather", "fsdp"): (2 * layers + table) * 3 / 4,
        ("reduce-scatter", "fsdp"): (layers + table) * 3 / 4,
        ("all-to-all", "fsdp"): 2 * stream * 3 / 4,
        ("all-reduce", "data"): 2 * (layers + 2 * table) / 4 / 2,
        ("all-reduce", "tensor"): (5 * 4 + 2) * 2 * stream / 2,
    }
    halves = traffic.train_traffic(a_work(config=config, mesh=mesh, micro_batches=2))
    gathers = [x.bytes for x in halves if x.kind == "all-gather"]
    assert gathers == [2 * sent["all-gather", "fsdp"]]
    assert traffic.train_traffic(a_work()) == ()


def test_the_slowest_resource_binds():
    place = chips.topology("v5p:4x4x4")
    llama = presets.llama31_8b(dtype="bfloat16")
    train = lambda **mesh: traffic.phases(a_work(batch=1024, length=4097, config=llama, mesh=mesh), place)["train"]
    assert train(fsdp=64).bound == "compute"
    assert train(fsdp=8, tensor=8).network["tensor"] > train(fsdp=16, tensor=4).network["tensor"]
    one = a_work("grpo", 64, 2048, llama, {"data": 8, "tensor": 8}, completion=1024, group=8)
    each = traffic.phases(one, place)
    assert each["decode"].bound == "memory"
    gathering = traffic.phases(dataclasses.replace(one, mesh=axes(fsdp=8, tensor=8)), place)
    assert gathering["decode"].bound == "fsdp"
    apart = dataclasses.replace(one, mesh=axes(fsdp=8, tensor=8), sampler_mesh=axes(data=8, tensor=8))
    stored = dataclasses.replace(llama, param_dtype="bfloat16")  # as a copy for the sampler is
    assert traffic.phases(apart, place)["decode"] == traffic.phases(a_work(
        "grpo", 64, 2048, stored, {"data": 8, "tensor": 8}, completion=1024, group=8
    ), place)["decode"]  # fmt: skip
    for each_one in each.values():
        assert each_one.seconds <= each_one.serial


@pytest.mark.parametrize(
    ("name", "mesh", "links"),
    [
        ("v5e:16x16", {"data": 16, "tensor": 16}, {"data": 2, "tensor": 2}),  # a ring each
        ("v5e:16x16", {"fsdp": 256}, {"fsdp": 4}),  # both
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, {"fsdp": 1, "tensor": 1}),  # lines
        ("v5e:16x16", {"fsdp": 64, "tensor": 4}, {"fsdp": 1, "tensor": 1}),  # a dimension shared
        ("v5p:8x8x8", {"fsdp": 64, "tensor": 8}, {"fsdp": 4, "tensor": 2}),
        ("tpu7x:4x4x4", {"fsdp": 16, "tensor": 8}, {"fsdp": 4, "tensor": 2}),  # two devices a chip
    ],
)
def test_links_of_an_axis(name, mesh, links):
    place = chips.topology(name)
    speed = chips.bandwidths(place, axes(**mesh))
    assert speed == {axis: n * place.chip.link for axis, n in links.items()}


def test_slices_and_hosts_are_crossed_by_the_outermost_axes():
    two = chips.topology("2xv5e:16x16")
    assert two.devices == 512 and two.name == "2xv5e:16x16"
    speed = chips.bandwidths(two, axes(data=2, fsdp=16, tensor=16))
    assert speed == {"data": two.chip.network, "fsdp": 2 * two.chip.link, "tensor": 2 * two.chip.link}
    with pytest.raises(ValueError, match="has 2 slices, and none of stage, data and fsdp is a multiple of that"):
        chips.bandwidths(two, axes(fsdp=1, tensor=512))
    gpus = chips.topology("h100:4x8")
    speed = chips.bandwidths(gpus, axes(fsdp=4, tensor=8))
    assert speed == {"tensor": gpus.chip.link, "fsdp": gpus.chip.network}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", r"unknown chip 'v5', expected one of v4, v5e.*; did you mean 'v5"),
        ("a100:2x8", "unknown chip 'a100', expected one of .*h100"),
        ("v5e", "expected CHIP:SHAPE, such as v5e:4x4"),
        ("v5p:8x8", r"has the shape 8x8; v5p takes 3 positive sizes, such as v5p:4x4x4"),
        ("v5e:0x4", "takes 2 positive sizes"),
        ("v5e:16x32", "larger than one slice of v5e, 16x16; give several: 2xv5e:16x16"),
        ("2xh100:2x8", "only TPUs come in slices"),
    ],
)
def test_bad_topologies_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        chips.topology(name)


def test_what_does_not_divide_is_said_before_anything_is_made():
    assert search.misfit(a_work(mesh={"fsdp": 8})) is None
    mixture = a_work(config=MIXTURE, mesh={"expert": 16})
    assert "experts is 8, which the 16 devices of mesh axis 'expert'" in search.misfit(mixture)
    assert "first 1 layers are dense" in search.misfit(a_work(config=MIXTURE, mesh={"stage": 2}))
    assert "kv_heads is 4, which the 8 devices of mesh axis 'tensor'" in search.misfit(a_work(mesh={"tensor": 8}))
    assert "layers is 4, which the 8 devices of mesh axis 'stage'" in search.misfit(a_work(mesh={"stage": 8}))
    reason = search.misfit(a_work(batch=12, mesh={"fsdp": 4, "tensor": 2}, micro_batches=2))
    assert "batch of 12 in 2 micro-batches does not divide over the 4 devices" in reason and "multiple of 8" in reason
    one = dataclasses.replace(a_work("grpo", completion=32, group=4), sampler_mesh=axes(tensor=8))
    assert "kv_heads" in search.misfit(one)


def test_the_search_finds_what_fits_and_the_shortest_step_first():
    place = chips.topology("v5e:4x4")
    one = a_work(batch=64, length=2049, config=presets.qwen3_4b(dtype="bfloat16"))
    found = search.search(one, place)
    assert found and all(x.memory <= place.chip.memory and search.misfit(x.work) is None for x in found)
    spent = lambda x: (traffic.cut_fine(x.work), x.seconds + x.serial)
    assert [spent(x) for x in found] == sorted(spent(x) for x in found)
    assert all(math.prod(x.work.mesh.values()) == 16 for x in found)
    # by hand over a few: none that fits is shorter
    for mesh in ({"fsdp": 16}, {"fsdp": 8, "tensor": 2}, {"data": 2, "fsdp": 8}):
        for remat in search.REMATS:
            config = dataclasses.replace(one.config, remat=remat)
            other = search.evaluate(dataclasses.replace(one, mesh=axes(**mesh), config=config), place)
            assert other.memory > place.chip.memory or spent(other) >= spent(found[0])
    assert search.search(dataclasses.replace(one, config=presets.llama31_70b()), place) == []
    large = search.search(dataclasses.replace(one, batch=256), chips.topology("v5e:16x16"))
    fine = [traffic.cut_fine(x.work) for x in large]
    assert not fine[0] and fine == sorted(fine)  # pieces of 2560 / 256 are tried last


def test_the_samplers_mesh_gathers_nothing_and_fits():
    place = chips.topology("v5p:4x4x4")
    llama = presets.llama31_70b(dtype="bfloat16", remat="full")
    one = a_work("grpo", 512, 2048, llama, {"fsdp": 16, "tensor": 4}, completion=1024, group=8)
    mesh = search.sampler_mesh(one, place)
    assert mesh is not None and mesh["fsdp"] == 1 and math.prod(mesh.values()) == 64
    apart = dataclasses.replace(one, sampler_mesh=mesh)
    every = memory.memories(apart)
    assert all(sum(every[name].values()) <= place.chip.memory for name in ("sample", "lay out"))
    copy = every["sample"]["sampler's copy"]
    assert every["train"]["sampler's copy"] == copy == every["lay out"]["sampler's copy, old and new"] / 2
    assert copy == 2 * sizes.own_parameters(llama, mesh)  # in bfloat16, as it computes
    assert traffic.phases(apart, place)["decode"].seconds < traffic.phases(one, place)["decode"].seconds


def test_hints_name_what_goes_badly():
    place = chips.topology("v5e:16x16")
    llama = presets.llama31_8b(dtype="bfloat16")
    fine = a_work(batch=256, config=llama, mesh={"fsdp": 32, "tensor": 8})
    assert report.hints(fine, place) == []
    cut = report.hints(dataclasses.replace(fine, mesh=axes(fsdp=64, tensor=4)), place)
    assert len(cut) == 1 and "pieces of 64" in cut[0] and "at most fsdp=32" in cut[0]
    grpo = dataclasses.replace(fine, task="grpo", completion=32, group=8)
    assert "--sampler-mesh" in report.hints(grpo, place)[0]
    assert np.isfinite(traffic.phases(grpo, place)["decode"].seconds)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-8b", 8_030_261_248),
        ("gpt2", 124_439_808),
        ("chameleon-7b", 7_013_666_816),
        ("qwen2-vl-7b", 7_615_616_512),
    ],
)
def test_transformers_of_the_catalogue_have_a_plan(name, parameters):
    assert sum(sizes.parameters(command.model_of(name)).values()) == parameters


def test_an_encoder_looks_at_all_pairs():
    one = a_work(config=command.model_of("bert-base"), mesh={"fsdp": 8})
    causal = dataclasses.replace(one, config=dataclasses.replace(one.config, causal=True))
    n = one.length - 1
    ratio = work.train_flops(one)["attention"] / work.train_flops(causal)["attention"]
    assert ratio == pytest.approx(n * n / (n * (n + 1) / 2))


def test_a_pipeline_gathers_once_and_reduces_in_each_tick():
    """16 rows in 16 micro-batches, on 4 stages: 19 ticks."""
    llama = command.model_of("llama-8b")
    one, staged = (a_work(batch=32, config=llama, mesh=mesh) for mesh in ({"fsdp": 2}, {"fsdp": 2, "stage": 4}))
    sent = lambda w: {x.kind: x.bytes for x in traffic.train_traffic(w) if x.axes == ("fsdp",)}
    table = llama.vocab_size * llama.width * jnp.dtype(llama.dtype).itemsize / 2  # its other half is here
    layers = (sent(one)["all-gather"] - table) / 2
    assert sent(staged)["all-gather"] == pytest.approx(layers / 4 + table)
    assert sent(staged)["reduce-scatter"] == pytest.approx(19 * layers / 4 + table)
    copy = memory.train_memory(staged)["copy"]
    assert copy == pytest.approx(2 * layers / 4) and "copy" not in memory.train_memory(one)


def test_on_gpus_the_heads_buffers_stay():
    one = a_work(config=command.model_of("llama-8b"), mesh={"fsdp": 8})
    found = {kind: memory.train_memory(dataclasses.replace(one, chips=kind)) for kind in ("tpu", "gpu")}
    item = jnp.dtype(one.config.dtype).itemsize
    head = item * (2 * one.config.vocab_size * one.config.width + 3 * one.own_tokens * one.config.width)
    assert found["gpu"]["temporaries"] == pytest.approx(found["tpu"]["temporaries"] + head)
