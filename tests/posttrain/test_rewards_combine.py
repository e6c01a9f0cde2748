"""Several rewards as one: weights, failures, time limits, processes, names on a command line."""

import asyncio
import functools
import math
import os
import threading
import time

import numpy as np
import pytest

from jaxrl.posttrain import rewards
from jaxrl.posttrain.rewards.load import BUILT_IN


def fixed(*values):
    return lambda **_: list(values)


def call(reward, count=2, **columns):
    return reward(prompts=["p"] * count, completions=["c"] * count, **columns)


def test_weighted_sum_leaves_out_what_is_none():
    combined = rewards.combine(
        {
            "a": fixed(1, None, None, 4, None),
            "b": (fixed(10, 20, float("nan"), True, None), 0.5),
            "seen": (fixed(7, 7, 7, 7, 7), 0.0),
        }
    )
    scores = call(combined, 5)
    assert scores == [6.0, 10.0, None, 4.5, None] and isinstance(scores, list)
    assert scores.metrics == {
        "rewards/a/mean": 2.5,
        "rewards/a/std": 1.5,
        "rewards/a/missing": pytest.approx(0.6),
        "rewards/b/mean": pytest.approx(31 / 3),
        "rewards/b/std": pytest.approx(np.std([10, 20, 1])),
        "rewards/b/missing": pytest.approx(0.4),
        "rewards/seen/mean": 7.0,
        "rewards/seen/std": 0.0,
        "rewards/seen/missing": 0.0,
    }


def test_a_combination_is_a_reward():
    inner = rewards.combine({"a": (fixed(1, None), 2.0), "b": fixed(1, None)})
    scores = call(rewards.combine({"both": inner, "c": fixed(0, 5)}))
    assert scores == [3, 5]
    assert scores.metrics["rewards/a/mean"] == 1 and scores.metrics["rewards/both/missing"] == 0.5


def test_no_completions():
    scores = rewards.combine({"a": fixed()}, normalise=True)(prompts=[], completions=[])
    assert scores == [] and math.isnan(scores.metrics["rewards/a/mean"])


@pytest.mark.parametrize("parts", [{}, {"a": (fixed(1), math.nan)}, {"a": (fixed(1), math.inf)}, {"a": 3}])
def test_bad_parts(parts):
    with pytest.raises(ValueError, match="expected names to functions"):
        rewards.combine(parts)


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
def test_bad_time_limits(timeout):
    with pytest.raises(ValueError, match="expected more than 0 seconds"):
        rewards.combine({"a": fixed(1)}, timeout=timeout)


def raises(**_):
    raise ZeroDivisionError("by zero")


async def raises_later(**_):
    await asyncio.sleep(0)
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (fixed(1.0), "returned 1 values for 2 completions"),
        (fixed(1, 2, 3), "returned 3 values for 2 completions"),
        (lambda **_: 3.0, "returned float for 2"),
        (lambda **_: None, "returned NoneType for 2"),
        (lambda **_: "12", "returned 2 values for 2"),
        (lambda **_: (x for x in (1, 2)), "returned generator for 2"),
        (fixed("1", "2"), "something that is no number: the text '1'"),
        (fixed([1], [2]), "something that is no number"),
        (fixed(math.inf, 0), "returned inf; expected finite numbers"),
        (fixed(1e39, 0), "expected finite numbers of float32"),
        (raises, "ZeroDivisionError"),
        (raises_later, "ZeroDivisionError"),
    ],
)
def test_a_part_that_fails_is_left_out(bad, message, timeout):
    parts = {"bad": bad, "good": (fixed(1, 2), 2.0)}
    with pytest.warns(RuntimeWarning, match=f"reward 'bad': .*{message}.*; its completions have none"):
        scores = call(rewards.combine(parts, timeout=timeout))
    assert scores == [2, 4]
    assert scores.metrics["rewards/bad/missing"] == 1 and math.isnan(scores.metrics["rewards/bad/mean"])
    with pytest.raises((ValueError, ZeroDivisionError)):
        call(rewards.combine(parts, timeout=timeout, strict=True))


