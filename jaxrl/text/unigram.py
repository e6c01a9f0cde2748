"""The unigram language model over pieces (Kudo 2018, arXiv 1804.10959; SentencePiece, arXiv 1808.06226)."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxrl.data.tokenizer_files import SPLITS
from jaxrl.text.bpe import BYTE_LEVEL, byte_level, check_size, roles
from jaxrl.text.pretokenize import LETTERS, METASPACE, count_words, from_letters, split_words, to_letters
from jaxrl.text.tokenizer import SPECIAL, TrainedTokenizer

UNKNOWN = "<unk>"
RARE = 0.01
"""The count of a character that larger pieces have made superfluous: later there may be a word without them."""
SPACES = {"type": "Metaspace", "replacement": METASPACE, "prepend_scheme": "never", "split": True}


@dataclass(frozen=True, kw_only=True)
class UnigramTokenizer(TrainedTokenizer):
    """A word becomes the pieces whose log-probabilities have the largest sum.

    scores: log-probability of each token that is a piece; the first is <unk>. pre: "metaspace", where a character
    outside the vocabulary is <unk> (neighbours share one) at the lowest score less 10; or a rule of `split_words` whose
    words are written as letters of bytes: then no text is unknown and decoding gives every text back.
    """

    scores: tuple[float, ...]
    pre: str = "gpt-2"

    def sample(self, text: str, rng: np.random.Generator, *, theta: float = 1.0) -> list[int]:
        """Draw a segmentation with probability proportional to the product of its pieces' probabilities ** theta.

        Subword regularisation; large theta is `encode`, 0 draws all segmentations alike. No special tokens.
        """
        return [i for word in self._words(text) for i in self._draw(word, rng, theta)]

    def _words(self, text: str) -> list[str]:
        words = split_words(text, self.pre)
        return words if self.pre == "metaspace" else [to_letters(word) for word in words]

    @cached_property
    def _pieces(self) -> dict[str, tuple[int, float]]:
        return {token: (i, s) for i, (token, s) in enumerate(zip(self.tokens, self.scores, strict=False))}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._pieces))

    def _edges(self, word: str, start: int) -> list[tuple[int, int, float]]:
        """`(end, id, score)` of the pieces that begin at `start`, short ones first."""
        ends = range(start + 1, min(start + self._longest, len(word)) + 1)
        found = [(end, *self._pieces[word[start:end]]) for end in ends if word[start:end] in self._pieces]
        if found and found[0][0] == start + 1:
            return found
        return [*found, (start + 1, 0, min(self.scores) - 10.0)]

    @cached_property
    def _word(self):
        return lru_cache(1 << 16)(self._viterbi)

    def _viterbi(self, word: str) -> list[int]:
        best, last = [0.0] + [-math.inf] * len(word), [(0, 0)] * (len(word) + 1)
        for start in range(len(word)):
            for end, i, score in self._edges(word, start):
                if best[start] + score > best[end]:
                    best[end], last[end] = best[start] + score, (start, i)
        return _path(last, len(word))

    def _draw(self, word: str, rng: np.random.Generator, theta: float) -> list[int]:
        into: list[list[tuple[int, int, float]]] = [[] for _ in range(len(word) + 1)]
        total, last = [0.0] * (len(word) + 1), [(0, 0)] * (len(word) + 1)
        for start in range(len(word)):
            if start:
                weights = np.array([weight for _, _, weight in into[start]])
                total[start] = float(np.logaddexp.reduce(weights))
            for end, i, score in self._edges(word, start):
                into[end].append((start, i, total[start] + theta * score))
        at = len(word)
        while at:  # the pieces before `at` do not depend on those behind it
            weights = np.array([weight for _, _, weight in into[at]])
            chosen = rng.choice(len(weights), p=np.exp(weights - np.logaddexp.reduce(weights)))
            last[at] = into[at][chosen][:2]
            at = last[at][0]
        return _path(last, len(word))

    def _encode(self, text: str) -> list[int]:
        return [i for word in self._words(text) for i in self._word(word)]

    def _decode(self, tokens: Sequence[str]) -> str:
        if self.pre == "metaspace":
            return "".join(tokens).replace(METASPACE, " ")
        return from_letters("".join(tokens)).decode("utf-8", errors="replace")

    def _parts(self) -> dict[str, Any]:
        plain = self.pre == "metaspace"
        pieces = [[token, score] for token, score in zip(self.tokens, self.scores, strict=False)]
        return {
            "pre_tokenizer": SPACES if plain else byte_level(self.pre),
            "decoder": SPACES if plain else BYTE_LEVEL | {"use_regex": True},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
        }

    @classmethod
    def _from_parts(cls, parts: dict[str, Any], **common: Any) -> "UnigramTokenizer":
        pre = next((pre for pre in SPLITS if byte_level(pre) == parts["pre_tokenizer"]), "metaspace")
        return cls(scores=tuple(score for _, score in parts["model"]["vocab"]), pre=pre, **common)


def _path(last: Sequence[tuple[int, int]], at: int) -> list[int]:
    ids: list[int] = []
    while at:
        at, i = last[at]
        if i or not (ids and ids[-1] == 0):
            ids.append(i)
    return ids[::-1]


def train_unigram(
    texts: str | Iterable[str],
    vocab_size: int,
    *,
    pre: str = "gpt-2",
    special: Sequence[str] = SPECIAL,
    longest: int = 16,
    seed_size: int | None = None,
    keep: float = 0.75,
    em_steps: int = 2,
) -> UnigramTokenizer:
    """Learn pieces and their probabilities from texts.

    Begins with the substrings of words of the largest count times length. Then by turns: `em_steps` steps of EM
    (`e_step`), and the pieces whose loss would cost the least likelihood go (`losses`), until 1.1 `vocab_size` are
    left; the most probable of those stay. Single characters always do, with a count of at least `RARE`. Plain EM, whose
    likelihood never falls; SentencePiece has digamma(count) in place of log(count), which drives rare pieces out.

    Args:
      texts: a text, or several.
      vocab_size: of all tokens: <unk>, pieces, then the special tokens.
      pre: see `UnigramTokenizer`.
      special: the first three are BOS, EOS and padding.
      longest: characters (or bytes) of a piece.
      seed_size: pieces at the beginning; None: 10 `vocab_size`.
      keep: share of the pieces that a round of pruning leaves.
      em_steps: between prunings.

    Raises:
      ValueError: a vocabulary smaller than its characters and special tokens, or no text.
    """
    words = count_words(texts, lambda text: split_words(text, pre))
    if pre != "metaspace":
        words = Counter({to_letters(word): count for word, count in words.items()})
    if not words:
        raise ValueError("train_unigram: texts hold no character; expected text to learn from")
    letters = sorted(LETTERS if pre != "metaspace" else {c for word in words for c in word})
    room = check_size("train_unigram", vocab_size, len(letters) + 1, special) - 1
    pieces, weights = seeds(words, letters, longest=longest, size=seed_size or 10 * vocab_size)
    scores, fixed = np.log(weights / weights.sum()), len(letters)
    corpus = lattices(words, pieces)
    spelt = lattices(dict.fromkeys(pieces, 1), pieces)

    def step(scores):
        _, counts = e_step(corpus, scores)
        counts[:fixed] = np.maximum(counts[:fixed], RARE)
        return m_step(counts), counts

    while True:
        for _ in range(em_steps):
            scores, counts = step(scores)
        if len(pieces) <= max(1.1 * room, fixed):
            break
        size = max(int(1.1 * room), int(keep * len(pieces)), fixed)
        best = fixed + np.argsort(-losses(spelt, scores, counts)[fixed:], kind="stable")[: size - fixed]
        pieces, scores, corpus, spelt = _restrict(np.sort(best), fixed, pieces, scores, corpus, spelt)
    best = fixed + np.argsort(-scores[fixed:], kind="stable")[: room - fixed]
    pieces, scores, corpus, _ = _restrict(np.sort(best), fixed, pieces, scores, corpus, spelt)
    scores = np.maximum(step(scores)[0], math.log(RARE) - math.log(sum(words.values())))
    order = np.argsort(-scores, kind="stable")
    return UnigramTokenizer(
        tokens=(UNKNOWN, *(pieces[i] for i in order), *special),
        scores=(0.0, *scores[order].round(12).tolist()),  # `tokenizers` reads longer numbers off by a bit
        pre=pre,
        **roles(special, UNKNOWN),
    )


class Lattice(NamedTuple):
    """Words of similar length W, up to L characters, and the pieces of up to M characters in them.

    pieces: `[W, L + 1, M]`, the piece that ends before position t and has m + 1 characters, or -1. lengths, counts:
    `[W]`. rows: `[W]`, which words they are.
    """

    pieces: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    rows: np.ndarray


def seeds(words: Mapping[str, int], letters: Sequence[str], *, longest: int, size: int) -> tuple[list[str], np.ndarray]:
    """Letters, and substrings of two or more characters that occur twice, with their count times length."""
    counts: Counter[str] = Counter(dict.fromkeys(letters, 1))
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                counts[word[start:end]] += count
    parts = [part for part, count in counts.items() if len(part) > 1 and count > 1]
    parts.sort(key=lambda part: (-counts[part] * len(part), part))
    pieces = [*letters, *parts[: max(size - len(letters), 0)]]
    return pieces, np.array([counts[piece] * len(piece) for piece in pieces], np.float64)


def lattices(words: Mapping[str, int], pieces: Sequence[str]) -> list[Lattice]:
    """Words with their counts, in groups of lengths up to 4, 8, 16 and so on."""
    ids, longest = {piece: i for i, piece in enumerate(pieces)}, max(map(len, pieces))
    groups: dict[int, list[int]] = {}
    texts = list(words)
    for row, word in enumerate(texts):
        groups.setdefault(max(len(word) - 1, 3).bit_length(), []).append(row)
    found = []
    for rows in groups.values():
        most = max(len(texts[row]) for row in rows)
        table = np.full((len(rows), most + 1, min(longest, most)), -1, np.int32)
        for w, row in enumerate(rows):
            word = texts[row]
            for end in range(1, len(word) + 1):
                for m in range(min(longest, end)):
                    table[w, end, m] = ids.get(word[end - m - 1 : end], -1)
        lengths = np.array([len(texts[row]) for row in rows])
        found.append(Lattice(table, lengths, np.array([words[texts[row]] for row in rows]), np.array(rows)))
    return found


def e_step(corpus: Sequence[Lattice], scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Forward and backward sums over all segmentations, in logs.

    Args:
      corpus: of `lattices`.
      scores: `[N]` log-probabilities of the pieces.

    Returns:
      `(log-likelihood, counts [N])`: sum over words of count log p(word), and how often each piece is expected.
    """
    likelihood, counts = 0.0, np.zeros(len(scores))
    for group in corpus:
        table, rows = _scores(group.pieces, scores), np.arange(len(group.lengths))
        forward = _forward(table, np.logaddexp.reduce)
        backward = np.full(forward.shape, -np.inf)
        backward[rows, group.lengths] = 0.0
        inside = np.full(table.shape, -np.inf)
        for end in range(table.shape[1] - 1, 0, -1):
            m = min(end, table.shape[2])
            starts = slice(end - m, end)
            through = table[:, end, :m] + backward[:, end, None]
            backward[:, starts] = np.logaddexp(backward[:, starts], through[:, ::-1])
            inside[:, end, :m] = forward[:, starts][:, ::-1] + through
        total = forward[rows, group.lengths]
        likelihood += float(group.counts @ total)
        shares = np.exp(inside - total[:, None, None]) * group.counts[:, None, None]
        counts += np.bincount(group.pieces.ravel() + 1, shares.ravel(), len(scores) + 1)[1:]
    return likelihood, counts


