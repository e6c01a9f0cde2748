"""Plans of networks that are no decoders: products counted from a trace, and their steps on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxrl import networks, parallel
from jaxrl.nets import recurrent
from jaxrl.nets.vision import swin, vit
from jaxrl.parallel import AXES
from jaxrl.plan import chips, command, compiled, objectives, other
from jaxrl.plan.options import Plan
from jaxrl.plan.products import flops


def of(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def axes(**sizes):
    return dict.fromkeys(AXES, 1) | sizes


def test_products_of_a_trace():
    times = lambda a, b: a @ b
    assert flops(times, of(3, 5), of(5, 7)) == 2 * 3 * 5 * 7
    assert flops(jax.grad(lambda a, b: times(a, b).sum(), argnums=(0, 1)), of(3, 5), of(5, 7)) == 3 * 2 * 3 * 5 * 7
    thrice = lambda a, b: lax.scan(lambda c, _: (times(c, b), None), a, length=3)[0]
    assert flops(jax.jit(thrice), of(3, 5), of(5, 5)) == 3 * 2 * 3 * 5 * 5
    longest = lambda a, b: lax.cond(a[0, 0] > 0, lambda: times(a, b), lambda: times(a, times(b, b)))
    assert flops(longest, of(3, 5), of(5, 5)) == 2 * (3 * 25 + 125)
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=2)
    assert flops(conv, of(1, 4, 8, 8), of(6, 2, 3, 3)) == 2 * 6 * 64 * 2 * 9
    again = jax.grad(jax.checkpoint(lambda a, b: jnp.sin(times(jnp.sin(times(a, b)), b)).sum()))
    assert flops(again, of(5, 5), of(5, 5)) == 6 * 2 * 125  # forward, again, backward


@pytest.mark.parametrize(("name", "published"), [("swin_t", 4.5e9), ("swin_b", 15.4e9), ("vit_b16", 17.6e9)])
def test_products_are_those_that_the_papers_count(name, published):
    """Multiplications of one picture of 224 x 224: Liu et al. 2021 (arXiv:2103.14030), table 1; ViT as DeiT's."""
    one = networks.find(name)
    module = vit.ViT(one.config) if name.startswith("vit") else swin.Swin(one.config)
    found = flops(lambda params, x: module.apply({"params": params}, x), one.shapes, of(1, 224, 224, 3))
    assert found / 2 == pytest.approx(published, rel=0.05)


SMALL = {
    "vit": vit.SIZES["tiny"],
    "lstm": recurrent.SIZES["tiny"],
}


def a_network(name):
    init = lambda config, key: other_init(config)(key)
    return networks.Network(name, "small", SMALL[name], init)


def other_init(config):
    if isinstance(config, vit.ViTConfig):
        return lambda key: vit.ViT(config).init(key, jnp.zeros((1, *config.image_size, config.channels)))["params"]
    return recurrent.recurrent_language_model(config).init


def drawn(batch):
    rng = np.random.default_rng(0)
    draw = lambda x: rng.integers(0, 4, x.shape) if jnp.issubdtype(x.dtype, jnp.integer) else rng.normal(size=x.shape)
    return jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), batch)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("name", list(SMALL))
def test_rows_apart_give_the_loss_and_gradient_of_one_device(name, zero):
    one = objectives.objective(SMALL[name], 16, 12)
    params, batch, key = other_init(SMALL[name])(jax.random.key(1)), drawn(one.batch), jax.random.key(2)
    if name == "lstm":  # all rows weigh alike, as the loss's mean must be one over rows
        batch = dataclasses.replace(batch, loss_mask=jnp.ones_like(batch.loss_mask))
    want = jax.jit(jax.value_and_grad(one.loss))(params, batch, key)
    mesh = parallel.make_mesh("data=2,fsdp=4")
    spread = jax.jit(jax.value_and_grad(parallel.loss_of_rows(one.loss, mesh, zero=zero)))
    places = parallel.state_shardings(params, mesh, rules=parallel.ANY_RULES, zero=zero)
    value, gradient = spread(jax.device_put(params, places), batch, key)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, want[1])


