"""Places keep their meaning from one unit to another; sizes are those of Qwen2-VL."""

import math

import pytest

from jaxrl.gui import Point, rescale, smart_resize, to_pixels, to_thousandths


@pytest.mark.parametrize("side", [1, 2, 7, 24, 500, 997, 999])
def test_pixels_come_back_from_thousandths(side):
    for i in range(side):
        there = to_thousandths(Point(i, 0), (side, 3)).x
        assert there == math.floor(1000 * (i + 0.5) / side + 0.5) or abs(1000 * (i + 0.5) / side % 1 - 0.5) < 1e-9
        assert to_pixels(Point(there, 0), (side, 3)).x == i


@pytest.mark.parametrize("side", [1000, 1920, 3840])
def test_wide_screens_come_back_nearly(side):
    for i in range(0, side, 7):
        back = to_pixels(to_thousandths(Point(i, 0), (side, 1)), (side, 1)).x
        assert abs(back - i) <= 1 + side // 2000


def test_thousandths_cover_the_screen():
    found = [to_pixels(Point(x, 1000), (24, 24)) for x in range(1001)]
    assert [point.x for point in found] == [min(math.floor(24 * x / 1000), 23) for x in range(1001)]
    assert {point.x for point in found} == set(range(24)) and {point.y for point in found} == {23}


def test_rescaling_goes_by_middles():
    assert [rescale(Point(i, 0), (4, 1), (8, 1)).x for i in range(4)] == [1, 3, 5, 7]
    assert [rescale(Point(i, 0), (8, 1), (4, 1)).x for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    screen = (1920, 1080)
    small = smart_resize((800, 600))
    for x in range(0, 800, 13):
        assert rescale(rescale(Point(x, 5), (800, 600), screen), screen, (800, 600)) == Point(x, 5)
        assert abs(rescale(Point(x, 5), (800, 600), small).x - (x + 0.5) * small[0] / 800) <= 1


@pytest.mark.parametrize(
    ("size", "qwen", "tars"),
    [
        ((1920, 1080), (1316, 728), (1932, 1092)),
        ((1280, 720), (1288, 728), (1288, 728)),
        ((24, 24), (56, 56), (280, 280)),
        ((3840, 2160), (1316, 728), (3836, 2156)),
        ((1, 199), (28, 812), (28, 3976)),
        ((2560, 1440), (1316, 728), (2548, 1428)),
        ((1179, 2556), (672, 1456), (1176, 2548)),
        ((42, 70), (56, 56), (224, 364)),
        ((5000, 30), (5012, 28), (5012, 28)),
    ],
)
def test_sizes_are_those_of_the_reference(size, qwen, tars):
    """From the `smart_resize` of transformers 5.24, defaults, and with the limits of UI-TARS-1.5."""
    assert smart_resize(size) == qwen
    assert smart_resize(size, min_pixels=100 * 28 * 28, max_pixels=16384 * 28 * 28) == tars


def test_a_thin_screen():
    """Its short side rounds to nothing: it is scaled up as one that is too small."""
    assert smart_resize((1400, 10)) == (math.ceil(1400 * math.sqrt(3136 / 14000) / 28) * 28, 28) == (672, 28)


def test_bad_sizes_and_places():
    for size in ((0, 5), (1, 201)):
        with pytest.raises(ValueError, match="expected sides of 1 or more"):
            smart_resize(size)
    for point in (Point(4, 0), Point(0, 3), Point(-1, 0)):
        for convert in (lambda point: rescale(point, (4, 3), (8, 8)), lambda point: to_thousandths(point, (4, 3))):
            with pytest.raises(ValueError, match="is outside; expected x from 0 to 3, y from 0 to 2"):
                convert(point)
    with pytest.raises(ValueError, match="x from 0 to 1000"):
        to_pixels(Point(1001, 0), (4, 3))
