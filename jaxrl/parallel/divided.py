"""Matrices that `fsdp` divides, whole for as long as one layer needs them (FSDP: Zhao et al. 2023, arXiv:2304.11277).

Left to itself the compiler gathers some of a layer's matrices twice in the backward pass, some before they are in the
compute type, and all-reduces gradients of which a device keeps one part. Here a matrix is cast, then gathered, and its
gradient is summed straight into its parts.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.nets.layers import Operator
from jaxrl.parallel.sharding import partition

MATRIX = re.compile(r"layers/.*(?<!kv_up)/kernel$")  # kv_up is read as a matrix, not multiplied by


@flax.struct.dataclass
class Divided:
    """A `jaxrl.nets.layers.Operator`: a kernel [in, out] in parts, gathered where it is multiplied by.

    `again`: gather it a second time in the backward pass, and do not keep it for that; for layers without remat.
    `copy`: of `lent`, the kernel gathered before.
    """

    kernel: jax.Array
    parts: NamedSharding = flax.struct.field(pytree_node=False)
    again: bool = flax.struct.field(pytree_node=False)
    copy: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return self.kernel.shape

    def times(self, rows: jax.Array, *, dot, dtype) -> jax.Array:
        """rows [N, in] in `dtype` times the kernel."""
        if self.copy is not None and self.copy.dtype == dtype:
            return dot(rows, lend(self.kernel.astype(dtype), self.copy, self.parts))
        product = lambda rows, kernel: dot(rows, whole(kernel.astype(dtype), self.parts))
        return (jax.checkpoint(product) if self.again else product)(rows, self.kernel)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole(kernel: jax.Array, parts: NamedSharding) -> jax.Array:
    """A kernel [in, out] that lies in parts, on every device of `fsdp`; its gradient is left in parts."""
    return with_sharding_constraint(with_sharding_constraint(kernel, parts), _whole(parts))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lend(kernel: jax.Array, copy: jax.Array, parts: NamedSharding) -> jax.Array:
    """The copy that was gathered of a kernel; the gradient is the kernel's, and left in parts."""
    return copy


def _whole(parts: NamedSharding) -> NamedSharding:
    return NamedSharding(parts.mesh, P(*(None if axis == "fsdp" else axis for axis in parts.spec)))


def _scattered(gradient: jax.Array, parts: NamedSharding) -> jax.Array:
    rows, columns = parts.spec
    if columns != "fsdp":
        return with_sharding_constraint(gradient, parts)
    # TPUs reduce-scatter along the first axis alone, and all-reduce what is cut along the last
    turned = NamedSharding(parts.mesh, P(columns, rows))
    return with_sharding_constraint(gradient.T, turned).T


whole.defvjp(lambda kernel, parts: (whole(kernel, parts), None), lambda parts, _, g: (_scattered(g, parts),))
lend.defvjp(lambda kernel, copy, parts: (copy, None), lambda parts, _, g: (_scattered(g, parts), jnp.zeros_like(g)))


def divided(params: Any, mesh: Mesh, *, again: bool) -> Any:
    """The parameters of a network, the layers' matrices that `fsdp` divides as `Divided`.

    Args:
      params: under `state_shardings(..., zero=3)`.
      mesh: of `make_mesh`.
      again: see `Divided`.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, Operator) or not MATRIX.search(name):
            return leaf
        spec = (*partition(name, leaf.shape, mesh), None, None)[leaf.ndim - 2 : leaf.ndim]
        return Divided(leaf, NamedSharding(mesh, P(*spec)), again) if "fsdp" in spec else leaf

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, Operator))


def lent(params: Any, *, dtype: Any) -> Any:
    """Each `Divided` kernel [L, in, out] of layers in stages with a copy in `dtype`, gathered once for all ticks."""

    def one(leaf):
        if not isinstance(leaf, Divided):
            return leaf
        copy = jax.lax.stop_gradient(leaf.kernel).astype(dtype)
        for place in (leaf.parts, _whole(leaf.parts)):
            copy = with_sharding_constraint(copy, NamedSharding(place.mesh, P("stage", *place.spec)))
        return dataclasses.replace(leaf, copy=copy)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Operator))
