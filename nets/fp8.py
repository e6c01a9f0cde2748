"""Linear layers in 8-bit floats, as DeepSeek-V3 is trained and served (2024, arXiv:2412.19437, section 3.3).

e4m3 values with a scale for each 1 x 128 tile of activations and each 128 x 128 block of a kernel: `FP8` of
`jaxrl.kernels.quantised`, whose bounds on the error hold here. Embeddings, head, norms, routers and attention itself
stay as they are; so do the stacked experts of `jaxrl.nets.moe`, which are no linear layers, and latent attention's
`kv_up`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.kernels.quantised import FP8, Quantised, Scheme, dequantise, quantise, quantised_matmul
from jaxrl.nets.adapters.adapted import LINEAR, kernels, put
from jaxrl.nets.language_model import LanguageModel

POWERS = FP8._replace(power_of_two=True)
"""FP8 with scales that are powers of two."""


@flax.struct.dataclass
class FP8Kernel:
    """A kernel [..., in, out] kept as e4m3 with a scale for each 128 x 128 block (an `Operator` of `nets.layers`).

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

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel that the values stand for."""
        return dequantise(Quantised(self.values, self.scales), block=self.scheme.w_block, dtype=dtype)


@flax.struct.dataclass
class TrainedInFP8:
    """A kernel [..., in, out] in full precision whose products, forward and backward, are in 8 bits (an `Operator`).

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


def to_fp8(kernel: jax.Array, *, scheme: Scheme = FP8) -> FP8Kernel:
    """A kernel [..., in, out] in 8 bits; each weight is off by at most `rounding_bound`, 1/16 of it where it is normal.

    Weights read from a checkpoint of DeepSeek-V3 come out with the values that the file has, but where a scale's own
    rounding tips one.
    """
    return FP8Kernel(*quantise(kernel, dtype=scheme.dtype, block=scheme.w_block), scheme)  # pyright: ignore


def quantise_fp8(base: Any, *, targets: tuple[str, ...] = LINEAR, scheme: Scheme = FP8) -> dict:
    """A model's parameters with the kernels of its linear layers as `FP8Kernel`, to sample or to score with.

    `adapters.dequantise_base` puts plain kernels back.

    Args:
      base: the parameters.
      targets: layers by name; with latent attention ("q_down", "q_up", "kv_down", "o", "gate", "up", "down").
      scheme: `FP8` or `POWERS`.

    Raises:
      ValueError: an unknown layer.
    """
    found = kernels(base, targets, who="quantise_fp8")
    return put(base, {f"{path}/kernel": to_fp8(kernel, scheme=scheme) for path, kernel in found.items()})


def train_in_fp8(model: LanguageModel, *, targets: tuple[str, ...] = LINEAR, scheme: Scheme = FP8) -> LanguageModel:
    """The model, computing the products of its linear layers in 8 bits; parameters and gradients are as before.

    Any loop takes it in the model's place: master weights and optimizer state stay in full precision.

    Args:
      model: its functions.
      targets, scheme: as in `quantise_fp8`.
    """

    def apply(params, tokens, **options):
        found = kernels(params, targets, who="train_in_fp8")
        rounded = {f"{path}/kernel": TrainedInFP8(kernel, scheme) for path, kernel in found.items()}  # pyright: ignore
        return model.apply(put(params, rounded), tokens, **options)

    return model._replace(apply=apply)
