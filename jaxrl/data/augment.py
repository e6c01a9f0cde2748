"""Augmentation of images as pure functions of a key: random erasing, cutout, mixup, CutMix, mosaic.

Each takes one image, float [H, W, C], with labels as probabilities [classes], consumes the key that it is given and
keeps every shape, so that all of them go under `jit` and `vmap`. A batch has a key an image, and partners by a
permutation:

    keys = jax.random.split(key, len(images))
    images = jax.vmap(random_erasing)(keys, images)
    images, labels = jax.vmap(cutmix)(keys, images, labels, images[order], labels[order])
"""

import jax
import jax.numpy as jnp

TRIES = 100


def _rectangle(shape, top, left, bottom, right):
    """bool [H, W, 1], True inside [top, bottom) x [left, right)."""
    y, x = jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[None, :, None]
    inside = lambda at, first, end: (at >= first) & (at < end)
    return inside(y, top, bottom) & inside(x, left, right)


def random_erasing(
    key: jax.Array,
    image: jax.Array,
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: float = 0.3,
    log_aspect: bool = False,
    fill: jax.Array | float | None = None,
) -> jax.Array:
    """Overwrite one random rectangle (Zhong et al. 2017, arXiv:1708.04896).

        S_e = s H W, s ~ U(area);   r ~ U(aspect, 1 / aspect);   height sqrt(S_e r), width sqrt(S_e / r)

    A rectangle as high or as wide as the image does not fit and is drawn again, up to 100 times (all draws are made at
    once, and the first that fits is taken); if none fits the image stays whole. Its place is uniform among those inside
    the image, as in the authors' code; algorithm 1 of the paper draws size and place again when the rectangle sticks
    out, which favours small ones.

    Args:
      key: consumed.
      image: [H, W, C].
      probability: that anything is erased.
      area: smallest and largest share of the image.
      aspect: least ratio of height to width, in (0, 1]; 1 / aspect is the greatest.
      log_aspect: draw log r uniformly instead, so that upright and lying rectangles are as frequent.
      fill: what is written, broadcast to [H, W, C]: 0, a mean [C], noise of your own; None: uniform in [0, 1).

    Returns:
      [H, W, C], and for `probability` 0 exactly the image.

    Raises:
      ValueError: for ranges that cannot be drawn from.
    """
    _check(image)
    if not (0 <= probability <= 1 and 0 < area[0] <= area[1] and 0 < aspect <= 1):
        raise ValueError(
            f"probability is {probability}, area {area}, aspect {aspect}: expected a probability, areas that rise from "
            "above 0, and an aspect in (0, 1]"
        )
    h, w, _ = image.shape
    k_do, k_area, k_aspect, k_top, k_left, k_fill = jax.random.split(key, 6)
    surface = h * w * jax.random.uniform(k_area, (TRIES,), minval=area[0], maxval=area[1])
    if log_aspect:
        limit = -jnp.log(aspect)
        ratio = jnp.exp(jax.random.uniform(k_aspect, (TRIES,), minval=-limit, maxval=limit))
    else:
        ratio = jax.random.uniform(k_aspect, (TRIES,), minval=aspect, maxval=1 / aspect)
    heights = jnp.round(jnp.sqrt(surface * ratio)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(surface / ratio)).astype(jnp.int32)
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits)
    height, width = heights[first], widths[first]
    top = jax.random.randint(k_top, (), 0, jnp.maximum(h - height, 0) + 1)
    left = jax.random.randint(k_left, (), 0, jnp.maximum(w - width, 0) + 1)
    erased = _rectangle(image.shape, top, left, top + height, left + width)
    erased &= fits[first] & (jax.random.uniform(k_do) < probability)
    noise = jax.random.uniform(k_fill, image.shape, image.dtype) if fill is None else _like(fill, image)
    return jnp.where(erased, noise, image)


def cutout(key: jax.Array, image: jax.Array, *, size: int, fill: jax.Array | float = 0.0) -> jax.Array:
    """Overwrite a square whose centre is anywhere in the image (DeVries and Taylor 2017, arXiv:1708.04552).

    The part of it that sticks out is lost, as in the paper: what is erased is often less than size^2.

    Args:
      key: consumed.
      image: [H, W, C].
      size: side of the square, at least 1.
      fill: what is written, broadcast to [H, W, C].

    Returns:
      [H, W, C].
    """
    _check(image)
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1, in pixels")
    h, w, _ = image.shape
    y, x = jax.random.randint(key, (2,), jnp.zeros(2, jnp.int32), jnp.array([h, w]))
    top, left = y - size // 2, x - size // 2
    return jnp.where(_rectangle(image.shape, top, left, top + size, left + size), _like(fill, image), image)


