"""Causal linear attention with decay: attention whose memory of the past is one matrix per head.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,     o_t = q_t^T S_t

Three forms, equal to each other. Recurrent: token by token. One step of it, for decoding. Chunked: within a chunk
of tokens the formula is unrolled into products of matrices, from chunk to chunk the state S is carried.

Log decays are only ever added, never subtracted, and only sums of them are exponentiated, so that with g <= 0 no
factor exceeds 1 however strong the decay, and g = -inf forgets exactly, with gradients of zero and not of NaN. The
sum between two tokens of a chunk is put together at the border of the two halves of that block of 2, 4, 8, ... tokens
in which they part: from the key to the border, and from the border to the query. (Secondary chunking, as in Gated
Linear Attention, with the halving carried down to single tokens.)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.platform import platform

IMPLEMENTATIONS = ("chunked", "recurrent")
CHUNK = 64  # tokens; on CPU 64 takes the least processor time of 16 .. 256 with no decay or one per head,
CHUNK_BY_CHANNEL = 32  # and 32 with a decay per channel;
CHUNK_SIDE_BY_SIDE = 128  # on an H100 128 takes the least time with no decay, and 64 with gradients and one per head
ONE_BY_ONE = ("cpu",)  # platforms on which rows and heads are worked on one after another


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    segments: jax.Array | None = None,
    valid: jax.Array | None = None,
    state: jax.Array | None = None,
    causal: bool = True,
    normalise: bool = False,
    eps: float = 1e-6,
    implementation: str | None = None,
    chunk: int | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention without the softmax: q_t reads a sum of k_j v_j^T that decays with time.

        o_t = sum_{j <= t} (q_t * exp(g_{j+1} + ... + g_t) . k_j) v_j
        normalise:  o_t = o_t / (sum_{j <= t} q_t * exp(g_{j+1} + ... + g_t) . k_j + eps)

    The caller applies the feature map: q and k are phi(q) and phi(k). Sums are float32 whatever the inputs.
    (No decay, normalised: Katharopoulos et al. 2020, arXiv:2006.16236; Choromanski et al. 2020, arXiv:2009.14794.
    No decay, a norm after: Qin et al. 2022, arXiv:2210.10340. Decay per head: Sun et al. 2023, arXiv:2307.08621;
    Qin et al. 2024, arXiv:2401.04658. Per head and token: Dao and Gu 2024, arXiv:2405.21060. Per channel: Yang et
    al. 2023, arXiv:2312.06635.)

    The chunked form keeps one state per chunk for the backward pass, the recurrent form one per token. Both have
    all derivatives.

    Args:
      q: queries [B, T, heads, D], feature-mapped.
      k: keys [B, T, heads, D], feature-mapped.
      v: values [B, T, heads, Dv].
        H is the largest number of heads among q, k, v and log_decay; the others may have any number that divides
        it, and each of their heads serves a run of neighbours.
      log_decay: g <= 0 by head [heads], by token and head [B, T, heads], or by channel too [B, T, heads, D]; None
        for no decay. It decays the state before token t is added; -inf forgets all that came before t.
        Differentiable.
      segments: int [B, T], ids of packed documents: where the id changes, the state is emptied.
      valid: bool [B, T], False for padding: such a token neither writes nor decays nor empties the state,
        its output is zero, and what q, k, v and log_decay hold there, NaN even, has no effect.
      state: float32 [B, R, D, Dv], the state before the first token, which belongs to its document; default zeros.
        R is the least common multiple of the heads of k, v and log_decay. With normalise it is
        [B, R, D, Dv + 1]: the last column is the decayed sum of the keys.
      causal: False lets every query see all T keys, without decay and segments.
      normalise: divide by the sum of weights. For features >= 0, whose sum is >= 0.
      eps: added to the sum of weights.
      implementation: "chunked", "recurrent", or None: recurrent for a single token, else chunked.
      chunk: tokens per chunk, a power of two; by default 64, or 32 with a decay per channel, or on a GPU or TPU 128
        without a decay.
      return_state: also return the state after the last token.

    Returns:
      o [B, T, H, Dv] in q's dtype; with return_state, (o, state [B, R, D, Dv or Dv + 1] float32).

    Raises:
      ValueError: shapes that do not fit, or options that do not go together.
    """
    heads, groups = _check("linear_attention", q, k, v, log_decay, segments, valid, normalise, state)
    b, t = q.shape[:2]
    _check_options(log_decay, segments, causal, implementation, chunk, eps)
    if valid is not None:
        q, k, v = (jnp.where(valid[..., None, None], x, 0) for x in (q, k, v))
    decay = None if log_decay is None else _by_token(log_decay, b, t)
    if segments is not None:
        starts = _starts(segments, jnp.ones((b, t), bool) if valid is None else valid)[..., None, None]
        decay = jnp.where(starts, -jnp.inf, 0.0 if decay is None else decay)
    if valid is not None and decay is not None:
        decay = jnp.where(valid[..., None, None], decay, 0.0)
    arrays = _arrange(q, k, v, decay, heads, groups, normalise)
    last = _empty(arrays[1], arrays[2]) if state is None else state.astype(_acc(q))
    if not causal:
        o, last = _all_at_once(*arrays, last)
    elif implementation == "recurrent" or (implementation is None and t <= 1):
        o, last = _recurrent(*arrays, last)
    else:
        limit = chunk or _best_chunk(decay)
        # divided after, the numerator and the sum of weights must not be rounded to q's dtype before
        o, last = _chunked(*arrays, last, min(limit, _power_of_two(t)), _acc(q) if normalise else q.dtype)
    o = _finish(o.reshape(b, t, heads * groups, o.shape[4]), normalise, eps).astype(q.dtype)
    return (o, last) if return_state else o


