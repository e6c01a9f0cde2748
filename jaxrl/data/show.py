"""Show one tokenised example: what the model reads, what it is trained to write, and where it should stop."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from jaxrl.data.chat import Template, chatml
from jaxrl.data.records import encode_answers, encode_example, encode_prompts, named, read_jsonl
from jaxrl.data.tokenizer import Tokenizer


def show(path: str | Path, tokenizer: Tokenizer, index: int = 0, *, template: Template = chatml) -> Text:
    """Return one record of a JSON Lines file, tokenised, with its loss mask and EOS marked.

    Trained tokens are green and EOS stands out; without colours the same is said in words, one line per run
    of tokens. A record with `prompt` and `answer` shows what the sampler reads and what the reward expects.

    Raises ValueError if the file has no such record, or as `read_jsonl` and `encode_examples`.
    """
    records = read_jsonl(path)
    if not 0 <= index < len(records):
        raise ValueError(f"no record {index}; {path} holds {len(records)}, counted from 0")
    title = f"record {index} of {len(records)}"
    with named(title):
        return show_record(records[index], tokenizer, title=f"{path}, {title}", template=template)


def show_record(record: dict[str, Any], tokenizer: Tokenizer, *, title: str, template: Template = chatml) -> Text:
    """Return one record, tokenised, as `show` does."""
    answer = None
    if "answer" in record and not {"completion", "messages", "text"} & set(record):
        ids = encode_prompts([record], tokenizer, template=template)[0][0].tolist()
        mask = [False] * len(ids)
        answer = encode_answers([record], tokenizer)[0][0].tolist()
    else:
        ids, mask = encode_example(record, tokenizer, template=template)
    text = Text(f"{title}\ncolumns: {', '.join(record)}\n")
    trained = "the model writes the rest" if answer is not None else f"{sum(mask)} trained"
    text.append(f"{len(ids)} tokens, {trained}\n\n", style="bold")
    for token, is_trained in zip(ids, mask, strict=True):
        text.append(_shown(token, tokenizer), style=_style(token, is_trained, tokenizer))
    text.append("\n\n")
    for start, end in _runs(mask):
        words = repr("".join(_shown(t, tokenizer, newline="\n") for t in ids[start:end]))
        text.append(f"{start:>5} to {end - 1:<5} {'trained' if mask[start] else 'read':<8} {words}\n")
    if answer is not None:
        text.append(f"\nexpected answer: {record['answer']!r} ({len(answer)} tokens: {answer})\n", style="green")
    elif ids[-1] == tokenizer.eos_id and mask[-1]:
        text.append(f"\nEOS (id {tokenizer.eos_id}) ends the example and is trained\n", style="green")
    else:
        last = int(np.flatnonzero(mask)[-1])
        stands = "is EOS" if ids[last] == tokenizer.eos_id else "is not EOS: the model does not learn to stop"
        text.append(f"\nthe last trained token, {last}, {stands}\n", style="yellow")
    return text


def _runs(mask: list[bool]) -> list[tuple[int, int]]:
    """Return [start, end) of each stretch of equal values."""
    edges = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _shown(token: int, tokenizer: Tokenizer, newline: str = "⏎\n") -> str:
    return tokenizer.token_text(token).replace("\n", newline)


def _style(token: int, trained: bool, tokenizer: Tokenizer) -> str:
    style = "green" if trained else "dim"
    return f"{style} reverse" if token in (tokenizer.eos_id, tokenizer.bos_id) else style
