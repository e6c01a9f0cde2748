"""Linear attention pair by pair in float64, from the definition: what query t sees of key j has decayed, channel by
channel, by every factor after j up to and with t."""

import numpy as np


def linear_attention(
    q,
    k,
    v,
    do,
    dstate,
    *,
    log_decay=None,
    segments=None,
    valid=None,
    state=None,
    causal=True,
    normalise=False,
    eps=1e-6,
):
    """Values and vector-Jacobian products of one call.

    q, k [B, T, heads, D], v [B, T, heads, Dv], log_decay [heads], [B, T, heads] or [B, T, heads, D], segments and
    valid [B, T], state and its cotangent dstate [B, R, D, Dv or Dv + 1], cotangent do [B, T, H, Dv]. Returns o, the
    last state and a dict of the gradients of sum(o * do) + sum(state * dstate).
    """
    q, k, v, do, dstate = (np.asarray(x, np.float64) for x in (q, k, v, do, dstate))
    (b, t, _, d), h, r = q.shape, do.shape[2], dstate.shape[1]
    decay, d_decay = by_channel(log_decay, b, t, d)
    valid = np.ones((b, t), bool) if valid is None else np.asarray(valid)
    document = documents(segments, valid)
    state = np.zeros_like(dstate) if state is None else np.asarray(state, np.float64)
    values = np.concatenate([v, np.ones((*v.shape[:3], 1))], axis=3) if normalise else v
    o, last = np.zeros_like(do), np.zeros_like(state)
    dq, dk, dvalues, d_state = np.zeros_like(q), np.zeros_like(k), np.zeros_like(values), np.zeros_like(state)

    def left(row, head, j, i):
        """Which fraction of what token j wrote (j = -1: of the first state) token i still finds; i may be t - 1."""
        between = [n for n in range(j + 1, i + 1) if valid[row, n]]
        if document[row, i] != (0 if j < 0 else document[row, j]):
            return np.zeros(d), between
        return np.exp(sum((decay[row, n, head * decay.shape[2] // h] for n in between), np.zeros(d))), between

    for row, head, i in np.ndindex(b, h, t):
        if not valid[row, i]:
            continue
        hq, hk, hv, hg, hs = (head * n // h for n in (q.shape[2], k.shape[2], v.shape[2], decay.shape[2], r))
        query = q[row, i, hq]
        keys = [j for j in range(t if not causal else i + 1) if valid[row, j]]
        kept = [left(row, head, j, i) for j in keys]
        first, before = left(row, head, -1, i if causal else -1)
        weights = [w @ (query * k[row, j, hk]) for j, (w, _) in zip(keys, kept, strict=True)]
        total = (query * first) @ state[row, hs]
        for j, weight in zip(keys, weights, strict=True):
            total = total + weight * values[row, j, hv]
        d_total = do[row, i, head]
        if normalise:
            below = total[-1] + eps
            o[row, i, head] = total[:-1] / below
            d_total = np.append(d_total, -d_total @ o[row, i, head]) / below
        else:
            o[row, i, head] = total
        for j, weight, (w, between) in zip(keys, weights, kept, strict=True):
            d_weight = d_total @ values[row, j, hv]
            dvalues[row, j, hv] += weight * d_total
            dq[row, i, hq] += d_weight * w * k[row, j, hk]
            dk[row, j, hk] += d_weight * w * query
            d_decay[row, between, hg] += d_weight * w * query * k[row, j, hk]
        d_state[row, hs] += np.outer(query * first, d_total)
        d_first = first * (state[row, hs] @ d_total)
        dq[row, i, hq] += d_first
        d_decay[row, before, hg] += query * d_first

    for row, hs in np.ndindex(b, r):
        head = hs * h // r
        hk, hv, hg = (head * n // h for n in (k.shape[2], v.shape[2], decay.shape[2]))
        d_last = dstate[row, hs]
        w, between = left(row, head, -1, t - 1 if causal else -1)
        last[row, hs] += w[:, None] * state[row, hs]
        d_state[row, hs] += w[:, None] * d_last
        d_decay[row, between, hg] += w * np.sum(state[row, hs] * d_last, axis=1)
        for j in (j for j in range(t) if valid[row, j]):
            w, between = left(row, head, j, t - 1)
            key, value = k[row, j, hk], values[row, j, hv]
            last[row, hs] += np.outer(w * key, value)
            dk[row, j, hk] += w * (d_last @ value)
            dvalues[row, j, hv] += (w * key) @ d_last
            d_decay[row, between, hg] += w * key * (d_last @ value)

    grads = {"q": dq, "k": dk, "v": dvalues[..., : v.shape[3]], "state": d_state}
    if log_decay is not None:
        axes = {1: (0, 1, 3), 3: (3,), 4: ()}[np.ndim(log_decay)]
        grads["log_decay"] = d_decay.sum(axis=axes)
    return o, last, grads


def by_channel(log_decay, b, t, d):
    """log_decay as [B, T, heads, D], and zeros of that shape."""
    g = np.zeros(1) if log_decay is None else np.asarray(log_decay, np.float64)
    if g.ndim == 1:
        g = g[None, None, :, None]
    elif g.ndim == 3:
        g = g[..., None]
    g = np.array(np.broadcast_to(g, (b, t, g.shape[2], d)))
    return g, np.zeros_like(g)


def documents(segments, valid):
    """int [B, T]: how many times the id has changed from valid token to valid token, up to and with this one."""
    out = np.zeros(valid.shape, int)
    if segments is None:
        return out
    for row in range(valid.shape[0]):
        number, last = 0, None
        for i in range(valid.shape[1]):
            if valid[row, i]:
                number += last is not None and segments[row][i] != last
                last = segments[row][i]
            out[row, i] = number
    return out
