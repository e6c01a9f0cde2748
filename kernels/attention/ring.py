"""Attention over a sequence that is spread over the devices of a mesh axis (context parallelism).

Every device keeps its own queries; keys and values travel round the ring, one device further at each of n - 1
steps, so that no device ever holds more than two parts of them. What the queries see of one part is ordinary tiled
attention, with the mask moved to where the keys stand; partial results are merged by their log-sum-exp. The backward
pass travels once more, with the gradients of keys and values beside them: given the log-sum-exp over all keys, the
gradients through one part need nothing of the others.

With a causal mask contiguous parts are uneven work: the last device sees everything, the first only itself. `zigzag`
gives device r the chunks r and 2 n - 1 - r of 2 n, and with them the same work as every other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import blocked, masks, tpu
from jaxrl.kernels.attention.checks import check_arrays, check_per_head, check_soft_cap
from jaxrl.kernels.attention.reference import MASKED, with_sinks
from jaxrl.kernels.platform import platform
from jaxrl.kernels.varying import varying


def zigzag(x: jax.Array, n: int, *, axis: int = 1) -> jax.Array:
    """The sequence reordered so that n equal parts of it are the chunks r and 2 n - 1 - r of 2 n, r = 0 .. n - 1.

    Reorder tokens, positions, targets and weights once, before the network; what is computed position by position
    does not notice, and `ring_attention(..., zigzag=True)` knows where the parts stand. `unzigzag` undoes it.
    (Llama 3's context parallelism: Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2.)

    Args:
      x: any array with the whole sequence along `axis`; its length a multiple of 2 n.
      n: number of devices along the ring.

    Returns:
      An array like x.

    Raises:
      ValueError: a length that is not a multiple of 2 n.
    """
    return _reorder(x, n, axis, [chunk for r in range(n) for chunk in (r, 2 * n - 1 - r)])


def unzigzag(x: jax.Array, n: int, *, axis: int = 1) -> jax.Array:
    """The inverse of `zigzag`; same arguments."""
    return _reorder(x, n, axis, [*range(0, 2 * n, 2), *range(2 * n - 1, 0, -2)])


def _reorder(x, n, axis, order):
    length = x.shape[axis]
    if n < 1 or length % (2 * n):
        raise ValueError(
            f"zigzag: axis {axis} has length {length}, expected a multiple of 2 n = {2 * n}; pad the sequence."
        )
    chunks = jnp.split(x, 2 * n, axis)
    return jnp.concatenate([chunks[i] for i in order], axis)


class Settings(NamedTuple):
    """What is static about a call."""

    axis_name: Any
    n: int
    runs: int  # contiguous runs that a device's part consists of: 2 in zig-zag order, else 1
    scale: float
    soft_cap: float | None
    block_q: int | None
    block_k: int | None
    pallas: bool


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class _From(masks.Mask):
    """A mask over k_length keys, for those from k_offset on: key 0 of a tile is its key k_offset."""

    mask: masks.Mask
    k_offset: int | jax.Array
    k_length: int = dataclasses.field(metadata={"static": True})

    def _moved(self, tile):
        return tile._replace(k_first=tile.k_first + self.k_offset, k_length=self.k_length)

    def allowed(self, tile):
        return self.mask.allowed(self._moved(tile))

    def live(self, tile):
        return self.mask.live(self._moved(tile))

    def full(self, tile):
        return self.mask.full(self._moved(tile))


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    mask: masks.Mask = masks.Causal(),  # noqa: B008  (immutable)
    zigzag: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`attention` inside `jax.shard_map`, over a sequence that is spread over a mesh axis.

        o = sum_i exp(lse_i - lse) o_i,   lse = log(sum_i exp(lse_i))   over the parts i of the keys

    (Liu et al. 2023, arXiv:2310.01889; backward from the merged log-sum-exp as in Dao 2023, arXiv:2307.08691.)
    The n - 1 rotations of the forward pass move k and v in their own dtype; the backward pass moves them again, and
    their gradients n + 1 times in float32. A part that the mask empties costs its transport but no product.

    Call it under `jax.shard_map(..., check_vma=False)`. Differentiate through the `shard_map`, or else add the
    gradient of `sinks` over the ring yourself: inside, each device knows its own queries' share only.

    Args:
      q: this device's queries [B, T, H, D], of n T in the whole sequence.
      k: its keys [B, S, K, D], of n S. v: its values [B, S, K, Dv].
      axis_name: the mesh axis, of size n, along which the sequence is spread in order.
      mask: a mask of the whole sequence, n T queries and n S keys in their true order. Its arrays are whole too, the
        same on every device of the ring: not cut along it, not in zig-zag order; cut like q along batch and heads.
      zigzag: the sequence was put in order by `zigzag`; T and S are even.
      scale, soft_cap, sinks: as in `attention`; scale and soft_cap are Python numbers.
      return_lse: also return the log-sum-exp.
      block_q, block_k: as in `blocked_attention`.
      implementation: of what the queries see of one part: "xla", "pallas" (TPU kernels, interpreted on CPU), or None
        for the one that `attention` would pick.

    Returns:
      o [B, T, H, Dv] in q's dtype; with return_lse, (o, lse [B, T, H] float32). No second derivatives.

    Raises:
      ValueError: shapes that do not fit, scale or soft_cap traced, no such axis, or check_vma=True.
    """
    n = _size(axis_name)
    _check(q, k, v, sinks, scale, soft_cap, mask, zigzag)
    mask.check((q.shape[0], q.shape[2], n * q.shape[1], n * k.shape[1]), 0)
    if any(varying(x) for x in (q, k, v)):
        raise ValueError(
            "ring_attention: called under jax.shard_map with check_vma=True, which loops over tiles do not satisfy; "
            "pass check_vma=False to shard_map."
        )
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    pallas = _pallas(implementation, q, k, v, mask, scale, soft_cap)
    settings = Settings(axis_name, n, 2 if zigzag else 1, scale, soft_cap, block_q, block_k, pallas)
    if 0 in (*q.shape, *k.shape):
        o, lse = jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), jnp.full((q.shape[0], q.shape[2], q.shape[1]), MASKED)
    else:
        both: Any = _ring(settings, q, k, v, mask)
        o, lse = both
    o, lse = with_sinks(o, jnp.swapaxes(lse, 1, 2), sinks)
    return (o, lse) if return_lse else o


