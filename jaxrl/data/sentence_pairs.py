"""Pairs of sentences from documents, as BERT's and ALBERT's pre-training has them. NumPy, and a function of a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("next", "order")


class SentencePairs(NamedTuple):
    """Rows [CLS] first [SEP] second [SEP], padded on the right.

    `tokens`, `types` (0 up to the first [SEP], then 1) and `real` (0 on padding): [N, T] int32. `maskable`: [N, T]
    bool, real tokens that are not special. `labels`: [N] int32, see `sentence_pairs`.
    """

    tokens: np.ndarray
    types: np.ndarray
    real: np.ndarray
    maskable: np.ndarray
    labels: np.ndarray


def sentence_pairs(
    documents: Sequence[Sequence[Sequence[int]]],
    *,
    length: int,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    kind: str = "next",
    seed: int = 0,
) -> SentencePairs:
    """Cuts documents into pairs of segments of one or more sentences.

    Sentences are taken until they fill a row, and cut in two between two of them, at random.
    "next": in half of the cases the second segment comes from a random place of another document (label 1; what was to
    stand there is used for the next row), else it is the one that follows (label 0). A single sentence always gets a
    stranger. (Devlin et al. 2018, arXiv 1810.04805, appendix A.2.)
    "order": the two, in half of the cases swapped (label 1). (Lan et al. 2019, arXiv 1909.11942, section 3.1.)
    A pair too long loses tokens of its longer segment, at either end. Deviation: no share of short rows on purpose.

    Args:
      documents: each a list of sentences, each a list of token ids.
      length: T, special tokens included.
      cls_id, sep_id, pad_id: special tokens.
      kind: "next" or "order".
      seed: of everything random.

    Raises:
      ValueError: an unknown kind, no room for two tokens, an empty document or sentence, or one document for "next".
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if length < 5:
        raise ValueError(f"length is {length}, expected at least 5: three special tokens and one token on each side")
    if any(not document or any(not len(sentence) for sentence in document) for document in documents):
        raise ValueError("a document or a sentence is empty: leave it out")
    if kind == "next" and len(documents) < 2:
        raise ValueError(f"{len(documents)} document, expected at least two: strangers come from another one")
    random = np.random.default_rng(seed)
    rows = []
    for at, document in enumerate(documents):
        i = 0
        while i < len(document):
            stop, size = i, 0
            while stop < len(document) and size < length - 3:
                stop, size = stop + 1, size + len(document[stop])
            cut = i + int(random.integers(1, max(stop - i, 2)))
            first, second, label = document[i:cut], document[cut:stop], int(random.integers(2))
            i = stop
            if kind == "next" and (label or not second):
                other = documents[(at + 1 + int(random.integers(len(documents) - 1))) % len(documents)]
                second, label, i = other[int(random.integers(len(other))) :], 1, cut
            elif not second:
                continue
            elif label and kind == "order":
                first, second = second, first
            both = [[token for sentence in segment for token in sentence] for segment in (first, second)]
            rows.append((*_shortened(random, both, length - 3), label))
    return _padded(rows, length, cls_id, sep_id, pad_id)


def _shortened(random: np.random.Generator, both: list[list[int]], most: int) -> list[list[int]]:
    while len(both[0]) + len(both[1]) > most:
        longer = both[0] if len(both[0]) > len(both[1]) else both[1]
        longer.pop(0 if random.random() < 0.5 else -1)
    return both


def _padded(rows, length, cls_id, sep_id, pad_id) -> SentencePairs:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    types, real = np.zeros_like(tokens), np.zeros_like(tokens)
    special = np.ones(tokens.shape, bool)
    for row, (first, second, _) in enumerate(rows):
        middle, end = len(first) + 2, len(first) + len(second) + 3
        tokens[row, :end] = [cls_id, *first, sep_id, *second, sep_id]
        real[row, :end], types[row, middle:end] = 1, 1
        special[row, 1 : middle - 1], special[row, middle : end - 1] = False, False
    return SentencePairs(tokens, types, real, ~special, np.array([label for *_, label in rows], np.int32))
