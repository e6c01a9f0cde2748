"""The sampler: prefill once, then one jitted decode loop over a KV cache.

All rows share the column that is being written, so a step writes the cache in place; prompts are padded on the left and
positions start at 0 on a row's first real token. The loop leaves as soon as every row has ended.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.kernels.log_probs import select_log_probs
from jaxrl.nets.language_model import LanguageModel
from jaxrl.types import Finish, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters act in the order of the fields."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens that holds this much probability (nucleus, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens of at least this fraction of the top token's probability (arXiv 2407.01082)."""
    max_tokens: int = 64
    """Completion width `C`: the budget of new tokens, the EOS included."""

    def __post_init__(self):
        limits = {
            "temperature": (self.temperature >= 0, ">= 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, ">= 0 (0 keeps all tokens)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "max_tokens": (self.max_tokens >= 1, ">= 1"),
        }
        for name, (valid, expected) in limits.items():
            if not valid:
                raise ValueError(f"sampling {name} is {getattr(self, name)}; expected {expected}")

    @property
    def filters(self) -> bool:
        """Whether the sampled distribution differs from the model's own."""
        return self != Sampling(max_tokens=self.max_tokens)


def behaviour_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is sampled from.

    Args:
      logits: `[..., V]`, any float type.
      sampling: temperature, then top-k, then top-p, then min-p. Ties at the top-k and top-p borders are kept.

    Returns:
      `[..., V]` float32, -inf where a token cannot be drawn. Greedy keeps only the first of the largest logits.
    """
    logits = logits.astype(jnp.float32)
    vocabulary = logits.shape[-1]
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jax.lax.broadcasted_iota(best.dtype, logits.shape, logits.ndim - 1) == best, logits, -jnp.inf)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < vocabulary:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    if sampling.min_p > 0:
        cut = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= cut, logits, -jnp.inf)
    return logits


def categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """One draw from softmax(logits) for each row, by inversion of its distribution function in two levels.

    One uniform number a row, where `jax.random.categorical` takes one for every entry: on CPU a quarter of its time at
    a vocabulary of 2048. The uniform has 23 bits, so probabilities below 1e-7 are not resolved.

    Args:
      key: consumed.
      logits: `[..., V]` float32; an entry of -inf is never drawn.

    Returns:
      `[...]` int32.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    width = math.isqrt(logits.shape[-1] - 1) + 1
    blocks = -(-logits.shape[-1] // width)
    padded = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, blocks * width - logits.shape[-1])])
    padded = padded.reshape(*logits.shape[:-1], blocks, width)
    sums = padded.sum(-1)
    block, rest = _invert(sums, jax.random.uniform(key, logits.shape[:-1]) * sums.sum(-1))
    inside = jnp.take_along_axis(padded, block[..., None, None], axis=-2)[..., 0, :]
    return block * width + _invert(inside, rest)[0]


