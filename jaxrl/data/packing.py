"""Packing: several examples in a row, kept apart by segment ids. No example is cut, lost or repeated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxrl.data.records import Examples

if TYPE_CHECKING:  # as in `preferences`
    from jaxrl.types import TokenBatch


def best_fit(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Best-fit decreasing: longest first, each into the fullest row that still has room (Ding et al. 2024,
    arXiv 2404.10830).

    The rows are at most 11/9 of the fewest possible, and four (Johnson 1974). O(n log n) for a width, and the same
    rows for the same lengths: among equal lengths the earlier comes first, among equal rows the newer is filled.

    lengths: [n] tokens of each example, 1 to width. width: tokens of a row.

    Returns the examples of each row, in the order in which they stand there.
    Raises ValueError for a length outside [1, width].
    """
    lengths = np.asarray(lengths, np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > width))
    if len(wrong):
        raise ValueError(
            f"example {wrong[0]} has {lengths[wrong[0]]} tokens; expected 1 to width = {width} ({len(wrong)} of "
            f"{len(lengths)} are outside). Use a larger width, or shorten or drop them with limit_length"
        )
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # by room left
    rooms = 0  # bit r is set where open_rows[r] is not empty
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            rows[row].append(example)
        else:
            room, row = width, len(rows)
            rows.append([example])
        open_rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def pack(
    examples: Examples, width: int, *, rows: list[list[int]] | None = None, multiple: int = 1, pad_id: int = 0
) -> "TokenBatch":
    """Put examples into rows of `width` tokens.

    A token reads only tokens of its own example, and positions begin anew with each: `score.log_probs_of` sees to
    both, so that log-probs, losses and gradients are those of the unpacked examples. The first token of an
    example has none before it and leaves the loss mask.

    examples: N of them, from `encode_examples`. width: of a row.
    rows: which examples stand in each row, as `best_fit` returns (and by default it is asked): example
      rows[r][s] is segment s + 1 of row r. multiple: empty rows are added up to a multiple of it (a batch, a mesh).
    pad_id: the id at the end of rows; masked, so any will do.

    Returns TokenBatch of numpy arrays [R, width] with segments 1, 2, ... in each row and 0 on padding.
    Raises ValueError if an example is longer than a row (see `limit_length`).
    """
    from jaxrl.types import TokenBatch

    rows = best_fit(examples.lengths, width) if rows is None else rows
    height = -(-len(rows) // multiple) * multiple
    tokens = np.full((height, width), pad_id, np.int32)
    loss_mask = np.zeros((height, width), np.float32)
    segments = np.zeros((height, width), np.int32)
    for r, row in enumerate(rows):
        start = 0
        for s, example in enumerate(row):
            length = int(examples.lengths[example])
            end = start + length
            tokens[r, start:end] = examples.tokens[example, :length]
            loss_mask[r, start + 1 : end] = examples.loss_mask[example, 1:length]
            segments[r, start:end] = s + 1
            start = end
    return TokenBatch(tokens, loss_mask, segments)  # pyright: ignore  (numpy for JAX)


def limit_length(examples: Examples, width: int, *, overlong: str = "error") -> tuple[Examples, int]:
    """Deal with examples of more than `width` tokens.

    overlong: "error" refuses them; "drop" leaves them out; "cut" keeps their first `width` tokens, whose end is
      then not trained as an end: there is no EOS. What has no target left once cut is left out.

    Returns (examples as wide as the longest left, how many were dropped or cut).
    Raises ValueError for an unknown name, if an example is too long under "error", or if none would be left.
    """
    if overlong not in ("error", "drop", "cut"):
        raise ValueError(f"overlong is {overlong!r}; expected error, drop or cut")
    long = examples.lengths > width
    count = int(long.sum())
    if count and overlong == "error":
        first = int(np.flatnonzero(long)[0])
        raise ValueError(
            f"{count} of {len(long)} examples are longer than width = {width} tokens; the first is example {first}, of "
            f"{examples.lengths[first]}. Raise the width, or choose overlong = drop or cut"
        )
    kept = ~long if overlong != "cut" else ~long | examples.loss_mask[:, 1:width].any(axis=1)
    if not kept.any():
        raise ValueError(f"no example of {len(long)} is left with width = {width} and overlong = {overlong}; raise it")
    lengths = np.minimum(examples.lengths[kept], width)
    longest = int(lengths.max())
    return Examples(examples.tokens[kept, :longest], examples.loss_mask[kept, :longest], lengths), count
