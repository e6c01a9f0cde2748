"""What all forms of attention ask of their arguments."""

import jax.numpy as jnp


def check_arrays(name: str, q, k, v) -> tuple[int, int, int, int]:
    """(B, H, T, S) of a call, or ValueError."""
    for what, x, axes in (("q", q, "[B, T, H, D]"), ("k", k, "[B, S, K, D]"), ("v", v, "[B, S, K, Dv]")):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name}: {what} has shape {jnp.shape(x)}, expected {axes}.")
    (b, t, h, d), (kb, s, _, kd) = q.shape, k.shape
    if (kb, kd) != (b, d):
        raise ValueError(f"{name}: k has B, D = {kb}, {kd}, expected q's B, D = {b}, {d}.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{name}: v has B, S, K = {v.shape[:3]}, expected k's {k.shape[:3]}.")
    check_groups(name, q, k)
    return b, h, t, s


def check_groups(name: str, q, k) -> None:
    """Whether the query heads are a multiple of the key heads."""
    h, heads = q.shape[2], k.shape[2]
    if heads == 0 or h % heads:
        raise ValueError(f"{name}: q has H = {h} heads, expected a multiple of k's K = {heads} heads.")


def check_per_head(name: str, h: int, **arrays) -> None:
    """Whether arrays, or None, have one number for each head."""
    for what, x in arrays.items():
        if x is not None and jnp.shape(x) != (h,):
            raise ValueError(f"{name}: {what} has shape {jnp.shape(x)}, expected [H] = ({h},).")


def check_soft_cap(name: str, soft_cap) -> None:
    """Whether a soft cap that is a Python number is positive."""
    if isinstance(soft_cap, int | float) and soft_cap <= 0:
        raise ValueError(f"{name}: soft_cap = {soft_cap}, expected a positive number, or None for no cap.")
