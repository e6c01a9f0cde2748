"""Masked-token pre-training: losses, masks and pairs against loops; a step of BERT and one of ELECTRA."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.data import masking
from jaxrl.data.sentence_pairs import sentence_pairs
from jaxrl.losses import masked as losses
from jaxrl.losses.reduce import Weighted
from jaxrl.nets.encoder import Encoder, unembedding
from jaxrl.nets.encoder_presets import bert, electra, electra_generator
from jaxrl.nets.language_model import logits
from jaxrl.posttrain import masked as pretrain
from tests.nets.vision_cases import random_params
from tests.oracles import masked as oracle
from tests.oracles.losses_group import gradient

RNG = np.random.default_rng(0)
PAIRS, LABELS = RNG.normal(size=(5, 2)), RNG.integers(2, size=5)
SCORES, REPLACED = 3 * RNG.normal(size=(2, 6)), RNG.random((2, 6)) < 0.4
CLS, SEP, PAD, MASK = 0, 1, 2, 3
SIZES = (8, 1, 2)
BERT = bert(*SIZES, vocab_size=20, max_length=16, remat="none")
ELECTRA = electra(*SIZES, vocab_size=20, max_length=16, embed_width=6, remat="none")


choose = jax.jit(masking.chosen, static_argnames=("share", "exact"))
hide = jax.jit(masking.corrupted, static_argnames=("mask_id", "words", "mask", "random"))


def close(got, want, **options):
    np.testing.assert_allclose(got, want, **{"rtol": 2e-5, "atol": 2e-6, **options})


def test_losses_and_gradients_equal_loops():
    value, grad = jax.value_and_grad(lambda x: losses.sentence_pair(x, LABELS).sum())(jnp.float32(PAIRS))
    close(losses.sentence_pair(jnp.float32(PAIRS), LABELS), oracle.sentence_pair(PAIRS, LABELS))
    close(value, oracle.sentence_pair(PAIRS, LABELS).sum())
    close(grad, gradient(lambda x: oracle.sentence_pair(x, LABELS).sum(), PAIRS), rtol=1e-4)
    grad = jax.grad(lambda x: losses.replaced_tokens(x, REPLACED).sum())(jnp.float32(SCORES))
    close(losses.replaced_tokens(jnp.float32(SCORES), REPLACED), oracle.replaced_tokens(SCORES, REPLACED))
    close(grad, gradient(lambda x: oracle.replaced_tokens(x, REPLACED).sum(), SCORES), rtol=1e-4)
    far = losses.replaced_tokens(jnp.array([[200.0, -200.0]]), jnp.array([[False, True]]))
    close(far, [[200.0, 200.0]])


def test_joined_is_the_sum_of_means():
    parts = [Weighted(jnp.float32(t), jnp.float32(w)) for t, w in ((6.0, 4.0), (9.0, 3.0), (1.0, 0.0))]
    close(losses.joined(parts[0], (2.0, parts[1]), (5.0, parts[2])).mean, 1.5 + 2 * 3.0)
    halves = [losses.joined(Weighted(jnp.float32(t), jnp.float32(4.0)), (2.0, parts[1])) for t in (6.0, 2.0)]
    together = Weighted(*(a + b for a, b in zip(*halves, strict=True)))
    close(together.mean, 1.0 + 2 * 3.0)


def rows(n=64, length=24):
    """(tokens, real, maskable): [CLS] words [SEP] padding, of unequal lengths."""
    random = np.random.default_rng(1)
    tokens = random.integers(4, 20, (n, length))
    ends = random.integers(3, length + 1, n)
    ends[:2] = 3, length
    for row, end in zip(tokens, ends, strict=True):
        row[0], row[end - 1], row[end:] = CLS, SEP, PAD
    real = (np.arange(length) < ends[:, None]).astype(np.int32)
    tokens = jnp.asarray(tokens, jnp.int32)
    return tokens, jnp.asarray(real), masking.maskable(tokens, jnp.asarray(real), (CLS, SEP))


def test_only_real_words_are_chosen_and_as_many_as_asked():
    tokens, real, maskable = rows()
    want = np.isin(np.asarray(tokens), (CLS, SEP), invert=True) & (np.asarray(real) > 0)
    np.testing.assert_array_equal(maskable, want)
    exact = np.asarray(choose(jax.random.key(0), maskable, share=0.3, exact=True))
    loose = np.asarray(choose(jax.random.key(0), maskable, share=0.3))
    assert not (exact & ~want).any() and not (loose & ~want).any()
    assert exact.sum(1).tolist() == [oracle.count(n, 0.3) for n in want.sum(1)]
    assert len(set(loose.sum(1).tolist())) > 5 and abs(loose.sum() / want.sum() - 0.3) < 0.04
    assert (exact != np.asarray(choose(jax.random.key(1), maskable, share=0.3, exact=True))).any()
    np.testing.assert_array_equal(exact, choose(jax.random.key(0), maskable, share=0.3, exact=True))
    assert not choose(jax.random.key(0), jnp.zeros((2, 4), bool), exact=True).any()


def test_exact_choice_is_uniform_over_candidates():
    maskable = jnp.broadcast_to(jnp.arange(8)[None] >= 2, (4000, 8))
    share = np.asarray(choose(jax.random.key(3), maskable, share=0.34, exact=True)).mean(0)
    close(share, [0, 0, *[1 / 3] * 6], atol=0.03)


def test_spans_are_runs_of_words_and_fill_the_count():
    _, _, maskable = rows(length=40)
    maskable = maskable.at[:, 15].set(False)  # a special token in the middle
    draw = jax.jit(functools.partial(masking.spans, share=0.4))
    ids = np.asarray(draw(jax.random.key(0), maskable, masking.geometric()))
    want = np.asarray(maskable)
    assert not (ids[~want] > 0).any()
    assert (ids > 0).sum(1).tolist() == [oracle.count(n, 0.4) for n in want.sum(1)]
    for row in ids:
        for span in set(row[row > 0].tolist()):
            columns = np.flatnonzero(row == span)
            between = row[columns[0] : columns[-1] + 1]
            assert len(between) <= 10 and (between > 0).all()  # gaps are tokens of earlier spans
            assert (between <= span).all() and not (columns[0] < 15 < columns[-1])
    # one span alone has the drawn length
    free = jnp.ones((2000, 30), bool)
    first = np.asarray(draw(jax.random.key(1), free, np.array([0.0, 0.0, 1.0]))) == 1
    assert np.isin(first.sum(1), (1, 2, 3)).all() and (first.sum(1) == 3).mean() > 0.9


def test_lengths_of_spans():
    geometric, poisson = masking.geometric(), masking.poisson(3.0, 20)
    close(geometric[1:] / geometric[:-1], 0.8)
    close((geometric * np.arange(1, 11)).sum(), 3.797, rtol=1e-3)  # "mean(l) = 3.8"
    close(poisson[1:] / poisson[:-1], 3.0 / np.arange(2, 21))
    close((poisson * np.arange(1, 21)).sum(), 3.0 / (1 - np.exp(-3.0)), rtol=1e-5)


def test_eighty_ten_ten():
    tokens = jnp.full((200, 100), 7, jnp.int32)
    chosen = jnp.broadcast_to(jnp.arange(100)[None] < 60, tokens.shape)
    seen = np.asarray(hide(jax.random.key(0), tokens, chosen, mask_id=MASK, words=20))
    assert (seen[:, 60:] == 7).all()
    close((seen[:, :60] == MASK).mean(), 0.8 + 0.1 / 20, atol=0.012)
    close((seen[:, :60] == 7).mean(), 0.1 + 0.1 / 20, atol=0.012)
    for word in (0, 12, 19):
        close((seen[:, :60] == word).mean(), 0.1 / 20, atol=0.003)
    options = {"mask_id": MASK, "mask": 0.0, "random": 1.0}
    drawn = np.asarray(masking.corrupted(jax.random.key(0), tokens, chosen, words=jnp.arange(4, 20), **options))[:, :60]
    assert set(drawn.ravel().tolist()) == set(range(4, 20))
    spans = jnp.where(chosen, jnp.arange(100)[None] // 6 + 1, 0)
    seen = np.asarray(masking.corrupted(jax.random.key(1), tokens, spans, mask_id=MASK, words=jnp.array([9])))
    together = seen[:, :60].reshape(200, 10, 6)
    assert (together == together[..., :1]).all()
    close((together == MASK).mean(), 0.8, atol=0.04)


def test_gathered_columns():
    chosen = jnp.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]], bool)
    columns, valid = masking.gathered(chosen, 2)
    assert columns[0].tolist() == [1, 3] and columns[1, 0] == 4
    assert valid.tolist() == [[True, True], [True, False]]


def documents():
    """Every token of a document is its own, and none is another's: 100 d + position."""
    random = np.random.default_rng(2)
    found = []
    for d in range(6):
        at, document = 100 * (d + 1), []
        for _ in range(random.integers(1, 9)):
            size = int(random.integers(1, 7))
            document.append(list(range(at, at + size)))
            at += size
        found.append(document)
    return found


