"""Safetensors files, one or several, in and out: no pickle, no torch.

Reading opens the files and maps them; a tensor's bytes are touched when it is asked for.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl.kernels.quantised import FP8, Quantised, dequantise, quantise

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT, SCALE = "F8_E4M3", "_scale_inv"
"""8-bit floats, and the ending of the tensor with a factor for each of their blocks (DeepSeek-V3)."""
IN_BLOCKS = ("proj.weight", "proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape is known, its values are read by `np.asarray`, anew each time."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    kind: str = ""

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def read_safetensors(where: str | Path, *, ignored: tuple[str, ...] = ()) -> dict[str, Stored]:
    """The tensors of a checkpoint: checkpoint name -> `Stored`.

    Args:
      where: a `.safetensors` file, or a folder with `model.safetensors`, or with the files that
        `model.safetensors.index.json` names, or with one file of another name. Matrices of 8-bit floats (F8_E4M3) whose
        `NAME_scale_inv` has a factor for each block of 128 x 128 are read as float32, multiplied out.
      ignored: endings of names whose tensors are left out, whatever their type: tables of integers that follow from
        the config, which older files hold.

    Raises:
      ValueError: no such file; pickled weights; a file that is cut short or of another kind; a file or tensor that
        the index names and that is not there; tensors that are not floats (a checkpoint quantised in another way).
      ImportError: with the command to run, if `safetensors` is not installed.
    """
    path = Path(where)
    refuse_pickle(path)
    files, promised = _files(path) if path.is_dir() else ([path], {})
    tensors: dict[str, Stored] = {}
    problems = []
    for file in files:
        found, wrong = (_without(part, ignored) for part in _open(file))
        problems += [f"{name} in {file.name} is {kind}" for name, kind in wrong.items()]
        problems += [f"{name} is in {file.name} and in a file before it" for name in found if name in tensors]
        tensors |= found
        expected = _without({name: shard for name, shard in promised.items() if shard == file.name}, ignored)
        missing = [name for name in expected if name not in found]
        problems += [f"{name} is not in {file.name}, where {INDEX} says it is" for name in missing if name not in wrong]
    tensors, unscaled = _multiplied_out(tensors)
    problems += unscaled
    if problems:
        raise ValueError(
            f"{path}: expected floats ({', '.join(FLOATS)}), each tensor once and where the index says, but\n  "
            + "\n  ".join(problems)
        )
    return tensors


def _without(named: dict[str, Any], endings: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not name.endswith(endings)}


def _multiplied_out(tensors: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """8-bit floats and their factors as one tensor, wherever the factors are, and what is wrong with them."""
    eight = {name: tensor for name, tensor in tensors.items() if tensor.kind == EIGHT}
    problems, used, sides = [], set(), [side or 1 for side in FP8.w_block]

    def product(values: Stored, scales: Stored) -> Stored:
        whole = lambda: Quantised(jnp.asarray(values.read()), jnp.asarray(np.asarray(scales, np.float32)))
        return Stored(values.shape, lambda: np.asarray(dequantise(whole(), block=FP8.w_block)))

    for name, values in eight.items():
        scales = tensors.get(name + SCALE)
        expected = tuple(-(-n // side) for n, side in zip(values.shape, sides, strict=False))
        if scales is None:
            problems.append(f"{name} is {EIGHT} and there is no {name}{SCALE}")
        elif len(values.shape) != 2 or scales.shape != expected:
            problems.append(
                f"{name}{SCALE} is {scales.shape}, expected {expected}: blocks of {sides} of {values.shape}"
            )
        else:
            eight[name] = product(values, scales)
            used.add(name + SCALE)
    return {name: tensor for name, tensor in (tensors | eight).items() if name not in used}, problems


def refuse_pickle(path: Path) -> None:
    """Raise ValueError if `path` is a pickle, or a folder whose only weights are pickles."""
    if path.is_dir():
        pickles = sorted(p.name for p in path.iterdir() if p.name.endswith(PICKLES) and "training_args" not in p.name)
        if any(path.glob("*.safetensors")) or (path / INDEX).exists():
            pickles = []
    else:
        pickles = [path.name] if path.name.endswith(PICKLES) else []
    if pickles:
        raise ValueError(
            f"{path} has its weights in {pickles[0]}, a pickle, and reading a pickle can run any program hidden in it; "
            "expected .safetensors or .gguf. Ask its author for safetensors, or convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        )


def in_blocks(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's matrices of layers as e4m3 with a float32 factor for each 128 x 128 block, as DeepSeek-V3's are.

    Those whose names end in `proj.weight`, `proj_with_mqa.weight` or w1, w2, w3 of Mixtral's experts, but for `eh_proj`
    of multi-token prediction; embeddings, head, routers, norms and biases stay. `read_safetensors` multiplies out.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not name.endswith(IN_BLOCKS) or name.endswith("eh_proj.weight"):
            found[name] = tensor
            continue
        values, scales = quantise(jnp.asarray(np.asarray(tensor, np.float32)), dtype=FP8.dtype, block=FP8.w_block)
        found[name], found[name + SCALE] = np.asarray(values), np.asarray(scales)
    return found


def write_safetensors(
    folder: str | Path, tensors: Mapping[str, Any], *, dtype: str = "float32", shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write a checkpoint; one file is held in memory at a time.

    Args:
      folder: made if it is not there.
      tensors: checkpoint name -> array, or `Stored`. Matrices and factors of `in_blocks` keep their types.
      dtype: float32, bfloat16 or float16, the type they are stored in.
      shard_bytes: the most one file holds (a larger tensor gets a file of its own). More than one file comes with
        `model.safetensors.index.json`.

    Returns:
      The files, in order.

    Raises:
      ValueError: a type that is none of the three, or a value too large for float16.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes is {shard_bytes}, expected a positive number of bytes")
    save_file = _safetensors().numpy.save_file
    sizes = {name: int(np.prod(np.shape(t))) * _stored_type(name, t, dtype).itemsize for name, t in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    count, folder = len(shards), Path(folder)
    names = [ONE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for file, shard in zip(names, shards, strict=True):
        plain = {name: _as_type(name, tensors[name], dtype) for name in shard}
        save_file(plain, folder / file, metadata={"format": "pt"})  # without it transformers refuses the file
        (folder / file).chmod(0o644)  # the writer leaves it to its owner alone
    if count > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / file for file in names]


def _as_type(name: str, tensor: Any, dtype: str) -> np.ndarray:
    """The writer copies memory as it lies: transposed views are laid out first."""
    array = np.asarray(tensor)
    if dtype == "float16" and array.size and np.abs(array).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} holds {np.abs(array).max():g}, too large for float16; export bfloat16 or float32")
    return np.ascontiguousarray(array, dtype=_stored_type(name, array, dtype)).reshape(array.shape)


def _stored_type(name: str, tensor: Any, dtype: str) -> np.dtype:
    if getattr(tensor, "dtype", None) == FP8.dtype:
        return jnp.dtype(FP8.dtype)
    return jnp.dtype("float32" if name.endswith(SCALE) else dtype)


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder, and tensor -> file as its index promises."""
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors (JSON with a weight_map): {error!r}") from None
        files = [folder / name for name in sorted(set(places.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names: {', '.join(missing)}. "
                "Download them again"
            )
        return files, places
    found = [folder / ONE] if (folder / ONE).is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        what = "no .safetensors file" if not found else f"{len(found)} .safetensors files but no {INDEX}"
        raise ValueError(f"{folder} holds {what}; expected {ONE}, or several files with {INDEX}")
    return found, {}


def _open(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The float tensors of one file, and name -> type of the others."""
    if not file.is_file():
        raise ValueError(f"no file {file}; expected a .safetensors file or the folder that holds one")
    try:
        handle = _safetensors().safe_open(file, framework="numpy")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (no mapping)
    except (ValueError, ImportError, FileNotFoundError):
        raise
    except Exception as error:  # its own error class is of no module that one could name
        raise ValueError(f"{file} is not a whole safetensors file ({error}). Download it again") from None

    def stored(name: str, kind: str) -> Stored:
        read = _read_eight if kind == EIGHT else lambda _, name: handle.get_tensor(name)
        return Stored(tuple(slices[name].get_shape()), lambda: read(file, name), kind)

    known, kinds = (*FLOATS, EIGHT), {name: part.get_dtype() for name, part in slices.items()}
    return (
        {name: stored(name, kind) for name, kind in kinds.items() if kind in known},
        {name: kind for name, kind in kinds.items() if kind not in known},
    )


def _read_eight(file: Path, name: str) -> np.ndarray:
    """A tensor of e4m3 floats, which the reader of `safetensors` has no NumPy type for: from its place in the file."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(header))[name]
    start, end = entry["data_offsets"]
    raw = np.fromfile(file, np.uint8, end - start, offset=8 + header + start)
    return raw.view(jnp.float8_e4m3fn).reshape(entry["shape"])


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors files take the package `safetensors`, which is not installed. "
            "Run: pip install 'jaxrl[hf]'   (or: pip install safetensors)"
        ) from error
    return safetensors
