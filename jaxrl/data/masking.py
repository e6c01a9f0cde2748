"""Which tokens an encoder must guess, and what it sees in their place: pure functions of a key.

Drawn anew each time a row is seen, on the device, these are RoBERTa's dynamic masks (arXiv 1907.11692, section 4.1); a
key that depends on the row alone gives BERT's static ones.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def maskable(tokens: jax.Array, real: jax.Array, special_ids: tuple[int, ...]) -> jax.Array:
    """[B, T] bool, tokens that may be chosen: `real` ones (1, not padding) whose id is not special, as [CLS], [SEP]."""
    return (real > 0) & ~jnp.isin(tokens, jnp.asarray(special_ids, tokens.dtype))


def chosen(key: jax.Array, candidates: jax.Array, *, share: float = 0.15, exact: bool = False) -> jax.Array:
    """Chooses tokens one by one (Devlin et al. 2018, arXiv 1810.04805, section 3.1).

    Args:
      key: consumed.
      candidates: [B, T] bool, from `maskable`.
      share: of the candidates.
      exact: False, each candidate with that probability, independently; True, so many of each row, as BERT's own data
        has them: share times its candidates, rounded, at least 1.

    Returns:
      [B, T] bool.
    """
    _check(candidates, share)
    uniform = jax.random.uniform(key, candidates.shape)
    if not exact:
        return candidates & (uniform < share)
    order = jnp.argsort(jnp.where(candidates, uniform, 2.0), axis=1)
    return candidates & (jnp.argsort(order, axis=1) < _count(candidates, share))


def spans(key: jax.Array, candidates: jax.Array, lengths: jax.Array, *, share: float = 0.15) -> jax.Array:
    """Chooses spans until a row has its count of chosen tokens (Joshi et al. 2019, SpanBERT, arXiv 1907.10529).

    Starts are uniform among candidates not chosen yet, lengths are drawn from `lengths`. A span ends early at a token
    that is no candidate, and the last one where the count is reached; it may cross tokens of another one. Deviation:
    lengths are of tokens, not of whole words.

    Args:
      key: consumed.
      candidates: [B, T] bool, from `maskable`.
      lengths: [longest] probabilities of the lengths 1, 2, ...: `geometric` or `poisson`.
      share: of the candidates; the count is that of `chosen` with exact=True.

    Returns:
      [B, T] int32, 0 where nothing is chosen, else the number of the token's span, from 1 on.
    """
    _check(candidates, share)
    log_lengths, columns = jnp.log(jnp.asarray(lengths)), jnp.arange(candidates.shape[1])

    def row(key, candidates, count):
        runs = jnp.cumsum(~candidates)

        def add(state):
            ids, number = state
            where, how_long = jax.random.split(jax.random.fold_in(key, number))
            free = candidates & (ids == 0)
            start = jax.random.categorical(where, jnp.where(free, 0.0, -jnp.inf))
            end = start + 1 + jax.random.categorical(how_long, log_lengths)
            new = free & (columns >= start) & (columns < end) & (runs == runs[start])
            new &= jnp.cumsum(new) <= count - (ids > 0).sum()
            return jnp.where(new, number + 1, ids), number + 1

        start = (jnp.zeros(candidates.shape, jnp.int32), jnp.zeros((), jnp.int32))
        return jax.lax.while_loop(lambda state: (state[0] > 0).sum() < count, add, start)[0]

    keys = jax.random.split(key, candidates.shape[0])
    return jax.vmap(row)(keys, candidates, _count(candidates, share)[:, 0])


def geometric(stop: float = 0.2, longest: int = 10) -> np.ndarray:
    """P(length = l) ~ stop (1 - stop)^(l - 1) for l = 1 .. longest: SpanBERT's, with mean 3.8."""
    p = stop * (1.0 - stop) ** np.arange(longest)
    return p / p.sum()


def poisson(mean: float = 3.0, longest: int = 10) -> np.ndarray:
    """P(length = l) ~ mean^l / l! for l = 1 .. longest: BART's (arXiv 1910.13461), but for its empty spans."""
    p = np.array([mean**length / math.factorial(length) for length in range(1, longest + 1)])
    return p / p.sum()


def corrupted(
    key: jax.Array,
    tokens: jax.Array,
    chosen: jax.Array,
    *,
    mask_id: int,
    words: int | jax.Array,
    mask: float = 0.8,
    random: float = 0.1,
) -> jax.Array:
    """What the network sees: of the chosen tokens 80 % as the mask token, 10 % as any token, 10 % as they are.

    (Devlin et al. 2018, arXiv 1810.04805, appendix A.1.) The random token may be the right one, as there.

    Args:
      key: consumed.
      tokens: [B, T].
      chosen: [B, T] bool: each token has its own draw among the three. Or the ids of `spans`: a span has one.
      mask_id: the mask token.
      words: what random tokens are drawn from: ids below a number, or an array of ids (all but special ones, say).
      mask, random: shares. ELECTRA's generator sees mask=1.0, random=0.0.

    Returns:
      [B, T], as `tokens` but where `chosen`.
    """
    if not (mask >= 0.0 and random >= 0.0 and mask + random <= 1.0 + 1e-6):
        raise ValueError(f"mask is {mask} and random {random}, expected shares that sum to at most 1")
    if jnp.shape(chosen) != jnp.shape(tokens):
        raise ValueError(f"chosen has shape {jnp.shape(chosen)}, expected tokens' [B, T] = {jnp.shape(tokens)}")
    first, second = jax.random.split(key)
    uniform = jax.random.uniform(first, tokens.shape)
    if chosen.dtype != jnp.bool_:
        uniform = jnp.take_along_axis(uniform, jnp.maximum(chosen - 1, 0), axis=1)
        chosen = chosen > 0
    if isinstance(words, int):
        drawn = jax.random.randint(second, tokens.shape, 0, words, tokens.dtype)
    else:
        drawn = jax.random.choice(second, jnp.asarray(words, tokens.dtype), tokens.shape)
    seen = jnp.where(uniform < mask, mask_id, jnp.where(uniform < mask + random, drawn, tokens))
    return jnp.where(chosen, seen, tokens).astype(tokens.dtype)


def gathered(chosen: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Columns of each row's first `most` chosen tokens, so that a head over the vocabulary sees these alone.

    Args:
      chosen: [B, T] bool.
      most: at most T; chosen tokens beyond it are left out, so take the largest count that `exact` can give.

    Returns:
      (columns [B, most], all different, and which of them are chosen ones [B, most] bool). For values [B, T, D]:
      `jnp.take_along_axis(values, columns[..., None], axis=1)`.
    """
    if not 1 <= most <= chosen.shape[1]:
        raise ValueError(f"most is {most}, expected 1 to T = {chosen.shape[1]}")
    columns = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    return columns, jnp.take_along_axis(chosen, columns, axis=1)


def _count(candidates: jax.Array, share: float) -> jax.Array:
    """[B, 1] tokens to choose of each row."""
    n = candidates.sum(axis=1, keepdims=True)
    return jnp.minimum(jnp.maximum(jnp.round(share * n), 1).astype(n.dtype), n)


def _check(candidates: jax.Array, share: float) -> None:
    if candidates.ndim != 2 or candidates.dtype != jnp.bool_:
        raise ValueError(f"candidates are {candidates.dtype} {candidates.shape}, expected bool [B, T]: use `maskable`")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}, expected more than 0 and at most 1")
