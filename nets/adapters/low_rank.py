"""LoRA, rsLoRA and DoRA: W + s A B beside a frozen W, never built while it is trained."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.nets.adapters.adapted import LINEAR, Adapter, drawn, get, kernels, put
from jaxrl.nets.layers import Operator, times

HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) and two of its variants."""

    rank: int = 8
    """Columns of A and rows of B."""
    alpha: float = 16.0
    """Numerator of the scale s."""
    targets: tuple[str, ...] = LINEAR
    """Layers that get a pair: some of q, k, v, o, gate, up, down. The paper took q and v."""
    scaling: str = "standard"
    """standard: s = alpha / rank. rank_stabilised: s = alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    magnitude: bool = False
    """Whether column norms are trained apart from directions (DoRA, Liu et al. 2024, arXiv:2402.09353)."""
    param_dtype: str = "float32"
    """Storage of the adapter; the computation is in the model's dtype."""

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"rank is {self.rank} and alpha {self.alpha}; expected a rank of at least 1, alpha above 0"
            )
        if self.scaling not in ("standard", "rank_stabilised"):
            raise ValueError(f"scaling is {self.scaling!r}; expected standard or rank_stabilised")

    @property
    def scale(self) -> float:
        """s, the weight of A B."""
        return self.alpha / (self.rank if self.scaling == "standard" else self.rank**0.5)


class LowRank(NamedTuple):
    """x -> (x W + (x down) up) * gain: a kernel with a low-rank part beside it (an `Operator` of `nets.layers`).

    kernel: [..., in, out], an array or an `Operator`. down: [..., in, r]. up: [..., r, out]. gain: [..., out], or None.
    """

    kernel: Any
    down: jax.Array
    up: jax.Array
    gain: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.kernel.shape

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """Rows [N, in] -> [N, out]."""
        y = times(rows, self.kernel, dot=dot, dtype=dtype)
        y = y + recomputed_dot(dot(rows, self.down.astype(dtype)), self.up.astype(dtype))
        return y if self.gain is None else y * self.gain.astype(dtype)[None]

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """(W + down up) * gain as an array, added up in float32."""
        whole = dense(self.kernel) + low_rank_product(self.down, self.up)
        whole = whole if self.gain is None else whole * self.gain[..., None, :]
        return whole.astype(dtype)


def recomputed_dot(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """rows @ kernel, with a batch axis of one, so that remat="dots" does not keep it: it is cheap, and only a term."""
    return lax.dot_general(rows[None], kernel[None], (((2,), (1,)), ((0,), (0,))))[0]


def dense(kernel: Any) -> jax.Array:
    """A kernel, an array or an operator with `dense`, in float32."""
    return kernel.dense() if isinstance(kernel, Operator) else jnp.asarray(kernel, jnp.float32)  # pyright: ignore


def low_rank_product(down: jax.Array, up: jax.Array) -> jax.Array:
    """down @ up in float32, rounded once, so that it is the same number wherever it is added or subtracted."""
    down, up = down.astype(jnp.float32), up.astype(jnp.float32)
    return lax.optimization_barrier(jnp.matmul(down, up, precision=HIGHEST))


def lora(config: LoRAConfig) -> Adapter:
    """The adapter of a config.

        y = x W + s (x A) B,            A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0
        y = (x W + s (x A) B) m / n     with `magnitude`: n = |W + s A B| by columns, m = |W| at the start

    As in DoRA's section 4.3 n is a constant for the gradient. Parameters: for each target a [L, in, r], b [L, r, out]
    and, with `magnitude`, m [L, out], under the kernel's path: layers/attention/q/a. At the start the adapted model is
    the base: y = x W + 0, and with `magnitude` m / n = 1 to rounding. With `magnitude` init reads the base. Deviations:
    A is drawn as in the released code (the paper: normal); there is no dropout on x, as a pure apply has no key.
    """

    def init(key, model, base):
        return drawn(key, kernels(base, config.targets, who="lora"), pair)

    def pair(key, kernel):
        made = draw_pair(key, kernel.shape, config.rank, config.param_dtype)
        if config.magnitude:
            made["m"] = jnp.linalg.norm(dense(kernel), axis=-2).astype(config.param_dtype)
        return made

    def ready(model, base, params):
        parts = {}
        for path, kernel in kernels(base, config.targets, who="lora").items():
            pair = get(params, path)
            down, up = pair["a"] * config.scale, pair["b"]
            gain = None
            if config.magnitude:
                norms = lax.stop_gradient(column_norms(kernel, down, up))
                gain = pair["m"] / jnp.maximum(norms, 1e-30)
            parts[path] = {"down": down, "up": up, "gain": gain}
        return parts

    return Adapter(init, ready, graft_pairs, merges=True)


def graft_pairs(base: Any, parts: dict[str, dict]) -> dict:
    """The base's tree with a `LowRank` in the place of each kernel that has a part."""
    kernel = lambda path: f"{path}/kernel"
    return put(base, {kernel(path): LowRank(get(base, kernel(path)), **part) for path, part in parts.items()})


def draw_pair(key: jax.Array, shape: tuple[int, ...], rank: int, dtype: str) -> dict[str, jax.Array]:
    """A and B of a kernel [..., in, out] at the start."""
    *stack, rows, columns = shape
    bound = rows**-0.5
    a = jax.random.uniform(key, (*stack, rows, rank), jnp.dtype(dtype), -bound, bound)
    # the CPU backend of jax 0.10.2 makes NaN of some products with a zero that it knows: column_norms, in one program
    return {"a": a, "b": lax.optimization_barrier(jnp.zeros((*stack, rank, columns), dtype))}


def column_norms(kernel: Any, down: jax.Array, up: jax.Array) -> jax.Array:
    """|W + D U| of each column, [..., out] in float32, without W + D U.

    |w + D u|^2 = |w|^2 + 2 (D^T w) . u + u . (D^T D u), for the columns w of W and u of U; one layer at a time.
    """
    if len(kernel.shape) > 2:
        return lax.map(lambda layer: column_norms(*layer), (kernel, down, up))
    whole, down, up = dense(kernel), down.astype(jnp.float32), up.astype(jnp.float32)
    product = lambda a, b: jnp.matmul(a, b, precision=HIGHEST)
    squares = jnp.square(whole).sum(0)
    squares = squares + (up * (2.0 * product(down.T, whole) + product(product(down.T, down), up))).sum(0)
    return jnp.sqrt(jnp.maximum(squares, 0.0))
