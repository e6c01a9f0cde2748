"""Finding the answer in a completion, and reading it as a number. Every scan is linear in the text; nothing is run."""

import re
from collections import deque
from fractions import Fraction

_DIGITS = r"(?:[0-9]{1,3}(?:[,_\u00a0\u202f\u2009][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"""[$€£¥]?(?P<sign>(?<![\w.)\]}}])[-+−–])?[$€£¥]?
    (?P<digits>{_DIGITS})
    (?:[eE](?P<exponent>[-+]?[0-9]+)|[ ]?(?:×|\\times|\*)[ ]?10\^\{{?(?P<power>[-+−]?[0-9]+)\}}?)?
    (?:[ ]?/[ ]?(?P<below>{_DIGITS}))?
    (?P<percent>[ ]?%)?""",
    re.VERBOSE,
)
_FRACTION = re.compile(r"\\[dt]?frac\{([-+]?[0-9.]{1,300})\}\{([0-9.]{1,300})\}")
_SEPARATORS = str.maketrans("", "", ",_\u00a0\u202f\u2009")
_MOST = 300
"""Digits, and the exponent of ten, of a number that is still read: exact arithmetic with more can take for ever."""


def marked(text: str, *, marker: str | None = None, tag: str | None = None) -> str | None:
    r"""The answer that a text marks, without white space around it.

    Args:
      text: a completion.
      marker: the answer stands after the last of these, such as `####`.
      tag: the answer stands in the last pair of these, `answer` for `<answer>...</answer>`; of both, inside the pair.

    Returns:
      The answer; the whole text if neither was asked for; None where the mark is missing.
    """
    if tag is not None:
        end = text.rfind(f"</{tag}>")
        start = text.rfind(f"<{tag}>", 0, max(end, 0))
        if start < 0:
            return None
        text = text[start + len(tag) + 2 : end]
    if marker is not None:
        before, found, text = text.rpartition(marker)
        if not found:
            return None
    return text.strip()


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces balanced; None without one, or with one that does not end."""
    start = text.rfind("\\boxed{")
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)) if start >= 0 else ():
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin:place].strip()
    return None


def last_number(text: str, *, percent: bool = True) -> Fraction | None:
    r"""The last number of a text, exactly.

    Read are signs (also the typographic minus), groups of three digits with `,`, `_` or a narrow space between them,
    decimals with a point, `1e-3`, `3 × 10^4`, fractions `3/4` and `\frac{3}{4}`, per cent and a currency before the
    number. A sign after a letter, digit or bracket is an operator: the last number of `10-3` is 3. A comma is no
    decimal point: the last number of `1,5` is 5.

    Args:
      text: any text.
      percent: 50% is 1/2; otherwise 50.

    Returns:
      The number; None without one, if it divides by zero, or has more than 300 digits or tens.
    """
    text = _FRACTION.sub(r" \1/\2 ", text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$"))
    found = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    return None if found is None else _value(found, percent)


def whole_number(text: str) -> Fraction | None:
    """The text as a number if it is nothing else, as `last_number` reads it; else None."""
    text = text.strip().removesuffix(".")
    return last_number(text) if _NUMBER.fullmatch(text) else None


def vote_key(text: str) -> str:
    """A spelling that equal answers share: of a number its exact value, else the text without case and extra space."""
    number = whole_number(text)
    return str(number) if number is not None else " ".join(text.casefold().split())


def _value(found: re.Match, percent: bool) -> Fraction | None:
    above, below = (_decimal(found[name] or "1") for name in ("digits", "below"))
    tens = (found["exponent"] or found["power"] or "0").replace("−", "-")
    if above is None or not below or len(tens) > 5 or abs(int(tens)) > _MOST:
        return None
    value = above * Fraction(10) ** int(tens) / below
    value = value / 100 if percent and found["percent"] else value
    return -value if found["sign"] and found["sign"] != "+" else value


def _decimal(digits: str) -> Fraction | None:
    return Fraction(digits.translate(_SEPARATORS)) if len(digits) <= _MOST else None
