"""Token statistics by tiles of tokens and vocabulary, in plain XLA: no pass holds more than one tile of logits.

The forward pass runs over the vocabulary with a running maximum, sum and mean per token, as attention's online
softmax does over keys. The backward pass computes each tile's logits anew from the saved log-sum-exp and entropy and
turns them into gradients on the spot: four matrix products in all where autodiff over all logits has three, but no
passes over memory. The vocabulary is the outer loop, so that each block of the unembedding is read once and each
block of its gradient is written once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.platform import platform
from jaxrl.kernels.varying import vary_alike

BLOCKS = {"cpu": (1024, 1024)}  # tokens and vocabulary of a tile, by platform
OTHER_BLOCKS = (4096, 16384)  # of 1024 .. 16384 tokens and 4096 .. all columns, least time on an H100
LOWEST = -1e30  # finite, so that differences of maxima are never inf - inf


class Settings(NamedTuple):
    """What is static about a call."""

    soft_cap: float | None
    tokens: int
    vocabulary: int


def blocked_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    scale: jax.Array,
    *,
    soft_cap: float | None = None,
    tokens: int | None = None,
    vocabulary: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dense_statistics` with one tile of logits in memory at a time, forward and backward.

    (Online sums as in Milakov and Gimelshein 2018, arXiv:1805.02867; logits recomputed in the backward pass as in
    Wijmans et al. 2024, arXiv:2411.09009, whose filter for small gradients is left out: gradients are exact.)

    Args:
      hidden, unembedding, targets, scale, soft_cap: as in `dense_statistics`; soft_cap is a Python number.
      tokens, vocabulary: upper bounds on the tile's sides; default by platform.

    Returns:
      log_probs [N], entropy [N] and lse [N], float32. First derivatives only, in reverse mode.
    """
    n, most = hidden.shape[0], BLOCKS.get(platform(), OTHER_BLOCKS)
    count = max(1, -(-n // (tokens or most[0])))
    settings = Settings(soft_cap, max(1, -(-n // count)), min(unembedding.shape[1], vocabulary or most[1]))
    return _statistics(settings, hidden, unembedding, targets, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(settings, hidden, unembedding, targets, scale):
    return _forward(settings, hidden, unembedding, targets, scale)[0]


def _forward(settings, hidden, unembedding, targets, scale):
    acc = jnp.promote_types(hidden.dtype, jnp.float32)
    h, y, r = (_tiles(settings, x) for x in (hidden, targets, scale.astype(acc)))

    def visit(first, width, state):
        w = lax.dynamic_slice_in_dim(unembedding, first, width, axis=1)

        def one_tile(args):
            h, y, r, (m, total, spread, chosen) = args
            x = _held(_logits(settings, h, w)[0] * r[:, None])
            m_new = jnp.maximum(m, jnp.max(x, axis=-1))
            z = x - m_new[:, None]
            e = _held(jnp.exp(z))
            decay = jnp.exp(m - m_new)
            spread = decay * (spread + (m - m_new) * total) + jnp.sum(e * z, axis=-1)
            total = decay * total + jnp.sum(e, axis=-1)
            at = y - first
            x_y = jnp.take_along_axis(x, jnp.clip(at, 0, width - 1)[:, None], axis=-1)[:, 0]
            return m_new, total, spread, jnp.where((at >= 0) & (at < width), x_y, chosen)

        return lax.map(one_tile, (h, y, r, state))

    zeros = jnp.zeros(y.shape, acc)
    *start, _ = vary_alike(zeros + LOWEST, zeros, zeros, zeros, h)
    m, total, spread, chosen = _over_vocabulary(settings, unembedding.shape[1], visit, tuple(start))
    log_total = jnp.log(total)
    out = (chosen - m) - log_total, log_total - spread / total, m + log_total
    log_probs, entropy, lse = (x.reshape(-1)[: hidden.shape[0]] for x in out)
    return (log_probs, entropy, lse), (hidden, unembedding, targets, scale, entropy, lse)


def _backward(settings, residuals, cotangents):
    return _gradients(settings, residuals, cotangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(settings, residuals, cotangents):
    """With g, gH, gl the cotangents of log p_y, H and lse:  dx = p (gl - g - gH (log p + H)) + g 1[v = y];
    du = scale slope dx;  dh = du W^T;  dW = h^T du;  dscale = sum_v dx x / scale.
    """
    hidden, unembedding, targets, scale, entropy, lse = residuals
    g, g_entropy, g_lse = cotangents
    acc = lse.dtype
    h, y, r, lse, g, g_entropy, rest = (
        _tiles(settings, x)
        for x in (hidden, targets, scale.astype(acc), lse, g, g_entropy, g_lse - g - g_entropy * entropy)
    )
    ht = jnp.swapaxes(h, 1, 2)  # a product is slower where its first factor is transposed

    def visit(first, width, gradients):
        dh, dw, dr = gradients
        w = lax.dynamic_slice_in_dim(unembedding, first, width, axis=1)
        column = lax.broadcasted_iota(jnp.int32, (settings.tokens, width), 1) + first

        def one_tile(dw, args):
            h, ht, y, r, lse, g, g_entropy, rest, dh, dr = args
            capped, slope = _logits(settings, h, w)
            log_p = capped * r[:, None] - lse[:, None]
            dx = jnp.exp(log_p) * (rest[:, None] - g_entropy[:, None] * log_p)
            dx = _held(dx + jnp.where(column == y[:, None], g[:, None], 0.0))
            du = (dx * r[:, None] * slope).astype(jnp.promote_types(h.dtype, w.dtype))
            dh = dh + jnp.matmul(du, w.T, preferred_element_type=acc)
            return dw + jnp.matmul(ht, du, preferred_element_type=acc), (dh, dr + jnp.sum(dx * capped, axis=-1))

        nothing = vary_alike(jnp.zeros(w.shape, acc), h)[0]
        block, (dh, dr) = lax.scan(one_tile, nothing, (h, ht, y, r, lse, g, g_entropy, rest, dh, dr))
        return dh, lax.dynamic_update_slice_in_dim(dw, block.astype(dw.dtype), first, axis=1), dr

    zeros = jnp.zeros(h.shape, acc), jnp.zeros_like(unembedding), jnp.zeros(y.shape, acc)
    *start, _ = vary_alike(*zeros, h)
    dh, dw, dr = _over_vocabulary(settings, unembedding.shape[1], visit, tuple(start))
    n = hidden.shape[0]
    return dh.reshape(-1, dh.shape[-1])[:n].astype(hidden.dtype), dw, None, dr.reshape(-1)[:n].astype(scale.dtype)


_statistics.defvjp(_forward, _backward)


@_gradients.defjvp
def _second_derivatives(settings, primals, tangents):
    raise ValueError(
        'token_log_probs: implementation="xla" has no second derivatives; use implementation="reference", '
        "which has all."
    )


def _over_vocabulary(settings, size: int, visit, carry):
    """Visits (first, width, carry) -> carry blocks of the vocabulary; the last is narrower where they do not fit."""
    width = settings.vocabulary
    count, rest = divmod(size, width)
    carry = lax.fori_loop(0, count, lambda j, carry: visit(j * width, width, carry), carry)
    return visit(count * width, rest, carry) if rest else carry


def _logits(settings, h, w):
    """The capped logits of one tile, and the slope of the soft cap (1.0 without)."""
    u = jnp.matmul(h, w, preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))
    if settings.soft_cap is None:
        return u, 1.0
    bent = jnp.tanh(u / settings.soft_cap)
    return settings.soft_cap * bent, 1.0 - bent * bent


def _tiles(settings, x: jax.Array) -> jax.Array:
    """[N, ...] -> [tiles, tokens, ...], zeros at the end."""
    count = max(1, -(-x.shape[0] // settings.tokens))
    x = jnp.pad(x, ((0, count * settings.tokens - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, settings.tokens, *x.shape[1:])


def _held(x: jax.Array) -> jax.Array:
    """On CPU, x in memory, computed once: XLA would compute an exp again inside a sum, element by element."""
    return lax.optimization_barrier(x) if platform() == "cpu" else x
