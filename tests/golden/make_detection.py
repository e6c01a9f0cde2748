"""Write the golden values of tests/test_detection.py: random detections and COCO's figures for them.

Run it in an environment of its own with pycocotools and torchvision (they are no dependencies of this project):

    python tests/golden/make_detection.py

made with pycocotools 2.0.11 and torchvision 0.28.0. detection.npz holds
  detections/FIELD, truths/FIELD   as `jaxrl.detection` takes them
  precision, recall   [10 thresholds, categories, 4 areas, 3 limits], precision averaged over recall, -1: no object
  stats               the twelve figures
Coordinates are quarters, so that widths, areas and IoU are exact; scores have one digit, so that many are equal. There
are crowds, areas of their own, images without objects, without detections, with more than 100, categories without
objects and without detections, detections on top of each other, and overlaps of exactly a threshold.
  masks/...                        the same of ellipses in images 1, 2, ... of several sizes ([images, 2]); bits: all
                                   masks of the detections, then of the truths, in one row, eight pixels a byte
  nms/box, nms/score, nms/kept_T   boxes and scores, copies and boxes without an area among them, and what
                                   torchvision.ops.nms keeps at threshold T
"""

from pathlib import Path

import numpy as np
import torch
import torchvision
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IMAGES, CATEGORIES = 16, 5


def boxes(draw, n):
    """(x1, y1, x2, y2) in quarters; sides from 4 to 200."""
    corner = draw.integers(0, 400, (n, 2)) / 4
    sides = np.round(4 * np.exp(draw.uniform(np.log(4), np.log(200), (n, 2)))) / 4
    return np.concatenate([corner, corner + sides], axis=1)


def suppressed():
    """Boxes, scores and what torchvision keeps of them."""
    draw = np.random.default_rng(1)
    box = boxes(draw, 120)
    half = box[:10].copy()  # IoU exactly 0.5
    half[:, 2] = (half[:, 0] + half[:, 2]) / 2
    flat = box[10:20].copy()
    flat[:, 3] = flat[:, 1]
    box = np.concatenate([box, half, flat, flat[:5], box[20:30]])
    score = draw.integers(0, 20, len(box)) / 20
    ask = lambda threshold: torchvision.ops.nms(torch.tensor(box), torch.tensor(score), threshold).numpy()
    return {"nms/box": box, "nms/score": score} | {f"nms/kept_{x}": ask(x) for x in (0.25, 0.5, 0.7)}


def corners(box):
    """(x, y, width, height), as COCO's files have it."""
    return [float(x) for x in (*box[:2], *(box[2:] - box[:2]))]


