"""Segment Anything at work: masks of a user's image, and the clicks of a simulated user to train on.

    config, params = load_sam(folder)                                  # as published
    seen = embed(config, params, image)                                # once for an image
    found = segment(config, params, seen, points=..., labels=...)      # for every click

All objects without any click: `jaxrl.segment_everything`.

Training follows Kirillov et al. 2023, arXiv 2304.02643, appendix A: a point or a box first, then clicks where the last
answer was wrong, with that answer fed back; `interact` plays it as one scan of the mask decoder. Masks and targets of
training are [B, 4 h, 4 w], the resolution of the decoder's logits; points are (x, y) in pixels of the model's image.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl.losses.segmentation import sam_loss
from jaxrl.nets.vision.sam import (
    ABSENT,
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    PADDING,
    SAM,
    TOP_LEFT,
    Prompts,
    SAMConfig,
    prompt,
)
from jaxrl.nets.weights import folders
from jaxrl.nets.weights import sam as weights

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's red, green and blue in 0 ... 255: what images are normalised with."""


class Segmenter(NamedTuple):
    """A published network: its config and its parameters."""

    config: SAMConfig
    params: Any


class Embedded(NamedTuple):
    """An image that prompts may ask about. embedding: [1, h, w, C]. size: its own (height, width). scaled: the part of
    the model's image that it fills, (height, width)."""

    embedding: jax.Array
    size: tuple[int, int]
    scaled: tuple[int, int]

    @property
    def ratio(self) -> np.ndarray:
        """float32 [2]: what (x, y) in pixels of its own have to be multiplied by, to be pixels of the model's image."""
        return np.array([self.scaled[1] / self.size[1], self.scaled[0] / self.size[0]], np.float32)


class Segmentation(NamedTuple):
    """Answers to P prompts, M masks each (1 or the config's `masks`).

    masks: bool [P, M, height, width] of the user's image. ious: [P, M], predicted. stability: [P, M], see
    `stability_score`. logits: [P, M, 4 h, 4 w], what a next prompt may take as its mask.
    """

    masks: jax.Array
    ious: jax.Array
    stability: jax.Array
    logits: jax.Array


def load_sam(where: str | Path, **changes) -> Segmenter:
    """Opens a published Segment Anything.

    Args:
      where: a Hugging Face folder of model type sam, with config.json and *.safetensors.
      changes: fields of `SAMConfig`, such as dtype="bfloat16".

    Raises:
      ValueError: nothing there, pickled weights, choices that are not built here, pictures prepared in another way
        than `preprocess` does, or tensors that do not fit, all of them in one message.
      ImportError: with the command to run, if `safetensors` is not installed.
    """
    folder = Path(where)
    config, _ = folders.described(folder, weights.from_hugging_face, **changes)
    how = folders.preparation(folder)
    if how and not np.allclose([how.mean, how.deviation], np.array([MEAN, DEVIATION]) / 255, atol=1e-3):
        raise ValueError(f"{folder} normalises pictures by {how.mean} and {how.deviation}, expected those of ImageNet")
    load = partial(weights.from_checkpoint, config)
    return Segmenter(config, folders.parameters(folder, load, ignored=weights.IGNORED))


def _check_values(image):
    if isinstance(image, Tracer):
        return
    image = np.asarray(image)
    low, high = float(np.min(image)), float(np.max(image))
    if not (low >= 0 and high <= 255):
        raise ValueError(f"image has values {low:g} ... {high:g}, expected 0 ... 255, as they are before normalisation")
    if 0 < high <= 1 and not np.issubdtype(image.dtype, np.integer):
        raise ValueError(
            f"image is {image.dtype} with values {low:g} ... {high:g}, expected 0 ... 255: multiply by 255"
        )


