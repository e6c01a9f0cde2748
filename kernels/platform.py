"""Which kind of device a program is traced for."""

from __future__ import annotations

from typing import Any

import jax

_FAMILIES = {"cuda": "gpu", "rocm": "gpu"}


def platform() -> str:
    """The kind of the devices of the mesh in use, which need not exist here, else of the default backend.

    "cpu", "gpu" or "tpu". `jax.default_backend()` alone is wrong where a program is compiled ahead of time for others.
    """
    device: Any = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return _FAMILIES.get(name, name)
