"""Whole runs at toy size: run folders, own data, Python rewards, meshes, and errors before anything is written."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrl import checkpoint, cli, metrics, pretrained, runs
from jaxrl.display import Display
from jaxrl.posttrain import evaluation, recipes, talk, task
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.update import OptimizerConfig

SMALL = {
    "model": recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
    "held_out": 16,
    "chunk": 2,
    "eval_every": 2,
    "save_every": 2,
}
SFT = recipes.SFTRun(
    **SMALL, steps=20, max_tokens=4, sft=SFTConfig(batch=32), optimizer=OptimizerConfig(learning_rate=2e-2)
)
GRPO = recipes.GRPORun(**SMALL, steps=4, grpo=GRPOConfig(prompts=4, group=8, sampling=Sampling(max_tokens=4)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `digits.jsonl`: the answer to `137=` is its last digit."""
    path = tmp_path_factory.mktemp("runs")
    records = [{"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10)} for a in range(100, 300)]
    write_lines(path / "digits.jsonl", records)
    return path


@pytest.fixture(scope="module")
def digits(folder):
    """What both kinds of run need to know about that task."""
    return {"data": str(folder / "digits.jsonl"), "tokenizer": "char:0123456789="}


@pytest.fixture(scope="module")
def warm(folder, digits):
    """A model that answers with one digit, seldom the right one."""
    return recipes.train_sft(dataclasses.replace(SFT, **digits, eval_every=10, out=str(folder / "warm")))


@pytest.fixture(scope="module")
def trained(folder, digits, warm):
    run = dataclasses.replace(GRPO, data=digits["data"], out=str(folder / "grpo"), init=str(warm.folder))
    return recipes.train_grpo(run)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_run_folder_holds_what_it_promises(trained, warm):
    files = {path.name for path in trained.folder.iterdir()}
    assert files == {"config.json", "model.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints"}
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["seconds"] > 0 and summary["skipped"] == 0
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["config"]["grpo"]["group"] == 8 and summary["config"]["init"] == str(warm.folder)
    assert summary["versions"]["jax"] == jax.__version__
    rows = list(metrics.read(trained.folder / "metrics.jsonl"))
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    named = set().union(*rows) - {"step"}
    assert named <= metrics.GLOSSARY.keys(), named - metrics.GLOSSARY.keys()
    assert checkpoint.steps(trained.folder / "checkpoints") == [2, 4]


def test_grpo_starts_where_its_model_ended(warm, trained):
    """`init` really loads: accuracy and tokenizer carry over, and the parameters have moved on from the model's."""
    start = runs.load_model(warm.folder)
    reference = trained.state.reference
    jax.tree.map(np.testing.assert_array_equal, reference, start.params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (reference, trained.state.params)), strict=True))


