"""The table of shapes and masks that every attention implementation is held to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxrl.kernels.attention import (
    BlockDiffusion,
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Prefix,
    Segments,
    Span,
    Tree,
    Window,
)

RNG = np.random.default_rng(0)


class Case(NamedTuple):
    """One call; predicate(row, head, query, key) says what the mask means. Axes are named as in the door."""

    mask: Mask
    predicate: Callable[[int, int, int, int], Any]
    b: int = 2
    t: int = 130
    s: int = 130
    h: int = 4
    k: int = 2
    d: int = 8
    dv: int = 6
    q_offset: int = 0
    soft_cap: float | None = None
    scale: float | None = None
    sinks: bool = False
    bias: tuple[int, int, int, int] | None = None
    alibi: bool = False
    dropout: float = 0.0
    pallas: bool = True


SEGMENTS = np.sort(RNG.integers(0, 4, (2, 130)), axis=1).astype(np.int32)
Q_IDS = RNG.integers(0, 4, (2, 17)).astype(np.int32)  # ids of 3 have no key: their rows are masked whole
KV_IDS = RNG.integers(0, 3, (2, 40)).astype(np.int32)
LENGTHS = np.array([0, 70], np.int32)
END = np.minimum(np.arange(130) + RNG.integers(1, 90, (2, 130)), 130).astype(np.int32)
START = RNG.integers(0, 150, (2, 37)).astype(np.int32)
STOP = np.minimum(START + RNG.integers(-9, 90, (2, 37)), 150).astype(np.int32)
ARRAY = RNG.random((2, 4, 130, 130)) < 0.3
ARRAY[:, :, ::7] = False  # rows masked whole
ARRAY[1, :, :, 64:] = False  # tiles masked whole
HALF = 65


def block_diffusion(block):
    """[x_t ; x_0]: own noisy block; clean tokens of earlier blocks; clean tokens up to the own block."""

    def predicate(row, head, q, k):
        q_clean, k_clean = q >= HALF, k >= HALF
        q_block, k_block = q % HALF // block, k % HALF // block
        if not k_clean:
            return not q_clean and q_block == k_block
        return k_block <= q_block if q_clean else k_block < q_block

    return predicate


CASES = {
    "causal": Case(Causal(), lambda b, h, q, k: k <= q),
    "one_token": Case(Full(), lambda b, h, q, k: True, t=1, s=1, scale=0.7),
    "cross": Case(Full(), lambda b, h, q, k: True, t=17, s=150, h=3, k=1, soft_cap=0.5, sinks=True),
    "window": Case(Window(20), lambda b, h, q, k: 0 <= q - k < 20, s=150, q_offset=20, h=2, soft_cap=2.0),
    "chunked": Case(Causal() & Chunked(33), lambda b, h, q, k: k <= q and q // 33 == k // 33, dv=8, b=1, sinks=True),
    "prefix": Case(Causal() | Prefix(LENGTHS), lambda b, h, q, k: k <= q or k < LENGTHS[b]),
    "packed": Case(Causal() & Segments(SEGMENTS), lambda b, h, q, k: k <= q and SEGMENTS[b, q] == SEGMENTS[b, k], h=2),
    "empty_segments": Case(Segments(Q_IDS, KV_IDS), lambda b, h, q, k: Q_IDS[b, q] == KV_IDS[b, k], t=17, s=40),
    "tree": Case(Tree(END), lambda b, h, q, k: k <= q < END[b, k], h=3, k=1, dv=16),
    "span": Case(Span(START, STOP), lambda b, h, q, k: START[b, q] <= k < STOP[b, q], t=30, s=150, q_offset=7, h=2),
    "block_diffusion": Case(BlockDiffusion(13), block_diffusion(13), h=2),
    "before_the_keys": Case(
        Causal() & Dense(ARRAY), lambda b, h, q, k: k <= q and ARRAY[b, h, q, k], pallas=False, sinks=True
    ),
    "dense_bias": Case(
        Dense(ARRAY), lambda b, h, q, k: ARRAY[b, h, q, k], pallas=False, bias=(2, 4, 130, 130), soft_cap=3.0
    ),
    "alibi": Case(Causal(), lambda b, h, q, k: k <= q, alibi=True, t=70, s=150, q_offset=80, soft_cap=1.0),
    "dropout": Case(Window(60), lambda b, h, q, k: 0 <= q - k < 60, dropout=0.3, s=150, q_offset=20, sinks=True),
    "distance_bias": Case(
        Causal(), lambda b, h, q, k: k <= q, pallas=False, bias=(1, 4, 1, 150), t=70, s=150, q_offset=80
    ),
}
