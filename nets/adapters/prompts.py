"""Learnt contexts: prompt-tuning, P-tuning and prefix-tuning.

All three become keys and values that every query sees: a learnt prompt's are those that the frozen network computes
for it, once, without a copy for each row. So masks, packing and caches need to know nothing of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.nets.adapters.adapted import Adapter, put
from jaxrl.nets.cache import Int8, unpack
from jaxrl.nets.language_model import LanguageModel

PREFIX = "layers/attention/prefix"


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Embeddings in front of the tokens: prompt-tuning (arXiv:2104.08691), or P-tuning with an encoder (2103.10385)."""

    length: int = 16
    """P, the number of embeddings."""
    encoder: str = "none"
    """What makes the embeddings of the learnt ones: none (prompt-tuning), mlp or lstm (P-tuning)."""
    hidden: int = 128
    """Width of the encoder."""
    start: tuple[int, ...] = ()
    """Tokens whose embeddings the prompt starts from; fewer than `length` are repeated. Empty draws random tokens."""

    def __post_init__(self):
        if self.length < 1 or self.hidden < 1:
            raise ValueError(f"prompt length is {self.length} and hidden {self.hidden}; expected at least 1")
        if self.encoder not in ("none", "mlp", "lstm"):
            raise ValueError(f"prompt encoder is {self.encoder!r}; expected none, mlp or lstm")


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """Keys and values in front of each layer's: prefix-tuning (Li and Liang 2021, arXiv:2101.00190)."""

    length: int = 16
    """P, keys and values a layer."""
    hidden: int = 0
    """Width of the network that makes them while they are trained (`without_network` drops it); 0: none."""
    start: tuple[int, ...] = ()
    """Tokens whose activations the prefix starts from, `length` in number; empty draws N(0, 0.02^2). The paper found
    real words better; a random prefix damages the base at the start."""

    def __post_init__(self):
        if self.length < 1 or self.hidden < 0:
            raise ValueError(f"prefix length is {self.length} and hidden {self.hidden}; expected at least 1 and 0")
        if self.start and (self.hidden or len(self.start) != self.length):
            raise ValueError(
                f"a prefix starts from {len(self.start)} tokens with length {self.length} and hidden {self.hidden}; "
                "expected as many tokens as the length, and hidden 0: a network cannot start from activations"
            )


def prompt(config: PromptConfig) -> Adapter:
    """The adapter of a config: [P, D] embeddings before the tokens, whose positions start at P.

    Parameters: embedding [P, D] and, with an encoder, encoder/... The prompt's tokens see each other causally, and
    every token sees the whole prompt, in windowed layers too. init reads the base's embed/embedding.
    """

    def init(key, model, base):
        table = base["embed"]["embedding"]
        drawing, encoding = jax.random.split(key)
        if config.start:
            ids = jnp.resize(jnp.asarray(config.start, jnp.int32), (config.length,))
        else:
            ids = jax.random.randint(drawing, (config.length,), 0, table.shape[0])
        params: dict[str, Any] = {"embedding": jnp.asarray(table)[ids].astype(jnp.float32)}
        width = table.shape[1]
        if config.encoder == "mlp":
            sizes = (width, config.hidden, config.hidden, width)
            params["encoder"] = {"mlp": _mlp_init(encoding, sizes)}
        if config.encoder == "lstm":
            cells, mlp = jax.random.split(encoding)
            sizes = (2 * config.hidden, 2 * config.hidden, width)
            params["encoder"] = {"lstm": _lstm_init(cells, width, config.hidden), "mlp": _mlp_init(mlp, sizes)}
        return params

    def ready(model, base, params):
        check_base(base)
        return activations(model, base, encoded(params)[None])

    return Adapter(init, ready, graft_prefix, shift=config.length)


def prefix(config: PrefixConfig) -> Adapter:
    """The adapter of a config: P keys and values before each layer's own, seen by every query; positions start at P.

    Parameters: k and v [L, P, K, Dh], the keys as attention uses them, after norm and rotation; with `hidden`
    embedding [P, D] and encoder/mlp, tanh between its two layers, which makes [P, L, 2, K, Dh] of it (k before v).
    """

    def init(key, model, base):
        layers, heads, size = _sizes(model)
        if config.start:
            return activations(model, base, jnp.asarray(config.start, jnp.int32)[None])
        if config.hidden:
            first, second = jax.random.split(key)
            width = base["embed"]["embedding"].shape[1]
            network = _mlp_init(second, (width, config.hidden, 2 * layers * heads * size))
            return {"embedding": jax.random.normal(first, (config.length, width)), "encoder": {"mlp": network}}
        draw = lambda key: 0.02 * jax.random.normal(key, (layers, config.length, heads, size))
        return dict(zip(("k", "v"), map(draw, jax.random.split(key)), strict=True))

    def ready(model, base, params):
        return without_network(model, params)

    return Adapter(init, ready, graft_prefix, shift=config.length)


