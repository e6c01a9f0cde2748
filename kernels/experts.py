"""Which rows go to which expert: sorted on one device, exchanged between many.

An expert layer is five calls, and drops no token however the experts are chosen:

    routing = sort_by_expert(experts, num_experts=E)
    rows = dispatch(x, routing)
    rows = activation(grouped_matmul(rows, w_in, routing.group_sizes))
    rows = grouped_matmul(rows, w_out, routing.group_sizes)
    y = combine(rows, routing, weights)

With the experts spread over a mesh axis, inside `jax.shard_map`, either every device sees every token and does the
part of its own experts (`local_experts` first, `lax.psum` or `lax.psum_scatter` of y last), or the rows travel to
the experts and back (`exchange` after dispatch, `exchange_back` before combine).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.grouped_matmul import accumulator, within
from jaxrl.kernels.varying import vary_alike


class Routing(NamedTuple):
    """Which row of the sorted order belongs to which choice; all int32.

    order: [T k] the choice (token * k + slot) that each row is a copy of.
    place: [T, k] the row of each choice; the inverse of order.
    group_sizes: [E] rows of each expert; choices of no expert come after them.
    """

    order: jax.Array
    place: jax.Array
    group_sizes: jax.Array


def sort_by_expert(experts: jax.Array, *, num_experts: int) -> Routing:
    """The order in which choices of experts stand group by group, tokens in order within a group (stable).

    Args:
      experts: int [T, k], the k experts of each token. An id outside [0, num_experts) is a choice of none (a padding
        token, an expert of another device): its row comes after all groups.
      num_experts: E.

    Returns:
      `Routing`.

    Raises:
      ValueError: experts that are not int [T, k], num_experts below 1.
    """
    if jnp.ndim(experts) != 2 or not jnp.issubdtype(jnp.result_type(experts), jnp.integer):
        raise ValueError(
            f"sort_by_expert: experts are {jnp.result_type(experts)} {jnp.shape(experts)}, expected integers [T, k] "
            "(for one expert a token, experts[:, None])."
        )
    if num_experts < 1:
        raise ValueError(f"sort_by_expert: num_experts = {num_experts}, expected at least 1.")
    ids = jnp.asarray(experts).reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts).astype(jnp.int32)
    ids, rank = vary_alike(
        ids, jnp.arange(ids.size, dtype=jnp.int32)
    )  # argsort forgets that its result varies as ids do
    _, order = lax.sort((ids, rank), num_keys=1, is_stable=True)
    place = jnp.zeros_like(order).at[order].set(rank, unique_indices=True)
    sizes = jnp.bincount(ids, length=num_experts).astype(jnp.int32)
    return Routing(order, place.reshape(experts.shape), sizes)


def dispatch(x: jax.Array, routing: Routing) -> jax.Array:
    """A copy of each token for each of its choices, in the order of the routing.

        rows_i = x[order_i // k];   dx_t = sum_j drows[place_tj]

    Both ways are gathers: exact and in a fixed order.

    Args:
      x: tokens [T, D].
      routing: of the T tokens.

    Returns:
      rows [T k, D].

    Raises:
      ValueError: x that is not [T, D] with the routing's T.
    """
    t, k = routing.place.shape
    if jnp.ndim(x) != 2 or x.shape[0] != t:
        raise ValueError(f"dispatch: x has shape {jnp.shape(x)}, expected [T, D] with the routing's T = {t} tokens.")
    copies = jnp.broadcast_to(x[:, None], (t, k, x.shape[1])).reshape(t * k, x.shape[1])
    return _permuted(*vary_alike(copies, routing.order, routing.place.reshape(-1)))


def combine(rows: jax.Array, routing: Routing, weights: jax.Array | None = None, *, dtype: Any = None) -> jax.Array:
    """The weighted sum of each token's rows.

        y_t = sum_j weights_tj rows[place_tj];   dweights_tj = dy_t . rows[place_tj]

    Summed in float32. Rows after the last group should be zeros, as `grouped_matmul` leaves them (finite, at least,
    where their weights are 0).

    Args:
      rows: [T k, D] in the order of the routing.
      routing: as given to `dispatch`.
      weights: [T, k], or None for ones.
      dtype: of the result; default that of rows. float32 keeps sums exact that go on over devices.

    Returns:
      y [T, D].

    Raises:
      ValueError: rows or weights of other shapes.
    """
    t, k = routing.place.shape
    if jnp.ndim(rows) != 2 or rows.shape[0] != t * k:
        raise ValueError(f"combine: rows have shape {jnp.shape(rows)}, expected [T k, D] with T k = {t} * {k}.")
    if weights is not None and jnp.shape(weights) != (t, k):
        raise ValueError(f"combine: weights have shape {jnp.shape(weights)}, expected [T, k] = ({t}, {k}).")
    dtype = rows.dtype if dtype is None else dtype
    rows = _permuted(*vary_alike(rows, routing.place.reshape(-1), routing.order)).reshape(t, k, rows.shape[1])
    rows = rows.astype(accumulator(rows.dtype))
    if weights is not None:
        rows = rows * weights[..., None].astype(rows.dtype)
    return jnp.sum(rows, axis=1).astype(dtype)


@jax.custom_vjp
def _permuted(x, index, inverse):
    """x[index], where inverse undoes index: so the gradient is a gather, too."""
    return jnp.take(x, index, axis=0, mode="clip")


_permuted.defvjp(
    lambda x, index, inverse: (_permuted(x, index, inverse), (index, inverse)),
    lambda permutation, dy: (_permuted(dy, *reversed(permutation)), None, None),
)


def local_experts(experts: jax.Array, *, num_local: int, axis_name: str) -> jax.Array:
    """Global expert ids as this device counts its own; those of other devices fall outside [0, num_local).

    Device r of the mesh axis holds the experts r * num_local ... (r + 1) * num_local - 1. With all tokens on every
    device (replicated, or after `lax.all_gather`), an expert layer of `sort_by_expert(local, num_experts=num_local)`
    is this device's part of y; `lax.psum` (or `lax.psum_scatter`) over the axis makes it whole. The ids that are no
    expert at all (negative, or from E on) stay outside.

    Args:
      experts: int [T, k], ids in [0, E) with E = num_local * the size of the axis.
      num_local: experts of each device.
      axis_name: mesh axis of the enclosing `jax.shard_map`.

    Returns:
      int [T, k].
    """
    return experts - lax.axis_index(axis_name) * num_local


class Exchange(NamedTuple):
    """How rows came to this device.

    routing: of the received rows, sorted by local expert; its group_sizes [E / n] are those of the products here.
    counts: [n, n] rows that each device sent to each.
    """

    routing: Routing
    counts: jax.Array


def exchange(rows: jax.Array, group_sizes: jax.Array, *, axis_name: str) -> tuple[jax.Array, Exchange]:
    """Sends every row to the device that holds its expert, inside `jax.shard_map`; drops none.

    Device r of the axis holds the experts r E / n ... (r + 1) E / n - 1. The result has room for all rows of all
    devices, since all may choose one device; only rows that there are travel, by `lax.ragged_all_to_all`. XLA:CPU
    has no such operation: there all rows are gathered and each device keeps its own, with equal results. Where n
    is large and memory scarce, `local_experts` needs less.

    Args:
      rows: this device's rows [R, D], sorted by global expert.
      group_sizes: int [E], this device's rows of each global expert. R and E are the same on all devices.
      axis_name: mesh axis of n devices; n divides E.

    Returns:
      rows [n R, D] of this device's experts, sorted by them, zeros after the last; and the `Exchange` that
      `exchange_back` needs, whose routing.group_sizes [E / n] are the sizes for `grouped_matmul`.

    Raises:
      ValueError: rows that are not [R, D]; experts that the axis does not divide.
    """
    n, (e,) = lax.axis_size(axis_name), jnp.shape(group_sizes)
    if jnp.ndim(rows) != 2:
        raise ValueError(f"exchange: rows have shape {jnp.shape(rows)}, expected [R, D].")
    if e % n:
        raise ValueError(
            f"exchange: group_sizes of E = {e} experts, expected a multiple of the {n} devices of the axis."
        )
    rows, group_sizes = _varying(axis_name, rows, within(group_sizes, rows.shape[0]))
    sizes = lax.all_gather(group_sizes.reshape(n, e // n), axis_name)
    counts = jnp.sum(sizes, axis=2)
    received: Any = _swap(axis_name, n * rows.shape[0], rows, counts)
    mine = sizes[:, lax.axis_index(axis_name)].reshape(-1)
    rest = received.shape[0] - jnp.sum(mine, keepdims=True)
    ids = jnp.append(jnp.tile(jnp.arange(e // n), n), e // n)
    ids = jnp.repeat(ids, jnp.append(mine, rest), total_repeat_length=received.shape[0])
    routing = sort_by_expert(ids[:, None], num_experts=e // n)
    return dispatch(received, routing), Exchange(routing, counts)


def exchange_back(rows: jax.Array, plan: Exchange, *, axis_name: str) -> jax.Array:
    """Sends every row back to where `exchange` had it from.

    Args:
      rows: [n R, D], in the order in which `exchange` gave them.
      plan: as `exchange` gave it.
      axis_name: the same mesh axis.

    Returns:
      [R, D], in the order of the rows given to `exchange`; zeros after the last group.

    Raises:
      ValueError: another number of rows than `exchange` gave.
    """
    t = plan.routing.order.shape[0]
    if jnp.ndim(rows) != 2 or rows.shape[0] != t:
        raise ValueError(f"exchange_back: rows have shape {jnp.shape(rows)}, expected [n R, D] with n R = {t}.")
    (rows,) = _varying(axis_name, combine(rows, plan.routing))
    return _swap(axis_name, t // lax.axis_size(axis_name), rows, plan.counts.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swap(axis_name, length, rows, counts) -> Any:
    """The rows [length, D] that all devices have for this one, in the order of the devices; zeros at the end.

    Args:
      rows: [R, D], in the order of the devices that they are for.
      counts: int [n, n], how many rows device s has for device d.
    """
    me, zeros = lax.axis_index(axis_name), vary_alike(jnp.zeros((length, rows.shape[1]), rows.dtype), rows)[0]
    first_here, first_there = jnp.cumsum(counts, 1) - counts, jnp.cumsum(counts, 0) - counts

    def ragged(rows, zeros):
        sent = first_here[me], counts[me], first_there[me], counts[:, me]
        return lax.ragged_all_to_all(rows, zeros, *sent, axis_name=axis_name)

    def gathered(rows, zeros):
        end = jnp.cumsum(counts[:, me])
        at = jnp.arange(length)
        source = jnp.minimum(jnp.searchsorted(end, at, side="right"), end.size - 1)
        row = at - first_there[source, me] + first_here[source, me]
        received = lax.all_gather(rows, axis_name)[source, jnp.clip(row, 0, rows.shape[0] - 1)]
        return jnp.where((at < end[-1])[:, None], received, zeros)

    return lax.platform_dependent(rows, zeros, cpu=gathered, default=ragged)


_swap.defvjp(
    lambda axis_name, length, rows, counts: (_swap(axis_name, length, rows, counts), (rows.shape[0], counts)),
    lambda axis_name, length, residuals, d: (_swap(axis_name, residuals[0], d, residuals[1].T), None),
)


def _varying(axis_name, *arrays):
    return tuple(vary_alike(x, lax.axis_index(axis_name))[0] for x in arrays)
