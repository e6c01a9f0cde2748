"""How well boxes or masks were found: average precision by the rules of PASCAL VOC 2007, VOC 2010 and COCO.

Boxes are (x1, y1, x2, y2) in continuous coordinates. Images are named by numbers, texts, tuples or whatever else can be
hashed and sorted. A detection of higher score chooses first; among equal scores the one that stands earlier does (COCO:
that of the image whose name sorts first, then the earlier). NumPy alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
COCO_AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
PIXELS = 1 << 16
COCO_LIMITS = (1, 10, 100)  # detections of an image and category that count


class Detections(NamedTuple):
    """Boxes or masks that a detector gave.

    image: [N]. category: int [N]. box: float [N, 4], or None where masks are judged. score: float [N]. mask: N of bool
    [height, width], each of its image's size, or None where boxes are judged.
    """

    image: Any
    category: np.ndarray
    box: Any
    score: np.ndarray
    mask: Sequence[np.ndarray] | None = None


class Truths(NamedTuple):
    """Boxes or masks that there are.

    image: [M]. category: int [M]. box: float [M, 4], or None where masks are judged. ignored: bool [M], COCO's crowds
    and VOC's difficult objects, whose detections count neither for nor against; None: none. area: float [M], by which
    COCO tells small, medium and large (that of the mask, where there is one); None: of what is judged. mask: as that of
    `Detections`.
    """

    image: Any
    category: np.ndarray
    box: Any
    ignored: np.ndarray | None = None
    area: np.ndarray | None = None
    mask: Sequence[np.ndarray] | None = None


class CocoTables(NamedTuple):
    """COCO's figures one by one; NaN where a category has no object of the size.

    categories: int [K]. precision, recall: [10 thresholds, K, 4 areas, 3 limits], the mean precision over 101 points of
    recall, and the recall of all detections.
    """

    categories: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def iou(box: np.ndarray, other: np.ndarray, *, crowd: np.ndarray | None = None, border: float = 0.0) -> np.ndarray:
    """Intersection over union, [N, M]; for a crowd, intersection over the area of `box`.

    Args:
      box: [N, 4].
      other: [M, 4].
      crowd: bool [M] or None.
      border: added to widths and heights: 1 where corners are pixels that belong to the box, as in VOC's code.
    """
    corner = np.maximum(box[:, None, :2], other[None, :, :2]), np.minimum(box[:, None, 2:], other[None, :, 2:])
    both = np.prod(np.clip(corner[1] - corner[0] + border, 0, None), axis=-1)
    own, others = (np.prod(x[:, 2:] - x[:, :2] + border, axis=-1) for x in (box, other))
    return _ratio(both, own, others, crowd)


def mask_iou(mask: np.ndarray, other: np.ndarray, *, crowd: np.ndarray | None = None) -> np.ndarray:
    """`iou` of masks, bool [N, height, width] and [M, height, width] -> [N, M]."""
    mask, other = (np.asarray(x, bool).reshape(len(x), int(np.prod(np.shape(x)[1:]))) for x in (mask, other))
    both = np.zeros((len(mask), len(other)))
    for at in range(0, mask.shape[1], PIXELS):  # sums that float32 has exactly, in bounded memory
        both += mask[:, at : at + PIXELS].astype(np.float32) @ other[:, at : at + PIXELS].astype(np.float32).T
    own, others = (np.sum(x, axis=1, dtype=float) for x in (mask, other))
    return _ratio(both, own, others, crowd)


def _ratio(both, own, others, crowd):
    """Intersections [N, M] and areas [N], [M] -> IoU; over the area alone for a crowd."""
    union = own[:, None] + others[None] - both
    union = union if crowd is None else np.where(crowd[None], own[:, None], union)
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def nms(box: np.ndarray, score: np.ndarray, *, threshold: float) -> np.ndarray:
    """Greedy suppression of what is not maximal: which boxes are kept, int [K], by falling score.

    The best box that is left is kept, and those whose `iou` with it exceeds the threshold go, until none is left. It is
    torchvision.ops.nms.

    Args:
      box: [N, 4]. score: [N]. threshold: on `iou`.

    Raises:
      ValueError: shapes that do not fit, or a score that is NaN.
    """
    box, score = _boxes(box), np.asarray(score, float)
    if score.ndim != 1 or box.shape != (len(score), 4) or np.isnan(score).any():
        raise ValueError(f"box has shape {box.shape}, score {score.shape}, expected [N, 4] and numbers [N]")
    left, kept = np.argsort(-score, kind="stable"), []
    while len(left):
        kept.append(left[0])
        left = left[1:][iou(box[left[:1]], box[left[1:]])[0] <= threshold]
    return np.array(kept, int)


def average_precision(hits: np.ndarray, positives: int, *, points: int | None = None) -> float:
    """Precision averaged over recall.

        p_i = hits of the first i / i,   r_i = hits of the first i / positives,   p(r) = max of p_i with r_i >= r, or 0
        points None: sum_i (r_i - r_{i-1}) p(r_i), the area (VOC 2010 on)
        points n:    mean of p(k / (n - 1)), k = 0 ... n - 1 (VOC 2007: n = 11; COCO: n = 101)

    (Everingham et al. 2010, "The PASCAL Visual Object Classes (VOC) challenge"; Lin et al. 2014, arXiv:1405.0312.)
    Recalls are compared as floats, as in COCO's code: 7 of 10 does not reach the level 0.7000000000000001.

    Args:
      hits: bool [N], whether each detection found an object, by falling score. A second one of the same object did not.
      positives: how many objects there are.
      points: levels of recall, or None.

    Returns:
      A number in [0, 1]; NaN without objects.

    Raises:
      ValueError: more hits than objects, or fewer than two points.
    """
    hits = np.asarray(hits, bool)
    if hits.ndim != 1 or hits.sum() > positives:
        raise ValueError(
            f"hits of shape {hits.shape} with {hits.sum()} found of {positives} objects: expected [N], and at most one "
            "hit for each object"
        )
    if points is not None and points < 2:
        raise ValueError(f"points is {points}, expected None (the area), 11, 101 or another number above 1")
    if not positives:
        return float("nan")
    found = np.cumsum(hits)
    recall, precision = found / positives, found / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if points is None:
        return float(np.sum(np.diff(recall, prepend=0.0) * best))
    first = np.searchsorted(recall, np.linspace(0, 1, points), side="left")
    return float(np.sum(best[first[first < len(hits)]]) / points)


def voc_metrics(
    detections: Detections,
    truths: Truths,
    *,
    threshold: float = 0.5,
    points: int | None = None,
    border: float = 0.0,
) -> dict[str, float]:
    """Average precision of each category by VOC's rule, and their mean.

    A detection belongs to the object of its image and category that it overlaps most. It is a hit if that overlap is
    at least the threshold and no detection of higher score has the object already; with an ignored object it does not
    count.

    Args:
      detections, truths: of all images.
      threshold: on `iou`.
      points: None for VOC 2010 and later, 11 for VOC 2007.
      border: 1 for VOC's own files, whose corners are pixels (see `iou`).

    Returns:
      {"mAP": ..., "AP/CATEGORY": ...}, over the categories that have an object which is not ignored.
    """
    detections, truths, ignored, _, _ = _checked(detections, truths)
    found = {}
    for category in np.unique(truths.category[~ignored]):
        mine, order = truths.category == category, np.argsort(-detections.score, kind="stable")
        order = order[detections.category[order] == category]
        object_of = np.full(len(order), -1)
        for image in np.unique(detections.image[order]):
            there = np.flatnonzero(mine & (truths.image == image))
            given = np.flatnonzero(detections.image[order] == image)
            if len(there):
                overlap = iou(detections.box[order[given]], truths.box[there], border=border)
                enough = overlap.max(axis=1) >= threshold
                object_of[given] = np.where(enough, there[overlap.argmax(axis=1)], -1)
        first = np.zeros(len(order), bool)
        first[np.unique(object_of, return_index=True)[1]] = True
        counts = (object_of < 0) | ~ignored[object_of]
        hits = (first & (object_of >= 0))[counts]
        found[f"AP/{category}"] = average_precision(hits, int(np.sum(mine & ~ignored)), points=points)
    return {"mAP": float(np.mean(list(found.values()))) if found else float("nan"), **found}


def coco_metrics(detections: Detections, truths: Truths, *, masks: bool = False) -> dict[str, float]:
    """The twelve figures of COCO (Lin et al. 2014, arXiv:1405.0312), equal to those of pycocotools for boxes and masks.

    AP is the mean over categories and over the thresholds 0.50, 0.55 ... 0.95 on `iou`, of the 100 best detections of
    an image and category; AP50 and AP75 are those of one threshold; AP_small, _medium and _large count objects of areas
    below 32^2, 96^2 and above. AR_1, AR_10 and AR_100 are the recall of so many detections; AR_small ... of 100.
    NaN stands where pycocotools says -1: there is no such object.

    Args:
      detections, truths: of all images; nothing at all may be given as [].
      masks: whether masks are judged, by `mask_iou` (pycocotools: iouType "segm"), or boxes.

    Raises:
      ValueError: fields that do not fit each other, boxes that are none, or masks of several sizes in an image.
    """
    _, precision, recall = coco_tables(detections, truths, masks=masks)

    def mean(table, thresholds: Any = slice(None), area="all", limit=100):
        values = table[thresholds, :, list(COCO_AREAS).index(area), COCO_LIMITS.index(limit)]
        return float(np.mean(values[~np.isnan(values)])) if (~np.isnan(values)).any() else float("nan")

    sizes = ("small", "medium", "large")
    return {
        "AP": mean(precision),
        "AP50": mean(precision, thresholds=0),
        "AP75": mean(precision, thresholds=5),
        **{f"AP_{area}": mean(precision, area=area) for area in sizes},
        **{f"AR_{limit}": mean(recall, limit=limit) for limit in COCO_LIMITS},
        **{f"AR_{area}": mean(recall, area=area) for area in sizes},
    }


def coco_tables(detections: Detections, truths: Truths, *, masks: bool = False) -> CocoTables:
    """What `coco_metrics` averages.

    In each image and category the 100 best detections choose in turn, at every threshold and for every range of areas:
    the free object of largest IoU that is not ignored; else an ignored one (outside the range, or a crowd, which
    any number may choose). Those that chose an ignored object, and those that found none and lie outside the range
    themselves, do not count.
    """
    detections, truths, ignored, area, found_area = _checked(detections, truths, masks)
    ranges = np.array(list(COCO_AREAS.values()))
    categories = np.unique(np.concatenate([detections.category, truths.category]))
    shape = (len(COCO_THRESHOLDS), len(categories), len(ranges), len(COCO_LIMITS))
    precision, recall = np.full(shape, np.nan), np.full(shape, np.nan)
    for k, category in enumerate(categories):
        given, there = (_by_image(x.image, x.category == category) for x in (detections, truths))
        scores, ranks, hits, counts = [], [], [], []
        for image in sorted(given):
            chosen = given[image][np.argsort(-detections.score[given[image]], kind="stable")[: max(COCO_LIMITS)]]
            objects = there.get(image, np.zeros(0, int))
            out = ignored[objects] | _outside(area[objects], ranges)
            overlap = _overlap(detections, truths, chosen, objects, ignored[objects], masks)
            hit, count = _choose(overlap, ignored[objects], out, _outside(found_area[chosen], ranges))
            scores.append(detections.score[chosen])
            ranks.append(np.arange(len(chosen)))
            hits.append(hit)
            counts.append(count)
        mine = truths.category == category
        positives = np.sum(~(ignored[mine] | _outside(area[mine], ranges)), axis=-1)
        if not scores:
            recall[:, k, positives > 0], precision[:, k, positives > 0] = 0.0, 0.0
            continue
        order = np.argsort(-np.concatenate(scores), kind="stable")
        rank, hit, count = (np.concatenate(x, axis=-1)[..., order] for x in (ranks, hits, counts))
        for a, t, m in np.ndindex(len(ranges), len(COCO_THRESHOLDS), len(COCO_LIMITS)):
            if positives[a]:
                kept = hit[a, t, count[a, t] & (rank < COCO_LIMITS[m])]
                precision[t, k, a, m] = average_precision(kept, int(positives[a]), points=101)
                recall[t, k, a, m] = np.sum(kept) / positives[a]
    return CocoTables(categories, precision, recall)


def _choose(overlap, crowd, out, away):
    """Which detections hit and which count, bool [A, T, D] each.

    overlap: [D, G], detections by falling score. crowd: [G]. out: [A, G], ignored objects. away: [A, D].
    """
    limits = np.minimum(COCO_THRESHOLDS, 1 - 1e-10)[:, None]
    d, g = overlap.shape
    hit, count = np.zeros((2, len(out), len(limits), d), bool)
    free, out = np.ones((len(out), len(limits), g), bool), out[:, None]
    for i in range(d):
        able = (free | crowd) & (overlap[i] >= limits)
        wanted = able & ~out
        wanted = np.where(wanted.any(axis=-1, keepdims=True), wanted, able)
        best = np.where(wanted, overlap[i], -1.0)
        # the last of equal ones
        chosen = wanted & (np.arange(g) == g - 1 - np.argmax(best[..., ::-1], axis=-1, keepdims=True)) if g else wanted
        found, useless = chosen.any(axis=-1), (chosen & out).any(axis=-1)
        free &= ~chosen
        hit[..., i] = found & ~useless
        count[..., i] = np.where(found, ~useless, ~away[:, None, i])
    return hit, count


def _overlap(detections, truths, chosen, objects, crowd, masks):
    if not masks:
        return iou(detections.box[chosen], truths.box[objects], crowd=crowd)
    if not len(objects):
        return np.zeros((len(chosen), 0))
    return mask_iou(
        *(np.stack([x.mask[i] for i in at]) for x, at in ((detections, chosen), (truths, objects))), crowd=crowd
    )


def _by_image(image, mine):
    """{image: indices in it}, of those that are mine."""
    found: dict[int, list[int]] = {}
    for i in np.flatnonzero(mine):
        found.setdefault(int(image[i]), []).append(int(i))
    return {key: np.array(value) for key, value in found.items()}


def _boxes(box):
    """As floats; nothing at all as [0, 4]."""
    box = np.asarray(box, float)
    return box.reshape(-1, 4) if box.shape == (0,) else box


def _area(box):
    return np.prod(box[:, 2:] - box[:, :2], axis=-1)


def _outside(area, ranges):
    """bool [A, N]."""
    return (area[None] < ranges[:, :1]) | (area[None] > ranges[:, 1:])


def _checked(detections, truths, masks=False):
    """Both as arrays with numbered images, which truths are ignored, and the areas of truths and of detections."""
    names, areas = ("detections", "truths"), []
    numbers = _numbered(detections.image, truths.image)
    known = [np.asarray(x.category) for x in (detections, truths)]
    known = [mine if mine.size else mine.astype(known[1 - i].dtype) for i, mine in enumerate(known)]
    given = [
        x._replace(image=number, category=category, box=None if x.box is None else _boxes(x.box))
        for x, number, category in zip((detections, truths), numbers, known, strict=True)
    ]
    for name, x in zip(names, given, strict=True):
        what = "mask" if masks else "box"
        if getattr(x, what) is None:
            raise ValueError(f"{name} have no {what}, which is to be judged: give it, or masks={not masks}")
        n = len(x.image)
        rest = {key: np.shape(value) for key, value in x._asdict().items() if key != "mask" and value is not None}
        if any(shape != ((n, 4) if key == "box" else (n,)) for key, shape in rest.items()):
            raise ValueError(
                f"{name} have fields of shapes {list(rest.values())}, expected [N], [N], [N, 4] and [N] of one N"
            )
        areas.append(_mask_areas(name, x) if masks else _box_areas(name, x.box))
    if masks:
        _check_sizes(given)
    detections, truths = given
    score = np.asarray(detections.score, float)
    if np.isnan(score).any():
        raise ValueError(f"detections: score {np.flatnonzero(np.isnan(score))[0]} is NaN, expected a number")
    n = len(truths.image)
    ignored = np.zeros(n, bool) if truths.ignored is None else np.asarray(truths.ignored, bool)
    area = areas[1] if truths.area is None else np.asarray(truths.area, float)
    return detections._replace(score=score), truths, ignored, area, areas[0]


def _numbered(*images):
    """The names of images as the numbers 0, 1, ... in their order, an array for each list."""
    lists = [x.tolist() if isinstance(x, np.ndarray) else list(x) for x in images]
    try:
        number = {name: i for i, name in enumerate(sorted({name for names in lists for name in names}))}
    except TypeError as error:
        raise ValueError(
            f"image has names that do not sort ({error}), expected [N] of one kind: int, str ..."
        ) from error
    return [np.array([number[name] for name in names], int) for names in lists]


def _box_areas(name, box):
    if not np.isfinite(box).all() or (box[:, 2:] < box[:, :2]).any():
        worst = np.flatnonzero(~(box[:, 2:] >= box[:, :2]).all(axis=1) | ~np.isfinite(box).all(axis=1))[0]
        raise ValueError(
            f"{name}: box {worst} is {box[worst]}, expected finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2; "
            "COCO's files have (x, y, width, height)"
        )
    return _area(box)


def _mask_areas(name, x):
    shapes = [np.shape(mask) for mask in x.mask]
    wrong = [i for i, shape in enumerate(shapes) if len(shape) != 2]
    if len(shapes) != len(x.image) or wrong:
        odd = f", mask {wrong[0]} of shape {shapes[wrong[0]]}" if wrong else ""
        raise ValueError(f"{name} have {len(shapes)} masks{odd}, expected {len(x.image)}, each [height, width]")
    return np.array([np.count_nonzero(mask) for mask in x.mask], float)


def _check_sizes(given):
    size: dict[int, tuple[int, ...]] = {}
    for x in given:
        for number, mask in zip(x.image, x.mask, strict=True):
            if size.setdefault(int(number), np.shape(mask)) != np.shape(mask):
                raise ValueError(
                    f"masks of one image have sizes {size[int(number)]} and {np.shape(mask)}, expected one: resize "
                    "them to the image"
                )
