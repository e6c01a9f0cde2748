"""Experts that lie on a mesh: `nets.moe.experts` under `shard_map`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.kernels.experts import combine, dispatch, exchange, exchange_back, local_experts, sort_by_expert
from jaxrl.nets.moe import experts, of_each
from jaxrl.parallel.sharding import BATCH, rows_over


def experts_on(mesh: Mesh) -> Callable:
    """`moe.experts` with tokens over the batch axes and `context`, experts over `expert`, their width over `tensor`.

    Every token's rows travel to the devices that hold its experts and come back (GShard: Lepikhin et al. 2020,
    arXiv:2006.16668). Batches that the axis `expert` does not divide, as in decoding, stay where they are: every device
    does the part of its own experts, and the parts are added up.

    Args:
      mesh: of `make_mesh`.

    Returns:
      A function as `moe.experts`, of x [B, T, D].
    """
    n, parts = mesh.shape["expert"], mesh.shape["context"]

    def on_mesh(x, ids, weights, gate, up, down, *, dtype=None, activation=jax.nn.silu):
        dtype = x.dtype if dtype is None else dtype
        whole = x.shape[1] % parts == 0
        batch = rows_over(mesh, x.shape[0], BATCH if whole else (*BATCH, "context"))
        travels = n > 1 and "expert" in batch

        def local(x, ids, weights, gate, up, down):
            k, width = ids.shape[-1], x.shape[-1]
            if travels:
                routing = sort_by_expert(ids.reshape(-1, k), num_experts=n * up.shape[0])
                rows, plan = exchange(dispatch(x.reshape(-1, width), routing), routing.group_sizes, axis_name="expert")
                rows = of_each(rows, gate, up, down, plan.routing.group_sizes, activation=activation)
                rows = exchange_back(rows, plan, axis_name="expert")
                y = combine(rows, routing, weights.reshape(-1, k), dtype=jnp.float32).reshape(x.shape)
            else:
                own = local_experts(ids, num_local=up.shape[0], axis_name="expert")
                y = experts(x, own, weights, gate, up, down, dtype=jnp.float32, activation=activation)
                y = lax.psum(y, "expert")
            return lax.psum(y, "tensor").astype(dtype)

        tokens, inward, outward = (
            P(batch, "context" if whole else None),
            P("expert", None, "tensor"),
            P("expert", "tensor"),
        )
        specs = (tokens, tokens, tokens, inward, inward, outward)
        own = _one_stage(local) if mesh.shape["stage"] > 1 else local
        spread = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
        return spread(x, ids, weights, gate, up, down)

    return on_mesh


def _one_stage(local: Callable) -> Callable:
    """The function for a pipeline, which maps over stages: a device has one, and TPUs no ragged products of batches."""
    alone = jax.custom_batching.custom_vmap(local)

    @alone.def_vmap
    def of_stages(size, batched, *arrays):
        if size != 1:
            raise ValueError(f"experts: a device has {size} stages, expected 1")
        return local(*(x[0] if axis else x for x, axis in zip(arrays, batched, strict=True)))[None], True

    return alone
