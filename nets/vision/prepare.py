"""How a picture comes to a published network: its size, and what its colours are normalised with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

METHODS = {1: "lanczos3", 2: "linear", 3: "cubic"}
"""Pillow's number of a filter -> its name in `jax.image.resize`."""


class Preparation(NamedTuple):
    """What a network was trained on. size: (height, width), None where a picture keeps a size of its own. mean,
    deviation: of each colour, in 0 ... 1. method: of resizing."""

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    method: str = "linear"


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
    """A picture as the network takes it: resized, (x / 255 - mean) / deviation.

    Args:
      how: of the network.
      picture: [height, width, colours], 0 ... 255.

    Returns:
      [*how.size, colours] float32. Resizing rounds to whole bytes, along rows and then along columns, as Pillow does.

    Raises:
      ValueError: another shape.
    """
    if jnp.ndim(picture) != 3 or jnp.shape(picture)[2] != len(how.mean):
        raise ValueError(
            f"the picture has shape {jnp.shape(picture)}, expected [height, width, {len(how.mean)}], values 0 ... 255"
        )
    x = jnp.asarray(picture, jnp.float32)
    height, width, colours = x.shape
    if how.size is not None and (height, width) != how.size:
        for shape in ((height, how.size[1], colours), (*how.size, colours)):
            x = jnp.floor(jnp.clip(jax.image.resize(x, shape, how.method), 0.0, 255.0) + 0.5)
    each = lambda values: jnp.array(values).reshape(1, 1, -1)
    return (x / 255 - each(how.mean)) / each(how.deviation)
