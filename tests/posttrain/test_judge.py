"""pass@k, maj@k and win rates, against counting by hand over all subsets."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.posttrain import judge

NAN = math.nan


def pass_by_hand(correct, k):
    subsets = list(itertools.combinations(correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def majority_by_hand(answers, correct, k):
    """Every subset votes; the winners share the outcome, whose rightness is the answer's mean over all completions."""
    rows = range(len(answers))
    right = {a: np.mean([correct[i] for i in rows if answers[i] == a]) for a in set(answers)}
    total, count = 0.0, 0
    for subset in itertools.combinations(rows, k):
        votes = collections.Counter(answers[i] for i in subset if answers[i] is not None)
        winners = [a for a, n in votes.items() if n == max(votes.values())]
        total += sum(right[a] for a in winners) / max(len(winners), 1)
        count += 1
    return total / count


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_subsets(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    assert judge.pass_at_k(np.asarray([correct]), k=k)[0] == pytest.approx(pass_by_hand(correct, k), abs=1e-12)


def test_pass_at_k_of_many_problems():
    correct = np.asarray([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, NAN, 0], [1, NAN, NAN, NAN]])
    np.testing.assert_allclose(judge.pass_at_k(correct, k=2), [0.5, 0, 1, NAN])
    np.testing.assert_allclose(judge.pass_at_k(correct, k=1), [0.25, 0, 2 / 3, 1])
    assert judge.pass_at_k(np.ones((0, 3)), k=2).shape == (0,)


def test_pass_at_k_is_exact_for_many_samples():
    correct = np.arange(2000)[None, :] < 1
    assert judge.pass_at_k(correct, k=1000)[0] == 0.5  # the product form loses digits, factorials overflow
    assert judge.pass_at_k(correct, k=1)[0] == 1 / 2000


def test_pass_at_k_has_no_bias():
    """The mean over draws of n is the true chance, which 1 - (1 - c / n)^k is not."""
    correct = np.random.default_rng(0).random((20_000, 6)) < 0.2
    assert judge.pass_at_k(correct, k=4).mean() == pytest.approx(1 - 0.8**4, abs=0.01)
    assert abs((1 - (1 - correct.mean(axis=1)) ** 4).mean() - (1 - 0.8**4)) > 0.03


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1, max_size=7), st.data())
def test_maj_at_k_is_the_mean_over_subsets(rows, data):
    k = data.draw(st.integers(1, len(rows)))
    answers, correct = zip(*rows, strict=True)
    correct = [c and a is not None for a, c in rows]  # nobody finds a missing answer right
    by_hand = majority_by_hand(answers, correct, k)
    assert judge.maj_at_k([answers], np.asarray([correct]), k=k)[0] == pytest.approx(by_hand, abs=1e-12)


def test_maj_at_k_by_hand():
    answers = [["4", "4", "5"], ["4", "5", "6"], [None, None, "4"], [None] * 3, ["4", "5", "4"]]
    correct = np.asarray([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [NAN, 0, 1]])
    np.testing.assert_allclose(judge.maj_at_k(answers, correct, k=3), [1, 1 / 3, 1, 0, NAN])
    np.testing.assert_allclose(judge.maj_at_k(answers, correct, k=2), [2 / 3, 1 / 3, 2 / 3, 0, 0.5])
    np.testing.assert_allclose(judge.maj_at_k(answers, correct, k=1), judge.pass_at_k(correct, k=1))


def test_maj_at_k_of_many_samples():
    """More votes help the right answer if it leads, and hurt it if it does not."""
    answers = [["a"] * 40 + ["b"] * 30 + [str(i) for i in range(30)], ["a"] * 30 + ["b"] * 40 + ["c"] * 30]
    correct = np.asarray([[a == "a" for a in row] for row in answers])
    rates = np.stack([judge.maj_at_k(answers, correct, k=k) for k in (1, 5, 25, 64, 100)])
    assert (np.diff(rates[:, 0]) > 0).all() and (np.diff(rates[:, 1]) < 0).all()
    assert rates[-1].tolist() == [1, 0]


@pytest.mark.parametrize("name", ["pass", "maj"])
@pytest.mark.parametrize(
    ("correct", "k", "message"),
    [
        (np.ones((2, 3)), 4, r"shape \[2, 3\]; expected .*n completions .*draw at least 4 samples"),
        (np.ones((2, 3)), 0, "k from 1 to n"),
        (np.ones(3), 1, r"shape \[3\]"),
        (np.full((2, 3), 0.5), 1, "correct holds 0.5; expected 0, 1 or NaN"),
    ],
)
def test_bad_counts(name, correct, k, message):
    with pytest.raises(ValueError, match=f"{name}@{k}: .*{message}"):
        if name == "pass":
            judge.pass_at_k(correct, k=k)
        else:
            judge.maj_at_k([["a"] * 3] * 2, correct, k=k)


def test_answers_of_another_shape():
    for answers in ([["a", "b"]], [["a"], ["b"]], []):
        with pytest.raises(ValueError, match=r"answers are .* rows of .*; expected \[N, n\] = \(2, 2\)"):
            judge.maj_at_k(answers, np.ones((2, 2)), k=1)


def longer(prompts, completions):
    return [[len(text) for text in pair] for pair in completions]


def index(prompts, completions):
    return [int(len(b) > len(a)) for a, b in completions]


def test_win_rate_counts():
    first, second = ["long", "a", "same", "much longer"], ["no", "abc", "emas", "x"]
    result = judge.win_rate(longer, [""] * 4, first, second)
    assert result[:1] + result[3:] == (0.625, 2, 1, 1, 0, 0.0)
    assert (result.low, result.high) == judge.wilson(2.5, 4)
    by_index = judge.win_rate(index, [""] * 3, [first[0], first[1], first[3]], [second[0], second[1], second[3]])
    assert (by_index.wins, by_index.ties, by_index.losses) == (2, 0, 1)
    mirrored = judge.win_rate(longer, [""] * 4, second, first)
    assert mirrored.rate == 1 - result.rate and mirrored.low == pytest.approx(1 - result.high)


