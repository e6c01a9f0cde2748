"""GGUF files, as llama.cpp makes them, under checkpoint names: floats, 4, 5 and 8 bits, and the K-quants.

The file is mapped; a tensor is dequantised when it is asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl.nets.weights.files import Stored
from jaxrl.nets.weights.names import GGUF_INTERLEAVED, gguf_names

QUANTS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)


class GGUF(NamedTuple):
    """metadata: key -> value (text, number or list), such as `general.architecture`. tensors: checkpoint name ->
    `Stored`, float32 and in the checkpoint's layout; a name that the map does not know stays as it is."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(file: str | Path) -> GGUF:
    """Open a GGUF file of the Llama family.

    llama.cpp turns neighbouring pairs of a head, Hugging Face (and this project) the halves: files of the architecture
    `llama` hold the rows of q and k in that other order, [H, Dh / 2, 2] for [H, 2, Dh / 2], which is undone here.

    Raises:
      ValueError: not a file, not GGUF, cut short, split over several files, or with tensors in a format that is not
        one of `QUANTS`.
      ImportError: with the command to run, if `gguf` is not installed.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"no file {file}; expected a .gguf file")
    with file.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ImportError(
            f"reading {file} takes the package `gguf`, which is not installed. "
            "Run: pip install 'jaxrl[hf]'   (or: pip install gguf)"
        ) from error
    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever the reader meets in bytes that are not there
        raise ValueError(
            f"{file} is not a whole GGUF file that the gguf package reads ({error}). Download it again"
        ) from None
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{file} is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']}; expected one file. "
            "Join them: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    unknown = [f"{t.name} is {t.tensor_type.name}" for t in reader.tensors if t.tensor_type.name not in QUANTS]
    if unknown:
        more = f"\n  (+{len(unknown) - 10} more)" if len(unknown) > 10 else ""
        raise ValueError(
            f"{file} holds tensors in formats other than {', '.join(QUANTS)}:\n  " + "\n  ".join(unknown[:10]) + more
        )
    names = gguf_names(metadata.get(f"{metadata.get('general.architecture')}.block_count", 0))
    interleaved = _interleaved_heads(metadata)

    def stored(tensor) -> Stored:
        heads = interleaved.get(tensor.name.rpartition("blk.")[2].partition(".")[2])

        def read() -> np.ndarray:
            values = dequantize(tensor.data, tensor.tensor_type)
            return values if heads is None else halves(values, heads)

        return Stored(tuple(int(n) for n in reversed(tensor.shape)), read)

    return GGUF(metadata, {names.get(t.name, t.name): stored(t) for t in reader.tensors})


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H * Dh, ...] of heads whose rotary pairs are neighbours, in the order where they are a half apart."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _interleaved_heads(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Tensor of a layer -> its heads, where its rows are interleaved."""
    kind = metadata.get("general.architecture", "")
    heads = metadata.get(f"{kind}.attention.head_count")
    counts = {"head_count": heads, "head_count_kv": metadata.get(f"{kind}.attention.head_count_kv", heads)}
    return {name: counts[key] for name, key in GGUF_INTERLEAVED.get(kind, {}).items()}
