"""A language model on a mesh: the same functions, with attention, log-probs and layers that know where arrays lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.kernels.attention import BlockDiffusion, Causal, Full, Mask, Prefix
from jaxrl.kernels.attention.ring import unzigzag, zigzag
from jaxrl.nets.language_model import LanguageModel, language_model, with_one
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel.attend import attend_on, log_probs_on
from jaxrl.parallel.divided import divided
from jaxrl.parallel.experts import experts_on
from jaxrl.parallel.pipeline import pipelined
from jaxrl.parallel.sharding import BATCH, rows_over


def model_on(
    config: TransformerConfig, mesh: Mesh, *, micro_batches: int | None = None, zero: int = 3
) -> LanguageModel:
    """`language_model(config)` for parameters that lie on a mesh as `state_shardings` says.

    Rows are divided over data, fsdp and expert, heads and vocabulary (where it divides) over tensor, the sequence over
    context: there the tokens are put into zig-zag order before the network and the hidden states back after it
    (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2), rows padded where their length does not divide. Layers
    are divided over stage. With a cache context divides rows, and every layer is computed everywhere: sample on a mesh
    without stages.

    Args:
      config: of the network.
      mesh: of `make_mesh`.
      micro_batches: into which a batch is cut for the stages; None takes up to four for each stage.
      zero: as `state_shardings` was given.

    Raises:
      ValueError: heads, layers or inner widths that do not divide.
    """
    _check(config, mesh)
    n, stages = mesh.shape["context"], mesh.shape["stage"]
    roomy = dataclasses.replace(config, max_length=config.max_length + 2 * n - 1) if n > 1 else config
    attend = attend_on(mesh)
    alone = language_model(config)
    plain = language_model(roomy, attend=attend, log_probs=log_probs_on(mesh, zero=zero), experts=experts_on(mesh))

    def place(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(rows_over(mesh, x.shape[0]), *axes)))

    def whole(params, tokens, positions, mask, **options):
        tokens = place(tokens, "context")
        if stages > 1:
            parts = (params, tokens, positions, mask)
            return with_one(config, pipelined(roomy, mesh, attend, *parts, micro_batches=micro_batches, **options))
        return plain.apply(params, tokens, positions=positions, mask=mask, **options)[0]

    def apply(params, tokens, *, positions=None, mask: Any = None, cache=None, **options):
        mask = (Causal() if config.causal else Full()) if mask is None else mask
        if cache is not None:
            return plain.apply(params, tokens, positions=positions, mask=mask, cache=cache, **options)
        if zero == 3 and mesh.shape["fsdp"] > 1:
            params = divided(params, mesh, again=config.remat == "none")
        b, t = tokens.shape[:2]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        if n == 1:
            return place(whole(params, tokens, positions, mask, **options)), None
        overhang = -t % (2 * n)

        def order(x):
            return zigzag(jnp.pad(x, ((0, 0), (0, overhang)) + ((0, 0),) * (x.ndim - 2)), n)

        hidden = whole(params, order(tokens), order(positions), _padded(mask, t, overhang), **options)
        return place(unzigzag(hidden, n), "context")[:, :t], None

    def init_cache(batch, length):
        cache = alone.init_cache(batch, length)
        rows = rows_over(mesh, batch, (*BATCH, "context"))
        heads = "tensor" if config.latent is None else None
        lay = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, rows, heads)))
        return cache._replace(k=jax.tree.map(lay, cache.k), v=jax.tree.map(lay, cache.v))

    return plain._replace(init=alone.init, apply=apply, init_cache=init_cache)


def _padded(mask: Mask, length: int, overhang: int) -> Mask:
    """The mask of rows with more columns, which nobody sees."""
    if not overhang:
        return mask
    if _holds(mask, BlockDiffusion):
        raise ValueError(
            f"rows of {length} tokens under a BlockDiffusion mask do not divide into zig-zag parts over the mesh axis "
            f"'context'; give a multiple of {length + overhang}"
        )

    def pad(x):
        widths = [(0, 0)] + [(0, overhang if size == length else 0) for size in x.shape[1:]]
        return jnp.pad(x, widths[: x.ndim], constant_values=False if x.dtype == bool else -1)

    return jax.tree.map(pad, mask) & Prefix(jnp.full((1,), length))


def _holds(mask: Any, kind: type) -> bool:
    parts = [getattr(mask, field.name) for field in dataclasses.fields(mask)]
    return isinstance(mask, kind) or any(_holds(part, kind) for part in parts if isinstance(part, Mask))


def _check(config: TransformerConfig, mesh: Mesh) -> None:
    axes = {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "layers": "stage"}
    if mesh.shape["stage"] > 1 and (config.positions == "learned" or config.embed_norm or config.share_layers):
        raise ValueError("learned positions, embed_norm and share_layers have no form in stages; choose a mesh without")
    if config.linear and max(mesh.shape["stage"], mesh.shape["context"]) > 1:
        raise ValueError(
            "linear layers read a sequence in order and are of several kinds; choose a mesh without context and stage"
        )
    sizes = [(name, getattr(config, name), axis) for name, axis in axes.items()]
    if config.experts is not None:
        of_experts = {"experts": "expert", "ffn": "tensor", "shared": "tensor"}
        sizes += [(f"experts.{name}", getattr(config.experts, name), axis) for name, axis in of_experts.items()]
        if config.experts.first_dense and mesh.shape["stage"] > 1:
            raise ValueError(
                f"the first {config.experts.first_dense} layers are dense, and stages must be alike; "
                "choose a mesh without the axis 'stage', or first_dense=0"
            )
        if config.experts.capacity_factor is not None and mesh.shape["context"] > 1:
            raise ValueError(
                "with a capacity_factor tokens go to experts first come, first served, and the mesh axis 'context' "
                "changes their order; choose a mesh without it, or capacity_factor=None"
            )
    for name, size, axis in sizes:
        parts = mesh.shape[axis]
        if size % parts:
            raise ValueError(
                f"{name} is {size} and does not divide over the {parts} devices of mesh axis {axis!r}; "
                f"give {axis} a divisor of {size}"
            )
