"""Records with TRL's columns in, padded int32 arrays with explicit lengths and masks out.

Columns: `prompt` + `completion` | `messages` | `text` for supervised tuning, `prompt` + `answer` for
verifiable rewards; those of preferences stand in `preferences`. A prompt is a string or a list of chat
messages; `tools` beside messages go to the chat template. Further columns are kept as they are; reward
functions get them by name.
"""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl.data.chat import Template, chatml, check_messages, template_of
from jaxrl.data.sources import Record as Record
from jaxrl.data.sources import check_columns as check_columns
from jaxrl.data.sources import excerpt, place
from jaxrl.data.sources import named as named
from jaxrl.data.sources import read_jsonl as read_jsonl
from jaxrl.data.tokenizer import Tokenizer

Ids = tuple[list[int], list[bool]]
"""The tokens of one sequence, and which of them are trained."""


class Examples(NamedTuple):
    """Supervised examples: tokens [N, T] int32 right-padded; loss_mask [N, T] float32, 1 where a token is
    trained (it is a *target*: the model reads what stands before it); lengths [N] int32, tokens before the
    padding."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray


def encode_prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    add_bos: bool = False,
    template: Template | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise the `prompt` column for sampling.

    max_length: a longer prompt is an error, never cut. pad_to: the width P (default: the longest prompt).
    add_bos: put the tokeniser's BOS first (for models trained so; a chat template writes its own).
    template: renders a prompt that is a list of messages, up to where the assistant speaks; None is the tokeniser's
      own, and ChatML if it has none.

    Returns (tokens [N, P] int32 left-padded, lengths [N] int32).
    Raises ValueError, naming the record, if a prompt is missing, empty or too long.
    """
    template = template or template_for(tokenizer)
    rows = []
    for i, record in enumerate(records):
        with named(place(record, i)):
            check_columns(record, ["prompt"])
            rows.append(encode_prompt(record, tokenizer, add_bos=add_bos, template=template))
            check_length(rows[-1], max_length, f"the prompt {excerpt(record['prompt'])}")
    return pad(rows, tokenizer, pad_to, left=True)


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
        with named(place(record, i)):
            check_columns(record, ["answer"])
            answer = record["answer"]
            answer = str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else answer
            rows.append(tokenizer.encode(_text(answer, "answer")))
            check_length(rows[-1], max_length, f"the answer {excerpt(answer)}")
    return pad(rows, tokenizer, pad_to, left=False)


def encode_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    add_bos: bool = False,
    template: Template | None = None,
) -> Examples:
    """Tokenise supervised examples; what the model should learn to write is masked in, EOS included.

    `prompt` + `completion`: the completion is trained. `messages`: every assistant turn is trained. `text`:
    all of it is trained. Each example ends with EOS, and that EOS is trained: a model that never sees it
    never stops.

    max_length, pad_to, add_bos, template: as `encode_prompts`; max_length counts EOS.

    Returns Examples(tokens [N, T], loss_mask [N, T], lengths [N]).
    Raises ValueError, naming the record, if its columns are none of these, a prompt or completion is empty,
    a conversation does not end with the assistant, it is too long, or nothing in it is trained.
    """
    template = template or template_for(tokenizer)
    rows = []
    for i, record in enumerate(records):
        with named(place(record, i)):
            rows.append(encode_example(record, tokenizer, add_bos=add_bos, template=template))
            check_length(rows[-1][0], max_length, "the example with its EOS")
    return pad_examples(rows, tokenizer, pad_to)


def encode_example(
    record: Record,
    tokenizer: Tokenizer,
    *,
    add_bos: bool = False,
    template: Template | None = None,
) -> Ids:
    """Tokenise one record as `encode_examples` does. Returns (ids, loss mask), two lists of T."""
    if "messages" in record:
        ids, mask = _render(record, record["messages"], tokenizer, template)
        _check_last(record["messages"], "messages")
        if any(mask) and ids[_last(mask)] != tokenizer.eos_id:  # a template that does not write EOS itself
            end = _last(mask) + 1
            ids, mask = [*ids[:end], tokenizer.eos_id], [*mask[:end], True]
    elif "completion" in record:
        check_columns(record, ["prompt"])
        ids, mask = encode_response(record, "completion", tokenizer, add_bos=add_bos, template=template)
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


