"""Records: JSON Lines with TRL's columns in, padded int32 arrays with explicit lengths and masks out.

Columns: `prompt` + `completion` | `messages` | `text` for supervised tuning, `prompt` + `answer` for
verifiable rewards. A prompt is a string or a list of chat messages. Further columns are kept as they are;
reward functions get them by name.
"""

import difflib
import json
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl.data.chat import Template, chatml
from jaxrl.data.tokenizer import Tokenizer

Record = dict[str, Any]


class Examples(NamedTuple):
    """Supervised examples: tokens [N, T] int32 right-padded; loss_mask [N, T] float32, 1 where a token is
    trained (it is a *target*: the model reads what stands before it); lengths [N] int32, tokens before the
    padding."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray


def read_jsonl(path: str | Path, *, require: Sequence[str] = ()) -> list[Record]:
    """Return the records of a JSON Lines file: UTF-8 (a byte order mark is allowed), blank lines skipped.

    require: columns that every record must have.

    Raises ValueError naming the file and line if a line is not UTF-8, not JSON or not an object, if a
    required column is missing (with the columns found and the nearest name), or if the file holds no record.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; expected a JSON Lines file, one JSON object per line")
    records = []
    with path.open("rb") as lines:  # as text it would also split at other line ends, legal inside JSON strings
        for number, line in enumerate(lines, start=1):
            with named(f"{path}:{number}"):
                record = _parse_line(line, first=number == 1)
                if record is not None:
                    check_columns(record, require)
                    records.append(record)
    if not records:
        raise ValueError(f"{path} holds no record; expected one JSON object per line")
    return records


@contextmanager
def named(where: str):
    """Put `where` (a file and line, or a record) before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_columns(record: Record, columns: Sequence[str]) -> None:
    """Raise ValueError if a record lacks one of `columns`, naming the columns it has and the nearest."""
    for column in columns:
        if column not in record:
            near = difflib.get_close_matches(column, record, n=1)
            hint = f"did you mean {near[0]!r}? Rename it" if near else f"add {column!r} to every record"
            raise ValueError(f"no column {column!r}; found {sorted(record)}. {hint[0].upper() + hint[1:]}")


def encode_prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    add_bos: bool = False,
    template: Template = chatml,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise the `prompt` column for sampling.

    max_length: a longer prompt is an error, never cut. pad_to: the width P (default: the longest prompt).
    add_bos: put the tokeniser's BOS first (for models trained so; a chat template writes its own).
    template: renders a prompt that is a list of messages, up to where the assistant speaks.

    Returns (tokens [N, P] int32 left-padded, lengths [N] int32).
    Raises ValueError, naming the record, if a prompt is missing, empty or too long.
    """
    rows = []
    for i, record in enumerate(records):
        with named(f"record {i}"):
            check_columns(record, ["prompt"])
            rows.append(_encode_prompt(record["prompt"], tokenizer, add_bos, template))
            _check_length(rows[-1], max_length, f"the prompt {_excerpt(record['prompt'])}")
    return _pad(rows, tokenizer, pad_to, left=True)


def encode_answers(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise the `answer` column (text or an integer), for a reward that compares tokens.

    Returns (tokens [N, A] int32 right-padded, without EOS; lengths [N] int32).
    Raises ValueError, naming the record, if an answer is missing, empty, too long or of another type.
    """
    rows = []
    for i, record in enumerate(records):
        with named(f"record {i}"):
            check_columns(record, ["answer"])
            answer = record["answer"]
            answer = str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else answer
            rows.append(tokenizer.encode(_text(answer, "answer")))
            _check_length(rows[-1], max_length, f"the answer {_excerpt(answer)}")
    return _pad(rows, tokenizer, pad_to, left=False)


def encode_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    add_bos: bool = False,
    template: Template = chatml,
) -> Examples:
    """Tokenise supervised examples; what the model should learn to write is masked in, EOS included.

    `prompt` + `completion`: the completion is trained. `messages`: every assistant turn is trained. `text`:
    all of it is trained. Each example ends with EOS, and that EOS is trained: a model that never sees it
    never stops.

    max_length, pad_to, add_bos, template: as `encode_prompts`; max_length counts EOS.

    Returns Examples(tokens [N, T], loss_mask [N, T], lengths [N]).
    Raises ValueError, naming the record, if its columns are none of these, a prompt or completion is empty,
    it is too long, or nothing in it is trained.
    """
    rows, masks = [], []
    for i, record in enumerate(records):
        with named(f"record {i}"):
            ids, mask = encode_example(record, tokenizer, add_bos=add_bos, template=template)
            _check_length(ids, max_length, "the example with its EOS")
        rows.append(ids)
        masks.append(mask)
    tokens, lengths = _pad(rows, tokenizer, pad_to, left=False)
    loss_mask = np.zeros(tokens.shape, np.float32)
    for row, mask in zip(loss_mask, masks, strict=True):
        row[: len(mask)] = mask
    return Examples(tokens, loss_mask, lengths)


def encode_example(
    record: Record,
    tokenizer: Tokenizer,
    *,
    add_bos: bool = False,
    template: Template = chatml,
) -> tuple[list[int], list[bool]]:
    """Tokenise one record as `encode_examples` does. Returns (ids, loss mask), two lists of T."""
    if "messages" in record:
        ids, mask = template(record["messages"], tokenizer)
        if any(mask) and ids[_last(mask)] != tokenizer.eos_id:  # a template that does not write EOS itself
            end = _last(mask) + 1
            ids, mask = [*ids[:end], tokenizer.eos_id], [*mask[:end], True]
    elif "completion" in record:
        check_columns(record, ["prompt"])
        prompt = _encode_prompt(record["prompt"], tokenizer, add_bos, template)
        completion = _end(tokenizer.encode(_completion(record["completion"])), tokenizer)
        ids, mask = prompt + completion, [False] * len(prompt) + [True] * len(completion)
    elif "text" in record:
        start = _bos(tokenizer) if add_bos else []
        text = _end(tokenizer.encode(_text(record["text"], "text")), tokenizer)
        ids, mask = start + text, [False] * len(start) + [True] * len(text)
    else:
        known = ["completion", "messages", "text"]
        near = [name for column in record for name in difflib.get_close_matches(column, known)]
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"found columns {sorted(record)}; expected `prompt` and `completion`, `messages`, or `text`{hint}"
        )
    if not any(mask[1:]):
        raise ValueError(
            f"it trains on nothing: none of its {len(ids)} tokens is a target. It needs a completion or "
            "an assistant message with text"
        )
    return ids, mask


def check_vocabulary(tokens: np.ndarray, vocab_size: int, *, name: str = "tokens") -> None:
    """Raise ValueError if an id of `tokens` [N, T] is outside [0, vocab_size), the model's vocabulary."""
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{name} [N, T] = {list(tokens.shape)} holds id {tokens[row, column]} at row {row}, column "
            f"{column}; the model's vocabulary is [0, {vocab_size}). Use the tokeniser the model was made "
            "with, or a model with a larger vocabulary"
        )


