"""Swin against torch, through the values that tests/golden/make_vision.py stored, and what its windows do."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl.nets.vision import swin
from jaxrl.nets.vision.swin import SIZES, Block, OffsetBias, Swin, SwinConfig
from jaxrl.nets.weights import vision
from jaxrl.nets.weights.maps import from_checkpoint, shapes, to_checkpoint
from jaxrl.nets.weights.swin import IGNORED, names
from jaxrl.pretrained import load_vision
from tests.nets.test_vit import published, said
from tests.nets.vision_cases import close, golden, gradients_equal, parameters, random_params

TINY = {"swin": SIZES["tiny"], "swinv2": SIZES["tiny_v2"]}
COUNTS = {  # of transformers' classes
    "swin_t": 28_288_354,
    "swin_s": 49_606_258,
    "swin_b": 87_768_224,
    "swin_l": 196_532_476,
    "swin_b_384": 87_903_584,
    "swin_l_384": 196_735_516,
    "swinv2_t": 28_347_154,
    "swinv2_s": 49_728_418,
    "swinv2_b": 87_918_816,
    "swinv2_t_w16": 28_347_154,
    "swinv2_s_w16": 49_728_418,
    "swinv2_b_w16": 87_918_816,
    "swinv2_l_w12": 228_772_549,
    "swinv2_l_w24_384": 196_739_932,
}


@functools.cache
def torch_case(file):
    """(parameters, arrays) of a golden file."""
    weights, cases = golden(file)
    return parameters(Swin(TINY[file]), names(TINY[file]), weights, (32, 32)), cases


@pytest.mark.parametrize("file", TINY)
def test_logits_loss_and_gradients_equal_those_of_torch(file):
    params, cases = torch_case(file)
    config = replace(TINY[file], remat=file == "swin")
    # cosine attention as sharp as it may be amplifies rounding. The gradients of swinv2 are float64's, from which torch
    # in float32 is 1.4e-4 away at most (and ours 1.9e-4, or 3.2e-5 in float64): three times its worst is allowed
    rounding = json.loads(str(cases["plain"].get("rounding", "{}")))
    assert file == "swin" or len(rounding) == 88  # the images', and of every tensor
    gradients_equal(Swin(config), names(config), params, cases["plain"], 3 * max(rounding.values(), default=3e-5))


def test_a_swin_with_other_windows_equals_torch():
    """7 x 7 offsets of windows of 4 become 11 x 11 of windows of 6, by torch's bicubic interpolation."""
    params, cases = torch_case("swin")
    config, resized = swin.resize(TINY["swin"], params, 6)
    assert config == replace(TINY["swin"], window=6)
    tables = [resized[f"stage{s}"][one]["bias"]["table"].shape for s in (0, 1) for one in ("still", "shifted")]
    assert tables == [(1, 121, 2)] * 2 + [(1, 121, 4)] * 2
    case = cases["resized"]
    close(jax.jit(Swin(config).apply)({"params": resized}, case["images"]), case["logits"])
    again = swin.resize(config, resized, 6)[1]
    jax.tree.map(np.testing.assert_array_equal, again, resized)


def test_version_2_has_a_bias_for_windows_of_any_size():
    params, cases = torch_case("swinv2")
    with pytest.raises(ValueError, match="pretrained_windows is None, expected the windows of training.*: 4, or"):
        swin.resize(TINY["swinv2"], params, 6)
    measured = replace(TINY["swinv2"], pretrained_windows=(4, 4))
    config, same = swin.resize(measured, params, 6)
    assert config == replace(measured, window=6) and same is params
    assert np.isfinite(jax.jit(Swin(config).apply)({"params": same}, cases["plain"]["images"])).all()


