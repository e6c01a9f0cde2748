"""`jaxrl plan`: counts, compiles, compares and prints."""

import contextlib
import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import Any

import jax

from jaxrl import config, networks
from jaxrl.display import Display
from jaxrl.nets import presets
from jaxrl.nets.config import TransformerConfig
from jaxrl.parallel.mesh import mesh_sizes
from jaxrl.plan import chips, compiled, report
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
    work = work_of(options, place)
    display = display or Display()
    reason = _start(options, place)
    with display:
        if reason:
            display.note(f"counted, not compiled: {reason}")
        ways = _ways(options, work, place, display)
        results = []
        for way in ways:
            done = {} if reason else _compile(way, options, place, display)
            results.append(report.figures(way, place, done))
            report.show(results[-1], f"{options.model}, {options.task}", display)
        if len(results) > 1:
            report.compare(results, display)
    best = min(results, key=lambda one: (not one["fits"], one["step_seconds"]))
    found = {"options": config.to_json(options), "not_compiled": reason, **best, "candidates": results}
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
        display.note(f"wrote {options.out}")
    return found


def work_of(options: Plan, place: chips.Topology) -> Work:
    """The step that the options describe.

    Raises:
      ValueError: an unknown model (with the names), or a mesh that does not fit the chips.
    """
    types = {"dtype": options.dtype, "param_dtype": options.param_dtype, "cache_dtype": options.cache or None}
    own = options.sampler_mesh not in ("", "auto")
    grpo = options.task == "grpo"
    return Work(
        dataclasses.replace(transformer_of(options.model), remat=options.remat, **types),
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


def transformer_of(name: str) -> TransformerConfig:
    """The Transformer of a name: one of `MODELS`, or a decoder, encoder or vision-language network of `jaxrl nets`.

    Raises:
      ValueError: an unknown name, or a network that is no Transformer of tokens.
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
    if not isinstance(one, TransformerConfig):
        raise ValueError(
            f"model is {name!r}, a {found.family} network: what is planned is the training of Transformers of tokens; "
            f"`jaxrl nets {name}` shows its size"
        )
    if one.share_layers or one.embed_width not in (None, one.width):
        raise ValueError(
            f"model is {name!r}, which shares its layers' parameters or has embeddings of another width than its "
            "layers; neither is counted here"
        )
    return one


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


def _compile(work: Work, options: Plan, place: chips.Topology, display: Display) -> dict[str, compiled.Compiled | str]:
    """The compiled programs by name, or why one does not fit."""
    makers = compiled.programs(work, place)
    display.stage(f"compile {report.mesh_name(work.mesh)} {work.config.remat}", steps=len(makers))
    done: dict[str, compiled.Compiled | str] = {}
    for number, (name, make) in enumerate(makers.items()):
        display.update(number, {}, rate=f"compiling {name}")
        try:
            done[name] = compiled.compile_program(name, make(), quick=options.effort == "quick")
        except MemoryError as error:
            done[name] = str(error)
        display.update(number + 1, {}, rate="")
    return done
