"""ViT against torch, through the values that tests/golden/make_vision.py stored, and what follows from its form."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.vision.layers import bicubic
from jaxrl.nets.vision.vit import SIZES, ViT, ViTConfig, resize
from jaxrl.nets.weights.maps import shapes, to_checkpoint
from jaxrl.nets.weights.vit import names
from tests.nets.vision_cases import close, golden, gradients_equal, parameters, random_params

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
        (jnp.zeros((1, 16, 16, 3), jnp.uint8), "scale and normalise bytes"),
        (jnp.zeros((1, 24, 16, 3)), "resize them"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        ViT(TINY).init(jax.random.key(0), images)
