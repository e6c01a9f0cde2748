"""Token log-probabilities, entropies and their gradients in float64, one token at a time."""

import numpy as np


def select_log_probs(logits, targets):
    """(log_probs, entropy), both of the shape of targets; logits [..., V]."""
    return _each_token(logits, targets)[:2]


def _each_token(logits, targets):
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    log_probs, entropy, lse = (np.zeros(targets.shape) for _ in range(3))
    for at in np.ndindex(targets.shape):
        x = logits[at]
        p = np.exp(x - x.max())
        lse[at] = x.max() + np.log(p.sum())
        p = p / p.sum()
        log_probs[at] = np.log(p[targets[at]]) if p[targets[at]] > 0 else -np.inf
        entropy[at] = -sum(a * np.log(a) for a in p if a > 0)
    return log_probs, entropy, lse


def token_log_probs(hidden, unembedding, targets, *, temperature=1.0, soft_cap=None, return_lse=False):
    """The same from hidden states [B, T, D] and unembedding [D, V]."""
    x = np.einsum("btd,dv->btv", np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64))
    if soft_cap is not None:
        x = soft_cap * np.tanh(x / soft_cap)
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), targets.shape)
    out = _each_token(x / temperature[..., None], targets)
    return out if return_lse else out[:2]


def gradients(hidden, unembedding, targets, cotangents, *, temperature=1.0, soft_cap=None):
    """Gradients of sum(g * log_probs + g_entropy * entropy + g_lse * lse) by the full Jacobian of the softmax.

    Args:
      cotangents: (g, g_entropy, g_lse), each [B, T].

    Returns:
      Those of hidden [B, T, D], unembedding [D, V] and the temperature of each token [B, T].
    """
    hidden, unembedding = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), targets.shape)
    d_hidden, d_unembedding = np.zeros(hidden.shape), np.zeros(unembedding.shape)
    d_temperature = np.zeros(targets.shape)
    for at in np.ndindex(targets.shape):
        u = hidden[at] @ unembedding
        capped, slope = u, np.ones_like(u)
        if soft_cap is not None:
            capped = soft_cap * np.tanh(u / soft_cap)
            slope = 1 / np.cosh(u / soft_cap) ** 2
        x = capped / temperature[at]
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        jacobian = np.diag(p) - np.outer(p, p)  # dp_u / dx_v
        g, g_entropy, g_lse = (float(c[at]) for c in cotangents)
        dp = -g_entropy * (np.log(p) + 1)
        dp[targets[at]] += g / p[targets[at]]
        dx = jacobian @ dp + g_lse * p
        du = dx * slope / temperature[at]
        d_hidden[at] = unembedding @ du
        d_unembedding += np.outer(hidden[at], du)
        d_temperature[at] = -np.sum(dx * capped) / temperature[at] ** 2
    return d_hidden, d_unembedding, d_temperature
