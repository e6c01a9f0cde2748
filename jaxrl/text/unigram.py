"""The unigram language model over pieces (Kudo 2018, arXiv 1804.10959; SentencePiece, arXiv 1808.06226)."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.special import digamma

from jaxrl.data.tokenizer_files import SPLITS
from jaxrl.text.bpe import BYTE_LEVEL, byte_level, check_size, roles
from jaxrl.text.pretokenize import LETTERS, METASPACE, count_words, from_letters, split_words, to_letters
from jaxrl.text.tokenizer import SPECIAL, TrainedTokenizer

UNKNOWN = "<unk>"
PENALTY = 10.0
"""What an unknown character is less probable than the least probable piece, in nats."""
SPACES = {"type": "Metaspace", "replacement": METASPACE, "prepend_scheme": "never", "split": True}


@dataclass(frozen=True, kw_only=True)
class UnigramTokenizer(TrainedTokenizer):
    """A word becomes the pieces whose log-probabilities have the largest sum.

    scores: log-probability of each token that is a piece; the first is <unk>. pre: "metaspace", where a character
    outside the vocabulary is <unk> (neighbours share one) at the lowest score less `PENALTY`; or a rule of
    `split_words` whose words are written as letters of bytes: then no text is unknown and decoding gives every text
    back.
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
        return [*found, (start + 1, 0, min(self.scores) - PENALTY)]

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
    seed_size: int = 1_000_000,
    keep: float = 0.75,
    em_steps: int = 2,
) -> UnigramTokenizer:
    """Learn pieces and their probabilities from texts; the vocabulary is the one that `tokenizers` learns.

    Begins with `seeds`. Then by turns: `em_steps` steps of EM (`e_step`, `m_step`), and the pieces whose loss would
    cost the least likelihood go (`losses`), until at most 1.1 `vocab_size` are left. Of those the characters stay, then
    the pieces whose loss cost most when it was last reckoned.

    Args:
      texts: a text, or several.
      vocab_size: of all tokens: <unk>, pieces, then the special tokens.
      pre: see `UnigramTokenizer`.
      special: the first three are BOS, EOS and padding.
      longest: characters (or bytes) of a piece.
      seed_size: pieces at the beginning, at most.
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
    pieces, scores = seeds(words, longest=longest, size=seed_size)
    corpus, spelt = lattices(words, pieces), lattices(dict.fromkeys(pieces, 1), pieces)
    most = vocab_size * 11 // 10
    while True:
        for _ in range(em_steps):
            _, counts = e_step(corpus, scores)
            kept, scores = m_step(counts)
            pieces, corpus, spelt = _restrict(kept, pieces, corpus, spelt)
        if len(pieces) <= most:
            break
        lost = losses(spelt, scores, viterbi_counts(corpus, scores))
        kept = np.argsort(-lost, kind="stable")[: min(max(most, int(keep * len(pieces))), (lost > -np.inf).sum())]
        scores = scores[kept]
        pieces, corpus, spelt = _restrict(kept, pieces, corpus, spelt)
    found = dict(zip(pieces[1:], scores[1:].tolist(), strict=True))
    superfluous = [letter for letter in letters if letter not in found]
    found |= {letter: min(found.values()) + 1e-4 * i for i, letter in enumerate(superfluous)}
    rest = [piece for piece in found if len(piece) > 1]
    chosen = sorted([*letters, *rest[: room - len(letters)]], key=lambda piece: -found[piece])
    return UnigramTokenizer(
        tokens=(UNKNOWN, *chosen, *special),
        scores=(0.0, *(round(found[piece], 12) for piece in chosen)),  # `tokenizers` reads longer numbers off by a bit
        pre=pre,
        **roles(special, UNKNOWN),
    )


class Lattice(NamedTuple):
    """Words of similar length W, up to L characters, and the pieces of up to M characters in them.

    pieces: `[W, L + 1, M]`, the piece that ends before position t and has m + 1 characters, or -1; of a character that
    is no piece 0. lengths, counts: `[W]`. rows: `[W]`, which words they are.
    """

    pieces: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    rows: np.ndarray


def seeds(words: Mapping[str, int], *, longest: int, size: int) -> tuple[list[str], np.ndarray]:
    """The first pieces and their scores: the characters of words, and the parts that go on in different ways.

    A part that the same character always follows is left to the longer part (what stays are the inner nodes of the
    words' suffix tree; that a word ends is a way to go on). Scores are log shares: of a character its count, of a part
    its length times the number of its places in distinct words; they fall. The first piece, "" without a score, stands
    for unknown characters.
    """
    letters: Counter[str] = Counter()
    parts: dict[str, tuple[int, str | None]] = {}
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
        for start in range(len(word)):
            for end in range(start + 2, min(start + longest, len(word)) + 1):
                part, follower = word[start:end], word[end : end + 1]
                places, before = parts.get(part, (0, follower))
                parts[part] = places + 1, follower if follower == before else None
    characters = sorted(((count, letter) for letter, count in letters.items()), reverse=True)
    branching = ((places * len(part), part) for part, (places, follower) in parts.items() if follower is None)
    chosen = [*characters, *sorted(branching, reverse=True)[: max(size - len(characters), 0)]]
    weights = np.array([weight for weight, _ in chosen], np.float64)
    return ["", *(piece for _, piece in chosen)], np.append(np.nan, np.log(weights) - np.log(weights.sum()))


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
                    table[w, end, m] = ids.get(word[end - m - 1 : end], -1 if m else 0)
        lengths = np.array([len(texts[row]) for row in rows])
        found.append(Lattice(table, lengths, np.array([words[texts[row]] for row in rows]), np.array(rows)))
    return found


def e_step(corpus: Sequence[Lattice], scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Forward and backward sums over all segmentations, in logs.

    Args:
      corpus: of `lattices`.
      scores: `[N]` log-probabilities of the pieces; the first is not read: it is the least less `PENALTY`.

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


def m_step(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces expected half a time or more, and their scores digamma(count) - digamma(sum); what is unknown stays.

    The variational Bayes step under a sparse Dirichlet prior (Liang and Klein 2007) in place of log(count / sum): it
    drives rare pieces out.

    Returns:
      `(indices [K], scores [K])`.
    """
    kept = np.append(0, 1 + np.nonzero(counts[1:] >= 0.5)[0])
    return kept, np.append(np.nan, digamma(counts[kept[1:]]) - digamma(counts[kept[1:]].sum()))


def viterbi_counts(corpus: Sequence[Lattice], scores: np.ndarray) -> np.ndarray:
    """`[N]`: how often each piece occurs when every word is cut in the best way."""
    counts = np.zeros(len(scores))
    for group in corpus:
        best = _best_ways(group.pieces, group.lengths, scores)
        counts += np.bincount(best.ravel() + 1, np.repeat(group.counts, best.shape[1]), len(scores) + 1)[1:]
    return counts


def losses(spelt: Sequence[Lattice], scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What the corpus' log-likelihood would lose without each piece, about.

    loss_i = n_i (log(n_i / S) - sum_j log((n_j + n_i) / (S + n_i (N - 1)))), j the best segmentation of piece i into
    others, to which its occurrences go; S the sum of all counts n. With k others, k - 1 would stand where N - 1 does:
    `tokenizers`, as SentencePiece once did, has the number of all pieces there, which favours frequent ones.

    Args:
      spelt: lattices of the N pieces themselves.
      scores, counts: `[N]`; counts of `viterbi_counts`.

    Returns:
      `[N]`: inf for single characters and what is unknown, -inf for others that do not occur.
    """
    found, total = np.zeros(len(scores)), counts.sum()
    for group in spelt:
        rows, n = np.arange(len(group.rows)), counts[group.rows]
        others = group.pieces.copy()
        others[rows, group.lengths, group.lengths - 1] = -1
        parts = _best_ways(others, group.lengths, scores)[:, ::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            gained = np.log(counts[parts] + n[:, None]) - np.log(total + n * (len(scores) - 1))[:, None]
            gained = np.cumsum(np.where(parts >= 0, gained, 0.0), axis=1)[:, -1]  # in order: equal losses stay equal
            lost = n * (np.log(n) - np.log(total) - gained)
        found[group.rows] = np.where(group.lengths > 1, np.where(n > 0, lost, -np.inf), np.inf)
    return found


def _scores(pieces: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.concatenate([[scores[1:].min() - PENALTY], scores[1:], [-np.inf]])[pieces]


def _forward(table: np.ndarray, reduce) -> np.ndarray:
    """`[W, L + 1]`: the sum (or the best) of all ways to each position."""
    sums = np.full(table.shape[:2], -np.inf)
    sums[:, 0] = 0.0
    for end in range(1, table.shape[1]):
        m = min(end, table.shape[2])
        sums[:, end] = reduce(sums[:, end - m : end][:, ::-1] + table[:, end, :m], axis=1)
    return sums


def _best_ways(pieces: np.ndarray, lengths: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`[W, L]`: the pieces of the best segmentation of each word from its end, then -1. Of equals the longest last."""
    table = _scores(pieces, scores)
    best, ways = _forward(table, np.maximum.reduce), np.full((len(lengths), table.shape[1] - 1), -1)
    at, m = lengths.copy(), np.arange(table.shape[2])[::-1]
    for i in range(ways.shape[1]):
        (r,) = np.nonzero((at > 0) & np.isfinite(best[np.arange(len(at)), lengths]))
        starts = at[r, None] - m - 1
        before = np.where(starts >= 0, best[r[:, None], np.maximum(starts, 0)], -np.inf)
        length = m[np.argmax(before + table[r[:, None], at[r, None], m], axis=1)]
        ways[r, i] = pieces[r, at[r], length]
        at[r] -= length + 1
    return ways


def _restrict(
    kept: np.ndarray, pieces: list[str], corpus: Sequence[Lattice], spelt: Sequence[Lattice]
) -> tuple[list[str], list[Lattice], list[Lattice]]:
    """Pieces in the order of `kept`, and lattices over them; a character that is gone is unknown."""
    new = np.full(len(pieces) + 1, -1, np.int32)
    new[kept] = np.arange(len(kept))

    def renamed(group):
        table = new[group.pieces]
        inside = np.arange(table.shape[1]) <= group.lengths[:, None]
        inside[:, 0] = False
        table[:, :, 0] = np.where(inside, np.maximum(table[:, :, 0], 0), -1)
        return group._replace(pieces=table)

    def rows(group):
        chosen = new[group.rows] >= 0
        return Lattice(*(part[chosen] for part in group))._replace(rows=new[group.rows[chosen]])

    remaining = [pieces[int(i)] for i in kept]
    return remaining, [renamed(group) for group in corpus], [renamed(rows(group)) for group in spelt]
