"""Arrays laid out anew: from the mesh that trains to the one that samples."""

import functools
import math
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def relaid(tree: Any, places: Any) -> Any:
    """A copy of arrays on a mesh, under other shardings.

    Where both meshes have the same devices, what `fsdp` divided goes from device to device and is gathered at the end,
    so that each receives little more than what it lacks. Left to itself the compiler may gather everything on every
    device first.

    Args:
      tree: arrays under `NamedSharding`s; or traced ones, of which only the shapes are wanted (`jax.eval_shape`).
      places: the `NamedSharding` of each. Other devices: the arrays are sent there.
    """
    leaves, structure = jax.tree.flatten(tree)
    targets = tuple(jax.tree.leaves(places))
    here = lambda x, at: not isinstance(x, Tracer) and _devices(x.sharding) == _devices(at)
    if not all(here(x, at) for x, at in zip(leaves, targets, strict=True)):
        return jax.device_put(tree, places, may_alias=False)
    halfway = tuple(between(x.shape, x.sharding, at) for x, at in zip(leaves, targets, strict=True))
    return jax.tree.unflatten(structure, program(halfway, targets)(leaves))


def _devices(place: Any) -> list | None:
    return (
        list(place.mesh.devices.flat) if isinstance(place, NamedSharding) and place.mesh.devices is not None else None
    )


@functools.lru_cache(maxsize=8)
def program(halfway: tuple[NamedSharding, ...], places: tuple[NamedSharding, ...]) -> Any:
    """The jitted function of a list of arrays."""
    lay = lambda arrays: jax.lax.with_sharding_constraint(arrays, list(halfway))
    return jax.jit(lay, out_shardings=list(places))


def between(shape: tuple[int, ...], before: NamedSharding, after: NamedSharding) -> NamedSharding:
    """As `after`, but the dimension that `fsdp` divided before is divided over all axes that hold copies afterwards."""
    axes = lambda entry: () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    old, new = ([axes(entry) for entry in (*at.spec, *[None] * len(shape))][: len(shape)] for at in (before, after))
    cut = [i for i, names in enumerate(old) if "fsdp" in names and before.mesh.shape["fsdp"] > 1]
    copies = [name for name, size in after.mesh.shape.items() if size > 1 and not any(name in names for names in new)]
    if not cut or not copies:
        return after
    new[cut[0]] = (*copies, *new[cut[0]])
    if shape[cut[0]] % math.prod(after.mesh.shape[name] for name in new[cut[0]]):
        return after
    return NamedSharding(after.mesh, P(*new))
