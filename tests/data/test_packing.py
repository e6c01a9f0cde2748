"""Packing: nothing lost or cut, rows full, the same rows every time."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.packing import best_fit, limit_length, pack
from jaxrl.data.records import Examples


def make(lengths, *, trained_from=1, seed=0):
    """Examples of given lengths whose tokens are all different."""
    width = max(lengths)
    columns = np.arange(width)
    tokens = 1 + np.arange(len(lengths) * width).reshape(len(lengths), width)
    inside = columns < np.array(lengths)[:, None]
    return Examples(
        np.where(inside, tokens, 0).astype(np.int32),
        (inside & (columns >= trained_from)).astype(np.float32),
        np.array(lengths, np.int32),
    )


def oracle(lengths, width):
    """Best-fit decreasing by looking at every row."""
    rows, room = [], []
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[example]]
        if fitting:
            least = min(room[r] for r in fitting)
            best = [r for r in fitting if room[r] == least]
        else:
            rows.append([])
            room.append(width)
            best = [len(rows) - 1]
        # which of equally full rows is filled is free: compared below by what matters
        rows[best[-1]].append(example)
        room[best[-1]] -= lengths[example]
    return sorted(room)


@given(st.lists(st.integers(1, 17), min_size=1, max_size=40), st.integers(17, 40))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_example_stands_once_in_a_row_with_room(lengths, width):
    rows = best_fit(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= width
    assert sorted(width - u for u in used) == oracle(lengths, width)


def test_short_examples_fill_what_long_ones_leave():
    assert best_fit([2, 5, 3, 5, 4, 8], 8) == [[5], [1, 0], [3, 2], [4]]  # 2 and 0 go where 3 are free, not 4
    assert best_fit([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert best_fit([], 8) == []


def test_rows_are_the_same_every_time_and_quick():
    lengths = np.random.default_rng(0).integers(1, 4097, size=100_000)
    start = time.perf_counter()
    rows = best_fit(lengths, 4096)
    assert time.perf_counter() - start < 10  # well under one second on an idle core; quadratic would take minutes
    assert rows == best_fit(lengths, 4096)
    assert len(rows) <= 1.01 * lengths.sum() / 4096


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_fits_no_row_is_named(length):
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens; expected 1 to width = 8 .1 of 2 are outside"):
        best_fit([3, length], 8)


def test_packed_rows_hold_the_examples_with_segments_from_one():
    examples = make([2, 5, 3])
    batch = pack(examples, 6, pad_id=99)
    np.testing.assert_array_equal(batch.tokens, [[6, 7, 8, 9, 10, 99], [11, 12, 13, 1, 2, 99]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0]])
    assert batch.tokens.dtype == batch.segments.dtype == np.int32 and batch.loss_mask.dtype == np.float32


def test_the_first_token_of_an_example_is_never_a_target():
    """`text` without BOS masks its first token in; nothing stands before it that could predict it."""
    batch = pack(make([2, 3], trained_from=0), 5)
    np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 0, 1]])


def test_rows_can_be_given_and_filled_up_to_a_multiple():
    batch = pack(make([2, 3]), 5, rows=[[0], [1]], multiple=4)
    np.testing.assert_array_equal(batch.segments[:, 0], [1, 1, 0, 0])
    assert batch.tokens.shape == (4, 5) and batch.loss_mask[2:].sum() == 0


@pytest.mark.parametrize(
    ("overlong", "lengths", "count"), [("drop", [2, 3], 2), ("cut", [2, 3, 3], 2)]
)  # of 4 tokens trained from 3 on, nothing is left in 3
def test_overlong_examples_are_dropped_or_cut_and_counted(overlong, lengths, count):
    examples = make([2, 5, 3, 4])
    examples.loss_mask[3, :3] = 0
    limited, overlong_count = limit_length(examples, 3, overlong=overlong)
    assert limited.lengths.tolist() == lengths and overlong_count == count
    assert limited.tokens.shape == limited.loss_mask.shape == (len(lengths), 3)
    if overlong == "cut":
        np.testing.assert_array_equal(limited.tokens[1], examples.tokens[1, :3])


def test_nothing_changes_where_nothing_is_too_long():
    examples = make([2, 5, 3])
    for overlong in ("error", "drop", "cut"):
        limited, count = limit_length(examples, 5, overlong=overlong)
        assert count == 0
        for a, b in zip(limited, examples, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("width", "overlong", "message"),
    [
        (3, "error", "1 of 2 examples are longer than width = 3 tokens; the first is example 1, of 5. Raise the width"),
        (3, "trim", "overlong is 'trim'; expected error, drop or cut"),
        (1, "drop", "no example of 2 is left with width = 1"),
        (1, "cut", "no example of 2 is left with width = 1"),
    ],
)
def test_what_cannot_be_limited_is_refused(width, overlong, message):
    with pytest.raises(ValueError, match=message):
        limit_length(make([2, 5]), width, overlong=overlong)
