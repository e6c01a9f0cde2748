"""Returns and advantages in float64, by the definitions of the papers: sums and loops, no backward
recursion."""

import numpy as np


def discounted(r, d, bootstrap=0.0):
    """G_t as the sum of all later rewards, each under the product of the discounts before it."""
    T, out = len(r), []
    for t in range(T):
        product, g = 1.0, 0.0
        for k in range(t, T):
            g += product * r[k]
            product *= d[k]
        out.append(g + product * bootstrap)
    return np.array(out)


def n_step(r, d, v, n):
    T, out = len(r), []
    for t in range(T):
        product, g, end = 1.0, 0.0, min(t + n, T)
        for k in range(t, end):
            g += product * r[k]
            product *= d[k]
        out.append(g + product * v[end - 1])
    return np.array(out)


def lambda_forward(r, d, v, lam):
    """Forward view: (1 - lam) sum_n lam^(n-1) G^(n), the longest n-step return taking the remaining
    weight."""
    T, out = len(r), []
    by_n = {n: n_step(r, d, v, n) for n in range(1, T + 1)}
    for t in range(T):
        longest = T - t
        g = sum((1 - lam) * lam ** (n - 1) * by_n[n][t] for n in range(1, longest))
        out.append(g + lam ** (longest - 1) * by_n[longest][t])
    return np.array(out)


def gae(v_tm1, r, v_t, terminated, truncated, gamma, lam):
    """sum_l (gamma lam)^l delta_{t+l} up to and including the step at which the episode ends."""
    T, out = len(r), []
    delta = [r[t] + gamma * (0.0 if terminated[t] else v_t[t]) - v_tm1[t] for t in range(T)]
    for t in range(T):
        total = 0.0
        for k in range(t, T):
            total += (gamma * lam) ** (k - t) * delta[k]
            if terminated[k] or truncated[k]:
                break
        out.append(total)
    return np.array(out)


def vtrace(v_tm1, r, d, v_t, rho, lam=1.0, clip_rho=1.0, clip_c=1.0, clip_pg_rho=1.0):
    """IMPALA, equation 1, for streams whose v_t is v_tm1 one step on (no truncation inside)."""
    T = len(r)
    targets = []
    for t in range(T):
        total, trace, discount = v_tm1[t], 1.0, 1.0
        for k in range(t, T):
            total += discount * trace * min(clip_rho, rho[k]) * (r[k] + d[k] * v_t[k] - v_tm1[k])
            trace *= lam * min(clip_c, rho[k])
            discount *= d[k]
        targets.append(total)
    q = []
    for t in range(T):
        later = v_t[-1] if t == T - 1 else lam * targets[t + 1] + (1 - lam) * v_t[t]
        q.append(r[t] + d[t] * later)
    advantages = [min(clip_pg_rho, rho[t]) * (q[t] - v_tm1[t]) for t in range(T)]
    return np.array(targets), np.array(advantages), np.array(q)


def off_policy(q_tm1, q_t_chosen, v_t, r, d, c):
    """Munos et al., equation 3: q + sum_k (prod gamma c) delta_k, given the estimates q_tm1 of the starting
    pairs.

    Independent of q_tm1 when q_t_chosen[t] == q_tm1[t + 1], as it is for one network on one stream.
    """
    T, out = len(r), []
    for t in range(T):
        total, product = q_tm1[t], 1.0
        for k in range(t, T):
            total += product * (r[k] + d[k] * v_t[k] - q_tm1[k])
            product *= d[k] * c[k]
        out.append(total)
    return np.array(out)


def group_relative(rewards, scale="std", ddof=1, eps=1e-6):
    """[P, G] without missing rewards."""
    rewards = np.asarray(rewards, np.float64)
    out = np.zeros_like(rewards)
    for p, group in enumerate(rewards):
        for g, reward in enumerate(group):
            deviation = reward - group.mean()
            if scale == "std":
                deviation /= group.std(ddof=ddof) + eps
            elif scale == "batch":
                deviation /= rewards.std(ddof=ddof) + eps
            out[p, g] = deviation
    return out


def leave_one_out(rewards):
    rewards = np.asarray(rewards, np.float64)
    out = np.zeros_like(rewards)
    for p, group in enumerate(rewards):
        for g in range(len(group)):
            out[p, g] = group[g] - np.delete(group, g).mean()
    return out


def whiten(x, mask, shift_mean=True, ddof=1, eps=1e-8):
    x, mask = np.asarray(x, np.float64), np.asarray(mask, bool)
    mean, var = x[mask].mean(), x[mask].var(ddof=ddof)
    out = (x - mean) / np.sqrt(var + eps)
    return np.where(mask, out if shift_mean else out + mean, 0.0)
