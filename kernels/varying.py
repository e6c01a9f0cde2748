"""Along which mesh axes a value varies, as `jax.shard_map` tracks it (check_vma=True)."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which x varies; empty outside shard_map and with check_vma=False."""
    kind: Any = jax.typeof(x)
    return frozenset(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, or trees of them, each typed as varying along every mesh axis along which one of them varies.

    A gradient that comes back through here is summed over the axes that were added.
    """
    axes = frozenset[str]().union(*(varying(x) for x in jax.tree.leaves(arrays)))
    missing = lambda x: tuple(sorted(axes - varying(x)))
    return jax.tree.map(lambda x: lax.pcast(x, missing(x), to="varying") if missing(x) else x, arrays)


def shape_like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A shape, for the result of a kernel, that varies along the mesh axes along which x does."""
    axes, kind = varying(x), jax.typeof(x)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    typed: Any = {"vma": axes} if hasattr(kind, "vma") else {"manual_axis_type": kind.manual_axis_type}
    return jax.ShapeDtypeStruct(shape, dtype, **typed)