def _pallas(implementation, q, k, v, mask, scale, soft_cap) -> bool:
    """Whether the TPU kernels do the work."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f'ring_attention: implementation={implementation!r}, expected None, "xla" or "pallas".')
    reason = tpu.refusal(q, k, v, mask, scale, soft_cap, None)
    if implementation == "pallas" and reason:
        raise ValueError(f'ring_attention: implementation="pallas": {reason}.')
    return implementation == "pallas" or (implementation is None and platform() == "tpu" and not reason)


def _size(axis_name) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"ring_attention: axis_name = {axis_name!r} is no mesh axis here; call it inside jax.shard_map over a "
            "mesh that has it."
        ) from None


def _check(q, k, v, sinks, scale, soft_cap, mask, zigzag):
    name = "ring_attention"
    _, h, t, s = check_arrays(name, q, k, v)
    check_per_head(name, h, sinks=sinks)
    check_soft_cap(name, soft_cap)
    for what, value in (("scale", scale), ("soft_cap", soft_cap)):
        if not isinstance(value, int | float | None):
            raise ValueError(f"{name}: {what} is {type(value).__name__}, expected a Python number.")
    if not isinstance(mask, masks.Mask):
        raise ValueError(f"{name}: mask is {type(mask).__name__}, expected a mask such as Causal().")
    if zigzag and (t % 2 or s % 2):
        raise ValueError(
            f"{name}: zigzag=True with T, S = {t}, {s} on each device, expected even numbers: two chunks of each."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(settings, q, k, v, mask):
    return _forward(settings, q, k, v, mask)[0]


def _forward(settings, q, k, v, mask):
    """o [B, T, H, Dv] in q's dtype and lse [B, H, T] in float32."""
    acc = jnp.promote_types(q.dtype, jnp.float32)
    b, t, h, _ = q.shape
    qs = _runs(settings, q if settings.pallas else q.astype(acc))
    o = jnp.zeros((*qs.shape[:-1], v.shape[-1]), acc)
    lse = jnp.full((settings.runs, b, h, t // settings.runs), MASKED, acc)

    def visit(step, kv, carry):
        ks, vs = (_runs(settings, x) for x in kv)

        def attend(i, j, at, carry):
            o, lse = carry
            part_o, part_lse = _part(settings, qs[i], ks[j], vs[j], *at)
            total = jnp.logaddexp(lse[i], part_lse)
            merged = o[i] * _per_query(jnp.exp(lse[i] - total)) + part_o * _per_query(jnp.exp(part_lse - total))
            return o.at[i].set(merged), lse.at[i].set(total)

        return _over_live(settings, mask, step, t, k.shape[1], attend, carry)

    o, lse = _around(settings, (k, v), visit, (o, lse))
    o = _whole(o).astype(q.dtype)
    lse = jnp.swapaxes(_whole(jnp.swapaxes(lse, 2, 3)), 1, 2)
    return (o, lse), (q, k, v, mask, o, lse)


def _backward(settings, residuals, cotangents):
    return _gradients(settings, residuals, cotangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(settings, residuals, cotangents):
    q, k, v, mask, o, lse = residuals
    do, dlse = cotangents
    acc, (t, s) = lse.dtype, (q.shape[1], k.shape[1])
    qs = _runs(settings, q if settings.pallas else q.astype(acc))
    os, dos = (_runs(settings, x.astype(acc)) for x in (o, do))
    lses, dlses = (jnp.swapaxes(_runs(settings, jnp.swapaxes(x, 1, 2)), 2, 3) for x in (lse, dlse))

    def visit(step, kv, carry):
        dq, dkv = carry
        dkv = _rotate(settings, dkv)  # catches up with the keys that have come
        ks, vs = (_runs(settings, x if settings.pallas else x.astype(acc)) for x in kv)

        def attend(i, j, at, carry):
            dq, (dk, dv) = carry
            results, cotangents = (os[i], lses[i]), (dos[i], dlses[i])
            more_q, more_k, more_v = _part_gradients(settings, (qs[i], ks[j], vs[j], *results), cotangents, *at)
            return dq.at[i].add(more_q), (dk.at[j].add(more_k), dv.at[j].add(more_v))

        return _over_live(settings, mask, step, t, s, attend, (dq, dkv))

    zeros = lambda x: jnp.zeros_like(_runs(settings, x), acc)
    dq, dkv = _around(settings, (k, v), visit, (zeros(q), (zeros(k), zeros(v))))
    dk, dv = _rotate(settings, dkv)  # home
    return _whole(dq).astype(q.dtype), _whole(dk).astype(k.dtype), _whole(dv).astype(v.dtype), None


_ring.defvjp(_forward, _backward)


@_gradients.defjvp
def _second_derivatives(settings, primals, tangents):
    raise ValueError(
        "ring_attention: no second derivatives; gather the sequence and use attention with "
        'implementation="reference", which has all.'
    )


def _tiled(settings, q, k) -> blocked.Settings:
    default = blocked.BLOCK.get(platform(), 512)
    block_q = blocked._block(q.shape[1], settings.block_q or default)
    block_k = blocked._block(k.shape[1], settings.block_k or default)
    return blocked.Settings(settings.scale, settings.soft_cap, block_q, block_k)


def _part(settings, q, k, v, mask, q_first, keys: tpu.Part):
    """o and lse of some queries over some keys."""
    if settings.pallas:
        return tpu.part_outputs(q, k, v, mask=mask, q_offset=q_first, part=keys, **_options(settings))
    return blocked._forward(_tiled(settings, q, k), q, k, v, None, None, _From(mask, *keys), q_first)[0]


def _part_gradients(settings, arrays, cotangents, mask, q_first, keys: tpu.Part):
    """What these keys add to dq, and dk and dv, from q, k, v and the o and lse over all keys."""
    if settings.pallas:
        where: Any = {"mask": mask, "q_offset": q_first, "part": keys}
        return tpu.part_gradients(*arrays, *cotangents, **where, **_options(settings))
    q, k, v, o, lse = arrays
    residuals = blocked.Residuals(q, k, v, None, None, _From(mask, *keys), q_first, o, lse)
    return blocked._gradients(_tiled(settings, q, k), residuals, cotangents)[:3]


def _options(settings):
    return {"scale": settings.scale, "soft_cap": settings.soft_cap}


def _rotate(settings, x):
    """Every device's x, to the next device of the ring."""
    to_next = [(i, (i + 1) % settings.n) for i in range(settings.n)]
    return jax.tree.map(lambda x: lax.ppermute(x, settings.axis_name, to_next), x)


def _around(settings, kv, visit: Callable, carry):
    """visit(step, kv, carry) -> carry once for every part of the keys, this device's own first; n - 1 rotations.

    The next part is on its way while the current one is worked on.
    """

    def step(state, index):
        kv, carry = state
        coming = _rotate(settings, kv)
        return (coming, visit(index, kv, carry)), None

    (kv, carry), _ = lax.scan(step, (kv, carry), jnp.arange(settings.n - 1))
    return visit(settings.n - 1, kv, carry)


def _over_live(settings, mask, step, t, s, work: Callable, carry):
    """work(i, j, (mask, q_first, keys), carry) -> carry on every pair of a run of queries and a run of the keys held at
    `step` in which the mask may allow something. Query 0 of the run stands at q_first of the mask."""
    device = lax.axis_index(settings.axis_name)
    source = lax.rem(device - step + settings.n, settings.n)
    q_firsts, k_firsts = _firsts(settings, device, t), _firsts(settings, source, s)

    def one(carry, pair):
        i, j = pair
        rectangle = masks.Tile(q_firsts[i], t // settings.runs, k_firsts[j], s // settings.runs, settings.n * s)
        at = mask, q_firsts[i], tpu.Part(k_firsts[j], settings.n * s)
        live = jnp.asarray(mask.live(rectangle), bool)
        return lax.cond(live, lambda carry: work(i, j, at, carry), lambda carry: carry, carry), None

    i, j = jnp.divmod(jnp.arange(settings.runs**2, dtype=jnp.int32), settings.runs)
    return lax.scan(one, carry, (i, j))[0]


def _firsts(settings, device, length: int) -> jax.Array:
    """int32 [runs]: where in the sequence the runs of a device's part begin."""
    if settings.runs == 1:
        return jnp.asarray(device * length, jnp.int32).reshape(1)
    return jnp.stack([device, 2 * settings.n - 1 - device]).astype(jnp.int32) * (length // 2)


def _runs(settings, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [runs, B, T / runs, ...]"""
    b, t = x.shape[:2]
    return jnp.swapaxes(x.reshape(b, settings.runs, t // settings.runs, *x.shape[2:]), 0, 1)


def _whole(x: jax.Array) -> jax.Array:
    """[runs, B, T / runs, ...] -> [B, T, ...]"""
    runs, b, t = x.shape[:3]
    return jnp.swapaxes(x, 0, 1).reshape(b, runs * t, *x.shape[3:])


def _per_query(x: jax.Array) -> jax.Array:
    """[B, H, T] -> [B, T, H, 1]"""
    return jnp.swapaxes(x, 1, 2)[..., None]