@pytest.mark.parametrize("kind", ["next", "order"])
def test_pairs_are_what_their_labels_say(kind):
    texts, labels = documents(), []
    for seed in range(20):
        pairs = sentence_pairs(texts, length=16, cls_id=CLS, sep_id=SEP, pad_id=PAD, kind=kind, seed=seed)
        labels += pairs.labels.tolist()
        for tokens, types, real, maskable, label in zip(*pairs, strict=True):
            size = real.sum()
            assert real[:size].all() and (tokens[size:] == PAD).all() and tokens[0] == CLS
            middle, end = np.flatnonzero(tokens == SEP)
            assert end == size - 1 and types.tolist() == [int(middle < i <= end) for i in range(16)]
            np.testing.assert_array_equal(maskable, (tokens >= 100))
            first, second = tokens[1:middle], tokens[middle + 1 : end]
            assert len(first) and len(second)
            of = [next(d for d, text in enumerate(texts) if oracle.is_part(part, text)) for part in (first, second)]
            assert (of[0] == of[1]) == (kind == "order" or label == 0)
            if of[0] == of[1]:
                assert (first[-1] < second[0]) == (label == 0)
    assert 0.4 < np.mean(labels) < (0.6 if kind == "order" else 0.75)  # a last sentence always gets a stranger
    again = sentence_pairs(texts, length=16, cls_id=CLS, sep_id=SEP, pad_id=PAD, kind=kind, seed=19)
    np.testing.assert_array_equal(again.tokens, pairs.tokens)