def mixup(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    other: jax.Array,
    other_label: jax.Array,
    *,
    alpha: float = 0.2,
) -> tuple[jax.Array, jax.Array]:
    """The mean of two images and of their labels (Zhang et al. 2017, arXiv:1710.09412).

        l ~ Beta(alpha, alpha);   l x + (1 - l) x',   l y + (1 - l) y'

    Every pair has its own l; the authors' code has one for a batch.

    Args:
      key: consumed.
      image, other: [H, W, C].
      label, other_label: [classes], probabilities.
      alpha: above 0; the paper has 0.1 to 0.4 for ImageNet, 1 for CIFAR.

    Returns:
      (image [H, W, C], label [classes]).
    """
    _check_pair(image, other, label, other_label, alpha)
    share = jax.random.beta(key, alpha, alpha)
    mix = lambda a, b: (share * a + (1 - share) * b).astype(a.dtype)
    return mix(image, other), mix(label, other_label)


def cutmix(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    other: jax.Array,
    other_label: jax.Array,
    *,
    alpha: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """A rectangle of another image in its place, and labels by area (Yun et al. 2019, arXiv:1905.04899).

        l ~ Beta(alpha, alpha);   a rectangle of H sqrt(1 - l) x W sqrt(1 - l) around a point anywhere in the image

    What sticks out is cut off, and the labels' weights are the real areas, not l.

    Args:
      key: consumed.
      image, other: [H, W, C].
      label, other_label: [classes], probabilities.
      alpha: above 0.

    Returns:
      (image [H, W, C], label [classes]).
    """
    _check_pair(image, other, label, other_label, alpha)
    h, w, _ = image.shape
    k_share, k_place = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(k_share, alpha, alpha))
    y, x = jax.random.randint(k_place, (2,), jnp.zeros(2, jnp.int32), jnp.array([h, w]))
    height, width = (side * h).astype(jnp.int32), (side * w).astype(jnp.int32)
    top, left = y - height // 2, x - width // 2
    pasted = _rectangle(image.shape, top, left, top + height, left + width)
    share = jnp.mean(pasted, dtype=label.dtype)
    return jnp.where(pasted, other, image), (1 - share) * label + share * other_label


def mosaic(
    key: jax.Array,
    images: jax.Array,
    boxes: jax.Array,
    present: jax.Array,
    *,
    fill: jax.Array | float = 0.0,
    visible: float = 0.1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Four images around one point, with their boxes (Bochkovskiy et al. 2020, arXiv:2004.10934).

    The canvas is twice as high and wide. Where they meet is uniform over its middle half; each image has one corner
    there and keeps its scale; what sticks out is cut off, and what stays free is filled. A box is moved with its image
    and clipped to the canvas; one that keeps too little of its area is no longer present.

    Args:
      key: consumed.
      images: [4, H, W, C]: above left, above right, below left, below right.
      boxes: [4, N, 4], (x1, y1, x2, y2) in pixels.
      present: bool [4, N], which boxes there are.
      fill: broadcast to [2 H, 2 W, C].
      visible: least share of a box's area that has to stay.

    Returns:
      (image [2 H, 2 W, C], boxes [4 N, 4], present bool [4 N]).
    """
    if images.ndim != 4 or len(images) != 4 or boxes.shape != (*present.shape, 4) or len(present) != 4:
        raise ValueError(
            f"images have shape {images.shape}, boxes {boxes.shape}, present {present.shape}: expected [4, H, W, C], "
            "[4, N, 4] and [4, N]"
        )
    _, h, w, c = images.shape
    low = jnp.array([h // 2, w // 2])
    centre = jax.random.randint(key, (2,), low, jnp.array([h, w]) + low + 1)
    # the corner of each image's upper left pixel on the canvas
    top = centre[0] - h * jnp.array([1, 1, 0, 0])
    left = centre[1] - w * jnp.array([1, 0, 1, 0])
    y, x = jnp.arange(2 * h)[:, None], jnp.arange(2 * w)[None]
    which = 2 * (y >= centre[0]) + (x >= centre[1])
    row, column = y - top[which], x - left[which]
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    pixels = images[which, jnp.clip(row, 0, h - 1), jnp.clip(column, 0, w - 1)]
    canvas = jnp.where(inside[..., None], pixels, _like(fill, pixels))
    moved = boxes + jnp.stack([left, top, left, top], axis=-1)[:, None].astype(boxes.dtype)
    limit = jnp.broadcast_to(jnp.array([2 * w, 2 * h, 2 * w, 2 * h], boxes.dtype), moved.shape)
    clipped = jnp.clip(moved, jnp.zeros_like(limit), limit)
    area = lambda b: (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    kept = present & (area(clipped) > 0) & (area(clipped) >= visible * area(boxes))
    return canvas, clipped.reshape(-1, 4), kept.reshape(-1)


def _like(fill, image):
    fill = jnp.asarray(fill, image.dtype)
    return jnp.broadcast_to(fill.reshape((1,) * (image.ndim - fill.ndim) + fill.shape), image.shape)


def _check(image):
    if image.ndim != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image has shape {image.shape} and dtype {image.dtype}, expected float [H, W, C]: batches go through vmap"
        )


def _check_pair(image, other, label, other_label, alpha):
    _check(image)
    if other.shape != image.shape or label.shape != other_label.shape or label.ndim != 1:
        raise ValueError(
            f"images of shapes {image.shape} and {other.shape} with labels {label.shape} and {other_label.shape}: "
            "expected two of one shape, and probabilities [classes], such as jax.nn.one_hot(label, classes)"
        )
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, expected a number above 0")
