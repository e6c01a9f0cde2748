"""Tasks of reasoning-gym as records, and their scorers as a reward. Skipped where the package is not installed."""

import json
import sys

import pytest

from jaxrl.data import reasoning
from jaxrl.posttrain import rewards

gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'jaxrl[reasoning]'")

TASKS = [
    "basic_arithmetic",
    "leg_counting",
    "maze",
    "sudoku",
    "time_intervals",
    "prime_factorization",
    "family_relationships",
]
REFUSED = [
    "binary_matrix",
    "bitwise_arithmetic",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "number_sorting",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
]


def columns(records):
    return {name: [record[name] for record in records] for name in records[0] if name != "prompt"}


def answered(record, answer):
    return f"<think>{record['task']}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_own_answers_are_right(task):
    records = reasoning.reasoning_records(task, count=4, seed=3)
    assert records == reasoning.reasoning_records(task, count=4, seed=3)
    assert records != reasoning.reasoning_records(task, count=4, seed=4)
    assert all(
        record["prompt"].endswith("\n\n" + reasoning.INSTRUCTION) and record["task"] == task for record in records
    )
    reward = rewards.reasoning_reward()
    right = [answered(record, record["answer"]) for record in records]
    assert reward(completions=right, **columns(records)) == [1.0] * 4
    written = [json.loads(json.dumps(record)) for record in records]
    assert reward(completions=right, **columns(written)) == [1.0] * 4
    wrong = reward(completions=[answered(record, "definitely wrong") for record in records], **columns(records))
    assert all(0 <= value < 0.5 for value in wrong)  # some give a little for any answer


def test_marks_and_cuts():
    (record,) = reasoning.reasoning_records("leg_counting", count=1, instruction="")
    assert "<answer>" not in record["prompt"]
    right, given = record["answer"], columns([record])
    one = lambda text, reason="eos", **knobs: rewards.reasoning_reward(**knobs)(
        completions=[text], finish_reasons=[reason], **given
    )
    assert one(f"<answer>1</answer><answer> {right} </answer>") == [1]
    assert one(right) == [0] and one(right, tag=None) == [1] and one(f"so #### {right}", tag=None, marker="####") == [1]
    assert one(f"<answer>{right}</answer>", "length") == [0]
    assert one("<answer></answer>") == [0]


def test_tasks_can_be_mixed_with_other_records():
    records = [*reasoning.reasoning_records("maze", count=1), *reasoning.reasoning_records("sudoku", count=1)]
    given = columns([*records, {"answer": "1", "task": None, "metadata": None, "options": None}])
    texts = [*(answered(record, record["answer"]) for record in records), "1"]
    scores = rewards.load_reward("reasoning + 0.5*format")(prompts=texts, completions=texts, **given)
    assert scores == [1.5, 1.5, 0.0]
    assert scores.metrics["rewards/reasoning/missing"] == pytest.approx(1 / 3)


def test_options_reach_the_task():
    easy = reasoning.reasoning_records(
        "basic_arithmetic", count=20, min_digits=1, max_digits=1, min_terms=2, max_terms=2
    )
    hard = reasoning.reasoning_records(
        "basic_arithmetic", count=20, min_digits=6, max_digits=6, min_terms=2, max_terms=2
    )
    size = lambda records: sum(len(record["prompt"]) for record in records)
    assert size(hard) > size(easy) + 100
    assert easy[0]["options"] == {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}


def test_scorers_that_evaluate_answers_are_refused(tmp_path):
    """The list is what a search of their code finds; that it finds the right ones is seen by asking each for a file."""
    tasks = reasoning.reasoning_tasks()
    assert [name for name in sorted(gym.factory.DATASETS) if name not in tasks] == sorted([*REFUSED, "composite"])
    for task in ("countdown", "n_queens"):
        with pytest.raises(ValueError, match=f"task '{task}': its scorer .* evaluates answers"):
            reasoning.reasoning_records(task, count=1)
    made = tmp_path / "made"
    code = f"open({str(made)!r}, 'w').close()"
    own = gym.create_dataset("n_queens", size=1, seed=0)
    own.score_answer(f"[[{code}]]", own[0])
    assert made.exists()  # the test can see what it looks for
    made.unlink()
    for task in TASKS:
        (record,) = reasoning.reasoning_records(task, count=1)
        for answer in (code, f"[[{code}]]", f"({code})", f"__import__('os').system('touch {made}')"):
            rewards.reasoning_reward()(completions=[answered(record, answer)], **columns([record]))
    assert not made.exists()


def test_records_that_were_changed():
    (record,) = reasoning.reasoning_records("rearc", count=1)
    changed = json.loads(json.dumps(record))
    reasoning._dataset.cache_clear()  # the check is made once
    with pytest.raises(ValueError, match="task 'rearc' does not accept the answer .* of its own record; .*no tuples"):
        rewards.reasoning_reward()(completions=[answered(record, record["answer"])], **columns([changed]))
    assert rewards.reasoning_reward()(completions=[answered(record, record["answer"])], **columns([record])) == [1]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("leg_countin", {}, "no task 'leg_countin'; did you mean leg_counting"),
        ("zzzzzz", {}, r"reasoning_tasks\(\) lists them"),
        ("composite", {}, "no task 'composite'"),
        ("leg_counting", {"max_animal": 3}, "no option 'max_animal'; did you mean 'max_animals'"),
        ("leg_counting", {"qqqq": 3}, "no option 'qqqq'; expected .*max_animals"),
        ("leg_counting", {"max_animals": -3}, "refuses the options .*AssertionError"),
        ("leg_counting", {"max_animals": {1}}, "are no JSON"),
        ("leg_counting", {"size": 3}, "expected the number of problems as count"),
        ("leg_counting", {"count": 0}, "count is 0; expected at least 1"),
    ],
)
def test_bad_requests(task, options, message):
    with pytest.raises(ValueError, match=message):
        reasoning.reasoning_records(task, **{"count": 1, **options})


def test_without_the_package(monkeypatch):
    reasoning._gym.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"reasoning-gym cannot be imported .*pip install 'jaxrl\[reasoning\]'"):
        reasoning.reasoning_tasks()
