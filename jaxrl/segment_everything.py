"""Everything in an image: Segment Anything asked about a grid of points, good answers kept, one of each object.

    config, params = load_sam(folder)
    for found in segment_everything(config, params, image):
        found.mask, found.box, found.iou

Kirillov et al. 2023, arXiv 2304.02643, appendix B; steps and settings are those of the published
SamAutomaticMaskGenerator. Deviations: an empty mask is never kept; small regions and holes are left as they are (the
published default too). Boxes are (left, top, right, bottom) pixels within a mask, in pixels of the image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.detection import nms
from jaxrl.nets.vision.sam import SAM, SAMConfig, prompt
from jaxrl.segment import bounding_box, embed, resize_masks, stability_score

Crop = tuple[int, int, int, int]
"""A part of an image: (left, top, right, bottom), the last two just outside."""


@dataclass(frozen=True)
class Everything:
    """What is asked, and which answers are kept.

    Attributes:
      points_per_side: of the grid over the image.
      chunk: points that are asked about at once, which bounds memory.
      iou_threshold: predicted IoUs above are kept.
      stability_threshold: a `stability_score` of at least this is kept.
      stability_offset: of that score, in logits.
      threshold: of masks, on logits.
      nms_threshold: IoU of boxes above which the answer of lower predicted IoU goes.
      crop_layers: layer i = 1, 2, ... asks again about 2^i x 2^i parts of the image, each enlarged for the network.
      crop_overlap: of the parts of the first layer, as a share of the shorter side; half of it in each further layer.
      crop_points_divisor: the grid of a part in layer i has points_per_side / crop_points_divisor^i points a side.
      crop_nms_threshold: IoU of boxes above which, of two parts' answers, that of the larger part goes.
      crop_edge: a mask that comes so near (pixels) to an edge of its part goes, unless the image has the edge there.
    """

    points_per_side: int = 32
    chunk: int = 64
    iou_threshold: float = 0.88
    stability_threshold: float = 0.95
    stability_offset: float = 1.0
    threshold: float = 0.0
    nms_threshold: float = 0.7
    crop_layers: int = 0
    crop_overlap: float = 512 / 1500
    crop_points_divisor: int = 1
    crop_nms_threshold: float = 0.7
    crop_edge: float = 20.0

    def __post_init__(self):
        least = {"points_per_side": 1, "chunk": 1, "crop_layers": 0, "crop_points_divisor": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} or more")
        if not 0 <= self.crop_overlap < 1:
            raise ValueError(f"crop_overlap is {self.crop_overlap}, expected a share of the shorter side in [0, 1)")
        if not self.side(self.crop_layers):
            raise ValueError(
                f"layer {self.crop_layers} has {self.points_per_side} / {self.crop_points_divisor}^{self.crop_layers} "
                "points a side, less than one: lower crop_points_divisor or crop_layers"
            )

    def side(self, layer: int) -> int:
        """Points a side in a part of this layer."""
        return self.points_per_side // self.crop_points_divisor**layer


PUBLISHED = Everything()
"""The settings of the published code, chosen for ViT-H."""


class Found(NamedTuple):
    """An object.

    mask: bool [height, width] of the image. box: [4]. iou: predicted. stability: see `stability_score`. point: [2], the
    (x, y) that was asked about, and crop: the part of the image that was looked at; all in pixels of the image.
    """

    mask: np.ndarray
    box: np.ndarray
    iou: float
    stability: float
    point: np.ndarray
    crop: Crop


class Answers(NamedTuple):
    """What n points of a part of the image gave, M masks each.

    bits: uint8 [n, M, height, ceil(width / 8)], masks of the part, eight pixels a byte. boxes: [n, M, 4], in pixels of
    the part. ious, stability: [n, M].
    """

    bits: Any
    boxes: Any
    ious: Any
    stability: Any


def point_grid(side: int) -> np.ndarray:
    """Centres of side x side equal cells, [side^2, 2], (x, y) in [0, 1], row by row."""
    centres = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def crops(size: tuple[int, int], layers: int, overlap: float) -> list[tuple[int, Crop]]:
    """(layer, part) of an image of `size` = (height, width): the whole, then 2^i x 2^i overlapping parts in layer i."""
    height, width = size
    found = [(0, (0, 0, width, height))]
    for layer in range(1, layers + 1):
        n = 2**layer
        shared = int(overlap * min(size) * 2 / n)
        across, down = (math.ceil((shared * (n - 1) + side) / n) for side in (width, height))
        for column, row in product(range(n), range(n)):
            left, top = column * (across - shared), row * (down - shared)
            found.append((layer, (left, top, min(left + across, width), min(top + down, height))))
    return found


def describe(
    logits: jax.Array, ious: jax.Array, full: Callable[[jax.Array], jax.Array], *, threshold: float, offset: float
) -> Answers:
    """Masks at their full size as `Answers`, a point at a time, so that logits of full size are there for one alone.

    Args:
      logits: [n, M, ...]. ious: [n, M], predicted.
      full: logits [M, ...] of a point -> [M, height, width].
      threshold, offset: see `stability_score`.
    """

    def one(logits):
        logits = full(logits)
        masks = logits > threshold
        score = stability_score(logits, threshold=threshold, offset=offset)
        return jnp.packbits(masks, axis=-1), bounding_box(masks), score

    bits, boxes, stability = jax.lax.map(one, logits)
    return Answers(bits, boxes, ious, stability)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ask(config, scaled, size, params, embedding, points, threshold, offset) -> Answers:
    embeddings = jnp.broadcast_to(embedding, (len(points), *embedding.shape[1:]))
    decoded: Any = SAM(config).apply({"params": params}, embeddings, prompt(points[:, None]), method="decode")
    logits, ious = decoded
    full = lambda x: resize_masks(x, config, scaled, size)
    return describe(logits[:, 1:], ious[:, 1:], full, threshold=threshold, offset=offset)


def _in_part(answer, crop, points, size, options) -> list[Found]:
    """What is kept of a part's answers, one of each object, by falling predicted IoU; masks are still bits."""
    height, width = size
    found, n = [], min(options.chunk, len(points))
    corner, edges, outer = np.tile(crop[:2], 2), np.array(crop), np.array((0, 0, width, height))
    for start in range(0, len(points), n):
        asked = points[start : start + n]
        filled = np.concatenate([asked, np.repeat(asked[:1], n - len(asked), axis=0)])
        bits, boxes, ious, stability = jax.device_get(answer(filled.astype(np.float32)))
        boxes = boxes + corner
        near = lambda sides: np.abs(boxes - sides) <= options.crop_edge
        cut = np.any(near(edges) & ~near(outer), axis=-1)
        good = (ious > options.iou_threshold) & (stability >= options.stability_threshold) & ~cut
        good &= np.any(bits, axis=(-2, -1))
        good[len(asked) :] = False
        for i, m in np.argwhere(good):
            at = asked[i] + crop[:2]
            found.append(Found(bits[i, m].copy(), boxes[i, m], float(ious[i, m]), float(stability[i, m]), at, crop))
    return _distinct(found, [x.iou for x in found], options.nms_threshold)