def test_a_judge_who_likes_a_place_decides_nothing():
    likes_the_first = lambda prompts, completions: [0] * len(prompts)
    result = judge.win_rate(likes_the_first, ["p"] * 5, ["a"] * 5, ["b"] * 5)
    assert (result.rate, result.ties, result.swayed) == (0.5, 5, 1.0)
    once = judge.win_rate(likes_the_first, ["p"] * 5, ["a"] * 5, ["b"] * 5, swap=False)
    assert (once.rate, once.wins, once.swayed) == (1.0, 5, 0.0)
    leans = lambda prompts, completions: [[1, 1] if pair[0] == "a" else [0, 1] for pair in completions]
    assert judge.win_rate(leans, ["p"], ["a"], ["b"]).rate == 0.75  # a tie and a win


def test_prompts_without_a_verdict():
    def shy(prompts, completions):
        table = {
            "none": None,
            "nan": NAN,
            "half": [1, NAN],
            "known": [2, 1],
            "once": [1, 0] if completions[0][0] else None,
        }
        return [table[prompt] for prompt in prompts]

    prompts = ["once", "none", "nan", "half", "known"]
    result = judge.win_rate(shy, prompts, ["a", "", "", "", ""], ["", "", "", "", ""])
    assert result.unjudged == 3 and result.wins + result.ties + result.losses == 2
    with pytest.raises(ValueError, match="no verdict on any of 1 prompts"):
        judge.win_rate(shy, ["none"], ["a"], ["b"])


@pytest.mark.parametrize("verdict", [2, 0.5, -1, "0", [1, 2, 3], ["a", "b"], [[1, 2]], {}])
def test_bad_verdicts(verdict):
    with pytest.raises(ValueError, match="expected two scores, 0 or 1 for the better of the two, or None"):
        judge.win_rate(lambda prompts, completions: [verdict], ["p"], ["a"], ["b"])


def test_bad_comparisons():
    with pytest.raises(ValueError, match="gave 1 verdicts for 2 prompts"):
        judge.win_rate(lambda prompts, completions: [0], ["p"] * 2, ["a"] * 2, ["b"] * 2)
    for sizes in ((0, 0, 0), (1, 2, 1), (1, 1, 2)):
        with pytest.raises(ValueError, match="expected as many of each, at least 1"):
            judge.win_rate(longer, *(["a"] * size for size in sizes))


def test_a_reward_as_judge():
    def score(*, prompts, completions, answer, **_):
        return [None if text == "?" else float(text == right) for text, right in zip(completions, answer, strict=True)]

    columns = {"answer": ["1", "2", "3", "4"]}
    result = judge.win_rate(judge.judge_by(score, **columns), ["p"] * 4, ["1", "0", "3", "?"], ["0", "2", "3", "4"])
    assert (result.wins, result.losses, result.ties, result.unjudged) == (1, 1, 1, 1)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 10), (3, 10), (7.5, 10), (500, 1000)])
def test_wilson_solves_its_equation(successes, trials):
    low, high = judge.wilson(successes, trials)
    rate, z = successes / trials, 1.959963984540054
    for end in (low, high):
        if 0 < end < 1:
            assert (rate - end) ** 2 == pytest.approx(z * z * end * (1 - end) / trials)
    assert 0 <= low <= rate <= high <= 1
    assert judge.wilson(successes, trials, confidence=0.5)[1] <= high


def test_wilson_covers():
    rng = np.random.default_rng(0)
    inside = [low <= 0.1 <= high for low, high in (judge.wilson(x, 20) for x in rng.binomial(20, 0.1, 4000).tolist())]
    assert 0.93 < np.mean(inside) < 0.98
    for bad in ((1, 0), (2, 1), (-1, 5)):
        with pytest.raises(ValueError, match="expected 0 to n successes"):
            judge.wilson(*bad)


def test_metrics_by_name():
    given = {
        "correct": np.asarray([[1, 0], [0, 0], [1, 1]]),
        "answers": [["4", "5"], ["6", "6"], ["1", "1"]],
        "lengths": np.asarray([[1, 2], [3, 4], [5, 6]]),
    }
    result = judge.evaluate(["accuracy", "pass@1", "pass@2", "maj@2", "length"], **given)
    means = {name: estimate.mean for name, estimate in result.items()}
    assert means == {"accuracy": 0.5, "pass@1": 0.5, "pass@2": pytest.approx(2 / 3), "maj@2": 0.5, "length": 3.5}
    assert result["accuracy"][1:] == judge.wilson(1.5, 3)
    half = 1.959964 * 2 / 3**0.5  # the means of lengths are 1.5, 3.5, 5.5
    assert result["length"][1:] == pytest.approx((3.5 - half, 3.5 + half))
    assert math.isnan(judge.evaluate(["pass@1"], correct=np.full((2, 2), NAN))["pass@1"].mean)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pass@3", "draw at least 3 samples"),
        ("pass@", "expected accuracy, pass@k, maj@k, length"),
        ("pass@0", "expected accuracy"),
        ("pass@x", "expected accuracy"),
        ("mean", "metric 'mean': expected accuracy"),
        ("maj@2", "it needs answers"),
        ("length", "it needs lengths"),
        ("pass@" + "9" * 5000, "expected accuracy"),
    ],
    ids=range(8),
)
def test_bad_metrics(name, message):
    with pytest.raises(ValueError, match=message):
        judge.evaluate([name], correct=np.ones((2, 2)))
