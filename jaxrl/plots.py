"""Learning curves as a PNG, from the rows of a `metrics.jsonl`."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

PANELS = {
    "reward": ("reward/mean",),
    "held-out accuracy, greedy": ("eval/accuracy", "eval/reward"),
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
