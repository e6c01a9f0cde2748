"""Format, language, repetition and length, as Python rewards."""

import re
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.posttrain import rewards

PIECES = ["<think>", "</think>", "<answer>", "</answer>"]
BODY = r"((?:(?!</?think>|</?answer>).)*)"
FORM = re.compile(rf"\s*<think>{BODY}</think>\s*<answer>{BODY}</answer>\s*", re.DOTALL)


def one(reward, text, **columns):
    return reward(completions=[text], **columns)[0]


@pytest.mark.parametrize(
    ("text", "strict", "soft"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        ("\n<think>\na\n</think>\n\n<answer> b </answer>\n", 1, 1),
        ("<think>a</think> so <answer>b</answer>", 0, 0.8),
        ("x<think>a</think><answer>b</answer>", 0, 0.8),
        ("<think>a</think><answer>b</answer>!", 0, 0.8),
        ("<think></think><answer>b</answer>", 0, 0.8),
        ("<think>a</think><answer> </answer>", 0, 0.8),
        ("<think>a</think><answer>b", 0, 0.6),
        ("<think>a<answer>b</answer>", 0, 0.6),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.4),
        ("<answer>b</answer><think>a</think>", 0, 0.4),  # the think pair stands in order, the answer before it does not
        ("<think>a<think>b</think><answer>c</answer>", 0, 0.6),
        ("</answer><answer></think><think>", 0, 0.2),
        ("<think>" * 50, 0, 0),
        ("<THINK>a</THINK><answer>b</answer>", 0, 0.4),
        ("", 0, 0),
    ],
)
def test_format_table(text, strict, soft):
    assert one(rewards.format_reward(), text) == strict
    assert one(rewards.format_reward(soft=True), text) == pytest.approx(soft)


@given(st.lists(st.sampled_from([*PIECES, "a", " ", "\n"]), max_size=12).map("".join), st.booleans())
def test_format_is_what_a_regular_expression_says(text, allow_empty):
    found = FORM.fullmatch(text)
    right = found is not None and (allow_empty or all(body.strip() for body in found.groups()))
    assert one(rewards.format_reward(allow_empty=allow_empty), text) == right
    soft = one(rewards.format_reward(soft=True, allow_empty=allow_empty), text)
    assert 0 <= soft <= 1 and (soft == 1) == right


def test_other_patterns():
    opened = rewards.format_reward("...</think><answer>...</answer>")
    assert one(opened, "a</think><answer>b</answer>") == 1 and one(opened, "<answer>b</answer>") == 0
    marked = rewards.format_reward("... #### ...")
    assert one(marked, "2+2 #### 4") == 1 and one(marked, "2+2 = 4") == one(marked, "#### 4") == 0
    assert one(rewards.format_reward("<a>...</a>"), "<a>(.*)+$</a>") == 1
    assert one(rewards.format_reward("<a>+</a>"), "<a>+</a>") == 1  # nothing in a pattern is special but the dots


@pytest.mark.parametrize("pattern", ["", "...", "<a>......</a>", "<a>...<a>", "<a>... ...</a>"])
def test_bad_patterns(pattern):
    with pytest.raises(ValueError, match="expected at least one piece besides"):
        rewards.format_reward(pattern)


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (rewards.format_reward(soft=True), "<think>" * 100_000),
        (rewards.format_reward(), "<think>" + " " * 500_000 + "</think>"),
        (rewards.language_reward("en"), "<" * 300_000),
        (rewards.language_reward("en"), "<a" * 100_000),
        (rewards.number_reward(), "1," * 200_000),
        (rewards.number_reward(), "1 " * 200_000),
        (rewards.number_reward(), "9" * 300_000),
        (rewards.number_reward(), "1,111" * 60_000),
        (rewards.number_reward(), "1" + " " * 300_000 + "/"),
        (rewards.number_reward(), "\\frac{" * 60_000),
        (rewards.number_reward(tag="a"), "<a>" * 100_000),
        (rewards.number_reward(), "\\boxed{" * 60_000),
    ],
)
def test_time_is_linear(reward, text):
    start = time.perf_counter()
    reward(completions=[text], answer=["1"])
    assert time.perf_counter() - start < 3  # quadratic time would be minutes