def m_step(counts: np.ndarray) -> np.ndarray:
    """The log-probabilities that make expected counts most likely: log(count / sum); -inf where the count is 0."""
    with np.errstate(divide="ignore"):
        return np.log(counts / counts.sum())


def losses(spelt: Sequence[Lattice], scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What the corpus' log-likelihood would lose without each piece, about.

    loss_i = n_i (log(n_i / N) - sum_j log((n_j + n_i) / (N + n_i (k - 1)))), j = 1..k the best segmentation of piece i
    into others, to which its occurrences go; N the sum of all counts n. inf for single characters.

    Args:
      spelt: lattices of the pieces themselves.
      scores, counts: `[N]`.
    """
    found = np.full(len(scores), np.inf)
    for group in spelt:
        rows, n = np.arange(len(group.rows)), counts[group.rows]
        others = group.pieces.copy()
        others[rows, group.lengths, group.lengths - 1] = -1
        table = _scores(others, scores)
        best = _forward(table, np.maximum.reduce)
        at, parts, gained = group.lengths.copy(), np.zeros(len(rows)), np.zeros(len(rows))
        while (open_ := (at > 0) & np.isfinite(best[rows, group.lengths])).any():
            r, m = rows[open_], np.arange(table.shape[2])
            before = np.where(m < at[r, None], best[r[:, None], np.maximum(at[r, None] - m - 1, 0)], -np.inf)
            length = np.argmax(before + table[r, at[r]], axis=1)
            gained[r] += np.log(counts[others[r, at[r], length]] + n[r] + 1e-300)
            parts[r] += 1
            at[r] -= length + 1
        total = counts.sum()
        change = np.log(np.maximum(n, 1e-300) / total) - gained + parts * np.log(total + n * (parts - 1))
        found[group.rows] = np.where(parts > 0, n * change, np.inf)
    return found


def _scores(pieces: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.append(scores, -np.inf)[pieces]


def _forward(table: np.ndarray, reduce) -> np.ndarray:
    """`[W, L + 1]`: the sum (or the best) of all ways to each position."""
    sums = np.full(table.shape[:2], -np.inf)
    sums[:, 0] = 0.0
    for end in range(1, table.shape[1]):
        m = min(end, table.shape[2])
        sums[:, end] = reduce(sums[:, end - m : end][:, ::-1] + table[:, end, :m], axis=1)
    return sums


def _restrict(best, fixed, pieces, scores, corpus, spelt):
    """Keep the first `fixed` pieces and those in `best`."""
    kept = np.concatenate([np.arange(fixed), best])
    new = np.full(len(pieces) + 1, -1, np.int32)
    new[kept] = np.arange(len(kept))
    renamed = lambda group: group._replace(pieces=new[group.pieces])

    def rows(group):
        chosen = new[group.rows] >= 0
        return Lattice(*(part[chosen] for part in group))._replace(rows=new[group.rows[chosen]])

    spelt = [rows(renamed(group)) for group in spelt]
    return [pieces[i] for i in kept], scores[kept], [renamed(group) for group in corpus], spelt
