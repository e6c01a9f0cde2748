"""Checkpoint tensors to our parameters and back, by a map of names: loud and total.

A map is a plain dict, checkpoint name -> `Place`, or several places where a checkpoint fuses what we keep apart. Every
architecture makes its own from its config; what reads and writes by it stands here once.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np


class Place(NamedTuple):
    """Where a checkpoint tensor lives among our parameters.

    path: "layers/attention/q/kernel". index: into the leading axes that our array stacks, layers or experts.
    axes: `np.transpose(tensor, axes)` is ours; (1, 0) for a matrix stored [out, in], (2, 3, 1, 0) for a convolution
    stored [out, in, height, width]. rows: the part [start, stop) that is meant of the tensor's axis `along`.
    """

    path: str
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None
    along: int = 0

    def part(self, tensor: np.ndarray) -> np.ndarray:
        """Ours, of the checkpoint's tensor."""
        if self.rows is not None:
            tensor = tensor[(*(slice(None),) * self.along, slice(*self.rows))]
        return tensor if self.axes is None else tensor.transpose(self.axes)


Names = Mapping[str, Place | tuple[Place, ...]]
Shapes = Mapping[str, tuple[int, ...]]


def linear(
    theirs: str, ours: str, index: tuple[int, ...] = (), axes: tuple[int, ...] = (1, 0), *, bias: bool = True
) -> dict[str, Place]:
    """Names of a linear layer, stored [out, in]; of a convolution with other axes."""
    places = {f"{theirs}.weight": Place(f"{ours}/kernel", index, axes)}
    return places | ({f"{theirs}.bias": Place(f"{ours}/bias", index)} if bias else {})


def norm(theirs: str, ours: str, index: tuple[int, ...] = ()) -> dict[str, Place]:
    """Names of a LayerNorm."""
    return {f"{theirs}.weight": Place(f"{ours}/scale", index), f"{theirs}.bias": Place(f"{ours}/bias", index)}


def projection(theirs: str, ours: str) -> dict[str, Place]:
    """Names of a convolution over patches, stored [out, in, height, width]."""
    return linear(theirs, ours, axes=(2, 3, 1, 0))


def shapes(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, as the module's init with these arguments makes them; nothing is allocated."""
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _places(found: Place | tuple[Place, ...]) -> tuple[Place, ...]:
    return (found,) if isinstance(found, Place) else found


def _stored_shape(places: tuple[Place, ...], ours: Shapes) -> tuple[int, ...]:
    """The shape that a checkpoint tensor must have."""
    place = places[0]
    shape = ours[place.path][len(place.index) :]
    axes = range(len(shape)) if place.axes is None else place.axes
    stored = [shape[list(axes).index(i)] for i in range(len(shape))]
    if place.rows is not None:
        stored[place.along] = max(other.rows[1] for other in places if other.rows)
    return tuple(stored)


def check_total(names: Names, ours: Shapes) -> None:
    """Raise ValueError if the map leaves out a parameter, or names one that there is not."""
    mapped = {place.path for found in names.values() for place in _places(found)}
    if missing := sorted(ours.keys() - mapped):
        raise ValueError(f"checkpoints of this architecture have no names for {', '.join(missing)}")
    if unknown := sorted(mapped - ours.keys()):
        raise ValueError(f"the map of names has places that the network lacks: {', '.join(unknown)}")


def from_checkpoint(
    names: Names,
    shapes: Shapes,
    tensors: Mapping[str, Any],
    *,
    ignored: Iterable[str] = (),
    param_dtype: str = "float32",
) -> dict:
    """Our parameters from a checkpoint's tensors.

    Args:
      names: the architecture's map.
      shapes: our paths and shapes, of `shapes`.
      tensors: checkpoint name -> array, or `Stored` in a file: one at a time is read and converted.
      ignored: endings of names that may be there and are not used: tables that follow from the config, repetitions.
      param_dtype: of the result.

    Returns:
      The nested dict of parameters, numpy arrays.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    check_total(names, shapes)
    wanted = {name: _places(found) for name, found in names.items()}
    expected = {name: _stored_shape(places, shapes) for name, places in wanted.items()}
    problems = [f"missing {name}, expected {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unused {name}" for name in tensors if name not in wanted and not name.endswith(tuple(ignored))]
    problems += [
        f"{name} has shape {tuple(np.shape(tensors[name]))}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(np.shape(tensors[name])) != shape
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the config:\n  " + "\n  ".join(problems))
    params = {path: np.empty(shape, np.dtype(param_dtype)) for path, shape in shapes.items()}
    for name, places in wanted.items():
        tensor = np.asarray(tensors[name])
        for place in places:
            params[place.path][place.index or ...] = place.part(tensor)
    return nested(params)


def to_checkpoint(names: Names, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array. Also maps gradients, trees like parameters."""
    flat: dict[str, np.ndarray] = {}

    def stored(place: Place) -> np.ndarray:
        if place.path not in flat:  # before it is cut: on CPU the layers are views of one array, not copies
            node: Any = params
            for part in place.path.split("/"):
                node = node[part]
            flat[place.path] = np.asarray(node)
        array = flat[place.path][place.index] if place.index else flat[place.path]
        return array if place.axes is None else array.transpose(np.argsort(place.axes))

    def whole(places: tuple[Place, ...]) -> np.ndarray:
        parts = [stored(place) for place in sorted(places, key=lambda place: place.rows or (0, 0))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=places[0].along)

    return {name: whole(_places(found)) for name, found in names.items()}


def nested(flat: Mapping[str, Any]) -> dict:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