def _distinct(found, scores, threshold) -> list[Found]:
    boxes = np.array([x.box for x in found]).reshape(-1, 4)
    return [found[i] for i in nms(boxes, np.array(scores), threshold=threshold)]


def _unpacked(found: Found, size) -> Found:
    left, top, right, bottom = found.crop
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = np.unpackbits(found.mask, axis=-1, count=right - left)
    return found._replace(mask=mask)


def propose(
    look: Callable[[np.ndarray], Callable[[np.ndarray], Answers]], image: np.ndarray, options: Everything = PUBLISHED
) -> list[Found]:
    """`segment_everything` with any network.

    Args:
      look: part of the image [h, w, 3] -> a function of points [n, 2], (x, y) in pixels of the part, that gives
        `Answers`. n is the same for all calls about a part.
      image: [height, width, 3].
      options: see there.

    Returns:
      What `segment_everything` does.
    """
    image = np.asarray(image)
    if image.ndim != 3:
        raise ValueError(f"image has shape {image.shape}, expected [height, width, 3]")
    size = image.shape[:2]
    found, parts = [], crops(size, options.crop_layers, options.crop_overlap)
    for layer, crop in parts:
        left, top, right, bottom = crop
        points = point_grid(options.side(layer)) * np.array([[right - left, bottom - top]])
        found += _in_part(look(image[top:bottom, left:right]), crop, points, size, options)
    if len(parts) > 1:
        area = lambda crop: (crop[2] - crop[0]) * (crop[3] - crop[1])
        found = _distinct(found, [1 / area(x.crop) for x in found], options.crop_nms_threshold)
    return [_unpacked(x, size) for x in found]


def segment_everything(
    config: SAMConfig, params: Any, image: jax.Array, options: Everything = PUBLISHED
) -> list[Found]:
    """A mask of every object that a grid of points finds, each object once.

    Each point gives the config's `masks` masks. Kept are those of high predicted IoU and stability that are not cut off
    by an edge of the part; among masks whose boxes overlap, that of the highest predicted IoU. With crop_layers, parts
    of the image are looked at as well, which finds small objects, and smaller parts are preferred.

    Chunks of points share one compiled program for each size of a part, and what waits for the choice among overlapping
    masks takes a bit a pixel; the masks that are returned take a byte.

    Args:
      config, params: the network and its parameters.
      image: [height, width, 3], values 0 ... 255.
      options: which points, and what is kept.

    Returns:
      `Found` objects by falling predicted IoU, smaller parts of the image first.

    Raises:
      ValueError: what `embed` refuses.
    """
    whole = jnp.shape(image)

    def look(part):
        seen = embed(config, params, part, check=part.shape == whole)
        ratio, cut = seen.ratio.reshape(1, 2), (options.threshold, options.stability_offset)
        return lambda points: _ask(config, seen.scaled, seen.size, params, seen.embedding, points * ratio, *cut)

    return propose(look, np.asarray(image), options)
