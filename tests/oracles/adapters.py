"""Adapters in float64, in plain loops, from the papers."""

import math

import numpy as np

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The table of QLoRA's appendix E."""


def lora_kernel(w, a, b, *, rank, alpha, stabilised=False, magnitude=None):
    """W + alpha / r A B (alpha / sqrt(r) for rsLoRA), for W [in, out]; DoRA: columns scaled to their magnitude."""
    scale = alpha / math.sqrt(rank) if stabilised else alpha / rank
    rows, columns = w.shape
    out = np.zeros((rows, columns))
    for j in range(columns):
        for i in range(rows):
            out[i, j] = w[i, j] + scale * sum(float(a[i, k]) * float(b[k, j]) for k in range(rank))
        if magnitude is not None:
            norm = math.sqrt(sum(out[i, j] ** 2 for i in range(rows)))
            out[:, j] = magnitude[j] * out[:, j] / norm
    return out


def nf4_table():
    """The code book from its definition: the means of neighbouring quantiles of N(0, 1), negative and positive halves.

    2^3 + 1 quantiles below zero and 2^3 above it, the last at 1 - (1/32 + 1/30) / 2, scaled to [-1, 1].
    """
    offset = 1 - 0.5 * (1 / 32 + 1 / 30)
    positive = [_normal_quantile(offset + (0.5 - offset) * n / 8) for n in range(8)]
    negative = [-_normal_quantile(offset + (0.5 - offset) * n / 7) for n in range(7)]
    values = sorted([*positive, 0.0, *negative])
    return [value / max(values) for value in values]


def _normal_quantile(p):
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < p:
            low = middle
        else:
            high = middle
    return low


def nf4(w, block=64):
    """(codes [in, out], absmax [blocks, out], kernel before the scales are quantised) of W [in, out]."""
    rows, columns = w.shape
    blocks = -(-rows // block)
    codes, absmax, kernel = np.zeros((rows, columns), int), np.zeros((blocks, columns)), np.zeros((rows, columns))
    for j in range(columns):
        for n in range(blocks):
            inside = range(n * block, min((n + 1) * block, rows))
            absmax[n, j] = max(abs(float(w[i, j])) for i in inside)
            for i in inside:
                value = float(w[i, j]) / absmax[n, j] if absmax[n, j] else 0.0
                codes[i, j] = min(range(16), key=lambda c: abs(NF4[c] - value))
                kernel[i, j] = NF4[codes[i, j]] * absmax[n, j]
    return codes, absmax, kernel


def budget(step, *, first, last, warmup, final, steps):
    """AdaLoRA's b(t), equation 12."""
    if step <= warmup:
        return first
    if step >= steps - final:
        return last
    rest = 1 - (step - warmup) / (steps - warmup - final)
    return math.floor(last + (first - last) * rest**3 + 1e-4)


def orthogonality(triplets):
    """Sum over (P, E, Q) of |P^T P - 1|^2 + |Q Q^T - 1|^2."""
    total = 0.0
    for p, _, q in triplets:
        p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
        rank = p.shape[1]
        for m in range(rank):
            for n in range(rank):
                total += ((p[:, m] * p[:, n]).sum() - (m == n)) ** 2 + ((q[m] * q[n]).sum() - (m == n)) ** 2
    return total


class Importance:
    """Smoothed sensitivity times uncertainty of the triplets of one kernel, equations 7 to 11."""

    def __init__(self, p, e, q, beta1, beta2):
        self.s = [np.zeros_like(x, np.float64) for x in (p, e, q)]
        self.u = [np.zeros_like(x, np.float64) for x in (p, e, q)]
        self.beta1, self.beta2 = beta1, beta2

    def update(self, values, gradients):
        """Scores [r] after a step with these parameters and gradients, (P, E, Q) each."""
        single = []
        for n, (w, g) in enumerate(zip(values, gradients, strict=True)):
            now = np.abs(np.asarray(w, np.float64) * np.asarray(g, np.float64))
            self.s[n] = self.beta1 * self.s[n] + (1 - self.beta1) * now
            self.u[n] = self.beta2 * self.u[n] + (1 - self.beta2) * np.abs(now - self.s[n])
            single.append(self.s[n] * self.u[n])
        p, e, q = single
        return np.array([e[i] + p[:, i].mean() + q[i].mean() for i in range(len(e))])
