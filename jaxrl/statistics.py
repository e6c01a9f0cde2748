"""Scores over seeds: the interquartile mean and bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264)."""

import numpy as np


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half: less noisy than the mean, less blind than the median.

    Args:
      scores: `[n, ...]`, n runs. Where 4 does not divide n, the runs at the border count in part.

    Returns:
      `[...]` float64.
    """
    ordered = np.sort(np.asarray(scores, np.float64), axis=0)
    n = len(ordered)
    ends = np.arange(n + 1)
    share = np.clip(np.minimum(ends[1:], 0.75 * n) - np.maximum(ends[:-1], 0.25 * n), 0.0, 1.0)
    return np.tensordot(share, ordered, axes=1) / share.sum()


def bootstrap(
    scores: np.ndarray, statistic=interquartile_mean, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic over runs (Efron 1979).

    Args:
      scores: `[n, ...]`, n runs, drawn with replacement.
      statistic: `[n, ...] -> [...]`.
      level: of confidence.
      resamples: bootstrap samples.
      seed: of the draws.

    Returns:
      `(low [...], high [...])`. With one run both are its score: one seed says nothing about others.
    """
    scores = np.asarray(scores, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(scores), (resamples, len(scores)))
    values = np.stack([statistic(scores[rows]) for rows in draws])
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0))  # pyright: ignore
