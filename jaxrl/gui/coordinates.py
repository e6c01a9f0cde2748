"""Places on a screen in three units: its own pixels, those of a resized screenshot, and thousandths.

Pixel i covers [i, i + 1) and its middle is i + 1/2, in a picture of any size. A pixel goes to another unit by its
middle, and a place comes back as the pixel that it lies in. All is done in whole numbers.
"""

from jaxrl.gui.actions import Point
from jaxrl.nets.vision import packed

Size = tuple[int, int]
"""(width, height) in pixels."""


def smart_resize(size: Size, *, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 1280 * 28 * 28) -> Size:
    """The size at which Qwen2-VL reads a picture (Wang et al. 2024, arXiv 2409.12191).

    Sides become multiples of the factor, the nearest (a half goes to the even one); where the area is then outside the
    limits, both sides are scaled by the same root first and rounded towards them. UI-TARS-1.5 has min_pixels
    100 * 28 * 28 and max_pixels 16384 * 28 * 28.

    Args:
      size: (width, height).
      factor: pixels of a patch times the patches that are merged along a side.
      min_pixels, max_pixels: of the result.

    Returns:
      (width, height).

    Raises:
      ValueError: a side below 1, or one 200 times the other.
    """
    if min(size) < 1 or max(size) > 200 * min(size):
        raise ValueError(f"a screen of {size[0]} x {size[1]}: expected sides of 1 or more, neither 200 times the other")
    limits = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    height, width = packed.smart_resize(size[1], size[0], **limits)
    return width, height


def rescale(point: Point, source: Size, target: Size) -> Point:
    """The pixel of a picture of another size that the middle of this one lies in.

    Raises:
      ValueError: a point outside the source.
    """
    _inside(point, source)
    return Point(*((2 * i + 1) * new // (2 * old) for i, old, new in zip(point, source, target, strict=True)))


def to_thousandths(point: Point, size: Size) -> Point:
    """A pixel's middle in thousandths of the sides, rounded; a half goes up.

    `to_pixels` leads back to the same pixel where a side has less than 1000, else to one at most
    1 + side / 2000 pixels away.
    """
    _inside(point, size)
    return Point(*(((2 * i + 1) * 1000 + side) // (2 * side) for i, side in zip(point, size, strict=True)))


def to_pixels(point: Point, size: Size) -> Point:
    """The pixel that a place in thousandths lies in; 1000, the far edge, belongs to the last.

    The published parser rounds x W / 1000, which is half a pixel further and can leave the screen.

    Raises:
      ValueError: coordinates outside 0 ... 1000.
    """
    _inside(point, (1001, 1001))
    return Point(*(min(x * side // 1000, side - 1) for x, side in zip(point, size, strict=True)))


def _inside(point: Point, size: Size) -> None:
    if not all(0 <= i < side for i, side in zip(point, size, strict=True)):
        raise ValueError(
            f"({point[0]}, {point[1]}) is outside; expected x from 0 to {size[0] - 1}, y from 0 to {size[1] - 1}"
        )
