"""Byte-pair encoding over bytes (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019): no text is unknown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any
from unicodedata import normalize

from jaxrl.data.tokenizer_files import SPLITS
from jaxrl.text.merges import learn_merges
from jaxrl.text.pretokenize import LETTERS, count_words, from_letters, split_words, to_letters
from jaxrl.text.tokenizer import SPECIAL, TrainedTokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@dataclass(frozen=True, kw_only=True)
class BPETokenizer(TrainedTokenizer):
    """Words are cut by `pre`, written as the letters of their bytes, and merged in the order of `merges`.

    nfc: whether text is brought into Unicode's composed form first, as Qwen2 does; then decoding gives that form.
    Where `pre` is "llama-bpe", a word that is a token needs no merges.
    """

    merges: tuple[tuple[str, str], ...]
    pre: str = "gpt-2"
    nfc: bool = False

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, valid UTF-8 or not; no special tokens. `decode_bytes` gives them back (without nfc)."""
        return self._encode(data.decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, special tokens left out."""
        return from_letters("".join(token for i in ids if (token := self.tokens[i]) not in self.special))

    @cached_property
    def _merges(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Pair -> its rank and what it becomes."""
        ids = self._plain
        return {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(self.merges)}

    @cached_property
    def _word(self):
        whole = self._plain if self.pre == "llama-bpe" else {}

        @lru_cache(1 << 16)
        def ids(word: str) -> list[int]:
            letters = to_letters(word)
            if letters in whole:
                return [whole[letters]]
            return apply_merges([self._plain[letter] for letter in letters], self._merges)

        return ids

    def _encode(self, text: str) -> list[int]:
        text = normalize("NFC", text) if self.nfc else text
        return [i for word in split_words(text, self.pre) for i in self._word(word)]

    def _decode(self, tokens: Sequence[str]) -> str:
        return from_letters("".join(tokens)).decode("utf-8", errors="replace")

    def _parts(self) -> dict[str, Any]:
        switches = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        switches |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": self.pre == "llama-bpe"}
        return {
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": byte_level(self.pre),
            "decoder": BYTE_LEVEL | {"use_regex": True},
            "model": {"type": "BPE", **switches, "vocab": self._plain, "merges": [list(pair) for pair in self.merges]},
        }

    @classmethod
    def _from_parts(cls, parts: dict[str, Any], **common: Any) -> "BPETokenizer":
        merges = tuple(tuple(pair) for pair in parts["model"]["merges"])
        pre = next((pre for pre in SPLITS if byte_level(pre) == parts["pre_tokenizer"]), "gpt-2")
        return cls(merges=merges, pre=pre, nfc=parts["normalizer"] is not None, **common)


def train_bpe(
    texts: str | Iterable[str],
    vocab_size: int,
    *,
    pre: str = "gpt-2",
    special: Sequence[str] = SPECIAL,
    min_count: int = 1,
) -> BPETokenizer:
    """Learn merges from texts.

    The pair that occurs most inside words is joined; of equal ones that of the smallest ids. These are the merges that
    `tokenizers` learns; where a pair spells a token that exists already (rare) that library may count differently.

    Args:
      texts: a text, or several.
      vocab_size: of all tokens: 256 bytes, merges, then the special tokens. Fewer where the texts have no more pairs.
      pre: how text is cut into words, see `split_words`; not "metaspace".
      special: the first three are BOS, EOS and padding.
      min_count: of a pair.

    Raises:
      ValueError: a vocabulary smaller than its bytes and special tokens, or fewer than three special tokens.
    """
    room = check_size("train_bpe", vocab_size, 256, special)
    alphabet = sorted(LETTERS)
    ids = {letter: i for i, letter in enumerate(alphabet)}
    words = count_words(texts, lambda text: split_words(text, pre))
    spelt = {tuple(ids[letter] for letter in to_letters(word)): count for word, count in words.items()}
    tokens, merges = learn_merges(spelt, alphabet, room, min_count=min_count)
    return BPETokenizer(
        tokens=(*tokens, *special),
        merges=tuple((tokens[a], tokens[b]) for a, b in merges),
        pre=pre,
        **roles(special),
    )


def apply_merges(word: Sequence[int], merges: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Join the pair of the lowest rank, the leftmost of several, until none is left; O(n log n).

    Args:
      word: ids.
      merges: pair -> (rank, id of what it becomes).
    """
    parts = list(word)
    before, after = list(range(-1, len(word) - 1)), list(range(1, len(word) + 1))
    queue = [(merges[pair][0], i, pair) for i, pair in enumerate(pairwise(word)) if pair in merges]
    heapify(queue)
    while queue:
        _, i, pair = heappop(queue)
        j = after[i]
        if j == len(parts) or (parts[i], parts[j]) != pair:
            continue
        parts[i], parts[j], after[i] = merges[pair][1], -1, after[j]
        if after[i] < len(parts):
            before[after[i]] = i
        for a, b in ((before[i], i), (i, after[i])):
            if a >= 0 and b < len(parts) and (formed := (parts[a], parts[b])) in merges:
                heappush(queue, (merges[formed][0], a, formed))
    return [part for part in parts if part >= 0]


def byte_level(pre: str) -> dict[str, Any]:
    """The entry "pre_tokenizer" of a file whose words are letters of bytes."""
    rule = SPLITS[pre]
    if rule is None:
        return BYTE_LEVEL | {"use_regex": True}
    if rule == "digits":
        steps = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}]
    else:
        steps = [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]
    return {"type": "Sequence", "pretokenizers": steps}


def check_size(name: str, vocab_size: int, alphabet: int, special: Sequence[str]) -> int:
    """The number of tokens that are not special. Raises ValueError if the alphabet does not fit."""
    if len(special) < 3:
        raise ValueError(f"{name}: special is {special!r}; expected at least three texts: BOS, EOS and padding")
    if vocab_size < alphabet + len(special):
        raise ValueError(
            f"{name}: vocab_size is {vocab_size}; expected at least {alphabet + len(special)}: the alphabet of "
            f"{alphabet} and {len(special)} special tokens"
        )
    return vocab_size - len(special)


def roles(special: Sequence[str], *more: str) -> dict[str, Any]:
    """Special tokens as arguments of a tokeniser. more: further ones without a part."""
    bos, eos, pad = special[:3]
    return {"special": (*more, *special), "bos_token": bos, "eos_token": eos, "pad_token": pad}
