"""`jaxrl bench SUBJECT`: compiles, times and writes, case by case."""

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
from rich.text import Text

from jaxrl import config, runs
from jaxrl.bench import peers, report, subjects, timing
from jaxrl.bench.options import Bench
from jaxrl.display import Display


def run(subject: str, options: Bench, *, display: Display | None = None) -> report.Results:
    """Measures every form of a subject at every size, and writes JSON, a table and two plots.

    Each program is compiled first; then each is called once, and then all in turn, round after round. What the
    platform lacks, what refuses and what needs too much memory is left out, and said. `results.json` is written after
    every size and pass, so that an interrupted run leaves what it measured.

    Args:
      subject: a key of `options.OPTIONS`.
      options: the subject's own.
      display: where to show progress; None makes one.

    Returns:
      what `results.json` holds.

    Raises:
      ValueError: a folder with results in it; or nothing could be measured.
    """
    folder = Path(options.out or f"runs/bench-{subject}")
    for name in (report.JSON, runs.CONFIG):
        if (folder / name).exists():
            raise ValueError(f"{folder} holds a {name} already; choose another folder with --out")
    cases, display = subjects.cases(subject, options), display or Display()
    results = report.Results(_about(subject, options), [], [])
    passes = getattr(options, "passes", ("forward",))
    begun = time.perf_counter()
    _leave_out_absent(cases, options, results, display)
    folder.mkdir(parents=True, exist_ok=True)
    with display, _compiled_anew():
        display.stage(f"bench {subject}", steps=len(cases) * len(passes))
        try:
            for number, (case, which) in enumerate((case, which) for case in cases for which in passes):
                show = functools.partial(_show, display, number, case, which)
                results.rows.extend(_measure(case, which, options, results, display, show))
                report.write_json(results, folder)
                display.update(number + 1, {}, rate="")
            results.about["finished"] = True
        finally:
            results.about.update(load_after=_load(), seconds=round(time.perf_counter() - begun, 1))
            if results.rows:
                _conclude(results, folder, display)
    if not results.rows:
        reason = results.left_out[0] if results.left_out else {}
        raise ValueError(f"nothing was measured; {reason.get('form')}: {reason.get('reason')}")
    return results


def _measure(case, which, options, results, display, show) -> list[dict[str, Any]]:
    """The rows of one case and pass."""
    labels = case.labels | {"pass": which}

    def refused(form, error):
        reason = error if isinstance(error, str) else _first_line(error)
        _leave_out(results, display, {**labels, "form": form, "reason": reason})

    shapes = jax.eval_shape(case.draw)
    limit = 1e9 * options.memory_gb or 0.9 * timing.free_bytes()
    programs = {}
    for name, form in case.forms.items():
        show(f"compiling {name}")
        try:
            program = form
            if not isinstance(form, peers.Outside):
                program = timing.compile_form(form, shapes, case.wrt if which == "both" else ())
        except Exception as error:  # noqa: BLE001  (any library's way to say no)
            refused(name, error)
            continue
        if isinstance(program, timing.Program) and program.needed > limit:
            refused(name, f"needs {program.needed / 1e9:.3g} GB, {limit / 1e9:.3g} GB may be used")
            continue
        programs[name] = program
    if not programs:
        return []
    show("timing")
    arrays = jax.block_until_ready(jax.jit(case.draw)())
    calls = {name: _call(program, arrays, which) for name, program in programs.items()}
    measured = timing.in_turn(calls, rounds=options.rounds, refused=refused)
    rows = []
    for name, times in measured.items():
        program = programs[name]
        compiled = isinstance(program, timing.Program)
        temporary = program.temporary if compiled else None
        row = labels | {"form": name, "compile_s": program.compile_s if compiled else None, **times}
        rows.append(row | {"temporary_mb": None if temporary is None else temporary / 1e6})
    return rows


def _call(program, arrays, which):
    if isinstance(program, timing.Program):
        return functools.partial(program.call, arrays)
    prepared = functools.cache(lambda: program.prepare(arrays, which == "both"))
    return lambda: prepared()()  # prepared in the call that does not count, where a library may refuse


def _conclude(results, folder, display) -> None:
    """Writes all there is, and says where it is."""
    report.write_json(results, folder)
    report.write_markdown(results, folder)
    for title, rows in report.panels(results).items():
        display.table(f"{results.title}: {title}", *report.cells(results, rows))
    plots = report.plot(results, folder)
    display.note(Text(f"{folder}: " + ", ".join([report.JSON, report.MARKDOWN, *(path.name for path in plots)])))
    if not plots:
        display.note(Text("no plots: pip install 'jaxrl[plot]' draws them"))


def _leave_out_absent(cases, options, results, display) -> None:
    """Takes out what this machine does not have, unless the options name it: then it is tried."""
    if getattr(options, "implementations", ()):
        return
    for form in list(cases[0].forms):
        if reason := subjects.absent(form):
            _leave_out(results, display, {"form": form, "reason": reason})
            for case in cases:
                del case.forms[form]


def _leave_out(results, display, what: dict[str, Any]) -> None:
    results.left_out.append(what)
    display.note(Text(f"left out: {report.sentence(what)}"))


def _show(display, number, case, which, doing) -> None:
    label = ", ".join([*map(str, case.labels.values()), which])
    display.update(number, {}, rate=f"{label}: {doing}")


def _about(subject: str, options: Bench) -> dict[str, Any]:
    return {
        "subject": subject,
        "options": config.to_json(options) | {"dtype": subjects.dtype_of(options)},
        "platform": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "finished": False,
        "load_before": _load(),
        **runs.environment(),
    }


def _load() -> list[float] | None:
    """Programs that wanted a core, on average over 1, 5 and 15 minutes."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _compiled_anew():
    """No program comes from the cache of the command line: compile seconds are those of compiling."""
    settings: Any = jax.config
    before = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
