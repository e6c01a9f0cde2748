"""Attention of the last tokens over a cache, query by query in float64, from the definition."""

import numpy as np

MASKED = -1e30


def decode(q, k, v, lengths, *, scale, block_table=None, window=None, soft_cap=None, sinks=None):
    """o [B, T, H, Dv] and lse [B, T, H] of q [B, T, H, D].

    The cache is k [B, S, K, D] and v [B, S, K, Dv]; with block_table [B, N] it is pages [P, page, K, .], looked up
    one key at a time.
    """
    b, t, h, _ = q.shape
    size, heads = k.shape[1], k.shape[2]
    o, lse = np.zeros((b, t, h, v.shape[3])), np.full((b, t, h), MASKED)
    for row, i, head in np.ndindex(b, t, h):
        position = int(lengths[row]) - t + i
        logits, values = [], []
        for key in range(position + 1):
            if window is not None and position - key >= window:
                continue
            where = (row, key) if block_table is None else (block_table[row, key // size], key % size)
            logit = scale * float(np.dot(np.float64(q[row, i, head]), np.float64(k[*where, head // (h // heads)])))
            logits.append(logit if soft_cap is None else soft_cap * np.tanh(logit / soft_cap))
            values.append(np.float64(v[*where, head // (h // heads)]))
        if sinks is not None:
            logits.append(float(sinks[head]))
            values.append(np.zeros(v.shape[3]))
        if logits:
            lse[row, i, head] = np.logaddexp.reduce(logits)
            o[row, i, head] = np.exp(np.array(logits) - lse[row, i, head]) @ np.array(values)
    return o, lse
