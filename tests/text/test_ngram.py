"""n-gram models beside an oracle that counts anew for every probability."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from jaxrl.data import markov
from jaxrl.text.ngram import (
    METHODS,
    contexts,
    count,
    fit_weights,
    ngram_perplexity,
    perplexity,
    probability,
    smooth,
)

spec = importlib.util.spec_from_file_location("oracles_text", pathlib.Path(__file__).parents[1] / "oracles" / "text.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

NORMALISED = [method for method in METHODS if method != "stupid back-off"]
STREAMS = {
    "skewed": lambda rng: (np.minimum(rng.geometric(0.3, 150), 7) - 1, 7),
    "few": lambda rng: (rng.integers(0, 2, 40), 3),  # one symbol never seen
    "long": lambda rng: (np.minimum(rng.geometric(0.5, 900), 5) - 1, 5),
    "once each": lambda rng: (np.arange(12), 13),
    "same": lambda rng: (np.zeros(17, np.int64), 2),
}


def source(seed, length, *, symbols=20, order=2):
    """A stream of a random Markov chain, and the perplexity of the chain itself."""
    first, second = jax.random.split(jax.random.key(seed))
    table = markov.chain(first, symbols=symbols, order=order, scale=2.75)
    return np.asarray(markov.sample(second, table, rows=1, length=length))[0], np.exp(markov.entropy_rate(table))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_probability_is_the_oracles(order, method, stream):
    rng = np.random.default_rng(order)
    tokens, size = STREAMS[stream](rng)
    weights = [0.3, 0.5, 0.7][:order]
    model = smooth(count(tokens, order, vocab_size=size), method, k=0.3, weights=weights)
    truth = oracle.Oracle(tokens, order, size, method, k=0.3, weights=weights)
    seen = contexts(tokens, order)[order - 1 :: 5][:12]
    history = np.concatenate([seen, rng.integers(0, size, (8, order - 1))])
    for h in history:
        found = probability(model, np.tile(h, (size, 1)), np.arange(size))
        np.testing.assert_allclose(found, [truth.probability(h, w) for w in range(size)], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", NORMALISED)
@pytest.mark.parametrize("order", [1, 2, 4, 5])
def test_probabilities_sum_to_1_after_every_context(method, order):
    rng = np.random.default_rng(0)
    tokens, size = np.minimum(rng.geometric(0.25, 2000), 11) - 1, 12
    model = smooth(count(tokens, order, vocab_size=size), method, weights=[0.5] * order)
    short = contexts(tokens, order)[:order]  # with the beginning's -1
    every = np.concatenate(
        [short, np.unique(contexts(tokens, order), axis=0)[:200], rng.integers(0, 12, (50, order - 1))]
    )
    total = sum(probability(model, every, np.full(len(every), word)) for word in range(size))
    np.testing.assert_allclose(total, 1.0, rtol=1e-9)
    assert min(probability(model, every, np.full(len(every), word)).min() for word in range(size)) > 0


def test_stupid_back_off_is_no_distribution():
    tokens = np.array([0, 1, 0, 1, 0, 2])
    model = smooth(count(tokens, 2, vocab_size=3), "stupid back-off")
    found = probability(model, np.array([[0]] * 3), np.arange(3))
    np.testing.assert_allclose(found, [0.4 * 3 / 6, 2 / 3, 1 / 3])  # 0 0 was not seen
    assert not model.normalised and abs(found.sum() - 1) > 0.1


def test_kneser_ney_by_hand():
    # 0 1 0 1 0 2: bigrams 01 twice, 10 twice, 02 once. Two of them begin with 0.
    tokens = np.array([0, 1, 0, 1, 0, 2])
    model = smooth(count(tokens, 2, vocab_size=3), "kneser-ney")
    d = 1 / (1 + 2 * 2)  # bigrams: n1 = 1, n2 = 2
    # Different words before 0: {1}; before 1: {0}; before 2: {0}. All are 1: n2 = 0, so D = 0.5 below, and
    # P(w) = (1 - 0.5) / 3 + 3 * 0.5 / 3 / 3 = 1/3.
    third = 1 / 3
    expected = [2 * d / 3 * third, (2 - d) / 3 + 2 * d / 3 * third, (1 - d) / 3 + 2 * d / 3 * third]
    np.testing.assert_allclose(probability(model, np.zeros((3, 1), int), np.arange(3)), expected)
    # After 2, which only ends the stream, the continuation distribution remains.
    np.testing.assert_allclose(probability(model, np.full((3, 1), 2), np.arange(3)), third)


def test_kneser_ney_counts_contexts_not_occurrences():
    # 3 comes often, but only after 2; 4 comes after many words.
    tokens = np.array([2, 3] * 30 + [0, 4, 1, 4, 5, 4, 6, 4])
    model = smooth(count(tokens, 2, vocab_size=8), "kneser-ney")
    plain = smooth(count(tokens, 2, vocab_size=8), "jelinek-mercer", weights=(0.9, 0.9))
    new = np.full((2, 1), 7)  # a context never seen
    assert np.less(*probability(model, new, np.array([3, 4])))
    assert np.greater(*probability(plain, new, np.array([3, 4])))


def test_stupid_back_off_pays_for_no_context_that_the_beginning_cuts_short():
    tokens = np.array([0, 1, 0, 1, 0, 2])
    model = smooth(count(tokens, 3, vocab_size=3), "stupid back-off")
    found = probability(model, np.array([[-1, -1], [-1, 0], [2, 0], [2, 2]]), np.array([1, 1, 1, 1]))
    np.testing.assert_allclose(found, [2 / 6, 2 / 3, 0.4 * 2 / 3, 0.4 * 0.4 * 2 / 6])


def test_perplexity_by_hand():
    tokens = np.array([0, 0, 1])
    model = smooth(count(tokens, 1, vocab_size=2), "add-k", k=1.0)
    np.testing.assert_allclose(perplexity(model, np.array([0, 1])), (3 / 5 * 2 / 5) ** -0.5)
    np.testing.assert_allclose(perplexity(model, np.array([1])), 5 / 2)
    uniform = smooth(count(np.arange(10), 1, vocab_size=10), "kneser-ney")
    np.testing.assert_allclose(perplexity(uniform, np.arange(10)), 10)


def test_the_first_tokens_have_shorter_contexts():
    tokens = np.random.default_rng(0).integers(0, 4, 50)
    counts = count(tokens, 3, vocab_size=4)
    trigram, bigram, unigram = (
        smooth(count(tokens, n, vocab_size=4), "jelinek-mercer", weights=(0.5, 0.6, 0.7)[:n]) for n in (3, 2, 1)
    )
    assert sum(map(len, counts.keys)) <= 4 + 16 + 48
    for word in range(4):
        found = probability(trigram, np.array([[-1, -1], [-1, 2]]), np.array([word, word]))
        expected = [
            probability(unigram, np.zeros((1, 0)), np.array([word]))[0],
            probability(bigram, np.array([[2]]), np.array([word]))[0],
        ]
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("method", NORMALISED)
def test_rows_know_nothing_of_each_other(method):
    """Rows are counted as streams of which no n-gram goes from one to the next: by the oracle, on their n-grams."""
    rng = np.random.default_rng(3)
    rows = np.minimum(rng.geometric(0.4, (30, 6)), 4) - 1
    whole = count(rows, 3, vocab_size=5)
    wanted = {}
    for row in rows.tolist():
        for k in (1, 2, 3):
            for i in range(6 - k + 1):
                wanted[tuple(row[i : i + k])] = wanted.get(tuple(row[i : i + k]), 0) + 1
    assert [int(c.sum()) for c in whole.counts] == [30 * 6, 30 * 5, 30 * 4]
    assert sorted(n for c in whole.counts for n in c.tolist()) == sorted(wanted.values())
    assert count(rows[:1], 3, vocab_size=5).keys[2].tolist() == count(rows[0], 3, vocab_size=5).keys[2].tolist()
    model = smooth(whole, method, weights=(0.3, 0.4, 0.5))
    of_rows = perplexity(model, rows[:4])
    alone = np.exp(np.mean([np.log(perplexity(model, row)) for row in rows[:4]]))
    np.testing.assert_allclose(of_rows, alone)


def test_em_raises_the_held_out_likelihood_and_beats_fixed_weights():
    tokens, _ = source(3, 4000, symbols=8)
    counts, held_out = count(tokens[:1000], 4, vocab_size=8), tokens[1000:]
    fitted = [fit_weights(counts, held_out, steps=steps) for steps in (0, 1, 2, 3, 10, 50)]
    found = [perplexity(smooth(counts, "jelinek-mercer", weights=weights), held_out) for weights in fitted]
    assert (np.diff(found) < 1e-12).all() and found[-1] < found[0] - 0.01
    for weights in ((0.1, 0.2, 0.7, 0.0), (0.5, 0.5, 0.5, 0.5), (0.9, 0.9, 0.9, 0.9)):
        assert found[-1] <= perplexity(smooth(counts, "jelinek-mercer", weights=weights), held_out) + 1e-3


def test_interpolation_beats_add_1_on_a_source_of_known_entropy():
    tokens, least = source(0, 10_000)
    train, test = tokens[:5000], tokens[5000:]
    of = lambda order, method, **knobs: ngram_perplexity(train, test, order, method, vocab_size=20, **knobs)
    unigram, bigram, trigram = (of(n, "add-k", k=0.01) for n in (1, 2, 3))
    mixed, kneser_ney = of(3, "jelinek-mercer"), of(3, "modified kneser-ney")
    assert least < min(mixed, kneser_ney) and max(mixed, kneser_ney) < trigram < of(3, "add-k") < bigram
    assert bigram < unigram < 20.5


def test_the_sources_entropy_is_what_the_source_itself_reaches():
    tokens, least = source(1, 100_000, symbols=4, order=1)
    found = ngram_perplexity(tokens[:80_000], tokens[80_000:], 2, "kneser-ney")
    np.testing.assert_allclose(found, least, rtol=0.02)


def test_fitted_weights_are_the_best():
    tokens, _ = source(3, 2000, symbols=8)
    counts, held_out = count(tokens[:400], 4, vocab_size=8), tokens[400:]  # most contexts of three were not seen
    weights = fit_weights(counts, held_out, steps=1000)
    of = lambda weights: perplexity(smooth(counts, "jelinek-mercer", weights=weights), held_out)
    for place in range(4):
        for change in (-0.02, 0.02):
            moved = np.clip(np.array(weights) + change * (np.arange(4) == place), 0, 0.999)
            assert of(weights) <= of(moved) + 1e-9


def test_large_vocabularies_and_high_orders_do_not_overflow():
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.3, 30_000) % 200_000
    model = smooth(count(tokens, 7, vocab_size=200_000))
    assert all((np.diff(keys) > 0).all() and keys.min() >= 0 for keys in model.keys)
    assert 1 < perplexity(model, tokens[:2000]) < 10 < perplexity(model, rng.zipf(1.3, 2000) % 200_000)


def test_the_streams_type_does_not_matter():
    tokens = np.random.default_rng(0).integers(0, 9, 300)
    found = {ngram_perplexity(tokens.astype(kind), tokens.astype(kind)) for kind in (np.uint8, np.int32, np.int64)}
    assert len(found) == 1


ONE = count(np.arange(4), 2, vocab_size=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count(np.array([0, 4]), 1, vocab_size=4), r"token 4 is outside \[0, 4\)"),
        (lambda: count(np.array([0.5]), 1, vocab_size=4), "expected .T. or .R, T. integers"),
        (lambda: count(np.array([0]), 2, vocab_size=4), "order is 2 and there are 1 tokens"),
        (lambda: smooth(ONE, "laplace"), "method is 'laplace'; expected one of 'add-k'"),
        (lambda: smooth(ONE, "jelinek-mercer"), "weights are None; expected 2 numbers"),
        (lambda: smooth(ONE, "jelinek-mercer", weights=(0.5, 1.0)), "expected 2 numbers in"),
        (lambda: probability(smooth(ONE), np.zeros((1, 2), int), np.array([0])), r"expected \(1, 1\)"),
        (lambda: probability(smooth(ONE), np.array([[4]]), np.array([0])), r"ids outside \[-1, 4\)"),
        (lambda: perplexity(smooth(ONE), np.array([], np.int64)), "there are no tokens"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
