"""How a picture comes to a published network: its size, and what its colours are normalised with."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets.vision.layers import colours_remedy
from jaxrl.nets.vision.packed import PackedViTConfig, smart_resize

METHODS = {1: "lanczos3", 2: "linear", 3: "cubic"}
"""Pillow's number of a filter -> its name in `jax.image.resize`."""


MOST_ROWS = 512
"""Patches along a side from which Kimi-VL refuses a picture."""


class Preparation(NamedTuple):
    """What a network was trained on.

    size: (height, width), None where a picture keeps a shape of its own. mean, deviation: of each colour, in 0 ... 1.
    method: of resizing. scale: what bytes are multiplied by. crop: the picture covers `size`, and its middle is taken.

    Where it keeps its shape: area, the fewest and the most pixels to which `smart_resize` brings it (Qwen2-VL); or
    patches, the most it may have, and pad, whether it is then filled up with black or cut to whole patches (Kimi-VL).
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    method: str = "linear"
    scale: float = 1 / 255
    crop: bool = False
    area: tuple[int, int] | None = None
    patches: int | None = None
    pad: bool = True


def from_hugging_face(config: Mapping[str, Any]) -> Preparation:
    """What a `preprocessor_config.json` says.

    Args:
      config: the parsed file. A size that is not a height and a width, as the longest edge of Segment Anything, gives
        size None.

    Raises:
      ValueError: pictures that are cropped or come in another scale than 0 ... 1, which is not done here.
    """
    of = config.get
    wrong = [f"{name} is set" for name in ("do_center_crop", "do_pad_to_square") if of(name)]
    if abs(of("rescale_factor", 1 / 255) - 1 / 255) > 1e-7 or not of("do_rescale", True):
        wrong.append(f"rescale_factor is {of('rescale_factor')} and do_rescale {of('do_rescale')}, expected 1 / 255")
    if of("resample", 2) not in METHODS:
        wrong.append(f"resample is {of('resample')}, expected one of {METHODS}")
    if wrong:
        raise ValueError("; ".join(wrong) + ". Remove the file, and prepare pictures yourself")
    size = of("size")
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else None
    elif size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
    normal = of("do_normalize", True)
    colours = (config["image_mean"], config["image_std"]) if normal else ([0.0] * 3, [1.0] * 3)
    mean, deviation = (tuple(map(float, colour)) for colour in colours)
    return Preparation(size if of("do_resize", True) else None, mean, deviation, METHODS[of("resample", 2)])


def prepare(how: Preparation, picture: jax.Array) -> jax.Array:
    """A picture as the network takes it: resized, (x scale - mean) / deviation.

    Args:
      how: of the network.
      picture: [height, width, colours], 0 ... 255.

    Returns:
      [*how.size, colours] float32. Resizing rounds to whole bytes, along rows and then along columns, as Pillow does.

    Raises:
      ValueError: another shape.
    """
    x = checked(how, picture)
    if how.size is not None and how.crop:
        x = cropped(resized(x, covering(x.shape[0], x.shape[1], how.size), how.method), how.size)
    elif how.size is not None:
        x = resized(x, how.size, how.method)
    return normalised(how, x)


def prepare_native(how: Preparation, config: PackedViTConfig, picture: jax.Array) -> jax.Array:
    """A picture of about its own shape, as `packed.patchify` takes it.

    Args:
      how: with `area` or `patches`; with neither the picture keeps its size.
      config: of the network, whose patches fill the result.
      picture: [height, width, colours], 0 ... 255.

    Returns:
      [h, w, colours] float32.

    Raises:
      ValueError: another shape, or one that is too long.
    """
    x, side, patch = checked(how, picture), config.side, config.patch
    size = x.shape[0], x.shape[1]
    if how.area is not None:
        fewest, most = how.area
        size = smart_resize(*size, factor=side, min_pixels=fewest, max_pixels=most)
    elif how.patches is not None:
        size = limited(*size, patch=patch, most=how.patches)
    x = resized(x, size, how.method)
    if how.patches is not None:
        h, w = size
        whole = h - h % patch, w - w % patch
        x = jnp.pad(x, ((0, -h % side), (0, -w % side), (0, 0))) if how.pad else cropped(x, whole, round_half=True)
        if max(x.shape[:2]) // patch >= MOST_ROWS:
            raise ValueError(
                f"the picture has {x.shape[0]} x {x.shape[1]} pixels, expected sides below {MOST_ROWS * patch}"
            )
    return normalised(how, x)


def checked(how: Preparation, picture: jax.Array) -> jax.Array:
    """The picture as float32.

    Raises:
      ValueError: what is not [height, width, colours], with how to make it so.
    """
    shape, colours = jnp.shape(picture), len(how.mean)
    if len(shape) != 3 or shape[2] != colours or 0 in shape:
        raise ValueError(
            f"the picture has shape {shape}, expected [height, width, {colours}], values 0 ... 255"
            f"{colours_remedy(shape, colours, 3)}"
        )
    return jnp.asarray(picture, jnp.float32)


def resized(x: jax.Array, size: tuple[int, int], method: str) -> jax.Array:
    """[H, W, C] -> [*size, C], whole bytes, along rows and then along columns."""
    height, _, colours = x.shape
    for shape in ((height, size[1], colours), (*size, colours)):
        if x.shape != shape:
            x = jnp.floor(jnp.clip(jax.image.resize(x, shape, method), 0.0, 255.0) + 0.5)
    return x


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size of the same shape whose shorter side is that of the square `size`."""
    short = min(height, width)
    return int(size[0] * height / short), int(size[1] * width / short)


def cropped(x: jax.Array, size: tuple[int, int], *, round_half: bool = False) -> jax.Array:
    """The middle of [H, W, C], [*size, C]; an odd rest is cut below and right, or where torchvision rounds it to."""
    half = lambda rest: round(rest / 2) if round_half else rest // 2
    top, left = (half(have - want) for have, want in zip(x.shape[:2], size, strict=True))
    return x[top : top + size[0], left : left + size[1]]


def limited(height: int, width: int, *, patch: int, most: int) -> tuple[int, int]:
    """The size at which a picture has about `most` whole patches at most; Kimi-VL's rule."""
    count = (height // patch) * (width // patch)
    scale = math.sqrt(most / count) if count > most else 1.0
    return int(height * scale), int(width * scale)


def normalised(how: Preparation, x: jax.Array) -> jax.Array:
    """(x scale - mean) / deviation of bytes [..., colours]."""
    each = lambda values: jnp.array(values).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x * how.scale - each(how.mean)) / each(how.deviation)
