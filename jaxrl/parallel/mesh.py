"""Device meshes from a short string."""

import difflib
import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""data: batch. fsdp: batch, and parameters in pieces. expert, context, tensor: experts, sequence, heads and widths."""


def make_mesh(spec: str = "", *, devices=None) -> Mesh:
    """A mesh over the axes of `AXES`.

    Args:
      spec: such as `data=2,fsdp=4`; axes left out have size 1. Empty: all devices on `data`. One size may be -1 and
        takes the devices that remain.
      devices: defaults to all devices.

    Returns:
      A `jax.sharding.Mesh` whose axes are all of `AXES`, left to the compiler (`AxisType.Auto`).

    Raises:
      ValueError: on an unknown axis, a size that is no number, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, spec.replace(" ", "").split(",")) if spec else [f"data={len(devices)}"]:
        name, _, size = part.partition("=")
        if name not in sizes:
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mesh {spec!r}: unknown axis {name!r}, expected some of {', '.join(AXES)}{hint}")
        if not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"mesh {spec!r}: the size of {name!r} is {size!r}; expected a positive number, or -1 once")
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis may be -1, not {' and '.join(free)}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {spec!r} has {math.prod(sizes.values())} places for {len(devices)} devices; "
            "the sizes must multiply to the number of devices"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
