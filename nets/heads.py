"""Heads: what a torso's or a language model's features [..., D] become. Outputs are float32."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.layers import Linear, small_dot


class Categorical(nn.Module):
    """Logits of a discrete policy, or one value per action (a Q head).

    The small default gain starts the policy near uniform; give `orthogonal(1.0)` for values. Parameters:
    logits/kernel [D, actions], logits/bias.
    """

    actions: int
    kernel_init: Callable = orthogonal(0.01)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to logits [..., actions]."""
        return _linear(x, self.actions, self.kernel_init, "logits")


class Gaussian(nn.Module):
    """Mean and log standard deviation of a diagonal Gaussian policy.

    With `state_dependent` both are linear in the features (SAC); else log_std is one learned vector (PPO,
    TRPO). log_std is clipped to `bounds`. Parameters: mean/kernel [D, actions], mean/bias, and log_std
    [actions] or log_std/kernel, log_std/bias.
    """

    actions: int
    state_dependent: bool = False
    initial_log_std: float = 0.0
    bounds: tuple[float, float] = (-20.0, 2.0)
    kernel_init: Callable = orthogonal(0.01)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x [..., D] to (mean, log_std), each [..., actions]."""
        mean = _linear(x, self.actions, self.kernel_init, "mean")
        if self.state_dependent:
            log_std = self.initial_log_std + _linear(x, self.actions, self.kernel_init, "log_std")
        else:
            start = nn.initializers.constant(self.initial_log_std)
            log_std = jnp.broadcast_to(self.param("log_std", start, (self.actions,), jnp.float32), mean.shape)
        return mean, jnp.clip(log_std, *self.bounds)


class Value(nn.Module):
    """A scalar per feature vector: state values, or one value per token.

    Parameters: value/kernel [D, 1], value/bias.
    """

    kernel_init: Callable = orthogonal(1.0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [...]."""
        return _linear(x, 1, self.kernel_init, "value")[..., 0]


class Reward(nn.Module):
    """A scalar per sequence, read at its last real token (Ouyang et al. 2022, arXiv:2203.02155).

    Parameters: reward/kernel [D, 1], without bias: only differences of rewards are learned.
    """

    kernel_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Score sequences.

        Args:
          hidden: [B, T, D].
          mask: [B, T], true on real tokens; padding may stand on either side.

        Returns:
          [B] float32; zero for a row without a real token.
        """
        if mask.shape != hidden.shape[:2]:
            raise ValueError(f"mask has shape {mask.shape}, expected that of hidden's [B, T] = {hidden.shape[:2]}")
        mask = mask.astype(bool)
        last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1])[None], 0), axis=1)
        features = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        score = _linear(features, 1, self.kernel_init, "reward", use_bias=False)[:, 0]
        return jnp.where(mask.any(axis=1), score, 0.0)


def _linear(x, features, kernel_init, name, *, use_bias=True):
    return Linear(features, use_bias=use_bias, kernel_init=kernel_init, dot=small_dot, name=name)(x)
