"""Mesh strings and sharding rules."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import networks, parallel
from jaxrl.nets.language_model import language_model
from jaxrl.nets.linear_attention import LinearConfig
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel import relayout
from jaxrl.plan import hlo, sizes


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("", (1, 8, 1, 1, 1, 1)),
        ("auto", (1, 1, 8, 1, 1, 1)),
        ("data=2,fsdp=4", (1, 2, 4, 1, 1, 1)),
        (" fsdp=2, tensor=-1", (1, 1, 2, 1, 1, 4)),
        ("expert=2,context=2,tensor=2", (1, 1, 1, 2, 2, 2)),
        ("stage=4,data=2", (4, 2, 1, 1, 1, 1)),
    ],
)
def test_mesh_from_a_string(spec, sizes):
    mesh = parallel.make_mesh(spec)
    assert tuple(mesh.shape.values()) == sizes and mesh.axis_names == parallel.AXES


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=3", "has 3 places for 8 devices; the sizes must multiply to the number of devices"),
        ("dta=8", "unknown axis 'dta', .*did you mean 'data'"),
        ("data=x", "the size of 'data' is 'x'; expected a positive number"),
        ("data=0", "expected a positive number"),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
        ("data=3,fsdp=-1", "has 6 places for 8 devices"),
    ],
)
def test_bad_mesh_strings_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(spec)


def test_every_parameter_of_every_transformer_has_a_rule():
    """Tied or not, with biases and QK-norm: each leaf has a place, and matrices are really divided."""
    mesh = parallel.make_mesh("fsdp=2,tensor=4")
    for options in ({"tie_embeddings": True}, {"qkv_bias": True, "qk_norm": True}):
        config = TransformerConfig(vocab_size=16, width=32, layers=2, heads=8, kv_heads=4, ffn=64, **options)
        shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
        for path, sharding in jax.tree_util.tree_leaves_with_path(parallel.state_shardings(shapes, mesh)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.endswith(("kernel", "embedding")):
                assert sharding.spec in {P("tensor", "fsdp"), P("fsdp", "tensor"),
                                         P("stage", "fsdp", "tensor"), P("stage", "tensor", "fsdp")}, name  # fmt: skip


def test_what_does_not_fit_is_refused():
    mesh = parallel.make_mesh("fsdp=8")
    with pytest.raises(
        ValueError, match="its embed dimension 12 does not divide over the 8 devices of mesh axis 'fsdp'"
    ):
        parallel.partition("params/unembed/kernel", (12, 5), mesh)
    with pytest.raises(ValueError, match="no sharding rule fits; add one to parallel.sharding.RULES"):
        parallel.partition("params/critic/kernel", (8, 8), mesh)
    assert parallel.partition("opt_state/0/count", (), mesh) == P()


def test_every_network_has_rules():
    """Language networks by name; towers of pictures behind them, and all others, by the last axis."""
    eight = SimpleNamespace(shape={axis: 8 if axis == "fsdp" else 1 for axis in parallel.AXES})
    one = SimpleNamespace(shape=dict.fromkeys(parallel.AXES, 1))
    for network in networks.networks():
        named = network.family in ("decoder", "encoder")
        for path, leaf in jax.tree_util.tree_leaves_with_path(network.shapes):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            rules = parallel.RULES if named or network.family == "vision-language" else ()
            rules = rules if named else (*rules, *parallel.LAST_AXIS)
            spec = parallel.partition(name, leaf.shape, one if named else eight, rules=rules)
            assert len(spec) in (0, len(leaf.shape)), (network.name, name)
    tree = networks.networks()
    vit = next(network for network in tree if network.name == "vit_b16").shapes
    spec = parallel.partition("layers/ffn/up/kernel", vit["layers"]["ffn"]["up"]["kernel"].shape, eight)
    assert tuple(spec) == ("stage", "fsdp", "tensor")
    assert tuple(parallel.partition("patches/kernel", (16, 16, 3, 768), eight, rules=parallel.LAST_AXIS))[-1] == "fsdp"
    assert tuple(parallel.partition("odd", (3, 5), eight, rules=parallel.LAST_AXIS)) == (None, None)


def test_layers_in_periods_and_layers_that_share_parameters():
    mesh = SimpleNamespace(shape={axis: 2 for axis in parallel.AXES})
    rule = lambda path, shape: tuple(parallel.partition(path, shape, mesh))
    assert rule("periods/linear_layers/ffn/up/kernel", (4, 3, 8, 16)) == ("stage", None, "fsdp", "tensor")
    assert rule("layers/ffn/up/kernel", (8, 16)) == ("fsdp", "tensor")
    odd = TransformerConfig(64, 32, 3, 4, 4, 64, linear=LinearConfig(), linear_layers=(0, 2))
    params = jax.eval_shape(language_model(odd).init, jax.random.key(0))
    jax.tree.leaves(parallel.state_shardings(params, parallel.make_mesh("fsdp=4,tensor=2")))
    parts = sizes.parameters(odd)
    assert parts["ffn"] == 3 * 3 * 32 * 64 and parts["embed"] == parts["unembed"] == 64 * 32
    assert rule("layers/ffn/up/kernel", (4, 8, 16)) == ("stage", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("training", "sampling", "most"),
    [("fsdp=8", "data=2,tensor=4", 1.25), ("fsdp=4,tensor=2", "data=4,tensor=2", 1.25), ("fsdp=8", "data=8", 1.25),
     ("data=2,tensor=4", "data=8", 1.25), ("data=2,fsdp=4", "data=4,fsdp=2", 2),
     ("fsdp=2,stage=2,tensor=2", "fsdp=4,tensor=2", 2)],
)  # fmt: skip
def test_laid_out_anew(training, sampling, most, monkeypatch):
    """Values as they were, where they were wanted; a device receives what it lacks, or twice that."""
    config = TransformerConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, ffn=64)
    params = {"params": jax.jit(language_model(config).init)(jax.random.key(0)), "key": jax.random.key(1)}
    before, after = (parallel.state_shardings(params, parallel.make_mesh(spec)) for spec in (training, sampling))
    given = jax.device_put(params, before)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", None)  # which is for other devices
        got = parallel.relaid(given, after)
    for x, y, at in zip(*map(jax.tree.leaves, (params["params"], got["params"], after["params"])), strict=True):
        assert y.sharding == at
        np.testing.assert_array_equal(x, y)
    assert jax.random.key_data(got["key"]).tolist() == [0, 1]

    leaves, sources, places = (tuple(jax.tree.leaves(tree["params"])) for tree in (params, before, after))
    halfway = tuple(relayout.between(x.shape, a, b) for x, a, b in zip(leaves, sources, places, strict=True))
    program = relayout.program(halfway, places).lower(jax.tree.leaves(given["params"])).compile()
    sent = sum(x.bytes for x in hlo.count(program.as_text(), dict(sources[0].mesh.shape)).traffic)
    lacking = 0.0
    for x, a, b in zip(leaves, sources, places, strict=True):
        old, new = (at.devices_indices_map(x.shape) for at in (a, b))
        for device in old:
            held = np.zeros(x.shape, bool)
            held[old[device]] = True
            lacking += (~held[new[device]]).sum() * x.dtype.itemsize / 8
    assert sent <= most * lacking
    jax.tree.map(lambda x: x.delete(), given["params"])  # as a step that donates them does
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got["params"]))


def test_to_other_devices():
    meshes = [parallel.make_mesh("fsdp=4", devices=jax.devices()[i : i + 4]) for i in (0, 4)]
    there, here = (NamedSharding(mesh, P("fsdp")) for mesh in meshes)
    got = parallel.relaid([jax.device_put(jnp.arange(8), there)], [here])
    assert got[0].sharding == here and got[0].tolist() == list(range(8))
