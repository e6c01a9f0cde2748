"""Word2Vec's losses, its sampling, and what its optimum is."""

import importlib.util
import pathlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.text import word2vec
from jaxrl.text.word2vec import Vectors, Word2VecConfig, analogies

spec = importlib.util.spec_from_file_location("oracles_text", pathlib.Path(__file__).parents[1] / "oracles" / "text.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)


def tables(seed, words=7, width=5, outputs=None):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(words, width)), rng.normal(size=(outputs or words, width))


def test_negative_sampling_is_the_oracles_and_skips_noise_that_is_the_target():
    words, outputs = tables(0)
    rng = np.random.default_rng(1)
    centre, target, noise = rng.integers(0, 7, 9), rng.integers(0, 7, 9), rng.integers(0, 7, (9, 6))
    assert (noise == target[:, None]).any()
    found = word2vec.negative_sampling_loss(words[centre], outputs, target, noise)
    np.testing.assert_allclose(found, oracle.negative_sampling(words[centre], outputs, target, noise), rtol=1e-5)
    none = word2vec.negative_sampling_loss(words[centre], outputs, target, np.zeros((9, 0), int))
    np.testing.assert_allclose(none, oracle.negative_sampling(words[centre], outputs, target, noise[:, :0]), rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    words, outputs = tables(2)
    centre, target, noise = np.array([0, 1, 1]), np.array([2, 3, 1]), np.array([[4, 2], [3, 0], [5, 6]])
    loss = lambda w, o: word2vec.negative_sampling_loss(w[centre], o, target, noise).sum()
    found = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(words), jnp.asarray(outputs))
    for which, row, column in ((0, 1, 2), (0, 0, 0), (1, 2, 1), (1, 3, 4), (1, 6, 0)):
        moved = []
        for step in (1e-4, -1e-4):
            both = [words.copy(), outputs.copy()]
            both[which][row, column] += step
            moved.append(oracle.negative_sampling(both[0][centre], both[1], target, noise).sum())
        np.testing.assert_allclose(found[which][row, column], (moved[0] - moved[1]) / 2e-4, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("counts", [[5, 3, 2, 1, 1], [1, 1], [1] * 8, [1, 2, 4, 8, 16, 32], [0, 0, 3]])
def test_huffmans_code_is_a_distribution_and_of_least_length(counts):
    tree = word2vec.huffman(np.array(counts))
    rng = np.random.default_rng(0)
    hidden, outputs = rng.normal(size=(1, 4)), rng.normal(size=(len(counts) - 1, 4))
    each = [word2vec.hierarchical_softmax_loss(hidden, outputs, np.array([w]), tree)[0] for w in range(len(counts))]
    np.testing.assert_allclose(np.exp(-np.array(each)).sum(), 1.0, rtol=1e-5)
    lengths = np.abs(np.asarray(tree.signs)).sum(axis=1)
    assert 2.0 ** -lengths.astype(float) @ np.ones(len(counts)) == 1.0  # Kraft
    mean, entropy = (
        lengths @ counts / sum(counts),
        -sum(c / sum(counts) * np.log2(max(c, 1) / sum(counts)) for c in counts),
    )
    assert entropy - 1e-9 <= mean <= entropy + 1


def test_huffman_by_hand():
    tree = word2vec.huffman(np.array([5, 2, 1]))
    assert np.abs(np.asarray(tree.signs)).sum(axis=1).tolist() == [1, 2, 2]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    hidden, outputs = np.ones((3, 1)), np.array([[0.3], [-0.7]])
    found = np.exp(-word2vec.hierarchical_softmax_loss(hidden, outputs, np.arange(3), tree))
    # 1 and 2 are joined first (node 0), then that and 0 (node 1, the root); the rarer goes left.
    np.testing.assert_allclose(
        found, [sigmoid(0.7), sigmoid(-0.7) * sigmoid(-0.3), sigmoid(-0.7) * sigmoid(0.3)], rtol=1e-5
    )


def test_alias_tables_hold_the_distribution():
    for weights in ([1.0], [3, 1, 0, 4, 2], np.random.default_rng(0).random(50) ** 4):
        keep, other = map(np.asarray, word2vec.alias(np.array(weights, float)))
        found = np.bincount(other, 1 - keep, len(weights)) + keep
        np.testing.assert_allclose(found / len(weights), np.array(weights) / np.sum(weights), atol=1e-6)


def test_subsampling_has_the_programs_and_the_papers_formula():
    counts = np.array([900, 99, 1, 0])
    ratio = 0.01 * 1000 / np.array([900, 99, 1])
    np.testing.assert_allclose(word2vec.keep_probability(counts, 0.01)[:3], np.minimum(1, np.sqrt(ratio) + ratio))
    np.testing.assert_allclose(word2vec.keep_probability(counts, 0.01, paper=True)[:3], np.minimum(1, np.sqrt(ratio)))


def test_skip_gram_meets_each_distance_as_often_as_a_dynamic_window_does():
    config = Word2VecConfig(window=4, batch=40_000)
    tokens = jnp.arange(1000)
    inputs, counted, target = word2vec.draw(jax.random.key(0), tokens, jnp.zeros(1000, int), config)
    distance = np.asarray(target - inputs[:, 0])[np.asarray(counted[:, 0])]
    found = np.bincount(distance + 4, minlength=9) / len(distance)
    np.testing.assert_allclose(found, np.array([1, 2, 3, 4, 0, 4, 3, 2, 1]) / 20, atol=0.01)


def test_cbow_takes_all_contexts_of_a_window():
    config = Word2VecConfig(window=3, batch=30_000, cbow=True)
    tokens = jnp.arange(1000)
    inputs, counted, target = word2vec.draw(jax.random.key(0), tokens, jnp.zeros(1000, int), config)
    inner = np.asarray((target >= 3) & (target < 997))
    inputs, counted, target = (np.asarray(x)[inner] for x in (inputs, counted, target))
    np.testing.assert_array_equal((inputs - target[:, None])[0], [-1, -2, -3, 1, 2, 3])
    np.testing.assert_array_equal(counted[:, :3], counted[:, 3:])
    np.testing.assert_allclose(counted[:, :3].mean(axis=0), [1, 2 / 3, 1 / 3], atol=0.01)


@pytest.mark.parametrize("cbow", [False, True])
def test_windows_end_with_the_sentence_and_the_text(cbow):
    config = Word2VecConfig(window=5, batch=5000, cbow=cbow)
    sentences = jnp.repeat(jnp.arange(5), 4)
    tokens = jnp.arange(20)
    inputs, counted, target = word2vec.draw(jax.random.key(1), tokens, sentences, config)
    same = (inputs // 4) == (target // 4)[:, None]
    assert bool((same | ~counted).all()) and bool(counted.any()) and bool((~counted).any())
    assert bool((inputs != target[:, None])[counted].all())


# The optimum


def closed_corpus():
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 30, (4, 4)).astype(float)
    pairs = pairs + pairs.T
    return jnp.asarray(pairs, jnp.float32)


@pytest.mark.parametrize("negatives", [1, 5])
def test_the_optimum_of_negative_sampling_is_shifted_mutual_information(negatives):
    pairs = closed_corpus()
    noise = pairs.sum(axis=0) / pairs.sum()
    shares = pairs / pairs.sum()
    information = jnp.log(shares / (shares.sum(axis=1, keepdims=True) * noise[None, :]))
    optimum = information - jnp.log(negatives)
    u, s, vt = jnp.linalg.svd(optimum)
    closed = Vectors(u * jnp.sqrt(s)[None, :], vt.T * jnp.sqrt(s)[None, :])
    loss = partial(word2vec.expected_loss, pairs=pairs, noise=noise, negatives=negatives)
    chex.assert_trees_all_close(jax.grad(loss)(closed), jax.tree.map(jnp.zeros_like, closed), atol=2e-6)

    @jax.jit
    def descend(vectors):  # plain descent from small random tables
        step = lambda v, _: (jax.tree.map(lambda x, g: x - 2.0 * g, v, jax.grad(loss)(v)), None)
        return jax.lax.scan(step, vectors, length=6000)[0]

    words, outputs = tables(3, 4, 4)
    found = descend(Vectors(jnp.asarray(0.5 * words, jnp.float32), jnp.asarray(0.5 * outputs, jnp.float32)))
    np.testing.assert_allclose(found.words @ found.outputs.T, optimum, atol=2e-3)


def test_drawn_noise_has_the_expected_loss():
    pairs = np.asarray(closed_corpus())
    noise, (words, outputs) = pairs.sum(axis=0) / pairs.sum(), tables(4, 4, 3)
    rng = np.random.default_rng(0)
    drawn = rng.choice(16, 40_000, p=pairs.ravel() / pairs.sum())
    negatives = rng.choice(4, (40_000, 3), p=noise)
    each = oracle_with_repeats(words[drawn // 4], outputs, drawn % 4, negatives)
    expected = word2vec.expected_loss(Vectors(jnp.asarray(words), jnp.asarray(outputs)), pairs, noise, 3)
    np.testing.assert_allclose(each.mean(), expected, rtol=0.02)


def oracle_with_repeats(hidden, outputs, target, noise):
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    positive = np.log(sigmoid((hidden * outputs[target]).sum(axis=1)))
    return -positive - np.log(sigmoid(-np.einsum("bd,bkd->bk", hidden, outputs[noise]))).sum(axis=1)


# Training


@pytest.mark.parametrize(("cbow", "negatives"), [(False, 5), (True, 0)])
def test_training_finds_analogies(cbow, negatives):
    tokens, questions = analogies(np.random.default_rng(0), 2000, stems=5, attributes=3)
    config = Word2VecConfig(width=12, cbow=cbow, negatives=negatives, batch=128, steps=1500)
    sentences = np.repeat(np.arange(2000), 9)
    vectors, losses = word2vec.train(jax.random.key(0), tokens.ravel(), config, vocab_size=15, sentences=sentences)
    assert len(questions) == 5 * 4 * 3 * 2
    accuracy = (word2vec.analogy(vectors.words, questions[:, :3]) == questions[:, 3]).mean()
    assert accuracy > 0.75 and losses[-100:].mean() < losses[:100].mean() - 0.1
    assert vectors.outputs.shape == (15 if negatives else 14, 12)


def test_training_is_the_same_for_the_same_key_and_rare_words_stay():
    tokens = np.tile([0, 1, 2, 3], 50)  # word 4 does not occur
    config = Word2VecConfig(width=4, batch=16, steps=20, window=2)
    first, second = (word2vec.train(jax.random.key(7), tokens, config, vocab_size=5) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    np.testing.assert_array_equal(first[0].outputs[4], 0.0)  # neither context nor noise
    other, _ = word2vec.train(jax.random.key(8), tokens, config, vocab_size=5)
    assert np.abs(other.words - first[0].words).max() > 1e-3


def test_the_rate_goes_from_the_first_to_the_last():
    # With outputs 0 a choice of two words costs log 2: so it stays as long as the rate is 0.
    config = Word2VecConfig(width=3, batch=8, negatives=0, steps=3, learning_rate=0.0, last_rate=0.1)
    vectors, losses = word2vec.train(jax.random.key(0), np.tile([0, 1], 20), config, vocab_size=2)
    np.testing.assert_allclose(losses[:2], np.log(2), rtol=1e-6)
    assert abs(losses[2] - np.log(2)) > 1e-7 and np.abs(vectors.outputs).max() > 1e-3


def test_analogy_leaves_the_three_words_out_even_where_all_others_are_far():
    vectors = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [-1.0, 0.5]])
    assert word2vec.analogy(vectors, jnp.array([[0, 1, 2]])).tolist() == [4]


def test_analogy_is_the_nearest_of_the_other_words():
    vectors = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    questions = jnp.array([[0, 1, 2], [2, 3, 0], [0, 2, 1]])
    found = word2vec.analogy(vectors, questions)
    unit = np.asarray(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for (a, b, c), answer in zip(np.asarray(questions), found, strict=True):
        scores = {w: unit[w] @ (unit[b] - unit[a] + unit[c]) for w in range(5) if w not in (a, b, c)}
        assert answer == max(scores, key=lambda w: scores[w])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Word2VecConfig(window=0), "window is 0; expected at least 1"),
        (lambda: Word2VecConfig(negatives=-1), "negatives is -1"),
        (lambda: word2vec.huffman(np.array([3])), "there are 1 words"),
        (lambda: word2vec.train(jax.random.key(0), np.array([0, 5]), Word2VecConfig(), vocab_size=5), r"in \[0, 5\)"),
        (lambda: word2vec.train(jax.random.key(0), np.array([]), Word2VecConfig(), vocab_size=5), "T at least 1"),
        (
            lambda: word2vec.train(
                jax.random.key(0), np.array([0]), Word2VecConfig(), vocab_size=5, sentences=np.zeros(2)
            ),
            "sentences have shape",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
