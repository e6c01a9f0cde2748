"""Processes that are killed, stopped, fail, are told to stop or are slow; and what becomes of the others."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl import checkpoint, metrics, supervise
from jaxrl.parallel import faults
from tests.parallel import launch
from tests.parallel.test_processes import clean, said

LATE = 5.0  # seconds beyond the heartbeat that a busy machine may take


def spinning(folder: Path, when: str, **options) -> launch.Group:
    group = launch.start(folder, *launch.WORKER, "spin", str(folder), when, **options)
    group.until(lambda: all((folder / f"ready{i}").exists() for i in range(2)))
    return group


@pytest.mark.parametrize(
    ("victim", "number", "within"),
    [
        pytest.param(1, signal.SIGKILL, 5 + LATE),
        pytest.param(0, signal.SIGKILL, LATE, marks=pytest.mark.slow),  # the others feel that its connection breaks
        pytest.param(1, signal.SIGSTOP, 5 + LATE, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, 2 * 5 + LATE, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_gone_ends_the_others(victim, number, within, tmp_path):
    """Within the heartbeat, here 5 s, and with a word on what happened."""
    alone = {supervise.PARENT: "0"} if number == signal.SIGSTOP else {}  # else only the parent would stop
    group = spinning(tmp_path, "never", JAXRL_HEARTBEAT="5", **alone)
    sent = group.send(victim, number)
    other = 1 - victim
    status = group.alone(other, within)
    print(f"process {other} ended {time.monotonic() - sent:.1f} s after {number.name} to process {victim}")
    assert status != 0
    if not alone:
        assert status == 128 + signal.SIGABRT
        last = group.text(other).splitlines()[-1]
        assert "ended by SIGABRT: another process is gone" in last and "start every process again: COMMAND" in last


@pytest.mark.slow
def test_an_error_of_one_is_told_to_the_others(tmp_path):
    group = spinning(tmp_path, "error", JAXRL_HEARTBEAT="60")
    start = time.monotonic()
    assert group.wait(15.0) == [1, 1]
    assert time.monotonic() - start < 10.0
    assert "process 0 ends, because process 1 failed: ValueError: this process has no data" in group.text(0)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_whoever_is_told_to_stop_all_stop_after_the_same_step(told, tmp_path):
    group = spinning(tmp_path, "never")
    group.send(told, signal.SIGTERM)
    assert group.wait() == [0, 0]
    first, second = (said(group.text(i)) for i in range(2))
    assert first["stopped"] == second["stopped"] and first["paces"][-1][0] is True


@pytest.mark.slow
def test_the_slow_one_is_named_on_every_process(tmp_path):
    group = spinning(tmp_path, "slow")
    assert group.wait() == [0, 0]
    for i in range(2):
        for stop, slowest, factor, lost in said(group.text(i))["paces"]:
            assert (stop, slowest) == (False, 1) and factor > 2 and 0.8 < lost < 3


def test_pace():
    pace = faults.judge(np.asarray([False, True, False]), np.asarray([1.0, 1.1, 4.0]))
    assert pace == (True, 2, pytest.approx(4 / 1.05), pytest.approx(4 - 1.05)) and pace.straggles
    assert "process 2 takes 3.8 times as long as the others, which wait 3.0 s a chunk for it" in pace.complaint()
    assert not faults.judge(np.zeros(2, bool), np.asarray([0.001, 0.1])).straggles  # a matter of milliseconds
    assert not faults.judge(np.zeros(2, bool), np.asarray([20.0, 21.0])).straggles
    assert faults.meet(stop=True, host=0.0, chunk=1.0) == (True, 0, 1.0, 0.0)  # alone


def test_told_to_stop_in_one_process():
    before = signal.getsignal(signal.SIGTERM)
    with faults.preemption() as told_to_stop:
        assert not told_to_stop()
        signal.raise_signal(signal.SIGTERM)
        assert told_to_stop()
    assert signal.getsignal(signal.SIGTERM) == before
    assert faults.Preempted().code == 75


@pytest.mark.parametrize(
    ("child", "status", "message"),
    [
        ("raise SystemExit(75)", 75, ""),
        ("os.abort()", 134, "ended by SIGABRT: another process is gone or was silent for too long"),
        ("os.kill(os.getpid(), 9)", 137, "ended by SIGKILL: somebody killed it, or the host ran out of memory"),
        ("os.kill(os.getppid(), 15); time.sleep(9)", 143, "ended by SIGTERM"),  # handed on to the child
    ],
)
def test_the_parent_says_what_ended_its_child(child, status, message):
    words = [sys.executable, "-c", f"import os, time; {child}"]
    script = f"import sys; from jaxrl import supervise; sys.exit(supervise.supervise({words}, again='COMMAND'))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert out.returncode == status and message in out.stderr
    assert out.stderr.strip().endswith("start every process again: COMMAND") == bool(message)


def test_the_child_does_not_outlive_its_parent(tmp_path):
    said = f"open({str(tmp_path / 'on')!r}, 'w')"
    child = f"import time; from jaxrl import supervise; supervise.follow(); {said}; time.sleep(99)"
    words = [sys.executable, "-c", child]
    script = f"from jaxrl import supervise; supervise.supervise({words}, again='')"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    while not (tmp_path / "on").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    assert parent.communicate(timeout=20) == (b"", None)  # its output closes when the child is gone, too


@pytest.mark.parametrize(
    ("environment", "due"),
    [
        ({}, False),
        ({"JAX_NUM_PROCESSES": "2"}, True),
        ({"JAX_NUM_PROCESSES": "1"}, False),
        ({"JAX_NUM_PROCESSES": "2", supervise.PARENT: "7"}, False),
        ({"SLURM_STEP_NODELIST": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not, please"}, False),
    ],
)
def test_only_one_of_several_has_a_parent(environment, due, monkeypatch):
    clean(monkeypatch, **environment)
    assert supervise.is_due() is due


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_by", "read_by"),
    [
        ((1, 8, "fsdp=8"), (1, 1, "data=1")),
        ((1, 1, "data=1"), (1, 8, "fsdp=8")),
        ((2, 4, "fsdp=8"), (1, 1, "data=1")),
        ((1, 1, "data=1"), (4, 2, "data=4,fsdp=2")),
        ((4, 2, "fsdp=4,tensor=2"), (2, 4, "data=2,tensor=2,fsdp=2")),
    ],
)
def test_checkpoints_go_on_anywhere(saved_by, read_by, tmp_path):
    run = lambda name, count, devices, spec: [
        said(text)
        for text in launch.run(
            tmp_path / name, *launch.WORKER, name, str(tmp_path / "saved"), spec, count=count, devices=devices
        )
    ]
    saved, read = run("save", *saved_by), run("resume", *read_by)
    for one in read:
        assert one["step"] == 4 and one["restored"] == pytest.approx(saved[0]["total"], rel=1e-6)
        assert np.isfinite(one["onwards"]).all() and one["onwards"] == read[0]["onwards"]


SFT = [
    *("train", "sft", "--tokenizer", "char:0123456789=", "--held-out", "16", "--chunk", "2", "--max-tokens", "4"),
    *("--sft.batch", "16", "--save-every", "4", "--eval-every", "8", "--mesh", "fsdp=8", "--keep", "3"),
    *("--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--model.kv-heads", "1", "--model.ffn", "16"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nobody disturbed; and the flags and cache of its like."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "digits.jsonl"
    records = [{"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10)} for a in range(100, 200)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAXRL_HEARTBEAT": "8",
    }
    flags = [*launch.JAXRL, *SFT, "--data", str(data), "--steps", "60"]
    texts = launch.run(folder, *flags, "--out", str(folder / "run"), **environment)
    assert "jaxrl chat" in texts[0] and "jaxrl chat" not in texts[1]
    return folder / "run", flags, environment


def equal(whole: Path, other: Path) -> None:
    """Bitwise the same state, and the same metrics."""
    (expected, step), (given, same) = (checkpoint.restore(run / "checkpoints") for run in (whole, other))
    assert step == same
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    for name in ("train/loss", "eval/accuracy"):
        series = [
            [(r["step"], r[name]) for r in metrics.read(run / "metrics.jsonl") if name in r] for run in (whole, other)
        ]
        assert series[0] == series[1] and len(series[0]) > 4


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(whole, tmp_path):
    """Bitwise the undisturbed run, whichever process is killed, in a step or while a checkpoint is written."""
    run, flags, environment = whole
    out = tmp_path / "killed"
    moments = [
        (1, lambda: (out / "metrics.jsonl").exists()),
        (0, lambda: any(out.glob("checkpoints/*.tmp"))),
        (1, lambda: any(out.glob("checkpoints/*.tmp/state*"))),
        (1, lambda: len(checkpoint.steps(out / "checkpoints")) > 2),
    ]
    for number, (victim, moment) in enumerate(moments):
        for leftover in out.glob("checkpoints/*.tmp"):
            shutil.rmtree(leftover)  # so that the next one is of this run
        how = ["--resume", str(out)] if number else ["--out", str(out)]
        group = launch.start(tmp_path / str(number), *flags, *how, **environment)
        group.until(moment)
        sent = group.send(victim, signal.SIGKILL)
        assert group.alone(1 - victim, 8 + LATE) == 128 + signal.SIGABRT
        assert f"start every process again: jaxrl train sft --resume {out}" in group.text(1 - victim)
        print(f"process {1 - victim} ended {time.monotonic() - sent:.1f} s after process {victim} was killed")
    launch.run(tmp_path / "last", *flags, "--resume", str(out), **environment)
    equal(run, out)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_told_to_stop_and_resumed(told, whole, tmp_path):
    run, flags, environment = whole
    out = tmp_path / "stopped"
    group = launch.start(tmp_path, *flags, "--out", str(out), **environment)
    group.until(lambda: (out / "metrics.jsonl").exists() and '"step": 7' in (out / "metrics.jsonl").read_text())
    group.send(told, signal.SIGTERM)
    assert group.wait() == [75, 75]
    saved = checkpoint.steps(out / "checkpoints")[-1]
    assert saved < 60 and f"told to stop after step {saved}; go on with: jaxrl train sft --resume {out}" in group.text(
        0
    )
    launch.run(tmp_path / "last", *flags, "--resume", str(out), **environment)
    equal(run, out)


@pytest.mark.slow
def test_told_to_stop_in_one_process_and_resumed(whole, tmp_path):
    _, flags, environment = whole
    environment = {**environment, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("alone", "stopped"):
        group = launch.start(
            tmp_path / name, *flags, "--out", str(tmp_path / name / "run"), count=1, devices=8, **environment
        )
        if name == "stopped":
            rows = tmp_path / name / "run" / "metrics.jsonl"
            group.until(lambda: rows.exists() and '"step": 7' in rows.read_text())
            group.send(0, signal.SIGTERM)
        assert group.wait() == [75 if name == "stopped" else 0]
    launch.run(tmp_path, *flags, "--resume", str(tmp_path / "stopped" / "run"), count=1, devices=8, **environment)
    equal(tmp_path / "alone" / "run", tmp_path / "stopped" / "run")


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_refused_by_each(whole, tmp_path):
    _, flags, environment = whole
    for more, message in [
        (["--mesh", ""], "2 processes with 8 devices have no mesh; give --mesh auto or --mesh fsdp=8"),
        (["--data", str(tmp_path / "none.jsonl")], "is no file"),
    ]:
        group = launch.start(tmp_path, *flags, *more, "--out", str(tmp_path / "run"), **environment)
        assert group.wait() == [2, 2]
        assert all(message in group.text(i) for i in range(2))
    each = lambda i: ["--seed", str(i)]
    group = launch.start(tmp_path, *flags, "--out", str(tmp_path / "run"), each=each, **environment)
    assert group.wait() == [2, 2]
    assert all("process 1 has other options, data or versions than process 0" in group.text(i) for i in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("reward", [[], ["--reward", "number"]], ids=["jax", "python"])
def test_grpo_in_two_processes(reward, whole, tmp_path):
    run, flags, environment = whole
    data = flags[flags.index("--data") + 1]
    grpo = [
        *launch.JAXRL, "train", "grpo", "--init", str(run), "--data", data, "--held-out", "16", "--chunk", "2",
        "--steps", "4", "--mesh", "data=2,fsdp=4", "--out", str(tmp_path / "grpo"), "--grpo.prompts", "4",
        "--grpo.group", "4", "--grpo.sampling.max-tokens", "4", "--grpo.kl-coef", "0.01", *reward,
    ]  # fmt: skip
    launch.run(tmp_path, *grpo, **environment)
    rows = list(metrics.read(tmp_path / "grpo" / "metrics.jsonl"))
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert all(row["time/slowest_process"] >= 1 for row in rows if "train/loss" in row)
    assert checkpoint.steps(tmp_path / "grpo" / "checkpoints") == [4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "rm"])
def test_preferences_in_two_processes(kind, whole, tmp_path):
    """The stored reference, margins and calibration are those of one process."""
    run, _, environment = whole
    data, other = tmp_path / "pairs.jsonl", tmp_path / "alone"
    rows = [{"prompt": f"{n}=", "chosen": f"{n % 10}", "rejected": f"{(n + 1) % 10}"} for n in range(100, 148)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *launch.JAXRL, "train", kind, "--init", str(run), "--data", str(data), "--held-out", "16", "--chunk", "2",
        "--steps", "4", "--mesh", "fsdp=8", f"--{kind}.batch", "8", "--eval-every", "0",
    ]  # fmt: skip
    launch.run(tmp_path, *flags, "--out", str(tmp_path / "both"), **environment)
    launch.run(tmp_path, *flags, "--out", str(other), count=1, devices=8, **environment)
    of = lambda folder: [row for row in metrics.read(folder / "metrics.jsonl") if "train/loss" in row]
    for one, both in zip(of(other), of(tmp_path / "both"), strict=True):
        assert one["train/loss"] == pytest.approx(both["train/loss"], rel=1e-4)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (other, tmp_path / "both")]
    assert summaries[0]["pair_accuracy_after"] == summaries[1]["pair_accuracy_after"]