def without_network(model: LanguageModel, params: Any) -> dict[str, jax.Array]:
    """A prefix's own keys and values, k and v [L, P, K, Dh]: parameters of the same prefix with `hidden` 0."""
    if "encoder" not in params:
        return params
    layers, heads, size = _sizes(model)
    made = _mlp(params["encoder"]["mlp"], params["embedding"], jnp.tanh)
    made = made.reshape(-1, layers, 2, heads, size)
    return {name: jnp.moveaxis(made[:, :, n], 1, 0) for n, name in enumerate(("k", "v"))}


def activations(model: LanguageModel, base: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """Keys and values that a network computes for tokens [1, P] or embeddings [1, P, D]: k, v [L, P, K, Dh]."""
    cache = model.apply(base, tokens, cache=model.init_cache(1, tokens.shape[1]))[1]
    held = {name: getattr(cache, name) for name in ("k", "v")}
    held = {name: unpack(x, "float32") if isinstance(x, Int8) else x for name, x in held.items()}
    return {name: jnp.swapaxes(x[:, 0], 1, 2) for name, x in held.items()}


def graft_prefix(base: Any, prefix: dict[str, jax.Array]) -> dict:
    """The base's tree with keys and values that every query sees.

    Raises:
      ValueError: a base that is not of the decoder of `nets.transformer`, which alone reads them.
    """
    check_base(base)
    return put(base, {PREFIX: prefix})


def check_base(base: Any) -> None:
    """Raise ValueError unless all layers are alike and attend with keys and values of their own."""
    stacks = sorted(name for name in base if name.endswith("layers") or name == "periods")
    if stacks != ["layers"] or "k" not in base["layers"].get("attention", {}):
        raise ValueError(
            f"no layers/attention alone in the base, which has {sorted(base)}; prefixes and prompts need layers that "
            "are all alike and attend with keys and values of their own: no latent, linear or first dense ones"
        )


def encoded(params: Any) -> jax.Array:
    """The prompt's embeddings [P, D]: the learnt ones themselves, or what the encoder makes of them."""
    x, encoder = params["embedding"], params.get("encoder", {})
    if "lstm" in encoder:
        x = _lstm(encoder["lstm"], x)
    return _mlp(encoder["mlp"], x, jax.nn.relu) if encoder else x


def _sizes(model: LanguageModel) -> tuple[int, int, int]:
    """L, K and Dh of a model."""
    layers, _, heads, _, size = jax.eval_shape(lambda: model.init_cache(1, 1)).k.shape
    return layers, heads, size


def _mlp_init(key, sizes) -> dict:
    """Layers as in torch: kernel and bias from U(-1/sqrt(in), 1/sqrt(in))."""
    layers = {}
    for n, of_layer in enumerate(jax.random.split(key, len(sizes) - 1)):
        (kernel, bias), (rows, columns) = jax.random.split(of_layer), sizes[n : n + 2]
        layers[str(n)] = {"kernel": _uniform(kernel, rows, rows, columns), "bias": _uniform(bias, rows, columns)}
    return layers


def _mlp(layers, x, activation):
    for n in range(len(layers)):
        x = (activation(x) if n else x) @ layers[str(n)]["kernel"] + layers[str(n)]["bias"][None]
    return x


def _lstm_init(key, width: int, hidden: int) -> dict:
    """Two bidirectional layers; a direction has input [in, 4 H], memory [H, 4 H], bias [4 H] (gates i, f, g, o)."""

    def direction(key, rows):
        into, memory, bias = jax.random.split(key, 3)
        return {
            "input": _uniform(into, hidden, rows, 4 * hidden),
            "memory": _uniform(memory, hidden, hidden, 4 * hidden),
            "bias": _uniform(bias, hidden, 4 * hidden),
        }

    keys = jax.random.split(key, (2, 2))
    names = ("forward", "backward")
    sides = lambda n, rows: {name: direction(keys[n, m], rows) for m, name in enumerate(names)}
    return {"0": sides(0, width), "1": sides(1, 2 * hidden)}


def _lstm(layers, x):
    """[P, D] -> [P, 2 H]. i, f, o = sigmoid, g = tanh of x W + h U + b; c' = f c + i g; h' = o tanh(c')."""

    def direction(cell, x, reverse):
        def step(carry, now):
            h, c = carry
            i, f, g, o = jnp.split(now + h @ cell["memory"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(cell["memory"].shape[0])
        return lax.scan(step, (zero, zero), x @ cell["input"] + cell["bias"][None], reverse=reverse)[1]

    for n in range(len(layers)):
        both = [direction(layers[str(n)][name], x, name == "backward") for name in ("forward", "backward")]
        x = jnp.concatenate(both, axis=-1)
    return x


def _uniform(key, fan: int, *shape: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)
