"""From a data name or file to records, tokenizer and arrays: what the recipes share."""

import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data import arithmetic, preferences, records, sources
from jaxrl.data.chat import turn_ends
from jaxrl.data.sources import Record
from jaxrl.data.split import split_by_problem
from jaxrl.data.tokenizer import Tokenizer, load_tokenizer
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import rewards
from jaxrl.posttrain.filling import Filling
from jaxrl.posttrain.rewards.exact import Answers
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.types import Labelled, Pairs, Prompts, Rollout, TokenBatch

BUILT_IN = {"arithmetic": arithmetic.problems, "sloppy_arithmetic": arithmetic.sloppy_problems}
"""Data that needs no file."""


class Task(NamedTuple):
    """Records on both sides of the split, and how to read them."""

    training: list[Record]
    held_out: list[Record]
    tokenizer: Tokenizer
    marker: str


def load_task(data: str, *, tokenizer: Tokenizer | str, marker: str, held_out: int, columns: tuple[str, ...]) -> Task:
    """Reads and splits the data.

    Args:
      data: a name of `BUILT_IN`, a JSONL file, several with commas between them, or a glob pattern.
      tokenizer: a tokenizer, or what `load_tokenizer` takes; empty chooses the built-in data's own, else bytes.
      marker: text after which an answer stands; empty is that of built-in data, else none.
      held_out: problems kept out of training; 0 takes a fifth of the data, at most 512.
      columns: columns that every record must have.

    Raises:
      ValueError: when the data is neither a name nor a file, or misses a column.
    """
    rows, built_in = load_records(data, columns=columns), data in BUILT_IN
    if any("chosen" in record for record in rows):  # two conversations may hold their prompt
        rows = [_with_prompt(record, i) for i, record in enumerate(rows)]
    if isinstance(tokenizer, str):
        tokenizer = arithmetic.tokenizer() if built_in and not tokenizer else load_tokenizer(tokenizer or "byte")
    column = next((name for name in ("prompt", "messages", "text") if rows and name in rows[0]), "prompt")
    held_out = held_out or min(512, max(len(rows) // 5, 1))
    training, kept_back = split_by_problem(rows, held_out=held_out, column=column)
    return Task(training, kept_back, tokenizer, marker or (arithmetic.MARKER if built_in else ""))


def load_records(data: str, *, columns: tuple[str, ...]) -> list[Record]:
    """The records of built-in data or of files, as `load_task` names them; errors as there."""
    if data in BUILT_IN:
        return BUILT_IN[data]()
    names = [data] if Path(data).exists() or "," not in data else [name.strip() for name in data.split(",")]
    for name in names:
        if not Path(name).exists() and not glob.has_magic(name):
            raise ValueError(f"data {name!r} is no file; expected a .jsonl file or one of {', '.join(BUILT_IN)}")
    return sources.read_records(names, require=columns)


def _with_prompt(record: Record, number: int) -> Record:
    with sources.named(sources.place(record, number)):
        return preferences.with_prompt(record)


def prompts_of(
    rows: list[Record], tokenizer: Tokenizer, *, pad_to: int | None = None, add_bos: bool = False
) -> Prompts:
    """Left-padded prompts of records; `add_bos` as in `data.encode_prompts`."""
    tokens, lengths = records.encode_prompts(rows, tokenizer, pad_to=pad_to, add_bos=add_bos)
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths))


def answers_of(rows: list[Record], tokenizer: Tokenizer) -> Answers:
    """Right-padded answers of records."""
    tokens, lengths = records.encode_answers(rows, tokenizer)
    return Answers(jnp.asarray(tokens), jnp.asarray(lengths))


def examples_of(rows: list[Record], tokenizer: Tokenizer) -> TokenBatch:
    """Supervised examples of records."""
    examples = records.encode_examples(rows, tokenizer)
    return TokenBatch(jnp.asarray(examples.tokens), jnp.asarray(examples.loss_mask, jnp.float32))


def pairs_of(rows: list[Record], tokenizer: Tokenizer) -> Pairs:
    """Chosen and rejected responses of records, all of one width."""
    return jax.tree.map(jnp.asarray, preferences.encode_pairs(rows, tokenizer))


def labelled_of(rows: list[Record], tokenizer: Tokenizer) -> Labelled:
    """Responses of records with their labels."""
    return jax.tree.map(jnp.asarray, preferences.encode_labelled(rows, tokenizer))


def longest_of(rows: list[Record], tokenizer: Tokenizer) -> int:
    """Tokens of the longest sequence that records of any form teach, its EOS included; 0 of none."""
    lengths = [0]
    for i, record in enumerate(rows):
        with sources.named(sources.place(record, i)):
            if "chosen" in record or "rejected" in record:
                lengths += [len(ids) for ids, _ in preferences.encode_pair(record, tokenizer)]
            else:
                lengths.append(len(records.encode_example(record, tokenizer)[0]))
    return max(lengths)


def text_of(completions: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Decoded completions, without what stands after their end."""
    rows = zip(np.asarray(completions.completions), np.asarray(completions.lengths), strict=True)
    return [tokenizer.decode(row[:length].tolist()) for row, length in rows]


def stops(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The sampler's stop sequences: tokens besides EOS that end a turn of a chat model (`data.chat.turn_ends`)."""
    return tuple((i,) for i in turn_ends(tokenizer))


def make_generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    samples: int = 1,
    filling: Filling | None = None,
) -> Callable:
    """A compiled `(params, prompts, key) -> Rollout`; a chat model stops at the end of its turn.

    With a `filling` completions are masks that are filled in.
    """
    ids: dict[str, Any] = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "samples": samples}
    if filling is not None:
        return jax.jit(partial(filling.sampler(), model, sampling=sampling, **ids))

    @jax.jit
    def generate(params, prompts: Prompts, key):
        return rollout(
            model,
            params,
            prompts,
            key,
            sampling=sampling,
            stop=stops(tokenizer),
            **ids,
        )

    return generate


def score_texts(
    reward: rewards.Reward, completions: Rollout, rows: list[Record], tokenizer: Tokenizer, *, samples: int
) -> rewards.Scored:
    """A Python reward of completions, `samples` of each record, whose further columns it is given."""
    names = set().union(*rows) - {"prompt", "completion"}
    columns = {name: [record.get(name) for record in rows] for name in sorted(names)}
    prompts = [record["prompt"] for record in rows]
    return rewards.score_parts(reward, completions, tokenizer, prompts, columns, samples=samples)
