"""A tiny rasteriser: shapes with smooth edges on a NumPy picture, for `Env.render`, on the host.

A picture is uint8 [height, width, 3]. Points are (x, y), x to the right and y downwards, in pixels; a `View` turns the
coordinates of a world, with y upwards, into pixels.
"""

from typing import NamedTuple

import numpy as np

Colour = tuple[int, int, int]
Point = tuple[float, float]

WHITE, BLACK, GREY, LIGHT = (255, 255, 255), (34, 34, 40), (140, 140, 148), (228, 230, 234)
BLUE, ORANGE, GREEN, RED, YELLOW = (53, 105, 176), (222, 128, 52), (71, 148, 82), (196, 64, 64), (240, 196, 64)


class View(NamedTuple):
    """A window on a world: the rectangle from `low` to `high`, y upwards, fitted into `size` = (width, height)."""

    low: Point
    high: Point
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels to a unit of the world, the same along both axes."""
        return min(self.size[i] / (self.high[i] - self.low[i]) for i in (0, 1))

    def __call__(self, x: float, y: float) -> Point:
        """The pixel of a point of the world; the rectangle stands in the middle of the picture."""
        centre_x, centre_y = ((self.low[i] + self.high[i]) / 2 for i in (0, 1))
        return (
            self.size[0] / 2 + (x - centre_x) * self.scale,
            self.size[1] / 2 - (y - centre_y) * self.scale,
        )


def blank(width: int, height: int, colour: Colour = WHITE) -> np.ndarray:
    """A picture of one colour, uint8 [height, width, 3]."""
    return np.full((height, width, 3), colour, np.uint8)


def line(picture: np.ndarray, start: Point, end: Point, *, width: float = 2.0, colour: Colour = BLACK) -> None:
    """Draws a line with round ends, `width` pixels thick."""
    _paint(picture, lambda x, y: _to_segment(x, y, start, end) - width / 2, colour, (start, end), width / 2)


def polyline(picture: np.ndarray, points, *, width: float = 2.0, colour: Colour = BLACK) -> None:
    """Draws lines from each of the points to the next."""
    for start, end in zip(points[:-1], points[1:], strict=True):
        line(picture, start, end, width=width, colour=colour)


def circle(picture: np.ndarray, centre: Point, radius: float, *, colour: Colour = BLACK) -> None:
    """Fills a circle."""
    _paint(picture, lambda x, y: np.hypot(x - centre[0], y - centre[1]) - radius, colour, (centre,), radius)


def rectangle(picture: np.ndarray, corner: Point, opposite: Point, *, colour: Colour = BLACK) -> None:
    """Fills a rectangle with edges along the axes, between two opposite corners."""
    left, right = sorted((corner[0], opposite[0]))
    top, bottom = sorted((corner[1], opposite[1]))

    def outside(x, y):
        return np.maximum(
            np.abs(x - (left + right) / 2) - (right - left) / 2, np.abs(y - (top + bottom) / 2) - (bottom - top) / 2
        )

    _paint(picture, outside, colour, (corner, opposite), 0.0)


def polygon(picture: np.ndarray, points, *, colour: Colour = BLACK) -> None:
    """Fills a polygon, convex or not, whose edges do not cross."""

    def outside(x, y):
        inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
        distance = np.full(inside.shape, np.inf)
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            distance = np.minimum(distance, _to_segment(x, y, (x0, y0), (x1, y1)))
            if y0 != y1:
                inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        return np.where(inside, -distance, distance)

    _paint(picture, outside, colour, points, 0.0)


def arrow(picture: np.ndarray, start: Point, end: Point, *, width: float = 2.0, colour: Colour = BLACK) -> None:
    """Draws a line with a head at `end`."""
    line(picture, start, end, width=width, colour=colour)
    along = np.subtract(end, start) / max(np.hypot(*np.subtract(end, start)), 1e-9)
    across = np.array((-along[1], along[0]))
    tip, base = np.asarray(end) + 2 * width * along, np.asarray(end) - 2 * width * along
    polygon(picture, [tuple(tip), tuple(base + 2 * width * across), tuple(base - 2 * width * across)], colour=colour)


def _to_segment(x, y, start, end):
    """Distance of pixels to a segment."""
    (x0, y0), (x1, y1) = start, end
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2
    along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max(length, 1e-9), 0.0, 1.0)
    return np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))


def _paint(picture, distance, colour, points, margin):
    """Blends `colour` where the signed distance to a shape is below half a pixel, around `points` only."""
    height, width, _ = picture.shape
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, right = (int(np.clip(v, 0, width)) for v in (min(xs) - margin - 1, max(xs) + margin + 2))
    top, bottom = (int(np.clip(v, 0, height)) for v in (min(ys) - margin - 1, max(ys) + margin + 2))
    if left >= right or top >= bottom:
        return
    x, y = np.arange(left, right)[None] + 0.5, np.arange(top, bottom)[:, None] + 0.5
    cover = np.clip(0.5 - distance(x, y), 0.0, 1.0)[..., None]
    part = picture[top:bottom, left:right]
    part[:] = np.rint(cover * np.asarray(colour) + (1.0 - cover) * part).astype(np.uint8)
