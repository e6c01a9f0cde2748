"""Eight-bit values from the definitions of the formats, block by block, and products of them in float64."""

import math

import numpy as np

E4M3 = [m / 8 * 2.0**-6 for m in range(8)]  # by code: first the subnormal values, 2^-9 apart
E4M3 += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]  # the last code is NaN


def nearest_e4m3(v):
    """The nearest of the finite values; of two as near, the one with an even code."""
    distances = [abs(abs(v) - value) for value in E4M3]
    codes = [code for code, d in enumerate(distances) if d == min(distances)]
    return math.copysign(E4M3[min(codes, key=lambda code: code % 2)], v)


def nearest_integer(v):
    """Ties to even."""
    low = math.floor(v)
    return low if v - low < 0.5 or (v - low == 0.5 and low % 2 == 0) else low + 1


def blocks(length, side):
    side = length if side is None else side
    return [slice(i, min(i + side, length)) for i in range(0, length, max(side, 1))]


def quantise(x, name, block):
    """(values, scales) of a matrix; scale and quotient are float32, as documented."""
    x = np.asarray(x, np.float32)
    top, nearest = {"int8": (127, nearest_integer), "float8_e4m3fn": (448, nearest_e4m3)}[name]
    rows, columns = blocks(x.shape[0], block[0]), blocks(x.shape[1], block[1])
    values, scales = np.zeros(x.shape), np.zeros((len(rows), len(columns)))
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            part = x[r, c]
            if not np.isfinite(part).all():
                scales[i, j] = np.nan
                continue
            scales[i, j] = max(np.abs(part).max() * np.float32(1 / top), np.float32(2.0**-60))
            quotients = part / np.float32(scales[i, j])
            values[r, c] = np.vectorize(lambda v: float(nearest(float(v))))(quotients)
    return values, scales


def dequantise(values, scales, block):
    out = np.zeros_like(values)
    for i, r in enumerate(blocks(values.shape[0], block[0])):
        for j, c in enumerate(blocks(values.shape[1], block[1])):
            out[r, c] = values[r, c] * scales[i, j]
    return out


def matmul(x, w, name, x_block, w_block):
    """(y, x', w'): the product of what the two become."""
    x, w = dequantise(*quantise(x, name, x_block), x_block), dequantise(*quantise(w, name, w_block), w_block)
    return x @ w, x, w
