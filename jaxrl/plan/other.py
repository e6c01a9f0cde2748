"""The plan of networks that are no decoders: their own loss on the rows of each device, counted from its trace."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import networks, parallel
from jaxrl.display import Display
from jaxrl.parallel.sharding import BATCH, check_rows, spec_of
from jaxrl.plan import chips, report
from jaxrl.plan.compiled import Compiled, Program, mesh_on
from jaxrl.plan.hlo import Traffic, by_kind_and_axis
from jaxrl.plan.memory import MOMENTS
from jaxrl.plan.objectives import Objective, objective, retyped
from jaxrl.plan.options import Plan
from jaxrl.plan.products import flops
from jaxrl.plan.traffic import roofline
from jaxrl.plan.work import bytes_of, rows_parts
from jaxrl.posttrain import update

OF_DECODERS = ("task", "sampler_mesh", "reference", "micro_batches", "cache", "search", "zero")
"""Options that say something of decoders' steps alone."""


class Step(NamedTuple):
    """A step of training. params: shapes. mesh: sizes of all axes."""

    params: Any
    objective: Objective
    mesh: Mapping[str, int]
    rows: int
    dtype: str
    param_dtype: str
    optimizer: str


def step_of(network: networks.Network, options: Plan, mesh: Mapping[str, int]) -> Step:
    """The step that the options describe.

    Raises:
      ValueError: options that are for decoders, a mesh axis over which no rows lie, or rows that do not divide.
    """
    odd = [name for name in OF_DECODERS if getattr(options, name) != getattr(Plan, name)]
    if odd:
        raise ValueError(
            f"{options.model} is of the family {network.family}, of which one step of its own loss is planned: leave "
            f"{', '.join(odd)} at the default"
        )
    if others := {axis: n for axis, n in mesh.items() if axis not in BATCH and n > 1}:
        raise ValueError(f"mesh has {others}; {options.model} divides rows alone, over {', '.join(BATCH)}")
    check_rows("batch", options.batch, _abstract(mesh))
    config = retyped(network.config, remat=options.remat, dtype=options.dtype, param_dtype=options.param_dtype)
    one = objective(config, options.batch, options.length)
    shapes = network._replace(config=config).shapes
    return Step(shapes, one, mesh, options.batch, options.dtype, options.param_dtype, options.optimizer)


def figures(step: Step, place: chips.Topology, done: Mapping[str, Compiled | str]) -> dict[str, Any]:
    """What `report.figures` gives of a decoder; of activations only the compiler knows.

    Args:
      step: what is planned.
      place: the chips.
      done: the compiled program as "train", or why it does not fit; empty where nothing was compiled.
    """
    stored, n = bytes_of(step.param_dtype), step.mesh
    sizes, divided = _sizes(step)
    held, whole = sum(sizes), sum(size * parts for size, parts in zip(sizes, divided, strict=True))
    memory = {"parameters": held * stored, "optimizer": held * MOMENTS[step.optimizer], "gradients": held * stored}
    if n["fsdp"] > 1:
        memory["gathered, and their gradients"] = whole * float(bytes_of(step.dtype) + stored)
    memory["data"] = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(step.objective.batch))
    memory["data"] /= rows_parts(n)
    each = flops(jax.value_and_grad(step.objective.loss), step.params, step.objective.batch, _key()) / place.devices
    sent = traffic(step)
    moved = 3.0 * whole * stored + held * (4 * stored + 2 * MOMENTS[step.optimizer])
    phase = roofline(each, moved, sent, place, n)
    said = {name: one if isinstance(one, str) else report.read(one) for name, one in done.items()}
    needed = [math.inf if isinstance(one, str) else one["memory"] + one["code"] for one in said.values()]
    return {
        "topology": place.name,
        "devices": place.devices,
        "mesh": report.mesh_name(n),
        "parameters": {"all": whole},
        "memory_limit": place.chip.memory,
        "memory": {"train": memory},
        "train_flops": {"forward and backward": each},
        "train_traffic": by_kind_and_axis(sent),
        "phases": {
            "train": {**phase._asdict(), "bound": phase.bound, "seconds": phase.seconds, "serial": phase.serial}
        },
        "step_seconds": phase.seconds,
        "step_seconds_serial": phase.serial,
        "rows_per_second": step.rows / phase.seconds,
        "compiled": said,
        "fits": max(needed or [sum(memory.values())]) <= place.chip.memory,
    }


