"""Layers in stages: a pipeline over the mesh axis `stage`."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.kernels.attention import Mask
from jaxrl.nets.layers import make_norm
from jaxrl.nets.transformer import TransformerConfig, rotations, stack, tallies, windowed
from jaxrl.parallel.divided import lent
from jaxrl.parallel.experts import experts_on
from jaxrl.parallel.sharding import BATCH, rows_over


def pipelined(
    config: TransformerConfig,
    mesh: Mesh,
    attend: Callable,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    mask: Mask,
    *,
    micro_batches: int | None = None,
    key: jax.Array | None = None,
    tally: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [B, T, D] of a Transformer whose layers are divided over the stages.

    (GPipe: Huang et al. 2019, arXiv:1811.06965; as one program over a buffer with a place for each stage: Xu et al.
    2021, arXiv:2105.04663, section 3.3.) At every tick each stage runs its layers on its place, then the places move on
    by one. With S stages and M micro-batches there are M + S - 1 ticks, of which each stage wastes S - 1; the backward
    pass runs through them in reverse.

    Args:
      config, attend: of the network.
      mesh: of `make_mesh`.
      params: of the network; the layers' [L, ...].
      tokens: [B, T], or embeddings [B, T, D]. positions: [B, T].
      mask: its arrays [B|1, ...].
      micro_batches: M, a divisor of the rows on a device; None takes the largest up to four for each stage.
      key: for the draws of routers, of their own for each stage and micro-batch; None: there are none. Consumed.
      tally: as in `LanguageModel.apply`.

    Raises:
      ValueError: micro_batches that do not divide the rows.
    """
    stages, b = mesh.shape["stage"], tokens.shape[0]
    parts = _micro_batches(mesh, b, micro_batches)
    batch = rows_over(mesh, b // parts)
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
    if tokens.ndim == 3:
        x = tokens.astype(config.dtype)
    else:
        x = nn.Embed(config.vocab_size, config.width, **dtypes).apply({"params": params["embed"]}, tokens)
    cos, sin = rotations(config, positions)
    each = config.layers // stages
    layers = stack(config, attend, experts_on(mesh), layers=each, unroll=config.unroll)
    number = jnp.arange(each)

    def stage(variables, near, x, given, key):
        cos, sin, mask = given
        rngs = {} if key is None else {"router": key}
        (x, _, _), _ = layers.apply(variables, (x, None, None), number, near, cos, sin, mask, 0, rngs=rngs)
        return x

    of_stage = lambda a: a.reshape(stages, each, *a.shape[1:])
    of_part = lambda a: jnp.swapaxes(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 0, 1)
    variables = {"params": lent(params["layers"], dtype=config.dtype)}
    if tally is not None:
        variables["tally"] = tallies(params, tally)["layers"]
    own, near = jax.tree.map(of_stage, (variables, windowed(config)))
    x, cos, sin = jax.tree.map(of_part, (x, cos, sin))
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, batch, "context")))
    varying = lambda a: of_part(a) if a.shape[0] == b > 1 else jnp.broadcast_to(a[None], (parts, *a.shape))
    given = (cos, sin, jax.tree.map(varying, mask))
    place = NamedSharding(mesh, P("stage", batch, "context"))
    first = (jnp.arange(stages) == 0)[:, None, None, None]

    def tick(places, time):
        entering = jax.lax.dynamic_index_in_dim(x, jnp.minimum(time, parts - 1))
        places = jnp.where(first, entering, jnp.roll(places, 1, axis=0))
        at = jnp.clip(time - jnp.arange(stages), 0, parts - 1)
        here = jax.tree.map(lambda a: a[at], given)
        keys = None if key is None else jax.random.split(jax.random.fold_in(key, time), stages)
        run = jax.vmap(stage, spmd_axis_name="stage")
        places = jax.lax.with_sharding_constraint(run(own, near, places, here, keys), place)
        return places, places

    places = jax.lax.with_sharding_constraint(jnp.zeros((stages, *x.shape[1:]), x.dtype), place)
    _, left = jax.lax.scan(tick, places, jnp.arange(parts + stages - 1))
    y = jax.lax.with_sharding_constraint(left[stages - 1 :, -1], NamedSharding(mesh, P(None, batch, "context")))
    y = jnp.swapaxes(y, 0, 1)
    y = y.reshape(b, *y.shape[2:])
    norm: Any = make_norm(config.norm, config.norm_eps, config.dtype, config.param_dtype)
    return norm.apply({"params": params["norm"]}, y)


def _micro_batches(mesh: Mesh, rows: int, wanted: int | None) -> int:
    own = rows // math.prod(mesh.shape[axis] for axis in rows_over(mesh, rows, BATCH))
    if wanted is None:
        return most_micro_batches(own, mesh.shape["stage"])
    if wanted < 1 or own % wanted:
        raise ValueError(f"micro_batches is {wanted} and a device has {own} rows; choose a divisor of {own}")
    return wanted


def most_micro_batches(rows: int, stages: int) -> int:
    """The most that divide a device's rows, up to four for each stage."""
    return max(m for m in range(1, 4 * stages + 1) if rows % m == 0)
