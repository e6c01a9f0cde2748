"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): a small two-layer network after a sublayer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets.adapters.adapted import Adapter, drawn, get, kernels, put
from jaxrl.nets.adapters.low_rank import recomputed_dot
from jaxrl.nets.layers import times


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Where bottlenecks stand and how wide they are."""

    width: int = 64
    """m, their inner width."""
    targets: tuple[str, ...] = ("o", "down")
    """Layers whose output they change: o and down are the ends of attention and feed-forward (Houlsby); down alone is
    Pfeiffer et al. 2020 (arXiv:2005.00247)."""
    param_dtype: str = "float32"
    """Storage of the adapter."""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"bottleneck width is {self.width}; expected at least 1")


class Bottleneck(NamedTuple):
    """x -> h + gelu(h down + down_bias) up + up_bias with h = x W (an `Operator` of `nets.layers`).

    kernel: [..., in, out], an array or an `Operator`. down: [..., out, m]. up: [..., m, out]. down_bias: [..., m].
    up_bias: [..., out].
    """

    kernel: Any
    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.kernel.shape

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """Rows [N, in] -> [N, out]."""
        h = times(rows, self.kernel, dot=dot, dtype=dtype)
        inner = jax.nn.gelu(dot(h, self.down.astype(dtype)) + self.down_bias.astype(dtype)[None])
        return h + (recomputed_dot(inner, self.up.astype(dtype)) + self.up_bias.astype(dtype)[None])


def bottleneck(config: BottleneckConfig) -> Adapter:
    """The adapter of a config: before the residual sum, h + gelu(h D + b) U + c, with D ~ N(0, 0.01^2), the rest 0.

    At the start the adapted model is the base. It cannot be merged: it is not linear. A bias of the layer itself (none
    on o and down in this family) is added after it. Deviation: U = 0, where the paper draws it near 0.
    """

    def init(key, model, base):
        return drawn(key, kernels(base, config.targets, who="bottleneck"), one)

    def one(key, kernel):
        *stack, _, out = kernel.shape
        zeros = lambda *shape: jnp.zeros((*stack, *shape), config.param_dtype)
        down = 0.01 * jax.random.normal(key, (*stack, out, config.width), jnp.dtype(config.param_dtype))
        biases = {"down_bias": zeros(config.width), "up_bias": zeros(out)}
        return {"down": down, "up": zeros(config.width, out), **biases}

    def ready(model, base, params):
        return {path: get(params, path) for path in kernels(base, config.targets, who="bottleneck")}

    def graft(base, parts):
        kernel = lambda path: f"{path}/kernel"
        return put(base, {kernel(path): Bottleneck(get(base, kernel(path)), **part) for path, part in parts.items()})

    return Adapter(init, ready, graft)
