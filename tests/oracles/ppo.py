"""PPO on completions in float64, by loops over rows and tokens: what stands after a completion's end is never read."""

import numpy as np


def token_rewards(scores, penalties, lengths):
    """Minus the penalty of each token, and the score at the last one."""
    out = np.zeros(np.shape(penalties))
    for row, length in enumerate(lengths):
        for t in range(length):
            out[row, t] = -float(penalties[row][t])
        if length:
            out[row, length - 1] += float(scores[row])
    return out


def token_gae(rewards, values, lengths, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} up to the last token, whose successor is worth nothing."""
    advantages, targets = np.zeros(np.shape(rewards)), np.zeros(np.shape(rewards))
    for row, length in enumerate(lengths):
        delta = []
        for t in range(length):
            after = float(values[row][t + 1]) if t + 1 < length else 0.0
            delta.append(float(rewards[row][t]) + gamma * after - float(values[row][t]))
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            targets[row, t] = advantages[row, t] + float(values[row][t])
    return advantages, targets


def experience(
    old, reference, values, lengths, cut, scores, *, gamma=1.0, lam=0.95, kl_coef=0.05, kl_in="reward",
    normalise="none", score_clip=None, missing_eos=0.0, scale_rewards=False, whiten=False, advantage_clip=None,
):  # fmt: skip
    """Advantages and targets `[B, C]` of a first iteration; rows whose score is NaN are left out (length 0)."""
    scores = np.asarray(scores, np.float64)
    lengths = [0 if np.isnan(s) else int(n) for s, n in zip(scores, lengths, strict=True)]
    known = scores[~np.isnan(scores)]
    shaped = scores.copy()
    if normalise == "normalise":
        shaped = shaped - known.mean()
    if normalise != "none":
        shaped = shaped / known.std()
    if score_clip is not None:
        shaped = np.clip(shaped, -score_clip, score_clip)
    shaped = np.where(cut, shaped - missing_eos, shaped)
    penalties = kl_coef * (np.asarray(old, np.float64) - np.asarray(reference, np.float64))
    rewards = token_rewards(shaped, penalties if kl_in == "reward" else 0.0 * penalties, lengths)
    if scale_rewards:
        returns = [sum(gamma**t * rewards[i, t] for t in range(n)) for i, n in enumerate(lengths) if n]
        rewards = rewards / np.std(returns)
    advantages, targets = token_gae(rewards, values, lengths, gamma, lam)
    inside = np.arange(advantages.shape[1])[None] < np.asarray(lengths)[:, None]
    if whiten:
        counted = advantages[inside]
        advantages = np.where(inside, (advantages - counted.mean()) / counted.std(ddof=1), 0.0)
    if advantage_clip is not None:
        advantages = np.clip(advantages, -advantage_clip, advantage_clip)
    return advantages, targets, inside.astype(np.float64)