def preprocess(config: SAMConfig, image: jax.Array, *, check: bool = True) -> tuple[jax.Array, tuple[int, int]]:
    """An image as the network takes it: longer side resized to the config's, normalised, padded below and right.

    Args:
      config: of the network.
      image: [height, width, 3], 0 ... 255.
      check: whether to look at the values: a dark part of an image of floats looks like one in 0 ... 1.

    Returns:
      ([image, image, 3] float32, the (height, width) that the picture fills).

    Raises:
      ValueError: another shape, an image so long that nothing of its shorter side is left, or values that are not 0 ...
        255. Values are looked at where they are known, not under `jax.jit`.
    """
    if jnp.ndim(image) != 3 or jnp.shape(image)[2] != 3:
        raise ValueError(f"image has shape {jnp.shape(image)}, expected [height, width, 3], values 0 ... 255")
    height, width, _ = jnp.shape(image)
    scale = config.image / max(height, width, 1)
    scaled = (int(height * scale + 0.5), int(width * scale + 0.5))
    if 0 in scaled:
        raise ValueError(
            f"image of {height} x {width} pixels is {scaled[0]} x {scaled[1]} at the size of the network, "
            f"{config.image}, expected a pixel or more: crop the longer side, or pad the shorter one"
        )
    if check:
        _check_values(image)
    x = jax.image.resize(jnp.asarray(image, jnp.float32), (*scaled, 3), "linear")
    x = (x - jnp.array(MEAN).reshape(1, 1, 3)) / jnp.array(DEVIATION).reshape(1, 1, 3)
    return jnp.pad(x, ((0, config.image - scaled[0]), (0, config.image - scaled[1]), (0, 0))), scaled


def resize_masks(logits: jax.Array, config: SAMConfig, scaled: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """Logits [..., 4 h, 4 w] at the size of the user's image: to the model's image, without its padding, to `size`.

    Bilinear both times, between pixels' centres, on logits: a threshold comes after.
    """
    resize = lambda x, shape: jax.image.resize(x, (*x.shape[:-2], *shape), "linear", antialias=False)
    whole = resize(logits, (config.image, config.image))
    return resize(whole[..., : scaled[0], : scaled[1]], size)


def stability_score(logits: jax.Array, *, threshold: float = 0.0, offset: float = 1.0) -> jax.Array:
    """IoU of a mask cut `offset` above the threshold with one cut as much below; 0 where even that one is empty.

    Near 1 where the mask hardly depends on the threshold. The first lies in the second, so it is a ratio of areas.

    Args:
      logits: [..., height, width].
      threshold, offset: in logits.

    Returns:
      [...] float32.
    """
    small, large = (jnp.sum(logits > cut, (-2, -1), jnp.float32) for cut in (threshold + offset, threshold - offset))
    return small / jnp.maximum(large, 1.0)


@partial(jax.jit, static_argnums=0)
def _encode(config, params, images):
    return SAM(config).apply({"params": params}, images, method="encode")


@partial(jax.jit, static_argnums=0)
def _decode(config, params, embeddings, prompts) -> Any:
    return SAM(config).apply({"params": params}, embeddings, prompts, method="decode")


def embed(config: SAMConfig, params: Any, image: jax.Array, *, check: bool = True) -> Embedded:
    """Look at an image [height, width, 3] of any size, values 0 ... 255; see `preprocess`."""
    x, scaled = preprocess(config, image, check=check)
    height, width, _ = jnp.shape(image)
    return Embedded(_encode(config, params, x[None]), (height, width), scaled)


def _check_prompts(config, size, points, labels, boxes, masks):
    """Raises what `segment` says."""
    side = 4 * config.grid
    given = (
        ("points", points, "[P, N, 2]", (2,)),
        ("boxes", boxes, "[P, 4]", (4,)),
        ("masks", masks, f"[P, 4 h, 4 w] = [P, {side}, {side}]", (side, side)),
    )
    for name, array, axes, last in given:
        if array is None:
            continue
        shape = jnp.shape(array)
        if len(shape) != len(last) + (2 if name == "points" else 1) or shape[-len(last) :] != last:
            raise ValueError(f"{name} have shape {shape}, expected {axes}: one prompt is {name}[None]")
        if not shape[0]:
            raise ValueError(f"{name} have shape {shape}, which is no prompt: expected {axes} with P of 1 or more")
    known = lambda x: None if x is None or isinstance(x, Tracer) else np.asarray(x)
    places, kinds, corners = known(points), known(labels), known(boxes)
    if kinds is not None and points is not None:
        if kinds.shape != jnp.shape(points)[:2]:
            raise ValueError(
                f"labels have shape {kinds.shape}, expected [P, N] = {jnp.shape(points)[:2]} of the points"
            )
        _refuse(
            ~np.isin(kinds, (ABSENT, BACKGROUND, FOREGROUND)),
            "labels",
            kinds,
            "1 (on the object), 0 (beside it) or -2 (no point); boxes have an argument of their own",
        )
    if places is not None and (labels is None or kinds is not None):
        here = np.ones(places.shape[:2], bool) if kinds is None else kinds > ABSENT
        if boxes is None and masks is None and not here.any(axis=1).all():
            empty = np.argmin(here.any(axis=1))
            raise ValueError(f"prompt {empty} has no point that is there, no box and no mask: expected one of them")
        inside = np.all((places >= 0) & (places <= np.array(size[::-1]).reshape(1, 1, 2)), axis=-1)
        _refuse(here & ~inside, "points", places, f"(x, y) within the image of {size[1]} x {size[0]} (width x height)")
    if corners is not None:
        right = np.all(np.isfinite(corners) & np.tile(corners[:, 2:] >= corners[:, :2], 2), axis=-1)
        _refuse(~right, "boxes", corners, "finite (left, top, right, bottom) with left <= right and top <= bottom")


def _refuse(wrong, name, values, expected):
    """Raises ValueError about the first of the wrong ones, bool over the leading axes of values."""
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"{name}{list(at)} is {values[at]}, expected {expected}")


