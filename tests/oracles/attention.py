"""Attention row by row in float64, from the definition: softmax over the allowed keys and a sink, if any."""

import numpy as np

MASKED = -1e30


def attention(
    q, k, v, allowed, do, dlse, *, scale, soft_cap=None, bias=None, sinks=None, alibi=None, q_offset=0, kept=None
):
    """Values and vector-Jacobian products of one call.

    q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv], allowed bool [B, H, T, S], cotangents do [B, T, H, Dv]
    and dlse [B, T, H]; alibi [H] takes alibi |q_offset + i - k| off the logit of query i and key k, and kept
    [B, H, T, S] multiplies the weights after the softmax. Returns o, lse and a dict of the gradients of
    sum(o * do) + sum(lse * dlse).
    """
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    b, t, h, _ = q.shape
    s, group = k.shape[1], h // k.shape[2]
    full_bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), (b, h, t, s))
    o, lse = np.zeros((b, t, h, v.shape[3])), np.full((b, t, h), MASKED)
    grads = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    d_full_bias, d_sinks = np.zeros((b, h, t, s)), np.zeros(h)
    for row, i, head in np.ndindex(b, t, h):
        kv = head // group
        keys = np.flatnonzero(allowed[row, head, i])
        raw = scale * k[row, keys, kv] @ q[row, i, head]
        capped = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
        logits = capped + full_bias[row, head, i, keys]
        if alibi is not None:
            logits = logits - alibi[head] * np.abs(q_offset + i - keys)
        if sinks is not None:
            logits = np.append(logits, sinks[head])
        if logits.size == 0:
            continue
        top = logits.max()
        lse[row, i, head] = top + np.log(np.exp(logits - top).sum())
        p = np.exp(logits - lse[row, i, head])
        values = np.vstack([v[row, keys, kv], np.zeros((logits.size - keys.size, v.shape[3]))])
        factor = np.ones(logits.size)
        if kept is not None:
            factor[: keys.size] = kept[row, head, i, keys]
        o[row, i, head] = (p * factor) @ values
        softmax_jacobian = np.diag(p) - np.outer(p, p)
        d_logits = softmax_jacobian @ (factor * (values @ do[row, i, head])) + p * dlse[row, i, head]
        grads["v"][row, keys, kv] += np.outer((p * factor)[: keys.size], do[row, i, head])
        if sinks is not None:
            d_sinks[head] += d_logits[-1]
        d_logits = d_logits[: keys.size]
        d_full_bias[row, head, i, keys] += d_logits
        slope = 1.0 if soft_cap is None else 1.0 / np.cosh(raw / soft_cap) ** 2
        d_raw = scale * d_logits * slope
        grads["q"][row, i, head] += d_raw @ k[row, keys, kv]
        grads["k"][row, keys, kv] += np.outer(d_raw, q[row, i, head])
    if bias is not None:
        axes = tuple(a for a in range(4) if np.shape(bias)[a] == 1)
        grads["bias"] = d_full_bias.sum(axis=axes, keepdims=True)
    if sinks is not None:
        grads["sinks"] = d_sinks
    return o, lse, grads


def dense(predicate, b, h, t, s, q_offset=0):
    """bool [B, H, T, S] by a double loop over predicate(row, head, query index, key index)."""
    out = np.zeros((b, h, t, s), bool)
    for row, head, i, j in np.ndindex(b, h, t, s):
        out[row, head, i, j] = predicate(row, head, q_offset + i, j)
    return out


def kept(rate, seed, b, h, t, s, q_offset=0):
    """What dropout multiplies the weights with, [B, H, T, S]: Murmur3's finaliser, with Python's integers."""

    def mix(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x

    out = np.zeros((b, h, t, s))
    for row, head, i in np.ndindex(b, h, t):
        stream = mix(int(seed[0]) ^ (row * 0x9E3779B1 % 2**32))
        stream = mix(stream ^ ((int(seed[1]) + head * 0x85EBCA77) % 2**32))
        stream = mix((stream + (q_offset + i) * 0xC2B2AE3D) % 2**32)
        for j in range(s):
            if mix((stream + j * 0x27D4EB2F) % 2**32) / 2**32 >= rate:
                out[row, head, i, j] = 1 / (1 - rate)
    return out
