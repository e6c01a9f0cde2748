"""Masks at the size of a user's image, and the simulated user: clicks, boxes and whole conversations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import segment as at_work
from jaxrl.losses.segmentation import sam_loss
from jaxrl.nets.vision import sam
from jaxrl.nets.vision.sam import SAM, SIZES, SAMConfig, prompt

TINY = SIZES["tiny"]  # image 16, patches of 4: masks have the image's pixels
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.lru_cache
def params():
    init = jit(SAM(TINY).init)
    return init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), prompt(points=jnp.zeros((1, 1, 2))))["params"]


def picture(height=10, width=20):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


# a user's image


def test_images_are_resized_normalised_and_padded():
    x, scaled = at_work.preprocess(TINY, picture(10, 20))
    assert x.shape == (16, 16, 3) and scaled == (8, 16)
    assert not x[8:].any() and x[:8].any()
    grey, _ = at_work.preprocess(TINY, np.full((20, 10, 3), 100, np.uint8))
    want = (100 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(grey[:, :8], np.broadcast_to(want, (16, 8, 3)), rtol=1e-5)
    assert at_work.preprocess(TINY, picture(7, 12))[1] == (9, 16)  # 9.33 rounds to 9


def test_masks_are_resized_as_torch_does():
    with np.load(Path(__file__).parent / "golden" / "sam.npz") as stored:
        logits, want = stored["mask/logits"][0, 0, :1], stored["resized"]
    config = SAMConfig(8, 2, 2, 1, 8, image=64, patch=16)
    np.testing.assert_allclose(at_work.resize_masks(logits, config, (64, 40), (50, 31))[0], want, atol=1e-5)


def test_stability_is_a_ratio_of_areas():
    logits = np.random.default_rng(0).normal(size=(3, 5, 4)) * 3
    want = [(x > 1.5).sum() / (x > -0.5).sum() for x in logits]
    np.testing.assert_allclose(at_work.stability_score(logits, threshold=0.5), want, rtol=1e-6)
    assert at_work.stability_score(np.full((4, 4), -9.0)) == 0 and at_work.stability_score(np.full((4, 4), 9.0)) == 1


def test_a_point_and_a_box_are_asked_in_pixels_of_the_users_image():
    image, ratio = picture(10, 20), 16 / 20
    seen = at_work.embed(TINY, params(), image)
    point, box = jnp.array([[[5.0, 5.0]]]), jnp.array([[2.0, 1.0, 15.0, 9.0]])
    decode = jit(functools.partial(SAM(TINY).apply, method="decode"))
    for given in ({"points": point}, {"boxes": box}):
        found = at_work.segment(TINY, params(), seen, **given)
        assert found.masks.shape == (1, 3, 10, 20) and found.masks.dtype == bool
        assert found.ious.shape == found.stability.shape == (1, 3) and found.logits.shape == (1, 3, 16, 16)
        name, value = next(iter(given.items()))
        logits, ious = decode({"params": params()}, seen.embedding, prompt(**{name: value * ratio}))
        np.testing.assert_allclose(found.logits, logits[:, 1:], atol=1e-5)
        np.testing.assert_allclose(found.ious, ious[:, 1:], atol=1e-5)
        full = at_work.resize_masks(found.logits, TINY, (8, 16), (10, 20))
        np.testing.assert_array_equal(found.masks, full > 0)
        one = at_work.segment(TINY, params(), image, **given, multimask=False)
        np.testing.assert_allclose(one.logits, logits[:, :1], atol=1e-5)


def test_several_clicks_ask_for_one_mask_and_answers_may_be_fed_back():
    seen = at_work.embed(TINY, params(), picture())
    points = jnp.array([[[5.0, 5.0], [9.0, 2.0]]] * 2)
    labels = jnp.array([[1, 0], [1, 1]])
    found = at_work.segment(TINY, params(), seen, points=points, labels=labels)
    assert found.masks.shape == (2, 1, 10, 20)
    again = at_work.segment(TINY, params(), seen, points=points, labels=labels, masks=found.logits[:, 0])
    assert again.masks.shape == (2, 1, 10, 20)
    assert np.abs(again.logits - found.logits).max() > 1e-3


def test_absent_points_change_nothing():
    seen = at_work.embed(TINY, params(), picture())
    point, room = jnp.array([[[5.0, 5.0]]]), jnp.array([[[5.0, 5.0], [0.0, 0.0], [3.0, 3.0]]])
    ask = functools.partial(at_work.segment, TINY, params(), seen)
    want = ask(points=point)
    for labels, masks in (([[1, -2, -2]], 3), ([[1, -2, 0]], 1), ([[1, -2, -2], [1, 0, -2]], 1)):
        found = ask(points=jnp.tile(room, (len(labels), 1, 1)), labels=jnp.array(labels))
        assert found.masks.shape == (len(labels), masks, 10, 20)
        if masks == 3:
            np.testing.assert_allclose(found.logits, want.logits, atol=1e-5)
    box = jnp.array([[2.0, 1.0, 15.0, 9.0]])
    assert ask(points=room, labels=jnp.full((1, 3), -2), boxes=box).masks.shape[1] == 3
    assert ask(points=room, labels=jnp.array([[-2, 1, -2]]), boxes=box).masks.shape[1] == 1


def test_five_clicks_and_eight_share_a_program(monkeypatch):
    seen = at_work.embed(TINY, params(), picture())
    points = jnp.asarray(np.random.default_rng(0).uniform(0, 9, (1, 8, 2)), jnp.float32)
    labels = jnp.array([[1, 0, 1, 1, 0, 1, 0, 1]])
    at_work._decode.clear_cache()
    traces, programs, found = [], [], []
    monkeypatch.setattr(at_work, "SAM", lambda config: traces.append(1) or SAM(config))
    for n in (3, 4, 5, 8):
        found.append(at_work.segment(TINY, params(), seen, points=points[:, :n], labels=labels[:, :n]))
        programs.append(len(traces))
    assert programs == [1, 1, 2, 2]
    scaled = prompt(points[:, :5] * 16 / 20, labels[:, :5])  # without room
    decode = jit(functools.partial(SAM(TINY).apply, method="decode"))
    logits, ious = decode({"params": params()}, seen.embedding, scaled)
    np.testing.assert_allclose(found[2].logits, logits[:, :1], atol=1e-5)
    np.testing.assert_allclose(found[2].ious, ious[:, :1], atol=1e-5)


def test_traced_labels_leave_the_number_of_masks_to_the_caller():
    seen = at_work.embed(TINY, params(), picture())
    point, label = jnp.array([[[5.0, 5.0]]]), jnp.array([[1]])
    ask = lambda label, **how: at_work.segment(TINY, params(), seen, points=point, labels=label, **how).ious
    with pytest.raises(ValueError, match="give multimask=True or False"):
        jit(ask)(label)
    got = jit(functools.partial(ask, multimask=True))(label)
    np.testing.assert_allclose(got, ask(label), atol=1e-5)


POINT, BOX = np.ones((1, 1, 2)), np.array([[1.0, 2.0, 3.0, 4.0]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "given nothing"),
        ({"points": np.zeros((1, 2))}, r"points\[None\]"),
        ({"points": np.zeros((1, 2, 3))}, r"points have shape \(1, 2, 3\), expected \[P, N, 2\]"),
        ({"boxes": np.zeros(4)}, r"boxes\[None\]"),
        ({"boxes": np.zeros((1, 5))}, r"boxes have shape \(1, 5\)"),
        ({"masks": np.zeros((1, 4, 4))}, r"masks have shape \(1, 4, 4\), expected .* \[P, 16, 16\]"),
        ({"points": np.zeros((2, 1, 2)), "boxes": np.zeros((1, 4))}, "one box for each"),
        ({"points": np.zeros((0, 1, 2))}, "no prompt: expected .* P of 1 or more"),
        ({"boxes": np.zeros((0, 4))}, "no prompt"),
        ({"points": np.zeros((1, 0, 2))}, "prompt 0 has no point that is there, no box and no mask"),
        ({"points": np.tile(POINT, (2, 1, 1)), "labels": np.array([[1], [-2]])}, "prompt 1 has no point"),
        ({"points": POINT, "labels": np.array([1])}, r"labels have shape \(1,\), expected \[P, N\] = \(1, 1\)"),
        ({"points": POINT, "labels": np.array([[2]])}, r"labels\[0, 0\] is 2, expected 1 \(on"),
        ({"points": POINT, "labels": np.array([[0.5]])}, r"labels\[0, 0\] is 0.5"),
        ({"points": np.array([[[1, 1], [5, 10.5]]])}, r"points\[0, 1\] is .*, expected .* 20 x 10 \(width x height\)"),
        ({"points": -POINT}, r"points\[0, 0\]"),
        ({"points": POINT * np.nan}, r"points\[0, 0\]"),
        ({"boxes": BOX[:, [2, 1, 0, 3]]}, r"boxes\[0\] is .*, expected .* left <= right"),
        ({"boxes": np.concatenate([BOX, BOX[:, [0, 3, 2, 1]]])}, r"boxes\[1\]"),
        ({"boxes": BOX * np.inf}, "finite"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(given, message):
    seen = at_work.Embedded(jnp.zeros((1, 4, 4, 16)), (10, 20), (8, 16))
    with pytest.raises(ValueError, match=message):
        at_work.segment(TINY, params(), seen, **given)


def test_absent_points_may_lie_anywhere_and_boxes_reach_out_of_the_image():
    seen = at_work.Embedded(jnp.zeros((1, 4, 4, 16)), (10, 20), (8, 16))
    points, labels = np.array([[[0, 10], [-99, np.nan]]]), np.array([[1, -2]])
    boxes = np.array([[-1.0, 3.0, 25.0, 3.0]])
    found = at_work.segment(TINY, params(), seen, points=points, labels=labels, boxes=boxes)
    assert found.masks.shape == (1, 1, 10, 20) and np.isfinite(found.logits).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 10)), "expected .height, width, 3."),
        (np.zeros((1, 400, 3)), "image of 1 x 400 pixels is 0 x 16 .* crop the longer side"),
        (np.zeros((0, 0, 3)), "image of 0 x 0"),
        (picture() / 255, r"float64 with values 0 ... 1, expected 0 ... 255: multiply by 255"),
        (picture() > 9, "bool with values 0 ... 1"),
        (picture() - 99.0, "values -99 ... "),
        (picture() * np.int32(257), "values 0 ... 65535"),
        (picture() * np.nan, "values nan"),
    ],
)
def test_images_that_are_none_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        at_work.preprocess(TINY, image)


def test_dark_images_are_images():
    for image in (np.zeros((8, 8, 3)), np.ones((8, 8, 3), np.uint8)):
        assert at_work.preprocess(TINY, image)[1] == (16, 16)


# a simulated user


def test_points_are_uniform_over_the_region():
    region = np.zeros((2, 5, 7), bool)
    region[0, [0, 2, 2, 4], [6, 1, 3, 0]] = True
    draw = jit(jax.vmap(lambda key: at_work.sample_point(key, jnp.asarray(region))))
    points, found = draw(jax.random.split(jax.random.key(0), 4000))
    assert found[:, 0].all() and not found[:, 1].any()
    counts = np.zeros((5, 7), int)
    np.add.at(counts, (np.int32(points[:, 0, 1]), np.int32(points[:, 0, 0])), 1)
    assert counts[~region[0]].sum() == 0
    assert np.abs(counts[region[0]] - 1000).max() < 130  # 4.7 standard deviations


def test_boxes_bound_the_target_and_move_by_a_tenth():
    target = np.zeros((2, 40, 60), bool)
    target[0, 10:31, 15:46] = True
    np.testing.assert_array_equal(at_work.bounding_box(jnp.asarray(target)), [[15, 10, 45, 30], [0, 0, 0, 0]])
    draw = jit(jax.vmap(lambda key: at_work.sample_box(key, jnp.asarray(target), limit=5.0)))
    boxes = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    off = boxes[:, 0] - [15, 10, 45, 30]
    assert np.abs(off).max() <= 5.001
    np.testing.assert_allclose(off[:, 1].std(), 2.0, rtol=0.1)  # height 20; of the width's 3 the limit takes some
    np.testing.assert_allclose(off.mean(0), 0, atol=0.3)
    assert not boxes[:, 1].any()
    wide = at_work.sample_box(jax.random.key(0), jnp.ones((50, 8, 9), bool), noise=1.0)
    assert wide.min() >= 0 and wide[:, 2].max() <= 8 and wide[:, 3].max() <= 7


def test_pixels_of_masks_are_patches_of_the_image():
    wide = SAMConfig(8, 2, 2, 1, 8, image=64, patch=16)
    np.testing.assert_array_equal(at_work.to_image(wide, jnp.array([[0.0, 15.0]])), [[1.5, 61.5]])
    np.testing.assert_array_equal(at_work.to_image(TINY, jnp.array([[0.0, 15.0]])), [[0.0, 15.0]])


def test_the_first_prompt_is_a_point_or_a_box():
    target = np.zeros((400, 16, 16), bool)
    target[:399, 4:9, 6:13] = True
    got = at_work.first_prompt(jax.random.key(3), TINY, jnp.asarray(target), room=2)
    assert got.points.shape == (400, 5, 2) and got.labels.shape == (400, 5)
    boxed = got.labels[:, 0] == sam.TOP_LEFT
    assert 0.4 < boxed.mean() < 0.6
    assert (got.labels[boxed] == jnp.array([[2, 3, -2, -2, -2]])).all()
    clicked = got.labels[:399][~boxed[:399]]
    assert (clicked == jnp.array([[1, -2, -1, -2, -2]])).all()
    x, y = np.int32(got.points[:399, 0][~boxed[:399]]).T
    assert target[0][y, x].all()
    empty = [at_work.first_prompt(jax.random.key(i), TINY, jnp.zeros((1, 16, 16), bool)).labels[0, 0] for i in range(8)]
    assert set(map(int, empty)) == {sam.ABSENT, sam.TOP_LEFT}


def test_clicks_lie_where_the_answer_is_wrong():
    draw = np.random.default_rng(0)
    target, logits = draw.random((300, 16, 16)) < 0.5, draw.normal(size=(300, 16, 16))
    logits[0] = np.where(target[0], 1.0, -1.0)
    points, labels = at_work.next_click(jax.random.key(0), TINY, jnp.asarray(logits), jnp.asarray(target))
    x, y = np.int32(points).T
    assert labels[0] == sam.ABSENT
    rows = np.arange(1, 300)
    here = target[rows, y[1:], x[1:]]
    np.testing.assert_array_equal(here != (logits[rows, y[1:], x[1:]] > 0), True)
    np.testing.assert_array_equal(labels[1:], here)


def test_a_schedule_has_all_clicks_and_two_empty_rounds():
    plan = np.asarray(at_work.schedule(jax.random.key(0), 500))
    assert plan.shape == (11, 500) and not plan[10].any() and not plan[9].all()
    np.testing.assert_array_equal(plan.sum(0), 8)
    blank = (~plan[:9]).argmax(0)
    assert set(blank) == set(range(9)) and np.bincount(blank).max() < 90
    assert at_work.schedule(jax.random.key(0), 3, 0).shape == (1, 3)
    with pytest.raises(ValueError, match="clicks is -1"):
        at_work.schedule(jax.random.key(0), 3, -1)


def student(prompts):
    """Answers with what was fed back, mended by the newest click alone: a single mask, and a worse and an empty one."""
    b = prompts.labels.shape[0]
    mask = jnp.where(prompts.has_mask[:, None, None], prompts.masks, -1.0)
    x, y = jnp.moveaxis(prompts.points.astype(jnp.int32), -1, 0)
    values = jnp.select([prompts.labels == 1, prompts.labels == 0], [1.0, -1.0], 0.0)
    slots = jnp.arange(1, 1 + values.shape[1])[None] * jnp.abs(values)
    values = jnp.where(slots == slots.max(axis=1, keepdims=True), values, 0.0)
    clicked = jnp.zeros(mask.shape).at[jnp.arange(b)[:, None], y, x].add(values)
    mask = jnp.where(clicked > 0, 1.0, jnp.where(clicked < 0, -1.0, mask))
    logits = jnp.stack([mask, mask - 0.5, mask - 9.0], axis=1)
    return logits, jnp.broadcast_to(jnp.array([[0.5, 0.9, 0.1]]), (b, 3))


def test_a_conversation_mends_a_pixel_with_every_click():
    config = SAMConfig(8, 2, 2, 1, 8, image=16, patch=4, masks=2, channels=16, decoder_heads=2)
    target = np.zeros((20, 16, 16), bool)
    target[:, 3:9, 5:12] = True
    play = jit(functools.partial(at_work.interact, student, config))
    values, found = play(jnp.asarray(target), jax.random.key(0))
    assert values.shape == (11, 20)
    right = np.round(np.asarray(found["iou"]) * target[0].sum()).astype(int)
    steps = np.diff(right, axis=0)
    assert set(right[0]) == {0, 1}  # a box tells this student nothing, a point one pixel
    np.testing.assert_array_equal(right[10] - right[0], 8)
    assert (steps[-1] == 0).all() and ((steps == 0).sum(0) == 2).all() and ((steps == 1).sum(0) == 8).all()
    # the first round is judged by the best of masks 1 and 2, later ones by mask 0
    assert (found["chosen"][0] == 1).all() and (found["chosen"][1:] == 0).all()
    np.testing.assert_allclose(found["predicted"], np.where(np.arange(11)[:, None] == 0, 0.9, 0.5) + np.zeros((11, 20)))
    again = play(jnp.asarray(target), jax.random.key(0))[0]
    np.testing.assert_array_equal(values, again)
    assert (np.asarray(play(jnp.asarray(target), jax.random.key(1))[0]) != again).any()


def test_a_conversation_about_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="resize it to the masks"):
        at_work.interact(student, TINY, jnp.zeros((2, 8, 8)), jax.random.key(0))


def test_one_round_of_training_is_the_loss_of_the_first_prompt():
    draw = np.random.default_rng(0)
    images, target = draw.normal(size=(2, 16, 16, 3)).astype(np.float32), draw.random((2, 16, 16)) < 0.5

    @jit
    def both(params, target):
        got = at_work.loss(TINY, params, images, target, jax.random.key(5), clicks=0)
        given = at_work.first_prompt(jax.random.split(jax.random.key(5), 3)[0], TINY, target)
        logits, ious = SAM(TINY).apply({"params": params}, images, given)
        return got, sam_loss(logits[:, 1:], ious[:, 1:], target)

    (values, found), (want, expected) = both(params(), jnp.asarray(target))
    assert values.shape == (1, 2)
    np.testing.assert_allclose(values[0], want, rtol=1e-4)
    np.testing.assert_array_equal(found["chosen"][0], expected["chosen"] + 1)


@pytest.mark.slow
def test_training_on_conversations_lowers_their_loss():
    """One image, learned by heart in 40 steps; every part of the network has a gradient."""
    draw = np.random.default_rng(0)
    images, target = draw.normal(size=(2, 16, 16, 3)).astype(np.float32), np.zeros((2, 16, 16), bool)
    target[0, 2:9, 3:14], target[1, 8:, 8:] = True, True
    step = jit(jax.value_and_grad(lambda p, key: at_work.loss(TINY, p, images, target, key, clicks=2)[0].mean()))
    now, history = params(), []
    for key in jax.random.split(jax.random.key(0), 40):
        value, gradient = step(now, key)
        now = jax.tree.map(lambda p, g: p - 0.03 * g / (1e-3 + jnp.abs(g).max()), now, gradient)
        history.append(float(value))
    flat = jax.tree.leaves_with_path(gradient)
    still = {jax.tree_util.keystr(path) for path, g in flat if not np.asarray(g).any()}
    assert all("frequencies" in path for path in still)
    assert np.mean(history[-5:]) < 0.6 * np.mean(history[:5])
