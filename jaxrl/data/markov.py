"""A language with a known entropy: a Markov chain over symbols, of any order.

What the best model of it can reach is a number, and so is how far a model is from it.
"""

import jax
import jax.numpy as jnp
import numpy as np


def chain(key: jax.Array, *, symbols: int, order: int, scale: float = 2.0) -> jax.Array:
    """Random transition probabilities `[symbols] * order + [symbols]`: softmax of normal logits times `scale`."""
    return jax.nn.softmax(scale * jax.random.normal(key, (symbols,) * (order + 1)), axis=-1)


def sample(key: jax.Array, table: jax.Array, *, rows: int, length: int) -> jax.Array:
    """Rows of the chain, `[rows, length]` int32, begun in its stationary state. Not under jit; consumes the key."""
    order, symbols = table.ndim - 1, table.shape[-1]
    first, rest = jax.random.split(key)
    begin = jax.random.categorical(first, jnp.log(stationary(table)).reshape(-1), shape=(rows,))
    state = jnp.stack(jnp.unravel_index(begin, (symbols,) * order), axis=-1)
    logits = jnp.log(table)

    def step(state, key):
        after = jax.random.categorical(key, logits[tuple(jnp.moveaxis(state, -1, 0))])
        return jnp.concatenate([state[:, 1:], after[:, None]], axis=1), after

    _, tokens = jax.lax.scan(step, state, jax.random.split(rest, max(length - order, 0)))
    return jnp.concatenate([state, tokens.T], axis=1)[:, :length].astype(jnp.int32)


def stationary(table: jax.Array) -> jax.Array:
    """The distribution of the chain's state, its last `order` symbols: `[symbols] * order`. Not under jit."""
    order, symbols = table.ndim - 1, table.shape[-1]
    moves = np.asarray(table, np.float64)
    state = np.full((symbols,) * order, symbols**-order)
    for _ in range(1000):
        state, before = np.einsum("a...b,a...->...b", moves, state), state
        if np.abs(state - before).max() < 1e-14:
            break
    return jnp.asarray(state / state.sum(), jnp.float32)


def entropy_rate(table: jax.Array) -> float:
    """Nats per symbol that no model can go below on long rows: H(next symbol | last `order` symbols)."""
    p = np.asarray(table, np.float64)
    rest = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    return float((np.asarray(stationary(table), np.float64) * rest).sum())


def log_probs(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-prob of every symbol given those before it, `[rows, length]`: the truth about rows of `sample`."""
    order = table.ndim - 1
    found = []
    for column in range(tokens.shape[1]):
        context = tokens[:, max(column - order, 0) : column + 1]
        p = table if column >= order else stationary(table).sum(axis=tuple(range(column + 1, order)))
        if column < order:
            p = p / p.sum(-1, keepdims=True)
        found.append(jnp.log(p[tuple(context.T)]))
    return jnp.stack(found, axis=1)
