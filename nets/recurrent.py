"""A gated recurrent unit over streams that hold several episodes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.layers import Linear


class GRU(nn.Module):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078, with the reset gate after the product, as cuDNN).

        r, z = sigmoid(x W_rz + b_rz + h U_rz),     c = tanh(x W_c + b_c + r * (h U_c + b)),     h' = (1 - z) c + z h

    Parameters: input/kernel [D, 3 features], input/bias, memory/kernel [features, 3 features], memory/bias, each in the
    order r, z, c.
    """

    features: int

    def setup(self):
        self.input = Linear(3 * self.features, use_bias=True, kernel_init=orthogonal(math.sqrt(2)))
        self.memory = Linear(3 * self.features, use_bias=True, kernel_init=orthogonal(1.0))

    def __call__(self, x: jax.Array, h: jax.Array) -> jax.Array:
        """One step: x [..., D], h [..., features] -> the new h."""
        return self._gates(self.input(x), h)

    def unroll(self, x: jax.Array, starts: jax.Array, h: jax.Array) -> jax.Array:
        """Steps through streams, forgetting where an episode starts.

        Args:
          x: [T, N, D].
          starts: bool [T, N], true where x is the first of an episode: h is zero before it.
          h: [N, features] before the first step.

        Returns:
          [T, N, features], h after each step.
        """
        if x.ndim != 3 or starts.shape != x.shape[:2] or h.shape != (x.shape[1], self.features):
            raise ValueError(
                f"x has shape {x.shape}, starts {starts.shape}, h {h.shape}, expected [T, N, D], [T, N] and "
                f"[N, {self.features}]"
            )
        projected = self.input(x)  # all steps in one product; only h has to wait for the step before

        def step(module, h, now):
            x, start = now
            h = module._gates(x, jnp.where(start[:, None], 0.0, h))
            return h, h

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, h, (projected, starts))[1]

    def _gates(self, projected, h):
        x_r, x_z, x_c = jnp.split(projected, 3, axis=-1)
        h_r, h_z, h_c = jnp.split(self.memory(h), 3, axis=-1)
        z = nn.sigmoid(x_z + h_z)
        return (1.0 - z) * jnp.tanh(x_c + nn.sigmoid(x_r + h_r) * h_c) + z * h
