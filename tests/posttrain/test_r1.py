"""The pipeline of R1 at toy size: all stages, a kill between and inside them, and what cannot be run."""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest

from jaxrl import checkpoint, runs
from jaxrl.data import sources
from jaxrl.data.digit_sums import digit_sums, worked
from jaxrl.posttrain import recipes
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.recipes import r1
from jaxrl.posttrain.recipes.r1 import R1Run, Steps, train_r1
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.update import OptimizerConfig

SMALL = recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16)
STEADY = OptimizerConfig(learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Last digits, `137=` to be answered `a=7`, by a base model that learnt from examples in two scripts, `α=7`."""
    path = tmp_path_factory.mktemp("r1")
    random = np.random.default_rng(0)
    rows = [
        {"prompt": f"{a}:", "completion": f"{random.choice(['a', 'α'])}={a % 10}", "answer": str(a % 10)}
        for a in range(100, 400)
    ]
    r1.write_lines(path / "worked.jsonl", rows)
    r1.write_lines(path / "problems.jsonl", [{name: row[name] for name in ("prompt", "answer")} for row in rows])
    recipes.train_sft(recipes.SFTRun(
        data=str(path / "worked.jsonl"), tokenizer="char:0123456789:=aα", marker="=", out=str(path / "base"),
        model=SMALL, steps=60, chunk=60, eval_every=0, held_out=16, max_tokens=4, sft=SFTConfig(batch=64),
        optimizer=OptimizerConfig(learning_rate=3e-2),
    ))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(folder):
    return R1Run(
        data=str(folder / "problems.jsonl"), init=str(folder / "base"), out=str(folder / "whole"),
        stages=",".join(r1.STAGES), held_out=32, problems=64, samples=4, chunk=2, save_every=2, student_model=SMALL,
        steps=Steps(0, 2, 4, 2, 4, 2, 4, 2), sft=SFTConfig(batch=4), sft_optimizer=STEADY, rl_optimizer=STEADY,
        grpo=GRPOConfig(prompts=4, group=4, kl_coef=0.001, sampling=Sampling(max_tokens=4)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(run):
    return train_r1(run)


def test_all_stages_run(whole, run):
    assert list(whole.summary["stages"]) == ["base", *r1.STAGES]
    for name, row in whole.summary["stages"].items():
        if name == "rejection":
            assert row["records"] >= row["problems"] > 0 and row["problems"] + row["failed"] == 64
            continue
        assert 0 <= row["accuracy"] <= 1 and 1 <= row["length"] <= 4, name
        assert row.get("steps", 0) == getattr(run.steps, name), name
        assert 0 <= row["format"] <= 1 and 0 <= row["language"] <= 1
    saved = json.loads((whole.folder / "summary.json").read_text())
    assert saved["stages"] == whole.summary["stages"] and saved["kind"] == "r1" and saved["versions"]
    lines = r1.next_steps(whole.folder).splitlines()
    assert lines[0] == f"jaxrl chat {whole.folder}/distill" and "--resume" in lines[-1]


def test_what_is_learnt_from_is_right_clean_and_not_held_out(whole):
    read = lambda *parts: sources.read_jsonl(whole.folder.joinpath(*parts))
    held_out, training = ({row["prompt"] for row in read("data", f"{name}.jsonl")} for name in ("held_out", "training"))
    assert len(held_out) == 32 and len(training) == 268 and not held_out & training
    for parts in (("rejection", "records.jsonl"), ("data", "cold_start.jsonl")):
        rows = read(*parts)
        for row in rows:
            assert row["prompt"] in training
            thought, answer = row["completion"].split("=")
            assert answer == row["prompt"][-2] and "α" not in thought and "a" in thought
        assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)
    cold = read("data", "cold_start.jsonl")
    assert len({row["prompt"] for row in cold}) == len(cold)  # the shortest of each problem alone


def test_killed_inside_a_stage_and_between_two_it_ends_alike(whole, run, folder):
    """Back in the middle of sft2, its later checkpoint and all that follows lost."""
    shutil.copytree(whole.folder, folder / "killed")
    killed = folder / "killed"
    for name in ("all", "distill", "distill_on_policy"):
        shutil.rmtree(killed / name)
    for file in ("summary.json", "sft2/summary.json", "sft2/measured.json"):
        (killed / file).unlink()
    shutil.rmtree(killed / "sft2" / "checkpoints" / "4")
    assert checkpoint.steps(killed / "sft2" / "checkpoints") == [2]
    before = {name: (killed / name / "summary.json").stat().st_mtime_ns for name in ("zero", "rejection")}
    again = dataclasses.replace(run, out=str(killed), stages="zero,cold_start,reasoning,rejection,sft2")
    given, expected = (p.summary["stages"] for p in (train_r1(again, resume=True), whole))
    assert given == {name: row for name, row in expected.items() if name in given} and "sft2" in given
    assert before == {name: (killed / name / "summary.json").stat().st_mtime_ns for name in before}
    (one, step), (other, _) = (checkpoint.restore(part / "sft2" / "checkpoints") for part in (killed, whole.folder))
    assert step == 4
    for a, b in zip(*map(r1.jax.tree.leaves, (one["params"], other["params"])), strict=True):
        np.testing.assert_array_equal(a, b)


class Recorder:
    """In place of the recipes: notes their options, and leaves a folder that looks finished."""

    def __init__(self, fail_at=""):
        self.runs, self.fail_at = {}, fail_at

    def __call__(self, options, *, resume, display):
        folder = r1.Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        self.runs[folder.name] = (options, resume)
        runs.write_json(folder / runs.CONFIG, {})
        runs.write_json(folder / runs.MODEL, {"tokenizer": {"kind": "char", "alphabet": "ab"}, "marker": "#"})
        if folder.name == self.fail_at:
            raise KeyboardInterrupt
        runs.write_json(folder / runs.SUMMARY, {"steps": options.steps})


@pytest.fixture
def recorded(monkeypatch):
    def start(fail_at=""):
        recorder = Recorder(fail_at)
        for name in ("train_sft", "train_grpo", "train_distill"):
            monkeypatch.setattr(r1, name, recorder)
        kept: list[Any] = [{"prompt": "p", "completion": "c"}] * 200
        monkeypatch.setattr(r1, "_kept", lambda run, place, keep: (kept, 3))
        monkeypatch.setattr(r1, "_measured", lambda *_: {"accuracy": 0.5})
        return recorder

    return start


def test_each_stage_begins_where_it_should(recorded, tmp_path):
    """From nothing: which model, data and reward every stage gets."""
    other, more = str(tmp_path / "other.jsonl"), str(tmp_path / "more.jsonl")
    r1.write_lines(tmp_path / "other.jsonl", [{"prompt": "q", "completion": "r"}])
    r1.write_lines(tmp_path / "more.jsonl", [{"prompt": "q", "answer": "r"}])
    run = R1Run(stages=",".join(r1.STAGES), other=other, all_data=more)
    recorder = recorded()
    summary = train_r1(dataclasses.replace(run, out=str(tmp_path / "anew"))).summary["stages"]
    assert summary["rejection"] == {"records": 200, "problems": 1, "failed": 3}
    made = {name: options for name, (options, _) in recorder.runs.items()}
    assert list(made) == ["base", *(name for name in r1.STAGES if name != "rejection")]
    place = lambda name: str(tmp_path / "anew" / name)
    starts = {
        "base": "",
        "zero": "base",
        "cold_start": "base",
        "reasoning": "cold_start",
        "sft2": "base",
        "all": "sft2",
    }
    for name, start in starts.items():
        assert made[name].init == (place(start) if start else ""), name
    assert (made["distill"].init, made["distill"].tokenizer, made["distill"].marker) == ("", "char:ab", "#")
    assert (made["distill_on_policy"].teacher, made["distill_on_policy"].init) == (place("all"), place("distill"))
    assert "language" not in made["zero"].reward and made["zero"].reward.startswith("exact(marker='=') + 0.2*format(")
    assert made["reasoning"].reward == made["all"].reward == f"{made['zero'].reward} + 0.2*language(language=en)"
    records = place("rejection") + "/records.jsonl"
    assert made["sft2"].data == f"{records},{other}" and made["distill"].data == records
    assert made["all"].data == f"{place('data')}/training.jsonl,{more}"
    assert len({options.seed for options in made.values()}) == len(made)
    assert made["base"].optimizer.decay_steps == made["base"].steps == 800


def test_a_stage_that_was_interrupted_goes_on(recorded, tmp_path):
    run = R1Run(out=str(tmp_path / "run"), stages="zero,cold_start")
    with pytest.raises(KeyboardInterrupt):
        recorded("zero")
        train_r1(run)
    recorder = recorded()
    train_r1(run, resume=True)
    assert {name: resume for name, (_, resume) in recorder.runs.items()} == {"zero": True, "cold_start": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": "zero,warmup"}, r"stages is 'zero,warmup' with \['warmup'\]; expected some of zero,cold_start"),
        ({"stages": ""}, "with no stage"),
        ({"data": "mine.jsonl"}, "data is 'mine.jsonl' and init is empty"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        R1Run(**change)


def test_what_cannot_work_is_refused(recorded, tmp_path):
    out = tmp_path / "run"
    for change, message in (
        ({"other": "none.jsonl"}, "data 'none.jsonl' is no file"),
        ({"cold_start": "none.jsonl"}, "data 'none.jsonl' is no file"),
        ({"accuracy": "exactly"}, "did you mean 'exact'"),
        ({"all_reward": "number(", "stages": "zero"}, "cannot read"),
    ):
        with pytest.raises(ValueError, match=message):
            train_r1(dataclasses.replace(R1Run(out=str(out), stages="zero"), **change))
    needed = {"cold_start": "zero", "reasoning": "cold_start", "rejection": "reasoning", "sft2": "rejection"}
    needed |= {"all": "sft2", "distill": "rejection", "distill_on_policy": "all"}
    for name, need in needed.items():
        with pytest.raises(ValueError, match=f"stage {name} needs {need}, which .* --stages .*{need}.*,{name}"):
            train_r1(R1Run(out=str(out), stages=name))
    assert not out.exists()
    recorded()
    train_r1(R1Run(out=str(out), stages="zero"))
    with pytest.raises(ValueError, match="holds a run already"):
        train_r1(R1Run(out=str(out), stages="zero"))
    with pytest.raises(ValueError, match="holds a pipeline with seed 0, not 1"):
        train_r1(R1Run(out=str(out), stages="zero", seed=1), resume=True)
    with pytest.raises(ValueError, match="stage cold_start has 200 records, too few for a batch of 512"):
        train_r1(R1Run(out=str(out), stages="cold_start", sft=SFTConfig(batch=512)), resume=True)


def test_digit_sums():
    rows = digit_sums(seed=0)
    assert len({row["prompt"] for row in rows}) == len(rows) == 10_000 and rows != digit_sums(seed=1)
    random = np.random.default_rng(0)
    direct, greek, letters = 0, 0, 0
    for row in rows[:2000]:
        digits = [int(digit) for digit in row["prompt"][:-1]]
        assert row["prompt"].endswith(":") and row["answer"] == str(sum(digits) % 10)
        steps, answer = worked(row, random)["completion"].split("=")
        assert answer == row["answer"]
        direct += not steps
        if steps:
            assert [int(digit) for digit in steps[1::2]] == [sum(digits[:i]) % 10 for i in (2, 3, 4)]
            assert set(steps[::2]) <= set("sσ")
            greek, letters = greek + steps.count("σ"), letters + 3
    assert 0.45 < direct / 2000 < 0.55 and 0.35 < greek / letters < 0.45
