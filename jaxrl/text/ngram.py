"""N-gram language models of integer tokens: the baseline row of every language experiment.

`count` reads a stream of tokens once; `smooth` turns counts into probabilities, `probability` and `perplexity` read
them. All of it is sorting and searching in NumPy.

A model is what a back-off file holds. An n-gram seen in training has its probability, whatever the method; of one that
was not, P(w | h) = weight(h) P(w | h'), h' the context without its oldest word, weight 1 for a context never seen.
Below the unigrams is the uniform distribution over the vocabulary, so every token has a probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

METHODS = ("add-k", "jelinek-mercer", "katz", "kneser-ney", "modified kneser-ney", "stupid back-off")


class Counts(NamedTuple):
    """The n-grams of a stream, orders 1 to n; entry k - 1 of each is for order k, in the order of `keys`.

    keys: `[G_k]` sorted; an n-gram is (its row among those of order k - 1, its last word), as row * vocab_size + word.
    counts: `[G_k]`. suffix: `[G_k]`, the row of the n-gram without its oldest word among those of order k - 1.
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    suffix: tuple[np.ndarray, ...]


class NGram(NamedTuple):
    """probabilities: of the n-grams seen. weights: entry k is for contexts of k words; `[1]` at 0, the empty one.

    unseen: the weight of a context that was not seen. normalised: whether probabilities sum to 1.
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    probabilities: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    unseen: float = 1.0
    normalised: bool = True


def count(tokens: np.ndarray, order: int, *, vocab_size: int) -> Counts:
    """Count the n-grams of one stream, or of rows that know nothing of each other.

    No padding: the first tokens have shorter contexts. Let texts in a stream end with a token of their own.

    Args:
      tokens: `[T]`, or rows `[R, T]`, integers in [0, vocab_size).
      order: n.
      vocab_size: V.
    """
    tokens = _checked("count", tokens, vocab_size)
    length = tokens.shape[1]
    if order < 1 or not len(tokens) or length < order:
        raise ValueError(f"count: order is {order} and there are {length} tokens; expected 1 <= order <= tokens")
    rows = np.zeros((len(tokens), length + 1), np.int64)  # of the n-gram of the order before that ends at each token
    keys, counts, suffix = [], [], []
    for k in range(1, order + 1):
        pairs = rows[:, :-1] * vocab_size + tokens[:, k - 1 :]
        found, first, inverse, times = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        keys.append(found)
        counts.append(times)
        suffix.append(rows[:, 1:].reshape(-1)[first])
        rows = inverse.reshape(pairs.shape)
    return Counts(vocab_size, tuple(keys), tuple(counts), tuple(suffix))


def smooth(
    counts: Counts,
    method: str = "modified kneser-ney",
    *,
    k: float = 1.0,
    weights: Sequence[float] | None = None,
    back_off: float = 0.4,
) -> NGram:
    """Probabilities from counts.

    Write c(hw) for a count, c(h) for its sum over w, V for the size of the vocabulary.

    "add-k": (c(hw) + k) / (c(h) + k V) at the highest order, uniform after an unseen context.
    "jelinek-mercer": l_n c(hw) / c(h) + (1 - l_n) P(w | h'), down to the uniform distribution.
    "katz": d(c) c(hw) / c(h) if c(hw) > 0, else weight(h) P(w | h'); Good-Turing d for c <= 5 (Katz 1987).
    "kneser-ney": interpolated, max(c - D, 0) / c(h) + D N1+(h .) / c(h) P(w | h'), D = n1 / (n1 + 2 n2); below the
      highest order c counts the different words before an n-gram (Kneser and Ney 1995; Chen and Goodman 1999).
    "modified kneser-ney": the same with D1, D2, D3+ for counts of 1, 2, 3 and more: D_j = j - (j + 1) Y n_{j+1} / n_j,
      Y = n1 / (n1 + 2 n2).
    "stupid back-off": c(hw) / c(h) if c(hw) > 0, else back_off S(w | h'): no distribution (Brants et al. 2007).

    Args:
      counts: of `count`.
      method: one of `METHODS`.
      k: of add-k.
      weights: of Jelinek-Mercer, l_1 to l_n in [0, 1); `fit_weights` finds them on held-out tokens. Required there.
      back_off: of stupid back-off.

    Where too few n-grams occur once or twice to estimate a discount, D is 0.5, and Katz discounts as D does.
    """
    if method not in METHODS:
        raise ValueError(f"smooth: method is {method!r}; expected one of {', '.join(map(repr, METHODS))}")
    order, size = len(counts.keys), counts.vocab_size
    if method == "jelinek-mercer" and (
        weights is None or len(weights) != order or not all(0 <= w < 1 for w in weights)
    ):
        raise ValueError(
            f"smooth: weights are {weights}; expected {order} numbers in [0, 1), one for each order: "
            "fit_weights(counts, held_out)"
        )
    probabilities, contexts = [], []
    lower = np.array([1.0 / size])
    for n in range(1, order + 1):
        c = counts.counts[n - 1]
        if "kneser" in method and n < order:
            c = _continuations(counts, n)
        groups = 1 if n == 1 else len(counts.keys[n - 2])
        prefix, below = counts.keys[n - 1] // size, lower[counts.suffix[n - 1]]
        sums = lambda values, prefix=prefix, groups=groups: np.bincount(prefix, values, groups)
        total = sums(c)
        share = c / total[prefix]
        if method == "add-k":
            weight = size * k / (total + size * k) if n == order else np.ones(groups)
            seen = (c + k) / (total[prefix] + k * size) if n == order else below
        elif method == "jelinek-mercer":
            level = float(weights[n - 1])  # pyright: ignore[reportOptionalSubscript]
            weight = np.where(total > 0, 1 - level, 1.0)
            seen = level * share + (1 - level) * below
        elif method == "stupid back-off":
            weight, seen = np.full(groups, back_off), share
        elif method == "katz":
            left = sums(c * (1 - _good_turing(c))) > 1e-9 * total
            # Where nothing was taken off, one more count: for what was not seen.
            seen = _good_turing(c) * c / np.where(left, total, total + 1)[prefix]
            everything = sums(np.ones_like(c)) == size
            seen = np.where(everything[prefix], seen / sums(seen)[prefix], seen)
            rest = np.maximum(1 - sums(below), 0)
            weight = np.where(total > 0, (1 - sums(seen)) / np.where(everything | (rest <= 0), 1.0, rest), 1.0)
        else:
            taken = np.minimum(_discount(c, modified=method != "kneser-ney"), c)
            weight = np.where(total > 0, sums(taken) / np.maximum(total, 1), 1.0)
            seen = (c - taken) / total[prefix] + weight[prefix] * below
        contexts.append(weight)
        probabilities.append(seen)
        lower = seen
    stupid = method == "stupid back-off"
    return NGram(
        size, counts.keys, tuple(probabilities), tuple(contexts), back_off if stupid else 1.0, normalised=not stupid
    )


def probability(model: NGram, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """P(word | context).

    Args:
      model: of `smooth`.
      contexts: `[N, n - 1]`, oldest word first; -1 on the left where the context is shorter.
      words: `[N]`.

    Returns:
      `[N]` float64.
    """
    contexts, words = np.asarray(contexts, np.int64), _stream("probability", words, model.vocab_size)
    if contexts.shape != (len(words), len(model.keys) - 1):
        raise ValueError(
            f"probability: contexts have the shape {contexts.shape}; expected {(len(words), len(model.keys) - 1)}: the "
            "n - 1 words before each word"
        )
    if contexts.size and (contexts.min() < -1 or contexts.max() >= model.vocab_size):
        raise ValueError(f"probability: contexts hold ids outside [-1, {model.vocab_size})")
    found = np.full(len(words), 1.0 / model.vocab_size)
    for k in range(len(model.keys)):  # words of context
        row = np.zeros(len(words), np.int64)
        for place in range(k):
            row = _find(model.keys[place], row, contexts[:, contexts.shape[1] - k + place], model.vocab_size)
        weight = np.where(row < 0, model.unseen, model.weights[k][row])
        if k:  # a context that the text's beginning cuts short is not backed off from
            weight = np.where(contexts[:, contexts.shape[1] - k] < 0, 1.0, weight)
        row = _find(model.keys[k], row, words, model.vocab_size)
        found = np.where(row < 0, weight * found, model.probabilities[k][row])
    return found


def perplexity(model: NGram, tokens: np.ndarray) -> float:
    """exp(-mean log P(token | the n - 1 before)) of a stream or of rows `[R, T]`, each of which begins anew.

    inf where the model gives a token no probability.

    Of stupid back-off it is the same number of scores, which do not sum to 1: compare it with nothing else.
    """
    tokens = _checked("perplexity", tokens, model.vocab_size)
    if not tokens.size:
        raise ValueError("perplexity: there are no tokens; expected at least one")
    known = np.concatenate([contexts(row, len(model.keys)) for row in tokens])
    with np.errstate(divide="ignore"):
        return float(np.exp(-np.log(probability(model, known, tokens.reshape(-1))).mean()))


def ngram_perplexity(
    train: np.ndarray,
    test: np.ndarray,
    order: int = 3,
    method: str = "modified kneser-ney",
    *,
    vocab_size: int | None = None,
    k: float = 1.0,
    weights: Sequence[float] | None = None,
) -> float:
    """Perplexity of `test` under an n-gram model of `train`, both streams of tokens or rows `[R, T]`.

    vocab_size: the largest id of both and 1 if not given. Jelinek-Mercer without weights: those that fit the last tenth
    of the stream `train` best after the rest of it.
    """
    size = vocab_size or int(max(np.max(train), np.max(test))) + 1
    if method == "jelinek-mercer" and weights is None:
        cut = len(train) - len(train) // 10
        weights = fit_weights(count(train[:cut], order, vocab_size=size), train[cut:])
    return perplexity(smooth(count(train, order, vocab_size=size), method, k=k, weights=weights), test)


def fit_weights(counts: Counts, held_out: np.ndarray, *, steps: int = 50) -> tuple[float, ...]:
    """Jelinek-Mercer's l_1 to l_n by EM on tokens that were not counted (Jelinek and Mercer 1980).

    P = sum_k m_k c(h_k w) / c(h_k) / sum_k m_k, k = 0 (uniform) to n, over the orders whose context was seen. Each step
    gives m_k the share that order k had in the tokens' probabilities, and the held-out likelihood never falls. Then
    l_n = m_n / (m_0 + ... + m_n), which leaves the rest to the orders below.
    """
    held_out = _stream("fit_weights", held_out, counts.vocab_size)
    order, size = len(counts.keys), counts.vocab_size
    history = contexts(held_out, order)
    likely = np.zeros((len(held_out), order + 1))
    seen = np.zeros_like(likely, dtype=bool)
    likely[:, 0], seen[:, 0] = 1.0 / size, True
    for k in range(order):
        row = np.zeros(len(held_out), np.int64)
        for place in range(k):
            row = _find(counts.keys[place], row, history[:, order - 1 - k + place], size)
        totals = np.bincount(counts.keys[k] // size, counts.counts[k], len(counts.keys[k - 1]) if k else 1)
        seen[:, k + 1] = (row >= 0) & (totals[row] > 0)
        found = _find(counts.keys[k], row, held_out, size)
        likely[:, k + 1] = np.where(found >= 0, counts.counts[k][found] / np.maximum(totals[row], 1), 0.0)
    mixture = np.full(order + 1, 1 / (order + 1))
    for _ in range(steps):
        shares = mixture * seen
        joint = likely * shares / (likely * shares).sum(axis=1, keepdims=True)
        # Each token stands for 1 / sum(shares) draws of an order, of which those without a context were lost.
        drawn = np.where(seen, joint, mixture / shares.sum(axis=1, keepdims=True)).sum(axis=0)
        mixture = drawn / drawn.sum()
    return tuple(float(m) for m in mixture[1:] / np.cumsum(mixture)[1:])


def contexts(tokens: np.ndarray, order: int) -> np.ndarray:
    """`[T, order - 1]`: the tokens before each, oldest first, -1 before the beginning."""
    padded = np.concatenate([np.full(order - 1, -1, np.int64), np.asarray(tokens, np.int64)])
    return np.lib.stride_tricks.sliding_window_view(padded, order)[:, :-1]


def _continuations(counts: Counts, n: int) -> np.ndarray:
    """N1+(. g): how many different words stand before each n-gram; its count where it only begins rows."""
    before = np.bincount(counts.suffix[n], minlength=len(counts.keys[n - 1]))
    return np.where(before > 0, before, counts.counts[n - 1])


def _discount(c: np.ndarray, *, modified: bool) -> np.ndarray:
    n = np.bincount(np.minimum(c, 5), minlength=6)[:5].astype(np.float64)
    if n[1] == 0 or n[2] == 0:
        return np.full(len(c), 0.5)
    y = n[1] / (n[1] + 2 * n[2])
    if not modified:
        return np.full(len(c), y)
    steps = [j - (j + 1) * y * n[j + 1] / n[j] if n[j] else y for j in (1, 2, 3)]
    return np.array([0.0, *np.clip(steps, 0, (1, 2, 3))])[np.minimum(c, 3)]


def _good_turing(c: np.ndarray, largest: int = 5) -> np.ndarray:
    """What is left of each count, as a share of it."""
    n = np.bincount(np.minimum(c, largest + 2), minlength=largest + 3).astype(np.float64)
    r = np.arange(1, largest + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = (largest + 1) * n[largest + 1] / n[1]
        kept = ((r + 1) * n[r + 1] / (r * n[r]) - beyond) / (1 - beyond)
    absolute = 1 - _discount(np.minimum(c, 5), modified=False)[0] / r if len(c) else kept
    kept = np.where((kept > 0) & (kept < 1), kept, absolute)
    return np.concatenate([[1.0], kept, [1.0]])[np.minimum(c, largest + 1)]


def _find(keys: np.ndarray, rows: np.ndarray, words: np.ndarray, size: int) -> np.ndarray:
    """The rows of n-grams, -1 where one was not seen."""
    wanted = rows * size + words
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((rows >= 0) & (words >= 0) & (keys[at] == wanted), at, -1)


def _stream(name: str, tokens: np.ndarray, size: int) -> np.ndarray:
    """One stream `[T]`."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"{name}: tokens are {tokens.dtype} of shape {tokens.shape}; expected [T] integers")
    return _checked(name, tokens, size)[0]


def _checked(name: str, tokens: np.ndarray, size: int) -> np.ndarray:
    """Rows `[R, T]`, a stream being one."""
    tokens = np.asarray(tokens)
    if tokens.ndim not in (1, 2) or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"{name}: tokens are {tokens.dtype} of shape {tokens.shape}; expected [T] or [R, T] integers")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        wrong = tokens[(tokens < 0) | (tokens >= size)][0]
        raise ValueError(f"{name}: token {wrong} is outside [0, {size}); map unknown words to a token of their own")
    return np.atleast_2d(tokens.astype(np.int64))
