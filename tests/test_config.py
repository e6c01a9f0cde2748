import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from jaxrl.config import from_json, from_toml, parse, to_json


@dataclass(frozen=True)
class Model:
    width: int = 64
    """Width of the residual stream."""
    activation: Literal["relu", "silu"] = "silu"
    groups: Literal[1, 2] = 1


@dataclass(frozen=True)
class Config:
    """Post-train by GRPO."""

    learning_rate: float = 3e-4
    """Peak step size of AdamW."""
    steps: int = 10
    data: Path | None = None
    resume: bool = False
    stop: tuple[str, ...] = ()
    range: tuple[int, float] = (1, 2.0)
    weights: dict[str, float] = field(default_factory=dict)
    model: Model = Model()
    teacher: Model | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")

    @property
    def warm_up(self) -> int:
        return self.steps // 10


@dataclass(frozen=True)
class Required:
    data: Path
    steps: int = 1


@pytest.fixture
def toml(tmp_path):
    def write(content: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(content)
        return str(path)

    return write


def refused(capsys, config, argv) -> str:
    """Return what parse printed on the standard error before it left with code 2."""
    with pytest.raises(SystemExit) as exit:
        parse(config, argv, prog="jaxrl train grpo")
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and "Traceback" not in err and out == ""
    return " ".join(err.replace("│", " ").split())


# Flags


def test_no_flags_give_the_defaults_and_an_instance_gives_its_own():
    assert parse(Config, []) == Config()
    assert parse(Config(steps=3, model=Model(width=8)), ["--model.activation", "relu"]) == (
        Config(steps=3, model=Model(8, "relu"))
    )


def test_flags_are_kebab_or_snake_and_nested_with_dots():
    argv = ["--learning-rate", "1e-3", "--model.width=8", "--resume", "--stop", "a", "b", "--data", "x.jsonl"]
    expected = Config(learning_rate=1e-3, model=Model(8), resume=True, stop=("a", "b"), data=Path("x.jsonl"))
    assert parse(Config, argv) == expected
    assert parse(Config, [arg.replace("learning-rate", "learning_rate") for arg in argv]) == expected
    assert parse(Config(resume=True), ["--no-resume"]) == Config()


def test_an_unknown_flag_names_the_nearest(capsys):
    message = refused(capsys, Config, ["--learning-rat", "1"])
    assert "--learning-rat" in message and "Perhaps you meant: --learning-rate" in message
    assert "--model.width" in refused(capsys, Config, ["--model.widht", "1"])


def test_a_value_of_the_wrong_type_is_named(capsys):
    assert "Error parsing --steps: invalid literal for int() with base 10: '3.5'" in refused(
        capsys, Config, ["--steps", "3.5"]
    )
    assert "'tanh'" in refused(capsys, Config, ["--model.activation", "tanh"])


def test_values_that_the_dataclass_refuses_leave_no_traceback(capsys):
    assert "steps is 0, expected at least 1" in refused(capsys, Config, ["--steps", "0"])


def test_a_required_flag_is_asked_for(capsys, toml):
    assert "--data" in refused(capsys, Required, [])
    assert "--data" in refused(capsys, Required, ["--config", toml("steps = 2")])
    assert parse(Required, ["--config", toml("steps = 2"), "--data", "x"]) == Required(Path("x"), 2)


def test_help_shows_defaults_descriptions_and_the_config_flag(capsys, toml):
    with pytest.raises(SystemExit) as exit:
        parse(Config, ["--config", toml("steps = 7"), "--help"], prog="jaxrl train grpo", description="GRPO!")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert exit.value.code == 0
    for part in ("usage: jaxrl train grpo", "GRPO!", "--config FILE", "--model.width INT"):
        assert part in text
    assert "Peak step size of AdamW. (default: 0.0003)" in text and "--steps INT (default: 7)" in text


# TOML


def test_toml_gives_defaults_and_flags_override(toml):
    path = toml(
        'learning-rate = 1\nstop = ["x"]\nrange = [3, 4]\ndata = "d.jsonl"\n'
        "[weights]\na = 2\n[model]\nwidth = 8\n[teacher]\nwidth = 9\n"
    )
    expected = Config(
        1.0,
        data=Path("d.jsonl"),
        stop=("x",),
        range=(3, 4.0),
        weights={"a": 2.0},
        model=Model(8),
        teacher=Model(9),
    )
    assert from_toml(Config, path) == expected and isinstance(expected.learning_rate, float)
    assert parse(Config, [f"--config={path}"]) == expected
    overridden = parse(Config, ["--model.activation", "relu", "--config", path, "--learning-rate", "2"])
    assert (overridden.learning_rate, overridden.model, overridden.stop) == (2.0, Model(8, "relu"), ("x",))


def test_toml_over_an_instance_keeps_what_it_does_not_name(toml):
    assert from_toml(Config(model=Model(8, "relu")), toml("[model]\nwidth = 9")).model == Model(9, "relu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz = 3", "unknown key 'stepz' for Config; did you mean 'steps'?"),
        ("[model]\nwidht = 3", "unknown key 'model.widht' for Model; did you mean 'model.width'?"),
        ("zzz = 3", "unknown key 'zzz' for Config; known keys: learning_rate, steps,"),
        ('steps = "a"', "'steps' is 'a' (str), expected int"),
        ("steps = 3.0", "'steps' is 3.0 (float), expected int"),
        ("steps = true", "'steps' is True (bool), expected int"),
        ("resume = 1", "'resume' is 1 (int), expected bool"),
        ("learning_rate = true", "'learning_rate' is True (bool), expected float"),
        ('stop = ["a", 1]', "'stop[1]' is 1 (int), expected str"),
        ('stop = "a"', "'stop' is 'a' (str), expected tuple[str, ...]"),
        ("range = [1]", "'range' is [1] (list), expected tuple[int, float]"),
        ('weights = {a = "x"}', "'weights.a' is 'x' (str), expected float"),
        ("model = 3", "'model' is 3 (int), expected Model"),
        ('[model]\nactivation = "rleu"', "expected one of ['relu', 'silu'] (did you mean 'relu'?)"),
        ("model.groups = true", "'model.groups' is True (bool), expected one of [1, 2]"),
        ("[teacher]\nwidth = 1.5", "'teacher.width' is 1.5 (float), expected int"),
        ("[teacher]\nwidht = 1", "unknown key 'teacher.widht' for Model; did you mean 'teacher.width'?"),
        ("data = 3", "'data' is 3 (int), expected"),
        ("steps = 0", "steps is 0, expected at least 1"),
        ("steps = ", "is not valid TOML: Invalid value (at end of document)"),
    ],
)
def test_a_bad_toml_file_is_named_with_key_and_fault(capsys, toml, content, message):
    path = toml(content)
    with pytest.raises(ValueError) as error:
        from_toml(Config, path)
    assert message in str(error.value)
    printed = refused(capsys, Config, ["--config", path])
    assert message in printed and printed.startswith("jaxrl train grpo: ")
    assert path in printed


