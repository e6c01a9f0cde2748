"""Segmentation losses against loops over pixels, and what Segment Anything's loss promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import segmentation
from tests.oracles import losses_segmentation as oracle

SHAPES = [(1, 1), (5, 7), (17, 3)]
LOSSES = [
    ("focal", {}),
    ("focal", {"alpha": None, "gamma": 0.0}),
    ("focal", {"alpha": 0.7, "gamma": 0.5}),
    ("dice", {}),
    ("dice", {"smooth": 1e-3}),
    ("soft_iou", {}),
]
every_loss = pytest.mark.parametrize(("name", "knobs"), LOSSES)


def masks(seed, *shape):
    """(logits, target) of that shape."""
    draw = np.random.default_rng(seed)
    return (2 * draw.normal(size=shape)).astype(np.float32), draw.random(shape[-2:]) < 0.4


@every_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_the_papers(name, knobs, shape):
    for seed in range(3):
        logits, target = masks(seed, *shape)
        got = getattr(segmentation, name)(logits, target, **knobs)
        np.testing.assert_allclose(got, getattr(oracle, name)(logits, target, **knobs), rtol=1e-5, atol=1e-7)


@every_loss
def test_gradients_are_differences_of_the_oracle(name, knobs):
    logits, target = masks(0, 3, 4)
    got = jax.grad(functools.partial(getattr(segmentation, name), **knobs))(logits, target)
    of, step = getattr(oracle, name), 1e-5
    for at in np.ndindex(logits.shape):
        nudge = np.zeros(logits.shape)
        nudge[at] = step
        want = (of(logits + nudge, target, **knobs) - of(logits - nudge, target, **knobs)) / (2 * step)
        np.testing.assert_allclose(got[at], want, rtol=1e-4, atol=1e-7)


@every_loss
def test_extreme_logits_and_empty_masks_stay_finite(name, knobs):
    loss = functools.partial(getattr(segmentation, name), **knobs)
    for sign in (1.0, -1.0):
        for target in (jnp.zeros((4, 4)), jnp.ones((4, 4))):
            value, gradient = jax.value_and_grad(loss)(jnp.full((4, 4), sign * 1e4), target)
            assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["focal", "dice", "soft_iou", "iou"])
def test_leading_axes_are_masks_of_their_own(name):
    logits, target = masks(0, 2, 3, 5, 4)
    of = getattr(segmentation, name)
    target = np.broadcast_to(target, logits.shape)
    got = jax.jit(of)(logits.astype(jnp.bfloat16), target)
    want = jax.vmap(jax.vmap(of))(logits.astype(jnp.bfloat16), target)
    assert got.dtype == jnp.float32 and got.shape == (2, 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_iou_counts_pixels():
    for seed in range(3):
        logits, target = masks(seed, 6, 5)
        assert segmentation.iou(logits, target) == pytest.approx(oracle.iou(logits, target))
    nothing = jnp.zeros((3, 3))
    assert segmentation.iou(nothing, nothing) == 1 and segmentation.iou(nothing, nothing + 1) == 0
    assert segmentation.iou(nothing, nothing + 1, threshold=-0.5) == 1
    assert not jax.grad(lambda x: segmentation.iou(x, target))(jnp.asarray(logits)).any()


def test_soft_iou_of_a_hard_mask_follows_from_its_dice():
    logits, target = masks(0, 9, 9)
    hard = np.where(logits > 0, 1e3, -1e3)
    d, j = (getattr(segmentation, name)(hard, target, smooth=0.0) for name in ("dice", "soft_iou"))
    np.testing.assert_allclose(j, 2 * d / (1 + d), rtol=1e-6)
    np.testing.assert_allclose(j, 1 - segmentation.iou(logits, target), rtol=1e-6)


def batch(seed=0, items=4, number=3, side=(6, 5)):
    """(logits [B, M, h, w], predicted IoUs [B, M], targets [B, h, w])."""
    draw = np.random.default_rng(seed)
    logits = (2 * draw.normal(size=(items, number, *side))).astype(np.float32)
    return logits, draw.random((items, number)).astype(np.float32), draw.random((items, *side)) < 0.4


@pytest.mark.parametrize("number", [1, 3])
def test_sam_loss_is_that_of_the_paper(number):
    logits, ious, target = batch(number=number)
    values, found = jax.jit(segmentation.sam_loss)(logits, ious, target)
    for i in range(len(values)):
        want, chosen = oracle.sam(logits[i], ious[i], target[i])
        np.testing.assert_allclose(values[i], want, rtol=1e-5)
        assert found["chosen"][i] == chosen
        np.testing.assert_allclose(found["iou"][i], oracle.iou(logits[i][chosen], target[i]), rtol=1e-6)
        best = np.argmax(ious[i])
        np.testing.assert_allclose(found["predicted"][i], ious[i][best])
        np.testing.assert_allclose(found["iou_of_predicted"][i], oracle.iou(logits[i][best], target[i]), rtol=1e-6)


def test_masks_that_are_not_counted_do_not_matter():
    logits, ious, target = batch()
    counted = np.array([[True, False, False], [False, True, True], [True, True, True], [False, False, True]])
    values, found = segmentation.sam_loss(logits, ious, target, counted=counted)
    for i in range(4):
        want, chosen = oracle.sam(logits[i], ious[i], target[i], counted[i])
        np.testing.assert_allclose(values[i], want, rtol=1e-5)
        assert found["chosen"][i] == chosen
    away = logits + 5 * ~counted[..., None, None]
    np.testing.assert_array_equal(values, segmentation.sam_loss(away, ious, target, counted=counted)[0])
    total = lambda logits, ious: segmentation.sam_loss(logits, ious, target, counted=counted)[0].sum()
    d_logits, d_ious = jax.grad(total, argnums=(0, 1))(logits, ious)
    assert not d_logits[~counted].any() and not d_ious[~counted].any() and d_ious[counted].all()


def test_the_best_mask_is_taken_for_each_item_and_not_for_the_batch():
    """Two meanings, two masks, a batch with one item of each: nothing is lost, where one mask for both would lose."""
    one = np.zeros((4, 4), bool)
    one[:2] = True
    target = np.stack([one, ~one])
    logits = np.where(np.stack([one, ~one]), 20.0, -20.0)[None].repeat(2, axis=0).astype(np.float32)
    values, found = segmentation.sam_loss(logits, jnp.zeros((2, 2)), target, iou_weight=0.0)
    np.testing.assert_allclose(values, 0.0, atol=1e-5)
    assert found["chosen"].tolist() == [0, 1]
    by_mask = segmentation.dice(logits, np.broadcast_to(target[:, None], logits.shape))
    assert by_mask.mean(0).min() > 0.4


def test_only_the_chosen_mask_and_the_iou_head_learn():
    logits, ious, target = batch()

    def total(logits, ious, **weights):
        return segmentation.sam_loss(logits, ious, target, **weights)[0].sum()

    d_logits, d_ious = jax.grad(total, argnums=(0, 1))(logits, ious)
    chosen = segmentation.sam_loss(logits, ious, target)[1]["chosen"]
    touched = np.abs(d_logits).max((-1, -2)) > 0
    np.testing.assert_array_equal(touched, np.arange(3) == np.asarray(chosen)[:, None])
    true = np.array([[oracle.iou(m, t) for m in item] for item, t in zip(logits, target, strict=True)])
    np.testing.assert_allclose(d_ious, 2 * (ious - true) / 3, rtol=1e-4, atol=1e-6)
    assert not jax.grad(total)(logits, ious, focal_weight=0.0, dice_weight=0.0).any()


def test_terms_weigh_what_is_asked():
    logits, ious, target = batch()
    parts = np.eye(3)
    each = [
        segmentation.sam_loss(logits, ious, target, focal_weight=f, dice_weight=d, iou_weight=i)[0] for f, d, i in parts
    ]
    _, found = segmentation.sam_loss(logits, ious, target, focal_weight=0.0)
    np.testing.assert_allclose(each[1], found["dice"], rtol=1e-6)
    np.testing.assert_allclose(each[2], found["iou_error"], rtol=1e-6)
    _, found = segmentation.sam_loss(logits, ious, target, dice_weight=0.0)
    np.testing.assert_allclose(each[0], found["focal"], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segmentation.focal(jnp.zeros((4, 4)), jnp.zeros((1, 4, 4))), "both must be"),
        (lambda: segmentation.dice(jnp.zeros(4), jnp.zeros(4)), "masks of two axes"),
        (lambda: segmentation.sam_loss(jnp.zeros((4, 4)), jnp.zeros(()), jnp.zeros((4, 4))), r"logits\[None\]"),
        (lambda: segmentation.sam_loss(jnp.zeros((3, 4, 4)), jnp.zeros(2), jnp.zeros((4, 4))), "ious has shape"),
        (lambda: segmentation.sam_loss(jnp.zeros((3, 4, 4)), jnp.zeros(3), jnp.zeros((4, 5))), "target has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
