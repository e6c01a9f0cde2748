"""How good completions are: pass@k, maj@k, win rate and length, from scores and answers, without a model.

correct = scores >= 1                                    # [N problems, n completions]
pass_at_k(correct, k=4).mean()
maj_at_k(answers, correct, k=8).mean()                   # answers: N lists of n texts
win_rate(judge, prompts, ours, theirs)
"""

import collections
import inspect
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

Judge = Callable[[Sequence[Any], Sequence[list[str]]], Sequence[Any]]

METRICS = {
    "accuracy": "fraction of completions that are right, pass@1",
    "pass@k": "chance that one of k completions is right",
    "maj@k": "chance that the most frequent answer of k completions is right",
    "length": "mean tokens of a completion, the EOS included",
}
"""What `evaluate` computes; k is a number, as in pass@8."""


class Estimate(NamedTuple):
    """A figure of `evaluate` and its confidence interval over problems."""

    mean: float
    low: float
    high: float


class WinRate(NamedTuple):
    """Result of `win_rate`; `low` and `high` are the ends of the confidence interval of `rate`."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    unjudged: int
    """Prompts without a verdict in either order."""
    swayed: float
    """Fraction of the prompts whose winner changed with the order: how far the judge's taste is for a place."""


def pass_at_k(correct: np.ndarray, *, k: int) -> np.ndarray:
    """Chance that at least one of k completions is right, without bias (Chen et al. 2021, arXiv 2107.03374, eq. 1).

        1 - C(n - c, k) / C(n, k), for c right ones of n: the mean over all subsets of k

    Args:
      correct: `[N, n]` of 0 and 1 (or bool), n completions of each of N problems; NaN leaves one out.
      k: at most n.

    Returns:
      `[N]` float64; NaN for a problem that has fewer than k known ones.

    Raises:
      ValueError: another shape, another value, or k outside 1 to n.
    """
    correct, known = _correct(correct, k, "pass")
    rates = np.full(len(correct), np.nan)
    for i, (right, count) in enumerate(
        zip(correct.sum(axis=1).astype(int).tolist(), known.sum(axis=1).tolist(), strict=True)
    ):
        if count >= k:
            ways = math.comb(count, k)
            rates[i] = (ways - math.comb(count - right, k)) / ways
    return rates


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: np.ndarray, *, k: int) -> np.ndarray:
    """Chance that the most frequent answer of k completions is right (self-consistency, Wang et al. 2022, 2203.11171).

    The exact mean over all subsets of k of the n completions, by counting, not by drawing. Of answers with equally
    many votes each wins with the same chance. A completion without an answer casts no vote; where nobody votes the
    outcome is wrong.

    Args:
      answers: N lists of n texts, equal for equal answers (`rewards.vote_key`); None where there is no answer.
      correct: `[N, n]` as in `pass_at_k`; of one answer the mean counts. NaN leaves a completion out.
      k: at most n.

    Returns:
      `[N]` float64; NaN for a problem that has fewer than k known ones.

    Raises:
      ValueError: as `pass_at_k`, or answers of another shape.
    """
    correct, known = _correct(correct, k, "maj")
    shape = {len(row) for row in answers}
    if len(answers) != len(correct) or shape - {correct.shape[1]}:
        raise ValueError(
            f"maj@{k}: answers are {len(answers)} rows of {sorted(shape)}; expected [N, n] = {correct.shape}"
        )
    rates = np.full(len(correct), np.nan)
    for i, (row, right, is_known) in enumerate(zip(answers, correct, known, strict=True)):
        count = int(is_known.sum())
        if count >= k:
            rates[i] = _majority([a for a, x in zip(row, is_known, strict=True) if x], right[is_known], k)
    return rates


def _majority(answers: list[str | None], correct: np.ndarray, k: int) -> float:
    """The mean over subsets of k for one problem."""
    votes = collections.Counter(answer for answer in answers if answer is not None)
    silent = len(answers) - sum(votes.values())
    chance: dict[int, float] = {}
    total = 0.0
    for answer, size in votes.items():
        share = float(np.mean([c for a, c in zip(answers, correct, strict=True) if a == answer]))
        if share > 0.0:
            if size not in chance:
                others = list(votes.values())
                others.remove(size)
                chance[size] = _wins(size, others, silent, k)
            total += share * chance[size]
    return total


