"""Run folders: what a run was (config, versions, git state), what it made, and how to open it again."""

import dataclasses
import json
import os
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
from jaxrl.nets import adapters
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import adapter
from jaxrl.posttrain.adapter import AdapterOptions

CONFIG, MODEL, METRICS, SUMMARY, CHECKPOINTS, SHARDING = (
    "config.json",
    "model.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "sharding.txt",
)


class Model(NamedTuple):
    """A model opened from a run folder, or a published one.

    `marker` is the text after which an answer stands (empty: the whole completion), `max_tokens` the completion width
    it was trained for, `example` a prompt of its task (empty: none known). `template` renders conversations (None: the
    model knows none), and `ends` are the ids besides EOS that end its turn. `mask_id` is the mask token of a network
    that fills in masks, as LLaDA; None: it reads from left to right. `block`: tokens of a block of block diffusion.
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
    mask_id: int | None = None
    block: int | None = None


def check_new(folder: str | Path) -> None:
    """Raises ValueError when the folder holds a run already."""
    path = Path(folder)
    if is_run(path):
        raise ValueError(
            f"{path} holds a run already; continue it with --resume {path}, or choose another folder with --out"
        )
    if (path / CONFIG).exists():
        raise ValueError(f"{path} holds something else already, with a {CONFIG}; choose another folder with --out")


def write_config(folder: Path, kind: str, options: Any) -> None:
    """Writes `config.json`, which is what makes a folder a run."""
    write_json(folder / CONFIG, {"kind": kind, "config": config.to_json(options), **environment()})


def read_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The kind of a run and the values of its config.

    Raises:
      ValueError: when the folder holds no run.
    """
    path = Path(folder) / CONFIG
    if not is_run(folder):
        why = f"a {CONFIG} of something else" if path.is_file() else f"no {CONFIG}"
        raise ValueError(f"{folder} holds no run ({why} in it); expected a folder such as runs/demo")
    saved = json.loads(path.read_text())
    return saved["kind"], saved["config"]


def is_run(place: str | Path) -> bool:
    """Whether a folder holds a run; a published model has a `config.json`, too."""
    path = Path(place) / CONFIG
    return path.is_file() and {"kind", "config"} <= set(json.loads(path.read_text()))


def write_model(
    folder: Path,
    transformer: TransformerConfig,
    tokenizer: Tokenizer,
    *,
    marker: str,
    max_tokens: int,
    example: str,
    origin: dict[str, Any] | None = None,
    masks: dict[str, int | None] | None = None,
) -> None:
    """Writes `model.json`: what it takes to rebuild the network and to talk to it; of an adapter its `origin`, too, and
    of a network that fills in masks the `token` and the `block`.

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
        }
        | ({} if masks is None else {"masks": masks})
        | ({} if origin is None else {"adapter": origin | {"base": _from(folder, origin["base"])}}),
    )


def origin(options: AdapterOptions, base: str, params: Any) -> dict[str, Any]:
    """What an adapter stands on: its options, the place of the base, and a number that tells its parameters."""
    return {"options": config.to_json(options), "base": base, "fingerprint": _fingerprint(base, params)}


def check_origin(folder: str | Path, origin: dict[str, Any] | None) -> None:
    """Raises ValueError where the adapter of a run folder stands on other parameters, or is of another form."""
    file = Path(folder) / MODEL
    saved = json.loads(file.read_text()).get("adapter") if file.is_file() else origin
    same = ("fingerprint", "options")
    if [(saved or {}).get(name) for name in same] != [(origin or {}).get(name) for name in same]:
        raise ValueError(
            f"{folder} was begun with the adapter {saved and saved['options']} on {saved and saved['base']}, which is "
            "another one now, or another base; resume with both as they were, or start a new run"
        )


def check_model(folder: str | Path) -> None:
    """Raises ValueError where `load_model` finds no model."""
    from jaxrl import pretrained  # it returns a Model

    if not (Path(folder) / MODEL).is_file() and not pretrained.is_place(folder):
        raise ValueError(
            f"{folder} holds no model (no {MODEL} in it){pretrained.near(folder)}; expected a run folder such as "
            f"runs/demo, {pretrained.PLACES}"
        )


def load_model(folder: str | Path, *, rewards: bool = False) -> Model:
    """Opens the model of a run folder from its newest intact checkpoint, or a published model from elsewhere.

    Args:
      folder: a run folder, or what `jaxrl.pretrained.load_pretrained` takes.
      rewards: whether it may be a reward model, whose parameters are {"model", "head"}.

    Raises:
      ValueError: when the folder holds no model, or one that gives rewards in the place of text.
      FileNotFoundError: when it has no intact checkpoint yet.
    """
    path = Path(folder)
    check_model(folder)
    if not (path / MODEL).is_file():
        from jaxrl import pretrained  # it returns a Model

        return pretrained.load_pretrained(folder)
    saved = json.loads((path / MODEL).read_text())
    if "file" in saved["tokenizer"]:  # beside model.json
        saved["tokenizer"]["file"] = str(path / saved["tokenizer"]["file"])
    tokenizer = load_tokenizer(saved["tokenizer"])
    transformer = config.from_json(TransformerConfig, saved["transformer"], source=str(path / MODEL))
    state, _ = checkpoint.restore(path / CHECKPOINTS)
    model, params = language_model(transformer), state["params"]
    if "adapter" in saved:
        model, params = _with_base(path, saved["adapter"], model, params)
    if set(params) == {"model", "head"} and not rewards:
        raise ValueError(
            f"{folder} holds a reward model, which writes no text; expected the folder of a language model"
        )
    return Model(
        model,
        params,
        tokenizer,
        transformer,
        saved["marker"],
        saved["max_tokens"],
        saved["example"],
        template_of(tokenizer),
        turn_ends(tokenizer),
        saved.get("masks", {}).get("token"),
        saved.get("masks", {}).get("block"),
    )


def load_adapter(folder: str | Path) -> tuple[AdapterOptions, Any, str]:
    """Options and parameters of the adapter in a run folder, and the place of its base.

    Raises:
      ValueError: a run that has no adapter.
    """
    path = Path(folder) / MODEL
    saved = json.loads(path.read_text()).get("adapter") if path.is_file() else None
    if saved is None:
        raise ValueError(f"{folder} holds no adapter; expected a run of jaxrl train ... --adapter.kind lora")
    state, _ = checkpoint.restore(Path(folder) / CHECKPOINTS)
    options = config.from_json(AdapterOptions, saved["options"], source=str(path))
    return options, state["params"], _to(Path(folder), saved["base"])


def _with_base(path: Path, saved: dict[str, Any], model: LanguageModel, params: Any) -> tuple[LanguageModel, Any]:
    """An adapter's model: merged into its base, or beside it where it cannot be."""
    place = _to(path, saved["base"])
    base = load_model(place).params
    if _fingerprint(place, base) != saved["fingerprint"]:
        raise ValueError(
            f"{path} holds an adapter on {place}, whose parameters have changed since; put back those it was trained on"
        )
    options = config.from_json(AdapterOptions, saved["options"], source=str(path / MODEL))
    made, base = options.build(), options.frozen(base)
    assert made is not None
    if not made.merges:
        return adapter.carried(model, made), adapter.join(base, params)
    own = params["model"] if set(params) == {"model", "head"} else params
    merged = adapters.dequantise_base(adapters.merge(base, own, made).params)
    return model, merged if own is params else params | {"model": merged}


