"""Speculative decoding: something small drafts tokens, the model checks them all in one pass, and the result is exact.

A step draws d_1 .. d_n from the draft's distributions q_j, reads them with the model and keeps the first a of them:

    d_j is kept with probability min(1, p_j(d_j) / q_j(d_j));   then one more from max(p_{a+1} - q_{a+1}, 0) / its sum

or from p_{n+1} where all were kept. What comes out has the model's own distribution, whatever the draft, and greedy
decoding gives the model's own tokens (Leviathan et al. 2022, arXiv 2211.17192, algorithm 1). p and q are the
distributions that are sampled from: temperature and filters act on both.

Rows keep different numbers, so each writes the cache at a column of its own, by `jax.vmap` over rows of one. A rejected
token's keys stand behind the row's cursor, where causality hides them, and are overwritten by the next pass: nothing is
moved, and windows see what they always see.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.kernels.log_probs import select_log_probs
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.multi_token import MultiToken
from jaxrl.posttrain.rollout import (
    Sampling,
    as_rollout,
    behaviour_logits,
    categorical,
    check,
    ending,
    no_completions,
    no_tail,
    repeat,
    with_token,
)
from jaxrl.types import Prompts, Rollout


class Drafter(NamedTuple):
    """What drafts, as pure functions.

    read(params, before [B, T, D], tokens [B, T], *, positions, mask, cache) -> (hidden, before, cache): reads tokens;
      `before` is what the model made of the token before each, and the one returned stands for it where the model has
      not read that far.
    unembedding(params) -> [D, V], of `hidden`.
    init_cache(batch, length) -> an empty cache like a `LanguageModel`'s.
    skip: so many first tokens of a row that it cannot read.
    """

    read: Callable
    unembedding: Callable
    init_cache: Callable
    skip: int = 0


def own_drafter(ahead: MultiToken) -> Drafter:
    """The first module of multi-token prediction, with the model's own parameters.

    For a second draft, and further ones, it reads its own output in the place of the Transformer's.
    """
    return Drafter(ahead.read, ahead.model.unembedding, ahead.init_cache, skip=1)


def small_drafter(model: LanguageModel) -> Drafter:
    """Another language model with the same tokens."""

    def read(params, before, tokens, **where):
        hidden, cache = model.apply(params, tokens, **where)
        return hidden, before, cache

    return Drafter(read, model.unembedding, model.init_cache)


class Drafts(NamedTuple):
    """How drafting went, int32 scalars: passes of the model after the prompt, tokens drafted, those kept.

    Rows that had ended do not count.
    """

    passes: jax.Array
    drafted: jax.Array
    kept: jax.Array

    @property
    def acceptance(self) -> jax.Array:
        """Share of the drafted tokens that were kept."""
        return self.kept / jnp.maximum(self.drafted, 1)


def speculative_rollout(
    model: LanguageModel,
    params,
    prompts: Prompts,
    key: jax.Array,
    *,
    drafter: Drafter,
    draft_params: Any = None,
    drafts: int = 1,
    sampling: Sampling,
    eos_id: int,
    pad_id: int,
    samples: int = 1,
    stop: Sequence[Sequence[int]] = (),
) -> tuple[Rollout, Drafts]:
    """Samples completions like `rollout`, in fewer passes; pure, to be called inside `jax.jit`.

    Same distribution as `rollout`, but other draws for the same key; greedy completions are the same, but where two
    logits are equal up to rounding. The caches have `P + C + drafts` columns.

    Args:
      model, params, prompts, key, sampling, eos_id, pad_id, samples, stop: as in `rollout`. The model is called under
        `jax.vmap`, with a cache like that of `nets.transformer`: rows on axis 1 of k and v, columns on axis 3. A
        plain `language_model` with a mixture of experts takes `experts=over_rows(experts)` of `nets.multi_token`.
      drafter: `own_drafter` of a model with multi-token prediction, or `small_drafter`.
      draft_params: its parameters; None: the model's.
      drafts: tokens drafted a pass.

    Returns:
      `(Rollout, Drafts)`. Both log-probs are the model's: that of the draft is no part of the distribution.

    Raises:
      ValueError: fewer than one draft, a cache without columns on axis 3 (linear layers keep a state, in which a
        rejected token would stay), and what `rollout` refuses.
    """
    check(prompts, stop)
    if drafts < 1:
        raise ValueError(f"drafts is {drafts}; expected at least 1: the tokens drafted for each pass of the model")
    number, prompt_width = prompts.tokens.shape
    rows, width, draft_params = number * samples, sampling.max_tokens, params if draft_params is None else draft_params
    columns, line = prompt_width + width + drafts, jnp.arange(rows)
    start = prompt_width - prompts.lengths
    for init_cache in (model.init_cache, drafter.init_cache):
        _check_columns(jax.eval_shape(lambda make=init_cache: make(number, columns)), columns)
    unembedding, draft_unembedding = model.unembedding(params), drafter.unembedding(draft_params)

    def read(tokens, cache, cursor, start):
        return at_own_columns(lambda x, **where: model.apply(params, x, **where), cache, cursor, start, tokens)

    def draft_read(before, tokens, cache, cursor, start):
        call = lambda *inputs, **where: drafter.read(draft_params, *inputs, **where)
        return at_own_columns(call, cache, cursor, start + drafter.skip, before, tokens)

    def distributions(hidden, unembedding):
        """Logits of the model, those that are sampled from, and their probabilities: [B, ..., V] float32."""
        logits = (hidden @ unembedding).astype(jnp.float32)
        filtered = behaviour_logits(logits, sampling) if sampling.filters else logits
        return logits, filtered, jax.nn.softmax(filtered, axis=-1)

    def record(state, tokens, count, logits, filtered):
        """Writes the first `count [B]` of `tokens [B, J]` to the rows that go on, each until it ends."""
        values = {
            "tokens": tokens,
            "log_probs": select_log_probs(logits, tokens)[0],
            "behaviour": select_log_probs(filtered, tokens)[0],
        }

        def one(state, column):
            place, values = column
            lengths, finish = state["lengths"], state["finish"]
            alive = (place < count) & (finish < 0) & (lengths < width)
            to = jnp.where(alive, lengths, width)  # past the last column: dropped
            written = {name: state[name].at[line, to].set(x, mode="drop") for name, x in values.items()}
            tail = jnp.where(alive[:, None], with_token(state["tail"], values["tokens"]), state["tail"])
            finish = jnp.where(alive, ending(tail, eos_id=eos_id, stop=stop), finish)
            return {**state, **written, "tail": tail, "finish": finish, "lengths": lengths + alive}, None

        by_column = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), values)
        return jax.lax.scan(one, state, (jnp.arange(tokens.shape[1]), by_column))[0]

    def ongoing(state):
        return (state["finish"] < 0) & (state["lengths"] < width)

    def draft(state, key, start):
        """Reads what was kept last, then drafts: tokens [B, n], their distributions [B, n, V], the cache."""
        cursor, kept = state["cursor"], state["kept_last"]
        at_kept = lambda x: jnp.take_along_axis(x, kept[:, None, None], axis=1)
        (hidden, before), cache = draft_read(
            state["before"], state["window"], state["draft_cache"], cursor - kept, start
        )

        def further(carry, inputs):
            place, key = inputs
            hidden, before, cache, cursor = carry
            _, filtered, q = distributions(hidden[:, 0], draft_unembedding)
            token = categorical(key, filtered)
            # the last draft is read in vain: one more step of a loop is smaller than a second body
            (hidden, before), cache = draft_read(before, token[:, None], cache, cursor + 1, start)
            return (hidden, before, cache, cursor + 1), (token, q)

        carry = (at_kept(hidden), at_kept(before), cache, cursor)
        keys = jax.random.split(key, drafts)
        (_, _, cache, _), (tokens, q) = jax.lax.scan(further, carry, (jnp.arange(drafts), keys))
        return tokens.T, jnp.swapaxes(q, 0, 1), cache

    def decode(state):
        keys = jax.random.split(jax.random.fold_in(key, state["passes"] + 1), 3)
        going = ongoing(state)
        drafted, q, draft_cache = draft(state, keys[0], state["start"])
        last = state["tail"][:, -1:]
        (hidden,), cache = read(jnp.concatenate([last, drafted], 1), state["cache"], state["cursor"], state["start"])
        logits, filtered, p = distributions(hidden, unembedding)

        of = lambda x: jnp.take_along_axis(x, drafted[..., None], axis=-1)[..., 0]
        accepted = jax.random.uniform(keys[1], drafted.shape) * of(q) < of(p[:, :-1])
        kept = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1)
        rest = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
        rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)  # p = q up to rounding
        rest = jnp.take_along_axis(rest, kept[:, None, None], axis=1)[:, 0]
        extra = categorical(keys[2], jnp.log(rest)).astype(jnp.int32)
        tokens = jnp.pad(drafted, ((0, 0), (0, 1))).at[line, kept].set(extra)
        state = record(state, tokens, kept + 1, logits, filtered)
        return {
            **state,
            "cache": cache,
            "draft_cache": draft_cache,
            "window": tokens,
            "before": hidden,
            "kept_last": kept,
            "cursor": state["cursor"] + jnp.where(ongoing(state), kept + 1, 0),
            "passes": state["passes"] + 1,
            "drafted": state["drafted"] + drafts * going.sum(dtype=jnp.int32),
            "kept": state["kept"] + jnp.where(going, kept, 0).sum(dtype=jnp.int32),
        }

    zeros = jnp.zeros(number, jnp.int32)
    (hidden,), cache = read(prompts.tokens, model.init_cache(number, columns), zeros, start)
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    empty = drafter.init_cache(number, columns)
    _, draft_cache = draft_read(before, prompts.tokens, empty, zeros, start)
    of_group = lambda cache: cache._replace(
        **{name: jax.tree.map(lambda x: repeat(x, samples, axis=1), getattr(cache, name)) for name in ("k", "v")}
    )
    last = repeat(hidden[:, -1:], samples)
    logits, filtered, _ = distributions(last, unembedding)
    first = categorical(jax.random.fold_in(key, 0), filtered[:, 0]).astype(jnp.int32)[:, None]
    one = jnp.ones(rows, jnp.int32)
    state = {**no_completions(rows, width, pad_id), "tail": no_tail(rows, stop)}
    state = {
        **record(state, first, one, logits, filtered),
        "cache": of_group(cache),
        "draft_cache": of_group(draft_cache),
        "start": repeat(start, samples),
        "cursor": prompt_width * one,  # column of the last token, which nobody has read yet
        # what the drafter has to read next, from column `cursor - kept_last` on; of use up to entry `kept_last`
        "window": jnp.pad(first, ((0, 0), (0, drafts))),
        "before": jnp.pad(last, ((0, 0), (0, drafts), (0, 0))),
        "kept_last": 0 * one,
        **dict.fromkeys(("passes", "drafted", "kept"), jnp.int32(0)),
    }
    state = jax.lax.while_loop(lambda state: ongoing(state).any(), decode, state)
    return as_rollout(prompts, state, samples), Drafts(state["passes"], state["drafted"], state["kept"])


def _check_columns(cache: Any, columns: int) -> None:
    for x in jax.tree.leaves((cache.k, cache.v)):
        if x.ndim < 4 or x.shape[3] != columns:
            raise ValueError(
                f"a cache of {columns} columns holds an array of shape {x.shape}; expected [L, B, K, S, ...], as in "
                "nets.transformer without linear layers: rejected tokens must be where they can be hidden. Decode with "
                "rollout"
            )


def at_own_columns(call: Callable, cache: Any, cursor: jax.Array, start: jax.Array, *inputs: jax.Array):
    """One pass over tokens of a batch whose rows write at different columns of the cache.

    Args:
      call: `(*inputs, positions, mask, cache) -> (*outputs, cache)`.
      cache: rows on axis 1, columns on axis 3 of k and v; its `length` is not looked at.
      cursor: `[B]`, the column of each row's first token; must leave room for all of them.
      start: `[B]`, the first column of a row's own, of position 0.
      inputs: `[B, T, ...]`.

    Returns:
      `(outputs, cache)`.
    """
    width, columns = inputs[-1].shape[1], jax.tree.leaves(cache.k)[0].shape[3]

    def one(k, v, cursor, start, *inputs):
        alone = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
        own = lambda columns: (columns >= start).astype(jnp.int32)[None]
        at = cursor + jnp.arange(width)
        *outputs, after = call(
            *(x[None] for x in inputs),
            positions=jnp.maximum(at - start, 0)[None],
            mask=Causal() & Segments(own(at), own(jnp.arange(columns))),
            cache=cache._replace(k=alone(k), v=alone(v), length=cursor),
        )
        k, v = jax.tree.map(lambda x: x[:, 0], (after.k, after.v))
        return [x[0] for x in outputs], k, v

    axes = (1, 1, 0, 0, *(0 for _ in inputs))
    outputs, k, v = jax.vmap(one, in_axes=axes, out_axes=(0, 1, 1))(cache.k, cache.v, cursor, start, *inputs)
    return outputs, cache._replace(k=k, v=v)