def test_without_cuts_no_sentence_is_lost():
    """In rows long enough for a document, what the first segments and true second ones hold is all there is."""
    texts = documents()
    pairs = sentence_pairs(texts, length=200, cls_id=CLS, sep_id=SEP, pad_id=PAD, seed=1)
    seen = []
    for tokens, types, label in zip(pairs.tokens, pairs.types, pairs.labels, strict=True):
        own = (tokens >= 100) & ((types == 0) | (label == 0))
        seen += tokens[own].tolist()
    assert sorted(seen) == sorted(token for text in texts for sentence in text for token in sentence)


@functools.cache
def part(config=None):
    """Four rows to be guessed at, as `pretrain.masked` makes them."""
    tokens, real, maskable = rows(4, 12)
    texts = pretrain.Texts(tokens, real, maskable, (tokens > 10).astype(jnp.int32), jnp.array([0, 1, 1, 0]))
    config = config or pretrain.MaskedConfig(share=0.4, exact=True)
    return pretrain.masked(jax.random.key(5), texts, config, mask_id=MASK, words=20)


def params_of(config, seed=3):
    return random_params(Encoder(config), jnp.zeros((1, 4), jnp.int32), seed=seed)


def test_berts_loss_is_masked_tokens_plus_pairs():
    given, params = part(), params_of(BERT)
    alone = given.replace(texts=given.texts.replace(labels=None))

    @jax.jit
    def run(params):
        found = pretrain.outputs(BERT, params, given.texts, given.tokens)
        return pretrain.bert_loss(BERT, params, given), pretrain.bert_loss(BERT, params, alone)[0], found

    (value, metrics), plain, found = run(params)
    scores = np.asarray(logits(found.masked, unembedding(BERT, params)))
    want = oracle.masked_loss(scores, np.asarray(given.texts.tokens), np.asarray(given.chosen))
    pairs = oracle.sentence_pair(found.pair, np.asarray(given.texts.labels)).mean()
    close(value.mean, want + pairs)
    close(metrics["masked/pair_loss"].mean, pairs)
    assert value.weight == given.chosen.sum()
    close(plain.mean, want)


def test_spans_by_name():
    given = part(pretrain.MaskedConfig(share=0.4, spans="poisson"))
    assert given.chosen.dtype == bool and not (given.chosen & ~given.texts.maskable).any()
    sizes = np.asarray(given.texts.maskable.sum(1))
    assert given.chosen.sum(1).tolist() == [oracle.count(n, 0.4) for n in sizes]
    assert (given.tokens != given.texts.tokens).any() and ((given.tokens == given.texts.tokens) | given.chosen).all()


@functools.cache
def electra_case():
    generator = electra_generator(ELECTRA, 0.5)
    config = pretrain.MaskedConfig(share=0.4, exact=True, mask=1.0, random=0.0)
    params = {"generator": params_of(generator, 4), "discriminator": params_of(ELECTRA)}

    @jax.jit
    def run(params, given, coefficient):
        loss = lambda params: pretrain.electra_loss(generator, ELECTRA, params, given, coefficient=coefficient, most=4)
        (value, metrics), grad = jax.value_and_grad(lambda p: (loss(p)[0].mean, loss(p)[1]), has_aux=True)(params)
        return value, {name: metric.mean for name, metric in metrics.items()}, grad

    return part(config), params, run


