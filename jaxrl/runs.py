"""Run folders: what a run was (config, versions, git state), what it made, and how to open it again."""

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxrl
from jaxrl import checkpoint, config
from jaxrl.data.chat import Template, template_of, turn_ends
from jaxrl.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from jaxrl.data.tokenizer_files import save_tokenizer
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig

CONFIG, MODEL, METRICS, SUMMARY, CHECKPOINTS = (
    "config.json",
    "model.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
)


class Model(NamedTuple):
    """A model opened from a run folder, or a published one.

    `marker` is the text after which an answer stands (empty: the whole completion), `max_tokens` the completion width
    it was trained for, `example` a prompt of its task (empty: none known). `template` renders conversations (None: the
    model knows none), and `ends` are the ids besides EOS that end its turn.
    """

    language_model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    transformer: TransformerConfig
    marker: str
    max_tokens: int
    example: str
    template: Template | None = None
    ends: tuple[int, ...] = ()


def check_new(folder: str | Path) -> None:
    """Raises ValueError when the folder holds a run already."""
    path = Path(folder)
    if (path / CONFIG).exists():
        raise ValueError(
            f"{path} holds a run already; continue it with --resume {path}, or choose another folder with --out"
        )


def write_config(folder: Path, kind: str, options: Any) -> None:
    """Writes `config.json`, which is what makes a folder a run."""
    write_json(folder / CONFIG, {"kind": kind, "config": config.to_json(options), **environment()})


def read_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The kind of a run and the values of its config.

    Raises:
      ValueError: when the folder holds no run.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no {CONFIG} in it); expected a folder such as runs/demo")
    saved = json.loads(path.read_text())
    return saved["kind"], saved["config"]


def write_model(
    folder: Path, transformer: TransformerConfig, tokenizer: Tokenizer, *, marker: str, max_tokens: int, example: str
) -> None:
    """Writes `model.json`: what it takes to rebuild the network and to talk to it.

    A Hugging Face tokenizer is copied into the folder, so that the run does not need the place it came from.
    """
    saved = tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer):
        save_tokenizer(tokenizer, folder)
        saved = dataclasses.replace(tokenizer, file=str(folder / "tokenizer.json"), text=None, settings=None)
    spec = saved.to_json()
    write_json(
        folder / MODEL,
        {
            "transformer": config.to_json(transformer),
            "tokenizer": spec | ({"file": "tokenizer.json"} if "file" in spec else {}),
            "marker": marker,
            "max_tokens": max_tokens,
            "example": example,
        },
    )


def load_model(folder: str | Path) -> Model:
    """Opens the model of a run folder from its newest intact checkpoint, or a published model from elsewhere.

    Args:
      folder: a run folder, or what `jaxrl.pretrained.load_pretrained` takes.

    Raises:
      ValueError: when the folder holds no model.
      FileNotFoundError: when it has no intact checkpoint yet.
    """
    path = Path(folder)
    if not (path / MODEL).is_file():
        from jaxrl import pretrained  # it returns a Model

        if not pretrained.is_place(folder):
            raise ValueError(
                f"{folder} holds no model (no {MODEL} in it){pretrained.near(folder)}; expected a run folder such as "
                f"runs/demo, {pretrained.PLACES}"
            )
        return pretrained.load_pretrained(folder)
    saved = json.loads((path / MODEL).read_text())
    if "file" in saved["tokenizer"]:  # beside model.json
        saved["tokenizer"]["file"] = str(path / saved["tokenizer"]["file"])
    tokenizer = load_tokenizer(saved["tokenizer"])
    transformer = config.from_json(TransformerConfig, saved["transformer"], source=str(path / MODEL))
    state, _ = checkpoint.restore(path / CHECKPOINTS)
    return Model(
        language_model(transformer),
        state["params"],
        tokenizer,
        transformer,
        saved["marker"],
        saved["max_tokens"],
        saved["example"],
        template_of(tokenizer),
        turn_ends(tokenizer),
    )


def next_steps(folder: str | Path) -> str:
    """What to do with a finished run, one command a line."""
    path = Path(folder)
    kind, values = read_config(path)
    example = json.loads((path / MODEL).read_text())["example"]
    plot = path / "curves.png"
    using = {"talk to it": f"jaxrl chat {path}"}
    if kind in ("grpo", "sft"):
        using["evaluate it"] = f"jaxrl eval {path}"
    if example:
        using["sample from it"] = f"jaxrl generate {path} --prompt {shlex.quote(example)}"
    lines = {
        "learning curves": str(plot) if plot.exists() else "none: pip install 'jaxrl[plot]' draws them",
        **(using if kind != "rm" else {}),
        "train on": f"jaxrl train {kind} --resume {path} --steps {2 * values['steps']}",
        "on your own data": f"jaxrl train grpo --init {path} --data problems.jsonl",
    }
    return "\n".join(f"{what:<18}{command}" for what, command in lines.items())


def environment() -> dict[str, Any]:
    """Versions, machine and git state, as a run folder and a bug report want them."""
    packages = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy")
    return {
        "versions": {
            "jaxrl": jaxrl.__version__,
            "python": sys.version.split()[0],
            **{name: metadata.version(name) for name in packages},
        },
        "machine": {
            "platform": platform.platform(),
            "backend": jax.default_backend(),
            "devices": [str(device) for device in jax.devices()],
            "processes": jax.process_count(),
        },
        "git": _git_state(),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _git_state() -> str | None:
    """Commit of the source tree, marked when it has changes; None outside a checkout."""
    here = Path(__file__).parent
    ask = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout
    try:
        commit = ask("rev-parse", "--short", "HEAD").strip()
        return commit + ("-changed" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
