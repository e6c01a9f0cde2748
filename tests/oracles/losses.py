"""Reductions, KL, policy, TD, token and reward losses in float64: loops over elements."""

import math

import numpy as np


def reduce_tokens(rows):
    """rows: a list of sequences, each a list of values. Returns (total, weight)."""
    values = [v for row in rows for v in row]
    return sum(values), len(values)


def reduce_sequences(rows):
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means), len(means)


def reduce_constant(rows, length):
    return sum(sum(row) / length for row in rows if row), len([row for row in rows if row])


def ppo_clip(lp, old, a, low=0.2, high=0.2, dual=None):
    out = []
    for x, y, adv in zip(lp, old, a, strict=True):
        r = math.exp(x - y)
        objective = min(r * adv, min(max(r, 1 - low), 1 + high) * adv)
        if dual is not None and adv < 0:
            objective = max(objective, dual * adv)
        out.append(-objective)
    return np.array(out)


def value_loss(v, target, old=None, clip=None):
    out = []
    for i in range(len(v)):
        loss = (v[i] - target[i]) ** 2
        if clip is not None:
            held = old[i] + min(max(v[i] - old[i], -clip), clip)
            loss = max(loss, (held - target[i]) ** 2)
        out.append(0.5 * loss)
    return np.array(out)


def entropy(logits):
    out = np.zeros(logits.shape[:-1])
    for index in np.ndindex(out.shape):
        weights = [math.exp(x - max(logits[index])) for x in logits[index]]
        probs = [w / sum(weights) for w in weights]
        out[index] = -sum(p * math.log(p) for p in probs if p > 0)
    return out


def td_errors(kind, q_tm1, a_tm1, r, d, q_t, a_t=None, probs=None, selector=None):
    out = []
    for i in range(len(r)):
        follow = {
            "sarsa": lambda i: q_t[i][a_t[i]],
            "expected_sarsa": lambda i: sum(p * q for p, q in zip(probs[i], q_t[i], strict=True)),
            "q_learning": lambda i: max(q_t[i]),
            "double_q_learning": lambda i: q_t[i][int(np.argmax(selector[i]))],
        }[kind](i)
        out.append(r[i] + d[i] * follow - q_tm1[i][a_tm1[i]])
    return np.array(out)


def huber(errors, delta):
    return np.array([0.5 * e * e if abs(e) <= delta else delta * (abs(e) - 0.5 * delta) for e in errors])


def cross_entropy(logits, targets, smoothing=0.0, z_loss=0.0):
    out = np.zeros(targets.shape)
    vocabulary = logits.shape[-1]
    for index in np.ndindex(targets.shape):
        z = sum(math.exp(x) for x in logits[index])
        label = [smoothing / vocabulary + (1 - smoothing) * (v == targets[index]) for v in range(vocabulary)]
        out[index] = -sum(p * (x - math.log(z)) for p, x in zip(label, logits[index], strict=True))
        out[index] += z_loss * math.log(z) ** 2
    return out


def bradley_terry(chosen, rejected, margin=0.0, centring=0.0):
    return np.array(
        [
            -math.log(1 / (1 + math.exp(-(w - x - margin)))) + centring * (w + x) ** 2
            for w, x in zip(chosen, rejected, strict=True)
        ]
    )
