"""A grid of points finds every object once: by a network made by hand, that knows colours, and a tiny SAM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import segment as clicks
from jaxrl import segment_everything as at_work
from jaxrl.nets.vision.sam import SAM, SIZES, prompt
from jaxrl.segment_everything import Everything, propose, segment_everything

TINY = SIZES["tiny"]
SIZE = (60, 80)
DISCS = ((12, 12, 8), (45, 14, 11), (70, 30, 6), (20, 44, 10), (52, 46, 9))
"""(x, y, radius), some of each other's rows and columns."""


@functools.lru_cache
def params():
    init = jax.jit(SAM(TINY).init)
    return init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), prompt(points=jnp.zeros((1, 1, 2))))["params"]


def discs(shapes=DISCS):
    """(an image with a colour for each disc, masks [N, height, width])."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    masks = np.array([(x - a) ** 2 + (y - b) ** 2 <= r * r for a, b, r in shapes])
    image = np.zeros((*SIZE, 3), np.uint8)
    for i, mask in enumerate(masks):
        image[mask] = 20 * (i + 1)
    return image, masks


@jax.jit
def by_colour(part, points):
    """Three masks of each point: all pixels of its colour; everything; those of its colour without certainty.

    Predicted IoUs are 0.95, 0.5 and 0.99, and of the background 0.3.
    """
    column, row = points.astype(jnp.int32).T
    colour = part[row, column, :1]
    same = part[None, ..., 0] == colour[:, :, None]
    logits = jnp.stack([jnp.where(same, 8.0, -8.0), jnp.full(same.shape, 8.0), jnp.where(same, 0.5, -0.5)], axis=1)
    sure = jnp.where(colour > 0, jnp.array([[0.95, 0.5, 0.99]]), 0.3)
    return at_work.describe(logits, sure, lambda x: x, threshold=0.0, offset=1.0)


def look(asked, part):
    part = jnp.asarray(part)

    def answer(points):
        asked.append((part.shape, points.shape))
        return by_colour(part, points)

    return answer


def once(found, masks):
    """Whether these are the masks, each of them once."""
    return sorted(x.mask.tobytes() for x in found) == sorted(mask.tobytes() for mask in masks)


def test_every_disc_is_found_exactly_once():
    image, masks = discs()
    asked = []
    found = propose(functools.partial(look, asked), image, Everything(points_per_side=10, chunk=32))
    assert once(found, masks)
    assert asked == [((60, 80, 3), (32, 2))] * 4  # 100 points, in chunks of one shape
    for x in found:
        rows, columns = np.nonzero(x.mask)
        np.testing.assert_array_equal(x.box, [columns.min(), rows.min(), columns.max(), rows.max()])
        assert x.mask[int(x.point[1]), int(x.point[0])] and x.crop == (0, 0, 80, 60)
        assert x.iou == pytest.approx(0.95) and x.stability == 1


def test_each_filter_is_needed():
    image, masks = discs()
    ask = lambda **how: propose(functools.partial(look, []), image, Everything(points_per_side=10, **how))
    assert len(ask(nms_threshold=1.0)) > 2 * len(masks)  # the same disc from several points
    assert any(x.mask.sum() > 1000 for x in ask(iou_threshold=0.2))  # the background
    assert {x.stability for x in ask(stability_threshold=0.0)} == {0}  # the third mask is surest of itself
    assert not ask(iou_threshold=0.995)


def test_a_disc_between_the_points_is_found_in_a_part_of_the_image():
    image, masks = discs(((16, 20, 2), (55, 40, 12)))
    ask = functools.partial(propose, functools.partial(look, []), image)
    assert once(ask(Everything(points_per_side=5)), masks[1:])
    found = ask(Everything(points_per_side=5, crop_layers=1, crop_edge=2.0))
    assert once(found, masks)
    assert found[0].crop == (0, 0, 50, 40) and found[0].mask[int(found[0].point[1]), int(found[0].point[0])]
    # the large one is cut off by parts, and found in one part or the whole
    assert found[1].crop in ((30, 20, 80, 60), (0, 0, 80, 60))


def test_masks_at_an_edge_of_a_part_go_unless_it_is_the_images():
    image, masks = discs(((40, 30, 14), (0, 0, 10)))
    ask = lambda edge: propose(
        functools.partial(look, []),
        image,
        Everything(points_per_side=8, crop_layers=1, crop_edge=edge, crop_overlap=0.1),
    )
    found = ask(2.0)
    assert once(found, masks)
    by_area = sorted(found, key=lambda x: x.mask.sum())
    assert by_area[0].crop != (0, 0, 80, 60) and by_area[1].crop == (0, 0, 80, 60)
    assert len(ask(-1.0)) > 2  # quarters of the disc in the middle


def test_parts_are_those_of_the_published_code():
    assert at_work.crops((60, 100), 1, 512 / 1500) == [
        (0, (0, 0, 100, 60)),
        (1, (0, 0, 60, 40)),
        (1, (0, 20, 60, 60)),
        (1, (40, 0, 100, 40)),
        (1, (40, 20, 100, 60)),
    ]
    assert len(at_work.crops((600, 1001), 3, 0.3)) == 1 + 4 + 16 + 64
    assert all(right <= 1001 and bottom <= 600 for _, (_, _, right, bottom) in at_work.crops((600, 1001), 3, 0.3))
    np.testing.assert_allclose(at_work.point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])


def test_a_network_is_asked_in_chunks_by_one_program(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (10, 20, 3)).astype(np.uint8)
    everything = Everything(points_per_side=3, chunk=4, iou_threshold=-9, stability_threshold=0, nms_threshold=1)
    at_work._ask.clear_cache()
    traces, describe = [], at_work.describe
    monkeypatch.setattr(at_work, "describe", lambda *given, **known: traces.append(1) or describe(*given, **known))
    found = segment_everything(TINY, params(), image, everything)
    assert len(traces) == 1
    points = at_work.point_grid(3) * np.array([[20, 10]])
    want = clicks.segment(TINY, params(), image, points=points[:, None])
    kept = np.argwhere(np.asarray(want.masks).any(axis=(-2, -1)))
    assert len(found) == len(kept) > 9
    near = {tuple(np.round(x.point, 3)) + (round(x.iou, 3),): x for x in found}
    for i, m in kept:
        x = near[(*np.round(points[i], 3), round(float(want.ious[i, m]), 3))]
        np.testing.assert_array_equal(x.mask, want.masks[i, m])
        assert x.stability == pytest.approx(float(want.stability[i, m]), abs=1e-5)
    assert [x.iou for x in found] == sorted((x.iou for x in found), reverse=True)


def test_only_the_whole_of_an_image_of_floats_has_to_be_bright(monkeypatch):
    monkeypatch.setattr(at_work, "propose", lambda look, image, options: [look(image), look(image[4:])])
    image = np.full((20, 20, 3), 0.5)
    with pytest.raises(ValueError, match="multiply by 255"):
        segment_everything(TINY, params(), image)
    image[:4, :4] = 200.0
    assert len(segment_everything(TINY, params(), image)) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"points_per_side": 0}, "points_per_side is 0, expected 1 or more"),
        ({"crop_overlap": 1.0}, "crop_overlap is 1.0"),
        ({"points_per_side": 4, "crop_layers": 3, "crop_points_divisor": 2}, "less than one"),
    ],
)
def test_settings_that_ask_nothing_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Everything(**how)
    with pytest.raises(ValueError, match="expected .height, width, 3."):
        propose(lambda part: None, np.zeros((4, 4)))
