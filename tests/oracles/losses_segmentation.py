"""Segmentation losses in float64, pixel by pixel, from the papers. Masks are nested [height][width]."""

import math


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def pixels(logits, target):
    """(logit, whether it belongs to the object) of each pixel."""
    for row, wanted in zip(logits, target, strict=True):
        for x, y in zip(row, wanted, strict=True):
            yield float(x), bool(y)


def focal(logits, target, alpha=0.25, gamma=2.0):
    """Lin et al. 2017, equations 2 to 5."""
    values = []
    for x, y in pixels(logits, target):
        p = sigmoid(x)
        p_t = p if y else 1 - p
        a_t = 1.0 if alpha is None else (alpha if y else 1 - alpha)
        values.append(-a_t * (1 - p_t) ** gamma * math.log(p_t))
    return sum(values) / len(values)


def dice(logits, target, smooth=1.0):
    """Overlap of two sets, the first of which is soft, as DETR has it."""
    together = apart = 0.0
    for x, y in pixels(logits, target):
        together += sigmoid(x) if y else 0.0
        apart += sigmoid(x) + (1.0 if y else 0.0)
    return 1 - (2 * together + smooth) / (apart + smooth)


def soft_iou(logits, target, smooth=1.0):
    """Rahman and Wang 2016, equations 3 to 5."""
    together = union = 0.0
    for x, y in pixels(logits, target):
        p, t = sigmoid(x), 1.0 if y else 0.0
        together += p * t
        union += p + t - p * t
    return 1 - (together + smooth) / (union + smooth)


def iou(logits, target):
    inside = {i for i, (x, _) in enumerate(pixels(logits, target)) if x > 0}
    wanted = {i for i, (_, y) in enumerate(pixels(logits, target)) if y}
    return len(inside & wanted) / len(inside | wanted) if inside | wanted else 1.0


def sam(logits, ious, target, counted=None):
    """Kirillov et al. 2023, section 3 and appendix A, for one item: masks [M], predicted IoUs [M], one target."""
    asked = [m for m in range(len(logits)) if counted is None or counted[m]]
    losses = [20 * focal(logits[m], target) + dice(logits[m], target) for m in asked]
    errors = [(float(ious[m]) - iou(logits[m], target)) ** 2 for m in asked]
    return min(losses) + sum(errors) / len(errors), asked[losses.index(min(losses))]
