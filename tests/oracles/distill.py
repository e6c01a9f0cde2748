"""Divergences of two categorical distributions in float64, term by term (Agarwal et al. 2023, arXiv 2306.13649)."""

import math


def softmax(x):
    top = max(x)
    total = sum(math.exp(v - top) for v in x)
    return [math.exp(v - top) / total for v in x]


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def divergence(student, teacher, beta, temperature=1.0):
    """From two rows of logits: forward KL at 0, reverse KL at 1, equation 1 between them."""
    q, p = (softmax([v / temperature for v in row]) for row in (student, teacher))
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    mixture = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def slope(student, teacher, beta, temperature=1.0, step=1e-5):
    """Central differences over the student's logits."""
    out = []
    for i in range(len(student)):
        ends = []
        for sign in (1, -1):
            moved = list(student)
            moved[i] += sign * step
            ends.append(divergence(moved, teacher, beta, temperature))
        out.append((ends[0] - ends[1]) / (2 * step))
    return out
