"""ViT against torch, through the values that tests/golden/make_vision.py stored, and what follows from its form."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.vision import prepare
from jaxrl.nets.vision.layers import bicubic
from jaxrl.nets.vision.vit import SIZES, ViT, ViTConfig, resize
from jaxrl.nets.weights import vision, vit, write_safetensors
from jaxrl.nets.weights.maps import shapes, to_checkpoint
from jaxrl.nets.weights.vit import names
from jaxrl.pretrained import load_pretrained, load_vision
from tests.nets.vision_cases import GOLDEN, close, golden, gradients_equal, parameters, random_params

TINY = SIZES["tiny"]
COUNTS = {  # of transformers' classes
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_s32": 22_878_952,
    "vit_b16": 86_567_656,
    "vit_b32": 88_224_232,
    "vit_l16": 304_326_632,
    "vit_l32": 306_535_400,
    "vit_h14": 632_045_800,
}


@functools.cache
def torch_case():
    """(parameters, arrays) of the golden file."""
    weights, cases = golden("vit")
    return parameters(ViT(TINY), names(TINY), weights, TINY.image_size), cases


def test_logits_loss_and_gradients_equal_those_of_torch():
    params, cases = torch_case()
    gradients_equal(ViT(replace(TINY, remat=True)), names(TINY), params, cases["plain"])


def test_resized_network_equals_torch_with_interpolated_positions():
    params, cases = torch_case()
    case = cases["resized"]
    config, params = resize(TINY, params, case["images"].shape[1:3])
    close(jax.jit(ViT(config).apply)({"params": params}, case["images"]), case["logits"])
    with pytest.raises(ValueError, match="not a multiple of patch"):
        resize(TINY, params, (18, 16))


def test_resizing_to_the_same_size_changes_nothing():
    params, _ = torch_case()
    config, same = resize(TINY, params, TINY.image_size)
    assert config == TINY
    np.testing.assert_allclose(same["positions"], params["positions"], atol=1e-7)


def test_bicubic_keeps_straight_lines_inside_and_constants_everywhere():
    rows = np.arange(12.0, dtype=np.float32)
    line = np.asarray(bicubic(jnp.asarray(rows[:, None]), (24, 1)))[:, 0]
    np.testing.assert_allclose(line[4:-4], (np.arange(24) + 0.5)[4:-4] / 2 - 0.5, atol=0.05)
    np.testing.assert_allclose(bicubic(jnp.ones((5, 7, 2)), (9, 4)), np.ones((9, 4, 2)), atol=1e-6)


def test_checkpoint_round_trip_is_exact():
    params, _ = torch_case()
    weights, _ = golden("vit")
    again = to_checkpoint(names(TINY), params)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def said(name, **changes):
    """The config.json of a network, as transformers wrote it."""
    with np.load(GOLDEN / "vision_configs.npz") as texts:
        return json.loads(str(texts[name])) | changes


def published(folder, config, tensors, **files):
    """A folder as transformers writes it; files: of other names, in JSON."""
    write_safetensors(folder, tensors)
    for name, values in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_a_folder_opens_with_the_logits_of_torch(tmp_path):
    weights, cases = golden("vit")
    how = {"size": {"height": 16, "width": 16}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    opened = load_vision(published(tmp_path, said("vit"), weights, preprocessor_config=how))
    assert opened.model.config == TINY and isinstance(opened.params["positions"], jax.Array)
    logits = jax.jit(opened.model.apply)({"params": opened.params}, cases["plain"]["images"])
    close(logits, cases["plain"]["logits"])
    assert opened.preparation == prepare.Preparation((16, 16), (0.5,) * 3, (0.25,) * 3, "cubic")
    assert opened.labels == tuple(f"LABEL_{i}" for i in range(10))
    with pytest.raises(ValueError, match="config.json: model_type is 'vit': open it with jaxrl.pretrained.load_vision"):
        load_pretrained(tmp_path)


def test_a_plain_network_gives_the_tokens_that_torch_classifies(tmp_path):
    """Its names begin elsewhere, and it has a pooler, which is passed over."""
    weights, cases = golden("vit")
    plain = {name.removeprefix("vit."): x for name, x in weights.items() if not name.startswith("classifier")}
    plain |= {"pooler.dense.weight": np.ones((24, 24), np.float32), "pooler.dense.bias": np.ones(24, np.float32)}
    opened = load_vision(published(tmp_path, said("vit", architectures=["ViTModel"]), plain), dtype="float32")
    assert opened.model.config.classes is None and opened.preparation is None and opened.labels == ()
    tokens = np.asarray(jax.jit(opened.model.apply)({"params": opened.params}, cases["plain"]["images"]))
    close(tokens[:, 0] @ weights["classifier.weight"].T + weights["classifier.bias"], cases["plain"]["logits"])
    again = vision.to_checkpoint(opened.model.config, opened.params)
    assert again.keys() == {name for name in plain if "pooler" not in name}


def test_published_configs_are_the_published_sizes():
    assert vision.from_hugging_face(said("vit_b16")) == replace(SIZES["vit_b16"], classes=3)
    assert vit.labels(said("vit_b16")) == ("cat", "dog", "bird")
    assert vision.from_hugging_face(said("vit_b32"), remat=True) == replace(SIZES["vit_b32"], classes=None, remat=True)
    two = said("vit_b16")
    del two["id2label"]
    assert vision.from_hugging_face(two).classes == 2 and vit.labels(two) == ()
    wide = vision.from_hugging_face(said("vit_b16", image_size=[224, 320], patch_size=[16, 16]))
    assert (wide.image_size, wide.patch) == ((224, 320), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deit"}, "model_type is 'deit', expected one of vit, swin, swinv2"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', expected 'gelu'"),
        ({"qkv_bias": False, "hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'; qkv_bias is False"),
        ({"architectures": ["ViTForMaskedImageModeling"]}, "expected one of .'ViTForImageClassification', 'ViTModel'"),
        ({"patch_size": [16, 8]}, "patch_size is .16, 8., expected a square"),
    ],
)
def test_published_choices_that_are_not_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vision.from_hugging_face(said("vit", **change))


def test_labels_must_be_those_of_all_classes(tmp_path):
    weights, _ = golden("vit")
    published(tmp_path, said("vit", id2label={str(i + 1): "x" for i in range(10)}), weights)
    with pytest.raises(ValueError, match=r"config.json: id2label names the classes \[1, 2.*expected 0 ... 9"):
        load_vision(tmp_path)


def test_a_folder_that_does_not_fit_names_every_problem(tmp_path):
    weights = dict(golden("vit")[0])
    del weights["vit.layernorm.bias"]
    weights |= {"extra": np.zeros(3, np.float32), "classifier.bias": np.zeros(11, np.float32)}
    with pytest.raises(ValueError) as error:
        load_vision(published(tmp_path, said("vit"), weights))
    for part in ("missing vit.layernorm.bias", "unused extra", "classifier.bias has shape (11,), expected (10,)"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="config.json: no 'hidden_size' in it"):
        load_vision(published(tmp_path, {k: v for k, v in said("vit").items() if k != "hidden_size"}, weights))
    with pytest.raises(ValueError, match="holds no config.json"):
        load_vision(tmp_path / "elsewhere")


@pytest.mark.parametrize("resample", prepare.METHODS)
@pytest.mark.parametrize("size", [(12, 9), (40, 31)])
def test_pictures_are_prepared_as_with_pillow(resample, size):
    """Byte for byte, but for a few that float32 rounds the other way."""
    pillow = pytest.importorskip("PIL.Image", reason="Pillow comes with matplotlib, in the extra `plot`")
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    picture = np.asarray(pillow.fromarray(coarse).resize((26, 20), 2))
    picture = np.where(picture < 128, 0, picture)  # edges, at which filters go beyond 0 ... 255
    mean, deviation = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.4, 0.5, 0.6], np.float32)
    sizes = {"size": {"height": size[0], "width": size[1]}, "resample": resample}
    how = prepare.from_hugging_face(sizes | {"image_mean": mean.tolist(), "image_std": deviation.tolist()})
    got = np.asarray(prepare.prepare(how, picture)) * deviation + mean
    apart = np.abs(255 * got - np.asarray(pillow.fromarray(picture).resize(size[::-1], resample)))
    assert apart.max() < 1.001 and (apart < 1e-3).mean() > 0.97
    whole = np.asarray(prepare.prepare(how._replace(size=None), picture))
    np.testing.assert_allclose(whole, (picture / np.float32(255) - mean) / deviation, atol=1e-6)


def test_preparations_as_old_and_new_files_say_them():
    own = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    assert prepare.from_hugging_face(own | {"size": 224}).size == (224, 224)
    assert prepare.from_hugging_face(own | {"size": {"longest_edge": 1024}}).size is None
    assert prepare.from_hugging_face(own | {"size": 224, "do_resize": False}).size is None
    bytes_alone = prepare.from_hugging_face({"size": 8, "do_normalize": False})
    assert bytes_alone == prepare.Preparation((8, 8), (0.0,) * 3, (1.0,) * 3)
    for change, message in (
        ({"do_center_crop": True}, "do_center_crop is set"),
        ({"rescale_factor": 2 / 255}, "rescale_factor is 0.0078"),
        ({"resample": 5}, "resample is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.from_hugging_face(own | {"size": 8} | change)
    with pytest.raises(ValueError, match=r"the picture has shape \(8, 8\), expected \[height, width, 3\]"):
        prepare.prepare(bytes_alone, np.zeros((8, 8)))


def test_without_positions_the_order_of_patches_does_not_matter():
    config = replace(TINY, pool="mean")
    params = random_params(ViT(config), jnp.zeros((1, 16, 16, 3)))
    params["positions"] = jnp.zeros_like(params["positions"])
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    moved = jnp.roll(images, (4, 8), (1, 2))
    run = jax.jit(lambda images: ViT(config).apply({"params": params}, images))
    close(run(moved), run(images))
    assert np.abs(run(jnp.roll(images, 1, 1)) - run(images)).max() > 1e-3


def test_pooling_without_head_and_intermediates():
    config = replace(TINY, pool="mean", classes=None)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = random_params(ViT(config), images)
    assert "class_token" not in params and "head" not in params
    run = jax.jit(functools.partial(ViT(config).apply, mutable=["intermediates"]))
    tokens, found = run({"params": params}, images)
    assert tokens.shape == (2, 16, 24)
    assert found["intermediates"]["layers"]["hidden"][0].shape == (2, 2, 16, 24)
    headed = replace(TINY, pool="mean")
    params["head"] = {"kernel": jnp.eye(24, 10), "bias": jnp.zeros(10)}
    close(jax.jit(ViT(headed).apply)({"params": params}, images), tokens.mean(1)[:, :10])


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_as_many_parameters_as_published(name):
    config = SIZES[name]
    found = shapes(ViT(config), jnp.zeros((1, *config.image_size, 3)))
    assert sum(np.prod(shape, dtype=int) for shape in found.values()) == COUNTS[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool is 'max'"),
        ({"heads": 7}, "width 768 is not a multiple of heads 7"),
        ({"image_size": (224, 225)}, "not a multiple of patch 16"),
        ({"patch": 448}, "not a multiple of patch 448"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((16, 16, 3)), r"expected \[B, H, W, 3\]"),
        (jnp.zeros((1, 3, 16, 16)), "channels last"),
        (jnp.zeros((0, 16, 16, 3)), "at least one"),
        (jnp.zeros((1, 16, 16, 1)), "repeat the grey"),
        (jnp.zeros((1, 16, 16, 4)), "leave out the transparency"),
        (jnp.zeros((1, 16, 16, 3), jnp.uint8), "scale and normalise bytes"),
        (jnp.zeros((1, 24, 16, 3)), "resize them"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        ViT(TINY).init(jax.random.key(0), images)
