"""From a set-up to a finished run folder: the loop with its evaluations, checkpoints, processes and signals."""

import contextlib
import json
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxrl import checkpoint, config, loop, metrics, plots, runs
from jaxrl.display import Display, metrics_line
from jaxrl.parallel import faults, processes
from jaxrl.posttrain import adapter as adapting
from jaxrl.posttrain import update
from jaxrl.posttrain.recipes.common import Evaluation, Outcome, RunOptions, Setup


def drive(
    kind: str,
    run: RunOptions,
    setup: Setup,
    init: Callable,
    step: Callable,
    data: Any,
    evaluation: Evaluation | None,
    *,
    max_tokens: int,
    jit: bool = True,
    begin: Callable | None = None,
    alone: str = "",
    stop_at: float = 0.0,
    resume: bool,
    display: Display | None,
) -> Outcome:
    """Runs the loop between a fresh or restored state and a finished run folder.

    `begin`: `(state, data) -> state`, what else is done before the first step. `alone`: what several processes cannot
    share; empty: nothing.
    """
    folder, key = Path(run.out), jax.random.key(run.seed)
    shapes = jax.eval_shape(init, key, jax.eval_shape(setup.initial))
    if setup.adapter is not None and not isinstance(shapes, adapting.Over):
        raise ValueError(f"jaxrl train {kind} takes no adapter; leave --adapter.kind {run.adapter.kind} out")
    if setup.mesh is not None:
        setup.shardings(shapes)
    if jit:
        jax.eval_shape(step, shapes, data)  # what does not fit together is found before anything is written
    _check_processes(run, data, alone=alone)
    seen = lambda there: processes.same(
        f"run folder {folder}, or none (all must see it)", _seen(folder / runs.CONFIG, there)
    )
    seen(processes.on_main(partial(_check_folder, folder, setup, resume=resume)))
    state, done = _initial_state(folder, init, key, setup, begin and partial(begin, problems=data))
    if done > run.steps:
        raise ValueError(f"{folder} is at step {done} and steps is {run.steps}; expected at least {done}")
    seen(processes.on_main(partial(_write_folder, folder, kind, run, setup, max_tokens=max_tokens)))
    if setup.mesh is not None:
        processes.on_main(lambda: (folder / runs.SHARDING).write_text(setup.report(shapes) + "\n"))
    if setup.mesh is not None and jit:
        data = processes.everywhere(data, NamedSharding(setup.mesh, PartitionSpec()))
    log = metrics.MetricsLog(folder / runs.METRICS, after_step=done or -1) if processes.is_main() else None

    def past() -> tuple[float, int, float]:
        """Seconds of the run until now; step and score of the last evaluation."""
        rows = list(metrics.read(folder / runs.METRICS))
        name = evaluation.name if evaluation else ""
        scores = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return max((row.get("time/elapsed", 0.0) for row in rows), default=0.0), *(scores or [(-1, 0.0)])[-1]

    spent, *evaluated = processes.on_main(past)
    begun = time.perf_counter()
    elapsed = lambda: spent + time.perf_counter() - begun

    def write(step: int, row: dict[str, float]) -> None:
        if log is not None:
            log.write(step, {**row, "time/elapsed": elapsed()})

    with contextlib.nullcontext(display) if display else _display() as view, faults.preemption() as told_to_stop:

        def evaluate(step: int, metrics_now: dict[str, float], *, samples: bool = False) -> None:
            """Scores the held-out problems, once for each step, and shows a few where asked."""
            nonlocal evaluated
            if evaluation is None or (evaluated[0] == step and not samples):
                return
            score, texts, scores = evaluation.score(adapting.whole(state))
            if evaluated[0] != step:
                write(step, {evaluation.name: score})
                view.note(f"  step {step}: {metrics_line({evaluation.name: score, **metrics_now})}")
            evaluated = [step, score]
            if samples:
                rows = list(zip(setup.task.held_out, texts, scores, strict=True))
                rows = rows[:: max(len(rows) // 6, 1)][:6]
                view.table(
                    f"held-out at step {step}",
                    ("prompt", "completion", "answer", "reward"),
                    [(str(r["prompt"]), text, str(r.get("answer", "")), f"{value:g}") for r, text, value in rows],
                )

        if processes.count() > 1:
            view.note(
                f"{processes.count()} processes with {jax.device_count()} devices; if one is lost the others end: then "
                f"start all of them again with: jaxrl train {kind} --resume {folder}"
            )
        view.stage(kind.upper(), steps=run.steps, done=done)
        if done == 0:
            evaluate(0, {}, samples=True)
        elif _crossed(done - (done % run.chunk or run.chunk), done, run.eval_every):
            evaluate(done, {})  # where it stopped before its evaluation
        last: dict[str, float] = {}
        reached = lambda: evaluated[0] == done and 0 < stop_at <= evaluated[1]
        finite = jax.jit(update.is_finite)
        steps = done if reached() else run.steps
        free = time.perf_counter()
        suspect = reported = -1  # the process that was too slow in the last chunk; that of which a word was said
        try:
            for progress in loop.run(step, state, data, steps=steps, chunk=run.chunk, jit=jit, patience=run.patience):
                state, last, first = progress.state, progress.metrics[-1], done
                done = progress.step
                waited = time.perf_counter() - free - progress.seconds - progress.compile_seconds
                pace = faults.meet(stop=told_to_stop(), host=waited, chunk=progress.seconds)
                free = time.perf_counter()
                rate = sum(row["throughput/tokens"] for row in progress.metrics) / max(progress.seconds, 1e-9)
                extra = {"throughput/tokens_per_second": rate}
                if processes.count() > 1:
                    extra["time/slowest_process"] = pace.factor
                for number, row in enumerate(progress.metrics, first + 1):
                    write(number, row | extra)
                view.update(done, last, rate=f"{rate:,.0f} tokens/s")
                suspect, before = pace.slowest if pace.straggles else -1, suspect
                if suspect >= 0 and suspect == before != reported:
                    reported = suspect
                    view.note(f"  step {done}: {pace.complaint()}")
                if _crossed(first, done, run.eval_every) and not pace.stop:
                    evaluate(done, last)
                due = _crossed(first, done, run.save_every) or done == run.steps or reached() or pace.stop
                if due and finite(state.params):  # a bad state never pushes out a good one
                    checkpoint.save(folder / runs.CHECKPOINTS, done, adapting.trained(state), keep=run.keep)
                if pace.stop and done < run.steps:
                    view.note(f"told to stop after step {done}; go on with: jaxrl train {kind} --resume {folder}")
                    raise faults.Preempted()
                if reached():
                    break
        except KeyboardInterrupt:
            view.note(f"interrupted; go on with: jaxrl train {kind} --resume {folder}")
            raise
        evaluate(done, last, samples=True)

    def finish() -> dict[str, Any]:
        rows = list(metrics.read(folder / runs.METRICS))
        plots.curves(rows, folder / "curves.png", title=f"{kind.upper()} on {run.data}")
        summary = {"kind": kind, "steps": done, "seconds": elapsed(), "skipped": int(adapting.trained(state).skipped)}
        if evaluation is not None:
            name = evaluation.name.removeprefix("eval/")
            scores = [row[evaluation.name] for row in rows if evaluation.name in row]
            summary |= {f"{name}_before": scores[0], f"{name}_after": scores[-1]}
        summary |= {"config": config.to_json(run), **runs.environment()}
        runs.write_json(folder / runs.SUMMARY, summary)
        return summary

    return Outcome(folder, processes.on_main(finish), state)


def _seen(file: Path, expected: int, *, seconds: float = 60.0) -> int:
    """Checksum of a file, 0 of none; a network file system gets some time to show the one that was written."""
    until = time.monotonic() + seconds
    while (found := zlib.crc32(file.read_bytes()) if file.is_file() else 0) != expected and time.monotonic() < until:
        time.sleep(1.0)
    return found


def _display() -> Display:
    """Of process 0; the others say nothing."""
    return Display() if processes.is_main() else Display(Console(quiet=True))


def _check_processes(run: RunOptions, data: Any, *, alone: str) -> None:
    """Raises ValueError where several processes cannot do this run together, or do not mean the same one."""
    count = processes.count()
    if count == 1:
        return
    if not run.mesh:
        raise ValueError(
            f"{count} processes with {jax.device_count()} devices have no mesh; give --mesh auto or "
            f"--mesh fsdp={jax.device_count()}, or start one process"
        )
    if alone:
        raise ValueError(f"{count} processes cannot share a run with {alone}; leave it out, or start one process")
    said = json.dumps([config.to_json(run), runs.environment()["versions"]])
    sums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(data)]
    processes.same("options, data or versions", zlib.crc32(f"{said} {sums}".encode()))


def _check_folder(folder: Path, setup: Setup, *, resume: bool) -> int:
    """Whether the folder can serve; the checksum of its config, 0 of a new one."""
    if not resume:
        runs.check_new(folder)
        return 0
    runs.read_config(folder)
    runs.check_origin(folder, setup.origin)
    return zlib.crc32((folder / runs.CONFIG).read_bytes())


def _write_folder(folder: Path, kind: str, run: RunOptions, setup: Setup, *, max_tokens: int) -> int:
    """Writes what makes the folder a run; the checksum of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    example = setup.task.held_out[0].get("prompt", "")
    runs.write_model(
        folder,
        setup.transformer,
        setup.task.tokenizer,
        marker=setup.task.marker,
        max_tokens=max_tokens,
        example=example if isinstance(example, str) else "",
        origin=setup.origin,
        masks=None if setup.filling is None else {"token": setup.filling.mask_id, "block": setup.filling.block},
    )
    runs.write_config(folder, kind, run)
    return zlib.crc32((folder / runs.CONFIG).read_bytes())


def _initial_state(
    folder: Path, init: Callable, key: jax.Array, setup: Setup, begin: Callable | None
) -> tuple[Any, int]:
    """The newest intact checkpoint of the folder, or a fresh state, laid out on the mesh."""
    fresh = lambda key, start: adapting.trained(init(key, start))
    shapes = jax.eval_shape(fresh, key, jax.eval_shape(setup.initial))
    at_first = shapes
    shapes = shapes if begin is None else jax.eval_shape(begin, shapes)
    places = None if setup.mesh is None else setup.shardings(shapes)
    if processes.on_main(lambda: len(checkpoint.steps(folder / runs.CHECKPOINTS))):
        if places is not None:
            place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            shapes = jax.tree.map(place, shapes, places)
        state, done = checkpoint.restore(folder / runs.CHECKPOINTS, shapes)
    else:
        out = None if places is None else setup.shardings(at_first)
        state, done = jax.jit(fresh, out_shardings=out)(key, setup.initial()), 0
        state = state if begin is None else begin(state)
    if setup.adapter is None:
        return state, done
    return adapting.Over(setup.initial(), state), done


def _crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every
