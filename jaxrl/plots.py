"""Learning curves as a PNG, from the rows of a `metrics.jsonl`."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxrl import statistics

PANELS = {
    "reward": ("reward/mean",),
    "held-out accuracy, greedy": ("eval/accuracy", "eval/reward"),
    "held-out pairs in order": ("eval/pair_accuracy", "eval/step_accuracy"),
    "reward margin": ("rewards/margins",),
    "entropy (nats)": ("policy/entropy",),
    "completion length (tokens)": ("completion/length",),
    "KL to the start (nats)": ("policy/kl",),
    "loss": ("train/loss",),
}


def curves(rows: Iterable[Mapping[str, float]], path: str | os.PathLike, *, title: str = "") -> Path | None:
    """Draws every panel that has numbers.

    Args:
      rows: dicts with `step` and `group/name` keys.
      path: the PNG to write.
      title: above the panels.

    Returns:
      The path, or None where matplotlib (the extra `plot`) is not installed or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    rows = list(rows)
    found = {}
    for label, names in PANELS.items():
        points = [(row["step"], row[n]) for row in rows for n in names if row.get(n) is not None]
        if len(points) > 1:
            found[label] = points
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * lines), layout="constrained")
    for number, (label, points) in enumerate(found.items(), 1):
        axes = figure.add_subplot(lines, columns, number)
        steps, values = zip(*points, strict=True)
        few = len(points) < 60
        axes.plot(steps, values, marker="o" if few else None, markersize=3, linewidth=1.2, color="tab:blue")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if number > len(found) - columns:
            axes.set_xlabel("step")
        if "accuracy" in label:
            axes.set_ylim(-0.02, 1.02)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    return Path(path)


def bands(
    steps: np.ndarray, curves: Mapping[str, np.ndarray], path: str | os.PathLike, *, title: str = ""
) -> Path | None:
    """Draws returns over environment steps: interquartile mean and 95 % bootstrap band over seeds for each curve.

    Args:
      steps: `[P]` environment steps.
      curves: label -> `[P, seeds]` mean returns.
      path: the PNG to write.
      title: above the picture.

    Returns:
      The path, or None where matplotlib (the extra `plot`) is not installed or there are fewer than two points.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    if len(steps) < 2:
        return None
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, scores) in enumerate(curves.items()):
        colour, seeds = f"C{number % 10}", scores.shape[1]
        axes.plot(steps, statistics.interquartile_mean(scores.T), color=colour, linewidth=1.6, label=label)
        if seeds > 1:
            low, high = statistics.bootstrap(scores.T)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    seeds = max(scores.shape[1] for scores in curves.values())
    axes.set_xlabel("environment steps")
    axes.set_ylabel("greedy return")
    axes.ticklabel_format(axis="x", style="plain")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)
    about = f"interquartile mean and 95 % band of {seeds} seeds" if seeds > 1 else ""
    axes.set_title("\n".join(filter(None, [title, about])), fontsize=10)
    figure.savefig(path, dpi=120)
    return Path(path)
