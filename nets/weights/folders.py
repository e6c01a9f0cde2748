"""A Hugging Face folder as every door opens it: config.json says which network, *.safetensors are its parameters."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxrl.nets.vision import prepare
from jaxrl.nets.weights.files import read_safetensors, refuse_pickle

Config = TypeVar("Config")


def described(folder: Path, from_hugging_face: Callable[..., Config], **changes) -> tuple[Config, dict[str, Any]]:
    """What network a folder is of.

    Args:
      folder: with config.json.
      from_hugging_face: (the parsed file, **changes) -> config, of an architecture.
      changes: fields of the config to set.

    Returns:
      (config, the parsed file).

    Raises:
      ValueError: a file in the place of a folder, no config.json, one that is not JSON, or what the architecture
        refuses; pickled weights.
    """
    refuse_pickle(folder)
    if folder.is_file():
        raise ValueError(
            f"{folder} is one file; expected the folder that holds it, with config.json and tokenizer.json, "
            "or a .gguf file, which has all in one"
        )
    file = folder / "config.json"
    if not file.is_file():
        inside = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"Name the file: {folder / inside[0]}" if inside else "Download it with the weights"
        raise ValueError(f"{folder} holds no config.json, which says what network its weights are of. {hint}")
    said = read_json(file)
    return named(file, lambda: from_hugging_face(said, **changes)), said


def parameters(
    where: Path, from_checkpoint: Callable[[Mapping[str, Any]], dict], *, ignored: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The parameters in a folder's *.safetensors, or in one such file, on the device.

    Args:
      where: the folder.
      from_checkpoint: {checkpoint name: `Stored`} -> nested dict of parameters.
      ignored: endings of names of tables that may be there, of any type, see `read_safetensors`.

    Raises:
      ValueError: what `read_safetensors` and `from_checkpoint` refuse; the message begins with `where`.
      ImportError: with the command to run, if `safetensors` is not installed.
    """
    tensors = read_safetensors(where, ignored=ignored)
    return to_device(named(where, lambda: from_checkpoint(tensors)))


def preparation(
    folder: Path, read: Callable[[Mapping[str, Any]], prepare.Preparation] = prepare.from_hugging_face
) -> prepare.Preparation | None:
    """How its preprocessor_config.json, which `read` understands, prepares pictures; None without the file."""
    file = folder / "preprocessor_config.json"
    return named(file, lambda: read(read_json(file))) if file.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """The parsed file.

    Raises:
      ValueError: what is no JSON; the message begins with the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def named(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns; its ValueError begins with the path, and a key that is not there becomes one."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: no {error} in it") from None


def to_device(tree: dict) -> dict:
    """Moves the leaves of a nested dict to the device one by one; the dict lets go of each host copy."""
    for name, value in tree.items():
        tree[name] = to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return tree