def test_a_missing_toml_file_is_named(capsys, tmp_path):
    assert "cannot read none.toml (No such file" in refused(capsys, Config, ["--config", "none.toml"])
    assert "cannot read" in refused(capsys, Config, ["--config", str(tmp_path)])
    assert "--config takes the path of a TOML file, got nothing" in refused(capsys, Config, ["--config"])


# JSON


def test_json_round_trip_is_exact_and_leaves_out_properties():
    config = Config(0.1, data=Path("x"), stop=("a",), weights={"a": float("inf")}, teacher=Model(3))
    values = json.loads(json.dumps(to_json(config)))
    assert from_json(Config, values) == config and "warm_up" not in values
    assert values["model"] == {"width": 64, "activation": "silu", "groups": 1} and values["data"] == "x"


def test_json_faults_name_their_source():
    with pytest.raises(ValueError, match="config.json: unknown key 'step' for Config; did you mean 'steps'"):
        from_json(Config, {"step": 1}, source="config.json")
    with pytest.raises(ValueError, match="no value for 'data' of Required, which has no default"):
        from_json(Required, {})


def test_a_value_json_cannot_hold_is_named():
    with pytest.raises(ValueError, match="holds values that JSON can hold, got <object"):
        to_json(Config(data=object()))  # pyright: ignore


def test_a_real_process_leaves_with_code_2(tmp_path):
    code = "import sys; from tests.test_config import Config, parse; parse(Config, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--stpes", "1"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and "--steps" in done.stderr
    assert "Traceback" not in done.stderr
