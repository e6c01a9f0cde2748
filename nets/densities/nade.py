"""NADE, of one fixed order in O(n H), and EoNADE, a deep one of all orders at once."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.nets.densities import Density, bernoulli, density
from jaxrl.nets.layers import Linear
from jaxrl.nets.mlp import MLP


@dataclass(frozen=True)
class NADEConfig:
    """Sizes of a NADE or EoNADE."""

    size: int  # n
    hidden: tuple[int, ...] = (500,)  # NADE has one layer

    def __post_init__(self):
        if self.size < 1 or not self.hidden or any(width < 1 for width in self.hidden):
            raise ValueError(f"size is {self.size} and hidden {self.hidden}, expected widths of at least 1")


def nade(config: NADEConfig) -> Density:
    """Neural autoregressive distribution estimator (Larochelle and Murray 2011; arXiv:1605.02226 is its long form).

        a_1 = c,  logits_i = b_i + V_i s(a_i),  a_{i+1} = a_i + x_i W_i

    One scan over entries, [..., H] at a time: O(n H) for a density and for a sample as well. What may be given:
    `order`, int [n], the entries as they come. Parameters: input/kernel W [n, H], input/bias c [H], output/kernel V
    [n, H], output/bias b [n].
    """
    if len(config.hidden) != 1:
        raise ValueError(f"hidden is {config.hidden}, expected one layer: use eonade for more")
    n, width = config.size, config.hidden[0]

    def init(key):
        first, second = jax.random.split(key)
        kernel = nn.initializers.normal(n**-0.5)(first, (n, width))
        readout = nn.initializers.normal(width**-0.5)(second, (n, width))
        return {
            "input": {"kernel": kernel, "bias": jnp.zeros(width)},
            "output": {"kernel": readout, "bias": jnp.zeros(n)},
        }

    def chain(params, rows, order, value):
        """(entries, logits), each [n, *rows]; `value` makes an entry of its logit and what is scanned with it."""
        choose, given = value
        into, out = params["input"], params["output"]
        each = (into["kernel"], out["kernel"], out["bias"])
        each = each if order is None else jax.tree.map(lambda p: p[order], each)

        def step(a, now):
            (w, v, b), given = now
            logit = nn.sigmoid(a) @ v + b
            x = choose(logit, given)
            return a + x[..., None] * jnp.broadcast_to(w, a.shape), (x, logit)

        return lax.scan(step, jnp.broadcast_to(into["bias"], (*rows, width)), (each, given))[1]

    def logits(params, x, *, order=None):
        entries = x if order is None else x[..., order]
        found = chain(params, x.shape[:-1], order, (lambda logit, x: x, jnp.moveaxis(entries, -1, 0)))[1]
        return _back(jnp.moveaxis(found, 0, -1), order)

    def sample(params, key, number, *, order=None):
        noise = jax.random.logistic(key, (n, number))
        found = chain(params, (number,), order, (lambda logit, noise: (logit > noise).astype(jnp.float32), noise))[0]
        return _back(found.T, order)

    return density(init, logits, order=lambda order=None: order, sample=sample)


def _back(entries, order):
    """Entries as they come, [..., n], as they lie."""
    return entries if order is None else entries[..., jnp.argsort(order)]


class EoNADE(nn.Module):
    """logits of all entries from the observed ones: an MLP (relu) of [x * m, m].

    Parameters: body/layer_0/kernel [2 n, hidden[0]], ..., output/kernel [last, n], each with a bias.
    """

    config: NADEConfig

    @nn.compact
    def __call__(self, x: jax.Array, observed: jax.Array) -> jax.Array:
        """x, observed [..., n], of 0 and 1 -> logits [..., n]."""
        h = MLP(self.config.hidden, nn.relu, name="body")(jnp.concatenate([x * observed, observed], axis=-1))
        return Linear(self.config.size, use_bias=True, name="output")(h)


def masked_loss(logits: jax.Array, x: jax.Array, observed: jax.Array) -> jax.Array:
    """n / (n - d + 1) sum over the unobserved i of -log p(x_i | observed), with d - 1 observed entries: [...].

    With d uniform in 1..n and a uniform set of d - 1 entries its mean is that of -log p(x) over all orders. (Uria et
    al. 2014, arXiv:1310.1757, equation 15.)
    """
    hidden = 1.0 - observed
    return -x.shape[-1] / hidden.sum(-1) * (bernoulli(logits, x) * hidden).sum(-1)


def draw_observed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """For each row of shape [..., n] the first d - 1 entries of an order, d uniform in 1..n, as 0 and 1."""
    size, entries = jax.random.split(key)
    places = jnp.argsort(jax.random.uniform(entries, shape), axis=-1)
    return (places < jax.random.randint(size, (*shape[:-1], 1), 0, shape[-1])).astype(jnp.float32)


def eonade(config: NADEConfig) -> Density:
    """Deep NADE trained on all orders (Uria et al. 2014, arXiv:1310.1757): one network, a density for each order.

    Its loss is an estimate of -log p(x), averaged over orders, from one pass; density and sample are n passes. What
    may be given: `order`, int [n], the entries as they come.
    """
    model, n = EoNADE(config), config.size

    def init(key):
        return model.init(key, jnp.zeros((1, n)), jnp.zeros((1, n)))["params"]

    def conditional(params, x, observed) -> Any:
        return model.apply({"params": params}, x, jnp.broadcast_to(observed, x.shape))

    def given(order):
        return jnp.arange(n) if order is None else order

    def logits(params, x, *, order=None):
        places = jnp.argsort(given(order))

        def one(entry):
            observed = (places < places[entry]).astype(jnp.float32)
            return conditional(params, x, observed)[..., entry]

        return jnp.moveaxis(lax.map(one, jnp.arange(n)), 0, -1)

    def sample(params, key, number, *, order=None):
        noise = jax.random.logistic(key, (n, number))

        def draw(state, now):
            (x, observed), (entry, noise) = state, now
            drawn = conditional(params, x, observed)[:, entry] > noise
            return (x.at[:, entry].set(drawn), observed.at[entry].set(1.0)), None

        return lax.scan(draw, (jnp.zeros((number, n)), jnp.zeros(n)), (given(order), noise))[0][0]

    def loss(params, x, key):
        observed = draw_observed(key, x.shape)
        return masked_loss(conditional(params, x, observed), x, observed)

    return density(init, logits, order=lambda order=None: given(order), sample=sample, loss=loss)


SIZES: dict[str, NADEConfig] = {
    "tiny": NADEConfig(size=8, hidden=(16,)),
    "mnist": NADEConfig(size=784, hidden=(500,)),  # binarised MNIST in both papers
    "mnist_2": NADEConfig(size=784, hidden=(500, 500)),
}
