"""Rewards for how a completion is written: format, language, repetition. On the host, in linear time."""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

Reward = Callable[..., Sequence[float | None]]

_TAG = re.compile(r"</?[^\W\d]\w*>")

LANGUAGES = {
    "ar": ("ARABIC",),
    "de": ("LATIN",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "es": ("LATIN",),
    "fr": ("LATIN",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "zh": ("CJK",),
}
"""Scripts of a few languages, as the names of Unicode's characters begin."""


def format_reward(
    pattern: str = "<think>...</think><answer>...</answer>", *, soft: bool = False, allow_empty: bool = False
) -> Reward:
    """1 for a completion of the pattern's form, else 0, or with `soft` a share (DeepSeek-R1, arXiv 2501.12948).

    In the pattern, `...` is any text; everything else must stand there, exactly once and in this order. Only white
    space may stand where the pattern has nothing: before, behind and between two tags. The paper gives no formula;
    the share is ours: (pieces that stand exactly once, in order + 1 if all is right) / (pieces + 1), so that it is 1
    only where the strict reward is.

    Args:
      pattern: such as `...</think><answer>...</answer>` for a prompt that ends with the opening tag.
      soft: partial credit.
      allow_empty: let `...` be nothing, or white space only.

    Raises:
      ValueError: a pattern without a fixed piece, that has one twice, or with nothing between two `...`.
    """
    parts = [part.strip() for part in re.split(r"(\.\.\.|<[^<>]*>)", pattern) if part.strip()]
    pieces = [part for part in parts if part != "..."]
    if (
        not pieces
        or len(set(pieces)) < len(pieces)
        or any(a == b == "..." for a, b in zip(parts, parts[1:], strict=False))
    ):
        raise ValueError(
            f"format pattern {pattern!r} has the pieces {pieces}; expected at least one piece besides `...`, each of "
            "them once, and one between two `...`, such as <think>...</think><answer>...</answer>"
        )

    def one(text: str) -> float:
        complete = all(text.count(piece) == 1 for piece in pieces) and _fits(text, parts, allow_empty)
        if complete or not soft:
            return float(complete)
        place, right = 0, 0
        for piece in pieces:
            found = text.find(piece, place)
            if found >= 0 and text.count(piece) == 1:
                place, right = found + len(piece), right + 1
        return right / (len(pieces) + 1)

    return lambda *, completions, **_: [one(text) for text in completions]


def _fits(text: str, parts: list[str], allow_empty: bool) -> bool:
    """Whether the parts follow one another and fill the text; each fixed one stands in it exactly once."""
    place, gap = 0, False
    for part in [*parts, ""]:
        if part == "...":
            gap = True
            continue
        found = text.find(part, place) if part else len(text)
        if found < 0 or (not gap and text[place:found].strip()):
            return False
        if gap and not allow_empty and not text[place:found].strip():
            return False
        place, gap = found + len(part), False
    return True


def language_reward(language: str | Sequence[str]) -> Reward:
    """Share of a completion's letters that are of the language's script (DeepSeek-R1, arXiv 2501.12948, 2.3.2).

        letters of the script / letters; None where there is no letter

    The paper counts words of the target language. Letters need no dictionary and no word borders, but cannot tell two
    languages of one script apart. Tags such as `<think>` do not count.

    Args:
      language: a key of `LANGUAGES`, or the name of a script (or several) as Unicode spells it, such as `LATIN`.

    Raises:
      ValueError: a language or script that is not known.
    """
    names = [language] if isinstance(language, str) else list(language)
    scripts = {script for name in names for script in LANGUAGES.get(name, (name.upper(),))}
    unknown = sorted(scripts - _scripts())
    if unknown or not scripts:
        raise ValueError(
            f"language {language!r}: Unicode has no script {', '.join(unknown) or 'of no name'}; expected one of "
            f"{', '.join(LANGUAGES)}, or a script such as LATIN, CYRILLIC or CJK"
        )

    def one(text: str) -> float | None:
        letters = [_script(c) for c in unicodedata.normalize("NFKC", _TAG.sub(" ", text)) if c.isalpha()]
        return sum(script in scripts for script in letters) / len(letters) if letters else None

    return lambda *, completions, **_: [one(text) for text in completions]


@functools.lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@functools.cache
def _scripts() -> frozenset[str]:
    """First words of the names of all letters; a few, such as MODIFIER, are no scripts and do no harm."""
    return frozenset(_script(chr(code)) for code in range(0x20000) if chr(code).isalpha())


def repetition_reward(*, n: int = 4, weight: float = -1.0, unit: str = "tokens") -> Reward:
    """Punishment of repeated n-grams, after Yeo et al. 2025 (arXiv 2502.03373, appendix C.2).

        weight * (1 - distinct n-grams / n-grams); 0 for completions shorter than n

    The paper punishes each token of a repeated n-gram (n = 40); this is one number a completion, as in Open-R1 and
    TRL, which count words. Natural text repeats short n-grams too: take a larger n for long completions.

    Args:
      n: tokens or words of an n-gram.
      weight: reward of a completion that says one thing for ever; at most 0.
      unit: `tokens`, or `words` between white space, without case.

    Raises:
      ValueError: n below 1, a positive weight, or another unit.
    """
    if n < 1 or weight > 0 or unit not in ("tokens", "words"):
        raise ValueError(
            f"repetition: n = {n}, weight = {weight}, unit = {unit!r}; expected n of at least 1, a weight of at most "
            "0, and tokens or words"
        )

    def one(row: Sequence) -> float:
        count = len(row) - n + 1
        return weight * (1 - len(set(zip(*(row[i:] for i in range(n)), strict=False))) / count) if count > 0 else 0.0

    def repetition(*, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] = (), **_) -> list[float]:
        rows = completion_ids if unit == "tokens" else [text.casefold().split() for text in completions]
        return [one(list(row)) for row in rows]

    return repetition
