"""Preferences in TRL's columns: pairs of a better and a worse response, and responses labelled one by one."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl.data.chat import Template
from jaxrl.data.packing import best_fit, pack
from jaxrl.data.records import Examples, Ids, check_length, encode_response, pad_examples, template_for
from jaxrl.data.sources import Line, Record, check_columns, excerpt, named, place
from jaxrl.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # JAX is loaded where its batches are made: reading and showing data does without
    from jaxrl.types import Labelled, Pairs


def encode_pairs(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    add_bos: bool = False,
    template: Template | None = None,
) -> "Pairs":
    """Tokenise `prompt` + `chosen` + `rejected`, and `margin` where there is one.

    Prompt and responses are texts, or lists of messages. Where `chosen` and `rejected` are conversations and the
    prompt is not given (or given as text only), their common beginning is the prompt. Only what the assistant
    writes in the responses is masked in, EOS included.

    max_length, pad_to, add_bos, template: as `encode_examples`; max_length counts prompt, response and EOS.

    Returns Pairs of numpy arrays: chosen and rejected [N, T] of one width, margin [N] float32 or None.
    Raises ValueError, naming the record, if a column is missing or empty, both responses are the same, one does
    not end with the assistant, it is too long, a margin is not a finite number, or only some records have one.
    """
    from jaxrl.types import Pairs, TokenBatch

    template = template or template_for(tokenizer)
    chosen: list[Ids] = []
    rejected: list[Ids] = []
    margins: list[float | None] = []
    for i, record in enumerate(records):
        with named(place(record, i)):
            pair = encode_pair(record, tokenizer, add_bos=add_bos, template=template)
            for rows, name, response in zip((chosen, rejected), ("chosen", "rejected"), pair, strict=True):
                check_length(response[0], max_length, f"the prompt with the {name} response and its EOS")
                rows.append(response)
            margins.append(_margin(record.get("margin")))
            if (margins[-1] is None) != (margins[0] is None):
                fault = "no 'margin', unlike" if margins[-1] is None else "a 'margin', unlike"
                raise ValueError(f"it has {fault} the records before it; give one to all records, or to none")
    both = pad_examples(chosen + rejected, tokenizer, pad_to)
    half = len(records)
    batch = lambda rows: TokenBatch(both.tokens[rows], both.loss_mask[rows])  # pyright: ignore  (numpy for JAX)
    margin = None if not margins or margins[0] is None else np.array(margins, np.float32)
    return Pairs(batch(slice(half)), batch(slice(half, None)), margin)  # pyright: ignore


def encode_pair(
    record: Record, tokenizer: Tokenizer, *, add_bos: bool = False, template: Template | None = None
) -> tuple[Ids, Ids]:
    """Tokenise one record as `encode_pairs` does. Returns (ids, loss mask) of chosen and of rejected."""
    record = with_prompt(record)
    check_columns(record, ["prompt", "chosen", "rejected"])
    chosen, rejected = (
        encode_response(record, column, tokenizer, add_bos=add_bos, template=template)
        for column in ("chosen", "rejected")
    )
    if chosen[0] == rejected[0]:
        raise ValueError(
            f"chosen and rejected are the same tokens: {excerpt(record['chosen'])}. Nothing can be preferred; remove "
            "the record"
        )
    return chosen, rejected


def pack_pairs(pairs: "Pairs", width: int = 0) -> "Pairs":
    """Put several pairs into a row: each has its chosen response at one place of a row of the first side, and its
    rejected one at the same place of the same row of the second.

    pairs: N of them, from `encode_pairs`. width: tokens of a row; 0 takes the longest response.

    Returns Pairs of numpy arrays [R, width] with segments, without margins.
    Raises ValueError if a response is longer than a row.
    """
    from jaxrl.types import Pairs

    sides = []
    for side in (pairs.chosen, pairs.rejected):
        tokens, mask = np.asarray(side.tokens), np.asarray(side.loss_mask)
        lengths = mask.shape[1] - (mask[:, ::-1] > 0).argmax(axis=1)  # a response ends with the last that is trained
        sides.append(Examples(tokens, mask, lengths))
    longest = np.maximum(*(side.lengths for side in sides))
    width = width or int(longest.max())
    rows = best_fit(longest, width)
    chosen, rejected = (pack(side, width, rows=rows) for side in sides)
    return Pairs(chosen, rejected)


def encode_labelled(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    add_bos: bool = False,
    template: Template | None = None,
) -> "Labelled":
    """Tokenise `prompt` + `completion` + `label`, true where the completion is wanted (KTO).

    max_length, pad_to, add_bos, template: as `encode_examples`.

    Returns Labelled of numpy arrays: examples [N, T] with the completions masked in, desirable [N] bool.
    Raises ValueError, naming the record, as `encode_examples`, or if a label is neither true nor false.
    """
    from jaxrl.types import Labelled, TokenBatch

    template = template or template_for(tokenizer)
    rows, labels = [], []
    for i, record in enumerate(records):
        with named(place(record, i)):
            ids, mask, label = encode_judged(record, tokenizer, add_bos=add_bos, template=template)
            check_length(ids, max_length, "the example with its EOS")
            rows.append((ids, mask))
            labels.append(label)
    examples = pad_examples(rows, tokenizer, pad_to)
    batch = TokenBatch(examples.tokens, examples.loss_mask)  # pyright: ignore  (numpy for JAX)
    return Labelled(batch, np.array(labels, bool))  # pyright: ignore


def encode_judged(
    record: Record, tokenizer: Tokenizer, *, add_bos: bool = False, template: Template | None = None
) -> tuple[list[int], list[bool], bool]:
    """Tokenise one record as `encode_labelled` does. Returns (ids, loss mask, label)."""
    check_columns(record, ["prompt", "completion", "label"])
    label = record["label"]
    if not isinstance(label, bool | np.bool_):
        raise ValueError(
            f"'label' is {excerpt(label)} ({type(label).__name__}); expected true or false, without quotes: whether "
            "the completion is wanted"
        )
    ids, mask = encode_response(record, "completion", tokenizer, add_bos=add_bos, template=template)
    return ids, mask, bool(label)


def with_prompt(record: Record) -> Record:
    """The record, with its prompt written out where `chosen` and `rejected` are conversations that begin alike.

    Raises ValueError if they have no message in common and there is no `prompt`, or one is all of the other.
    """
    chosen, rejected, prompt = record.get("chosen"), record.get("rejected"), record.get("prompt")
    if isinstance(prompt, list) or not isinstance(chosen, list) or not isinstance(rejected, list):
        return record
    pairs = zip(chosen, rejected, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if common == 0:
        if prompt is not None:
            return record
        raise ValueError(
            "there is no `prompt`, and chosen and rejected have no message in common at their beginning; expected "
            "conversations that share it, or a column `prompt`"
        )
    if common == min(len(chosen), len(rejected)):
        what = "the same" if len(chosen) == len(rejected) else "the beginning one of the other"
        raise ValueError(f"chosen and rejected are {what}: {common} messages in common. Nothing can be preferred")
    explicit = {**record, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}
    return Line(explicit, record.where) if isinstance(record, Line) else explicit


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or abs(value) > 3e38 or math.isnan(value):
        raise ValueError(
            f"'margin' is {excerpt(value)} ({type(value).__name__}); expected a finite number, by how much the chosen "
            "response is better, or no margin at all"
        )
    return float(value)
