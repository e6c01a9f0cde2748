"""Multi-layer perceptrons: the torsos of small agents."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.layers import Linear, small_dot


class MLP(nn.Module):
    """x -> activation(x W + b), once per entry of `sizes`.

    Orthogonal kernels of gain sqrt(2) and zero biases, as in most policy-gradient code since Baselines
    (Engstrom et al. 2020, arXiv:2005.12729, measured that it matters); they are drawn without QR and may be
    vmapped over seeds. Parameters: layer_0/kernel [in, sizes[0]], layer_0/bias, layer_1/kernel, ...
    """

    sizes: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.tanh
    activate_final: bool = True
    kernel_init: Callable = orthogonal(math.sqrt(2))
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., in] to [..., sizes[-1]]."""
        for i, size in enumerate(self.sizes):
            x = Linear(
                size,
                use_bias=True,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot=small_dot,
                name=f"layer_{i}",
            )(x)
            if i + 1 < len(self.sizes) or self.activate_final:
                x = self.activation(x)
        return x