def show(found: Mapping[str, Any], title: str, display: Display) -> None:
    """Prints the tables."""
    display.note(
        f"{title}: {found['parameters']['all']:,} parameters on {found['devices']} devices of {found['topology']}; "
        f"{found['mesh']}"
    )
    report.tables(found, display)
    verdict = "fits" if found["fits"] else "does not fit"
    beside = "" if found["compiled"] else ", but for the activations, which were not counted"
    display.note(
        f"{verdict}{beside}. A step takes at least {found['step_seconds']:.3g} s ({found['step_seconds_serial']:.3g} s "
        f"if nothing overlaps): at most {found['rows_per_second']:,.0f} rows/s"
    )


def traffic(step: Step) -> tuple[Traffic, ...]:
    """Bytes that a device sends: parameters gathered over fsdp and gradients scattered, and all-reduced elsewhere.

    What is gathered has the type of the computation, as compilers cast before they send.
    """
    n, stored = step.mesh, bytes_of(step.param_dtype)
    over = {parts: 0.0 for parts in (1, n["fsdp"])}
    for size, parts in zip(*_sizes(step), strict=True):
        over[parts] += size * stored
    found = []
    if n["fsdp"] > 1:
        sent = over[n["fsdp"]] * (n["fsdp"] - 1)
        found.append(Traffic("all-gather", ("fsdp",), sent * bytes_of(step.dtype) / stored, 1.0))
        found.append(Traffic("reduce-scatter", ("fsdp",), sent, 1.0))
    for parts, size in over.items():
        axes = tuple(axis for axis in BATCH if n[axis] > 1 and not (axis == "fsdp" and parts > 1))
        devices = math.prod(n[axis] for axis in axes)
        if size and devices > 1:
            found.append(Traffic("all-reduce", axes, 2 * size * (devices - 1) / devices, 1.0))
    return tuple(found)


def programs(step: Step, place: chips.Topology) -> dict[str, Callable[[], Program]]:
    """As `compiled.programs`: "train" alone, the loss by `parallel.loss_of_rows`, and the optimizer."""
    return {"train": lambda: _program(step, mesh_on(place, step.mesh))}


def _program(step: Step, mesh: Mesh) -> Program:
    optimizer = update.make_optimizer(update.OptimizerConfig(state=step.optimizer))
    gradient = jax.value_and_grad(parallel.loss_of_rows(step.objective.loss, mesh))

    def train(state, batch, key):
        params, inner = state
        value, found = gradient(params, batch, key)
        change, inner = optimizer.update(found, inner, params)
        return (optax.apply_updates(params, change), inner), value

    state = (step.params, jax.eval_shape(optimizer.init, step.params))
    places = parallel.state_shardings(state, mesh, rules=parallel.ANY_RULES)
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(BATCH))
    batch = jax.tree.map(lambda x: put(x, rows), step.objective.batch)
    arguments = (jax.tree.map(put, state, places), batch, put(_key(), whole))
    return Program(mesh, train, arguments, {"donate_argnums": 0, "out_shardings": (places, None)})


def _sizes(step: Step) -> tuple[list[int], list[int]]:
    """Numbers of each parameter on one device, and over how many devices it is divided."""
    mesh = _abstract(step.mesh)
    found = jax.tree_util.tree_leaves_with_path(step.params)
    parts = [
        step.mesh["fsdp"] if "fsdp" in spec_of(path, x, mesh, rules=parallel.ANY_RULES) else 1 for path, x in found
    ]
    return [math.prod(x.shape) // n for (_, x), n in zip(found, parts, strict=True)], parts


def _abstract(mesh: Mapping[str, int]) -> Any:
    return AbstractMesh(tuple(mesh.values()), tuple(mesh))


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
