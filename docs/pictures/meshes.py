"""Draws `meshes.png`: which part of a batch and of the layers' matrices each of eight devices holds, as the rules say.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python docs/pictures/meshes.py
"""

from pathlib import Path

import jax
import matplotlib.pyplot as plt
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.patches import Rectangle

from jaxrl import parallel
from jaxrl.parallel.sharding import BATCH

MESHES = ("data=8", "fsdp=8", "fsdp=4,tensor=2", "fsdp=2,context=2,tensor=2", "stage=2,data=2,tensor=2")
SIDE = 8
COLOURS = {"batch": "#3b7dd8", "layers": "#e08a3c"}


def pieces(mesh, spec, shape):
    """The index ranges of each device, in the order of the mesh."""
    found = NamedSharding(mesh, spec).devices_indices_map(shape)
    ends = lambda cut, size: (cut.start or 0, size if cut.stop is None else cut.stop)
    return [[ends(cut, n) for cut, n in zip(found[d], shape, strict=True)] for d in mesh.devices.flat]


def square(axis, left, top, held, colour):
    """A whole array as an outline, with what is held of it filled: held = (first, last) down and across, or None."""
    axis.add_patch(Rectangle((left, top), SIDE, SIDE, fill=False, edgecolor="#999999", linewidth=0.8))
    if held:
        (y, below), (x, right) = held
        axis.add_patch(Rectangle((left + x, top + y), right - x, below - y, color=colour, linewidth=0))


def main():
    figure, axes = plt.subplots(len(MESHES), 1, figsize=(11, 1.0 * len(MESHES)), layout="constrained")
    for axis, text in zip(axes, MESHES, strict=True):
        mesh = parallel.make_mesh(text)
        rows = pieces(mesh, PartitionSpec(BATCH, "context"), (SIDE, SIDE))
        kernel = parallel.partition("layers/ffn/up/kernel", (2, SIDE, SIDE), mesh)
        matrices = pieces(mesh, kernel, (2, SIDE, SIDE))
        for device, (batch, (layers, *matrix)) in enumerate(zip(rows, matrices, strict=True)):
            left = device * 3.9 * SIDE
            square(axis, left, 0, batch, COLOURS["batch"])
            for layer in range(2):
                held = matrix if layers[0] <= layer < layers[1] else None
                square(axis, left + (1.2 + 1.05 * layer) * SIDE, 0, held, COLOURS["layers"])
            axis.text(left, -1.2, str(device), fontsize=7, color="#555555")
        axis.set_xlim(-1, 8 * 3.9 * SIDE)
        axis.set_ylim(SIDE + 1, -4)
        axis.set_aspect("equal")
        axis.axis("off")
        axis.set_title(text, loc="left", fontsize=10, family="monospace")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    names = [
        "batch: rows down, sequence across",
        "a matrix of the first and the last layers: inputs down, outputs across",
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    assert jax.device_count() == 8, "needs eight devices, see above"
    main()
