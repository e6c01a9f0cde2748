"""Tokenisers learnt from text, beside the package `tokenizers`, which reads the files they write."""

import importlib.util
import json
import pathlib
import pydoc_data.topics
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from jaxrl import data, text
from jaxrl.data import HuggingFaceTokenizer
from jaxrl.data.tokenizer_files import SPLITS
from jaxrl.text.bpe import apply_merges
from jaxrl.text.merges import learn_merges
from jaxrl.text.pretokenize import LETTERS, bert_words, from_letters, split_words, to_letters
from jaxrl.text.tokenizer import tokenizer_json

spec = importlib.util.spec_from_file_location("oracles_text", pathlib.Path(__file__).parents[1] / "oracles" / "text.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

CORPUS = "\n".join(pydoc_data.topics.topics.values())
SMALL = CORPUS[:50_000]
HARD = (
    "Don't  WE'LL\t\r\n\n  naïve café e\u0301 日本語 12345½ Ⅷ ²x__y ---- "
    "\u00a0\u2003 \x1c\x85 🎈👩‍👩‍👧 'S 'ſ <eos>[SEP] \u200d end  "
)
TRAIN = {
    **{pre: lambda corpus, size, pre=pre: text.train_bpe(corpus, size, pre=pre) for pre in SPLITS},
    "unigram": lambda corpus, size: text.train_unigram(corpus, size),
    "unigram metaspace": lambda corpus, size: text.train_unigram(corpus, size, pre="metaspace"),
    "wordpiece": lambda corpus, size: text.train_wordpiece(corpus, size),
    "wordpiece cased": lambda corpus, size: text.train_wordpiece(corpus, size, lowercase=False, score="count"),
}
WHOLE = [*SPLITS, "unigram"]  # nothing is lost
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40) | st.text("ab '\n<eos>1é", max_size=40)


@pytest.fixture(scope="module")
def trained():
    return {name: train(SMALL, 700) for name, train in TRAIN.items()}


@pytest.fixture(scope="module")
def library(trained):
    return {name: Library.from_str(json.dumps(tokenizer_json(tokenizer))) for name, tokenizer in trained.items()}


# Words


@pytest.mark.parametrize("pre", SPLITS)
def test_words_are_cut_as_the_library_cuts_them(pre):
    cut = {
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }.get(pre, lambda: pre_tokenizers.Split(Regex(SPLITS[pre] or ""), behavior="isolated"))()
    # Every assigned character below U+3000, and some of each plane, between a letter and a digit.
    codes = [*range(1, 0x3000), *range(0x3000, 0xD800, 7), *range(0xE000, 0x20000, 5)]
    strange = "".join(f"a{c}1 {c}{c}" for c in map(chr, codes) if not _unassigned(c))
    for sample in (CORPUS, HARD, strange):
        expected = [sample[slice(*offsets)] for _, offsets in cut.pre_tokenize_str(sample)]
        assert split_words(sample, pre) == expected
        assert "".join(expected) == sample


def _unassigned(character):
    return unicodedata.category(character) in ("Cn", "Cs")


def test_letters_of_bytes_are_gpt2s():
    assert sorted(LETTERS) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert to_letters(" é\n") == "Ġ" + "Ã©" + "Ċ" and from_letters(to_letters(" é\n")) == " é\n".encode()


@pytest.mark.parametrize("lowercase", [True, False])
def test_bert_words_are_the_librarys(lowercase):
    normal, cut = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    for sample in (CORPUS, HARD, "".join(f"a{c}b " for c in map(chr, range(1, 0x600)) if not _unassigned(c))):
        assert bert_words(sample, lowercase=lowercase) == [
            word for word, _ in cut.pre_tokenize_str(normal.normalize_str(sample))
        ]