def _wins(size: int, others: list[int], silent: int, k: int) -> float:
    """Chance that an answer given `size` times wins the vote of k against answers given `others` times."""
    won = 0.0
    for votes in range(1, min(size, k) + 1):
        ways = {(0, 0): 1}  # (completions taken, others with as many votes) -> number of ways
        for other in others:
            after: dict[tuple[int, int], int] = collections.defaultdict(int)
            for (taken, tied), number in ways.items():
                for theirs in range(min(other, votes, k - votes - taken) + 1):
                    after[taken + theirs, tied + (theirs == votes)] += number * math.comb(other, theirs)
            ways = after
        for (taken, tied), number in ways.items():
            number *= math.comb(size, votes) * math.comb(silent, k - votes - taken)
            won += number / math.comb(size + sum(others) + silent, k) / (tied + 1)
    return won


def win_rate(
    judge: Judge,
    prompts: Sequence[Any],
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    swap: bool = True,
    confidence: float = 0.95,
) -> WinRate:
    """How often a judge prefers the first of two completions.

        rate = (wins + ties / 2) / judged prompts; a prompt's verdict is the mean of both orders

    Judges tend to prefer a place (Zheng et al. 2023, arXiv 2306.05685, section 3.4): both orders are asked, and a
    prompt whose winner changes with the order is a tie. The interval is Wilson's (1927), with half a win for a tie; as
    ties vary less than wins and losses, it is then somewhat too wide.

    Args:
      judge: `(prompts [N], completions [N] lists of two texts) -> [N]` verdicts, as in `online.judged`: two scores
        (equal ones are a tie), or 0 or 1 for the better of the two, or None.
      prompts: `[N]`, in the form the judge takes.
      first: `[N]` completions whose rate is asked for, in the form the judge takes; scores of them, for
        `lambda prompts, pairs: pairs`.
      second: `[N]` those they are compared with.
      swap: ask in both orders; otherwise once.
      confidence: of the interval.

    Raises:
      ValueError: other lengths, a verdict that is none of these, or no verdict at all.
    """
    if not len(prompts) == len(first) == len(second) > 0:
        raise ValueError(
            f"win rate: {len(prompts)} prompts, {len(first)} and {len(second)} completions; expected as many of each, "
            "at least 1"
        )
    verdicts = [_wins_of_first(judge, prompts, first, second)]
    if swap:
        verdicts.append(1.0 - _wins_of_first(judge, prompts, second, first))
    known = [verdict[~np.isnan(verdict)] for verdict in np.transpose(verdicts)]
    scores = np.asarray([verdict.mean() for verdict in known if verdict.size])
    if not scores.size:
        raise ValueError(f"win rate: the judge gave no verdict on any of {len(prompts)} prompts")
    low, high = wilson(float(scores.sum()), len(scores), confidence=confidence)
    return WinRate(
        rate=float(scores.mean()),
        low=low,
        high=high,
        wins=int((scores > 0.5).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores < 0.5).sum()),
        unjudged=len(prompts) - len(scores),
        swayed=float(np.mean([(v > 0.5).any() and (v < 0.5).any() for v in known if v.size])),
    )


def judge_by(reward: Callable[..., Sequence[float | None]], **columns: Sequence) -> Judge:
    """A judge that prefers what a Python reward scores higher; no verdict where it does not score both.

    Args:
      reward: needs no more than prompts, completions and the columns.
      columns: `[N]` values for the prompts, such as `answer`.
    """

    def judge(prompts, completions):
        sides = [reward(prompts=prompts, completions=list(side), **columns) for side in zip(*completions, strict=True)]
        return [None if None in pair else pair for pair in zip(*sides, strict=True)]

    return judge