def test_electras_loss_and_who_learns_from_what():
    given, params, run = electra_case()
    value, metrics, both = run(params, given, 50.0)
    assert (np.asarray(given.tokens)[np.asarray(given.chosen)] == MASK).all()
    close(value, metrics["electra/generator_loss"] + 50.0 * metrics["electra/discriminator_loss"])
    assert 0 < metrics["electra/replaced"] < given.chosen.sum() / given.texts.real.sum() + 1e-6
    for word, share in ((7, 0.0), (9, given.chosen.sum() / given.texts.real.sum())):  # a sure generator, right or wrong
        sure = {**params["generator"], "masked_bias": jnp.zeros(20).at[word].set(1e3)}
        sevens = given.replace(texts=given.texts.replace(tokens=jnp.full_like(given.tokens, 7)))
        close(run({**params, "generator": sure}, sevens, 50.0)[1]["electra/replaced"], share)
    _, _, alone = run(params, given, 0.0)
    # sampling passes nothing back: the generator's own layers learn from its likelihood alone
    jax.tree.map(lambda a, b: close(a, b, atol=1e-5), both["generator"], alone["generator"])
    assert all(not leaf.any() for leaf in jax.tree.leaves(both["generator"]["transformer"]["embed"]))
    assert np.abs(alone["discriminator"]["transformer"]["embed"]["embedding"]).max() > 1e-4  # through the generator
    assert not jax.tree.leaves(alone["discriminator"]["transformer"]["layers"])[0].any()
    assert any(leaf.any() for leaf in jax.tree.leaves(both["discriminator"]["transformer"]["layers"]))


def test_replacements_follow_the_generator_and_the_rows_key():
    keys = jax.random.split(jax.random.key(0), 2000)
    scores = jnp.broadcast_to(jnp.log(jnp.array([0.2, 0.5, 0.3])), (2000, 4, 3))
    drawn = np.asarray(pretrain.replacements(keys, scores))
    close([(drawn == v).mean() for v in range(3)], [0.2, 0.5, 0.3], atol=0.02)
    np.testing.assert_array_equal(pretrain.replacements(keys[7:8], scores[7:8]), drawn[7:8])
    assert not jax.grad(lambda x: pretrain.replacements(keys[:2], x).astype(jnp.float32).sum())(scores[:2]).any()


def test_a_step_is_the_same_in_parts_and_learns():
    tokens = jnp.broadcast_to(jnp.arange(4, 16, dtype=jnp.int32)[None], (8, 12)) + (jnp.arange(8) % 4)[:, None]
    texts = pretrain.Texts(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))
    found = []
    for parts in (1, 2):
        config = pretrain.MaskedConfig(batch=8, micro_batches=parts, share=0.25, exact=True)
        loss = functools.partial(pretrain.bert_loss, replace(BERT, pooled=None, pair=False))
        run = pretrain.make(config, loss, optax.adam(2e-2), mask_id=MASK, words=20)
        params = params_of(replace(BERT, pooled=None, pair=False))
        state, step = run.init(jax.random.key(1), params), jax.jit(run.step)
        seen = []
        for _ in range(60 if parts == 1 else 1):
            state, metrics = step(state, texts)
            seen.append(metrics)
        found.append((seen[0], seen[-1]))
    names = [name for name in found[0][0] if "loss" in name or "grad" in name]
    assert names
    for name in names:
        close(found[0][0][name], found[1][0][name], rtol=1e-4)
    assert found[0][1]["train/target_probability"] > found[0][0]["train/target_probability"] + 0.1


MASKABLE = jnp.ones((2, 6), bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.sentence_pair(PAIRS[0], LABELS), r"expected \[B, classes\]"),
        (lambda: losses.replaced_tokens(SCORES, REPLACED[:, :3]), "is_replaced has shape"),
        (lambda: masking.chosen(jax.random.key(0), MASKABLE[0]), r"expected bool \[B, T\]"),
        (lambda: masking.chosen(jax.random.key(0), MASKABLE, share=0.0), "share is 0.0"),
        (lambda: masking.gathered(MASKABLE, 7), "most is 7"),
        (
            lambda: masking.corrupted(
                jax.random.key(0), jnp.zeros((2, 6), jnp.int32), MASKABLE, mask_id=1, words=4, mask=0.9, random=0.2
            ),
            "sum to at most 1",
        ),
        (
            lambda: masking.corrupted(
                jax.random.key(0), jnp.zeros((2, 5), jnp.int32), MASKABLE, mask_id=1, words=4
            ),
            "chosen has shape",
        ),
        (lambda: part(pretrain.MaskedConfig(spans="uniform")), "spans is 'uniform'"),
        (lambda: sentence_pairs([[[1]]], length=9, cls_id=0, sep_id=1, pad_id=2), "at least two"),
        (lambda: sentence_pairs([[[1]], [[]]], length=9, cls_id=0, sep_id=1, pad_id=2), "is empty"),
        (lambda: sentence_pairs([[[1]]], length=4, cls_id=0, sep_id=1, pad_id=2, kind="order"), "length is 4"),
        (lambda: sentence_pairs([[[1]]], length=9, cls_id=0, sep_id=1, pad_id=2, kind="last"), "kind is 'last'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