# Training


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2"])
def test_bpe_learns_the_librarys_merges(pre):
    tokenizer = text.train_bpe(CORPUS, 2048, pre=pre)
    library = Library(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "qwen2":
        split = pre_tokenizers.Split(Regex(SPLITS[pre] or ""), behavior="isolated")
        cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=2045, initial_alphabet=alphabet, show_progress=False)
    )
    expected = json.loads(library.to_str())["model"]
    assert [list(pair) for pair in tokenizer.merges] == expected["merges"]
    assert {token: tokenizer.token_id(token) for token in expected["vocab"]} == expected["vocab"]


@given(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_bpe_learns_the_librarys_merges_of_any_words(words, merges):
    tokenizer = text.train_bpe(" ".join(words), 259 + merges)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [" ".join(words)], trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    )
    assert [list(pair) for pair in tokenizer.merges] == json.loads(library.to_str())["model"]["merges"]


@pytest.mark.parametrize("score", ["likelihood", "count"])
def test_wordpiece_learns_what_the_recount_learns(score):
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5, "banana": 3, "ana": 7, "aaaa": 2}
    corpus = " ".join(word for word, count in words.items() for _ in range(count))
    expected = oracle.wordpiece_merges(words, 9, score)
    base = len({c for w in words for c in w}) + len({c for w in words for c in w[1:]}) + 5
    for steps in (1, 4, 9):
        tokenizer = text.train_wordpiece(corpus, base + steps, score=score, min_count=1)
        assert list(tokenizer.tokens[base:]) == expected[:steps]


@pytest.mark.parametrize(
    ("corpus", "size", "ties"),
    [("xy " * 64 + "xyz " * 32 + "xyzw " * 16 + "vxy " * 8 + "uvu " * 3, 19, 0), (SMALL, 400, 40)],
    ids=["words", "topics"],
)
def test_wordpiece_by_count_learns_the_librarys_pieces(corpus, size, ties):
    """The library breaks ties by chance: there are none among the words, and a few among the topics."""
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = list(text.wordpiece.BERT)
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    library.train_from_iterator([corpus], trainer)
    ours = text.train_wordpiece(corpus, size, score="count", min_count=1)
    assert len(ours.tokens) == size and len(set(ours.tokens) & set(library.get_vocab())) >= size - ties


def test_a_pair_must_occur_min_count_times():
    words = {(0, 1): 3, (1, 2): 2}
    assert learn_merges(words, "abc", 9, min_count=3)[1] == [(0, 1)]
    assert learn_merges(words, "abc", 9, min_count=2)[1] == [(0, 1), (1, 2)]
    # The rarer pair has the larger score: c occurs nowhere else.
    assert learn_merges(words, "abc", 9, score="likelihood")[1][0] == (1, 2) or 3 / (3 * 5) >= 2 / (5 * 2)


def test_vocabularies_have_the_size_that_was_asked_for(trained):
    assert {tokenizer.vocab_size for tokenizer in trained.values()} == {700}
    assert text.train_bpe("ab", 300).vocab_size == 256 + 1 + 3  # no more pairs


# Encoding


@pytest.mark.parametrize("name", TRAIN)
def test_encoding_is_the_librarys(name, trained, library):
    for sample in (CORPUS[:150_000], HARD, "", " ", "a"):
        ids = trained[name].encode(sample)
        assert ids == library[name].encode(sample, add_special_tokens=False).ids
        assert trained[name].decode(ids) == library[name].decode(ids)


@pytest.mark.parametrize("name", TRAIN)
@given(sample=any_text)
@settings(max_examples=60, deadline=None)
def test_encoding_of_any_text_is_the_librarys(name, sample, trained, library):
    if name.startswith("wordpiece"):  # marks newer than the library's tables
        sample = "".join(c for c in sample if ord(c) < 0x600)
    ids = trained[name].encode(sample)
    assert ids == library[name].encode(sample, add_special_tokens=False).ids
    assert trained[name].decode(ids) == library[name].decode(ids)


