"""Grid worlds as pictures: values as colours and numbers, policies as arrows."""

from typing import Any

import numpy as np

from jaxrl.tabular.gridworld import Layout


def draw_grid(
    layout: Layout,
    values: Any = None,
    policy: Any = None,
    *,
    axes: Any = None,
    title: str = "",
    numbers: bool = True,
    limits: tuple[float, float] | None = None,
    path: Any = None,
) -> Any:
    """Draws a grid world (needs matplotlib, the extra `plot`).

    Targets have a green frame, forbidden cells a red one, the start is marked S.

    Args:
      layout: where things are.
      values: [S] colours, dark is low; NaN leaves a cell blank, None all of them.
      policy: [S, A] arrows, as long as the action is probable; a ring is staying. None for none.
      axes: matplotlib's, to draw on; None makes a figure.
      title: above the grid.
      numbers: whether values are written in the cells too.
      limits: lowest and highest value of the colours; None for those of `values`.
      path: where the figure is saved; None saves nothing.

    Returns:
      The axes.

    Raises:
      ModuleNotFoundError: matplotlib is missing.
      ValueError: arrays that are not of this layout.
    """
    rows, columns = layout.rows, layout.columns
    states, actions = rows * columns, len(layout.moves)
    if values is not None and np.shape(values) != (states,):
        raise ValueError(f"values has shape {np.shape(values)}, expected [S] = [{states}] for {rows} x {columns} cells")
    if policy is not None and np.shape(policy) != (states, actions):
        raise ValueError(f"policy has shape {np.shape(policy)}, expected [S, A] = [{states}, {actions}]")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'jaxrl[plot]'") from missing
    if axes is None:
        axes = Figure(figsize=(0.75 * columns + 0.3, 0.75 * rows + 0.5), layout="constrained").add_subplot()
    shown = np.full((rows, columns), np.nan) if values is None else np.asarray(values, float).reshape(rows, columns)
    low, high = limits or ((np.nanmin(shown), np.nanmax(shown)) if values is not None else (0.0, 1.0))
    axes.imshow(shown, cmap="viridis", vmin=low, vmax=high, alpha=0.75)
    for row, column in layout.cells:
        _cell(axes, layout, row, column)
        dark = np.isfinite(shown[row, column]) and shown[row, column] < low + 0.45 * (high - low)
        ink = "white" if dark else "black"
        if np.isfinite(shown[row, column]) and numbers:
            height = row + (0.3 if policy is not None else 0.0)
            text = f"{shown[row, column]:.1f}".replace("-0.0", "0.0")
            axes.text(column, height, text, ha="center", va="center", fontsize=8, color=ink)
        if policy is not None:
            lifted = 0.12 if values is not None and numbers else 0.0
            _arrows(axes, layout, np.asarray(policy)[layout.state((row, column))], row - lifted, column, ink)
    axes.set(xticks=[], yticks=[], xlim=(-0.54, columns - 0.46), ylim=(rows - 0.46, -0.54))
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10)
    if path is not None:
        axes.figure.savefig(path, dpi=120)
    return axes


def _cell(axes, layout, row, column):
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.5))
    frames = {"tab:red": layout.forbidden, "tab:green": layout.targets}
    for colour, cells in frames.items():
        if (row, column) in cells:
            inner = (column - 0.44, row - 0.44)
            axes.add_patch(Rectangle(inner, 0.88, 0.88, fill=False, edgecolor=colour, linewidth=2.5))
    if (row, column) == layout.start:
        axes.text(column - 0.34, row - 0.32, "S", ha="center", va="center", fontsize=8, weight="bold")


def _arrows(axes, layout, probabilities, row, column, ink):
    for (down, right), probability in zip(layout.moves, probabilities, strict=True):
        if probability < 0.02:
            continue
        if (down, right) == (0, 0):
            axes.plot(column, row, "o", markersize=2 + 7 * probability, fillstyle="none", color=ink)
            continue
        length = 0.3 * probability**0.5 / np.hypot(down, right)
        axes.annotate(
            "",
            xy=(column + length * right, row + length * down),
            xytext=(column, row),
            arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
        )