@pytest.mark.parametrize("file, case", [("swin", "odd"), ("swin", "small"), ("swinv2", "wide")])
def test_images_of_other_sizes_equal_torch(file, case):
    """27 x 30 and 18 x 31 pad patches, windows and merging; 16 x 24 has a last map of the window's height: no shift."""
    params, cases = torch_case(file)
    logits = jax.jit(Swin(TINY[file]).apply)({"params": params}, cases[case]["images"])
    close(logits, cases[case]["logits"])


def test_offsets_measured_by_the_windows_of_pretraining_equal_torch():
    params, cases = torch_case("swinv2")
    config = replace(TINY["swinv2"], pretrained_windows=(6, 3))
    close(jax.jit(Swin(config).apply)({"params": params}, cases["pretrained"]["images"]), cases["pretrained"]["logits"])
    assert np.abs(cases["pretrained"]["logits"] - cases["plain"]["logits"]).max() > 1e-3


@pytest.mark.parametrize("file", TINY)
def test_checkpoint_round_trip_is_exact(file):
    params, _ = torch_case(file)
    weights, _ = golden(file)
    again = to_checkpoint(names(TINY[file]), params)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    old = {"swin.encoder.layers.0.blocks.0.attention.self.relative_position_index": np.zeros((16, 16))}
    found = shapes(Swin(TINY[file]), jnp.zeros((1, 32, 32, 3)))
    from_checkpoint(names(TINY[file]), found, weights | old, ignored=IGNORED)


@pytest.mark.parametrize("file", TINY)
def test_a_folder_opens_with_the_logits_of_torch(file, tmp_path):
    """Beside the weights lies a table of integers, as in older files."""
    weights, cases = golden(file)
    root = "swin" if file == "swin" else "swinv2"
    table = {f"{root}.encoder.layers.0.blocks.0.attention.self.relative_position_index": np.zeros((16, 16), np.int64)}
    published(tmp_path, said(file), weights)
    save_file(weights | table, tmp_path / "model.safetensors")
    opened = load_vision(tmp_path)
    assert opened.model.config == replace(TINY[file], drop_path=0.1)
    assert opened.labels[-1] == "LABEL_9" and opened.preparation is None
    case = cases["plain"]
    close(jax.jit(opened.model.apply)({"params": opened.params}, case["images"]), case["logits"])


def test_a_plain_swin_gives_the_map_that_torch_classifies(tmp_path):
    weights, cases = golden("swin")
    plain = {name.removeprefix("swin."): x for name, x in weights.items() if not name.startswith("classifier")}
    opened = load_vision(published(tmp_path, said("swin", architectures=["SwinModel"]), plain))
    pooled = np.asarray(jax.jit(opened.model.apply)({"params": opened.params}, cases["plain"]["images"])).mean((1, 2))
    close(pooled @ weights["classifier.weight"].T + weights["classifier.bias"], cases["plain"]["logits"])


def test_published_configs_are_the_published_sizes():
    options = {"classes": 3, "drop_path": 0.1}
    assert vision.from_hugging_face(said("swin_t")) == replace(SIZES["swin_t"], **options)
    measured = replace(SIZES["swinv2_b_w16"], **options, pretrained_windows=(12, 12, 12, 6))
    assert vision.from_hugging_face(said("swinv2_b_w16")) == measured
    assert vision.from_hugging_face(said("swinv2"), dtype="bfloat16").pretrained_windows is None


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("swin", {"use_absolute_embeddings": True}, "use_absolute_embeddings is True, expected False"),
        ("swinv2", {"qkv_bias": False, "layer_norm_eps": 1e-6}, "qkv_bias is False.*layer_norm_eps is 1e-06"),
        ("swinv2", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("swin", {"architectures": ["SwinBackbone"]}, "expected one of .'SwinForImageClassification', 'SwinModel'"),
        ("swinv2", {"architectures": ["SwinModel"]}, "expected one of .'Swinv2ForImageClassification'"),
        ("swin", {"mlp_ratio": 2.5}, "mlp_ratio is 2.5"),
        ("swin", {"depths": [2, 3]}, "expected even ones"),
    ],
)
def test_published_choices_that_are_not_built_are_refused(file, change, message):
    with pytest.raises(ValueError, match=message):
        vision.from_hugging_face(said(file, **change))