def test_a_column_that_is_not_there_is_an_error_at_once():
    needs = {"exact": rewards.exact_reward()}
    with pytest.raises(ValueError, match="reward 'exact' cannot be called: missing .*'answer'.*given prompts, compl"):
        call(rewards.combine(needs), finish_reasons=["eos"] * 2)
    with pytest.raises(ValueError, match="reward 'exact' cannot be called"):
        call(rewards.combine({"inner": rewards.combine(needs)}), finish_reasons=["eos"] * 2)


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks", "sync that returns a coroutine"])
def test_a_part_that_hangs_is_cut(kind):
    free = threading.Event()
    ended = []

    def sync(**_):
        free.wait(60)
        return [1, 1]

    async def waits(**_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def blocks(**_):
        free.wait(60)

    hangs = {"sync": sync, "async": waits, "async that blocks": blocks}.get(kind, lambda **_: waits())
    parts = {"hangs": hangs, "good": fixed(1, 2)}
    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="reward 'hangs': took longer than 0.5 s"):
        scores = call(rewards.combine(parts, timeout=0.5))
    with pytest.raises(TimeoutError):
        call(rewards.combine(parts, timeout=0.5, strict=True))
    assert time.perf_counter() - start < 10
    assert scores == [1, 2]
    free.set()
    if hangs is waits:
        assert len(ended) == 2  # a coroutine is cancelled, not left behind


@pytest.mark.parametrize("kind", ["sync", "async", "both"])
def test_parts_run_side_by_side(kind):
    meet = threading.Barrier(3)

    def sync(**_):
        meet.wait(30)
        return [1, 1]

    async def later(**_):
        await asyncio.to_thread(meet.wait, 30)
        return [1, 1]

    parts = {"sync": [sync] * 3, "async": [later] * 3, "both": [sync, later, functools.partial(later, x=1)]}[kind]
    timeout = 30 if kind == "sync" else None
    assert call(rewards.combine(dict(zip("abc", parts, strict=True)), timeout=timeout, strict=True)) == [3, 3]


def test_an_async_reward_gathers_and_runs_under_another_loop():
    async def one(text):
        await asyncio.sleep(0.2)
        return float(text)

    async def judged(*, completions, **_):
        return await asyncio.gather(*map(one, completions))

    async def notebook():
        return rewards.combine({"judged": judged}, strict=True)(prompts=["p"] * 50, completions=["1"] * 50)

    start = time.perf_counter()
    assert asyncio.run(notebook()) == [1.0] * 50
    assert time.perf_counter() - start < 5  # one after the other they would take 10 s


def test_normalise_then_sum():
    prompts = ["p", "p", "p", "q", "q", "r", "r"]
    a = [1.0, 0.0, None, 5.0, 5.0, 1.0, None]
    b = [0.0, 100.0, 200.0, 0.0, 50.0, None, None]
    parts = {"a": fixed(*a), "b": (fixed(*b), 0.5)}
    scores = rewards.combine(parts, normalise=True)(prompts=prompts, completions=["c"] * 7)

    def relative(values):
        result = []
        for i, value in enumerate(values):
            group = [v for v, p in zip(values, prompts, strict=True) if p == prompts[i] and v is not None]
            spread = np.std(group, ddof=1) if len(group) > 1 else 0.0
            alone = 0.0 if spread == 0 else (value - np.mean(group)) / (spread + 1e-6) if value is not None else None
            result.append(None if value is None else alone)
        return result

    expected = []
    for x, y in zip(relative(a), relative(b), strict=True):
        expected.append(None if x is y is None else pytest.approx((x or 0.0) + 0.5 * (y or 0.0), abs=1e-5))
    assert scores == expected
    assert scores.metrics["rewards/b/mean"] == 70  # what is reported is as it came
    plain = rewards.combine(parts, normalise=True)(prompts=list("abcdefg"), completions=["c"] * 7)
    assert plain == rewards.combine(parts)(prompts=list("abcdefg"), completions=["c"] * 7)


def test_parts_of_another_scale_do_not_drown_the_others():
    small = rewards.combine({"a": fixed(0, 1), "b": fixed(0, 1)}, normalise=True)
    large = rewards.combine({"a": fixed(0, 1000), "b": fixed(0, 1)}, normalise=True)
    assert call(large) == pytest.approx(call(small), rel=1e-4)