@pytest.mark.parametrize(
    ("language", "text", "share"),
    [
        ("en", "<think>plain words, 12 + 3</think>", 1.0),
        ("en", "да нет", 0.0),
        ("ru", "да no", 0.5),
        ("zh", "<think>因为</think>", 1.0),
        ("ja", "漢字とカナab", 5 / 7),
        ("ko", "한글", 1.0),
        ("ko", "한글", 1.0),  # the same, taken apart
        ("en", "é", 1.0),
        ("en", "ＡＢ", 1.0),  # full width
        ("GREEK", "λx", 0.5),
        (["LATIN", "GREEK"], "λx", 1.0),
        ("en", "12 + 3 = 15", None),
        ("en", "", None),
        ("en", "a < b < c", 1.0),
    ],
)
def test_language_table(language, text, share):
    assert one(rewards.language_reward(language), text) == (None if share is None else pytest.approx(share))


def test_unknown_language():
    with pytest.raises(ValueError, match="'klingon': Unicode has no script KLINGON; expected one of ar, de"):
        rewards.language_reward("klingon")
    with pytest.raises(ValueError, match="no script of no name"):
        rewards.language_reward([])


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_repetition_counts_ngrams(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    repeated = sum(gram in grams[:i] for i, gram in enumerate(grams))
    expected = -0.5 * repeated / len(grams) if grams else 0.0
    assert one(rewards.repetition_reward(n=n, weight=-0.5), "", completion_ids=[ids]) == pytest.approx(expected)


def test_repetition_of_words():
    reward = rewards.repetition_reward(n=2, unit="words")
    assert one(reward, "Go on\ngo ON") == pytest.approx(-1 / 3)
    assert one(reward, "go") == 0
    for knobs in ({"n": 0}, {"weight": 0.1}, {"unit": "letters"}):
        with pytest.raises(ValueError, match="expected n of at least 1"):
            rewards.repetition_reward(**knobs)


def test_cosine_is_the_papers_curve():
    right, wrong, limit = (2.0, 1.0), (-10.0, 0.0), 100
    lengths, correct = np.asarray([0, 25, 50, 99, 100, 130] * 2), np.repeat([True, False], 6)
    expected = []
    for length, is_right in zip(lengths, correct, strict=True):
        at_0, at_limit = right if is_right else wrong
        curve = at_limit + 0.5 * (at_0 - at_limit) * (1 + np.cos(length * np.pi / limit))
        expected.append(-10.0 if length >= limit else curve)
    given = rewards.cosine_length(
        jnp.asarray(lengths), jnp.asarray(correct), limit=limit, right=right, wrong=wrong, exceeded=-10.0
    )
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
    assert given[0] > given[1] > given[3] and given[6] < given[7] < given[9]  # right: short, wrong: long


def test_cosine_as_a_python_reward():
    reward = rewards.cosine_reward(rewards.number_reward(), limit=100)
    given = reward(
        completions=["1", "1", "2", "1", "1"],
        answer=["1", "1", "1", "none", "1"],
        lengths=[0, 50, 50, 50, 50],
        finish_reasons=["eos", "eos", "eos", "eos", "length"],
    )
    assert given == [1.0, pytest.approx(0.75), pytest.approx(-0.75), None, -1.0]
    with pytest.raises(ValueError, match="the limit is 0 tokens"):
        rewards.cosine_reward(rewards.number_reward(), limit=0)
    with pytest.raises(ValueError, match="cannot be called: missing .*'answer'"):
        reward(completions=["1"], lengths=[1])


def test_overlong_as_a_python_reward():
    given = rewards.overlong_reward(limit=100, buffer=20)(lengths=[10, 80, 90, 100, 150], completions=[])
    assert given == pytest.approx([0, 0, -0.5, -1, -1])
    with pytest.raises(ValueError, match="overlong buffer"):
        rewards.overlong_reward(limit=10, buffer=20)