def _invert(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index whose cumulative weight exceeds the threshold, and how far the threshold reaches into it."""
    cumulative = jnp.cumsum(weights, axis=-1)
    index = (cumulative <= threshold[..., None]).sum(-1)
    columns = jax.lax.broadcasted_iota(index.dtype, weights.shape, weights.ndim - 1)
    index = jnp.minimum(index, jnp.where(weights > 0, columns, 0).max(-1))  # rounding may lead past the end
    before = jnp.take_along_axis(cumulative - weights, index[..., None], axis=-1)[..., 0]
    return index, threshold - before


class Drawn(NamedTuple):
    """A token for each row, its log-prob under the model, and under the distribution that it was drawn from."""

    token: jax.Array
    log_prob: jax.Array
    behaviour: jax.Array


def draw(
    key: jax.Array, hidden: jax.Array, unembedding: jax.Array, sampling: Sampling, allowed: jax.Array | None = None
) -> Drawn:
    """The next token of every row, given the hidden states `[..., D]` of the last ones; consumes the key.

    `allowed`: bool `[..., V]`, tokens that may be drawn, or None for all; log_prob is the unconstrained model's.
    """
    logits = (hidden @ unembedding).astype(jnp.float32)
    possible = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
    filtered = behaviour_logits(possible, sampling) if sampling.filters else possible
    token = jnp.argmax(possible, axis=-1) if sampling.temperature == 0 else categorical(key, filtered)
    log_prob = select_log_probs(logits, token)[0]
    behaviour = log_prob if filtered is logits else select_log_probs(filtered, token)[0]
    return Drawn(token.astype(jnp.int32), log_prob, behaviour)


def no_tail(rows: int, stop: Sequence[Sequence[int]]) -> jax.Array:
    """The last tokens of completions that have none yet: -1, `[rows, n]`, as many as `ending` looks at."""
    return jnp.full((rows, max(map(len, stop), default=1)), -1, jnp.int32)


def with_token(tail: jax.Array, token: jax.Array) -> jax.Array:
    """The last tokens once `token [B]` has come."""
    return jnp.concatenate([tail[:, 1:], token[:, None]], axis=1)


def ending(tail: jax.Array, *, eos_id: int, stop: Sequence[Sequence[int]]) -> jax.Array:
    """`Finish.EOS` or `Finish.STOP` where the last tokens `tail [B, n]` end a completion, -1 where it goes on."""
    finish = jnp.where(tail[:, -1] == eos_id, Finish.EOS, -1)
    for sequence in stop:
        hit = (tail[:, -len(sequence) :] == jnp.asarray(sequence)[None]).all(-1)
        finish = jnp.where((finish < 0) & hit, Finish.STOP, finish)
    return finish


def prefill(model: LanguageModel, params, prompts: Prompts, columns: int) -> tuple[jax.Array, Any, jax.Array]:
    """Reads the prompts: last hidden state `[N, D]`, cache of so many columns, first column of each row's own `[N]`."""
    number, width = prompts.tokens.shape
    start = width - prompts.lengths
    own = _own(start, columns)
    hidden, cache = model.apply(
        params,
        prompts.tokens,
        positions=jnp.maximum(jnp.arange(width)[None] - start[:, None], 0),
        mask=Causal() & Segments(own[:, :width], own),
        cache=model.init_cache(number, columns),
    )
    return hidden[:, -1], cache, start


def advance(
    model: LanguageModel, params, cache: Any, token: jax.Array, start: jax.Array, columns: int
) -> tuple[jax.Array, Any]:
    """Reads one more token of every row `[B]`, whose own columns begin at `start [B]`: hidden `[B, D]` and cache."""
    hidden, cache = model.apply(
        params,
        token[:, None],
        positions=(cache.length - start)[:, None],
        mask=Causal() & Segments(jnp.ones((len(token), 1), jnp.int32), _own(start, columns)),
        cache=cache,
    )
    return hidden[:, 0], cache


def _own(start: jax.Array, columns: int) -> jax.Array:
    return (jnp.arange(columns)[None] >= start[:, None]).astype(jnp.int32)


def no_completions(rows: int, width: int, pad_id: int) -> dict[str, jax.Array]:
    """Completions of which nothing is drawn yet; `finish` is -1 while they go on."""
    return {
        "tokens": jnp.full((rows, width), pad_id, jnp.int32),
        "log_probs": jnp.zeros((rows, width), jnp.float32),
        "behaviour": jnp.zeros((rows, width), jnp.float32),
        "lengths": jnp.zeros(rows, jnp.int32),
        "finish": jnp.full(rows, -1, jnp.int32),
    }


def as_rollout(prompts: Prompts, completions: dict[str, jax.Array], samples: int) -> Rollout:
    """Prompts and their completions, `samples` for each; those without an end have used up their budget."""
    finish = completions["finish"]
    return Rollout(
        tokens=jnp.concatenate([repeat(prompts.tokens, samples), completions["tokens"]], axis=1),
        prompt_lengths=repeat(prompts.lengths, samples),
        lengths=completions["lengths"],
        finish=jnp.where(finish < 0, Finish.LENGTH, finish),
        log_probs=completions["log_probs"],
        behaviour_log_probs=completions["behaviour"],
        prompt_width=prompts.tokens.shape[1],
    )


def repeat(x: jax.Array, times: int, axis: int = 0) -> jax.Array:
    """Each row as often in a row; nothing for once."""
    return x if times == 1 else jnp.repeat(x, times, axis=axis)


def check(prompts: Prompts, stop: Sequence[Sequence[int]]) -> None:
    """Refuses what no sampler can take; see `rollout`."""
    if prompts.tokens.ndim != 2 or prompts.lengths.shape != prompts.tokens.shape[:1]:
        raise ValueError(
            f"prompts have tokens {prompts.tokens.shape} and lengths {prompts.lengths.shape}; "
            "expected [N, P] and [N]: pad them on the left with data.encode_prompts"
        )
    if any(len(sequence) == 0 for sequence in stop):
        raise ValueError("a stop sequence is empty and would end every completion; remove it")


def rollout(
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
    allowed: Callable | None = None,
) -> Rollout:
    """Samples completions; pure, to be called inside `jax.jit`.

    Args:
      model: the four functions of a language model.
      params: its parameters.
      prompts: `tokens [N, P]` left-padded and `lengths [N]`.
      key: consumed.
      sampling: temperature, filters and the budget of new tokens `C`.
      eos_id: the id that ends a completion. It is part of the completion and trained.
      pad_id: written after the end; never compared with anything, so it may equal `eos_id`.
      samples: completions for each prompt. The prompt is prefilled once; rows `[i * samples, (i + 1) * samples)` of
        the result belong to prompt `i`.
      stop: token sequences that end a completion with `Finish.STOP` once it ends in one of them (they are kept).
      allowed: `(rows [B, P + C], column) -> bool [B, V]`, the tokens that may follow those before a column, of which
        there is always one; None allows all. Behaviour log-probs are under what is left.

    Returns:
      A `Rollout` with `B = N * samples` rows.

    Raises:
      ValueError: on misshapen prompts or an empty stop sequence.
    """
    check(prompts, stop)
    number, prompt_width = prompts.tokens.shape
    rows, width = number * samples, sampling.max_tokens
    columns = prompt_width + width
    unembedding, given = model.unembedding(params), repeat(prompts.tokens, samples)

    def emit(carry, hidden):
        """Draws column `step` and records it in the rows that have not ended."""
        step, ended, may = carry["step"], carry["finish"] >= 0, None
        if allowed is not None:
            may = allowed(jnp.concatenate([given, carry["tokens"]], axis=1), prompt_width + step)
        drawn = draw(jax.random.fold_in(key, step), hidden, unembedding, sampling, may)
        token = jnp.where(ended, pad_id, drawn.token)
        tail = with_token(carry["tail"], token)
        record = {
            "tokens": token,
            "log_probs": jnp.where(ended, 0.0, drawn.log_prob),
            "behaviour": jnp.where(ended, 0.0, drawn.behaviour),
        }
        written = {
            name: jax.lax.dynamic_update_slice(carry[name], value[:, None], (0, step)) for name, value in record.items()
        }
        return {
            **carry,
            **written,
            "step": step + 1,
            "tail": tail,
            "finish": jnp.where(ended, carry["finish"], ending(tail, eos_id=eos_id, stop=stop)),
            "lengths": carry["lengths"] + ~ended,
        }

    hidden, cache, start = prefill(model, params, prompts, columns)
    of_group = lambda tree: jax.tree.map(lambda x: repeat(x, samples, axis=1), tree)
    cache, start = cache._replace(k=of_group(cache.k), v=of_group(cache.v)), repeat(start, samples)

    def decode(carry):
        hidden, cache = advance(model, params, carry["cache"], carry["tail"][:, -1], start, columns)
        return emit({**carry, "cache": cache}, hidden)

    carry = {
        **no_completions(rows, width, pad_id),
        "step": jnp.int32(0),
        "tail": no_tail(rows, stop),
        "cache": cache,
    }
    carry = emit(carry, repeat(hidden, samples))
    unfinished = lambda carry: (carry["step"] < width) & (carry["finish"] < 0).any()
    return as_rollout(prompts, jax.lax.while_loop(unfinished, decode, carry), samples)


def check_routers(model: LanguageModel) -> None:
    """Raises ValueError where experts have a capacity: the trainer's pass over a completion is not the sampler's."""
    if model.routers is not None and model.routers.drops:
        raise ValueError(
            "the model's experts have a capacity_factor: the sampler, which reads token by token, drops no choice, the "
            "trainer does, and their log-probs differ; give experts.capacity_factor=None (the parameters are the same)"
        )


def completion_log_probs(
    model: LanguageModel, params, rollout: Rollout, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropy of a rollout's completions by one forward pass: the trainer's side of the sampler.

    Args:
      model, params: the language model.
      rollout: `B` completions of width `C`.
      temperature: divides the logits, as in sampling. 1 gives `rollout.log_probs` again; the sampler's temperature
        gives `rollout.behaviour_log_probs` where no filter cut tokens off.
      chunk: tokens whose logits are held at once; None chooses.

    Returns:
      `(log_probs [B, C], entropy [B, C])`, float32. Columns after the end hold values of padding: apply `rollout.mask`.
    """
    width = rollout.prompt_width
    inputs = rollout.tokens[:, :-1]
    columns = jnp.arange(inputs.shape[1])[None]
    padding = (width - rollout.prompt_lengths)[:, None]
    segments = (columns >= padding).astype(jnp.int32)
    hidden, _ = model.apply(
        params,
        inputs,
        positions=jnp.maximum(columns - padding, 0),
        mask=Causal() & Segments(segments),
    )
    log_probs, entropy = model.log_probs(
        hidden[:, width - 1 :],
        model.unembedding(params),
        rollout.completions,
        temperature=temperature,
        chunk=chunk,
    )
    return log_probs, entropy
