"""Average precision: worked examples, VOC by a loop, COCO by what tests/golden/make_detection.py stored."""

from pathlib import Path

import numpy as np
import pytest

from jaxrl.detection import (
    Detections,
    Truths,
    average_precision,
    coco_metrics,
    coco_tables,
    iou,
    mask_iou,
    nms,
    voc_metrics,
)

GOLDEN = Path(__file__).parent / "golden" / "detection.npz"
HITS = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 0], bool)


@pytest.fixture(scope="module")
def stored():
    """(detections, truths, arrays) of the golden file."""
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    return *both_of(arrays), arrays


def both_of(arrays):
    return tuple(
        kind(**{k: arrays.get(f"{kind.__name__.lower()}/{k}") for k in kind._fields}) for kind in (Detections, Truths)
    )


@pytest.fixture(scope="module")
def masks(stored):
    """(detections, truths, arrays) of the golden file's masks."""
    arrays = {name[6:]: value for name, value in stored[2].items() if name.startswith("masks/")}
    detections, truths = both_of(arrays)
    sizes = arrays["sizes"][np.concatenate([detections.image, truths.image]) - 1]
    bits = np.unpackbits(arrays["bits"], count=int(sizes.prod(axis=1).sum())).astype(bool)
    all_masks = np.split(bits, np.cumsum(sizes.prod(axis=1))[:-1])
    all_masks = [mask.reshape(size) for mask, size in zip(all_masks, sizes, strict=True)]
    n = len(detections.image)
    return detections._replace(mask=all_masks[:n]), truths._replace(mask=all_masks[n:]), arrays


@pytest.mark.parametrize("points, want", [(11, 0.5480), (None, 0.5317), (101, 0.5325)])
def test_three_rules_on_a_worked_example(points, want):
    assert abs(average_precision(HITS, 7, points=points) - want) < 1e-4


@pytest.mark.parametrize("points", [None, 11, 101])
def test_edges_of_average_precision(points):
    assert average_precision(np.ones(3, bool), 3, points=points) == pytest.approx(1)
    assert average_precision(np.zeros(3, bool), 3, points=points) == 0
    assert average_precision(np.zeros(0, bool), 3, points=points) == 0
    assert np.isnan(average_precision(np.zeros(2, bool), 0, points=points))
    # detections after the last hit, and misses that a hit follows, do not count
    assert average_precision([1, 0, 0], 2, points=points) == average_precision([1], 2, points=points)
    # many points come near the area of the envelope
    assert average_precision(HITS, 7, points=100_001) == pytest.approx(average_precision(HITS, 7), abs=1e-4)


