"""Continuous batching in one program: rows that have ended give their place in the batch to those that wait.

`rollout` steps as often as its longest completion, at the cost of all its rows. Here a fixed number of slots decodes,
and an idle one takes the next row of the queue before the next step (as in Orca, Yu et al. 2022, OSDI): completions of
n tokens take about sum(n - 1) / slots steps, and the cache is as large as the slots, not as all rows.

All slots write the same column of the cache, as in `rollout`; a refill copies a prompt's keys and values into the
columns before it. When the last column is written, what is still seen slides to the left. (A ring of columns would need
no slide; but windows and causality go by the order of columns.)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain.rollout import (
    Drawn,
    Sampling,
    advance,
    as_rollout,
    check,
    draw,
    ending,
    no_completions,
    no_tail,
    prefill,
    with_token,
)
from jaxrl.types import Prompts, Rollout


def rollout_in_slots(
    model: LanguageModel,
    params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: Sampling,
    eos_id: int,
    pad_id: int,
    samples: int = 1,
    stop: Sequence[Sequence[int]] = (),
    slots: int,
) -> Rollout:
    """Samples completions like `rollout`, but decodes at most `slots` of them at once; pure, to be called inside `jit`.

    The noise of a token depends on the key, its row and its place in the row, so the completions do not depend on the
    number of slots, but for rounding. They differ from those of `rollout` for the same key, unless greedy.

    The keys and values of all prompts are kept, `[L, N, K, P, Dh]`, once for a group; those of the slots have
    `P + C + sqrt(3 (P + C))` columns. There is one queue, and a refill picks single rows of the cache: over a mesh,
    give each device a queue, prompts and a key of its own by `shard_map(..., check_vma=False)`.

    Args:
      model: its cache has rows on axis 1 and columns on axis 3 of k and v, as that of `nets.transformer`.
      params, prompts, key, sampling, eos_id, pad_id, samples, stop: as in `rollout`.
      slots: rows that are decoded at once.

    Returns:
      A `Rollout` with `B = N * samples` rows, in the order of `rollout`.

    Raises:
      ValueError: fewer than one slot, a cache without columns on axis 3, and what `rollout` refuses.
    """
    check(prompts, stop)
    if slots < 1:
        raise ValueError(f"slots is {slots}; expected at least 1: the rows that are decoded at once")
    number, prompt_width = prompts.tokens.shape
    rows, width = number * samples, sampling.max_tokens
    slots = min(slots, rows)
    span = prompt_width + width
    # a step reads every column, a slide costs about three such reads: together the least where they cost the same
    slack = math.isqrt(3 * span)
    columns = span + slack
    empty = _empty(model, slots, span, columns)
    unembedding = model.unembedding(params)

    def draw_one(row, step, hidden) -> Drawn:
        place = jax.random.fold_in(jax.random.fold_in(key, row), step)
        return draw(place, hidden, unembedding, sampling)

    def record(completions, row, step, tail, drawn: Drawn):
        """Writes a token of each row (none where it is past the last); the new tails, and which rows are over."""
        tail = with_token(tail, drawn.token)
        finish = ending(tail, eos_id=eos_id, stop=stop)
        values = {"tokens": drawn.token, "log_probs": drawn.log_prob, "behaviour": drawn.behaviour}
        written = {name: completions[name].at[row, step].set(x, mode="drop") for name, x in values.items()}
        written["finish"] = completions["finish"].at[row].set(finish, mode="drop")
        written["lengths"] = completions["lengths"].at[row].set(step + 1, mode="drop")
        return written, tail, (finish >= 0) | (step + 1 == width)

    hidden, prompt_cache, prompt_start = prefill(model, params, prompts, prompt_width)
    every = jnp.arange(rows)
    first = jax.lax.map(lambda row: draw_one(row, 0, hidden[row // samples]), every, batch_size=slots)
    completions = no_completions(rows, width, pad_id)
    completions, first_tail, over = record(completions, every, jnp.zeros_like(every), no_tail(rows, stop), first)
    queue, waiting = jnp.argsort(over), (~over).sum()  # rows that go on after their first token, in order

    def may_refill(state):
        return (state["row"] == rows).any() & (state["taken"] < waiting)

    def refill(state):
        """The first idle slot takes the next row."""
        slot, row, cache = jnp.argmax(state["row"] == rows), queue[state["taken"]], state["cache"]
        prompt, begin = row // samples, cache.length - prompt_width

        def copy(into, source):
            own = jax.lax.dynamic_slice_in_dim(source, prompt, 1, axis=1)
            return jax.lax.dynamic_update_slice(into, own, (0, slot, 0, begin, 0)[: into.ndim])

        return {
            **state,
            "cache": _mapped(copy, cache, prompt_cache),
            "row": state["row"].at[slot].set(row),
            "step": state["step"].at[slot].set(1),
            "tail": state["tail"].at[slot].set(first_tail[row]),
            "start": state["start"].at[slot].set(begin + prompt_start[prompt]),
            "taken": state["taken"] + 1,
        }

    def slide(state):
        """Moves the columns that may still be seen to the left, layer by layer."""

        def one(layer, x):
            kept = jax.lax.dynamic_index_in_dim(x, layer, keepdims=True)[:, :, :, slack:]
            return jax.lax.dynamic_update_slice(x, kept, (layer, *[0] * (x.ndim - 1)))

        cache = _mapped(lambda x: jax.lax.fori_loop(0, x.shape[0], one, x), state["cache"])
        return {**state, "cache": cache._replace(length=cache.length - slack), "start": state["start"] - slack}

    def decode(state):
        state = jax.lax.while_loop(lambda state: state["cache"].length == columns, slide, state)
        state = jax.lax.while_loop(may_refill, refill, state)
        row, step, tail = state["row"], state["step"], state["tail"]
        hidden, cache = advance(model, params, state["cache"], tail[:, -1], state["start"], columns)
        drawn = jax.vmap(draw_one)(row, step, hidden)
        completions, tail, over = record(state["completions"], row, step, tail, drawn)
        changed = {"completions": completions, "tail": tail, "row": jnp.where(over, rows, row), "step": step + 1}
        return {**state, **changed, "cache": cache}

    state = {
        "completions": completions,
        "cache": prompt_cache._replace(**empty),
        "row": jnp.full(slots, rows, every.dtype),  # past the last: idle
        "step": jnp.zeros(slots, every.dtype),  # tokens drawn
        "tail": no_tail(slots, stop),
        "start": jnp.zeros(slots, prompt_start.dtype),  # first column of its own
        "taken": jnp.int32(0),
    }
    unfinished = lambda state: (state["row"] < rows).any() | (state["taken"] < waiting)
    state = jax.lax.while_loop(unfinished, decode, state)
    return as_rollout(prompts, state["completions"], samples)


def _mapped(function, cache: Any, *others: Any) -> Any:
    """The cache with a function of each array of its keys and values, and of the same arrays of other caches."""
    of = lambda name: jax.tree.map(function, getattr(cache, name), *(getattr(other, name) for other in others))
    return cache._replace(k=of("k"), v=of("v"))


def _empty(model: LanguageModel, rows: int, span: int, columns: int) -> dict[str, Any]:
    """Keys and values like those of the model's own cache of `span` columns, but with more of them."""
    cache = jax.eval_shape(lambda: model.init_cache(rows, span))
    for x in jax.tree.leaves((cache.k, cache.v)):
        if x.ndim < 4 or x.shape[1] != rows or x.shape[3] != span:
            raise ValueError(
                f"the model's cache of {rows} rows and {span} columns holds an array of shape {x.shape}; expected "
                "[L, B, K, S, ...], as in nets.transformer: decode with rollout, or lay the cache out like that"
            )
    widened = lambda x: jnp.zeros((*x.shape[:3], columns, *x.shape[4:]), x.dtype)
    return {"k": jax.tree.map(widened, cache.k), "v": jax.tree.map(widened, cache.v)}
