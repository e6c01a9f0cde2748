"""MADE: an autoencoder whose masks make it autoregressive; without hidden layers it is an FVSBN."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.nets.densities import Density, density

Degrees = tuple[jax.Array, ...]


@dataclass(frozen=True)
class MADEConfig:
    """Sizes and choices of a `MADE`."""

    size: int  # n
    hidden: tuple[int, ...] = (500,)
    direct: bool = False  # from inputs to outputs as well
    order_agnostic: bool = False  # the loss draws an order for every batch
    seed: int = 0  # of the hidden degrees
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.size < 1 or any(width < 1 for width in self.hidden):
            raise ValueError(f"size is {self.size} and hidden {self.hidden}, expected widths of at least 1")


def draw_degrees(config: MADEConfig, key: jax.Array, *, order: jax.Array | None = None) -> Degrees:
    """The degrees of inputs and hidden layers, int [n], [hidden[0]], ...; may be traced.

    Input i has the place of i in the order, from 1 on. A hidden unit of degree m sees inputs of degree m or less;
    m is uniform between the least degree of the layer before and n - 1.

    Args:
      config: sizes.
      key: consumed.
      order: int [n], the entries as they come; None: as they lie.
    """
    n = config.size
    degrees = [jnp.arange(1, n + 1) if order is None else jnp.argsort(order) + 1]
    for each, width in zip(jax.random.split(key, len(config.hidden)), config.hidden, strict=True):
        degrees.append(jax.random.randint(each, (width,), jnp.min(degrees[-1]), max(n, 2)))
    return tuple(degrees)


def masks(degrees: Degrees) -> Degrees:
    """Who sees whom, bool [in, out] of each hidden layer, then of the output, then of the direct connections."""
    inputs, last = degrees[0], degrees[-1]
    pairs = [(a[:, None], b[None]) for a, b in zip(degrees, degrees[1:], strict=False)]
    return (*(a <= b for a, b in pairs), last[:, None] < inputs[None], inputs[:, None] < inputs[None])


class MADE(nn.Module):
    """h = relu(h (W * M) + b) layer by layer, logits = h (V * M_out) + b (+ x (A * M_direct)).

    Germain et al. 2015, arXiv:1502.03509, without their weights of the masks themselves. Parameters: layer_0/kernel
    [n, hidden[0]], layer_0/bias, ..., output/kernel [last, n], output/bias and with `direct` direct/kernel [n, n].
    """

    config: MADEConfig

    @nn.compact
    def __call__(self, x: jax.Array, masks: Degrees) -> jax.Array:
        """x [..., n], masks of `masks` -> logits [..., n]."""
        c = self.config
        dtype, h = jnp.dtype(c.dtype), x.astype(c.dtype)
        *hidden, out, direct = masks
        for i, mask in enumerate(hidden):
            h = nn.relu(self._masked(h, mask, f"layer_{i}"))
        logits = self._masked(h, out, "output")
        if c.direct:
            logits = logits + self._masked(x.astype(dtype), direct, "direct", bias=False)
        return logits.astype(jnp.float32)

    def _masked(self, x, mask, name, bias=True):
        return MaskedLinear(bias, self.config.dtype, self.config.param_dtype, name=name)(x, mask)


class MaskedLinear(nn.Module):
    """y = x (W * mask) (+ b), mask [in, out]. Parameters: kernel [in, out], of LeCun's initialisation, and bias."""

    use_bias: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Map x [..., in] to [..., out]."""
        stored = jnp.dtype(self.param_dtype)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), mask.shape, stored)
        y = x @ (kernel * mask).astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, mask.shape[1:], stored)
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y


def made(config: MADEConfig) -> Density:
    """`MADE` as a density. What may be given: `degrees`, of `draw_degrees`; else those of the config's seed.

    With `order_agnostic` the loss draws an order and degrees from its key, and any degrees may be given afterwards.
    """
    model = MADE(config)

    def own(degrees):
        return draw_degrees(config, jax.random.key(config.seed)) if degrees is None else degrees

    def init(key):
        return model.init(key, jnp.zeros((1, config.size)), masks(own(None)))["params"]

    def logits(params, x, *, degrees=None):
        return model.apply({"params": params}, x, masks(own(degrees)))

    def agnostic(params, x, key):
        order, rest = jax.random.split(key)
        degrees = draw_degrees(config, rest, order=jax.random.permutation(order, config.size))
        return -plain.log_prob(params, x, degrees=degrees)

    plain = density(init, logits, order=lambda degrees=None: jnp.argsort(own(degrees)[0]))
    return plain._replace(loss=agnostic) if config.order_agnostic else plain


SIZES: dict[str, MADEConfig] = {
    "tiny": MADEConfig(size=8, hidden=(16, 16), direct=True),
    "mnist_1": MADEConfig(size=784, hidden=(500,)),  # the paper's tables: one and two hidden layers of 500
    "mnist_2": MADEConfig(size=784, hidden=(500, 500)),
}
