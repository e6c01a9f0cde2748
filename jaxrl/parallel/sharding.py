"""One table of rules: parameter path -> logical axes -> mesh axes. Optimizer state follows by the end of its path."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, tuple[str | None, ...]]

RULES: tuple[Rule, ...] = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"unembed/kernel", ("embed", "vocab")),
    (r"layers/attention/[qkv]/kernel", ("layer", "embed", "heads")),
    (r"layers/attention/[qkv]/bias", ("layer", "heads")),
    (r"layers/attention/o/kernel", ("layer", "heads", "embed")),
    (r"layers/ffn/(gate|up)/kernel", ("layer", "embed", "ffn")),
    (r"layers/ffn/down/kernel", ("layer", "ffn", "embed")),
    (r"layers/(.*/)?[a-z_]*norm/scale", ("layer", None)),
    (r"norm/scale", (None,)),
    (r"head/kernel", (None,)),
)
"""(end of a parameter's path, as a regular expression; a logical axis for each of its dimensions). First match wins."""

LOGICAL: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layer": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
}
"""Logical axis -> mesh axis. Changing the parallelism of a run is changing this table, or the mesh."""


def partition(path: str, shape: Sequence[int], mesh: Mesh, *, rules: Sequence[Rule] = RULES) -> PartitionSpec:
    """Where a parameter goes.

    Args:
      path: such as `params/layers/ffn/up/kernel`; what comes before the rule's part does not matter.
      shape: its shape. Scalars are replicated.
      mesh: of `make_mesh`.
      rules: pairs as in `RULES`.

    Raises:
      ValueError: when no rule fits, or a dimension is not a multiple of its mesh axis.
    """
    if not shape:
        return PartitionSpec()
    for pattern, logical in rules:
        if re.search(rf"(^|/){pattern}$", path) and len(logical) == len(shape):
            axes = [LOGICAL[name] if name else None for name in logical]
            for size, axis, name in zip(shape, axes, logical, strict=True):
                if axis is not None and size % mesh.shape[axis]:
                    raise ValueError(
                        f"parameter {path} {tuple(shape)}: its {name} dimension {size} does not divide over the "
                        f"{mesh.shape[axis]} devices of mesh axis {axis!r}; choose another mesh or size"
                    )
            return PartitionSpec(*axes)
    raise ValueError(f"parameter {path} {tuple(shape)}: no sharding rule fits; add one to parallel.sharding.RULES")


def state_shardings(state: Any, mesh: Mesh, *, rules: Sequence[Rule] = RULES) -> Any:
    """A `NamedSharding` for every leaf of a train state, or of its shapes: moments lie as their parameters do."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, leaf.shape, mesh, rules=rules))

    return jax.tree_util.tree_map_with_path(place, state)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Inside jit: lays the leading axis of every leaf over the mesh's batch axes (`data`, `fsdp`)."""
    sharding = NamedSharding(mesh, PartitionSpec(LOGICAL["batch"]))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), batch)
