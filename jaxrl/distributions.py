"""Policies as distributions: categorical, diagonal Gaussian, Gaussian squashed by tanh.

A draw is a deterministic function of the parameters and of standard `noise`, so that the noise of a whole rollout can
be drawn at once, before it, and so that draws from the Gaussians can be differentiated (reparameterised). All results
are float32, log-probs and entropies in nats.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.kernels.log_probs import select_log_probs
from jaxrl.losses import kl
from jaxrl.losses.checks import same_shape
from jaxrl.losses.policy import entropy_from_logits

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


class Categorical(NamedTuple):
    """softmax(logits) over the last axis; logits [..., A] float, -inf where an action is impossible."""

    logits: jax.Array

    def masked(self, mask: jax.Array) -> "Categorical":
        """The same distribution, given that the action is an allowed one: mask bool [..., A], true where allowed."""
        same_shape("[..., A]", logits=self.logits, mask=mask)
        return Categorical(jnp.where(mask, self.logits, -jnp.inf))

    @staticmethod
    def noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Standard Gumbel noise of the logits' shape [..., A]. The key is consumed."""
        return jax.random.gumbel(key, shape)

    def sample(self, noise: jax.Array) -> jax.Array:
        """An action of each distribution, int32 [...]: argmax(logits + noise), the Gumbel trick."""
        same_shape("[..., A]", logits=self.logits, noise=noise)
        return jnp.argmax(self.logits + noise, axis=-1).astype(jnp.int32)

    def mode(self) -> jax.Array:
        """The most probable action, int32 [...]; the first of several."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log p(action), [...]; action int [...]."""
        return select_log_probs(self.logits, action)[0]

    def entropy(self) -> jax.Array:
        """-sum p log p, [...]."""
        return entropy_from_logits(self.logits)

    def kl(self, other: "Categorical") -> jax.Array:
        """KL(self || other), exact, [...]."""
        return kl.categorical(jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits))


class Gaussian(NamedTuple):
    """Independent normal distributions along the last axis; mean and log_std [..., D]."""

    mean: jax.Array
    log_std: jax.Array

    @staticmethod
    def noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Standard normal noise of the mean's shape [..., D]. The key is consumed."""
        return jax.random.normal(key, shape)

    def sample(self, noise: jax.Array) -> jax.Array:
        """mean + std * noise, [..., D]."""
        same_shape("[..., D]", mean=self.mean, log_std=self.log_std, noise=noise)
        return self.mean + jnp.exp(self.log_std) * noise

    def mode(self) -> jax.Array:
        """The mean, [..., D]."""
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log density, summed over the last axis: [..., D] -> [...]."""
        same_shape("[..., D]", mean=self.mean, log_std=self.log_std, action=action)
        standard = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * jnp.square(standard) + self.log_std + LOG_SQRT_2PI, axis=-1)

    def entropy(self) -> jax.Array:
        """sum (log std + 1/2 log 2 pi e), [...]."""
        return jnp.sum(self.log_std + 0.5 + LOG_SQRT_2PI, axis=-1)

    def kl(self, other: "Gaussian") -> jax.Array:
        """KL(self || other), exact, [...]."""
        same_shape("[..., D]", mean=self.mean, others_mean=other.mean)
        ratio = jnp.exp(2.0 * (self.log_std - other.log_std))
        distance = jnp.square((self.mean - other.mean) * jnp.exp(-other.log_std))
        return 0.5 * jnp.sum(ratio + distance - 1.0, axis=-1) + jnp.sum(other.log_std - self.log_std, axis=-1)


class TanhGaussian(NamedTuple):
    """tanh(u) with u from `Gaussian(mean, log_std)`; mean and log_std [..., D].

    tanh cannot be undone in float32 (tanh(9) is 1), so samples and log-probs are those of u: keep u, and hand
    `squash(u)` to the environment.
    """

    mean: jax.Array
    log_std: jax.Array

    noise = staticmethod(Gaussian.noise)

    @property
    def before(self) -> Gaussian:
        """The distribution of u."""
        return Gaussian(self.mean, self.log_std)

    @staticmethod
    def squash(u: jax.Array) -> jax.Array:
        """The action in (-1, 1), [..., D]."""
        return jnp.tanh(u)

    def sample(self, noise: jax.Array) -> jax.Array:
        """u = mean + std * noise, [..., D]: the action before tanh."""
        return self.before.sample(noise)

    def mode(self) -> jax.Array:
        """u of the median action, [..., D]."""
        return self.mean

    def log_prob(self, u: jax.Array) -> jax.Array:
        """log density of the action tanh(u), [...]: log N(u) - sum log(1 - tanh(u)^2).

        In the form log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which keeps its digits at any u (Haarnoja et
        al. 2018, arXiv 1801.01290, appendix C, has the plain one).
        """
        correction = 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))
        return self.before.log_prob(u) - jnp.sum(correction, axis=-1)


Distribution = Categorical | Gaussian | TanhGaussian
