"""What a benchmark leaves behind: JSON with everything, a table to read, and two plots."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxrl import runs

JSON, MARKDOWN = "results.json", "results.md"
STYLES = [("C0", "o", "-"), ("C1", "s", "--"), ("C2", "D", "-."), ("C3", "^", ":"), ("C4", "v", "-"), ("C5", "P", "--")]


class Results(NamedTuple):
    """What `results.json` holds.

    about: subject, options, device, versions, load; `finished` is False for a run that was interrupted.
    rows: one for each case, pass and form.
    left_out: what was not measured, and the reason; without a size it holds for all of them.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]
    left_out: list[dict[str, Any]]

    @property
    def title(self) -> str:
        return f"bench {self.about['subject']}: {self.about['device']}, {self.about['options']['dtype']}"

    @property
    def clock(self) -> str:
        """The time to compare by: CPU time on CPU, steady on a busy machine; else wall time."""
        return "cpu_ms" if self.about["platform"] == "cpu" else "wall_ms"


def write_json(results: Results, folder: Path) -> None:
    """Writes `results.json`, whole or not at all."""
    runs.write_json(folder / JSON, results._asdict())


def write_markdown(results: Results, folder: Path) -> None:
    """Writes `results.md`: where it was measured, the tables, what was left out."""
    about = results.about
    given = {name: x for name, x in about["options"].items() if name != "out" and x not in ([], 0)}
    options = ", ".join(f"{name} {' '.join(map(str, x)) if isinstance(x, list) else x}" for name, x in given.items())
    lines = [f"# {results.title}", "", f"jax {about['jax']}; {options}."]
    for title, rows in panels(results).items():
        head, body = cells(results, rows)
        lines += [
            "",
            f"## {title}",
            "",
            *("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)),
        ]
    if results.left_out:
        lines += ["", "## Left out", "", *(f"- {sentence(what)}" for what in results.left_out)]
    if not about["finished"]:
        lines += ["", "Interrupted: these are the sizes that were done."]
    (folder / MARKDOWN).write_text("\n".join(lines) + "\n", encoding="utf-8")


def panels(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rows that belong together, those of one mask and pass, by a title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        passes = "forward and gradients" if row["pass"] == "both" else row["pass"]
        found.setdefault(", ".join([row["mask"], passes] if "mask" in row else [passes]), []).append(row)
    return found


def cells(results: Results, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A panel as a table, its head and its lines; the last column is the time over that of the first form there."""
    axis, first = _axis(rows[0]), results.rows[0]["form"]
    base = {row[axis]: row[results.clock] for row in rows if row["form"] == first}
    unit = "CPU" if results.clock == "cpu_ms" else "wall"
    lines = []
    for row in rows:
        ratio = row[results.clock] / base[row[axis]] if base.get(row[axis]) else None
        numbers = [row[name] for name in ("compile_s", "cpu_ms", "wall_ms", "temporary_mb")] + [ratio]
        lines.append([str(row[axis]), row["form"], *map(_number, numbers)])
    return [axis, "form", "compile s", "CPU ms", "wall ms", "temp. MB", f"{unit} / {first}"], lines


def sentence(what: dict[str, Any]) -> str:
    """An entry of `left_out` in words."""
    where = ", ".join(str(x) for name, x in what.items() if name not in ("form", "reason"))
    return f"{what['form']}{f' ({where})' if where else ''}: {what['reason']}"


def plot(results: Results, folder: Path) -> list[Path]:
    """Draws `time.png` and `memory.png`, a panel for each mask and pass, a line for each form, over the size.

    Returns:
      the paths; none where matplotlib (the extra `plot`) is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return []
    clock = "CPU" if results.clock == "cpu_ms" else "wall"
    paths = []
    for name, key, label in (
        ("time.png", results.clock, f"{clock} ms, median"),
        ("memory.png", "temporary_mb", "temporary MB"),
    ):
        if any(row[key] for row in results.rows):
            _draw(results, key, label, folder / name)
            paths.append(folder / name)
    return paths


def _draw(results, key, label, path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    axis = _axis(results.rows[0])
    found = panels(results)
    forms = list(dict.fromkeys(row["form"] for row in results.rows))
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for number, (title, rows) in enumerate(found.items()):
        for form in forms:
            points = sorted((row[axis], row[key]) for row in rows if row["form"] == form and row[key])
            colour, marker, dashes = STYLES[forms.index(form) % len(STYLES)]
            axes[number].plot(
                [size for size, _ in points],
                [measured for _, measured in points],
                color=colour,
                marker=marker,
                linestyle=dashes,
                label=form,
                markersize=5,
            )
        axes[number].set_title(title, fontsize=10)
    sizes = sorted({row[axis] for row in results.rows})
    for number, panel in enumerate(axes):
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(sizes, [f"{n:,}" for n in sizes])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if number >= len(axes) - columns:
            panel.set_xlabel(axis)
        if number % columns == 0:
            panel.set_ylabel(label)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(forms), fontsize=8, frameon=False
    )
    figure.suptitle(results.title, fontsize=11)
    figure.savefig(path, dpi=120)


def _axis(row: dict[str, Any]) -> str:
    return "tokens" if "tokens" in row else "length"


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
