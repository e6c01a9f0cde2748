"""From samples to records: rejection sampling, pairs by length, averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data import encode_examples
from jaxrl.data.preferences import encode_pairs
from jaxrl.data.tokenizer import CharTokenizer
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import long2short
from jaxrl.posttrain.long2short import Samples, length_pairs, merge, sample, select
from jaxrl.posttrain.rollout import Sampling

NAN = np.nan
RECORDS = [{"prompt": f"p{i}", "answer": str(i)} for i in range(4)]
DRAWN = Samples(
    records=RECORDS,
    texts=[["aaaa", "bb", "cc", "bb", "ddd"], ["x", "y", "z", "w", "v"], ["k", "l", "mm", "n", "o"], ["q"] * 5],
    scores=np.array([[1, 1, 1, 1, 0], [0, 0, NAN, 0, 0], [1, 0.5, 2, NAN, 0], [1] * 5], np.float32),
    lengths=np.array([[5, 3, 3, 3, 4], [2, 2, 2, 2, 2], [9, 8, 3, 2, 2], [2] * 5]),
)


def test_select_keeps_the_right_ones():
    """The shortest (the first of equals), the first, or all, each text once; what has no right one is counted."""
    texts = lambda **knobs: [(r["prompt"], r["completion"]) for r in select(DRAWN, **knobs)[0]]
    assert texts(keep="shortest") == [("p0", "bb"), ("p2", "mm"), ("p3", "q")]
    assert texts(keep="first") == [("p0", "aaaa"), ("p2", "k"), ("p3", "q")]
    everything = [("p0", "aaaa"), ("p0", "bb"), ("p0", "cc"), ("p2", "k"), ("p2", "mm"), ("p3", "q")]
    assert texts(keep="all") == everything
    assert texts(keep="all", solved=0.5)[3:6] == [("p2", "k"), ("p2", "l"), ("p2", "mm")]
    for keep in long2short.KEEP:
        kept, failed = select(DRAWN, keep=keep)
        assert failed == 1 and kept[0]["answer"] == "0"
    assert RECORDS[0] == {"prompt": "p0", "answer": "0"}  # the problems themselves are untouched
    with pytest.raises(ValueError, match="keep is 'best'; expected one of shortest, first, all"):
        select(DRAWN, keep="best")


def brute_force(drawn, ratio, shorter_wrong):
    found = []
    for i, record in enumerate(drawn.records):
        right = [j for j in range(5) if drawn.scores[i, j] >= 1]
        if not right:
            continue
        best = right[0]
        for j in right:
            if drawn.lengths[i, j] < drawn.lengths[i, best]:
                best = j
        for j in range(5):
            long = j in right and drawn.lengths[i, j] >= ratio * drawn.lengths[i, best]
            wrong = drawn.scores[i, j] < 1 and (shorter_wrong or drawn.lengths[i, j] > drawn.lengths[i, best])
            pair = (record["prompt"], drawn.texts[i][best], drawn.texts[i][j])
            if (long or wrong) and pair[1] != pair[2] and pair not in found:
                found.append(pair)
    return found


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("shorter_wrong", [True, False])
def test_pairs_prefer_the_shortest_right_one(ratio, shorter_wrong):
    pairs, failed = length_pairs(DRAWN, ratio=ratio, shorter_wrong=shorter_wrong)
    given = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
    assert given == brute_force(DRAWN, ratio, shorter_wrong) and given
    assert failed == 4 - len({prompt for prompt, *_ in given})
    assert all("completion" not in pair and "answer" in pair for pair in pairs)
    if ratio == 1.5 and shorter_wrong:
        wrong_and_long = [("p2", "mm", "k"), ("p2", "mm", "l"), ("p2", "mm", "o")]
        assert given == [("p0", "bb", "aaaa"), ("p0", "bb", "ddd"), *wrong_and_long]


def test_pairs_want_a_ratio_of_at_least_one():
    with pytest.raises(ValueError, match="ratio is 0.5; expected at least 1"):
        length_pairs(DRAWN, ratio=0.5)


def test_merge_is_the_average_of_the_leaves():
    long = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}}
    short = {"a": jnp.array([3.0, -2.0]), "b": {"c": jnp.zeros((2, 2), jnp.bfloat16)}}
    half = merge(long, short)
    np.testing.assert_array_equal(half["a"], [2.0, 0.0])
    np.testing.assert_array_equal(merge(long, short, 0.25)["a"], [1.5, 1.0])
    assert half["b"]["c"].dtype == jnp.bfloat16 and (half["b"]["c"] == 0.5).all()
    jax.tree.map(np.testing.assert_array_equal, merge(long, short, 0.0), long)
    jax.tree.map(np.testing.assert_array_equal, merge(long, short, 1.0), short)


@pytest.mark.parametrize(
    ("short", "weight", "message"),
    [
        ({"a": jnp.ones(3)}, 0.5, r"the leaf \['a'\] is \(2,\) in the long model and \(3,\) in the short one"),
        ({}, 0.5, r"the leaf \['a'\] is \(2,\) in the long model and missing in the short one"),
        ({"a": jnp.ones(2), "b": jnp.ones(1)}, 0.5, r"the leaf \['b'\] is missing in the long model"),
        ({"a": jnp.ones(2)}, 1.5, "weight is 1.5; expected 0"),
    ],
)
def test_models_that_cannot_be_merged(short, weight, message):
    with pytest.raises(ValueError, match=message):
        merge({"a": jnp.ones(2)}, short, weight)


@pytest.fixture(scope="module")
def sampled():
    """Seven problems of unequal width in batches of three, from a random model that often ends."""
    tokenizer = CharTokenizer("0123456789= ")
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=1, kv_heads=1, ffn=16, max_length=32
    )
    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    records = [{"prompt": f"{7**i}=", "answer": str(i)} for i in range(7)]
    calls = []

    def reward(*, prompts, completions, answer, finish_reasons, lengths, **_):
        calls.append((prompts, completions, answer, finish_reasons, lengths))
        return [None if text.startswith("9") else float(len(text) % 2) for text in completions]

    draw = lambda: sample(
        model, params, tokenizer, records, reward, jax.random.key(1),
        sampling=Sampling(max_tokens=8), samples=12, batch=3,
    )  # fmt: skip
    return draw, calls, tokenizer


def test_samples_are_what_the_reward_saw(sampled):
    """Each problem once, the filling of the last batch left out; cut off, empty and unscored completions are NaN."""
    draw, calls, _ = sampled
    calls.clear()
    drawn = draw()
    prompts, texts, answers, reasons, lengths = (sum(map(list, part), []) for part in zip(*calls, strict=True))
    assert prompts == [record["prompt"] for record in drawn.records for _ in range(12)]
    assert answers == [record["answer"] for record in drawn.records for _ in range(12)]
    assert sum(drawn.texts, []) == texts and drawn.lengths.reshape(-1).tolist() == lengths
    assert drawn.scores.shape == drawn.lengths.shape == (7, 12)
    seen = set()
    for text, reason, score in zip(texts, reasons, drawn.scores.reshape(-1), strict=True):
        if reason == "length" or not text.strip() or text.startswith("9"):
            assert np.isnan(score)
        else:
            assert score == len(text) % 2
        seen.add((reason, bool(text.strip())))
    assert {("length", True), ("eos", True), ("eos", False)} <= seen
    again = draw()
    assert again.texts == drawn.texts
    np.testing.assert_array_equal(again.scores, drawn.scores)


def test_what_is_kept_can_be_learnt_from(sampled):
    draw, _, tokenizer = sampled
    drawn = draw()
    kept, failed = select(drawn, keep="all")
    assert kept and failed < 7
    examples = encode_examples(kept, tokenizer)
    assert examples.tokens.shape[0] == len(kept)
    pairs, _ = length_pairs(drawn, ratio=1.0)
    assert encode_pairs(pairs, tokenizer).chosen.tokens.shape[0] == len(pairs) > 0


def test_no_problems_are_refused(model, params):
    with pytest.raises(ValueError, match="there are no records"):
        sample(
            model, params, CharTokenizer("ab"), [], lambda **_: [], jax.random.key(0), sampling=Sampling(max_tokens=2)
        )
