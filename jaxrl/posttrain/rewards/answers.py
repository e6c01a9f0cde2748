"""Rewards for a right answer, read from text: as a number, or as a formula."""

import importlib.util
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from jaxrl.data import reasoning
from jaxrl.posttrain.rewards.extract import boxed, last_number, marked
from jaxrl.posttrain.rewards.isolate import isolated

Reward = Callable[..., Sequence[float | None]]


def number_reward(
    *,
    marker: str | None = None,
    tag: str | None = None,
    tolerance: float = 0.0,
    relative: float = 0.0,
    percent: bool = True,
) -> Reward:
    r"""1 where a completion's number is the expected one, else 0; None where the `answer` column holds no number.

        |given - expected| <= max(tolerance, relative * |expected|), in exact arithmetic

    The number is the last one of the marked part, or of the whole completion, or of its last `\boxed{}`; how it is
    read says `last_number`. The answer is read in the same way, so that a worked solution that ends in `#### 42` will
    do. A completion without a number, without the mark, or cut off by the length limit earns nothing.

    Args:
      marker: text after whose last occurrence the answer stands.
      tag: name of the tags between which it stands, such as `answer`.
      tolerance: absolute.
      relative: to the expected number.
      percent: 50% is 1/2; otherwise 50.

    Raises:
      ValueError: a negative tolerance.
    """
    if not (tolerance >= 0 and relative >= 0):
        raise ValueError(f"number: tolerance {tolerance} and relative {relative}; expected 0 or more")
    absolute, share = Fraction(str(tolerance)), Fraction(str(relative))
    given = _marked_or_boxed(marker, tag)

    def one(text: str, answer: Any, reason: str) -> float | None:
        expected = last_number(_expected(answer, marker), percent=percent)
        if expected is None:
            return None
        part = given(text) if reason != "length" else None
        number = None if part is None else last_number(part, percent=percent)
        return float(number is not None and abs(number - expected) <= max(absolute, share * abs(expected)))

    return _each_answer(one)


def math_reward(
    *, marker: str | None = None, tag: str | None = None, timeout: float = 5.0, strict: bool = False
) -> Reward:
    r"""1 where a completion's formula equals the expected one, else 0, by the package math-verify (and SymPy).

    The formula is that of the marked part, or of the whole completion, or of its last `\boxed{}`. It may be LaTeX,
    with or without `$`; in plain prose it is the last number. It is read by a grammar, never evaluated as Python: this
    happens in a process of its own, in which evaluation is switched off, memory is limited and time is short.

    Args:
      marker, tag: as in `number_reward`.
      timeout: seconds for each completion; one that takes longer has no reward, and a warning says so.
      strict: raise on such a completion instead.

    Returns:
      A reward that reads the columns `completions` and `answer`.

    Raises:
      ValueError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("math_reward needs math-verify, which is not installed: pip install 'jaxrl[reasoning]'")
    checks = isolated(
        f"{Path(__file__).with_name('maths.py')}:equivalent",
        timeout=timeout, each=True, strict=strict, evaluation=False, memory_gb=4.0,
    )  # fmt: skip
    given = _marked_or_boxed(marker, tag)

    def maths(*, completions, answer, finish_reasons=None, **_) -> list[float | None]:
        reasons = finish_reasons or ["eos"] * len(completions)
        parts = [given(text) if reason != "length" else None for text, reason in zip(completions, reasons, strict=True)]
        rows = [i for i, part in enumerate(parts) if part]
        expected = [_expected(answer[i], marker) for i in rows]
        values = checks(given=[parts[i] for i in rows], expected=[boxed(e) or e for e in expected]) if rows else []
        result: list[float | None] = [0.0] * len(parts)
        for i, value in zip(rows, values, strict=True):
            result[i] = value
        return result

    return maths


def reasoning_reward(*, tag: str | None = "answer", marker: str | None = None) -> Reward:
    """The score of a completion's answer by its own task of reasoning-gym; None for a record without a task.

    Reads the columns of `data.reasoning.reasoning_records`. The answer stands between the last pair of tags, or after
    the last marker. A completion without the mark, or cut off by the length limit, earns 0.

    Args:
      tag, marker: as in `marked`; None for both takes the whole completion.

    Raises:
      ValueError: from a call, as `data.reasoning.score_answer`.
    """

    def score(*, completions, answer, task, metadata, options=None, finish_reasons=None, **_) -> list[float | None]:
        reasons = finish_reasons or ["eos"] * len(completions)
        values: list[float | None] = []
        for i, text in enumerate(completions):
            given = None if reasons[i] == "length" else marked(text, tag=tag, marker=marker)
            record = {"answer": answer[i], "task": task[i], "metadata": metadata[i], "options": options and options[i]}
            known = reasoning.score_answer(given, **record) if given is not None and task[i] else 0.0
            values.append(known if task[i] else None)
        return values

    return score


def _marked_or_boxed(marker: str | None, tag: str | None) -> Callable[[str], str | None]:
    def read(text: str) -> str | None:
        part = marked(text, marker=marker, tag=tag)
        return part if part is None else boxed(part) or part

    return read


def _expected(answer: Any, marker: str | None) -> str:
    return str(answer).rpartition(marker)[2].strip() if marker else str(answer).strip()


def _each_answer(one: Callable[[str, Any, str], float | None]) -> Reward:
    def reward(*, completions, answer, finish_reasons=None, **_) -> list[float | None]:
        reasons = finish_reasons or ["eos"] * len(completions)
        return [one(*row) for row in zip(completions, answer, reasons, strict=True)]

    return reward
