"""Gatings of mixtures of experts, token by token in float64, each written from its paper; losses and statistics."""

import math

import numpy as np


def softmax(x):
    z = np.exp(x - np.max(x))
    return z / z.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def best(scores, k):
    """Indices of the k largest, the first of equals first."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def silu(x):
    return x * sigmoid(x)


def swiglu(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def switch(row, capacity_factor):
    """Fedus et al. 2021, section 2: a list of {expert: weight} for the tokens of a row, and its loss without alpha."""
    t, n = row.shape
    capacity = math.ceil(t / n * capacity_factor)
    filled, gates, f, p = [0] * n, [], np.zeros(n), np.zeros(n)
    for logits in row:
        probabilities = softmax(logits)
        i = int(np.argmax(probabilities))
        f[i] += 1 / t
        p += probabilities / t
        gates.append({i: probabilities[i]} if filled[i] < capacity else {})
        filled[i] += 1
    return gates, n * np.sum(f * p)


def gshard(row, capacity_factor, uniform=None):
    """Lepikhin et al. 2020, algorithm 1, with a capacity of 2 S / E times the factor; uniform [S] or None: keep all."""
    s, e = row.shape
    capacity = math.ceil(2 * s / e * capacity_factor)
    c, gates = [0] * e, [{} for _ in range(s)]
    probabilities = [softmax(logits) for logits in row]
    m = sum(probabilities) / s
    for t in range(s):
        e1, e2 = best(probabilities[t], 2)
        g1 = probabilities[t][e1] / (probabilities[t][e1] + probabilities[t][e2])
        if c[e1] < capacity:
            gates[t][e1] = g1
        c[e1] += 1
    loss = sum(c[i] / s * m[i] for i in range(e)) / e
    for t in range(s):
        e1, e2 = best(probabilities[t], 2)
        g2 = probabilities[t][e2] / (probabilities[t][e1] + probabilities[t][e2])
        if c[e2] < capacity and (uniform is None or 2 * g2 > uniform[t]):
            gates[t][e2] = g2
        c[e2] += 1
    return gates, loss


def noisy_top_k(row, spread, noise, k):
    """Shazeer et al. 2017, equations 3-5: softmax of the k largest of H, minus infinity elsewhere."""
    gates = []
    for h in row + noise * np.log1p(np.exp(spread)):
        kept = np.full(len(h), -np.inf)
        chosen = best(h, k)
        kept[chosen] = h[chosen]
        g = softmax(kept)
        gates.append({e: g[e] for e in chosen})
    return gates


def mixtral(row, k):
    """Jiang et al. 2024, section 2.1: softmax over the k largest logits."""
    gates = []
    for logits in row:
        chosen = best(logits, k)
        gates.append(dict(zip(chosen, softmax(logits[chosen]), strict=True)))
    return gates


def qwen_moe(row, k):
    """Qwen 2024, section 2.2.2: the probabilities of the k largest, as they are."""
    gates = []
    for logits in row:
        p = softmax(logits)
        gates.append({e: p[e] for e in best(p, k)})
    return gates


def deepseek_v2(row, k, groups, top_groups, scale):
    """DeepSeek-AI 2024, sections 2.2.1-2.2.2: experts of the devices with the highest single affinities, then top-k."""
    gates = []
    for logits in row:
        p = softmax(logits)
        size = len(p) // groups
        devices = best([max(p[g * size : (g + 1) * size]) for g in range(groups)], top_groups)
        allowed = [e for e in range(len(p)) if e // size in devices]
        chosen = [allowed[i] for i in best(p[allowed], k)]
        gates.append({e: scale * p[e] for e in chosen})
    return gates


def deepseek_v3(row, bias, k, groups, top_groups, scale):
    """DeepSeek-AI 2024, equations 12-16 and the paragraphs on bias and node-limited routing."""
    gates = []
    for logits in row:
        s = sigmoid(logits)
        moved = s + bias
        size = len(s) // groups
        nodes = best([sum(sorted(moved[g * size : (g + 1) * size])[-2:]) for g in range(groups)], top_groups)
        allowed = [e for e in range(len(s)) if e // size in nodes]
        chosen = [allowed[i] for i in best(moved[allowed], k)]
        total = sum(s[e] for e in chosen)
        gates.append({e: scale * s[e] / total for e in chosen})
    return gates


def relu(x, up, down):
    return np.maximum(x @ up, 0) @ down


def layer(x, gates, matrices, expert=swiglu):
    """Sum over a token's gates of weight times expert; x [T, D], matrices of SwiGLU's (gate, up, down), or `relu`'s."""
    y = np.zeros_like(x)
    for t, chosen in enumerate(gates):
        for e, weight in chosen.items():
            y[t] += weight * expert(x[t], *(w[e] for w in matrices))
    return y


def balance(tokens, shares, chosen):
    """N E sum_e f_e P_e of N tokens: shares [N][E] of probability, chosen: the experts of each."""
    n, e = len(tokens), len(shares[0])
    if n == 0:
        return 0.0
    k = len(chosen[0])
    f, p = np.zeros(e), np.zeros(e)
    for share, ids in zip(shares, chosen, strict=True):
        p += share / n
        for i in ids:
            f[i] += 1 / (k * n)
    return n * e * np.sum(f * p)


def losses(logits, ids, live, score, top_k_for_sequence=None, choices=None):
    """balance, sequence and z of logits [B, T, E] over live tokens; ids [B, T, k] the choices that count.

    top_k_for_sequence: count the best so many scores instead of ids.
    """
    shares, chosen = {}, {}
    for b, t in np.ndindex(*live.shape):
        s = softmax(logits[b, t]) if score == "softmax" else sigmoid(logits[b, t])
        shares[b, t] = s / s.sum()
        chosen[b, t] = list(ids[b, t]) if top_k_for_sequence is None else best(s, top_k_for_sequence)
    rows = [[(b, t) for t in range(live.shape[1]) if live[b, t]] for b in range(live.shape[0])]
    every = [place for row in rows for place in row]
    of = lambda places, cut: balance(places, [shares[p] for p in places], [chosen[p][:cut] for p in places])
    if not every:
        return {"balance": 0.0, "sequence": 0.0, "z": 0.0}
    z = sum(np.log(np.sum(np.exp(logits[p]))) ** 2 for p in every)
    return {"balance": of(every, choices), "sequence": sum(of(row, None) for row in rows if row), "z": z}