@pytest.mark.parametrize("name", WHOLE)
@given(sample=any_text)
@settings(max_examples=60, deadline=None)
def test_text_round_trips(name, sample, trained):
    assert trained[name].decode(trained[name].encode(sample, special=False)) == sample


@pytest.mark.parametrize("pre", SPLITS)
@given(data=st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_bytes_round_trip(pre, data, trained):
    assert trained[pre].decode_bytes(trained[pre].encode_bytes(data)) == data


def test_metaspace_loses_nothing_but_unknown_characters(trained):
    tokenizer = trained["unigram metaspace"]
    assert tokenizer.decode(tokenizer.encode("  the if  statement ")) == "  the if  statement "
    assert tokenizer.encode("日本").count(0) == 1  # neighbours share one
    assert tokenizer.decode(tokenizer.encode("a日本a")) == "aa"


@pytest.mark.parametrize("name", TRAIN)
def test_special_tokens_are_never_cut_nor_forged(name, trained):
    tokenizer = trained[name]
    for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        i = tokenizer.token_id(token)
        ids = tokenizer.encode(f"the {token}{token} end")
        assert ids.count(i) == 2 and len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3
        assert i not in tokenizer.encode(f"the {token} end", special=False)
        assert token not in tokenizer.decode(ids) and tokenizer.token_text(i) == token
    assert len(set(tokenizer.encode("<|x|><|xy|>", special=False))) > 1


def test_the_longest_special_token_wins():
    tokenizer = text.train_bpe("abc", 260, special=("<|x", "<|x|>", "<pad>", "<eos>"))
    assert tokenizer.encode("<|x|><|xa") == [257, 256, *tokenizer.encode("a")]


def test_a_word_that_is_a_token_needs_no_merges_where_llama_says_so():
    merges = (("a", "b"), ("b", "c"), ("a", "bc"))
    tokens = (*sorted(LETTERS), "ab", "bc", "abc", *text.tokenizer.SPECIAL)
    for pre, expected in (("gpt-2", ["ab", "c"]), ("llama-bpe", ["abc"])):
        tokenizer = text.BPETokenizer(tokens=tokens, merges=merges, pre=pre)
        ids = tokenizer.encode("abc")
        assert [tokens[i] for i in ids] == expected
        assert Library.from_str(json.dumps(tokenizer_json(tokenizer))).encode("abc").ids == ids


def test_a_special_token_that_is_a_word_is_not_forged():
    tokenizer = text.train_bpe("the then", 300, pre="llama-bpe", special=("BOS", "EOS!", "PAD", "EOS"))
    assert tokenizer.token_id("EOS") in tokenizer.encode("EOS")
    plain = tokenizer.encode("BOS", special=False)
    assert tokenizer.bos_id not in plain and tokenizer.decode(plain) == "BOS"


def test_a_very_long_word_is_quick():
    tokenizer = text.train_bpe("ab " * 9, 262)
    assert tokenizer.decode(tokenizer.encode("ab" * 100_000)) == "ab" * 100_000


def test_merges_go_by_rank_then_from_the_left():
    merges = {(0, 1): (1, 3), (1, 1): (0, 4), (3, 4): (2, 5)}
    assert apply_merges([0, 1, 1, 1, 0, 1], merges) == [0, 4, 1, 3]
    assert apply_merges([], merges) == [] and apply_merges([0], merges) == [0]


def test_greedy_wordpiece_can_miss_what_viterbi_finds():
    special = text.wordpiece.BERT
    greedy = text.WordPieceTokenizer(tokens=(*special, "ab", "a", "##b", "##c", "##bcd", "abc", "##d", "##e"))
    assert [greedy.tokens[i] for i in greedy.encode("abcd")] == ["abc", "##d"]
    assert greedy.encode("abx") == [1] and greedy.encode("a" * 101) == [1]


# Unigram


def test_viterbi_is_the_best_of_all_segmentations():
    pieces = {"a": -2.0, "b": -2.5, "c": -3.0, "ab": -3.2, "bc": -3.1, "abc": -6.9, "ca": -4.0}
    tokenizer = text.UnigramTokenizer(
        tokens=("<unk>", *pieces, "<bos>", "<eos>", "<pad>"), scores=(0.0, *pieces.values()), pre="metaspace"
    )
    for word in ("abc", "abcabc", "cab", "bcab", "aabbcc"):
        ways = [way for way in oracle.segmentations(word, 3) if all(part in pieces for part in way)]
        best = max(ways, key=lambda way: sum(pieces[part] for part in way))
        assert [tokenizer.tokens[i] for i in tokenizer.encode(word)] == best


@pytest.mark.parametrize("theta", [0.0, 0.5, 2.0])
def test_samples_have_the_probabilities_of_their_segmentations(theta):
    pieces = {"a": -1.0, "b": -1.5, "c": -2.0, "ab": -2.2, "bc": -2.1, "abc": -4.0}
    tokenizer = text.UnigramTokenizer(
        tokens=("<unk>", *pieces, "<bos>", "<eos>", "<pad>"), scores=(0.0, *pieces.values()), pre="metaspace"
    )
    ways = [tuple(way) for way in oracle.segmentations("abc", 3)]
    expected = np.exp([theta * sum(pieces[part] for part in way) for way in ways])
    rng, found = np.random.default_rng(0), dict.fromkeys(ways, 0)
    for _ in range(4000):
        found[tuple(tokenizer.tokens[i] for i in tokenizer.sample("abc", rng, theta=theta))] += 1
    np.testing.assert_allclose([found[way] / 4000 for way in ways], expected / expected.sum(), atol=0.03)
    assert "".join(tokenizer.tokens[i] for i in tokenizer.sample("abcab", rng, theta=theta)) == "abcab"


def library_unigram(corpus, size, pre="metaspace", **options):
    library = Library(models.Unigram())
    cut = {"metaspace": pre_tokenizers.Metaspace(prepend_scheme="never")}
    library.pre_tokenizer = cut.get(pre, pre_tokenizers.ByteLevel(add_prefix_space=False))
    alphabet = [] if pre == "metaspace" else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", *text.tokenizer.SPECIAL]
    options = {"special_tokens": special, "unk_token": "<unk>", "initial_alphabet": alphabet} | options
    trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False, **options)
    library.train_from_iterator([corpus], trainer)
    return dict(json.loads(library.to_str())["model"]["vocab"])


