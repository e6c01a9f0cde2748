"""`jaxrl eval`: figures of a tiny model against those counted from its own completions, win rates, tables, errors."""

import json
import math

import jax
import numpy as np
import pytest

from jaxrl import cli, runs
from jaxrl.posttrain import evaluation, judge, recipes, rewards, task
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.update import OptimizerConfig

JUDGES = """
def longer(prompts, completions):
    return [[float(len(text)) for text in pair] for pair in completions]

def first(prompts, completions):
    return [0] * len(prompts)

def silent(prompts, completions):
    return [None] * len(prompts)

def ones(*, completions, **_):
    return [float(text.count("1")) for text in completions]

def unknown(*, completions, **_):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that have learnt the last digit of a number hardly (`few`) and better (`many`), and a file of judges."""
    path = tmp_path_factory.mktemp("eval")
    records = [{"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10)} for a in range(100, 300)]
    (path / "digits.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "judges.py").write_text(JUDGES)
    for name, steps in (("few", 4), ("many", 24)):
        recipes.train_sft(
            recipes.SFTRun(
                data=str(path / "digits.jsonl"), tokenizer="char:0123456789=", out=str(path / name), held_out=11,
                steps=steps, chunk=4, eval_every=0, save_every=0, max_tokens=3, sft=SFTConfig(batch=32),
                model=recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
                optimizer=OptimizerConfig(learning_rate=2e-2),
            )
        )  # fmt: skip
    return path


def call(capsys, *argv):
    try:
        status = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_greedy_accuracy_is_that_of_training(folder, capsys):
    summary = json.loads((folder / "many" / "summary.json").read_text())
    status, out, _ = call(capsys, "eval", folder / "many", "--batch", 4)
    assert status == 0 and "11 problems, greedy" in out
    assert f"accuracy  {summary['accuracy_after']:.4g}  (95 %" in out
    result = evaluation.evaluate(str(folder / "many"), batch=4)
    assert result.figures["accuracy"].mean == pytest.approx(summary["accuracy_after"]) and result.win_rate is None
    assert len(result.completions.texts) == 11 and result.other is None


def test_figures_are_those_of_the_completions(folder):
    """pass@k, maj@k and length from the texts themselves, counted here once more."""
    sampling = Sampling(max_tokens=3)
    names = ("accuracy", "pass@1", "pass@4", "maj@1", "maj@4", "length")
    result = evaluation.evaluate(str(folder / "many"), metrics=names, sampling=sampling, samples=4, batch=20)
    drawn, figures = result.completions, result.figures
    right = [
        [text == record["answer"] and why == "eos" for text, why in zip(*rows, strict=True)]
        for record, *rows in zip(drawn.problems, drawn.texts, drawn.finish, strict=True)
    ]
    np.testing.assert_array_equal(drawn.correct, np.asarray(right, float))
    assert 0 < np.mean(right) < 1
    assert figures["accuracy"] == figures["pass@1"] and figures["accuracy"].mean == pytest.approx(np.mean(right))
    assert figures["pass@4"].mean == pytest.approx(np.mean(np.any(right, axis=1)))
    assert figures["length"].mean == pytest.approx(drawn.lengths.mean())
    ended = [[text if why == "eos" else None for text, why in zip(*rows, strict=True)]
             for rows in zip(drawn.texts, drawn.finish, strict=True)]  # fmt: skip
    keys = [[rewards.vote_key(text) if text else None for text in row] for row in ended]
    assert drawn.answers == keys
    assert figures["maj@4"].mean == pytest.approx(judge.maj_at_k(keys, np.asarray(right, float), k=4).mean())
    assert all(low <= mean <= high for mean, low, high in figures.values())
    again = evaluation.evaluate(str(folder / "many"), sampling=sampling, samples=4, batch=20)
    assert again.completions.texts == drawn.texts
    other = evaluation.evaluate(str(folder / "many"), sampling=sampling, samples=4, batch=20, seed=1)
    assert other.completions.texts != drawn.texts
    assert len({row[0] for row in drawn.texts}) > 1 and any(len(set(row)) > 1 for row in drawn.texts)


def test_problems_in_parts_are_the_problems_at_once(folder):
    whole, parts = (evaluation.evaluate(str(folder / "many"), batch=batch) for batch in (100, 4))
    assert whole.completions.texts == parts.completions.texts
    np.testing.assert_array_equal(whole.completions.rewards, parts.completions.rewards)


def test_a_reward_decides_what_is_right(folder):
    place, file = str(folder / "many"), folder / "judges.py"
    number = evaluation.evaluate(place, reward="number")
    exact = evaluation.evaluate(place)
    assert number.figures["accuracy"].mean >= exact.figures["accuracy"].mean
    ones = evaluation.evaluate(place, reward=f"{file}:ones").completions
    assert [[text.count("1") for text in row] for row in ones.texts] == ones.rewards.tolist()
    unknown = evaluation.evaluate(place, metrics=("accuracy", "length"), reward=f"{file}:unknown")
    assert math.isnan(unknown.figures["accuracy"].mean) and unknown.figures["length"].mean > 0


def test_win_rates(folder):
    """By a judge of texts, by a reward, by the exact answer, and by judges that say nothing or see only places."""
    ours, theirs, file = str(folder / "many"), str(folder / "few"), folder / "judges.py"
    against = lambda **given: evaluation.evaluate(ours, against=theirs, sampling=Sampling(max_tokens=3), **given)
    exact = against()
    sides = exact.completions, exact.other.completions
    assert [side.problems for side in sides] == [sides[0].problems] * 2
    first, second = (side.correct[:, 0] for side in sides)
    rate = exact.win_rate
    assert (rate.wins, rate.losses) == ((first > second).sum(), (first < second).sum()) and rate.wins > 0
    assert rate.rate == pytest.approx(np.mean((1 + np.sign(first - second)) / 2)) and rate.low < rate.rate < rate.high
    longer = against(judge=f"{file}:longer")
    lengths = [
        np.asarray([len(row[0]) for row in side.texts]) for side in (longer.completions, longer.other.completions)
    ]
    assert longer.win_rate.wins == (lengths[0] > lengths[1]).sum()
    assert set(longer.figures) == set() and np.isnan(longer.completions.rewards).all()
    both = against(judge=f"{file}:longer", reward="exact")
    assert both.win_rate == longer.win_rate and both.figures["accuracy"].mean == exact.figures["accuracy"].mean
    ones = against(judge=f"{file}:ones")
    assert ones.win_rate == against(reward=f"{file}:ones").win_rate
    place = against(judge=f"{file}:first").win_rate
    assert place.rate == 0.5 and place.ties == 11 and place.swayed == 1
    with pytest.raises(ValueError, match="the judge gave no verdict on any of 11 prompts"):
        against(judge=f"{file}:silent")


def test_a_judge_is_told_from_a_reward(folder):
    for name in ("longer", "first", "silent"):
        assert judge.is_judge(rewards.load_reward(f"{folder / 'judges.py'}:{name}"))
    for spec in ("number", "exact", "number + 0.2*format", f"{folder / 'judges.py'}:ones"):
        assert not judge.is_judge(rewards.load_reward(spec))


def test_the_table_of_completions(folder, tmp_path, capsys):
    out = tmp_path / "table.jsonl"
    argv = ["eval", folder / "many", "--against", folder / "few", "--temperature", 1, "--out", out]
    status, said, _ = call(capsys, *argv)
    assert status == 0 and "win rate" in said and str(out) in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert (
        len(rows) == 22 and [row["model"] for row in rows] == [str(folder / "many")] * 11 + [str(folder / "few")] * 11
    )
    for row in rows:
        assert set(row) == {"model", "prompt", "completion", "answer", "given", "reward", "finish", "length"}
        assert row["reward"] == float(row["completion"] == row["answer"] and row["finish"] == "eos")
    assert rows[0]["prompt"] == rows[11]["prompt"]
    status, _, err = call(capsys, *argv)
    assert status == 2 and "exists already; expected a new file" in err


def test_samples_from_the_command_line(folder, capsys):
    status, out, _ = call(capsys, "eval", folder / "many", "--samples", 4, "--pass-at", "1,4", "--maj-at", "4")
    assert status == 0 and "4 at temperature 1" in out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["accuracy", "pass@1", "pass@4", "maj@4", "length"]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--pass-at", "1,x"], "--pass-at has 'x'; expected numbers with commas"),
        (["--pass-at", "8"], "pass@8 needs as many completions, and --samples is 1"),
        (["--samples", "4", "--maj-at", "0"], "maj@0 needs"),
        (["--samples", "0"], "samples is 0"),
        (["--samples", "4", "--temperature", "0"], "4 greedy samples are all equal"),
        (["--judge", "number"], "compares two models and one was given"),
        (["--against", "x", "--samples", "2"], "--against compares one completion of each model"),
        (["--against", "x"], "x holds no model"),
        (["--reward", "nubmer"], "did you mean 'number'?"),
        (["--against", "x", "--judge", "no.py:f"], "'no.py' is not a Python file"),
        (["--out", "nowhere/table.jsonl"], "is in a folder that does not exist"),
        (["--data", "no.jsonl"], "data 'no.jsonl' is no file"),
        (["--temprature", "1"], "--temperature"),
        (["--max-tokens", "100"], "with 100 new ones it does not fit the context"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(argv, hint, folder, capsys, monkeypatch):
    if "--max-tokens" not in argv:
        monkeypatch.setattr(runs, "load_model", lambda place: pytest.fail("a model was loaded"))
    status, _, err = call(capsys, "eval", folder / "many", *argv)
    assert status == 2 and hint in " ".join(err.split()) and "Traceback" not in err, err


@pytest.fixture(scope="module")
def caller(folder):
    """A run that has learnt to call a tool and to write a result of its own, which is wrong."""
    records = [
        {"prompt": f"{a}=", "completion": "<tool>3+4</tool><result>8</result>", "answer": "7"} for a in range(100, 164)
    ]
    (folder / "calls.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = recipes.SFTRun(
        data=str(folder / "calls.jsonl"), tokenizer="char:0123456789=+<>/tolresu", out=str(folder / "caller"),
        held_out=3, steps=120, chunk=40, eval_every=0, save_every=0, max_tokens=36, sft=SFTConfig(batch=16),
        model=recipes.ModelConfig(width=32, layers=1, heads=2, kv_heads=1, ffn=32),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    return str(recipes.train_sft(run).folder)


def test_with_tools(folder, caller, capsys):
    """The result is the tool's in place of the model's; of all samples alike, and in parts as at once."""
    sampling = Sampling(temperature=0.0, max_tokens=36)
    alone = evaluation.evaluate(caller, reward="number", sampling=sampling)
    assert alone.figures["accuracy"].mean == 0 and set(sum(alone.completions.texts, [])) == {
        "<tool>3+4</tool><result>8</result>"
    }
    helped = evaluation.evaluate(caller, reward="number", sampling=sampling, tools="calculator", batch=2)
    assert helped.figures["accuracy"].mean == 1
    assert {row[0] for row in helped.completions.texts} == {"<tool>3+4</tool><result>7</result>"}
    assert {row[0] for row in helped.completions.finish} == {"eos"} and (helped.completions.lengths == 35).all()
    once = evaluation.evaluate(caller, reward="number", sampling=sampling, tools="calculator", turns=1).completions
    assert {row[0] for row in once.texts} == {"<tool>3+4</tool>"} and {row[0] for row in once.finish} == {"stop"}

    names = ("accuracy", "pass@1", "pass@4", "length")
    given = {"metrics": names, "sampling": Sampling(max_tokens=36), "samples": 4, "reward": "number"}
    drawn = evaluation.evaluate(caller, **given, tools="calculator")
    assert drawn.figures["pass@4"].mean == pytest.approx(np.mean(drawn.completions.correct.any(axis=1)))
    assert drawn.completions.rewards.shape == (3, 4) and drawn.figures["pass@4"].mean > 0
    argv = ["eval", caller, "--reward", "number", "--tools", "calculator", "--turns", 2]
    status, out, _ = call(capsys, *argv)
    assert status == 0 and "accuracy  1  (95 %" in out
    for words, hint in ((["--tools", "abacus"], "'abacus' is none of calculator"), (["--tool-form", "x"], "'x'")):
        status, _, err = call(capsys, *argv, *words)
        assert status == 2 and hint in " ".join(err.split())


def test_a_published_model_needs_data(capsys):
    assert "smollm2-135m is no run and has no held-out problems" in call(capsys, "eval", "smollm2-135m")[2]
    assert "did you mean 'smollm2-135m'?" in call(capsys, "eval", "smollm2-135")[2]


def test_a_chat_model_stops_at_the_end_of_its_turn(model, params, prompts, monkeypatch):
    """A token that ends a turn ends the completion, and is part of it, as EOS is."""
    from jaxrl.data.tokenizer import CharTokenizer

    tokenizer = CharTokenizer("0123456789")
    sampling = Sampling(max_tokens=12)
    free = task.make_generate(model, tokenizer, sampling, samples=8)(params, prompts, jax.random.key(0))
    assert (np.asarray(free.finish) != 2).all()
    monkeypatch.setattr(task, "turn_ends", lambda tokenizer: (7,))
    held = task.make_generate(model, tokenizer, sampling, samples=8)(params, prompts, jax.random.key(0))
    stopped = np.asarray(held.finish) == 2
    assert stopped.any()
    for row in np.flatnonzero(stopped):
        length = int(held.lengths[row])
        assert held.completions[row, length - 1] == 7 and 7 not in held.completions[row, : length - 1]
        np.testing.assert_array_equal(held.completions[row, :length], free.completions[row, :length])
