"""Augmentation: what is overwritten, where, how often, and what becomes of labels and boxes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data.augment import cutmix, cutout, mixup, mosaic, random_erasing

H, W, N = 24, 32, 3000


def over_keys(function, *args, n=N):
    keys = jax.random.split(jax.random.key(0), n)
    return jax.jit(jax.vmap(function, in_axes=(0,) + (None,) * len(args)))(keys, *args)


def boxes_of(changed):
    """(top, left, bottom, right) of the True pixels of each [N, H, W], and whether they fill it."""
    rows, columns = changed.any(2), changed.any(1)
    first = lambda a: a.argmax(1)
    last = lambda a: a.shape[1] - a[:, ::-1].argmax(1)
    top, left, bottom, right = first(rows), first(columns), last(rows), last(columns)
    return np.stack([top, left, bottom, right], 1), changed.sum((1, 2)) == (bottom - top) * (right - left)


@pytest.mark.parametrize("log_aspect", [False, True])
def test_random_erasing_draws_rectangles_of_the_stated_areas_and_ratios(log_aspect):
    out = np.asarray(
        over_keys(partial(random_erasing, probability=0.7, log_aspect=log_aspect), jnp.full((H, W, 2), -1.0))
    )
    changed = (out != -1).all(-1)
    np.testing.assert_array_equal(changed, (out != -1).any(-1))
    assert abs(changed.any((1, 2)).mean() - 0.7) < 0.03
    boxes, filled = boxes_of(changed[changed.any((1, 2))])
    assert filled.all()
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = height * width / (H * W)
    assert 0.012 < area.min() < 0.03 and 0.37 < area.max() < 0.43 and abs(area.mean() - 0.19) < 0.03
    ratio = height / width
    assert 0.2 < ratio.min() and ratio.max() < 5
    # a high rectangle does not fit into a low image, so that upright ones are fewer than were drawn
    assert (ratio > 1).mean() < (0.5 if log_aspect else 0.77) and (ratio > 1).mean() > (0.3 if log_aspect else 0.6)
    # its place is uniform: the middle of what room there is, on average
    assert abs((boxes[:, 0] / np.maximum(H - height, 1)).mean() - 0.5) < 0.03
    assert abs((boxes[:, 1] / np.maximum(W - width, 1)).mean() - 0.5) < 0.03
    noise = out[changed]
    assert 0 <= noise.min() and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.01


def test_random_erasing_fills_and_leaves_whole_what_does_not_fit():
    image = jnp.arange(H * W * 3.0).reshape(H, W, 3) + 10
    mean = jnp.array([1.0, 2.0, 3.0])
    out = np.asarray(over_keys(partial(random_erasing, probability=1.0, fill=mean), image, n=50))
    changed = (out != np.asarray(image)).any(-1)
    assert changed.any((1, 2)).all()
    np.testing.assert_array_equal(out[changed], np.broadcast_to(mean, (changed.sum(), 3)))
    np.testing.assert_array_equal(random_erasing(jax.random.key(1), image, probability=0.0), image)
    np.testing.assert_array_equal(random_erasing(jax.random.key(1), image, probability=1.0, area=(1.5, 2.0)), image)
    # few draws fit, and one of a hundred is found
    out = np.asarray(over_keys(partial(random_erasing, probability=1.0, area=(0.4, 1.6), fill=0.0), image, n=200))
    assert (out == 0).any((1, 2, 3)).mean() > 0.99


def test_cutout_is_a_square_that_the_border_cuts():
    out = np.asarray(over_keys(partial(cutout, size=6), jnp.ones((H, W, 1))))[..., 0]
    boxes, filled = boxes_of(out == 0)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert filled.all() and sides.max() == 6 and sides.min() == 3
    assert abs((sides == 6).all(1).mean() - (H - 5) * (W - 5) / (H * W)) < 0.03
    erased = (out == 0).mean(0)
    np.testing.assert_allclose(erased[4:-4, 4:-4], 36 / (H * W), atol=0.02)


def test_mixup_is_the_mean_of_images_and_labels():
    a, b = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3))
    y, z = jnp.eye(3)[:2]
    image, label = over_keys(partial(mixup, alpha=0.4), a, y, b, z)
    share = np.asarray(label)[:, 0]
    np.testing.assert_allclose(label, np.stack([share, 1 - share, 0 * share], 1), atol=1e-6)
    want = share[:, None, None, None] * np.asarray(a) + (1 - share)[:, None, None, None] * np.asarray(b)
    np.testing.assert_allclose(image, want, atol=1e-6)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.var() - 1 / 7.2) < 0.01


def test_cutmix_weighs_labels_by_the_real_area():
    a, b = jnp.zeros((H, W, 1)), jnp.ones((H, W, 1))
    y, z = jnp.eye(3)[:2]
    image, label = map(np.asarray, over_keys(cutmix, a, y, b, z))
    pasted = image[..., 0] == 1
    np.testing.assert_allclose(
        label, np.stack([1 - pasted.mean((1, 2)), pasted.mean((1, 2)), np.zeros(N)], 1), atol=1e-6
    )
    some = pasted.any((1, 2))
    assert some.mean() > 0.95 and boxes_of(pasted[some])[1].all()
    assert 0.2 < pasted.mean() < 0.5  # E[1 - l] = 1/2 before the border cuts


def test_mosaic_places_four_images_and_their_boxes():
    h, w = 8, 10
    images = jnp.arange(4 * h * w, dtype=jnp.float32).reshape(4, h, w, 1) + 1
    drawn = jax.random.uniform(jax.random.key(2), (4, 5, 4))
    low, size = drawn[..., :2] * jnp.array([[[w - 3.0, h - 3.0]]]), 1 + 2 * drawn[..., 2:]
    boxes, present = jnp.concatenate([low, low + size], -1), jnp.arange(20).reshape(4, 5) % 4 > 0
    out = map(np.asarray, over_keys(partial(mosaic, visible=0.3), images, boxes, present, n=60))
    centres, pixels, at, live = set(), *map(np.asarray, (images, boxes, present))
    for canvas, found, kept in zip(*out, strict=True):
        assert canvas.shape == (16, 20, 1) and found.shape == (20, 4)
        corner = np.argwhere(canvas[..., 0] == pixels[3, 0, 0, 0])[0]  # of the image below right: where all meet
        centres.add(tuple(corner))
        for i in range(4):
            y0, x0 = corner - [h, w] * np.array([i < 2, i % 2 == 0])
            rows, columns = slice(max(y0, 0), min(y0 + h, 2 * h)), slice(max(x0, 0), min(x0 + w, 2 * w))
            seen = pixels[i, rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0]
            np.testing.assert_array_equal(canvas[rows, columns], seen)
            for j in range(5):
                x1, y1, x2, y2 = at[i, j] + [x0, y0, x0, y0]
                want = [max(x1, 0), max(y1, 0), min(x2, 2 * w), min(y2, 2 * h)]
                share = max(want[2] - want[0], 0) * max(want[3] - want[1], 0) / ((x2 - x1) * (y2 - y1))
                assert kept[5 * i + j] == (live[i, j] and share >= 0.3)
                if kept[5 * i + j]:
                    np.testing.assert_allclose(found[5 * i + j], want, atol=1e-5)
        inside = (
            [min(h, c) for c in (corner[0], 2 * h - corner[0])],
            [min(w, c) for c in (corner[1], 2 * w - corner[1])],
        )
        assert np.sum(canvas > 0) == sum(inside[0]) * sum(inside[1])
    ys, xs = zip(*centres, strict=True)
    assert min(ys) == 4 and max(ys) == 12 and min(xs) <= 6 and max(xs) >= 14


def test_a_key_gives_one_result_and_types_stay():
    image = jax.random.uniform(jax.random.key(5), (H, W, 3), jnp.bfloat16)
    label = jnp.eye(4)[0]
    for function in (partial(random_erasing, probability=1.0), partial(cutout, size=5)):
        first, second = (function(jax.random.key(1), image) for _ in range(2))
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))
        assert first.dtype == jnp.bfloat16 and first.shape == image.shape
    for function in (mixup, cutmix):
        mixed, probabilities = jax.jit(function)(jax.random.key(1), image, label, image[::-1], jnp.eye(4)[2])
        assert mixed.dtype == jnp.bfloat16 and probabilities.dtype == jnp.float32
        np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: random_erasing(jax.random.key(0), x[None]), "batches go through vmap"),
        (lambda x: random_erasing(jax.random.key(0), x.astype(jnp.uint8)), "dtype uint8"),
        (lambda x: random_erasing(jax.random.key(0), x, area=(0.5, 0.1)), "areas that rise"),
        (lambda x: random_erasing(jax.random.key(0), x, aspect=3.0), r"aspect in \(0, 1\]"),
        (lambda x: cutout(jax.random.key(0), x, size=0), "size is 0"),
        (lambda x: mixup(jax.random.key(0), x, jnp.eye(2)[0], x[1:], jnp.eye(2)[1]), "expected two of one shape"),
        (lambda x: cutmix(jax.random.key(0), x, jnp.array(1), x, jnp.array(0)), "one_hot"),
        (lambda x: mixup(jax.random.key(0), x, jnp.eye(2)[0], x, jnp.eye(2)[1], alpha=0.0), "alpha is 0"),
        (
            lambda x: mosaic(jax.random.key(0), x, jnp.zeros((4, 2, 4)), jnp.ones((4, 2), bool)),
            r"expected \[4, H, W, C\]",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((H, W, 3)))
