"""Learning merges: what BPE and WordPiece share."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Pair = tuple[int, int]


def learn_merges(
    words: Mapping[tuple[int, ...], int],
    tokens: Sequence[str],
    vocab_size: int,
    *,
    join: Callable[[str, str], str] = str.__add__,
    score: str = "count",
    min_count: int = 1,
) -> tuple[list[str], list[Pair]]:
    """Join the best pair of neighbours, again and again.

    score "count": count(ab), as Sennrich et al. 2016 (arXiv 1508.07909). "likelihood": count(ab) / (count(a) count(b)),
    the pair that raises the likelihood of a unigram model most per occurrence (Schuster and Nakajima 2012). Of equal
    scores the smallest pair of ids.

    Args:
      words: words as ids of `tokens` -> how often they occur. No pair crosses two words.
      tokens: the alphabet, id -> token.
      vocab_size: where to stop; earlier if no pair is left that occurs `min_count` times.
      join: the spelling of a pair. One that is spelt as a token already becomes that token.
      score: "count" or "likelihood".
      min_count: of a pair.

    Returns:
      `(tokens, merges)`: the alphabet and what was joined, and the pairs in order.
    """
    if score not in ("count", "likelihood"):
        raise ValueError(f"learn_merges: score is {score!r}; expected 'count' or 'likelihood'")
    tokens, ids = list(tokens), {token: i for i, token in enumerate(tokens)}
    spelt, times = [list(word) for word in words], list(words.values())
    slots: dict[Pair, int] = {}
    pairs, counts = np.zeros((1024, 2), np.int64), np.zeros(1024, np.int64)
    symbols = np.zeros(vocab_size, np.int64)
    where: defaultdict[Pair, set[int]] = defaultdict(set)

    def add(pair: Pair, word: int, change: int) -> None:
        nonlocal pairs, counts
        slot = slots.setdefault(pair, len(slots))
        if slot == len(counts):
            pairs, counts = np.concatenate([pairs, 0 * pairs]), np.concatenate([counts, 0 * counts])
        pairs[slot] = pair
        counts[slot] += change * times[word]
        if change > 0:
            where[pair].add(word)

    for i, word in enumerate(spelt):
        for pair in zip(word, word[1:], strict=False):
            add(pair, i, 1)
        for symbol in word:
            symbols[symbol] += times[i]

    merges: dict[Pair, None] = {}
    while len(tokens) < vocab_size:
        seen, found = pairs[: len(slots)], counts[: len(slots)]
        values = np.where(found >= max(min_count, 1), found, 0)
        if score == "likelihood":
            values = values / np.maximum(symbols[seen[:, 0]] * symbols[seen[:, 1]], 1)
        if not len(values) or values.max() <= 0:
            break
        left, right = min(map(tuple, seen[values == values.max()].tolist()))
        spelling = join(tokens[left], tokens[right])
        if spelling not in ids:
            ids[spelling] = len(tokens)
            tokens.append(spelling)
        merges.setdefault((left, right))
        new = ids[spelling]
        for i in where.pop((left, right)):
            before, after = spelt[i], _joined(spelt[i], left, right, new)
            for change, word in ((-1, before), (1, after)):
                for pair in zip(word, word[1:], strict=False):
                    add(pair, i, change)
            joined = (len(before) - len(after)) * times[i]
            symbols[left] -= joined
            symbols[right] -= joined
            symbols[new] += joined
            spelt[i] = after
    return tokens, list(merges)


def _joined(word: Sequence[int], left: int, right: int, new: int) -> list[int]:
    after, i = [], 0
    while i < len(word):
        found = word[i] == left and i + 1 < len(word) and word[i + 1] == right
        after.append(new if found else word[i])
        i += 2 if found else 1
    return after
