"""Word2Vec: skip-gram and CBOW, negative sampling and hierarchical softmax (Mikolov et al. 2013, arXiv 1301.3781,
1310.4546).

Two tables: `Vectors.words` [V, d], which are kept, and `Vectors.outputs`, [V, d] of contexts or [V - 1, d] of the inner
nodes of Huffman's tree.
"""

import dataclasses
import heapq
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Vectors(NamedTuple):
    """words: `[V, d]`. outputs: `[V, d]`, or `[V - 1, d]` of hierarchical softmax."""

    words: jax.Array
    outputs: jax.Array


class Tree(NamedTuple):
    """Huffman's tree: for each word the inner nodes from the root down, `[V, L]`; signs +1 left, -1 right, 0 beyond."""

    nodes: jax.Array
    signs: jax.Array


@dataclasses.dataclass(frozen=True)
class Word2VecConfig:
    """width: d. window: words on either side, of which each centre takes 1 to `window`, drawn anew.

    cbow: whether the mean of the contexts predicts the centre; else the centre predicts each context (skip-gram).
    negatives: noise words per prediction; 0 is hierarchical softmax. power: of the noise, count ** power.
    batch: predictions per step, whose gradients are summed, as if they came one after another. steps: of training.
    learning_rate, last_rate: from the first step to the last, linearly.
    """

    width: int = 100
    window: int = 5
    cbow: bool = False
    negatives: int = 5
    power: float = 0.75
    batch: int = 512
    steps: int = 3000
    learning_rate: float = 0.025
    last_rate: float = 1e-4

    def __post_init__(self):
        for name in ("width", "window", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Word2VecConfig: {name} is {getattr(self, name)}; expected at least 1")
        if self.negatives < 0:
            raise ValueError(
                f"Word2VecConfig: negatives is {self.negatives}; expected 0 (hierarchical softmax) or more"
            )


def keep_probability(counts: np.ndarray, threshold: float = 1e-3, *, paper: bool = False) -> np.ndarray:
    """The probability of keeping an occurrence of each word, so that frequent words do not crowd out the others.

    f the word's share of the text: min(1, sqrt(t / f) + t / f), as the authors' program does, or min(1, sqrt(t / f)),
    as the paper (1310.4546, equation 5) says. Drop tokens before windows are taken, which widens the windows.

    Args:
      counts: `[V]`.
      threshold: t.
      paper: which formula.
    """
    ratio = threshold * counts.sum() / np.maximum(counts, 1)
    return np.minimum(1.0, np.sqrt(ratio) + (0 if paper else ratio))


def huffman(counts: np.ndarray) -> Tree:
    """The code of least mean length: the two rarest are joined until one tree is left; ties by age."""
    if len(counts) < 2:
        raise ValueError(f"huffman: there are {len(counts)} words; expected at least two")
    heap = [(int(count), i) for i, count in enumerate(counts)]
    heapq.heapify(heap)
    parent: dict[int, tuple[int, int]] = {}
    for node in range(len(counts), 2 * len(counts) - 1):
        (left_count, left), (right_count, right) = heapq.heappop(heap), heapq.heappop(heap)
        parent[left], parent[right] = (node, 1), (node, -1)
        heapq.heappush(heap, (left_count + right_count, node))
    paths = []
    for word in range(len(counts)):
        path, at = [], word
        while at in parent:
            at, sign = parent[at]
            path.append((at - len(counts), sign))
        paths.append(path[::-1])
    longest = max(map(len, paths))
    padded = np.array([path + [(0, 0)] * (longest - len(path)) for path in paths])
    return Tree(jnp.asarray(padded[..., 0]), jnp.asarray(padded[..., 1]))


def alias(weights: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Tables with which one draw costs two numbers, whatever the number of words (Walker 1974; Vose 1991).

    Draw i evenly and u in [0, 1): the word is i where u < keep[i], else other[i].

    Args:
      weights: `[V]`, not negative.

    Returns:
      `(keep [V] float32, other [V])`.
    """
    heights = np.asarray(weights, np.float64) * len(weights) / np.sum(weights)
    keep, other = np.ones(len(heights)), np.arange(len(heights))
    small = [i for i, height in enumerate(heights) if height < 1]
    large = [i for i, height in enumerate(heights) if height >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        keep[low], other[low] = heights[low], high
        heights[high] -= 1 - heights[low]
        if heights[high] < 1:
            small.append(large.pop())
    return jnp.asarray(keep, jnp.float32), jnp.asarray(other)


def negative_sampling_loss(hidden: jax.Array, outputs: jax.Array, target: jax.Array, noise: jax.Array) -> jax.Array:
    """-log s(u_target . h) - sum_k log s(-u_noise_k . h), s the logistic function; noise equal to the target skipped.

    Args:
      hidden: `[B, d]`, vectors of centres (skip-gram) or means of contexts (CBOW).
      outputs: `[V, d]`.
      target: `[B]` words.
      noise: `[B, K]` words.

    Returns:
      `[B]`.
    """
    positive = jnp.einsum("bd,bd->b", hidden, outputs[target])
    negative = jnp.einsum("bd,bkd->bk", hidden, outputs[noise])
    counted = noise != target[:, None]
    return -jax.nn.log_sigmoid(positive) - jnp.sum(jnp.where(counted, jax.nn.log_sigmoid(-negative), 0.0), axis=-1)


def hierarchical_softmax_loss(hidden: jax.Array, outputs: jax.Array, target: jax.Array, tree: Tree) -> jax.Array:
    """-sum over the nodes to the target of log s(sign u_node . h): -log p(target), which sums to 1 over all words.

    Args:
      hidden: `[B, d]`.
      outputs: `[V - 1, d]`, of the inner nodes.
      target: `[B]` words.
      tree: of `huffman`.

    Returns:
      `[B]`.
    """
    signs = tree.signs[target]
    scores = jnp.einsum("bd,bld->bl", hidden, outputs[tree.nodes[target]])
    return -jnp.sum(jnp.where(signs != 0, jax.nn.log_sigmoid(signs * scores), 0.0), axis=-1)


def expected_loss(vectors: Vectors, pairs: jax.Array, noise: jax.Array, negatives: float) -> jax.Array:
    """Negative sampling with nothing drawn: the mean over all pairs of a closed corpus.

    -sum_wc [#(w, c) log s(v_w . u_c) + K #(w) P(c) log s(-v_w . u_c)] / #. Its optimum, where d allows it, is
    v_w . u_c = log(#(w, c) / (#(w) P(c))) - log K: the pointwise mutual information less log K where the noise P is the
    contexts' own distribution (Levy and Goldberg 2014). Noise equal to the target counts here.

    Args:
      vectors: tables.
      pairs: `[V, V]`, how often word w has context c.
      noise: `[V]`, P.
      negatives: K.
    """
    scores = vectors.words @ vectors.outputs.T
    against = negatives * pairs.sum(axis=1, keepdims=True) * noise[None, :]
    return -jnp.sum(pairs * jax.nn.log_sigmoid(scores) + against * jax.nn.log_sigmoid(-scores)) / pairs.sum()


def init(key: jax.Array, vocab_size: int, config: Word2VecConfig) -> Vectors:
    """Words uniform in (-0.5, 0.5) / d, outputs 0."""
    words = jax.random.uniform(key, (vocab_size, config.width), minval=-0.5, maxval=0.5) / config.width
    return Vectors(words, jnp.zeros((vocab_size - (config.negatives == 0), config.width)))


def draw(key: jax.Array, tokens: jax.Array, sentences: jax.Array, config: Word2VecConfig):
    """A batch of predictions: `(inputs [B, M], counted [B, M], target [B])`.

    Skip-gram (M = 1): a place is drawn, then one of its contexts at distance j with weight window + 1 - j, which is how
    often a window of 1 to `window` reaches it. CBOW (M = 2 window): all contexts of the place within such a window.
    Contexts of another sentence or beyond the text are not counted.

    Args:
      key: consumed.
      tokens, sentences: `[T]` words and the numbers of their sentences.
      config: window, batch, cbow.
    """
    where, reach, side = jax.random.split(key, 3)
    places = jax.random.randint(where, (config.batch,), 0, len(tokens))
    distances = jnp.arange(1, config.window + 1)
    if config.cbow:
        reached = distances[None, :] <= jax.random.randint(reach, (config.batch, 1), 1, config.window + 1)
        reached = jnp.concatenate([reached, reached], axis=-1)
        around = places[:, None] + jnp.concatenate([-distances, distances])[None, :]
    else:
        far = distances[jax.random.categorical(reach, jnp.log(config.window + 1.0 - distances), shape=(config.batch,))]
        around = (places + far * jax.random.rademacher(side, (config.batch,), far.dtype))[:, None]
        reached = jnp.ones(around.shape, bool)
    inside = (around >= 0) & (around < len(tokens))
    around = jnp.clip(around, 0, len(tokens) - 1)
    counted = reached & inside & (sentences[around] == sentences[places][:, None])
    if config.cbow:
        return tokens[around], counted, tokens[places]
    return tokens[places][:, None], counted, tokens[around[:, 0]]


def train(
    key: jax.Array, tokens: np.ndarray, config: Word2VecConfig, *, vocab_size: int, sentences: np.ndarray | None = None
) -> tuple[Vectors, jax.Array]:
    """Train on a text, as one compiled program.

    Args:
      key: consumed.
      tokens: `[T]` words, subsampled already (`keep_probability`) where that is wanted.
      config: sizes and rates.
      vocab_size: V.
      sentences: `[T]`, which sentence each word is of; windows end with it. None: one.

    Returns:
      `(vectors, losses [steps])`: the mean loss of the predictions of each step.

    Deviations: places are drawn with replacement instead of being read in order, and a batch's gradients are taken at
    the same vectors.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"train: tokens have shape {tokens.shape}; expected [T] ids in [0, {vocab_size}), T at least 1"
        )
    sentences = np.zeros_like(tokens) if sentences is None else np.asarray(sentences)
    if sentences.shape != tokens.shape:
        raise ValueError(f"train: sentences have shape {sentences.shape}; expected that of tokens, {tokens.shape}")
    counts = np.bincount(tokens, minlength=vocab_size)
    noise = alias(np.where(counts > 0, np.maximum(counts, 1) ** config.power, 0.0))
    tree = None if config.negatives else huffman(counts)
    return _train(
        key, jnp.asarray(tokens, jnp.int32), jnp.asarray(sentences, jnp.int32), noise, tree, vocab_size, config
    )


@partial(jax.jit, static_argnames=("vocab_size", "config"))
def _train(key, tokens, sentences, noise, tree, vocab_size: int, config: Word2VecConfig):
    def loss(vectors, inputs, counted, target, negatives):
        chosen = jnp.where(counted[..., None], vectors.words[inputs], 0.0)
        hidden = chosen.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)[:, None]
        if config.negatives:
            each = negative_sampling_loss(hidden, vectors.outputs, target, negatives)
        else:
            each = hierarchical_softmax_loss(hidden, vectors.outputs, target, tree)
        valid = counted.any(axis=1)
        total = jnp.sum(jnp.where(valid, each, 0.0))
        return total, total / jnp.maximum(valid.sum(), 1)

    def step(vectors, at):
        i, key = at
        batch, even, tossed = jax.random.split(key, 3)
        drawn = jax.random.randint(even, (config.batch, config.negatives), 0, vocab_size)
        drawn = jnp.where(jax.random.uniform(tossed, drawn.shape) < noise[0][drawn], drawn, noise[1][drawn])
        gradients, mean = jax.grad(loss, has_aux=True)(vectors, *draw(batch, tokens, sentences, config), drawn)
        rate = config.learning_rate + (config.last_rate - config.learning_rate) * i / max(config.steps - 1, 1)
        return jax.tree.map(lambda v, g: v - rate * g, vectors, gradients), mean

    first, rest = jax.random.split(key)
    begin = init(first, vocab_size, config)
    return jax.lax.scan(step, begin, (jnp.arange(config.steps), jax.random.split(rest, config.steps)))


def analogy(vectors: jax.Array, questions: jax.Array) -> jax.Array:
    """3CosAdd: a is to b as c is to argmax_w cos(w, b - a + c), unit vectors, the three words left out.

    Args:
      vectors: `[V, d]`.
      questions: `[Q, 3]` words a, b, c.

    Returns:
      `[Q]` words.
    """
    unit = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    a, b, c = unit[questions[:, 0]], unit[questions[:, 1]], unit[questions[:, 2]]
    scores = (b - a + c) @ unit.T
    return jnp.argmax(scores.at[jnp.arange(len(questions))[:, None], questions].set(-jnp.inf), axis=-1)


def analogies(
    rng: np.random.Generator, sentences: int, *, stems: int = 12, attributes: int = 4, length: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences in which words that share a stem or an attribute meet, and the analogies that follow.

    Word s * attributes + a has stem s and attribute a. A sentence has one of each; every word of it keeps the stem and
    draws its attribute, or keeps the attribute and draws its stem.

    Returns:
      `(tokens [sentences, length], questions [Q, 4])`: a question is (s, a), (s, b), (t, a) and the answer (t, b), for
      all pairs of stems and of attributes.
    """
    stem, attribute = rng.integers(stems, size=(sentences, 1)), rng.integers(attributes, size=(sentences, 1))
    of_stem = stem * attributes + rng.integers(attributes, size=(sentences, length))
    of_attribute = rng.integers(stems, size=(sentences, length)) * attributes + attribute
    tokens = np.where(rng.random((sentences, length)) < 0.5, of_stem, of_attribute)
    s, t, a, b = np.meshgrid(*(np.arange(n) for n in (stems, stems, attributes, attributes)), indexing="ij")
    questions = np.stack([s * attributes + a, s * attributes + b, t * attributes + a, t * attributes + b], axis=-1)
    return tokens, questions[(s != t) & (a != b)]
