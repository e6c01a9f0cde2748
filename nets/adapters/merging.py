"""Into the base and out of it: one tree of plain kernels for what is trained as a base and a low-rank part."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.nets.adapters.adapted import Adapter, get, put
from jaxrl.nets.adapters.low_rank import LowRank, low_rank_product


class Merged(NamedTuple):
    """`params`: a tree like the base's. `parts`: path of a layer -> down, up and gain of what is merged into it."""

    params: Any
    parts: dict[str, dict]


def merge(base: Any, params: Any, adapter: Adapter) -> Merged:
    """W' = (W + s A B) m / n in the place of W, added up in float32 and rounded once to W's dtype.

    A quantised kernel becomes a float32 one. In bfloat16 much of a small s A B is rounded away: merge into a float32
    base, and convert once what is exported.

    Raises:
      ValueError: an adapter that no kernel can stand for: prompts, prefixes, bottlenecks.
    """
    if not adapter.merges:
        raise ValueError("merge: this adapter is no low-rank part of kernels (LoRA is); keep it beside the base")
    parts = adapter.ready(None, base, params)
    kernels = {f"{path}/kernel": LowRank(get(base, f"{path}/kernel"), **part) for path, part in parts.items()}
    dtype = lambda kernel: kernel.dtype if hasattr(kernel, "dtype") else jnp.float32
    return Merged(put(base, {path: pair.dense(dtype(pair.kernel)) for path, pair in kernels.items()}), parts)


def residual(base: Any, merged: Merged) -> dict[str, jax.Array]:
    """What rounding took: the bits of W xor those of `unmerge` without it, by path; as large as the merged kernels."""
    found = {path: (get(base, f"{path}/kernel"), _approximate(merged, path)) for path in merged.parts}
    return {path: _bits(kernel) ^ _bits(other.astype(kernel.dtype)) for path, (kernel, other) in found.items()}


def unmerge(merged: Merged, residual: dict[str, jax.Array] | None = None) -> Any:
    """The base again: W = W' n / m - s A B, to W's dtype's rounding of W', W and s A B.

    Args:
      merged: of `merge`.
      residual: of `residual`, for a base that is the old one bitwise. Who keeps the base itself needs neither.
    """
    kernels = {}
    for path in merged.parts:
        kernel = _approximate(merged, path).astype(get(merged.params, f"{path}/kernel").dtype)
        if residual is not None:
            kernel = lax.bitcast_convert_type(_bits(kernel) ^ residual[path], kernel.dtype)
        kernels[f"{path}/kernel"] = kernel
    return put(merged.params, kernels)


def _approximate(merged: Merged, path: str) -> jax.Array:
    return _without(get(merged.params, f"{path}/kernel"), merged.parts[path])


@jax.jit
def _without(kernel: jax.Array, part: dict) -> jax.Array:
    """Compiled alike for `residual` and `unmerge`, and with a barrier that keeps its roundings apart."""
    whole = kernel.astype(jnp.float32)
    if part["gain"] is not None:
        whole = lax.optimization_barrier(whole / part["gain"][..., None, :])
    return whole - low_rank_product(part["down"], part["up"])


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
