"""What a person sees while a program runs: stage, progress, ETA, rate and a live line of metrics.

Quiet where nobody watches: without a terminal only notes are printed, one line each.
"""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SHORT = {
    "reward/mean": "reward",
    "eval/accuracy": "accuracy",
    "eval/reward": "held-out reward",
    "episode/return": "return",
    "eval/return": "greedy return",
    "policy/entropy": "entropy",
    "completion/length": "length",
    "policy/kl": "KL",
    "train/loss": "loss",
}


class Display:
    """A context manager around a run. `console` defaults to standard output."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[line]}", style="cyan"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = None

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def stage(self, name: str, *, steps: int, done: int = 0) -> None:
        """Begins a stage; until its first `update` it reads "compiling"."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=steps, completed=done, rate="compiling", line="")
        self.note(f"{name}: {steps - done} steps to go, compiling" if done else f"{name}: {steps} steps, compiling")

    def update(self, step: int, metrics: Mapping[str, float], *, rate: str) -> None:
        """Shows where the stage stands; `rate` as in "3,000 tokens/s"."""
        if self._task is not None:
            self._progress.update(self._task, completed=step, rate=rate, line=metrics_line(metrics))

    def note(self, text: str | Text) -> None:
        """Prints a line above the progress bar."""
        self.console.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table above the progress bar."""
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)


def metrics_line(metrics: Mapping[str, float]) -> str:
    """The few numbers worth watching, in one line."""
    return "  ".join(f"{short} {metrics[name]:.3g}" for name, short in SHORT.items() if name in metrics)