def test_continuing_a_finished_run_adds_steps(digits, tmp_path):
    run = dataclasses.replace(SFT, **digits, steps=4, out=str(tmp_path / "run"))
    whole = recipes.train_sft(dataclasses.replace(run, out=str(tmp_path / "whole"), steps=6))
    recipes.train_sft(run)
    longer = recipes.train_sft(dataclasses.replace(run, steps=6), resume=True)
    jax.tree.map(np.testing.assert_array_equal, longer.state.params, whole.state.params)
    rows = [row for row in metrics.read(longer.folder / "metrics.jsonl") if "train/loss" in row]
    expected = [row for row in metrics.read(whole.folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in expected]


def test_stop_at_accuracy(digits, tmp_path):
    """The first evaluation that meets the threshold ends the run there, with a checkpoint."""
    run = dataclasses.replace(SFT, **digits, out=str(tmp_path / "run"), steps=100, stop_at=1e-9)
    outcome = recipes.train_sft(run)
    assert 0 < outcome.summary["steps"] < 100 and outcome.summary["accuracy_after"] > 0
    assert checkpoint.steps(outcome.folder / "checkpoints")[-1] == outcome.summary["steps"]


def test_own_problems_with_exact_answers_and_a_python_reward(warm, tmp_path):
    """The same file under the device reward and under a Python file that computes the same: the same run."""
    data = write_lines(tmp_path / "mine.jsonl", [{"prompt": f"{a}=", "answer": str(a % 10)} for a in range(300, 340)])
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def same(*, completions, answer, finish_reasons, **_):\n"
        "    right = lambda text, expected, why: why == 'eos' and text == expected\n"
        "    return [float(right(*row)) for row in zip(completions, answer, finish_reasons, strict=True)]\n"
    )
    base = dataclasses.replace(GRPO, data=data, init=str(warm.folder), steps=2)
    exact = recipes.train_grpo(dataclasses.replace(base, out=str(tmp_path / "exact")))
    python = recipes.train_grpo(dataclasses.replace(base, out=str(tmp_path / "python"), reward=f"{reward}:same"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exact.state.params, python.state.params)
    assert any(row.get("reward/mean", 0) > 0 for row in metrics.read(exact.folder / "metrics.jsonl"))
    assert "reward_after" in python.summary and "accuracy_after" in exact.summary


def test_a_mesh_gives_the_same_run(digits, warm, trained, tmp_path):
    run = dataclasses.replace(GRPO, data=digits["data"], init=str(warm.folder))
    spread = recipes.train_grpo(dataclasses.replace(run, out=str(tmp_path / "mesh"), mesh="data=2,fsdp=4"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), spread.state.params, trained.state.params)
    assert len(spread.state.params["layers"]["ffn"]["up"]["kernel"].sharding.device_set) == 8


def test_held_out_problems_never_appear_in_training():
    for data in task.BUILT_IN:
        work = task.load_task(data, tokenizer="", marker="", held_out=512, columns=("prompt", "answer"))
        training, held_out = ({record["prompt"] for record in side} for side in (work.training, work.held_out))
        assert not training & held_out and len(held_out) == 512 and len(training) == 8100 - 512
    one, other = (task.load_task(data, tokenizer="", marker="", held_out=512, columns=()) for data in task.BUILT_IN)
    assert [r["prompt"] for r in one.held_out] == [r["prompt"] for r in other.held_out]


@pytest.mark.parametrize("form", ["messages", "text"])
def test_sft_on_conversations_and_plain_text(form, tmp_path):
    """Data without prompts and answers trains too; there is nothing to evaluate, and the summary says so."""
    turns = lambda a: [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": str(a % 10)}]
    records = [{form: turns(a) if form == "messages" else f"{a} ends in {a % 10}"} for a in range(100, 140)]
    run = dataclasses.replace(SFT, data=write_lines(tmp_path / "data.jsonl", records), tokenizer="byte", held_out=0)
    outcome = recipes.train_sft(dataclasses.replace(run, steps=4, out=str(tmp_path / "run")))
    losses = [row["train/loss"] for row in metrics.read(outcome.folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] and "accuracy_after" not in outcome.summary
    assert "--prompt" not in runs.next_steps(outcome.folder)


def test_rewards_that_are_never_given_end_in_a_summary(warm, digits, tmp_path):
    reward = tmp_path / "none.py"
    reward.write_text("def reward(*, completions, **_):\n    return [None] * len(completions)\n")
    run = dataclasses.replace(GRPO, data=digits["data"], init=str(warm.folder), steps=2, reward=str(reward))
    outcome = recipes.train_grpo(dataclasses.replace(run, out=str(tmp_path / "run")))
    assert outcome.summary["reward_after"] is None and checkpoint.steps(outcome.folder / "checkpoints") == [2]
    rows = [row for row in metrics.read(outcome.folder / "metrics.jsonl") if "reward/mean" in row]
    assert [row["reward/mean"] for row in rows] == [None, None]  # not 0, which would be a verdict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": recipes.ModelConfig(width=32, layers=1, heads=2, ffn=16)}, "does not fit this configuration"),
        ({"optimizer": OptimizerConfig(kind="muon")}, "does not fit this configuration"),
        ({"tokenizer": "byte"}, "does not fit this configuration"),
        ({"steps": 10}, "is at step 20 and steps is 10; expected at least 20"),
    ],
)
def test_a_resume_that_is_refused_changes_nothing(changes, message, warm, digits):
    files = {path: path.read_bytes() for path in warm.folder.glob("*.json*")}
    run = dataclasses.replace(SFT, **{**digits, "eval_every": 10, "out": str(warm.folder), **changes})
    with pytest.raises(ValueError, match=message):
        recipes.train_sft(run, resume=True)
    assert files == {path: path.read_bytes() for path in warm.folder.glob("*.json*")} and len(files) == 4


def test_a_published_folder_is_no_run(warm, digits, tmp_path):
    """It has a config.json, too."""
    pretrained.save_pretrained(runs.load_model(warm.folder), tmp_path / "published")
    assert not runs.is_run(tmp_path / "published") and runs.is_run(warm.folder)
    with pytest.raises(ValueError, match="holds no run \\(a config.json of something else in it\\)"):
        runs.read_config(tmp_path / "published")
    with pytest.raises(ValueError, match="holds something else already"):
        recipes.train_sft(dataclasses.replace(SFT, **digits, out=str(tmp_path / "published")))
    cli.main(["eval", str(tmp_path / "published"), "--data", digits["data"], "--max-tokens", "4"])


def test_learned_positions_are_not_stretched(digits, tmp_path):
    like = recipes.ModelConfig(like="gpt2", width=16, layers=1, heads=2, ffn=16)
    first = dataclasses.replace(SFT, **digits, model=like, steps=2, eval_every=0, out=str(tmp_path / "gpt2"))
    recipes.train_sft(first)
    run = dataclasses.replace(GRPO, data=digits["data"], init=first.out, out=str(tmp_path / "no"))
    longer = dataclasses.replace(run.grpo, sampling=Sampling(max_tokens=9))
    with pytest.raises(ValueError, match="longer than the network's table of 8 learned positions"):
        recipes.train_grpo(dataclasses.replace(run, grpo=longer))
    assert not (tmp_path / "no").exists()


def test_a_run_killed_before_its_model_was_described_resumes(warm, digits, tmp_path):
    run = dataclasses.replace(GRPO, data=digits["data"], init=str(warm.folder), steps=2, out=str(tmp_path / "run"))
    recipes.train_grpo(run)
    (tmp_path / "run" / "model.json").unlink()
    recipes.train_grpo(dataclasses.replace(run, steps=4), resume=True)
    assert runs.load_model(run.out).max_tokens == 4
    assert runs.read_config(run.out)[1]["steps"] == 4  # flags given on resume are remembered


def test_evaluate_and_complete(trained):
    result = evaluation.evaluate(str(trained.folder), batch=7)
    assert result.figures["accuracy"].mean == pytest.approx(trained.summary["accuracy_after"])
    speaker = talk.open_run(str(trained.folder), sampling=Sampling(max_tokens=4), samples=3)
    first, again = (speaker.complete("123=", seed=4) for _ in range(2))
    assert len(first) == 3 and first == again and {c.finish for c in first} <= {"eos", "length"}
    with pytest.raises(ValueError, match="character '\\+'"):
        speaker.complete("4+=")
    with pytest.raises(ValueError, match="the prompt has 40 tokens and 4 new ones are asked for"):
        speaker.complete("1" * 40)


def test_chat_reads_until_the_end_and_survives_bad_lines(trained, monkeypatch, capsys):
    lines = iter(["123=", "", "what is 2+2?", "456="])

    def answer(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    talk.chat(talk.open_run(str(trained.folder), sampling=Sampling(temperature=0.0, max_tokens=4)))
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("123=") and out[2].startswith("cannot read that: ") and out[3].startswith("456=")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "arithmetics"}, "data 'arithmetics' is no file; expected a .jsonl file or one of arithmetic"),
        ({"init": "nowhere"}, "nowhere holds no model"),
        ({"held_out": 9000}, "held_out = 9000 of 8100 distinct problems"),
        ({"held_out": 8098}, "a step takes 4 prompts and arithmetic leaves 2 for training"),
        ({"mesh": "fsdp=3"}, "mesh 'fsdp=3' has 3 places for 8 devices"),
        ({"reward": "missing.py"}, "'missing.py' is not a Python file"),
        ({"mesh": "fsdp=8", "model": recipes.ModelConfig(width=12, heads=2, kv_heads=1)}, "does not divide over the 8"),
        ({"model": recipes.ModelConfig(heads=3, kv_heads=2)}, "kv_heads"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(change, message, tmp_path):
    run = dataclasses.replace(GRPO, out=str(tmp_path / "run"), **change)
    with pytest.raises(ValueError, match=message):
        recipes.train_grpo(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "change"),
    [(recipes.SFTRun, {"steps": 0}), (recipes.GRPORun, {"chunk": 0}), (recipes.DPORun, {"held_out": -1}),
     (OptimizerConfig, {"learning_rate": -1e-3})],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_at_once(kind, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value}.*expected at least"):
        kind(**change)


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(digits, tmp_path):
    run = dataclasses.replace(SFT, **digits, out=str(tmp_path / "run"), sft=SFTConfig(batch=500))
    with pytest.raises(ValueError, match="a batch of 500 was asked from 184 examples"):
        recipes.train_sft(run)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_over_a_model_is_refused(warm, tmp_path):
    run = dataclasses.replace(GRPO, init=str(warm.folder), tokenizer="char:0123456789+=", out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is not that of the model of .*, whose ids mean something else"):
        recipes.train_grpo(run)


def test_an_existing_run_is_not_overwritten(trained):
    before = (trained.folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume .*, or choose another folder"):
        recipes.train_grpo(dataclasses.replace(GRPO, out=str(trained.folder)))
    assert (trained.folder / "summary.json").read_bytes() == before


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(digits, tmp_path):
    """An infinite learning rate spoils the parameters; every later update is skipped until the run stops."""
    run = dataclasses.replace(SFT, **digits, out=str(tmp_path / "run"), patience=4, steps=40)
    recipes.train_sft(dataclasses.replace(run, steps=2))
    broken = dataclasses.replace(run, optimizer=OptimizerConfig(learning_rate=float("inf")))
    with pytest.raises(FloatingPointError, match="not finite for .* steps in a row"):
        recipes.train_sft(broken, resume=True)
    kept, _ = checkpoint.restore(tmp_path / "run" / "checkpoints", step=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept["params"]))


def test_display_is_quiet_without_a_terminal(capsys):
    with Display() as view:
        view.stage("GRPO", steps=4)
        view.update(2, {"reward/mean": 0.5}, rate="10 tokens/s")
    assert capsys.readouterr().out == "GRPO: 4 steps, compiling\n"