@pytest.mark.parametrize("pre", ["metaspace", "gpt-2"])
@pytest.mark.parametrize(("corpus", "size"), [(SMALL, 400), (SMALL, 1200), (CORPUS, 3000)], ids=["400", "1200", "3000"])
def test_unigram_learns_the_librarys_pieces(pre, corpus, size):
    expected = library_unigram(corpus, size, pre)
    ours = text.train_unigram(corpus, size, pre=pre)
    assert set(ours.tokens) == set(expected) and len(ours.tokens) == size
    scores = sorted(ours.scores + (0.0,) * 3)  # of characters without a piece, which is which is left to chance
    np.testing.assert_allclose(scores, sorted(expected.values()), atol=1e-8)


@given(st.lists(st.text("abcd", min_size=1, max_size=9), min_size=3, max_size=60), st.integers(10, 40))
@settings(max_examples=200, deadline=None, derandomize=True)  # sums may round a tie either way
def test_unigram_learns_the_librarys_pieces_of_any_words(words, size):
    expected = library_unigram(" ".join(words), size)  # of 9, all characters, the library learns more than it is asked
    assert set(text.train_unigram(" ".join(words), size, pre="metaspace").tokens) == set(expected)


def test_unigram_has_the_librarys_settings():
    expected = library_unigram(SMALL, 500, n_sub_iterations=3, shrinking_factor=0.6, max_piece_length=6)
    ours = text.train_unigram(SMALL, 500, pre="metaspace", em_steps=3, keep=0.6, longest=6)
    assert set(ours.tokens) == set(expected)
    few = text.train_unigram(SMALL, 500, pre="metaspace", seed_size=600)
    assert set(few.tokens) == set(library_unigram(SMALL, 500, seed_size=600)) != set(expected)


