"""Attention and log-probabilities of arrays that lie on a mesh: the kernels under `shard_map`.

A compiler that divides programs by itself cannot divide a kernel, and loops over tiles only badly. So every device
calls the kernel on its own rows, heads and part of the sequence or vocabulary, and the kernels that need each other's
parts (the ring, the merged softmax over a divided vocabulary) say so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.kernels.attention import Mask, attention
from jaxrl.kernels.attention.ring import ring_attention
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.parallel.sharding import BATCH, rows_over


def attend_on(mesh: Mesh) -> Callable:
    """`attention` with rows over the batch axes, heads over `tensor` and, in whole passes, the sequence over `context`.

    A whole pass has as many keys as queries and no offset; its sequence is in the order of `zigzag`, its mask in true
    order. With a cache, `context` divides rows as well.
    """
    n = mesh.shape["context"]

    def attend(q, k, v, *, mask: Mask, q_offset: Any = 0, implementation=None, return_lse=False, **options) -> Any:
        ring = n > 1 and isinstance(q_offset, int) and q_offset == 0 and q.shape[1] == k.shape[1]
        batch = rows_over(mesh, q.shape[0], BATCH if ring else (*BATCH, "context"))
        sequence = "context" if ring else None
        leaves, structure = jax.tree.flatten(mask)
        heads = P(batch, sequence, "tensor")
        keys = heads if k.shape[2] > 1 else P(batch, sequence)  # one for all heads: latents

        def local(q, k, v, offset, *leaves):
            own = jax.tree.unflatten(structure, leaves)
            if not ring:
                named = {"implementation": implementation, "return_lse": return_lse}
                return attention(q, k, v, mask=own, q_offset=offset, **named, **options)
            named = {"implementation": None if implementation == "reference" else implementation}
            return ring_attention(
                q, k, v, axis_name="context", mask=own, zigzag=True, return_lse=return_lse, **named, **options
            )

        specs = [_mask_spec(x, batch, q) for x in leaves]
        out = (heads, heads) if return_lse else heads
        if isinstance(q_offset, int):  # stays known to the masks
            local, arrays, specs = _with(local, q_offset), leaves, [heads, keys, keys, *specs]
        else:
            arrays, specs = [q_offset, *leaves], [heads, keys, keys, P(), *specs]
        spread = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)
        return spread(q, k, v, *arrays)

    return attend


def _with(local: Callable, offset: int) -> Callable:
    return lambda q, k, v, *leaves: local(q, k, v, offset, *leaves)


def _mask_spec(leaf: jax.Array, batch: tuple[str, ...], q: jax.Array) -> P:
    """Arrays of masks are [B|1, ...], those of pairs [B|1, H|1, Q, S]."""
    rows = batch if leaf.ndim and leaf.shape[0] == q.shape[0] > 1 else None
    if leaf.ndim == 4:
        return P(rows, "tensor" if leaf.shape[1] == q.shape[2] > 1 else None)
    return P(rows) if leaf.ndim else P()


def log_probs_on(mesh: Mesh, *, zero: int = 3) -> Callable:
    """`token_log_probs` with rows over the batch axes, tokens over `context` and the vocabulary over `tensor`.

    With `zero` 3 the unembedding's rows come divided over `fsdp`, and so leave its gradient's.
    """
    n, parts = mesh.shape["context"], mesh.shape["tensor"]

    def log_probs(hidden, unembedding, targets, *, temperature: Any = 1.0, **options):
        b, t, _ = hidden.shape
        overhang = -t % n
        hidden = jnp.pad(hidden, ((0, 0), (0, overhang), (0, 0)))
        per_token = lambda x: jnp.pad(x, ((0, 0), (0, overhang)), mode="edge")
        targets = per_token(targets)
        batch = rows_over(mesh, b)
        tokens = P(batch, "context")
        axis = "tensor" if parts > 1 and unembedding.shape[1] % parts == 0 else None
        gathers = zero == 3 and "fsdp" in batch and unembedding.shape[0] % mesh.shape["fsdp"] == 0

        def form(hidden, unembedding, targets, **named):
            if gathers:  # every device's own first, so that gradients are scattered before other axes add theirs
                own = lax.pcast(unembedding, (*(axis for axis in batch if axis != "fsdp"), "context"), to="varying")
                unembedding = lax.all_gather(own, "fsdp", tiled=True)
            return token_log_probs(hidden, unembedding, targets, axis_name=axis, **named, **options)

        arrays, specs = (hidden, unembedding, targets), (tokens, P("fsdp" if gathers else None, axis), tokens)
        if isinstance(temperature, int | float):
            local = lambda h, w, y: form(h, w, y, temperature=temperature)
        else:
            local = lambda h, w, y, t: form(h, w, y, temperature=t)
            arrays = (*arrays, per_token(jnp.broadcast_to(temperature, (b, t))))
            specs = (*specs, tokens)
        out = jax.eval_shape(partial(token_log_probs, **options), hidden, unembedding, targets)
        spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens,) * len(out))
        return tuple(x[:, :t] for x in spread(*arrays))

    return log_probs