def encode_response(
    record: Record,
    column: str,
    tokenizer: Tokenizer,
    *,
    add_bos: bool = False,
    template: Template | None = None,
) -> Ids:
    """Tokenise the prompt of a record and its response in `column`, with what the response trains.

    Texts are tokenised one by one, as at sampling time, and EOS follows. After a prompt of messages the
    response is an assistant's text or messages; the template renders both as one conversation, of which the
    prompt's part is masked out, an earlier assistant turn too. It ends with the last trained token, EOS.

    Raises ValueError if either is empty, the response is not the assistant's, or the template does not
    continue its own prompt.
    """
    prompt, response = encode_prompt(record, tokenizer, add_bos=add_bos, template=template), record[column]
    if isinstance(record["prompt"], str):
        text = _end(tokenizer.encode(_text(_content(response, column), column)), tokenizer)
        return prompt + text, [False] * len(prompt) + [True] * len(text)
    if not isinstance(response, list):
        response = [{"role": "assistant", "content": _text(response, column)}]
    with named(repr(column)):
        check_messages(response)
    if response[0]["role"] != "assistant":
        raise ValueError(
            f"{column!r} begins with a message of the {response[0]['role']}; expected the assistant's. What stands "
            "before it belongs to `prompt`"
        )
    _check_last(response, column)
    ids, mask = _render(record, [*record["prompt"], *response], tokenizer, template)
    if ids[: len(prompt)] != prompt:
        raise ValueError(
            f"the chat template writes the prompt differently once {column!r} follows, so the response's tokens "
            "cannot be told apart. Use another template, or give prompt and response as text"
        )
    mask = [False] * len(prompt) + mask[len(prompt) :]
    if not any(mask):
        raise ValueError(f"{column!r} trains on nothing: the chat template marks no token of it as the assistant's")
    end = _last(mask) + 1
    ids, mask = ids[:end], mask[:end]
    return (ids, mask) if ids[-1] == tokenizer.eos_id else ([*ids, tokenizer.eos_id], [*mask, True])


def encode_prompt(
    record: Record, tokenizer: Tokenizer, *, add_bos: bool = False, template: Template | None = None
) -> list[int]:
    """Tokenise the prompt of one record as `encode_prompts` does. Returns its ids."""
    prompt = record["prompt"]
    if not isinstance(prompt, list):
        return (_bos(tokenizer) if add_bos else []) + tokenizer.encode(_text(prompt, "prompt"))
    if not prompt:
        raise ValueError("the prompt is an empty list; expected at least one message")
    ids = _render(record, prompt, tokenizer, template, add_generation_prompt=True)[0]
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "the prompt ends with a message of the assistant; expected the user's, or another that is to be answered. "
            "Move the last message to the response, or remove it"
        )
    return ids


def template_for(tokenizer: Tokenizer) -> Template:
    """The chat template that the tokeniser brings, or ChatML."""
    return template_of(tokenizer) or chatml


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


def check_length(ids: Sequence[int], max_length: int | None, what: str) -> None:
    """Raise ValueError if there are more than `max_length` ids; None is no limit."""
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"{what} has {len(ids)} tokens, longer than max_length = {max_length}. Raise the limit or remove the record"
        )


def pad_examples(rows: Sequence[Ids], tokenizer: Tokenizer, width: int | None = None) -> Examples:
    """Put (ids, loss mask) of N sequences into arrays `width` wide, by default as wide as the longest."""
    tokens, lengths = pad([ids for ids, _ in rows], tokenizer, width, left=False)
    loss_mask = np.zeros(tokens.shape, np.float32)
    for row, (_, mask) in zip(loss_mask, rows, strict=True):
        row[: len(mask)] = mask
    return Examples(tokens, loss_mask, lengths)


def pad(rows: list[list[int]], tokenizer: Tokenizer, width: int | None, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows padded to one width [N, W] int32, lengths [N] int32)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths.max(initial=0))
    if width is not None and width < longest:
        raise ValueError(f"pad_to = {width} is less than the longest row, {longest} tokens (row {lengths.argmax()})")
    tokens = np.full((len(rows), longest if width is None else width), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[len(row) - len(ids) if left else 0 :][: len(ids)] = ids
    return tokens, lengths


def _render(record: Record, messages: Any, tokenizer: Tokenizer, template: Template | None, **knobs: Any) -> Ids:
    """The template's tokens and mask; the record's `tools` go to it."""
    template, tools = template or template_for(tokenizer), record.get("tools")
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"'tools' is {excerpt(tools)}; expected a list of objects, one for each tool")
        takes = inspect.signature(template).parameters
        if "tools" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise ValueError(
                "the record has `tools` and the chat template takes none, so the model would not read of them. Use a "
                "template with the keyword `tools`, or remove the column"
            )
        knobs["tools"] = tools
    return template(messages, tokenizer, **knobs)


def _check_last(messages: Any, column: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{column!r} ends with a message of the {messages[-1]['role']}; expected the assistant's, which is what "
            "the model learns to write. Remove the last message or answer it"
        )


def _content(response: Any, column: str) -> Any:
    """The text of a response to a text: it may come as one assistant message."""
    if not isinstance(response, list):
        return response
    roles = [message.get("role") if isinstance(message, dict) else None for message in response]
    if roles != ["assistant"]:
        raise ValueError(
            f"the {column} is a list but not of one assistant message: {excerpt(response)}. Put the "
            "whole conversation under `messages`, or write the prompt as messages too"
        )
    return response[0].get("content")


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{column!r} is {excerpt(value)} ({kind}), expected text: put it in quotes")
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


def _last(mask: Sequence[bool]) -> int:
    return max(i for i, trained in enumerate(mask) if trained)
