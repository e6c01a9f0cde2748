"""Show one tokenised record: what the model reads, what it is trained to write, and where it should stop."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from jaxrl.data.chat import Template
from jaxrl.data.preferences import encode_judged, encode_pair
from jaxrl.data.records import encode_answers, encode_example, encode_prompt, named
from jaxrl.data.sources import excerpt, read_records
from jaxrl.data.tokenizer import Tokenizer


def show(path: str | Path, tokenizer: Tokenizer, index: int = 0, *, template: Template | None = None) -> Text:
    """Return one record of a JSON Lines file, tokenised, with its loss mask and EOS marked.

    Trained tokens are green and EOS stands out; without colours the same is said in words, one line per run
    of tokens. A record with `prompt` and `answer` shows what the sampler reads and what the reward expects, one
    with `chosen` and `rejected` both responses after their prompt, one with a `label` what it says.

    Raises ValueError if the file has no such record, or as `read_records` and the encoders.
    """
    records = read_records(path)
    if not 0 <= index < len(records):
        raise ValueError(f"no record {index}; {path} holds {len(records)}, counted from 0")
    title = f"record {index} of {len(records)}"
    with named(title):
        return show_record(records[index], tokenizer, title=f"{path}, {title}", template=template)


def show_record(record: dict[str, Any], tokenizer: Tokenizer, *, title: str, template: Template | None = None) -> Text:
    """Return one record, tokenised, as `show` does."""
    text = Text(f"{title}\ncolumns: {', '.join(record)}\n")
    if {"chosen", "rejected"} & set(record):
        _pair(text, record, tokenizer, template)
    elif "answer" in record and not {"completion", "messages", "text"} & set(record):
        ids = encode_prompt(record, tokenizer, template=template)
        answer = encode_answers([record], tokenizer)[0][0].tolist()
        text.append(f"{len(ids)} tokens, the model writes the rest\n\n", style="bold")
        _tokens(text, ids, [False] * len(ids), tokenizer)
        text.append(f"\nexpected answer: {record['answer']!r} ({len(answer)} tokens: {answer})\n", style="green")
    else:
        if "label" in record and "completion" in record:
            ids, mask, label = encode_judged(record, tokenizer, template=template)
            text.append(
                f"label: the completion is {'' if label else 'not '}wanted\n", style="green" if label else "red"
            )
        else:
            ids, mask = encode_example(record, tokenizer, template=template)
        text.append(f"{len(ids)} tokens, {sum(mask)} trained\n\n", style="bold")
        _tokens(text, ids, mask, tokenizer)
        _end(text, ids, mask, tokenizer)
    return text


def _pair(text: Text, record: dict[str, Any], tokenizer: Tokenizer, template: Template | None) -> None:
    sides = dict(zip(("chosen", "rejected"), encode_pair(record, tokenizer, template=template), strict=True))
    if record.get("margin") is not None:
        text.append(f"margin: {excerpt(record['margin'])[1:-1]}\n")
    start = min(mask.index(True) for _, mask in sides.values())
    text.append(f"prompt: {start} tokens\n\n", style="bold")
    _tokens(text, sides["chosen"][0][:start], [False] * start, tokenizer)
    for name, (ids, mask) in sides.items():
        text.append(f"\n{name}: {len(ids) - start} tokens, {sum(mask)} trained\n\n", style="bold")
        _tokens(text, ids, mask, tokenizer, start=start)
        _end(text, ids, mask, tokenizer)


def _tokens(text: Text, ids: list[int], mask: list[bool], tokenizer: Tokenizer, *, start: int = 0) -> None:
    """Append tokens from `start` on, coloured, then the same as one line for each run of the mask."""
    for token, trained in zip(ids[start:], mask[start:], strict=True):
        text.append(_shown(token, tokenizer), style=_style(token, trained, tokenizer))
    text.append("\n\n")
    for first, end in _runs(mask, start):
        words = repr("".join(_shown(t, tokenizer, newline="\n") for t in ids[first:end]))
        text.append(f"{first:>5} to {end - 1:<5} {'trained' if mask[first] else 'read':<8} {words}\n")


def _end(text: Text, ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> None:
    """Append where the model learns to stop."""
    if ids[-1] == tokenizer.eos_id and mask[-1]:
        text.append(f"\nEOS (id {tokenizer.eos_id}) ends the example and is trained\n", style="green")
    else:
        last = int(np.flatnonzero(mask)[-1])
        stands = "is EOS" if ids[last] == tokenizer.eos_id else "is not EOS: the model does not learn to stop"
        text.append(f"\nthe last trained token, {last}, {stands}\n", style="yellow")


def _runs(mask: list[bool], start: int) -> list[tuple[int, int]]:
    """Return [first, end) of each stretch of equal values from `start` on."""
    edges = [start, *(i for i in range(start + 1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _shown(token: int, tokenizer: Tokenizer, newline: str = "⏎\n") -> str:
    return tokenizer.token_text(token).replace("\n", newline)


def _style(token: int, trained: bool, tokenizer: Tokenizer) -> str:
    style = "green" if trained else "dim"
    return f"{style} reverse" if token in (tokenizer.eos_id, tokenizer.bos_id) else style
