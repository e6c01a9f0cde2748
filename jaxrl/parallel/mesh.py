"""Device meshes from a short string."""

import contextlib
import difflib
import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""stage: layers, as a pipeline. data: batch. fsdp: batch, and parameters in pieces. expert: batch, and experts.
context: sequence. tensor: heads and widths. Neighbours on the last axes are the nearest on the network."""


def make_mesh(spec: str = "", *, devices=None) -> Mesh:
    """A mesh over the axes of `AXES`.

    Args:
      spec: such as `data=2,fsdp=4`; axes left out have size 1. Empty: all devices on `data`; "auto": all on `fsdp`.
        One size may be -1 and takes the devices that remain.
      devices: defaults to all devices.

    Returns:
      A `jax.sharding.Mesh` whose axes are all of `AXES`, left to the compiler (`AxisType.Auto`).

    Raises:
      ValueError: on an unknown axis, a size that is no number, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(spec, len(devices))
    places = math.prod(sizes.values())
    if places != len(devices):
        on_cpu = devices[0].platform == "cpu"
        hint = f" (XLA_FLAGS=--xla_force_host_platform_device_count={places} makes so many of a CPU)" if on_cpu else ""
        raise ValueError(
            f"mesh {spec!r} has {places} places for {len(devices)} devices; the sizes must multiply to the number of "
            f"devices{hint}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def on_host() -> contextlib.AbstractContextManager:
    """New arrays lie in the host's memory inside of this, where JAX sees its processor beside other devices."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names other devices only
        return contextlib.nullcontext()


def mesh_sizes(spec: str, count: int) -> dict[str, int]:
    """The size of each axis, of a text as in `make_mesh`; -1 is what `count` devices leave.

    Raises:
      ValueError: on an unknown axis or a size that is no number.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    text = {"": "data=-1", "auto": "fsdp=-1"}.get(spec, spec)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes:
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mesh {spec!r}: unknown axis {name!r}, expected some of {', '.join(AXES)}{hint}")
        if not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"mesh {spec!r}: the size of {name!r} is {size!r}; expected a positive number, or -1 once")
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis may be -1, not {' and '.join(free)}")
    if free:
        sizes[free[0]] = count // math.prod(size for size in sizes.values() if size != -1)
    return sizes