@pytest.mark.parametrize("h, w, size, shift", [(8, 8, 4, 2), (14, 21, 7, 3), (6, 9, 3, 1), (4, 4, 4, 0)])
def test_regions_are_those_of_the_paper(h, w, size, shift):
    """Nine slices of the rolled map, numbered in a loop; tokens of a window see each other where the numbers agree."""
    number = np.zeros((h, w), int)
    cuts = lambda n: [(0, n - size), (n - size, n - shift), (n - shift, n)]
    for i, (top, bottom) in enumerate(cuts(h)):
        for j, (left, right) in enumerate(cuts(w)):
            number[top:bottom, left:right] = 3 * i + j
    ids = swin.regions(h, w, size, shift)
    n = 0
    for top in range(0, h, size):
        for left in range(0, w, size):
            want = number[top : top + size, left : left + size].reshape(-1)
            np.testing.assert_array_equal(ids[n][:, None] == ids[n][None], want[:, None] == want[None])
            n += 1
    assert n == len(ids)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_a_token_reaches_the_tokens_of_its_window_and_no_others(version, shifted):
    """Jacobian of a block on an 8 x 12 map: windows of 4, cut at 0, 4, 8 or at 2, 6, 10, and never round the edge."""
    config = SwinConfig(version, width=4, depths=(2,), heads=(2,), window=4, mlp_ratio=1)
    block, x = Block(config, 2, shifted), jax.random.normal(jax.random.key(0), (1, 8, 12, 4))
    params = random_params(block, x)
    # forward mode: XLA's CPU backend of jax 0.10.2 compiles jit(jacrev) of a map cut into windows wrongly
    jacobian = jax.jit(jax.jacfwd(lambda x: block.apply({"params": params}, x[None])[0].sum(-1)))(x[0])
    reached = np.abs(jacobian).max(-1) > 0
    y, z = (np.arange(n) + (2 if shifted else 0) for n in (8, 12))
    same_y, same_z = (a[:, None] // 4 == a[None] // 4 for a in (y, z))
    np.testing.assert_array_equal(reached, same_y[:, None, :, None] & same_z[None, :, None, :])


def test_windows_and_back_is_the_identity():
    x = jnp.arange(2 * 6 * 9 * 2.0).reshape(2, 6, 9, 2)
    rows = swin.windows(x, 3)
    assert rows.shape == (12, 9, 2)
    np.testing.assert_array_equal(rows[1].reshape(3, 3, 2), x[0, :3, 3:6])
    np.testing.assert_array_equal(swin.whole(rows, 3, 6, 9), x)


@pytest.mark.parametrize("version", [1, 2])
def test_bias_depends_on_the_offset_alone(version):
    config = SwinConfig(version, window=3)
    module = OffsetBias(config, 2)
    params = random_params(module, 3)
    bias = np.asarray(module.apply({"params": params}, 3))[0].reshape(2, 3, 3, 3, 3)
    seen = {}
    for i, j, k, m in np.ndindex(3, 3, 3, 3):
        value = seen.setdefault((i - k, j - m), bias[:, i, j, k, m])
        np.testing.assert_array_equal(bias[:, i, j, k, m], value)
    assert len({tuple(value) for value in seen.values()}) == 25
    if version == 1:  # row by row, from the most negative offset
        for (dy, dx), value in seen.items():
            np.testing.assert_array_equal(value, params["table"][(dy + 2) * 5 + dx + 2])
        smaller = np.asarray(module.apply({"params": params}, 2))[0].reshape(2, 2, 2, 2, 2)
        np.testing.assert_array_equal(smaller, bias[:, :2, :2, :2, :2])


def test_offsets_on_a_logarithmic_scale():
    """Liu et al. 2021, equation 4, with the authors' code's factor: the window's own edge is at 8, log2(9) / 3."""
    found = swin.log_offsets(4, 4).reshape(7, 7, 2)
    np.testing.assert_allclose(found[0, 6], [-np.log2(9) / 3, np.log2(9) / 3])
    np.testing.assert_allclose(found[3, 4], [0, np.log2(1 + 8 / 3) / 3])
    np.testing.assert_allclose(swin.log_offsets(4, 7)[-1], np.log2([5, 5]) / 3)


def test_small_maps_shrink_the_window_and_are_seen_without_a_head():
    params, _ = torch_case("swin")
    images = jax.random.normal(jax.random.key(0), (1, 6, 20, 3))
    network = Swin(replace(TINY["swin"], classes=None))
    y, found = jax.jit(functools.partial(network.apply, mutable=["intermediates"]))({"params": params}, images)
    assert np.isfinite(y).all()
    assert found["intermediates"]["map0"][0].shape == (1, 3, 10, 8)
    assert found["intermediates"]["map1"][0].shape == y.shape == (1, 2, 5, 16)


def test_stochastic_depth_leaves_out_branches_only_with_a_stream():
    params, cases = torch_case("swin")
    network, images = Swin(replace(TINY["swin"], drop_path=0.5)), cases["plain"]["images"]
    close(jax.jit(network.apply)({"params": params}, images), cases["plain"]["logits"])
    run = jax.jit(lambda key: network.apply({"params": params}, images, rngs={"dropout": key}))
    first, again, other = (run(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - cases["plain"]["logits"]).max() > 1e-3


def test_stochastic_depth_is_right_on_average_and_whole_per_image():
    config = SwinConfig(width=4, depths=(2,), heads=(2,), window=4, mlp_ratio=1)
    block, x = Block(config, 2, True), jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    params = random_params(block, x)
    # without the MLP's branch a block is x + attention, left out or doubled
    params["ffn"]["down"] = jax.tree.map(jnp.zeros_like, params["ffn"]["down"])
    many = jnp.tile(x, (2000, 1, 1, 1))
    run = jax.jit(lambda x, key: block.apply({"params": params}, x, jnp.float32(0.25), rngs={"dropout": key}))
    plain, out = jax.jit(block.apply)({"params": params}, x), run(many, jax.random.key(1))
    kept = np.abs(out - many).max((1, 2, 3)) > 1e-6
    assert abs(kept.mean() - 0.75) < 0.04
    close(out[kept][0] - x[0], (plain - x)[0] / 0.75)


def test_version_2_starts_as_identity():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 8))
    start = jax.jit(Block(TINY["swinv2"], 2, True).init_with_output)
    np.testing.assert_array_equal(start(jax.random.key(1), x)[0], x)


def test_padded_windows_have_finite_gradients_in_bfloat16():
    """In version 2 keys of padding are exactly 0, where the norm has no derivative."""
    block = Block(replace(TINY["swinv2"], dtype="bfloat16"), 2, True)
    x = jax.random.normal(jax.random.key(0), (1, 7, 6, 8))
    params = random_params(block, x)
    found = jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(block.apply({"params": params}, x))), (0, 1)))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_as_many_parameters_as_published(name):
    found = shapes(Swin(SIZES[name]), jnp.zeros((1, 32, 32, 3)))
    assert sum(np.prod(shape, dtype=int) for shape in found.values()) == COUNTS[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version is 3"),
        ({"depths": (2, 2)}, r"heads is \(3, 6, 12, 24\), expected one for each"),
        ({"pretrained_windows": (6,)}, r"pretrained_windows is \(6,\)"),
        ({"depths": (2, 2, 5, 2)}, "expected even ones"),
        ({"heads": (5, 6, 12, 24)}, "a stage of width 96 has 5 heads"),
        ({"window": 0}, "window is 0"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SwinConfig(**options)
