"""The command line as a person uses it: help, typos, and one line of explanation for what cannot work."""

import json
import os
import subprocess
import sys

import pytest

from jaxrl import cli


def call(capsys, *argv):
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_every_command(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and all(f"jaxrl {name} " in out for name in cli.COMMANDS)
    assert call(capsys, "train", "--help")[:2] == (0, out)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_its_flags(name, capsys):
    status, out, _ = call(capsys, *name.split(), "--help")
    assert status == 0 and f"jaxrl {name}" in out and "--config" in out


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["dmeo"], "no command 'dmeo'; did you mean 'jaxrl demo'?"),
        (["train", "gpro"], "no command 'train gpro'; did you mean 'jaxrl train grpo'?"),
        (["train", "grpo", "--setps", "3"], "--steps"),
        (["train", "grpo", "--grpo.sampling.temprature", "3"], "--grpo.sampling.temperature"),
        (["train", "grpo", "--steps", "many"], "many"),
        (["train", "grpo", "--data", "nowhere.jsonl", "--out", "never"], "data 'nowhere.jsonl' is no file"),
        (["train", "grpo", "--grpo.group", "1"], "group is 1"),
        (["train", "grpo", "--resume", "nowhere"], "nowhere holds no run (no config.json in it)"),
        (["train", "grpo", "--resume"], "--resume takes a run folder, got nothing after it"),
        (["eval", "nowhere"], "nowhere holds no model (no model.json in it)"),
        (["generate", "nowhere"], "--prompt"),
        (["data", "show", "nowhere.jsonl"], "nowhere.jsonl"),
        (["data", "show", "x.jsonl", "--tokenizer", "bpe"], "no tokeniser 'bpe'"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(argv, hint, capsys):
    status, _, err = call(capsys, *argv)
    assert status == 2 and hint in err and "Traceback" not in err, err


def test_env_is_a_report(capsys):
    status, out, _ = call(capsys, "env")
    report = json.loads(out)
    assert status == 0 and report["machine"]["backend"] == "cpu" and "jax" in report["versions"]
    status, out, _ = call(capsys, "env", "--metrics")
    assert status == 0 and "reward/zero_std" in out


def test_version(capsys):
    assert call(capsys, "--version")[1].startswith("jaxrl 0.")


def test_data_show_marks_the_loss(tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    status, out, _ = call(capsys, "data", "show", str(file))
    assert status == 0 and "<eos>" in out


def test_config_file_fills_flags_and_names_unknown_keys(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('data = "nowhere.jsonl"\n[grpo]\ngroup = 4\n')
    status, _, err = call(capsys, "train", "grpo", "--config", str(file))
    assert status == 2 and "data 'nowhere.jsonl' is no file" in err
    file.write_text("[grpo]\ngruop = 4\n")
    status, _, err = call(capsys, "train", "grpo", "--config", str(file))
    assert status == 2 and "unknown key 'grpo.gruop'" in err and "did you mean 'grpo.group'" in err


def test_a_program_is_compiled_once_and_kept_for_the_next_run(tmp_path):
    kept = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "caches"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # else a busy machine decides what is worth keeping
    kept.pop("JAX_COMPILATION_CACHE_DIR", None)
    programs, metrics = [], []
    for run in ("first", "second"):
        out = tmp_path / run
        argv = ["train", "ppo", "--env-steps", "2048", "--round-steps", "1024", "--episodes", "2", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "jaxrl.cli", *argv], env=kept, check=True, capture_output=True)
        programs.append(sorted(path.name for path in (tmp_path / "caches" / "jaxrl").glob("*-cache")))
        metrics.append([json.loads(line)["value/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert programs[0] and programs[1] == programs[0]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(("flags", "threads"), [("--xla_force_host_platform_device_count=8", "64"), ("", None)])
def test_fake_devices_get_threads(monkeypatch, flags, threads):
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.delenv("NPROC")
    monkeypatch.setenv("XLA_FLAGS", flags)
    cli.main(["envs"])
    assert os.environ.get("NPROC") == threads
