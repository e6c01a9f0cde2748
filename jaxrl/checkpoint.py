"""Checkpoints of one pytree: atomic, verified, the newest few kept. Orbax stands behind this file and nowhere else.

A checkpoint is a folder named by its step. It is written under a temporary name, with a manifest of checksums, and
renamed when complete, so a killed process leaves either a whole checkpoint or one that is never looked at. A file
damaged later is found by its checksum, and the checkpoint before it is used instead.

Of several processes each writes and reads its own shards, in a folder that all of them see, and all must call; the rest
(manifest, checksums, names) is done by process 0.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxrl.parallel.processes import on_main

MANIFEST = "manifest.json"


class CorruptCheckpoint(RuntimeError):
    """A checkpoint whose files are not those that were written."""


def steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    folder = Path(directory)
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []


def save(directory: str | os.PathLike, step: int, state: Any, *, keep: int = 3) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`, and those of later steps.

    Args:
      directory: folder of the run's checkpoints; created.
      step: non-negative; an existing checkpoint of that step is replaced.
      state: pytree of arrays; typed random keys included.
      keep: checkpoints to keep, at least 1.

    Returns:
      The checkpoint's folder.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept")
    folder = Path(directory).absolute()
    temporary, final = folder / f"{step}.tmp", folder / str(step)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            shutil.rmtree(leftover)

    def finish() -> None:
        (temporary / MANIFEST).write_text(json.dumps(_checksums(temporary)))
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        newer = [found for found in steps(folder) if found > step]  # the run went back to before these
        for old in newer + [found for found in steps(folder) if found <= step][:-keep]:
            shutil.rmtree(folder / str(old))

    on_main(begin)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(temporary / "state", args=ocp.args.StandardSave(_raw_keys(state)))
    on_main(finish)
    return final


def restore(directory: str | os.PathLike, like: Any = None, *, step: int | None = None) -> tuple[Any, int]:
    """Reads the newest intact checkpoint, or that of `step`.

    Args:
      directory: folder of the run's checkpoints.
      like: pytree of arrays or `jax.ShapeDtypeStruct` (with shardings, to restore onto devices) that gives structure,
        shapes and types; None returns nested dicts of arrays as they were saved.
      step: a certain step; None tries from the newest back and warns of each damaged one.

    Returns:
      `(state, step)`.

    Raises:
      FileNotFoundError: when there is no (intact) checkpoint.
      CorruptCheckpoint: when the one asked for is damaged.
      ValueError: when the state has other leaves or shapes than `like`.
    """
    found = on_main(lambda: _intact(directory, step))
    return _read(Path(directory).absolute() / str(found) / "state", like), found


def _intact(directory: str | os.PathLike, step: int | None) -> int:
    """The step that `restore` takes; warnings and errors as there."""
    for candidate in reversed(steps(directory) if step is None else [step]):
        folder = Path(directory).absolute() / str(candidate)
        if not folder.is_dir():
            raise FileNotFoundError(f"no checkpoint {candidate} in {directory}; found steps {steps(directory)}")
        try:
            _verify(folder)
        except CorruptCheckpoint as error:
            if step is not None:
                raise
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=4)
            continue
        return candidate
    raise FileNotFoundError(f"no intact checkpoint in {directory}; start the run anew in another folder")


def _read(folder: Path, like: Any) -> Any:
    """Leaves without a sharding go to the default device of the process, wherever they were saved from."""
    here = jax.sharding.SingleDeviceSharding(getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        if like is None:
            bare = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            return checkpointer.restore(folder, args=ocp.args.StandardRestore(jax.tree.map(bare, saved)))
        target = jax.tree.map(place, _raw_keys(like))
        _compare(target, saved, folder)
        raw = checkpointer.restore(folder, args=ocp.args.StandardRestore(target))
    return jax.tree.map(_as_key, like, raw)


def _compare(target: Any, saved: Any, folder: Path) -> None:
    def shapes(tree):
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    expected, given = shapes(target), shapes(saved)
    faults = [
        f"{n}: saved {given[n]}, expected {expected[n]}" for n in expected if n in given and given[n] != expected[n]
    ]
    faults += [f"{n}: not in the checkpoint" for n in expected if n not in given]
    faults += [f"{n}: in the checkpoint only" for n in given if n not in expected]
    if faults:
        listed = "\n  ".join(faults[:10]) + (f"\n  (+{len(faults) - 10} more)" if len(faults) > 10 else "")
        raise ValueError(
            f"checkpoint {folder.parent} does not fit this configuration:\n  {listed}\n"
            "resume with the configuration of its run folder (config.json), or start a new run"
        )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_key(leaf: Any, value: Any) -> Any:
    if not _is_key(leaf):
        return value
    impl = jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else None  # None: the configured default
    return jax.random.wrap_key_data(value, impl=impl)


def _raw_keys(tree: Any) -> Any:
    """Typed keys as the integers they hold, which is what a file can hold."""

    def raw(leaf):
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raw = jax.eval_shape(jax.random.key_data, leaf)
            return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)

    return jax.tree.map(raw, tree)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _verify(folder: Path) -> None:
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"checkpoint {folder} has no readable {MANIFEST}") from error
    given = _checksums(folder)
    damaged = sorted(name for name in expected if given.get(name) != expected[name])
    if damaged:
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {', '.join(damaged[:3])} missing or changed")


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
