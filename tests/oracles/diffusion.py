"""Discrete diffusion in float64, from transition matrices: loops over tokens, masks and orders."""

import itertools
import math

import numpy as np


def alpha(schedule, t):
    return {
        "linear": 1 - t,
        "cosine": 1 - math.cos(math.pi / 2 * (1 - t)),
        "square": 1 - t * t,
        "geometric": math.exp(-(1e-5 ** (1 - t)) * 20**t),
    }[schedule]


def slope(schedule, t, step=1e-6):
    return (alpha(schedule, t + step) - alpha(schedule, t - step)) / (2 * step)


def generator(noise, v, mask_id):
    """Rates from state i (row) to state j (column)."""
    rates = np.full((v, v), 1.0 / v) if noise == "uniform" else np.zeros((v, v))
    if noise == "absorbing":
        rates[:, mask_id] = 1.0
    return rates - np.diag(rates.sum(1))


def transition(noise, v, mask_id, sigma):
    """exp(sigma G) by scaling, a Taylor series and squaring."""
    g = generator(noise, v, mask_id) * sigma / 2**20
    p = np.eye(v) + g + g @ g / 2
    for _ in range(20):
        p = p @ p
    return p


def d3pm(logits, tokens, noisy, a_s, a_t, noise, mask_id):
    out = np.zeros(tokens.shape)
    v = logits.shape[-1]
    for b, i in np.ndindex(tokens.shape):
        x0, xt = tokens[b, i], noisy[b, i]
        to_s = transition(noise, v, mask_id, -math.log(a_s[b, i]))
        to_t = transition(noise, v, mask_id, -math.log(a_t[b, i] / a_s[b, i]))
        weights = np.exp(logits[b, i] - logits[b, i].max())
        if noise == "absorbing":
            weights[mask_id] = 0
        network = weights / weights.sum()
        if noise == "absorbing" and xt != mask_id:
            network = np.eye(v)[xt]
        q = np.array([to_s[x0, s] * to_t[s, xt] for s in range(v)])
        p = np.array([sum(network[y] * to_s[y, s] for y in range(v)) * to_t[s, xt] for s in range(v)])
        q, p = q / q.sum(), p / p.sum()
        out[b, i] = sum(q[s] * math.log(q[s] / p[s]) for s in range(v) if q[s] > 1e-14)
    return out


def score_entropy(log_scores, tokens, noisy, a, d_a, noise, mask_id):
    out = np.zeros(tokens.shape)
    v = log_scores.shape[-1]
    rates = generator(noise, v, mask_id)
    for b, i in np.ndindex(tokens.shape):
        p = transition(noise, v, mask_id, -math.log(a[b, i]))[tokens[b, i]]
        x = noisy[b, i]
        for y in range(v):
            if y == x or rates[y, x] == 0:
                continue
            r, s = p[y] / p[x], math.exp(log_scores[b, i, y])
            known = r * (math.log(r) - 1) if r > 1e-12 else 0.0
            out[b, i] += rates[y, x] * (s - r * log_scores[b, i, y] + known)
        out[b, i] *= -d_a[b, i] / a[b, i]
    return out


def all_masks(length):
    """Every non-empty set of masked places, as tuples of bool."""
    return [mask for mask in itertools.product([False, True], repeat=length) if any(mask)]


def any_order(log_prob, length):
    """Mean over orders of -log p: log_prob[mask][i] is that of token i where `mask` is masked."""
    total = 0.0
    for order in itertools.permutations(range(length)):
        hidden = set(range(length))
        for i in order:
            total -= log_prob[tuple(j in hidden for j in range(length))][i]
            hidden.remove(i)
    return total / math.factorial(length)


def bound_by_time(log_prob, length, points=40):
    """Integral over t of the 1 / t form, by Gauss-Legendre: exact for polynomials."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total = 0.0
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        for mask in all_masks(length):
            m = sum(mask)
            chance = t**m * (1 - t) ** (length - m)
            total += w * chance / t * sum(-log_prob[mask][i] for i in range(length) if mask[i])
    return total