def is_judge(function: Callable) -> bool:
    """Whether a function is a judge and no reward: called as `(prompts, completions)`, and no columns besides."""
    signature = inspect.signature(function)
    if any(given.kind is inspect.Parameter.VAR_KEYWORD for given in signature.parameters.values()):
        return False
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def wilson(successes: float, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate (1927), which stays in [0, 1] and works for few trials and rates of 0 and 1.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Raises:
      ValueError: no trials, more successes than trials, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= trials or trials < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"interval: {successes} of {trials} at confidence {confidence}; expected 0 to n successes of n > 0 trials, "
            "and a confidence between 0 and 1"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, weight = successes / trials, z * z / trials
    centre, half = rate + weight / 2, math.sqrt(weight * (rate * (1 - rate) + weight / 4))
    return max((centre - half) / (1 + weight), 0.0), min((centre + half) / (1 + weight), 1.0)


def evaluate(
    metrics: Sequence[str],
    *,
    correct: np.ndarray,
    answers: Sequence[Sequence[str | None]] | None = None,
    lengths: np.ndarray | None = None,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Metrics by name, each the mean over the problems that have it; NaN where none has.

    The interval is Wilson's (1927) over problems, of the length the mean -+ z standard errors. A chance between 0 and 1
    varies less than a success: of several samples Wilson's is somewhat too wide.

    Args:
      metrics: such as `("pass@1", "pass@8", "maj@8", "length")`; see `METRICS`.
      correct: `[N, n]` as in `pass_at_k`.
      answers: N lists of n, for maj@k.
      lengths: `[N, n]` tokens, for length.
      confidence: of the intervals.

    Raises:
      ValueError: an unknown metric, one whose numbers were not given, or a k above n.
    """
    result = {}
    for name in metrics:
        kind, _, number = name.partition("@")
        k = int(number) if number.isdecimal() and len(number) < 9 else 0
        if name == "accuracy" or (kind == "pass" and k > 0):
            values = pass_at_k(correct, k=k or 1)
        elif kind == "maj" and k > 0 and answers is not None:
            values = maj_at_k(answers, correct, k=k)
        elif name == "length" and lengths is not None:
            values = np.asarray(lengths, np.float64).mean(axis=1)
        else:
            lacks = kind == "maj" and k > 0 or name == "length"
            hint = (
                "it needs " + ("answers" if kind == "maj" else "lengths") if lacks else f"expected {', '.join(METRICS)}"
            )
            raise ValueError(f"metric {name!r}: {hint}")
        values = values[~np.isnan(values)]
        result[name] = _estimate(values, confidence, chance=name != "length")
    return result


def _estimate(values: np.ndarray, confidence: float, *, chance: bool) -> Estimate:
    if not values.size:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if chance:
        return Estimate(mean, *wilson(float(values.sum()), values.size, confidence=confidence))
    spread = float(values.std(ddof=1)) if values.size > 1 else math.nan
    half = NormalDist().inv_cdf((1 + confidence) / 2) * spread / math.sqrt(values.size)
    return Estimate(mean, mean - half, mean + half)


def _correct(correct: Any, k: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Zeros and ones `[N, n]`, and which of them are known."""
    correct = np.asarray(correct, np.float64)
    if correct.ndim != 2 or not 1 <= k <= correct.shape[1]:
        raise ValueError(
            f"{name}@{k}: correct has shape {list(correct.shape)}; expected [N, n] with n completions of each problem "
            f"and k from 1 to n: draw at least {max(k, 1)} samples"
        )
    known = ~np.isnan(correct)
    wrong = correct[known & (correct != 0) & (correct != 1)]
    if wrong.size:
        raise ValueError(f"{name}@{k}: correct holds {wrong[0]:g}; expected 0, 1 or NaN: compare scores, such as >= 1")
    return np.where(known, correct, 0.0), known


def _wins_of_first(judge: Judge, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
    """`[N]`: 1 where the first was found better, 0 the second, 1/2 a tie, NaN no verdict."""
    verdicts = list(judge(prompts, [list(pair) for pair in zip(first, second, strict=True)]))
    if len(verdicts) != len(prompts):
        raise ValueError(f"win rate: the judge gave {len(verdicts)} verdicts for {len(prompts)} prompts")
    return np.asarray([_lean(verdict) for verdict in verdicts], np.float64)


def _lean(verdict: Any) -> float:
    given = np.asarray(math.nan if verdict is None else verdict)
    if given.dtype.kind in "biuf" and given.shape == (2,):
        return math.nan if np.isnan(given).any() else (1.0 + np.sign(float(given[0]) - float(given[1]))) / 2
    if given.dtype.kind in "biuf" and given.shape == () and (np.isnan(given) or given in (0, 1)):
        return 1.0 - float(given)
    raise ValueError(
        f"win rate: the judge's verdict is {verdict!r}; expected two scores, 0 or 1 for the better of the two, or None"
    )