FILE = """
import os, sys, time

def pid(*, completions, **_):
    print("this goes to the standard error")
    return [os.getpid()] * len(completions)

def hangs(*, completions, **_):
    if "hang" in completions:
        while True:
            pass
    return [os.getpid()] * len(completions)

def dies(**_):
    os._exit(3)

def raises(**_):
    raise KeyError("a column")

def evaluates(*, completions, **_):
    return [eval(text) for text in completions]

def executes(*, completions, **_):
    exec(compile(completions[0], "<string>", "exec"))
    return [1]

def large(**_):
    return [len(bytearray(3 * 10**9))]

def platform(**_):
    return [os.environ["JAX_PLATFORMS"] == "cpu"]

def reward(*, level, **_):
    return [None if x is None else 2.0 * x for x in level]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_process_of_its_own(file):
    reward = rewards.isolated(f"{file}:pid", timeout=30)
    first, second = call(reward), call(reward)
    assert first == second and first[0] != os.getpid() and first[0] == first[1]
    assert rewards.isolated(str(file), timeout=30)(level=[1, None]) == [2, None]
    assert rewards.isolated(f"{file}:platform", timeout=30)(x=[1]) == [True]
    assert reward(completions=[]) == []
    pid = int(first[0])
    del reward
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_hangs_is_ended(file):
    reward = rewards.isolated(f"{file}:hangs", timeout=1, each=True)
    (pid,) = reward(completions=["fine"])
    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="hangs took longer than 1 s and was ended; its completions have no reward"):
        values = reward(completions=["fine", "hang", "fine"])
    assert time.perf_counter() - start < 20
    assert values[0] == pid and values[1] is None and values[2] not in (pid, None)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    whole = rewards.isolated(f"{file}:hangs", timeout=0.5)
    with pytest.warns(RuntimeWarning, match="took longer"):
        assert whole(completions=["fine", "hang"]) == [None, None]
    with pytest.raises(TimeoutError):
        rewards.isolated(f"{file}:hangs", timeout=0.5, strict=True)(completions=["hang"])


def test_a_process_that_fails(file):
    with pytest.warns(RuntimeWarning, match="its process ended, exit status 3"):
        assert call(rewards.isolated(f"{file}:dies", timeout=30)) == [None, None]
    with pytest.raises(RuntimeError, match="KeyError: 'a column'"):
        call(rewards.isolated(f"{file}:raises", timeout=30))
    with pytest.warns(RuntimeWarning, match="reward 'part': .*KeyError"):
        assert call(rewards.combine({"part": rewards.isolated(f"{file}:raises", timeout=30)})) == [None, None]
    with pytest.raises(ValueError, match="cannot be loaded: .*no function 'nobody' in .*; found dies, evaluates"):
        call(rewards.isolated(f"{file}:nobody", timeout=30))
    with pytest.raises(RuntimeError, match="MemoryError"):
        call(rewards.isolated(f"{file}:large", timeout=30, memory_gb=2))
    with pytest.raises(ValueError, match="expected one value of each for every completion"):
        rewards.isolated(f"{file}:pid", timeout=30)(completions=["a"], level=[1, 2])
    for function, timeout in ((str(file) + "x", 1), (f"{file}:pid", 0), ("nothing.py", 1)):
        with pytest.raises(ValueError, match="expected path/to/rewards.py:function and more than 0 seconds"):
            rewards.isolated(function, timeout=timeout)


def test_evaluation_can_be_switched_off(file):
    assert rewards.isolated(f"{file}:evaluates", timeout=30)(completions=["1+1"]) == [2]
    for name in ("evaluates", "executes"):
        reward = rewards.isolated(f"{file}:{name}", timeout=30, evaluation=False)
        with pytest.raises(RuntimeError, match="evaluation of text is switched off here"):
            reward(completions=["1+1"])


COMPLETIONS = {
    "prompts": ["p", "p"],
    "completions": ["<think>a</think><answer>5</answer>", "4"],
    "completion_ids": [[1, 2], [1, 1, 1, 1, 1, 1]],
    "lengths": [3, 7],
    "finish_reasons": ["eos", "eos"],
    "answer": ["5", "5"],
    "level": [1, 2],
}


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("number", [1, 0]),
        ("number()", [1, 0]),
        (" number(tolerance = 1) ", [1, 1]),
        ("exact(marker='=')", [0, 0]),
        ("format", [1, 0]),
        ('format(pattern="...", soft=True)', None),
        ("2*number", [2, 0]),
        ("-1 * number", [-1, 0]),
        ("number + 0.2*format", [1.2, 0]),
        ("number+.5*number+1e-1*number", [1.6, 0]),
        ("number + -0.5*repetition(n=1)", [1, pytest.approx(5 / 12)]),
        ("repetition(n=1, unit=words, weight=-2)", [0, 0]),
        ("number(marker='+ 1*x(')", [0, 0]),
        ("overlong(limit=8, buffer=4)", [0, -0.75]),
        ("cosine(limit=10, accuracy='number(tolerance=1)', right=(2, 2))", [2, 2]),
        ("language(language=en)", [1, None]),
        ("FILE", [2, 4]),
        ("FILE:reward", [2, 4]),
        ("number + 0.5*FILE:reward", [2, 2]),
    ],
)
def test_rewards_by_name(spec, values, file):
    spec = spec.replace("FILE", str(file))
    if values is None:
        with pytest.raises(ValueError, match="expected at least one piece"):
            rewards.load_reward(spec)
    else:
        assert rewards.load_reward(spec)(**COMPLETIONS) == values


def test_names_of_parts(file):
    scores = rewards.load_reward(f"number + 2*number(tolerance=1) + 0*{file}")(**COMPLETIONS)
    assert scores == [3, 2]
    means = {name: value for name, value in scores.metrics.items() if name.endswith("mean")}
    assert means == {"rewards/number/mean": 0.5, "rewards/number#2/mean": 1.0, "rewards/reward/mean": 3.0}
    single = rewards.load_reward("number", timeout=30, strict=True)(**COMPLETIONS)
    assert single == [1, 0] and "rewards/number/std" in single.metrics
    normal = rewards.load_reward("number + format", normalise=True)(**COMPLETIONS)
    assert normal == pytest.approx([2**0.5, -(2**0.5)], rel=1e-4)


def test_a_file_whose_name_looks_like_a_sum(file):
    odd = file.with_name("a + 2*b(c).py")
    odd.write_text(FILE)
    assert rewards.load_reward(f"{odd}:reward")(**COMPLETIONS) == [2, 4]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "cannot read ''"),
        ("number +", "cannot read ''"),
        ("numbr", "'numbr' is not a Python file and no built-in reward; did you mean 'number'?"),
        ("zzz", "expected one of exact, format, number"),
        ("number(tol=1)", r"number\(\*, marker.*unexpected keyword argument 'tol'"),
        ("number(1)", "options 'number.1.' cannot be read"),
        ("number(tolerance=open('x'))", "cannot be read; expected name"),
        ("number(tolerance=__import__('os').getpid())", "cannot be read"),
        ("number(**{})", "unexpected keyword argument"),
        ("number(tolerance=1) number", "cannot read"),
        ("number(tolerance=1", "cannot read"),
        ("number); print(1", "cannot read"),
        ("number(tolerance=1)+)(", "cannot read"),
        ("number(tolerance='" + "(" * 5 + "')", "must be a string or a number|Invalid|not supported|tolerance"),
        ("2*3*number", "cannot read"),
        pytest.param("number(a=" + "[" * 5000 + ")", "cannot be read", id="deep"),
        ("none.py:f", "'none.py' is not a Python file; expected path/to/rewards.py:function"),
        ("overlong", "missing .* required"),
        ("overlong(limit=1, buffer=2)", "overlong buffer"),
        ("FILE:nobody", "no function 'nobody' in .*; found dies, evaluates"),
        ("number + FILE:nobody", "no function 'nobody'"),
    ],
)
def test_bad_specs(spec, message, file):
    with pytest.raises(ValueError, match=message):
        rewards.load_reward(spec.replace("FILE", str(file)))


def test_every_name_has_a_place():
    assert sorted(BUILT_IN) == sorted(
        [
            "exact",
            "format",
            "number",
            "math",
            "reasoning",
            "language",
            "repetition",
            "overlong",
            "cosine",
            "isolated",
            "model",
        ]
    )
