"""Samplers of masked diffusion and of block diffusion: from masks to the record that every sampler returns.

A `Rollout` of theirs holds, as a token's log-prob, that at the pass which revealed it, given all that was visible then,
with the mask token ruled out: under the model itself in `log_probs`, under what was drawn from (guidance, temperature,
filters) in `behaviour_log_probs`. Their sum is the log-prob of the completion in the order in which it appeared, not
its likelihood, for which there is `log_likelihood`. Where order follows confidence, which tokens stay depends on what
was drawn, and the sum is a score only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.diffusion.likelihood import others
from jaxrl.kernels.attention import Causal, Chunked, Segments
from jaxrl.kernels.log_probs import select_log_probs
from jaxrl.nets.language_model import LanguageModel, logits
from jaxrl.posttrain.rollout import Sampling, as_rollout, behaviour_logits, categorical, check, repeat
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.types import Finish, Prompts, Rollout


class Filled(NamedTuple):
    """Places `[B, n]`: tokens, which are masked still, and both log-probs, 0 where nothing was revealed."""

    tokens: jax.Array
    open: jax.Array
    log_probs: jax.Array
    behaviour: jax.Array


def fill(
    hidden_of: Callable,
    unembedding: jax.Array,
    places: Filled,
    key: jax.Array,
    *,
    sampling: Sampling,
    unmasking: Unmasking,
    mask_id: int,
    eos_id: int,
) -> Filled:
    """Fills open places until none is left: the loop of every sampler here.

    Args:
      hidden_of: `tokens [B, n] -> (hidden, guided) [B, n, D]` of the places; the second is None without guidance.
      unembedding: `[D, V]`.
      places: tokens with the mask token where they are open.
      key: consumed.
      sampling, unmasking, mask_id, eos_id: as in `generate`.
    """
    steps = unmasking.steps or places.tokens.shape[1]
    rest, _ = others(unembedding, places.tokens, mask_id)
    eos = eos_id - (eos_id > mask_id)

    def first(order, quota):
        return jnp.argsort(jnp.argsort(order, axis=1), axis=1) < quota

    def step(carry):
        number, places = carry
        now, noise = jax.random.split(jax.random.fold_in(key, number))
        left = steps - number
        quota = -(-places.open.sum(1, keepdims=True) // left)
        chance = jax.random.uniform(noise, places.open.shape)
        anywhere = chance < 1.0 / left if unmasking.order == "ancestral" else first(chance + ~places.open, quota)

        def reveal(places):
            hidden, guided = hidden_of(places.tokens)
            token, log_prob, behaviour, confidence = _draw(
                now, hidden, guided, rest, eos, sampling=sampling, eos_rule=unmasking.eos
            )
            sure = unmasking.order == "confidence"
            shown = first(jnp.where(places.open, -confidence, jnp.inf), quota) if sure else anywhere
            shown &= places.open
            token = token + (token >= mask_id)
            put = lambda new, old: jnp.where(shown, new, old)
            return Filled(
                put(token, places.tokens),
                places.open & ~shown,
                put(log_prob, places.log_probs),
                put(behaviour, places.behaviour),
            )

        idle = unmasking.order == "ancestral"
        some = (anywhere & places.open).any()
        return number + 1, jax.lax.cond(some, reveal, lambda same: same, places) if idle else reveal(places)

    more = lambda carry: (carry[0] < steps) & carry[1].open.any()
    return jax.lax.while_loop(more, step, (jnp.int32(0), places))[1]


def generate(
    model: LanguageModel,
    params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: Sampling,
    unmasking: Unmasking = Unmasking(),  # noqa: B008  (immutable)
    mask_id: int,
    eos_id: int,
    pad_id: int,
    samples: int = 1,
) -> Rollout:
    """Completions of a masked diffusion model (Nie et al. 2025, arXiv 2502.09992, section 2.4); pure, for `jax.jit`.

    A completion is `sampling.max_tokens` masks that are filled block by block, every pass reading the whole row. It is
    cut behind its first EOS; when every row has one in the blocks that are done, the rest is not filled. Tokens are
    drawn by inversion, so the 32-bit Gumbel noise that makes rare tokens rarer (arXiv 2409.02908) does not occur.

    Args:
      model: the functions of a language model.
      params: its parameters.
      prompts: `tokens [N, P]` left-padded and `lengths [N]`.
      key: consumed.
      sampling: temperature (0 is greedy), filters, and the width `C` of completions.
      unmasking: order, blocks, steps, guidance, what is done about the EOS.
      mask_id: the mask token, which is never drawn.
      eos_id: the id that ends a completion, of which it is part.
      pad_id: written after the end.
      samples: completions for each prompt, in neighbouring rows.

    Returns:
      A `Rollout`; see the module on its log-probs.

    Raises:
      ValueError: misshapen prompts, or a width that the block does not divide.
    """
    check(prompts, ())
    width, length = prompts.tokens.shape[1], sampling.max_tokens
    block = unmasking.block or length
    if length % block:
        raise ValueError(f"max_tokens is {length} and block is {block}; expected a block that divides max_tokens")
    tokens, lengths = repeat(prompts.tokens, samples), repeat(prompts.lengths, samples)
    rows = tokens.shape[0]
    own = (jnp.arange(width + length)[None] >= (width - lengths)[:, None]).astype(jnp.int32)
    given = jnp.broadcast_to((jnp.arange(width + length) < width)[None], own.shape)
    whole = jnp.concatenate([tokens, jnp.full((rows, length), mask_id, tokens.dtype)], axis=1)
    hidden_of = _reader(model, params, given, own, unmasking.guidance, mask_id)

    def one(carry):
        number, whole, log_probs, behaviour = carry
        start = number * block
        read = partial(jax.lax.dynamic_slice_in_dim, start_index=width + start, slice_size=block, axis=1)
        write = lambda into, part, at: jax.lax.dynamic_update_slice_in_dim(into, part, at, axis=1)
        nothing = jnp.zeros((rows, block))
        done = fill(
            lambda part: jax.tree.map(read, hidden_of(write(whole, part, width + start))),
            model.unembedding(params),
            Filled(read(whole), jnp.ones((rows, block), bool), nothing, nothing),
            jax.random.fold_in(key, number),
            sampling=sampling,
            unmasking=unmasking,
            mask_id=mask_id,
            eos_id=eos_id,
        )
        whole = write(whole, done.tokens, width + start)
        return number + 1, whole, write(log_probs, done.log_probs, start), write(behaviour, done.behaviour, start)

    going = lambda carry: (carry[0] < length // block) & ~(carry[1][:, width:] == eos_id).any(1).all()
    zeros = jnp.zeros((rows, length))
    _, whole, log_probs, behaviour = jax.lax.while_loop(going, one, (jnp.int32(0), whole, zeros, zeros))
    return as_rollout(prompts, _cut(whole[:, width:], log_probs, behaviour, eos_id, pad_id), samples)


def infill(
    model: LanguageModel,
    params,
    tokens: jax.Array,
    open: jax.Array,
    key: jax.Array,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008  (immutable)
    unmasking: Unmasking = Unmasking(),  # noqa: B008  (immutable)
    mask_id: int,
    eos_id: int = -1,
    lengths: jax.Array | None = None,
) -> Rollout:
    """Fills any places of given rows, what stands after them included; pure.

    Args:
      model, params, key, sampling, unmasking, mask_id, eos_id: as in `generate`, but for `max_tokens` and `block`,
        which the places decide. An EOS is a token like any other.
      tokens: `[B, T]`, right-padded; those at open places are not read.
      open: `[B, T]` bool, to be filled.
      lengths: `[B]` real tokens of each row; None: all.

    Returns:
      A `Rollout` whose completions are the whole rows (`prompt_width` 0): `given` says which tokens were there before,
      `mask` is 1 on those that were filled in.

    Raises:
      ValueError: shapes that differ.
    """
    if tokens.ndim != 2 or open.shape != tokens.shape:
        raise ValueError(f"tokens have shape {tokens.shape} and open {open.shape}; expected [B, T] of both")
    rows, length = tokens.shape
    lengths = jnp.full(rows, length, jnp.int32) if lengths is None else lengths
    own = (jnp.arange(length)[None] < lengths[:, None]).astype(jnp.int32)
    open = open & (own > 0)
    zeros = jnp.zeros(tokens.shape)
    start = Filled(jnp.where(open, mask_id, tokens), open, zeros, zeros)
    options: dict[str, Any] = {"sampling": sampling, "unmasking": unmasking, "mask_id": mask_id, "eos_id": eos_id}
    done = fill(
        _reader(model, params, ~open, own, unmasking.guidance, mask_id),
        model.unembedding(params),
        start,
        key,
        **options,
    )
    return Rollout(
        tokens=done.tokens,
        prompt_lengths=jnp.zeros_like(lengths),
        lengths=lengths,
        finish=jnp.full(rows, Finish.LENGTH, jnp.int32),
        log_probs=done.log_probs,
        behaviour_log_probs=done.behaviour,
        prompt_width=0,
        given=~open,
    )


def generate_in_blocks(
    model: LanguageModel,
    params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: Sampling,
    unmasking: Unmasking,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    samples: int = 1,
) -> Rollout:
    """Completions of a block diffusion model (Arriola et al. 2025, arXiv 2503.09573, algorithm 2); pure.

    Keys and values of finished, clean blocks are cached, so a pass reads one block. As in training, blocks are counted
    from a row's first token: rows are moved so that all begin at a multiple of the block, and one that a prompt ends
    in is filled around it. The authors' orders are "ancestral" and, at one token a pass, "random".

    Args:
      model, params, prompts, key, sampling, mask_id, eos_id, pad_id, samples: as in `generate`.
      unmasking: `block` is that of training.

    Returns:
      A `Rollout`; see the module on its log-probs.

    Raises:
      ValueError: misshapen prompts, no block, or guidance.
    """
    check(prompts, ())
    block, length, width = unmasking.block, sampling.max_tokens, prompts.tokens.shape[1]
    if block < 1 or unmasking.guidance:
        raise ValueError(
            f"block is {block} and guidance is {unmasking.guidance}; expected the block of training, and no guidance, "
            "which this sampler does not have"
        )
    tokens, lengths = repeat(prompts.tokens, samples), repeat(prompts.lengths, samples)
    rows, head = tokens.shape[0], -(-width // block) * block
    columns = jnp.arange(-(-(head + length) // block) * block)[None]
    start = head - (-(-lengths // block) * block)[:, None]
    end = start + lengths[:, None]
    own, open = (columns >= start).astype(jnp.int32), columns >= end
    positions = jnp.maximum(columns - start, 0)
    whole = jnp.take_along_axis(tokens, jnp.clip(columns - end + width, 0, width - 1), axis=1)
    whole = jnp.where(open, mask_id, whole)
    mask = (Causal() | Chunked(block)) & Segments(own)
    first = max(head - block, 0)

    def read(part, at, cache):
        here = jax.lax.dynamic_slice_in_dim(positions, at, part.shape[1], axis=1)
        return model.apply(params, part, positions=here, mask=mask, cache=cache)

    cache = model.init_cache(rows, columns.shape[1])
    if first:
        cache = read(whole[:, :first], 0, cache)[1]

    def one(carry):
        at, whole, log_probs, behaviour, cache = carry
        slice_of = partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=block, axis=1)
        nothing = jnp.zeros((rows, block))
        done = fill(
            lambda part: (read(part, at, cache)[0], None),
            model.unembedding(params),
            Filled(slice_of(whole), slice_of(open), nothing, nothing),
            jax.random.fold_in(key, at),
            sampling=sampling,
            unmasking=unmasking,
            mask_id=mask_id,
            eos_id=eos_id,
        )
        written = (
            jax.lax.dynamic_update_slice_in_dim(into, part, at, axis=1)
            for into, part in ((whole, done.tokens), (log_probs, done.log_probs), (behaviour, done.behaviour))
        )
        return at + block, *written, read(done.tokens, at, cache)[1]

    def going(carry):
        return (carry[0] < columns.shape[1]) & ~(open & (carry[1] == eos_id)).any(1).all()

    zeros = jnp.zeros(whole.shape)
    _, *found, _ = jax.lax.while_loop(going, one, (jnp.int32(first), whole, zeros, zeros, cache))
    whole, log_probs, behaviour = (jnp.take_along_axis(x, end + jnp.arange(length)[None], axis=1) for x in found)
    return as_rollout(prompts, _cut(whole, log_probs, behaviour, eos_id, pad_id), samples)


def _reader(model, params, given, own, guidance: float, mask_id: int) -> Callable:
    """`tokens [B, T] -> (hidden, guided hidden or None)`, every token seeing all of its row that exists."""
    positions = jnp.maximum(jnp.cumsum(own, axis=1) - 1, 0)

    def read(tokens):
        if not guidance:
            return model.apply(params, tokens, positions=positions, mask=Segments(own))[0], None
        twice = lambda x: jnp.concatenate([x, x])
        both = jnp.concatenate([tokens, jnp.where(given, mask_id, tokens)])
        hidden, _ = model.apply(params, both, positions=twice(positions), mask=Segments(twice(own)))
        with_prompt, free = jnp.split(hidden, 2)
        return with_prompt, free + (guidance + 1.0) * (with_prompt - free)  # logits are linear in hidden states

    return read


def _draw(key, hidden, guided, rest, eos, *, sampling: Sampling, eos_rule: str):
    """A token for each place: its id among the others, both log-probs, and how sure the guided model is of it."""
    own = logits(hidden, rest)
    mixed = own if guided is None else logits(guided, rest)
    is_eos = jax.lax.broadcasted_iota(jnp.int32, mixed.shape, mixed.ndim - 1) == eos
    if eos_rule == "never":
        mixed = jnp.where(is_eos, -jnp.inf, mixed)
    filtered = behaviour_logits(mixed, sampling) if sampling.filters else mixed
    token = jnp.argmax(mixed, axis=-1) if sampling.temperature == 0 else categorical(key, filtered)
    token = token.astype(jnp.int32)
    confidence = jnp.exp(select_log_probs(mixed, token)[0])
    if eos_rule == "late":
        confidence = confidence - (token == eos)
    return token, select_log_probs(own, token)[0], select_log_probs(filtered, token)[0], confidence


def _cut(tokens, log_probs, behaviour, eos_id: int, pad_id: int) -> dict[str, jax.Array]:
    """Completions that end with their first EOS."""
    is_eos = tokens == eos_id
    before = jnp.cumsum(is_eos, axis=1) - is_eos == 0
    return {
        "tokens": jnp.where(before, tokens, pad_id),
        "log_probs": jnp.where(before, log_probs, 0.0),
        "behaviour": jnp.where(before, behaviour, 0.0),
        "lengths": before.sum(1, dtype=jnp.int32),
        "finish": jnp.where(is_eos.any(1), Finish.EOS, -1),
    }
