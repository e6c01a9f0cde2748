"""Token log-probabilities and entropies in float64, one token at a time."""

import numpy as np


def select_log_probs(logits, targets):
    """(log_probs, entropy), both of the shape of targets; logits [..., V]."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    log_probs, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    for at in np.ndindex(targets.shape):
        x = logits[at]
        p = np.exp(x - x.max())
        p = p / p.sum()
        log_probs[at] = np.log(p[targets[at]]) if p[targets[at]] > 0 else -np.inf
        entropy[at] = -sum(a * np.log(a) for a in p if a > 0)
    return log_probs, entropy


def token_log_probs(hidden, unembedding, targets, *, temperature=1.0, soft_cap=None):
    """The same from hidden states [B, T, D] and unembedding [D, V]."""
    x = np.einsum("btd,dv->btv", np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64))
    if soft_cap is not None:
        x = soft_cap * np.tanh(x / soft_cap)
    return select_log_probs(x / temperature, targets)
