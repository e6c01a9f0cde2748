"""Split records by problem: the same prompt never stands on both sides."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def split_by_problem(
    records: Sequence[Record], *, held_out: float | int, column: str = "prompt", salt: str = ""
) -> tuple[list[Record], list[Record]]:
    """Split records into training and held-out ones by a hash of the problem's text.

    held_out: a float in (0, 1): each problem is held out with this probability, decided by its own hash
      alone, so that a data set can be reordered or grow and every problem stays on its side. Or an int: that
      many distinct problems, those with the smallest hashes; the order does not matter, but new problems can
      push old ones into training, so keep to a fraction for data that grows.
    column: the column that tells problems apart (text or messages). salt: another text gives another split.

    Returns (training records, held-out records), each in the given order.
    Raises ValueError if a record lacks the column, held_out is out of range, or one side would be empty.
    """
    for i, record in enumerate(records):
        if column not in record:
            raise ValueError(f"record {i}: no column {column!r} to split by; found {sorted(record)}")
    hashes = [problem_hash(record[column], salt=salt) for record in records]
    distinct = sorted(set(hashes))
    if isinstance(held_out, bool) or held_out <= 0 or (isinstance(held_out, float) and held_out >= 1):
        raise ValueError(f"held_out is {held_out!r}; expected a fraction in (0, 1) or a count of at least 1")
    if isinstance(held_out, int):
        limit = distinct[held_out] if held_out < len(distinct) else 1.0
    else:
        limit = held_out
    training = [record for record, h in zip(records, hashes, strict=True) if h >= limit]
    kept_back = [record for record, h in zip(records, hashes, strict=True) if h < limit]
    if not training or not kept_back:
        raise ValueError(
            f"held_out = {held_out!r} of {len(distinct)} distinct problems leaves {len(training)} records "
            f"for training and {len(kept_back)} held out; both sides need some. Change held_out or add "
            "problems"
        )
    return training, kept_back


def problem_hash(problem: Any, *, salt: str = "") -> float:
    """Return a number in [0, 1) that depends only on the problem's text (stripped) and the salt."""
    text = problem.strip() if isinstance(problem, str) else json.dumps(problem, sort_keys=True)
    digest = hashlib.sha256(f"{salt}\x00{text}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
