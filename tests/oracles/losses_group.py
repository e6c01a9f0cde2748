"""The GRPO family in float64, each method written out from its own paper, sequence by sequence and token by
token.

Every objective here is returned negated, as a loss of the whole batch. `lp` are the log-probs to
differentiate in; `at` are the same numbers held fixed, for what a paper puts under a stop-gradient.
"""

import numpy as np

from tests.oracles import returns

LENGTH = 7  # Dr.GRPO's divisor in the tests


def tokens_of(mask):
    return [[t for t in range(mask.shape[1]) if mask[i, t]] for i in range(mask.shape[0])]


def clipped(r, a, low, high):
    return min(r * a, min(max(r, 1 - low), 1 + high) * a)


def k3(lp, ref):
    return np.exp(ref - lp) - (ref - lp) - 1


def grpo(lp, at, old, ref, rewards, mask, kl_coef=0.04):
    a = returns.group_relative(rewards).reshape(-1)
    rows = [(i, ts) for i, ts in enumerate(tokens_of(mask)) if ts]
    total = 0.0
    for i, ts in rows:
        of_row = 0.0
        for t in ts:
            of_row += clipped(np.exp(lp[i, t] - old[i, t]), a[i], 0.2, 0.2) - kl_coef * k3(lp[i, t], ref[i, t])
        total += of_row / len(ts)
    return -total / len(rows)


def dr_grpo(lp, at, old, ref, rewards, mask):
    a = returns.group_relative(rewards, scale="none").reshape(-1)
    rows = [(i, ts) for i, ts in enumerate(tokens_of(mask)) if ts]
    total = sum(clipped(np.exp(lp[i, t] - old[i, t]), a[i], 0.2, 0.2) for i, ts in rows for t in ts)
    return -total / LENGTH / len(rows)


def dapo(lp, at, old, ref, rewards, mask):
    a = returns.group_relative(rewards).reshape(-1)
    pairs = [(i, t) for i, ts in enumerate(tokens_of(mask)) for t in ts]
    return -sum(clipped(np.exp(lp[i, t] - old[i, t]), a[i], 0.2, 0.28) for i, t in pairs) / len(pairs)


def gspo(lp, at, old, ref, rewards, mask):
    a = returns.group_relative(rewards).reshape(-1)
    rows = [(i, ts) for i, ts in enumerate(tokens_of(mask)) if ts]
    total = 0.0
    for i, ts in rows:
        s = np.prod([np.exp(lp[i, t] - old[i, t]) for t in ts]) ** (1 / len(ts))
        total += clipped(s, a[i], 3e-4, 4e-4)
    return -total / len(rows)


def gspo_token(lp, at, old, ref, rewards, mask):
    a = returns.group_relative(rewards).reshape(-1)
    rows = [(i, ts) for i, ts in enumerate(tokens_of(mask)) if ts]
    total = 0.0
    for i, ts in rows:
        s = np.prod([np.exp(at[i, t] - old[i, t]) for t in ts]) ** (1 / len(ts))
        total += sum(clipped(s * np.exp(lp[i, t] - at[i, t]), a[i], 3e-4, 4e-4) for t in ts) / len(ts)
    return -total / len(rows)


def cispo(lp, at, old, ref, rewards, mask):
    a = returns.group_relative(rewards).reshape(-1)
    pairs = [(i, t) for i, ts in enumerate(tokens_of(mask)) for t in ts]
    return -sum(min(np.exp(at[i, t] - old[i, t]), 5.0) * a[i] * lp[i, t] for i, t in pairs) / len(pairs)


def rloo(lp, at, old, ref, rewards, mask, kl_coef=0.05):
    of_tokens = tokens_of(mask)
    penalised = [
        reward - kl_coef * sum(old[i, t] - ref[i, t] for t in of_tokens[i])
        for i, reward in enumerate(rewards.reshape(-1))
    ]
    a = returns.leave_one_out(np.reshape(penalised, rewards.shape)).reshape(-1)
    rows = [(i, ts) for i, ts in enumerate(of_tokens) if ts]
    return -sum(a[i] * sum(lp[i, t] for t in ts) for i, ts in rows) / len(rows)


def reinforce_pp(lp, at, old, ref, rewards, mask, kl_coef=0.01):
    pairs = [(i, t) for i, ts in enumerate(tokens_of(mask)) for t in ts]
    a = np.zeros(mask.shape)
    for i, ts in enumerate(tokens_of(mask)):
        for t in ts:
            a[i, t] = rewards.reshape(-1)[i] - kl_coef * sum(old[i, u] - ref[i, u] for u in ts if u >= t)
    a = returns.whiten(a, mask)
    return -sum(clipped(np.exp(lp[i, t] - old[i, t]), a[i, t], 0.2, 0.2) for i, t in pairs) / len(pairs)


def reinforce_pp_baseline(lp, at, old, ref, rewards, mask, kl_coef=0.01):
    pairs = [(i, t) for i, ts in enumerate(tokens_of(mask)) for t in ts]
    a = np.broadcast_to(returns.group_relative(rewards, scale="none").reshape(-1, 1), mask.shape)
    a = returns.whiten(a, mask)
    total = 0.0
    for i, t in pairs:
        total += clipped(np.exp(lp[i, t] - old[i, t]), a[i, t], 0.2, 0.2)
        total -= kl_coef * (lp[i, t] - ref[i, t]) ** 2 / 2
    return -total / len(pairs)


def kimi(lp, at, old, ref, rewards, mask, tau=0.1):
    a = returns.group_relative(rewards, scale="none").reshape(-1)
    rows = [(i, ts) for i, ts in enumerate(tokens_of(mask)) if ts]
    total = 0.0
    for i, ts in rows:
        new, start = sum(lp[i, t] for t in ts), sum(old[i, t] for t in ts)
        total += a[i] * new - tau / 2 * (new - start) ** 2
    return -total / len(rows)


FAMILY = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "kimi": kimi,
}


def gradient(f, x, h=1e-6):
    """Central differences of f, a scalar function of the array x."""
    x, out = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        out[index] = (f(up) - f(down)) / (2 * h)
    return out