def _parse_line(line: bytes, *, first: bool) -> Record | None:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte 0x{line[error.start]:02x} at byte {error.start + 1} is not UTF-8. Save the file as UTF-8"
        ) from None
    if not text:
        return None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"found {_excerpt(text[error.pos :], 20)}" if error.pos < len(text) else "the line ends there"
        array = first and text.startswith("[")
        hint = "the file looks like one JSON array: " if array else ""
        raise ValueError(
            f"column {error.colno}: {error.msg}; {found}. {hint[:1].upper()}{hint[1:]}"
            f"{'write' if array else 'Write'} each record as one JSON object on one line, with double quotes"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"found {'a list' if isinstance(record, list) else repr(record)}, expected one JSON "
            'object per line, such as {"prompt": "1+1=", "answer": "2"}'
        )
    return record


def _encode_prompt(prompt: Any, tokenizer: Tokenizer, add_bos: bool, template: Template) -> list[int]:
    if isinstance(prompt, list):
        if not prompt:
            raise ValueError("the prompt is an empty list; expected at least one message")
        return template(prompt, tokenizer, add_generation_prompt=True)[0]
    return (_bos(tokenizer) if add_bos else []) + tokenizer.encode(_text(prompt, "prompt"))


def _completion(completion: Any) -> str:
    if isinstance(completion, list):  # chat form: one assistant message
        roles = [message.get("role") if isinstance(message, dict) else None for message in completion]
        if roles != ["assistant"]:
            raise ValueError(
                f"the completion is a list but not of one assistant message: {_excerpt(completion)}. Put the "
                "whole conversation under `messages`"
            )
        completion = completion[0].get("content")
    return _text(completion, "completion")


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{column!r} is {_excerpt(value)} ({kind}), expected text: put it in quotes")
    if not value.strip():
        raise ValueError(f"{column!r} is empty ({value!r}); expected some text. Remove the record or fill it")
    return value


def _end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Append EOS, unless the text itself ends with it (a conversation rendered beforehand)."""
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]


def _bos(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_id is None:
        raise ValueError("add_bos=True, but the tokeniser has no BOS token; pass bos_token= when loading it")
    return [tokenizer.bos_id]


def _check_length(ids: Sequence[int], max_length: int | None, what: str) -> None:
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"{what} has {len(ids)} tokens, longer than max_length = {max_length}. Raise the limit or remove the record"
        )


def _pad(
    rows: list[list[int]], tokenizer: Tokenizer, width: int | None, *, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows padded to one width [N, W] int32, lengths [N] int32)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths.max(initial=0))
    if width is not None and width < longest:
        raise ValueError(f"pad_to = {width} is less than the longest row, {longest} tokens (record {lengths.argmax()})")
    tokens = np.full((len(rows), longest if width is None else width), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[len(row) - len(ids) if left else 0 :][: len(ids)] = ids
    return tokens, lengths


def _last(mask: Sequence[bool]) -> int:
    return max(i for i, trained in enumerate(mask) if trained)


def _excerpt(value: Any, length: int = 40) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= length else text[: length - 3] + "...")
