r"""How text is cut into words before a vocabulary is learnt, and the letters that stand for bytes.

Rules are named as in `jaxrl.data.tokenizer_files.SPLITS`: "gpt-2", "smollm" (single digits, then GPT-2's rule),
"llama-bpe" (Llama 3), "qwen2". Their regular expressions use \p{L} and \p{N}, which the module `re` lacks, and a \s
that is Unicode's White_Space, where `re` adds U+001C to U+001F. So each class is written out as ranges of code points,
taken from `unicodedata`. Letters that are newer than this Python's Unicode version count as punctuation.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from jaxrl.data.tokenizer_files import SPLITS, letter

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
METASPACE = "\u2581"
CONTROL = ("Cc", "Cf", "Co", "Cs")
CHINESE = "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\uf900-\ufaff"
CHINESE += "\U0002f800-\U0002fa1f"
LETTERS = "".join(letter(byte) for byte in range(256))
"""The printable letter of each byte, GPT-2's."""

_TO_LETTERS = {byte: letter for byte, letter in enumerate(LETTERS)}
_FROM_LETTERS = {ord(letter): byte for byte, letter in enumerate(LETTERS)}


def split_words(text: str, pre: str) -> list[str]:
    """Cut text into words; joined again they are the text.

    Args:
      text: any text.
      pre: a key of `SPLITS`, or "metaspace": spaces become U+2581 and each begins a word (SentencePiece, here without
        the space that it puts before a text).
    """
    if pre == "metaspace":
        return re.findall(f"{METASPACE}[^{METASPACE}]*|[^{METASPACE}]+", text.replace(" ", METASPACE))
    if pre not in SPLITS:
        raise ValueError(f"split_words: pre is {pre!r}; expected 'metaspace' or one of {', '.join(map(repr, SPLITS))}")
    parts = re.split(f"([{_members()['N']}])", text) if SPLITS[pre] == "digits" else [text]
    return [word for part in parts for word in _rule(pre).findall(part)]


def to_letters(word: str) -> str:
    """One letter per UTF-8 byte; a lone surrogate U+DC80 to U+DCFF is the byte that `surrogateescape` made it from."""
    return word.encode("utf-8", "surrogateescape").decode("latin-1").translate(_TO_LETTERS)


def from_letters(letters: str) -> bytes:
    """The bytes of letters."""
    return bytes(_FROM_LETTERS[ord(letter)] for letter in letters)


def bert_words(text: str, *, lowercase: bool = True) -> list[str]:
    """Words as BERT cuts them: at white space, each punctuation mark and each Chinese character by itself.

    Control characters are dropped; with `lowercase` accents are too. `tokenizers` knows marks and punctuation of an
    older Unicode version than Python's, and so cuts a few hundred rare characters otherwise.
    """
    text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in CONTROL and c != "\ufffd")
    text = re.sub(f"([{CHINESE}])", r" \1 ", text)
    if lowercase:
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        text = "".join(c.lower() for c in text)
    return re.findall(f"[{_members()['P']}]|[^{SPACES}{_members()['P']}]+", text)


def count_words(texts: str | Iterable[str], split) -> Counter[str]:
    """How often each word occurs in texts, in the order in which they are first seen."""
    counts: Counter[str] = Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        counts.update(split(text))
    return counts


@lru_cache
def _members() -> dict[str, str]:
    r"""The insides of brackets: "L" and "N" as \p has them, "P" what BERT calls punctuation."""
    found: dict[str, list[int]] = {"L": [], "N": [], "P": [c for c in range(33, 127) if not chr(c).isalnum()]}
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))[0]
        if kind in "LN" or (kind == "P" and code > 126):
            found[kind].append(code)
    return {kind: _ranges(codes) for kind, codes in found.items()}


def _ranges(codes: list[int]) -> str:
    starts = [c for c, before in zip(codes, [-2, *codes], strict=False) if c != before + 1]
    ends = [c for c, after in zip(codes, [*codes[1:], -2], strict=True) if c + 1 != after]
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(starts, ends, strict=True))


@lru_cache
def _rule(pre: str) -> re.Pattern[str]:
    rule = SPLITS[pre]
    classes = {r"\p{L}": _members()["L"], r"\p{N}": _members()["N"], r"\s": SPACES}

    def written_out(match: re.Match[str]) -> str:
        found = match.group()
        if found.startswith("["):
            return re.sub(r"\\p\{[LN]\}|\\s", lambda inner: classes[inner.group()], found)
        return f"[^{SPACES}]" if found == r"\S" else f"[{classes[found]}]"

    plain = GPT2 if rule in (None, "digits") else rule
    return re.compile(re.sub(r"\[[^\]]*\]|\\p\{[LN]\}|\\s|\\S", written_out, plain))
