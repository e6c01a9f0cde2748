"""One table of rules: parameter path -> logical axes -> mesh axes. Optimizer state follows by the end of its path."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, tuple[str | None, ...]]

RULES: tuple[Rule, ...] = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"unembed/kernel", ("embed", "vocab")),
    (r"layers/attention/[qkv]/kernel", ("layer", "embed", "heads")),
    (r"layers/attention/[qkv]/bias", ("layer", "heads")),
    (r"layers/attention/(q|kv)_down/kernel", ("layer", "embed", None)),
    (r"layers/attention/(q|kv)_up/kernel", ("layer", "rank", "heads")),
    (r"layers/attention/gate/kernel", ("layer", "embed", "heads")),
    (r"layers/attention/projection", ("layer", None, None)),
    (r"layers/attention/o/kernel", ("layer", "heads", "embed")),
    (r"layers/(ffn|moe/shared)/(gate|up)/kernel", ("layer", "embed", "ffn")),
    (r"layers/ffn/(gate|up)/bias", ("layer", "ffn")),
    (r"layers/(ffn|moe/shared)/down/kernel", ("layer", "ffn", "embed")),
    (r"layers/(attention/o|ffn/down)/bias", ("layer", None)),
    (r"layers/moe/(gate|up)", ("layer", "expert", "embed", "ffn")),
    (r"layers/moe/down", ("layer", "expert", "ffn", "embed")),
    (r"layers/moe/(router|router_noise|shared_gate)/kernel", ("layer", "embed", None)),
    (r"layers/moe/bias", ("layer", None)),
    (r"layers/(.*/)?[a-z_]*norm/(scale|bias)", ("layer", None)),
    (r"layers/attention/[qk]_norm/(scale|bias)", ("layer", "heads", None)),
    (r"(embed_)?norm/(scale|bias)", (None,)),
    (r"(position|type)_embed/embedding", (None, "embed")),
    (r"embed_up/kernel", (None, "embed")),
    (r"embed_up/bias", (None,)),
    (r"multi_token/eh_proj/kernel", (None, "embed", None)),
    (r"multi_token/[eh]?norm/scale", (None, None)),
    (r"(masked|pooled|replaced_hidden)/kernel", ("embed", None)),
    (r"(pair|classes|replaced)/kernel", ("embed", None)),
    (r"(masked|pooled|replaced_hidden|pair|classes|replaced)/bias", (None,)),
    (r"(masked|unembed)_bias", ("vocab",)),
    (r"head/kernel", (None,)),
    (r"success", (None,)),
    (r"ns_coeffs", (None,)),  # of Muon
)
"""(end of a parameter's path, as a regular expression; a logical axis for each of its dimensions). First match wins.

Layers in periods have one axis more, after that of the periods; layers that share their parameters have none.
"""

LAST_AXIS: tuple[Rule, ...] = tuple((r".*", (*[None] * n, "last" if n else None)) for n in range(6))
"""Rules for any network, such as those of `nets.vision`: fsdp divides the last axis of a matrix where it can.

Behind `RULES` they take what those leave: `(*RULES, *LAST_AXIS)`.
"""

LOGICAL: dict[str, str | None] = {
    "layer": "stage",
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "rank": "fsdp",
    "last": "fsdp",
    "ffn": "tensor",
    "expert": "expert",
}
"""Logical axis -> mesh axis. Changing the parallelism of a run is changing this table, or the mesh."""

OPTIONAL = ("vocab", "last")
"""Logical axes of which every device holds all where they do not divide: a tokenizer's size is nobody's choice."""

BATCH = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are divided."""


def partition(
    path: str, shape: Sequence[int], mesh: Mesh, *, rules: Sequence[Rule] = RULES, fsdp: bool = True
) -> PartitionSpec:
    """Where a parameter goes.

    Args:
      path: such as `params/layers/ffn/up/kernel`; what comes before the rule's part does not matter.
      shape: its shape. Scalars are replicated.
      mesh: of `make_mesh`.
      rules: pairs as in `RULES`.
      fsdp: whether the mesh axis `fsdp` divides it.

    Raises:
      ValueError: when no rule fits, or a dimension (but those of `OPTIONAL`) is not a multiple of its mesh axis.
    """
    if not shape:
        return PartitionSpec()
    for pattern, logical in rules:
        if re.search(rf"(^|/|_){pattern}$", path) and (axes := _stacked(logical, path, len(shape))):
            return PartitionSpec(*[_axis(path, shape, i, name, mesh, fsdp) for i, name in enumerate(axes)])
    raise ValueError(f"parameter {path} {tuple(shape)}: no sharding rule fits; add one to parallel.sharding.RULES")


def spec_of(path: Any, leaf: Any, mesh: Any, *, rules: Sequence[Rule] = RULES, fsdp: bool = True) -> PartitionSpec:
    """`partition` of a leaf of a tree, by its key path in it."""
    return partition(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh, rules=rules, fsdp=fsdp)


def _stacked(logical: tuple[str | None, ...], path: str, dimensions: int) -> tuple[str | None, ...] | None:
    """The logical axes of a parameter, with or without those of its layers; None where the rule is not of it."""
    if logical[:1] == ("layer",):
        if "periods/" in path:
            logical = ("layer", None, *logical[1:])
        elif dimensions == len(logical) - 1:
            logical = logical[1:]
    return logical if len(logical) == dimensions else None


def _axis(path, shape, i: int, name: str | None, mesh: Mesh, fsdp: bool) -> str | None:
    """The mesh axis that divides dimension i of a parameter."""
    axis = LOGICAL[name] if name else None
    if axis is None or (axis == "fsdp" and not fsdp):
        return None
    if shape[i] % mesh.shape[axis] == 0:
        return axis
    if name in OPTIONAL:
        return None
    raise ValueError(
        f"parameter {path} {tuple(shape)}: its {name} dimension {shape[i]} does not divide over the "
        f"{mesh.shape[axis]} devices of mesh axis {axis!r}; choose another mesh or size"
    )


def state_shardings(state: Any, mesh: Mesh, *, rules: Sequence[Rule] = RULES, zero: int = 3) -> Any:
    """A `NamedSharding` for every leaf of a train state, or of its shapes: moments lie as the rules say.

    (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.) What the axis `fsdp` divides follows `zero`: 1 the optimizer
    state, 2 gradients too (`place_gradients`), 3 parameters too. All other axes divide everything.

    Args:
      state: a pytree of arrays or shapes. What stands under `opt_state` is optimizer state, all else parameters.
      mesh: of `make_mesh`.
      rules: pairs as in `RULES`.
      zero: 1, 2 or 3.

    Raises:
      ValueError: as `partition`, or for another `zero`.
    """
    _check(zero)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        divided = zero == 3 or "opt_state" in name.split("/")
        return NamedSharding(mesh, partition(name, leaf.shape, mesh, rules=rules, fsdp=divided))

    return jax.tree_util.tree_map_with_path(place, state)


def place_gradients(
    optimizer: optax.GradientTransformation, mesh: Mesh, *, rules: Sequence[Rule] = RULES, zero: int = 3
) -> optax.GradientTransformation:
    """The optimizer, of gradients that lie as `zero` says: whole on every device of `fsdp` (1), or divided (2, 3)."""
    _check(zero)

    def place(path, leaf):
        spec = spec_of(path, leaf, mesh, rules=rules, fsdp=zero > 1)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    def update(updates, state, params=None, **extra):
        return optimizer.update(jax.tree_util.tree_map_with_path(place, updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def report(state: Any, mesh: Mesh, *, rules: Sequence[Rule] = RULES, zero: int = 3) -> str:
    """What each leaf got: path, shape, type, the mesh axes of each dimension, and bytes on each device; with a total.

    Args:
      state, mesh, rules, zero: as in `state_shardings`.
    """
    rows, total, whole = [], 0, 0
    places = jax.tree.leaves(state_shardings(state, mesh, rules=rules, zero=zero))
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(state), places, strict=True):
        item = 8 if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        size = math.prod(place.shard_shape(leaf.shape)) * item
        total, whole = total + size, whole + leaf.size * item
        axes = ", ".join(_named(axis, mesh) for axis in place.spec) or "-"
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, str(tuple(leaf.shape)), str(leaf.dtype), axes, f"{size:,}"))
    rows = [("leaf", "shape", "type", "mesh axes", "bytes per device"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{total:,} bytes on each of {mesh.size} devices; {whole:,} in one copy"])


def _named(axis: Any, mesh: Mesh) -> str:
    return axis if axis is not None and mesh.shape[axis] > 1 else "."


def rows_over(mesh: Mesh, rows: int, axes: Sequence[str] = BATCH) -> tuple[str, ...]:
    """Those of `axes`, in order, over which so many rows can be divided; the others hold copies."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        if rows % math.prod(mesh.shape[name] for name in (*taken, axis)) == 0:
            taken = (*taken, axis)
    return taken


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Inside jit: lays the leading axis of every leaf over those of the mesh's batch axes over which it divides."""
    place = lambda x: NamedSharding(mesh, PartitionSpec(rows_over(mesh, x.shape[0])))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place(x)), batch)


def check_rows(name: str, rows: int, mesh: Mesh) -> None:
    """Raises ValueError where so many rows, a setting of that name, do not divide over all the batch axes."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if rows % parts:
        raise ValueError(
            f"{name} makes {rows} rows at a time, which do not divide over the {parts} devices of the mesh axes "
            f"{', '.join(BATCH)}; give a multiple of {parts}, or put devices on tensor, context or stage"
        )


def _check(zero: int) -> None:
    if zero not in (1, 2, 3):
        raise ValueError(
            f"zero is {zero!r}; expected 1 (optimizer state divided), 2 (gradients too) or 3 (parameters too)"
        )
