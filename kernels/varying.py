"""Along which mesh axes a value varies, as `jax.shard_map` tracks it (check_vma=True)."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which x varies; empty outside shard_map and with check_vma=False."""
    kind: Any = jax.typeof(x)
    return frozenset(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each typed as varying along every mesh axis along which one of them varies.

    A gradient that comes back through here is summed over the axes that were added.
    """
    axes = frozenset[str]().union(*(varying(x) for x in arrays))
    added = [tuple(sorted(axes - varying(x))) for x in arrays]
    return tuple(lax.pcast(x, new, to="varying") if new else x for x, new in zip(arrays, added, strict=True))