def test_rows_apart_refuse_other_axes_and_odd_rows():
    loss = objectives.objective(SMALL["vit"], 16, 12).loss
    with pytest.raises(ValueError, match=r"mesh has \{'tensor': 4\}; rows are divided over data, fsdp, expert alone"):
        parallel.loss_of_rows(loss, parallel.make_mesh("data=2,tensor=4"))
    one = parallel.loss_of_rows(loss, parallel.make_mesh("data=8"))
    with pytest.raises(ValueError, match="the batch makes 12 rows"):
        one({}, {"x": jnp.zeros((12, 2))}, jax.random.key(0))


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"data": 8}])
@pytest.mark.parametrize("name", list(SMALL))
def test_counted_and_compiled_agree(name, mesh):
    options = Plan(name, "cpu:8", batch=16, length=12, dtype="float32", remat="none")
    place = chips.topology("cpu:8")
    step = other.step_of(a_network(name), options, axes(**mesh))
    done = {key: compiled.compile_program(key, make()) for key, make in other.programs(step, place).items()}
    found = other.figures(step, place, done)
    assert found["compiled"]["train"]["flops"] == pytest.approx(found["train_flops"]["forward and backward"], rel=0.02)
    sent, counted = found["compiled"]["train"]["traffic"], found["train_traffic"]
    gathered = lambda sizes: sum(size for kind, size in sizes.items() if kind == "all-gather fsdp")
    assert gathered(sent) == pytest.approx(gathered(counted), rel=0.01)
    # XLA writes a reduce-scatter on CPUs as an all-reduce, of twice the bytes
    reduced = lambda sizes, kind: sum(size for name, size in sizes.items() if name.startswith(kind))
    want = reduced(counted, "all-reduce") + 2 * reduced(counted, "reduce-scatter")
    assert reduced(sent, "all-reduce") + 2 * reduced(sent, "reduce-scatter") == pytest.approx(want, rel=0.03)
    memory = found["memory"]["train"]
    held = memory["parameters"] + memory["optimizer"] + memory["data"]
    assert found["compiled"]["train"]["arguments"] == pytest.approx(held, rel=0.01)


ONE_OF_EACH = ["albert-base", "electra-small", "zaremba-medium", "vit-b16", "swinv2-t", "sam-vit-b", "vq-chameleon"]
ONE_OF_EACH += ["nade-mnist", "nade-mnist-2", "made-mnist-1", "pixelcnn-digits"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_kind_of_network_has_a_plan(name):
    model = command.model_of(name)
    assert isinstance(model, networks.Network)
    place = chips.topology("v5e:2x2")
    step = other.step_of(model, Plan(name, batch=8), axes(data=4))
    found = other.figures(step, place, {})
    assert found["parameters"]["all"] == model.parameters
    assert found["memory"]["train"]["parameters"] == 4 * model.parameters
    assert found["train_flops"]["forward and backward"] > 0 and found["rows_per_second"] > 0


def test_swins_are_planned_with_the_pictures_of_their_papers():
    """Liu et al. 2021 (arXiv:2103.14030) and 2022 (arXiv:2111.09883)."""
    sides = {"swin_t": 224, "swin_b_384": 384, "swinv2_t": 256, "swinv2_t_w16": 256, "swinv2_l_w12": 192}
    for name, side in (sides | {"swinv2_l_w24_384": 384}).items():
        assert objectives.objective(networks.find(name).config, 2, 1).batch["pictures"].shape == (2, side, side, 3)


@pytest.mark.slow
def test_the_whole_catalogue_has_a_plan():
    for one in networks.networks():
        model = command.model_of(one.name)
        if isinstance(model, networks.Network):
            objectives.objective(model.config, 8, 512)


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"task": "dpo", "search": True}, {"data": 4}, "leave task, search at the default"),
        ({}, {"data": 2, "tensor": 2}, r"mesh has \{'tensor': 2\}; vit-b16 divides rows alone"),
        ({"batch": 6}, {"data": 4}, "batch makes 6 rows"),
    ],
)
def test_what_is_for_decoders_is_refused(changes, mesh, message):
    model = command.model_of("vit-b16")
    assert isinstance(model, networks.Network)
    with pytest.raises(ValueError, match=message):
        other.step_of(model, dataclasses.replace(Plan("vit-b16", batch=8), **changes), axes(**mesh))


@pytest.mark.parametrize("name", ["bert-base", "llada-8b"])
def test_networks_that_see_both_sides_are_not_planned_as_if_they_wrote(name):
    place = chips.topology("v5e:2x2")
    with pytest.raises(ValueError, match="sees tokens on both sides: --task grpo"):
        command.work_of(Plan(name, task="grpo", batch=8), place)
    assert not command.work_of(Plan(name, batch=8), place).config.causal