def test_seeds_are_parts_that_go_on_in_different_ways():
    pieces, scores = text.unigram.seeds({"abc": 3, "abd": 1, "eab": 2, "xbc": 1}, longest=3, size=100)
    # Of "bc" a word always ends, and "ea" is always followed by b: neither branches; "ab" ends, or goes on with c or d.
    assert pieces == ["", "b", "a", "c", "e", "x", "d", "ab"]
    np.testing.assert_allclose(np.exp(scores[1:]) * 27, [7, 6, 4, 2, 1, 1, 6], atol=1e-9)


def brute_force(words, pieces, scores):
    """`(log-likelihood, expected counts, counts of the best ways)` over all segmentations."""
    expected, best, total = np.zeros(len(pieces)), np.zeros(len(pieces)), 0.0
    for word, count in words.items():
        ways = [way for way in oracle.segmentations(word, 3) if all(part in pieces for part in way)]
        joint = np.exp([sum(scores[pieces.index(part)] for part in way) for way in ways])
        total += count * np.log(joint.sum())
        for way, share in zip(ways, joint / joint.sum(), strict=True):
            np.add.at(expected, [pieces.index(part) for part in way], count * share)
        np.add.at(best, [pieces.index(part) for part in ways[int(joint.argmax())]], count)
    return total, expected, best


def test_e_step_is_the_sum_over_all_segmentations():
    words = {"abab": 3, "ba": 2, "abcabcabca": 1, "b": 5}
    pieces = ["", "a", "b", "c", "ab", "ca", "bca", "abc"]
    scores = np.log([np.nan, 0.3, 0.2, 0.05, 0.15, 0.12, 0.1, 0.08])
    corpus = text.unigram.lattices(words, pieces)
    total, expected, best = brute_force(words, pieces, scores)
    likelihood, counts = text.unigram.e_step(corpus, scores)
    np.testing.assert_allclose(likelihood, total)
    np.testing.assert_allclose(counts, expected, atol=1e-12)
    np.testing.assert_allclose(text.unigram.viterbi_counts(corpus, scores), best)


def test_a_character_that_is_no_piece_is_unknown_at_a_price():
    corpus = text.unigram.lattices({"axa": 2}, ["", "a"])
    likelihood, counts = text.unigram.e_step(corpus, np.log([np.nan, 0.5]))
    np.testing.assert_allclose(likelihood, 2 * (3 * np.log(0.5) - 10))
    np.testing.assert_allclose(counts, [2, 4])


def test_the_m_step_is_that_of_variational_bayes():
    kept, scores = text.unigram.m_step(np.array([9.0, 1.0, 3.0, 0.4, 0.5]))
    harmonic = lambda n: sum(1 / i for i in range(1, n))  # digamma(n) - digamma(1)
    assert kept.tolist() == [0, 1, 2, 4] and np.isnan(scores[0])
    np.testing.assert_allclose(scores[2] - scores[1], harmonic(3))
    np.testing.assert_allclose(scores[1] - scores[3], 2 * np.log(2))


def test_the_loss_of_a_piece_is_what_its_parts_would_cost():
    pieces, counts = ["", "a", "b", "ab", "aba", "ba"], np.array([0.0, 40, 30, 20, 10, 0])
    scores = np.log([np.nan, 0.4, 0.3, 0.2, 0.1, 0.01])
    spelt = text.unigram.lattices(dict.fromkeys(pieces, 1), pieces)
    found = text.unigram.losses(spelt, scores, counts)
    of_ab = 20 * (np.log(20 / 100) - np.log(60 / 200) - np.log(50 / 200))  # ab -> a b; 100 + 20 * 5
    of_aba = 10 * (np.log(10 / 100) - np.log(30 / 150) - np.log(50 / 150))  # aba -> ab a: 0.2 * 0.4 > 0.4 * 0.3 * 0.4
    np.testing.assert_allclose(found, [np.inf, np.inf, np.inf, of_ab, of_aba, -np.inf])


