"""What agents do on a mapped axis of devices; each of these does nothing where `axis_name` is None.

Random numbers of an environment are drawn for the environments of all devices, and a device takes its own: they do not
depend on the number of devices, and drawing costs little beside everything else.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax


def count(axis_name: str | None) -> int:
    """Devices on the axis."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def rows(draw: Callable, n: int, axis_name: str | None) -> Any:
    """This device's rows of `draw(rows of all devices)`: leaves [n, ...]."""
    if axis_name is None:
        return draw(n)
    first = n * jax.lax.axis_index(axis_name)
    drawn = draw(n * count(axis_name))
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, n), drawn)


def own(key: jax.Array, axis_name: str | None) -> jax.Array:
    """A key that no other device has."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def mean(tree: Any, axis_name: str | None) -> Any:
    """Means over the devices, leaf by leaf."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def averaging(optimizer: optax.GradientTransformation, axis_name: str | None) -> optax.GradientTransformation:
    """The optimizer, of the mean of all devices' gradients; its state is the same."""

    def update(updates, state, params=None):
        return optimizer.update(mean(updates, axis_name), state, params)

    return optax.GradientTransformation(optimizer.init, update)
