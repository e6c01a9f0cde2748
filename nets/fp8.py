"""Linear layers and experts in 8-bit floats, as DeepSeek-V3 has them (2024, arXiv:2412.19437, section 3.3).

e4m3 values with a scale for each 1 x 128 tile of activations and each 128 x 128 block of a kernel: `FP8` of
`jaxrl.kernels.quantised`, whose bounds on the error hold here. Embeddings, head, norms, routers and attention itself
stay as they are. Latent attention's `kv_up` meets no rows: its weights are rounded, what they are multiplied by is not.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.kernels.quantised import (
    FP8,
    Quantised,
    Scheme,
    dequantise,
    quantise,
    quantised_grouped_matmul,
    quantised_matmul,
)
from jaxrl.nets.adapters.adapted import LINEAR, put
from jaxrl.nets.language_model import LanguageModel

TARGETS = (*LINEAR, "q_down", "q_up", "kv_down", "kv_up")
"""What is in 8 bits where nothing else is said: of these layers those that a network has, and its experts."""
EXPERTS = ("gate", "up", "down")
POWERS = FP8._replace(power_of_two=True)
"""FP8 with scales that are powers of two."""


@flax.struct.dataclass
class FP8Kernel:
    """A kernel [..., in, out] kept as e4m3 with a scale for each 128 x 128 block (a `GroupedOperator` of `nets.moe`).

    1.0002 bytes a weight. Its products are in 8 bits: rows are quantised as they come. No gradient for the kernel.
    values: float8_e4m3fn [..., in, out]. scales: float32 [..., in / 128, out / 128], rounded up.
    """

    values: jax.Array
    scales: jax.Array
    scheme: Scheme = flax.struct.field(pytree_node=False, default=FP8)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.values.shape

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """Rows [N, in] -> [N, out]; `dot` has no part in it."""
        return quantised_matmul(rows, Quantised(self.values, self.scales), scheme=self.scheme)

    def times_grouped(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows [R, in], sorted by expert, `sizes` [E] of each -> [R, out]."""
        return quantised_grouped_matmul(rows, Quantised(self.values, self.scales), sizes, scheme=self.scheme)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel that the values stand for."""
        return dequantise(Quantised(self.values, self.scales), block=self.scheme.w_block, dtype=dtype)


@flax.struct.dataclass
class TrainedInFP8:
    """A kernel [..., in, out] in full precision whose products, both ways, are in 8 bits (a `GroupedOperator`).

    The rounding is real, the speed is not where the machine has no 8-bit products. Gradients pass straight through.
    """

    kernel: jax.Array
    scheme: Scheme = flax.struct.field(pytree_node=False, default=FP8)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.kernel.shape

    def times(self, rows: jax.Array, *, dot: Callable, dtype: Any) -> jax.Array:
        """Rows [N, in] -> [N, out]; `dot` has no part in it."""
        return quantised_matmul(rows, self.kernel, scheme=self.scheme, quantise_gradient=True)

    def times_grouped(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows [R, in], sorted by expert, `sizes` [E] of each -> [R, out]."""
        return quantised_grouped_matmul(rows, self.kernel, sizes, scheme=self.scheme, quantise_gradient=True)


def to_fp8(kernel: jax.Array, *, scheme: Scheme = FP8) -> FP8Kernel:
    """A kernel [..., in, out] in 8 bits; each weight is off by at most `rounding_bound`, 1/16 of it where it is normal.

    Weights read from a checkpoint of DeepSeek-V3 come out with the values that the file has, but where a scale's own
    rounding tips one.
    """
    return FP8Kernel(*quantise(kernel, dtype=scheme.dtype, block=scheme.w_block), scheme)  # pyright: ignore


def matrices(base: Any, targets: tuple[str, ...] | None = None, *, who: str = "matrices") -> dict[str, Any]:
    """Path of a matrix, such as layers/attention/q/kernel or layers/moe/up -> [..., in, out], of what is in 8 bits.

    Args:
      base: a model's parameters.
      targets: layers by name; gate, up and down are those of experts too. None: all of `TARGETS` that there are.

    Raises:
      ValueError: a name that nothing has.
    """
    found = {path: matrix for path, matrix in _matrices(base) if not path.startswith("unembed")}
    layer = lambda path: path.removesuffix("/kernel").rpartition("/")[2]
    names = sorted({layer(path) for path in found})
    unknown = [name for name in targets or () if name not in names]
    if unknown or targets == ():
        raise ValueError(f"{who}: targets are {targets}, expected some of the layers {', '.join(names)}, or None")
    return {path: matrix for path, matrix in found.items() if layer(path) in (targets or TARGETS)}


def quantise_fp8(base: Any, *, targets: tuple[str, ...] | None = None, scheme: Scheme = FP8) -> dict:
    """A model's parameters with the kernels of its linear layers and experts as `FP8Kernel`, to sample or score with.

    `adapters.dequantise_base` puts plain kernels back.

    Args:
      base: the parameters.
      targets: as in `matrices`; None is what DeepSeek-V3's checkpoints have in 8 bits.
      scheme: `FP8` or `POWERS`.

    Raises:
      ValueError: an unknown layer.
    """
    found = matrices(base, targets, who="quantise_fp8")
    return put(base, {path: to_fp8(matrix, scheme=scheme) for path, matrix in found.items()})


def train_in_fp8(
    model: LanguageModel, *, targets: tuple[str, ...] | None = None, scheme: Scheme = FP8
) -> LanguageModel:
    """The model, computing the products of its linear layers and experts in 8 bits; parameters and gradients stay.

    Any loop takes it in the model's place: master weights and optimizer state stay in full precision.

    Args:
      model: its functions.
      targets, scheme: as in `quantise_fp8`.
    """

    def apply(params, tokens, **options):
        found = matrices(params, targets, who="train_in_fp8")
        rounded = {path: TrainedInFP8(matrix, scheme) for path, matrix in found.items()}  # pyright: ignore
        return model.apply(put(params, rounded), tokens, **options)

    return model._replace(apply=apply)


def _matrices(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Kernels of linear layers, and the stacked ones of experts, which no kernel is named."""
    for name, node in tree.items():
        here = f"{path}/{name}" if path else name
        if isinstance(node, dict):
            yield from _matrices(node, here)
        elif name == "kernel" or (name in EXPERTS and path.rpartition("/")[2] == "moe"):
            yield here, node