def evaluated(kind, truths, detections, shapes, sizes):
    """pycocotools' evaluation of "bbox" or "segm", shapes of the truths and of the detections."""
    field = {"bbox": "bbox", "segm": "segmentation"}[kind]
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i + 1, "height": int(h), "width": int(w)} for i, (h, w) in enumerate(sizes)],
        "categories": [{"id": k} for k in range(1, CATEGORIES + 1)],
        "annotations": [
            {"id": i + 1, "image_id": int(image), "category_id": int(category), field: shape,
             "iscrowd": int(ignored), "area": float(area)}
            for i, (image, category, ignored, area, shape) in enumerate(
                zip(*(truths[name] for name in ("image", "category", "ignored", "area")), shapes[0], strict=True)
            )
        ],
    }  # fmt: skip
    coco.createIndex()
    results = [
        {"image_id": int(image), "category_id": int(category), field: shape, "score": float(score)}
        for image, category, score, shape in zip(
            *(detections[name] for name in ("image", "category", "score")), shapes[1], strict=True
        )
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def tables(evaluation):
    """What is stored of an evaluation."""
    precision, recall = evaluation.eval["precision"].mean(1), evaluation.eval["recall"]
    return {"precision": precision, "recall": recall, "stats": evaluation.stats}


def of_masks():
    """Ellipses, of which a tenth are crowds, ellipses near them, two empty masks, and COCO's figures."""
    draw = np.random.default_rng(2)
    images, m, n = 6, 70, 160
    sizes = draw.integers(100, 160, (images, 2))

    def ellipse(image, a, b, rx, ry):
        y, x = np.mgrid[: sizes[image - 1, 0], : sizes[image - 1, 1]]
        return ((x - a) / rx) ** 2 + ((y - b) / ry) ** 2 <= 1

    place = np.concatenate([draw.integers(0, 150, (m, 2)), np.exp(draw.uniform(1, 4.4, (m, 2))).astype(int)], axis=1)
    place[:12] = draw.integers([50, 40, 60, 60], [90, 80, 75, 75], (12, 4))
    truths = {"image": draw.integers(1, images, m), "category": draw.integers(1, CATEGORIES, m)}
    truths["ignored"] = draw.random(m) < 0.1
    near = draw.choice(m, n)
    moved = np.maximum(place[near] + draw.integers(-3, 4, (n, 4)) * draw.choice([0, 1, 3], (n, 1)), 1)
    stray = draw.random(n) < 0.1
    detections = {
        "image": np.where(stray, draw.integers(1, images + 1, n), truths["image"][near]),
        "category": np.where(stray, draw.integers(1, CATEGORIES + 1, n), truths["category"][near]),
        "score": draw.integers(0, 10, n) / 10,
    }
    detections["category"][2:5] = CATEGORIES
    there = [ellipse(i, *at) for i, at in zip(truths["image"], place, strict=True)]
    given = [ellipse(i, *at) for i, at in zip(detections["image"], moved, strict=True)]
    given[0][:], given[1][:] = False, False
    truths["area"] = np.array([x.sum() for x in there]) * draw.choice([0.8, 1.0], m)
    shapes = [[rle.encode(np.asfortranarray(x, np.uint8)) for x in masks] for masks in (there, given)]
    arrays = {f"detections/{k}": v for k, v in detections.items()} | {f"truths/{k}": v for k, v in truths.items()}
    arrays |= tables(evaluated("segm", truths, detections, shapes, sizes))
    arrays |= {"sizes": sizes, "bits": np.packbits(np.concatenate([x.ravel() for x in (*given, *there)]))}
    return {f"masks/{name}": value for name, value in arrays.items()}


def main():
    draw = np.random.default_rng(0)
    truths = {"image": draw.integers(1, IMAGES - 1, 120), "category": draw.integers(1, CATEGORIES, 120)}
    truths |= {"box": boxes(draw, 120), "ignored": draw.random(120) < 0.1}
    truths["area"] = np.round(
        np.prod(truths["box"][:, 2:] - truths["box"][:, :2], axis=1) * draw.uniform(0.6, 1, 120), 2
    )
    # crowds where other objects are, and pairs of objects 8 apart, of which the first detection overlaps both alike
    crowds = {key: value[20:40].copy() for key, value in truths.items()} | {"ignored": np.ones(20, bool)}
    at = 50.0 * np.arange(6)[:, None] + np.array([[0, 0, 20, 20]])
    pairs = {"image": np.full(12, 14), "category": np.full(12, 3), "box": np.concatenate([at, at + [8, 0, 8, 0]])}
    pairs |= {"ignored": np.zeros(12, bool), "area": np.full(12, 400.0)}
    truths = {key: np.concatenate([truths[key], crowds[key], pairs[key]]) for key in truths}
    near = draw.choice(120, 420)  # detections near objects, copies of one another among them, and elsewhere
    moved = truths["box"][near] + draw.integers(-12, 13, (420, 4)) * draw.choice([0, 0.25, 0.5, 1.0], (420, 1))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 0.25)
    half = truths["box"][:20].copy()  # IoU exactly 0.5 and 0.75
    half[:, 2] = half[:, 0] + (half[:, 2] - half[:, 0]) * np.where(np.arange(20) % 2, 0.5, 0.75)
    crowded = boxes(draw, 130)
    rest = boxes(draw, 60)
    detections = {
        "image": [truths["image"][near], truths["image"][:20], np.full(130, 3), draw.integers(1, IMAGES, 60),
                  np.full(12, 14)],
        "category": [truths["category"][near], truths["category"][:20], np.full(130, 2),
                     draw.integers(2, CATEGORIES + 1, 60), np.full(12, 3)],
        "box": [moved, half, crowded, rest, at + [4, 0, 4, 0], at + [10, 0, 10, 0]],
        "score": [*(draw.integers(0, 10, n) / 10 for n in (420, 20, 130, 60)), np.full(6, 0.95), np.full(6, 0.92)],
    }  # fmt: skip
    detections = {key: np.concatenate(value) for key, value in detections.items()}
    # category 1 has objects but no detections, category 5 the reverse; the last image has neither
    kept = detections["category"] != 1
    detections = {key: value[kept] for key, value in detections.items()}

    shapes = [[corners(box) for box in x["box"]] for x in (truths, detections)]
    evaluation = evaluated("bbox", truths, detections, shapes, np.full((IMAGES, 2), 1000))
    arrays = {f"detections/{k}": v for k, v in detections.items()} | {f"truths/{k}": v for k, v in truths.items()}
    arrays |= suppressed() | of_masks() | tables(evaluation)
    path = Path(__file__).parent / "detection.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
