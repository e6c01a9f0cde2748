"""N-gram models, Word2Vec losses and WordPiece training as loops over strings and tuples, from the papers."""

import math
from collections import Counter, defaultdict

import numpy as np


def ngram_counts(tokens, order):
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


class Oracle:
    """P(w | h) by recursion, each count looked up anew."""

    def __init__(self, tokens, order, vocab_size, method, k=1.0, weights=None, back_off=0.4):
        self.tokens, self.order, self.size, self.method = [int(t) for t in tokens], order, vocab_size, method
        self.k, self.levels, self.back_off = k, weights, back_off
        self.raw = {n: ngram_counts(self.tokens, n) for n in range(1, order + 1)}
        self.counts = dict(self.raw)
        if "kneser" in method:
            for n in range(1, order):
                before = defaultdict(set)
                for gram in self.raw[n + 1]:
                    before[gram[1:]].add(gram[0])
                self.counts[n] = {g: len(before[g]) if g in before else self.raw[n][g] for g in self.raw[n]}

    def of_counts(self, n, r):
        return sum(1 for c in self.counts[n].values() if c == r)

    def absolute(self, n):
        n1, n2 = self.of_counts(n, 1), self.of_counts(n, 2)
        return n1 / (n1 + 2 * n2) if n1 and n2 else 0.5

    def discount(self, n, c):
        if self.method == "kneser-ney" or not (self.of_counts(n, 1) and self.of_counts(n, 2)):
            return min(self.absolute(n), c)
        j = min(c, 3)
        if not self.of_counts(n, j):
            return self.absolute(n)
        return min(max(j - (j + 1) * self.absolute(n) * self.of_counts(n, j + 1) / self.of_counts(n, j), 0), j)

    def good_turing(self, n, c):
        if c > 5:
            return 1.0
        n1, n6, nc = self.of_counts(n, 1), self.of_counts(n, 6), self.of_counts(n, c)
        try:
            beyond = 6 * n6 / n1
            d = ((c + 1) * self.of_counts(n, c + 1) / (c * nc) - beyond) / (1 - beyond)
        except ZeroDivisionError:
            d = 0
        return d if 0 < d < 1 else 1 - self.absolute(n) / c

    def probability(self, context, word):
        return self.level(tuple(context)[len(context) - self.order + 1 :] if self.order > 1 else (), word)

    def level(self, h, w):
        n = len(h) + 1
        after = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == h}
        total, c, size = sum(after.values()), after.get(w, 0), self.size
        lower = lambda v: self.level(h[1:], v) if h else 1 / size
        if self.method == "add-k":
            return (c + self.k) / (total + self.k * size)
        if self.method == "stupid back-off":
            return c / total if c else self.back_off * lower(w)
        if not total:
            return lower(w)
        if self.method == "jelinek-mercer":
            return self.levels[n - 1] * c / total + (1 - self.levels[n - 1]) * lower(w)
        if self.method == "katz":
            kept = {v: self.good_turing(n, x) * x / total for v, x in after.items()}
            if sum(kept.values()) > 1 - 1e-9:
                kept = {v: x / (total + 1) for v, x in after.items()}
            if len(kept) == size:
                return kept[w] / sum(kept.values())
            rest = 1 - sum(kept.values())
            return kept[w] if w in kept else rest * lower(w) / sum(lower(v) for v in range(size) if v not in kept)
        taken = sum(self.discount(n, x) for x in after.values())
        return (c - self.discount(n, c) if c else 0) / total + taken / total * lower(w)


def negative_sampling(hidden, outputs, target, noise):
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    losses = []
    for h, t, words in zip(hidden, target, noise, strict=True):
        loss = -math.log(sigmoid(float(np.dot(outputs[t], h))))
        for word in words:
            if word != t:
                loss -= math.log(sigmoid(-float(np.dot(outputs[word], h))))
        losses.append(loss)
    return np.array(losses)


def wordpiece_merges(words, steps, score):
    """words: spelling -> count. Returns the joined pieces in order."""
    spelt = {word: [c if i == 0 else f"##{c}" for i, c in enumerate(word)] for word in words}
    alphabet = sorted({c for word in words for c in word}) + sorted({f"##{c}" for word in words for c in word[1:]})
    order, joined = {piece: i for i, piece in enumerate(alphabet)}, []
    for _ in range(steps):
        pairs, symbols = Counter(), Counter()
        for word, count in words.items():
            for piece in spelt[word]:
                symbols[piece] += count
            for a, b in zip(spelt[word], spelt[word][1:], strict=False):
                pairs[a, b] += count
        if not pairs:
            break
        value = {p: c if score == "count" else c / (symbols[p[0]] * symbols[p[1]]) for p, c in pairs.items()}
        best = min(value, key=lambda p: (-value[p], order[p[0]], order[p[1]]))
        new = best[0] + best[1].removeprefix("##")
        if new not in order:
            order[new] = len(order)
            joined.append(new)
        for word in words:
            old, fresh, i = spelt[word], [], 0
            while i < len(old):
                pair = tuple(old[i : i + 2]) == best
                fresh.append(new if pair else old[i])
                i += 2 if pair else 1
            spelt[word] = fresh
    return joined


def segmentations(word, longest):
    """Every way to cut a word into parts."""
    if not word:
        yield []
    for end in range(1, min(longest, len(word)) + 1):
        for rest in segmentations(word[end:], longest):
            yield [word[:end], *rest]
