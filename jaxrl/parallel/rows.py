"""Any network on a mesh: every device takes the loss of its own rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.parallel.sharding import BATCH, LAST_AXIS, RULES, Rule, check_rows, spec_of

ANY_RULES = (*RULES, *LAST_AXIS)
"""Of every network: `RULES`, and behind them the last axis of a matrix over fsdp."""


def loss_of_rows(loss: Callable, mesh: Mesh, *, rules: Sequence[Rule] = ANY_RULES, zero: int = 3) -> Callable:
    """A loss as one whose rows are divided over a mesh: for networks that `model_on` does not know, such as vision's.

    Inside, kernels and loops run as on one device. Parameters that `fsdp` divides are gathered before the loss, all at
    once, and their gradients are reduce-scattered; what else a device holds is all-reduced.

        loss = parallel.loss_of_rows(loss, mesh)
        places = parallel.state_shardings(params, mesh, rules=parallel.ANY_RULES)
        gradient = jax.jit(jax.grad(loss))(jax.device_put(params, places), parallel.shard_batch(batch, mesh), key)

    Args:
      loss: (params, batch, key) -> scalar, the mean over the rows of the batch.
      mesh: of `make_mesh`; rows lie over data, fsdp and expert, other axes have size 1.
      rules, zero: as in `state_shardings`, by which parameters must lie.

    Returns:
      The same function. Each device draws from a key of its own, so random numbers differ from one device's.

    Raises:
      ValueError: an axis over which no rows lie, or (when called) rows that the devices do not divide.
    """
    others = {axis: size for axis, size in mesh.shape.items() if axis not in BATCH and size > 1}
    if others:
        raise ValueError(f"mesh has {others}; rows are divided over {', '.join(BATCH)} alone: give the others size 1")

    def local(params, batch, key, specs):
        whole = jax.tree.map(_gathered, params, specs)
        return lax.pmean(loss(whole, batch, jax.random.fold_in(key, lax.axis_index(BATCH))), BATCH)

    def on_mesh(params, batch, key):
        for leaf in jax.tree.leaves(batch):
            check_rows("the batch", len(leaf), mesh)

        spec = partial(spec_of, mesh=mesh, rules=rules, fsdp=zero == 3)
        specs = jax.tree_util.tree_map_with_path(spec, params)
        spread = jax.shard_map(
            partial(local, specs=specs), mesh=mesh, in_specs=(specs, P(BATCH), P()), out_specs=P(), check_vma=False
        )
        return spread(params, batch, key)

    return on_mesh


def _gathered(x: Any, spec: P) -> Any:
    for axis, name in enumerate(spec):
        x = lax.all_gather(x, name, axis=axis, tiled=True) if name else x
    return x
