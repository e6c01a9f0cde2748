"""Real kills: a run that is killed with SIGKILL, again and again, ends bitwise where the undisturbed one ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl import checkpoint, metrics

COMMON = ["--held-out", "16", "--chunk", "2"]
WARM = [
    *COMMON,
    *("--steps", "20", "--max-tokens", "4", "--sft.batch", "32", "--optimizer.learning-rate", "2e-2"),
    *("--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--model.kv-heads", "1", "--model.ffn", "16"),
]
GRPO = [
    *COMMON,
    *("--steps", "12", "--save-every", "2", "--eval-every", "4"),
    *("--grpo.prompts", "4", "--grpo.group", "8", "--grpo.sampling.max-tokens", "4", "--grpo.kl-coef", "0.01"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compilation cache for all processes of this file."""
    return tmp_path_factory.mktemp("cache")


def start(cache, kind, *args):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-m", "jaxrl.cli", "train", kind, *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kill_when(process, condition):
    """SIGKILL as soon as the condition holds; False when the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return True


def test_killed_at_any_moment_and_resumed(cache, tmp_path):
    whole, killed, warm, data = (tmp_path / name for name in ("whole", "killed", "warm", "digits.jsonl"))
    records = [{"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10)} for a in range(100, 300)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    same = ("--data", str(data), "--tokenizer", "char:0123456789=")
    finish(start(cache, "sft", "--out", str(warm), *same, *WARM))
    flags = (*same, "--init", str(warm), *GRPO)
    out = finish(start(cache, "grpo", "--out", str(whole), *flags))
    assert f"jaxrl chat {whole}" in out

    rows = lambda: Path(killed / "metrics.jsonl")
    moments = {
        "before the first checkpoint": lambda: rows().exists(),
        "while a checkpoint is written": lambda: any(killed.glob("checkpoints/*.tmp")),
        "after some steps": lambda: len(checkpoint.steps(killed / "checkpoints")) > 1,
    }
    kills = 0
    for number, condition in enumerate(moments.values()):
        how = ("--resume", str(killed)) if number else ("--out", str(killed), *flags)
        process = start(cache, "grpo", *how)
        kills += kill_when(process, condition)
    assert kills == 3
    finish(start(cache, "grpo", "--resume", str(killed)))

    (expected, step), (given, same_step) = (checkpoint.restore(run / "checkpoints") for run in (whole, killed))
    assert step == same_step == 12
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    for name in ("train/loss", "reward/mean", "eval/accuracy", "policy/kl"):
        series = [[row[name] for row in metrics.read(run / "metrics.jsonl") if name in row] for run in (whole, killed)]
        assert series[0] == series[1] and len(series[0]) >= 4
        assert len(set(series[0])) > 1 or name == "eval/accuracy"  # the run really learns from varying rewards