def linear_attention_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`: S = exp(g) S + k v^T, o = q^T S. Its cost does not grow with the past.

    Args:
      state: float32 [B, R, D, Dv], or [B, R, D, Dv + 1] with normalise, as `linear_attention` returns it; zeros
        before the first token.
      q: [B, heads, D]. k: [B, heads, D]. v: [B, heads, Dv].
      log_decay: [heads], [B, heads], [B, heads, D], or None.
      normalise, eps: as in `linear_attention`.

    Returns:
      o [B, H, Dv] in q's dtype, and the new state.

    Raises:
      ValueError: shapes that do not fit.
    """
    for name, x, axes in (("q", q, "[B, heads, D]"), ("k", k, "[B, heads, D]"), ("v", v, "[B, heads, Dv]")):
        if jnp.ndim(x) != 3:
            raise ValueError(f"linear_attention_step: {name} has shape {jnp.shape(x)}, expected {axes}: one token.")
    q, k, v = q[:, None], k[:, None], v[:, None]
    if log_decay is not None and jnp.ndim(log_decay) > 1:
        log_decay = log_decay[:, None]
    heads, groups = _check("linear_attention_step (T = 1)", q, k, v, log_decay, None, None, normalise, state)
    decay = None if log_decay is None else _by_token(log_decay, q.shape[0], 1)
    arrays = _arrange(q, k, v, decay, heads, groups, normalise)
    state, o = _token(state.astype(_acc(q)), jax.tree.map(lambda x: x[:, 0], arrays))
    return _finish(o.reshape(q.shape[0], heads * groups, o.shape[3]), normalise, eps).astype(q.dtype), state


def _best_chunk(decay) -> int:
    if decay is None:
        return CHUNK if platform() in ONE_BY_ONE else CHUNK_SIDE_BY_SIDE
    return CHUNK_BY_CHANNEL if decay.shape[-1] > 1 else CHUNK


def _recurrent(q, k, v, decay, state):
    """Token by token. q [B, T, R, G, D], k [B, T, R, D], v [B, T, R, Dv], decay [B, T, R, 1 or D], as everywhere."""
    by_token = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, decay))
    state, o = lax.scan(_token, state, by_token)
    return jnp.swapaxes(o, 0, 1), state


def _token(state, x):
    q, k, v, decay = jax.tree.map(lambda a: a.astype(state.dtype), x)
    if decay is not None:
        state = jnp.exp(decay)[..., None] * state
    state = state + k[..., :, None] * v[..., None, :]
    return state, q @ state


def _all_at_once(q, k, v, decay, state):
    del decay  # none where every query sees every key
    acc = state.dtype
    state = state + jnp.einsum("btrd,btrv->brdv", k.astype(acc), v.astype(acc))
    return jnp.einsum("btrgd,brdv->btrgv", q.astype(acc), state), state


def _chunked(q, k, v, decay, state, size, dtype):
    """Chunk by chunk. The backward pass computes each chunk anew from the state before it."""
    b, t = q.shape[:2]
    n = -(-t // size)

    def cut(x):  # zeros at the end: such tokens neither write nor decay
        x = jnp.pad(x, ((0, 0), (0, n * size - t)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, n, size, *x.shape[2:])

    form = _one_by_one if platform() in ONE_BY_ONE else _side_by_side
    q, k, v, decay = jax.tree.map(cut, (q, k, v, decay))
    o, state = form(q, k, v, decay, state, dtype)
    return o.reshape(b, n * size, *o.shape[3:])[:, :t], state


def _one_by_one(q, k, v, decay, state, dtype):
    """Rows, chunks and heads one after another: where small batched products are slow.

    q [B, N, C, R, G, D], k [B, N, C, R, D], v [B, N, C, R, Dv], decay [B, N, C, R, 1 or D] or None.
    """

    def one_head(x):
        q, k, v, decay, state = _upcast(x)
        kept, written = _written((k, v, decay))
        return _read((q, k, v, decay, state)), _moved_on(kept, state) + written

    def one_chunk(state, x):
        o, state = lax.map(one_head, (*_heads_first(x, 0), state))
        return state, jnp.moveaxis(o, 2, 0).astype(dtype)

    def one_row(x):
        *arrays, state = x
        state, o = lax.scan(jax.checkpoint(one_chunk, prevent_cse=False), state, tuple(arrays))
        return o, state

    return lax.map(one_row, (q, k, v, decay, state))


def _side_by_side(q, k, v, decay, state, dtype):
    """All chunks at once, but for their states, which are summed up in order."""
    q, k, v, decay = _upcast(_heads_first((q, k, v, decay), 2))
    each = lambda f: jax.vmap(jax.vmap(jax.vmap(f)))
    added = each(_written)((k, v, decay))

    def step(state, x):
        kept, written = x
        return _moved_on(kept, state) + written, state

    last, before = lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), added))
    o = each(jax.checkpoint(_read, prevent_cse=False))((q, k, v, decay, jnp.swapaxes(before, 0, 1)))
    return jnp.moveaxis(o, 4, 2).astype(dtype), last


def _heads_first(x, axis: int):
    """(q, k, v, decay) with the tokens of a chunk, which lie along `axis`, moved behind the heads."""
    return tuple(None if a is None else jnp.moveaxis(a, axis, axis + 1 + (n == 0)) for n, a in enumerate(x))


def _written(x):
    """What one chunk of one head, k [C, D], v [C, Dv], decay [C, 1 or D] or None, keeps of the state and adds to it."""
    k, v, decay = x
    if decay is None:
        return None, k.T @ v
    _, since, until = _sums(decay)
    return jnp.exp(since[-1]), (k * jnp.exp(until)).T @ v


def _moved_on(kept, state):
    return state if kept is None else kept[..., None] * state


def _read(x):
    """o [G, C, Dv] of one chunk of one head, from q [G, C, D] and the state before it [D, Dv]."""
    q, k, v, decay, state = x
    if decay is None:
        inside = jnp.where(jnp.tri(k.shape[0], dtype=bool)[None], q @ k.T, 0.0) @ v
        return inside + q @ state
    halves, since, _ = _sums(decay)
    inside = _inside_by_head if decay.shape[1] == 1 else _inside_by_channel
    return inside(q, k, v, halves) + (q * jnp.exp(since)[None]) @ state


def _upcast(x):
    """Once for all uses: a gradient that comes back in parts is summed before it is rounded."""
    return jax.tree.map(lambda a: a.astype(_acc(a)), x)


def _sums(decay):
    """Sums of log decays by halving, decay [C, E], C a power of two.

    Returns:
      for each half h = 1, 2, 4, ..., C / 2: (sums since the border [C / 2h, h, E] for the tokens of right halves,
      token included; sums until the border [C / 2h, h, E] for the tokens of left halves, token excluded);
      and the same sums [C, E] since the chunk's begin and until its end.
    """
    c, width = decay.shape
    since, until, halves = decay, jnp.zeros_like(decay), []
    h = 1
    while h < c:
        since, until = since.reshape(-1, 2, h, width), until.reshape(-1, 2, h, width)
        halves.append((since[:, 1], until[:, 0]))
        left, right = since[:, :1, -1:], since[:, 1:, -1:]
        since = jnp.concatenate([since[:, :1], since[:, 1:] + left], axis=1).reshape(c, width)
        until = jnp.concatenate([until[:, :1] + right, until[:, 1:]], axis=1).reshape(c, width)
        since, until = lax.optimization_barrier((since, until))  # fused, each level would compute all below it anew
        h *= 2
    return halves, since, until


def _inside_by_head(q, k, v, halves):
    """The chunk's own part of o where one factor decays all channels: (q k^T * factors) v."""
    c = k.shape[0]
    i, j = jnp.arange(c)[:, None], jnp.arange(c)[None, :]
    parted = jnp.where(i > j, i ^ j, 0)  # its highest bit is the half at whose border i and j part
    log_factor = jnp.where(i >= j, 0.0, -jnp.inf).astype(q.dtype)
    for since, until in halves:
        h = since.shape[1]
        both = [jnp.broadcast_to(x[:, None, :, 0], (c // (2 * h), 2, h)).reshape(c) for x in (since, until)]
        log_factor = jnp.where(parted // h == 1, both[0][:, None] + both[1][None, :], log_factor)
    # held in memory: XLA's CPU backend would compute the exp again in every product that reads it
    factor = lax.optimization_barrier(jnp.exp(log_factor))
    return ((q @ k.T) * factor[None]) @ v


def _inside_by_channel(q, k, v, halves):
    """The chunk's own part of o where every channel has its decay: the token itself, then, half by half, what
    right halves see of their left neighbours."""
    groups, c, d = q.shape
    o = jnp.sum(q * k[None], axis=-1, keepdims=True) * v[None]
    for since, until in halves:
        n, h = since.shape[:2]
        right = (q.reshape(groups, n, 2, h, d)[:, :, 1] * jnp.exp(since)[None]).reshape(groups, n * h, d)
        left = (k.reshape(n, 2, h, d)[:, 0] * jnp.exp(until)).reshape(n * h, d)
        block = jnp.arange(n * h) // h
        same = (block[:, None] == block[None, :])[None]
        weights = jnp.where(same, right @ left.T, 0.0)
        seen = (weights @ v.reshape(n, 2, h, -1)[:, 0].reshape(n * h, -1)).reshape(groups, n, 1, h, -1)
        o = o + jnp.pad(seen, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0))).reshape(groups, c, -1)
    return o


def _acc(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _by_token(log_decay, b, t):
    """[heads], [B, T, heads] or [B, T, heads, D] -> [B, T, heads, 1 or D]."""
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[None, None], (b, t, log_decay.shape[0]))
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def _starts(segments, valid):
    """bool [B, T]: the valid tokens whose id is not that of the valid token before them; there must be one."""
    here = jnp.where(valid, jnp.arange(segments.shape[1])[None], -1)
    before = jnp.pad(lax.cummax(here, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return valid & (before >= 0) & (jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1) != segments)


def _arrange(q, k, v, decay, heads, groups, normalise):
    """q [B, T, R, G, D], k [B, T, R, D], v [B, T, R, Dv], decay [B, T, R, 1 or D]: R states, each read by G queries."""

    def spread(x, n):
        return x if x.shape[2] == n else jnp.repeat(x, n // x.shape[2], axis=2)

    if normalise:  # the sum of weights is the attention to values of 1
        v = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1), v.dtype)], axis=3)
    q = spread(q, heads * groups).reshape(*q.shape[:2], heads, groups, q.shape[3])
    return q, spread(k, heads), spread(v, heads), None if decay is None else spread(decay, heads)


def _empty(k, v):
    """The state before the first token: zeros that vary over a mesh as k and v do, as a scan in shard_map needs."""
    k, v = (jnp.sum(x[:, :0].astype(_acc(x)), axis=1) for x in (k, v))
    return k[..., :, None] * v[..., None, :]


def divided(o: jax.Array, eps: float) -> jax.Array:
    """o [..., Dv + 1] -> [..., Dv], divided by its last number + eps.

    Both are brought to a size of about 1 first: a gradient divides by the square of the sum, which float32 has no
    number for where weights are as tiny as those of random features.
    """
    total = o[..., -1:] + eps
    size = lax.stop_gradient(jnp.where(total == 0, 1.0, total))
    return (o[..., :-1] / size) / (total / size)


def _finish(o, normalise, eps):
    return divided(o, eps) if normalise else o


def _check(name, q, k, v, log_decay, segments, valid, normalise, state) -> tuple[int, int]:
    """(R, G) of the call, or ValueError."""
    for what, x, axes in (("q", q, "[B, T, heads, D]"), ("k", k, "[B, T, heads, D]"), ("v", v, "[B, T, heads, Dv]")):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name}: {what} has shape {jnp.shape(x)}, expected {axes}.")
    b, t, _, d = q.shape
    if (*k.shape[:2], k.shape[3]) != (b, t, d):
        raise ValueError(
            f"{name}: k has B, T, D = {(*k.shape[:2], k.shape[3])}, expected q's {(b, t, d)}; apply the same "
            "feature map to both."
        )
    if v.shape[:2] != (b, t):
        raise ValueError(f"{name}: v has B, T = {v.shape[:2]}, expected q's {(b, t)}.")
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if log_decay is not None:
        shape = jnp.shape(log_decay)
        if not (len(shape) == 1 or (len(shape) in (3, 4) and shape[:2] == (b, t) and shape[3:] in ((), (d,)))):
            raise ValueError(
                f"{name}: log_decay has shape {shape}, expected [heads], [B, T, heads] or [B, T, heads, D] with "
                f"B, T, D = {(b, t, d)}."
            )
        counts["log_decay"] = shape[0] if len(shape) == 1 else shape[2]
    most = max(counts.values())
    if any(n == 0 or most % n for n in counts.values()):
        raise ValueError(f"{name}: heads are {counts}, expected each number to divide the largest, {most}.")
    for what, x, kind in (("segments", segments, jnp.integer), ("valid", valid, jnp.bool_)):
        if x is not None and (jnp.shape(x) != (b, t) or not jnp.issubdtype(jnp.result_type(x), kind)):
            raise ValueError(
                f"{name}: {what} is {jnp.result_type(x)} {jnp.shape(x)}, expected {kind.__name__} [B, T] = {(b, t)}."
            )
    heads = math.lcm(*(n for what, n in counts.items() if what != "q"))
    full = (b, heads, d, v.shape[3] + normalise)
    if state is not None and jnp.shape(state) != full:
        axes = "[B, R, D, Dv + 1] with normalise" if normalise else "[B, R, D, Dv]"
        raise ValueError(f"{name}: state has shape {jnp.shape(state)}, expected {axes} = {full}.")
    return heads, most // heads


def _check_options(log_decay, segments, causal, implementation, chunk, eps):
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"linear_attention: implementation={implementation!r}, expected None or one of {IMPLEMENTATIONS}."
        )
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1 or chunk != _power_of_two(chunk)):
        raise ValueError(f"linear_attention: chunk = {chunk!r} tokens, expected a power of two.")
    if isinstance(eps, int | float) and eps < 0:
        raise ValueError(f"linear_attention: eps = {eps}, expected a number of at least 0.")
    given = {"log_decay": log_decay, "segments": segments, "implementation": implementation, "chunk": chunk}
    if not causal and (wrong := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            f"linear_attention: causal=False takes no {', '.join(wrong)}; every query sees every key, in one product."
        )
