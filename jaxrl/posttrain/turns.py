"""Completions in several turns: the model writes as far as a call of a tool, reads the result and writes on.

Python stands between the turns, a compiled sampler inside each. A turn reads the prompt and all that was said anew, so
nothing is carried over but tokens; few widths and powers of two of rows are compiled.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import draw
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.posttrain.tools import Form, Result, Tool, call, tags
from jaxrl.types import Finish, Prompts, Rollout

PARTS = 4
"""The budget in so many parts gives the widths that are compiled."""


class Talk(NamedTuple):
    """`rollout`: with its `given`. `calls`, `failures`: `[B]`, calls of each completion, and those that failed."""

    rollout: Rollout
    calls: np.ndarray
    failures: np.ndarray


@dataclasses.dataclass
class _Row:
    """One completion as it grows. Both log-probs are 0 where `given`."""

    prompt: list[int]
    tokens: list[int]
    given: list[bool]
    log_probs: list[float]
    behaviour: list[float]
    finish: int = -1
    calls: int = 0
    failures: int = 0

    def add(self, tokens, log_probs, behaviour, *, given: bool = False) -> None:
        self.tokens += tokens
        self.log_probs += log_probs
        self.behaviour += behaviour
        self.given += [given] * len(tokens)


def make_talk(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tools: Sequence[Tool],
    *,
    sampling: Sampling,
    form: Form | None = None,
    turns: int = 4,
    samples: int = 1,
    stop: Sequence[Sequence[int]] = (),
    timeout: float = 10.0,
    limit: int = 1000,
) -> Callable[[Any, Prompts, jax.Array], Talk]:
    """A sampler with tools, `(params, prompts, key) -> Talk`.

    In each turn a row is sampled as far as EOS, a stop sequence, the end of a call or its budget. A call is answered
    and its row goes on; a row ends with `Finish.LENGTH` where the result leaves no room for another token, and with
    `Finish.STOP` where it calls in the last turn. What the model wrote stays the very tokens it drew, and a result is
    tokenised alone: a tokeniser run over both could join letters across the border, and the log-probs would be those of
    tokens that nobody drew. Results are encoded without special tokens, so no tool can forge the end of a turn.

    Args:
      model, tokenizer: the policy.
      tools: at least one; several need a form with names.
      sampling: how tokens are drawn; `max_tokens` is the budget `C` of all turns together, results included.
      form: of calls and results; None is `tools.tags()`.
      turns: how often the model writes at most: one more than the calls it may make.
      samples, stop: as in `rollout`.
      timeout, limit: as in `tools.call`.

    Returns:
      The sampler. The model must take caches of `context(P, C)` tokens for prompts of width P.

    Raises:
      ValueError: no tools, turns < 1, several tools and a form without names, a form that the tokeniser cannot write.
    """
    form = tags(named=len(tools) > 1) if form is None else form
    _check(tokenizer, tools, form, turns)
    budget, eos, pad = sampling.max_tokens, tokenizer.eos_id, tokenizer.pad_id
    before, after = tokenizer.encode(form.before), tokenizer.encode(form.after)
    ends = (*map(tuple, stop), tuple(tokenizer.encode(form.end)))

    def draw_tokens(params, prompts: Prompts, key, *, samples: int, width: int) -> Rollout:
        sizes = dataclasses.replace(sampling, max_tokens=width)
        return rollout(model, params, prompts, key, sampling=sizes, eos_id=eos, pad_id=pad, samples=samples, stop=ends)

    compiled = jax.jit(draw_tokens, static_argnames=("samples", "width"))

    def go_on(params, rows: list[_Row], key, prompt_width: int) -> Rollout:
        """The next tokens of the rows, after all they hold."""
        said = max(len(row.tokens) for row in rows)
        room = budget - min(len(row.tokens) for row in rows)
        texts = [row.prompt + row.tokens for row in rows]
        texts += texts[:1] * ((1 << (len(texts) - 1).bit_length()) - len(texts))
        width = prompt_width + _rounded(said, budget)
        tokens = np.full((len(texts), width), pad, np.int32)
        for place, text in zip(tokens, texts, strict=True):
            place[width - len(text) :] = text
        prompts = Prompts(jnp.asarray(tokens), jnp.asarray([len(text) for text in texts], jnp.int32))
        return compiled(params, prompts, key, samples=1, width=_rounded(room, budget))

    def answer(row: _Row, result: Result) -> None:
        ids, failed = _encoded(tokenizer, result)
        row.calls, row.failures = row.calls + 1, row.failures + failed
        ids = [*before, *ids, *after]
        if len(row.tokens) + len(ids) >= budget:
            row.finish = Finish.LENGTH
        else:
            row.add(ids, [0.0] * len(ids), [0.0] * len(ids), given=True)

    def talk(params, prompts: Prompts, key: jax.Array) -> Talk:
        width = prompts.tokens.shape[1]
        first = compiled(params, prompts, jax.random.fold_in(key, 0), samples=samples, width=budget)
        starts = zip(np.asarray(prompts.tokens), np.asarray(prompts.lengths), strict=True)
        texts = [ids[width - length :].tolist() for ids, length in starts for _ in range(samples)]
        rows = [_Row(text, [], [], [], []) for text in texts]
        unfinished, drawn = rows, first
        for turn in range(1, turns + 1):
            calls = _take(unfinished, jax.device_get(drawn), tokenizer, form, budget)
            if turn == turns:
                for row, _ in calls:
                    row.finish = Finish.STOP
            else:
                results = call(tools, form, [text for _, text in calls], timeout=timeout, limit=limit)
                for (row, _), result in zip(calls, results, strict=True):
                    answer(row, result)
            unfinished = [row for row, _ in calls if row.finish < 0]
            if not unfinished:
                break
            drawn = go_on(params, unfinished, jax.random.fold_in(key, turn), width)
        counts = [np.asarray([getattr(row, name) for row in rows], np.int32) for name in ("calls", "failures")]
        tokens = np.repeat(np.asarray(prompts.tokens), samples, axis=0)
        return Talk(_rollout(rows, tokens, budget=budget, pad=pad), *counts)

    return talk


def context(prompt_width: int, budget: int) -> int:
    """The longest cache that a turn asks for: P + C, and where what was said is long for one row and short for
    another, up to C more."""
    return prompt_width + 2 * budget


def asking(config) -> Callable:
    """The first half of a step's sampling, which is pure: `(state, problems) -> (state, prompts, rows, key)`.

    The problems are those that `grpo.make` draws for this `GRPOConfig`; advances `state.drawn`.
    """

    def ask(state, problems):
        rows = draw.rows_of(config, state, problems)
        key = jax.random.fold_in(jax.random.fold_in(state.key, (1 << 30) + 3), state.drawn)
        prompts = jax.tree.map(lambda x: x[rows], problems.prompts)
        return dataclasses.replace(state, drawn=state.drawn + 1), prompts, rows, key

    return ask


def sampler(
    ask: Callable,
    talk: Callable,
    *,
    params_of: Callable = lambda state: state.params,
    constrain: Callable = lambda batch: batch,
) -> Callable:
    """`sample` for `grpo.hosted`: the problems of a step, and completions with tools.

    Args:
      ask: from `asking`.
      talk: from `make_talk`, with the config's sampling and `samples` its group.
      params_of: from a state to what `talk` takes.
      constrain: as in `grpo.make`; the turns themselves are drawn by every device alike.

    Returns:
      `(state, problems) -> (state, Rollout, rows [prompts], metrics)`.
    """
    ask, place = jax.jit(ask), jax.jit(constrain)

    def sample(state, problems):
        state, prompts, rows, key = ask(state, problems)
        said = talk(params_of(state), jax.device_get(prompts), key)
        return state, place(said.rollout), rows, counts(said)

    return sample


def counts(said: Talk) -> dict[str, float]:
    """The metrics of a batch."""
    return {"tools/calls": float(said.calls.mean()), "tools/errors": float(said.failures.mean())}


def _check(tokenizer: Tokenizer, tools: Sequence[Tool], form: Form, turns: int) -> None:
    if not tools or turns < 1:
        raise ValueError(f"turns is {turns} with {len(tools)} tools; expected at least one turn and one tool")
    for name in ("begin", "end", "before", "after"):
        text = getattr(form, name)
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"the tokeniser cannot write {text!r}, the {name} of a call's form: {error}") from None
        if name in ("begin", "end") and tokenizer.decode(ids) != text:
            raise ValueError(
                f"the tokeniser reads {text!r}, the {name} of a call, as {tokenizer.decode(ids)!r}; choose a form "
                "whose marks are no special tokens"
            )
    if len(tools) > 1:
        try:
            unnamed = not form.read("x")[0]
        except ValueError:
            unnamed = False
        if unnamed:
            raise ValueError(f"{len(tools)} tools and calls without a name; use tags(named=True) or hermes()")


def _take(rows: list[_Row], drawn: Rollout, tokenizer: Tokenizer, form: Form, budget: int) -> list[tuple[_Row, str]]:
    """Puts what was drawn into its rows. Returns the rows that call a tool, with the text of the call."""
    calls = []
    for i, row in enumerate(rows):
        size = min(int(drawn.lengths[i]), budget - len(row.tokens))
        ids = drawn.completions[i, :size].tolist()
        cut = _first_end(ids, tokenizer, form)
        row.add(ids[:cut], drawn.log_probs[i, :cut].tolist(), drawn.behaviour_log_probs[i, :cut].tolist())
        text, end, _ = tokenizer.decode(ids[:cut]).partition(form.end)
        if end and form.begin in text:
            calls.append((row, text.rpartition(form.begin)[2]))
        elif end:
            row.finish = Finish.STOP
        else:
            row.finish = Finish.LENGTH if size < drawn.lengths[i] else int(drawn.finish[i])
    return calls


def _first_end(ids: list[int], tokenizer: Tokenizer, form: Form) -> int:
    """How many of the tokens it takes until their text holds the end of a call: the model may spell it otherwise than
    the tokeniser does, and then the sampler has gone on."""
    if form.end not in tokenizer.decode(ids):
        return len(ids)
    return next(n for n in range(1, len(ids) + 1) if form.end in tokenizer.decode(ids[:n]))


def _encoded(tokenizer: Tokenizer, result: Result) -> tuple[list[int], bool]:
    """Tokens of a result; one with letters that the tokeniser has not is an error, as short as it takes."""
    for text, failed in ((result.text, result.failed), ("error", True)):
        try:
            return tokenizer.encode(text, special=False), failed
        except ValueError:
            continue
    return [], True


def _rounded(length: int, budget: int) -> int:
    """Up to the next of `PARTS` widths."""
    step = -(-budget // PARTS)
    return min(-(-length // step) * step, budget)


def _rollout(rows: list[_Row], prompts: np.ndarray, *, budget: int, pad: int) -> Rollout:
    def filled(name: str, empty, kind) -> np.ndarray:
        table = np.full((len(rows), budget), empty, kind)
        for place, row in zip(table, rows, strict=True):
            values = getattr(row, name)
            place[: len(values)] = values
        return table

    return Rollout(
        tokens=jnp.asarray(np.concatenate([prompts, filled("tokens", pad, np.int32)], axis=1)),
        prompt_lengths=jnp.asarray([len(row.prompt) for row in rows], jnp.int32),
        lengths=jnp.asarray([len(row.tokens) for row in rows], jnp.int32),
        finish=jnp.asarray([row.finish for row in rows], jnp.int32),
        log_probs=jnp.asarray(filled("log_probs", 0.0, np.float32)),
        behaviour_log_probs=jnp.asarray(filled("behaviour", 0.0, np.float32)),
        prompt_width=prompts.shape[1],
        given=jnp.asarray(filled("given", False, bool)),
    )
