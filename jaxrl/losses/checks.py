"""Trace-time checks of the losses: what was given, what was expected, how to mend it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp


def same_shape(axes: str, **arrays: Any) -> None:
    """Raises ValueError unless every array has the shape of the first; None is skipped.

    `axes` names the axes in the message ("[B, T]"); when it has a fixed number of them, the rank is checked
    too.
    """
    given = {name: jnp.shape(array) for name, array in arrays.items() if array is not None}
    first, shape = next(iter(given.items()))
    if "..." not in axes and len(shape) != axes.count(",") + 1:
        raise ValueError(f"{first} has shape {shape}, expected {axes}: add or remove axes, or use jax.vmap")
    for name, other in given.items():
        if other != shape:
            raise ValueError(
                f"{name} has shape {other} but {first} has shape {shape}; both must be {axes}: "
                "align them before the call (nothing is broadcast)"
            )


def choice(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry `name` of `table`; raises ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"{what} is {name!r}, expected one of {', '.join(map(repr, table))}")
    return table[name]