def test_larger_vocabularies_need_fewer_tokens():
    length = lambda tokenizer: len(SMALL.encode()) / len(tokenizer.encode(SMALL))
    for train in (text.train_bpe, text.train_unigram):
        found = [length(train(SMALL, size)) for size in (260, 512, 2048)]
        assert found[0] < 1.1 and 1.7 < found[1] < 2.6 and found[2] > 2.7


# Files and the rest of the project


@pytest.mark.parametrize("name", TRAIN)
def test_files_are_read_by_us_by_the_project_and_by_the_library(name, trained, tmp_path):
    tokenizer = trained[name]
    text.save(tokenizer, tmp_path)
    assert text.load(tmp_path) == tokenizer == text.from_json(json.loads(json.dumps(tokenizer.to_json())))
    other = HuggingFaceTokenizer(str(tmp_path))
    assert (other.bos_id, other.eos_id, other.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert other.vocab_size == tokenizer.vocab_size
    for special in (True, False):
        assert other.encode(HARD, special=special) == tokenizer.encode(HARD, special=special)
    again = Library.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode(HARD, add_special_tokens=False).ids == tokenizer.encode(HARD)


def test_data_takes_them_as_any_tokenizer():
    tokenizer: data.Tokenizer = text.train_bpe(SMALL, 400)
    examples = data.encode_examples([{"prompt": "for <eos>", "completion": " in range"}], tokenizer)
    tokens, mask = examples.tokens[0], examples.loss_mask[0].astype(bool)
    assert tokenizer.decode(tokens[mask]) == " in range" and tokens[mask][-1] == tokenizer.eos_id
    pairs = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    assert data.encode_pairs(data.read_records(pairs), tokenizer).chosen.tokens.shape[0] == 1


def test_training_is_the_same_every_time():
    for train in TRAIN.values():
        assert train(SMALL[:5000], 500) == train([SMALL[:5000]], 500)


def test_tokens_as_a_person_sees_them(trained):
    tokenizer = trained["gpt-2"]
    assert tokenizer.token_text(tokenizer.token_id("Ġthe")) == " the"
    half = tokenizer.encode("日")[0]
    assert tokenizer.token_text(half) == f"<token {half}>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text.train_bpe("a", 258), "vocab_size is 258; expected at least 259"),
        (lambda: text.train_bpe("a", 300, special=("<eos>",)), "at least three texts"),
        (lambda: text.train_bpe("a", 300, pre="bert"), "pre is 'bert'; expected"),
        (lambda: text.train_bpe("a", 300, special=("a", "<eos>", "<pad>")), r"holds \['a'\] more than once"),
        (lambda: text.train_wordpiece("abc", 6), "expected at least 10"),
        (lambda: text.train_wordpiece("abc", 60, score="size"), "score is 'size'"),
        (lambda: text.train_unigram("", 400), "hold no character"),
        (lambda: text.train_unigram("abc", 100), "expected at least 260"),
        (lambda: text.train_bpe("a", 300).decode([300]), "token id 300 at position 0"),
        (lambda: text.WordPieceTokenizer(tokens=("a",)), "special tokens that are not among its tokens"),
        (lambda: text.from_json({"content": {"model": {"type": "WordLevel"}}}), "model is 'WordLevel'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_file_of_other_parts_is_refused():
    spec = text.train_bpe("ab", 300).to_json()
    spec["content"] = spec["content"] | {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(ValueError, match="normalizer of this tokenizer.json"):
        text.from_json(spec)