def _fingerprint(place: str, params: Any) -> int:
    """Of a model's parameters as they are stored: a merged base is not the same on every machine."""
    file = Path(place) / MODEL
    below = json.loads(file.read_text()).get("adapter") if file.is_file() else None
    return adapter.fingerprint(load_adapter(place)[1] if below else params) ^ (below or {}).get("fingerprint", 0)


def _from(folder: Path, place: str) -> str:
    """A place on disk as seen from the run folder, so that both may move together; a name stays."""
    return os.path.relpath(place, folder) if os.path.exists(place) else place


def _to(folder: Path, place: str) -> str:
    return os.path.normpath(folder / place) if os.path.exists(folder / place) else place


def next_steps(folder: str | Path) -> str:
    """What to do with a finished run, one command a line."""
    path = Path(folder)
    kind, values = read_config(path)
    saved = json.loads((path / MODEL).read_text())
    adapter = saved.get("adapter")
    adapter = adapter and config.from_json(AdapterOptions, adapter["options"], source=str(path / MODEL))
    plot = path / "curves.png"
    lines = {"learning curves": str(plot) if plot.exists() else "none: pip install 'jaxrl[plot]' draws them"}
    if kind == "rm":
        lines["reward with it"] = f"jaxrl train ppo-rlhf --reward-model {path} --init {values['init'] or 'MODEL'}"
    else:
        lines["talk to it"] = f"jaxrl chat {path}"
        rewarded = f" --reward {shlex.quote(values['reward'])}" if values.get("reward") else ""
        answered = "accuracy_after" in json.loads((path / SUMMARY).read_text())
        lines["evaluate it"] = f"jaxrl eval {path}" + ("" if answered else rewarded or " --data problems.jsonl")
        if saved["example"]:
            lines["sample from it"] = f"jaxrl generate {path} --prompt {shlex.quote(saved['example'])}"
        if adapter is not None and adapter.kind in ("lora", "dora"):
            lines["its adapter"] = f"jaxrl export {path} --adapter --out FOLDER"
    lines["train on"] = f"jaxrl train {kind} --resume {path} --steps {2 * values['steps']}"
    if kind != "rm" and (adapter is None or adapter.build().merges):  # pyright: ignore  (not kind none)
        lines["on your own data"] = f"jaxrl train grpo --init {path} --data problems.jsonl"
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
