"""What the adapters share: spaces and states of other libraries as ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs.env import Box, Discrete, Space


def settle(state: Any, kinds: Any) -> Any:
    """The state with the dtypes of `kinds`, so that a scan can carry it: Python numbers become arrays."""

    def cast(leaf, kind):
        return leaf if jnp.issubdtype(kind.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf, kind.dtype)

    return jax.tree.map(cast, state, kinds)


def space_of(space: Any) -> Space:
    """Our space for one of gymnax or Gymnasium, told by its attributes."""
    if hasattr(space, "n") and space.shape == ():
        return Discrete(int(space.n))
    if hasattr(space, "low") and hasattr(space, "high"):
        shape = tuple(space.shape)
        kind = np.dtype(space.dtype)
        dtype = jnp.float32 if kind.kind == "f" else jnp.dtype(jax.dtypes.canonicalize_dtype(kind))
        low, high = (_bound(bound, shape) for bound in (space.low, space.high))
        return Box(low, high, shape, dtype)
    raise ValueError(f"{space} is neither Discrete nor Box; flatten it first (gymnasium.wrappers.FlattenObservation)")


def _bound(bound, shape):
    """One number where all are the same, else nested tuples, so that spaces can be compared."""
    values = np.broadcast_to(np.asarray(bound, np.float64), shape)
    if values.size and (values == values.flat[0]).all():
        return float(values.flat[0])
    return _tuples(values.tolist())


def _tuples(values):
    return tuple(_tuples(v) for v in values) if isinstance(values, list) else values