def test_iou_of_boxes_crowds_and_pixels():
    box = np.array([[0, 0, 4, 4], [10, 10, 11, 11], [2, 2, 2, 2]], float)
    other = np.array([[2, 0, 6, 4], [0, 0, 4, 4]], float)
    np.testing.assert_allclose(iou(box, other), [[8 / 24, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(iou(box, other, crowd=np.array([True, False])), [[0.5, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(iou(box, other, border=1.0)[0], [15 / 35, 1])


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.7])
def test_suppression_equals_torchvision(stored, threshold):
    _, _, arrays = stored
    kept = nms(arrays["nms/box"], arrays["nms/score"], threshold=threshold)
    np.testing.assert_array_equal(kept, arrays[f"nms/kept_{threshold}"])
    assert 10 < len(kept) < len(arrays["nms/box"])


def test_edges_of_suppression():
    assert nms(np.zeros((0, 4)), np.zeros(0), threshold=0.5).shape == (0,)
    with pytest.raises(ValueError, match=r"box has shape \(4,\)"):
        nms(np.zeros(4), np.zeros(1), threshold=0.5)
    with pytest.raises(ValueError, match="expected .* numbers"):
        nms(np.zeros((1, 4)), np.array([np.nan]), threshold=0.5)


def test_coco_equals_pycocotools(stored):
    detections, truths, arrays = stored
    categories, precision, recall = coco_tables(detections, truths)
    np.testing.assert_array_equal(categories, [1, 2, 3, 4, 5])
    for got, want in ((precision, arrays["precision"]), (recall, arrays["recall"])):
        np.testing.assert_allclose(np.nan_to_num(got, nan=-1), want, atol=1e-12)
    np.testing.assert_allclose(list(coco_metrics(detections, truths).values()), arrays["stats"], atol=1e-12)
    assert (arrays["recall"] == -1).any() and (arrays["recall"][:, 0, 0] == 0).all()


def test_coco_of_masks_equals_pycocotools(masks):
    detections, truths, arrays = masks
    assert detections.box is None and truths.ignored.any()
    _, precision, recall = coco_tables(detections, truths, masks=True)
    for got, want in ((precision, arrays["precision"]), (recall, arrays["recall"])):
        np.testing.assert_allclose(np.nan_to_num(got, nan=-1), want, atol=1e-12)
    found = coco_metrics(detections, truths, masks=True)
    np.testing.assert_allclose(list(found.values()), arrays["stats"], atol=1e-12)
    assert 0.2 < found["AP"] < 0.9 and min(found[f"AP_{size}"] for size in ("small", "medium", "large")) > 0.1


def test_iou_of_masks_and_crowds(monkeypatch):
    draw = np.random.default_rng(0)
    mask, other = draw.random((3, 20, 30)) < 0.3, draw.random((4, 20, 30)) < 0.6
    mask[2] = False
    crowd = np.array([True, False, False, True])
    both = [[(a & b).sum() for b in other] for a in mask]
    either = [[(a.sum() if c else (a | b).sum()) for b, c in zip(other, crowd, strict=True)] for a in mask]
    want = np.array(both) / np.maximum(either, 1)
    np.testing.assert_allclose(mask_iou(mask, other, crowd=crowd), want)
    monkeypatch.setattr("jaxrl.detection.PIXELS", 7)
    np.testing.assert_allclose(mask_iou(mask, other, crowd=crowd), want)
    assert mask_iou(mask[:0], other).shape == (0, 4)


@pytest.mark.parametrize("name", [lambda i: f"{i:03}.png", lambda i: (i // 4, i % 4), lambda i: i / 8])
def test_images_may_have_any_names(stored, name):
    detections, truths, arrays = stored
    named = [x._replace(image=[name(int(i)) for i in x.image]) for x in (detections, truths)]
    np.testing.assert_allclose(list(coco_metrics(*named).values()), arrays["stats"], atol=1e-12)
    assert voc_metrics(*named) == voc_metrics(detections, truths)


def test_coco_does_not_depend_on_order_where_nothing_is_equal(stored):
    detections, truths, _ = stored
    truths = Truths(*(field[:-12] for field in truths[:5]))  # the last twelve are pairs that a detection overlaps alike
    draw = np.random.default_rng(0)
    detections = detections._replace(score=detections.score + draw.uniform(0, 0.01, len(detections.score)))
    want = coco_tables(detections, truths).precision
    moved = [
        type(x)(*(field[order] for field in x if field is not None))
        for x in (detections, truths)
        for order in [draw.permutation(len(x[0]))]
    ]
    np.testing.assert_allclose(coco_tables(*moved).precision, want, atol=1e-12)


def slow_voc(detections, truths, category, threshold, border):
    """(hits by falling score without those that do not count, objects), as VOC's development kit reads."""
    order = sorted(range(len(detections.score)), key=lambda i: -detections.score[i])
    taken, hits = set(), []
    for i in order:
        if detections.category[i] != category:
            continue
        x1, y1, x2, y2 = detections.box[i]
        best, object_of = -1.0, None
        for j, (image, its, (a1, b1, a2, b2), *_) in enumerate(zip(*truths[:3], strict=True)):
            if image != detections.image[i] or its != category:
                continue
            w, h = min(x2, a2) - max(x1, a1) + border, min(y2, b2) - max(y1, b1) + border
            if w <= 0 or h <= 0:
                continue
            areas = (x2 - x1 + border) * (y2 - y1 + border) + (a2 - a1 + border) * (b2 - b1 + border)
            if w * h / (areas - w * h) > best:
                best, object_of = w * h / (areas - w * h), j
        if best >= threshold:
            if truths.ignored[object_of]:
                continue
            hits.append(object_of not in taken)
            taken.add(object_of)
        else:
            hits.append(False)
    return np.array(hits, bool), int(np.sum((truths.category == category) & ~truths.ignored))


@pytest.mark.parametrize("threshold, points, border", [(0.5, 11, 1.0), (0.5, None, 0.0), (0.75, None, 0.0)])
def test_voc_equals_a_loop(stored, threshold, points, border):
    detections, truths, _ = stored
    found = voc_metrics(detections, truths, threshold=threshold, points=points, border=border)
    for category in (1, 2, 3, 4):
        hits, positives = slow_voc(detections, truths, category, threshold, border)
        want = average_precision(hits, positives, points=points)
        assert found[f"AP/{category}"] == pytest.approx(want, abs=1e-12)
    assert "AP/5" not in found and found["AP/1"] == 0
    assert found["mAP"] == pytest.approx(np.mean([found[f"AP/{k}"] for k in (1, 2, 3, 4)]))


def test_a_second_detection_misses_by_voc_though_another_object_is_near_but_not_by_coco():
    box = np.array([[0, 0, 10, 10], [0, 0, 10, 8]], float)
    truths = Truths(np.zeros(2, int), np.zeros(2, int), box)
    detections = Detections(np.zeros(2, int), np.zeros(2, int), box[[0, 0]], np.array([0.9, 0.8]))
    assert voc_metrics(detections, truths)["mAP"] == pytest.approx(0.5)
    assert coco_metrics(detections, truths)["AP50"] == pytest.approx(1)


def test_nothing_at_all():
    empty = (np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)))
    detections, truths = Detections(*empty, np.zeros(0)), Truths(*empty)
    assert np.isnan(voc_metrics(detections, truths)["mAP"])
    assert np.isnan(list(coco_metrics(detections, truths).values())).all()
    one = Truths(np.zeros(1, int), np.zeros(1, int), np.array([[0, 0, 50, 50.0]]))
    nothing = Detections([], [], [], [])
    assert coco_metrics(nothing, one) == pytest.approx(coco_metrics(detections, one), nan_ok=True)
    assert coco_tables(nothing, one).categories.dtype == int
    assert voc_metrics(nothing, one) == {"mAP": 0, "AP/0": 0} and nms([], [], threshold=0.5).shape == (0,)
    masked = Truths(["a"], [0], None, mask=[np.ones((50, 50), bool)])
    found = coco_metrics(nothing._replace(box=None, mask=[]), masked, masks=True)
    assert found == pytest.approx(coco_metrics(nothing, one), nan_ok=True)
    found = coco_metrics(detections, one)
    assert found["AP"] == found["AR_1"] == found["AP_medium"] == 0 and np.isnan(found["AP_small"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box": np.zeros((2, 4))}, r"detections have fields of shapes .* expected \[N\]"),
        ({"box": np.array([[5, 5, 2, 2.0]])}, "x1 <= x2"),
        ({"box": np.array([[0, 0, np.inf, 2.0]])}, "finite"),
        ({"score": np.array([np.nan])}, "score 0 is NaN"),
        ({"box": None}, "detections have no box, which is to be judged: give it, or masks=True"),
        ({"image": ["a"]}, "names that do not sort"),
        ({"image": [[0]]}, "names that do not sort"),
    ],
)
def test_bad_input_is_refused(fields, message):
    good = Detections(np.zeros(1, int), np.zeros(1, int), np.array([[0, 0, 1, 1.0]]), np.ones(1))
    with pytest.raises(ValueError, match=message):
        coco_metrics(good._replace(**fields), Truths(*good[:3]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "detections have no mask"),
        ([np.ones((4, 5), bool)] * 2, "detections have 2 masks, expected 1"),
        ([np.ones(4, bool)], r"mask 0 of shape \(4,\), expected 1, each .height, width."),
        ([np.ones((4, 6), bool)], r"sizes \(4, 6\) and \(4, 5\), expected one"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    truths = Truths([0], [0], None, mask=[np.ones((4, 5), bool)])
    with pytest.raises(ValueError, match=message):
        coco_metrics(Detections([0], [0], None, [0.5], mask=mask), truths, masks=True)


def test_bad_hits_are_refused():
    with pytest.raises(ValueError, match="2 found of 1 objects"):
        average_precision([1, 1], 1)
    with pytest.raises(ValueError, match="points is 1"):
        average_precision([1], 1, points=1)
