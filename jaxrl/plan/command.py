"""`jaxrl plan`: counts, compiles, compares and prints."""

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxrl import config, networks
from jaxrl.display import Display
from jaxrl.nets import presets
from jaxrl.nets.config import TransformerConfig
from jaxrl.parallel.mesh import mesh_sizes
from jaxrl.plan import chips, compiled, other, report
from jaxrl.plan.options import MODELS, Plan
from jaxrl.plan.search import misfit, sampler_mesh, search
from jaxrl.plan.traffic import phases
from jaxrl.plan.work import Work


def run(options: Plan, *, display: Display | None = None) -> dict[str, Any]:
    """Plans a step and prints what it takes.

    Args:
      options: which model, chips, mesh and step.
      display: where to show progress and tables; None makes one.

    Returns:
      the figures of `report.figures` of the best way, with all ways under "candidates", as `--out` writes them.

    Raises:
      ValueError: a model, topology or mesh that is not known or does not divide; nothing that fits.
    """
    place = chips.topology(options.topology)
    model = model_of(options.model)
    ways: Callable[[Display], list[Any]]
    programs: Any = compiled.programs
    figures: Any = report.figures
    show = report.show
    if isinstance(model, TransformerConfig):
        ways, title = partial(_ways, options, work_of(options, place), place), f"{options.model}, {options.task}"
    else:
        step = other.step_of(model, options, _sizes(options.mesh, place))
        ways, title = lambda _: [step], f"{options.model}, {step.objective.what}"
        programs, figures, show = other.programs, other.figures, other.show
    display = display or Display()
    reason = _start(options, place)
    with display:
        if reason:
            display.note(f"counted, not compiled: {reason}")
        results = []
        for way in ways(display):
            quick = options.effort == "quick" and programs is compiled.programs
            done = {} if reason else _compile(programs(way, place), way.mesh, display, quick=quick)
            results.append(figures(way, place, done))
            show(results[-1], title, display)
        if len(results) > 1:
            report.compare(results, display)
    best = min(results, key=lambda one: (not one["fits"], one["step_seconds"]))
    found = {"options": config.to_json(options), "not_compiled": reason, **best, "candidates": results}
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
        display.note(f"wrote {options.out}")
    return found


def work_of(options: Plan, place: chips.Topology) -> Work:
    """The step of a Transformer of tokens that the options describe.

    Raises:
      ValueError: a model that is none, or a mesh that does not fit the chips.
    """
    model = model_of(options.model)
    if not isinstance(model, TransformerConfig):
        raise ValueError(f"model is {options.model!r}, no Transformer of tokens; its plan is `other.step_of`'s")
    if not model.causal and options.task != "sft":
        raise ValueError(
            f"{options.model} sees tokens on both sides: --task {options.task} counts what networks do that read from "
            "left to right; plan it with --task sft"
        )
    types = {"dtype": options.dtype, "param_dtype": options.param_dtype, "cache_dtype": options.cache or None}
    own = options.sampler_mesh not in ("", "auto")
    grpo = options.task == "grpo"
    return Work(
        dataclasses.replace(model, remat=options.remat, **types),
        options.task,
        options.batch,
        options.length,
        _sizes(options.mesh, place),
        sampler_mesh=_sizes(options.sampler_mesh, place) if own else None,
        completion=(options.completion or options.length // 2) if grpo else 0,
        group=options.group if grpo else 1,
        reference=options.reference,
        micro_batches=options.micro_batches,
        zero=options.zero,
        optimizer=options.optimizer,
        chips=place.chip.kind,
    )


def model_of(name: str) -> TransformerConfig | networks.Network:
    """What a name of `MODELS` or of `jaxrl nets` stands for: a Transformer of tokens, or another network.

    Of a vision-language network it is the decoder, of an encoder with layers of its own its Transformer.

    Raises:
      ValueError: an unknown name.
    """
    if name in MODELS:
        return getattr(presets, MODELS[name])()
    try:
        found = networks.find(name)
    except ValueError:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model is {name!r}; expected one of {', '.join(MODELS)}, or a name that `jaxrl nets` lists{hint}"
        ) from None
    of: Any = found.config
    one = getattr(of, "transformer", getattr(of, "text", of))
    plain = isinstance(one, TransformerConfig) and not one.share_layers and one.embed_width in (None, one.width)
    return one if plain else found


def _sizes(spec: str, place: chips.Topology) -> dict[str, int]:
    sizes = mesh_sizes(spec, place.devices)
    if math.prod(sizes.values()) != place.devices:
        raise ValueError(
            f"mesh {spec!r} has {math.prod(sizes.values())} places for the {place.devices} devices of {place.name}; "
            "the sizes must multiply to their number, and one may be -1"
        )
    return sizes


def _start(options: Plan, place: chips.Topology) -> str | None:
    """Why nothing can be compiled, or None. What JAX is to look for is said before it looks: no accelerator."""
    jax.config.update("jax_platforms", "cpu")
    if not options.compile:
        return "--no-compile"
    if place.chip.kind == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX has begun: `missing` says whether with enough
            jax.config.update("jax_num_cpu_devices", place.devices)
    return compiled.missing(place)


def _ways(options: Plan, work: Work, place: chips.Topology, display: Display) -> list[Work]:
    """The step as given, or the best that a search finds."""
    auto = options.task == "grpo" and options.sampler_mesh == "auto"
    if not options.search:
        if reason := misfit(work):
            raise ValueError(f"mesh {report.mesh_name(work.mesh)!r} on {place.name}: {reason}")
        chips.over_slices(place, work.mesh)
        if auto:
            work = dataclasses.replace(work, sampler_mesh=sampler_mesh(work, place))
        return [work]
    found = search(work, place, own_sampler=auto)
    if not found:
        raise ValueError(
            f"no mesh of the {place.devices} devices of {place.name} holds {options.model} with a batch of "
            f"{work.batch} rows of {work.length} tokens; give more chips, shorter rows, a batch that they divide, or "
            "--optimizer int8"
        )
    rows = []
    for one in found[:10]:
        size, bound = f"{one.memory / report.GIB:.2f}", phases(one.work, place)["train"].bound
        way = (report.mesh_name(one.work.mesh), one.work.config.remat, str(one.work.micro_batches))
        rows.append((*way, size, f"{one.seconds:.3g}", f"{one.serial:.3g}", bound))
    columns = ("mesh", "remat", "parts", "GiB", "step s", "serial", "bound")
    display.table(f"{len(found)} ways fit, counted; the best", columns, rows)
    return [one.work for one in found[: options.candidates]]


def _compile(
    makers: Mapping[str, Callable], mesh: Mapping[str, int], display: Display, *, quick: bool
) -> dict[str, compiled.Compiled | str]:
    """The compiled programs by name, or why one does not fit."""
    display.stage(f"compile {report.mesh_name(mesh)}", steps=len(makers))
    done: dict[str, compiled.Compiled | str] = {}
    for number, (name, make) in enumerate(makers.items()):
        display.update(number, {}, rate=f"compiling {name}")
        try:
            done[name] = compiled.compile_program(name, make(), quick=quick)
        except MemoryError as error:
            done[name] = str(error)
        display.update(number + 1, {}, rate="")
    return done