def _clicks(points: jax.Array | None, labels: jax.Array | None) -> int:
    """How many points the longest of the prompts has, absent ones left out."""
    if points is None or labels is None:
        return 0 if points is None else points.shape[1]
    if isinstance(labels, Tracer):
        raise ValueError(
            "multimask is None, which counts the labels that are not -2, but the labels are traced: give "
            "multimask=True or False, or labels that are constants"
        )
    return int(np.max(np.sum(np.asarray(labels) > ABSENT, axis=-1), initial=0))


def _roomy(points: jax.Array | None, labels: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Points [P, N, 2] and labels [P, N] with absent ones up to the next power of two."""
    if points is None:
        return None, None if labels is None else jnp.asarray(labels)
    labels = jnp.full(points.shape[:2], FOREGROUND) if labels is None else jnp.asarray(labels)
    more = (1 << (points.shape[1] - 1).bit_length()) - points.shape[1] if points.shape[1] else 0
    points = jnp.pad(points, ((0, 0), (0, more), (0, 0)))
    return points, jnp.pad(labels, ((0, 0), (0, more)), constant_values=ABSENT)


def segment(
    config: SAMConfig,
    params: Any,
    image: jax.Array | Embedded,
    *,
    points: jax.Array | None = None,
    labels: jax.Array | None = None,
    boxes: jax.Array | None = None,
    masks: jax.Array | None = None,
    multimask: bool | None = None,
    threshold: float = 0.0,
) -> Segmentation:
    """Masks of what P prompts mean, at the size of the image.

    Prompts of 1, 2, 3 to 4, 5 to 8 ... points are answered by one compiled program each, for each P: there is room for
    points that are not there.

    Args:
      config, params: the network and its parameters.
      image: [height, width, 3], values 0 ... 255, or what `embed` made of it, to ask again.
      points: [P, N, 2], (x, y) in pixels of the image. labels: int [P, N], 1 on the object, 0 beside it, -2 no point.
      boxes: [P, 4], (left, top, right, bottom) in pixels of the image.
      masks: [P, 4 h, 4 w], `logits` of an earlier answer, one for each prompt.
      multimask: whether to answer with the config's `masks` masks, of which `ious` says the best, or with one. None:
        several where no prompt is more than one point or one box, which may mean several things. That is read off the
        labels, so under `jax.jit` those have to be constants, or multimask given.
      threshold: on logits.

    Returns:
      `Segmentation`.

    Raises:
      ValueError: no prompt, shapes that do not fit, unknown labels, points outside of the image, inverted boxes. Values
        are looked at where they are known, not under `jax.jit`.
    """
    seen = image if isinstance(image, Embedded) else embed(config, params, image)
    _check_prompts(config, seen.size, points, labels, boxes, masks)
    if points is not None:
        points = jnp.asarray(points, jnp.float32) * seen.ratio.reshape(1, 1, 2)
    if boxes is not None:
        boxes = jnp.asarray(boxes, jnp.float32) * np.tile(seen.ratio, 2).reshape(1, 4)
    if multimask is None:
        multimask = masks is None and _clicks(points, labels) + (boxes is not None) == 1
    given = prompt(*_roomy(points, labels), boxes, masks)
    embeddings = jnp.broadcast_to(seen.embedding, (given.labels.shape[0], *seen.embedding.shape[1:]))
    logits, ious = _decode(config, params, embeddings, given)
    asked = slice(1, None) if multimask else slice(0, 1)
    logits, ious = logits[:, asked], ious[:, asked]
    full = resize_masks(logits, config, seen.scaled, seen.size)
    return Segmentation(full > threshold, ious, stability_score(full, threshold=threshold), logits)


def sample_point(key: jax.Array, region: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pixel of each region, every one as likely.

    Args:
      key: consumed.
      region: bool [B, height, width].

    Returns:
      (points [B, 2], (x, y) in pixels of the region; found bool [B], false where the region is empty).
    """
    flat = region.reshape(region.shape[0], -1)
    at = jax.random.categorical(key, jnp.where(flat, 0.0, -jnp.inf), axis=-1)
    y, x = jnp.divmod(at, region.shape[2])
    return jnp.stack([x, y], axis=-1).astype(jnp.float32), jnp.any(flat, axis=-1)


def bounding_box(target: jax.Array) -> jax.Array:
    """Masks bool [B, height, width] -> [B, 4] float32, (left, top, right, bottom) pixels within; zeros where empty."""
    rows, columns = jnp.any(target, axis=2), jnp.any(target, axis=1)
    first = lambda x: jnp.argmax(x, axis=1)
    last = lambda x: jnp.where(jnp.any(x, axis=1), x.shape[1] - 1 - jnp.argmax(x[:, ::-1], axis=1), 0)
    return jnp.stack([first(columns), first(rows), last(columns), last(rows)], axis=-1).astype(jnp.float32)


def sample_box(key: jax.Array, target: jax.Array, *, noise: float = 0.1, limit: float = 20.0) -> jax.Array:
    """The target's box, each side moved by N(0, (noise side)^2) pixels, `limit` at most, and kept inside the image.

    Args:
      key: consumed.
      target: bool [B, height, width].
      noise: share of the box's width (of left and right) and height.
      limit: in pixels of the target.

    Returns:
      [B, 4], (left, top, right, bottom) in pixels of the target.
    """
    box = bounding_box(target)
    side = jnp.tile(box[:, 2:] - box[:, :2], (1, 2))
    moved = box + jnp.clip(noise * side * jax.random.normal(key, box.shape), -limit, limit)
    return jnp.clip(moved, 0.0, jnp.array([[target.shape[2] - 1.0, target.shape[1] - 1.0] * 2]))


def to_image(config: SAMConfig, points: jax.Array) -> jax.Array:
    """Points in pixels of the masks as points in pixels of the model's image, centre to centre."""
    return (points + 0.5) * (config.patch / 4) - 0.5


def first_prompt(key: jax.Array, config: SAMConfig, target: jax.Array, *, room: int = 0) -> Prompts:
    """A point of the target or its box, as likely as each other, for each of B targets [B, 4 h, 4 w].

    `room` is how many more points the prompt has place for, absent as yet. The key is consumed.
    """
    which, at, around = jax.random.split(key, 3)
    b = target.shape[0]
    point, found = sample_point(at, target)
    corners = sample_box(around, target, limit=20.0 * 4 / config.patch).reshape(b, 2, 2)
    boxed = jax.random.bernoulli(which, 0.5, (b,))
    clicked = jnp.stack([jnp.where(found, FOREGROUND, ABSENT), jnp.full(b, ABSENT), jnp.full(b, PADDING)], axis=-1)
    cornered = jnp.array([[TOP_LEFT, BOTTOM_RIGHT, ABSENT]])
    points = jnp.where(boxed[:, None, None], corners, jnp.stack([point, jnp.zeros_like(point)], axis=1))
    labels = jnp.where(boxed[:, None], cornered, clicked)
    points = jnp.pad(to_image(config, points), ((0, 0), (0, 1 + room), (0, 0)))
    return Prompts(points, jnp.pad(labels, ((0, 0), (0, room)), constant_values=ABSENT))


def next_click(key: jax.Array, config: SAMConfig, logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pixel where the answer is wrong, every one as likely: foreground where it was missed, background else.

    Args:
      key: consumed.
      config: of the network.
      logits: [B, 4 h, 4 w], the answer; its mask is logits > 0.
      target: bool [B, 4 h, 4 w].

    Returns:
      (points [B, 2] in pixels of the model's image, labels int [B]; `ABSENT` where nothing is wrong).
    """
    point, found = sample_point(key, (logits > 0) != target)
    x, y = point[:, 0].astype(jnp.int32), point[:, 1].astype(jnp.int32)
    missed = target[jnp.arange(target.shape[0]), y, x]
    return to_image(config, point), jnp.where(found, jnp.where(missed, FOREGROUND, BACKGROUND), ABSENT)


def schedule(key: jax.Array, batch: int, clicks: int = 8) -> jax.Array:
    """Which rounds are followed by a click, bool [rounds, B]: `clicks` of them, and rounds = clicks + 3.

    Two rounds get nothing new but the last answer: one anywhere among the clicks, of each item's own, and the last. So
    the row of the last round, and one more of each column, are false. Without clicks there is one round. The key is
    consumed.
    """
    if clicks < 0:
        raise ValueError(f"clicks is {clicks}, expected 0 (the first prompt alone) or more")
    if not clicks:
        return jnp.zeros((1, batch), bool)
    blank = jax.random.randint(key, (1, batch), 0, clicks + 1)
    rounds = jnp.arange(clicks + 3)[:, None]
    return (rounds != blank) & (rounds < clicks + 1)


def interact(
    answer: Callable[[Prompts], Any], config: SAMConfig, target: jax.Array, key: jax.Array, *, clicks: int = 8
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Losses of a whole conversation about each image: a point or a box, then clicks on what is still wrong.

    The first round may answer with the config's `masks` masks and is judged by the best
    (`losses.segmentation.sam_loss`), later ones with the single one. The answer with the highest predicted IoU is fed
    back as a prompt, its logits as they are, and no gradient passes through it. One scan; a round is computed again for
    its gradient, which costs little beside the image encoder and keeps memory at that of one round.

    Args:
      answer: prompts -> (logits [B, 1 + M, 4 h, 4 w], IoUs [B, 1 + M]), as `SAM.decode` about B images.
      config: of the network.
      target: bool [B, 4 h, 4 w].
      key: consumed.
      clicks: after the first prompt, see `schedule`; 8 gives the paper's 11 rounds.

    Returns:
      (values [rounds, B], diagnostics of `sam_loss`, each [rounds, B]).

    Raises:
      ValueError: a target of another size than the masks'.
    """
    n = 4 * config.grid
    if jnp.ndim(target) != 3 or target.shape[1:] != (n, n):
        raise ValueError(f"target has shape {jnp.shape(target)}, expected [B, {n}, {n}]: resize it to the masks")
    target, b = jnp.asarray(target, bool), target.shape[0]
    first, plan, rest = jax.random.split(key, 3)
    follows = schedule(plan, b, clicks)
    rounds = len(follows)
    start = first_prompt(first, config, target, room=rounds - 1)
    taken = start.labels.shape[1] - (rounds - 1)
    several = jnp.arange(1 + config.masks) > 0

    def play(carry, x):
        points, labels, fed = carry
        i, key, follow = x
        logits, ious = answer(Prompts(points, labels, fed, jnp.broadcast_to(i > 0, (b,))))
        counted = jnp.broadcast_to(jnp.where(i == 0, several, ~several)[None], ious.shape)
        values, diagnostics = sam_loss(logits, ious, target, counted=counted)
        best = jnp.argmax(jnp.where(counted, ious, -jnp.inf), axis=-1)
        fed = jax.lax.stop_gradient(jnp.take_along_axis(logits, best[:, None, None, None], axis=1)[:, 0])
        point, label = next_click(key, config, fed, target)
        points = points.at[:, taken + i].set(point, mode="drop")
        labels = labels.at[:, taken + i].set(jnp.where(follow, label, ABSENT), mode="drop")
        return (points, labels, fed), (values, diagnostics)

    each = (jnp.arange(rounds), jax.random.split(rest, rounds), follows)
    carry = (start.points, start.labels, jnp.zeros(target.shape))
    return jax.lax.scan(jax.checkpoint(play, prevent_cse=False), carry, each)[1]


def loss(
    config: SAMConfig, params: Any, images: jax.Array, target: jax.Array, key: jax.Array, *, clicks: int = 8
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`interact` with a network about images [B, image, image, 3], normalised, which it looks at once.

    Its mean is what to train on: gradients reach the decoder from every round, and the image encoder from all of them.
    Arguments and returns are otherwise those of `interact`.
    """
    model = SAM(config)
    embeddings: Any = model.apply({"params": params}, images, method="encode")
    decode = lambda prompts: model.apply({"params": params}, embeddings, prompts, method="decode")
    return interact(decode, config, target, key, clicks=clicks)
