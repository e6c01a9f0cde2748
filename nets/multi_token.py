"""Multi-token prediction (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2): small modules that look further ahead.

The Transformer predicts the next token of every position. Module k = 1 .. depth predicts the one k further on, from
what module k - 1 made of the position (module 0 is the Transformer) and the token that has come in between:

    x_i = W [norm_e(E(t_{i+k})) ; norm_h(h^{k-1}_i)],   h^k = block(x),   p(t_{i+k+1}) = softmax(head(norm(h^k_i)))

with the Transformer's own embedding E and head. Its losses are `jaxrl.posttrain.sft.multi_token_loss`, and the first
module drafts tokens in `jaxrl.posttrain.speculative`.

h^0 is the Transformer's output after its final norm, as the released weights are served; h^k, for module k + 1, is
before the norm of module k. The order of the two halves is that of the released weights (the embedding first); the
paper's equation 21 has the other. A position whose next k tokens are not all of its own example has no meaning: the
loss leaves it out, and no other position of the example attends to it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, Mask, attention
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.nets.cache import Cache, init_cache
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.layers import Linear, make_norm
from jaxrl.nets.moe import experts
from jaxrl.nets.transformer import Block, rotations, windowed

NAME = "multi_token"
"""Of the modules' parameters, beside the Transformer's."""


class MultiTokenModule(nn.Module):
    """One module; `modules` stacks them.

    Parameters: enorm/scale, hnorm/scale and norm/scale [D], eh_proj/kernel [2 D, D], layers/... of
    `jaxrl.nets.transformer.Block`, with experts where the config has them.
    """

    config: TransformerConfig
    attend: Callable = attention
    experts: Callable = experts

    @nn.compact
    def __call__(self, carry, embeddings, cos, sin, mask, length):
        """((hidden [B, T, D], cache keys, cache values), embeddings [B, T, D], ...) -> (the same after it, norm of it).

        The other arguments are those of `Block`, which this wraps; a cache has one layer.
        """
        c = self.config
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        norm = lambda name: make_norm(c.norm, c.norm_eps, **types, name=name)
        hidden, keys, values = carry
        both = jnp.concatenate([norm("enorm")(embeddings), norm("hnorm")(hidden)], axis=-1)
        x = Linear(c.width, **types, name="eh_proj")(both)
        block = Block(c, self.attend, self.experts, name="layers")
        near = windowed(c)
        near = None if near is None else near[-1]
        carry, _ = block((x, keys, values), jnp.int32(0), near, cos, sin, mask, length)
        return carry, norm("norm")(carry[0])


def modules(config: TransformerConfig, depth: int, **options) -> Any:
    """`depth` modules, each after the other; parameters and embeddings have a leading axis [depth]."""
    same = nn.broadcast
    in_axes: Any = (0, same, same, same, same)
    return nn.scan(
        MultiTokenModule,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "router": True},
        in_axes=in_axes,
        length=depth,
    )(config, **options)


def over_rows(experts: Callable) -> Callable:
    """`moe.experts`, or one like it, that under `jax.vmap` takes the rows of all calls as rows of one.

    Products of groups have no batching of their own. Gradients do not pass.
    """

    def called(*args, **form):
        return rows_together(partial(experts, **form))(*args)

    return called


def rows_together(experts: Callable) -> Callable:
    """`over_rows` of a function of arrays alone."""

    @jax.custom_batching.custom_vmap
    def together(*args):
        return experts(*args)

    @together.def_vmap
    def _(size, batched, *args):
        if any(jax.tree.leaves(batched[3:])):
            raise NotImplementedError("over_rows: experts that differ from row to row")
        rows = [x if own else jnp.repeat(x[None], size, axis=0) for x, own in zip(args[:3], batched, strict=False)]
        y = together(*(x.reshape(-1, *x.shape[2:]) for x in rows), *args[3:])
        return y.reshape(size, -1, *y.shape[1:]), True

    return together


class MultiToken(NamedTuple):
    """A language model that can look further ahead, as pure functions.

    model: the `LanguageModel`, for every loss, loop and sampler. Its parameters are the Transformer's and, under
    `multi_token`, the modules', each with a leading axis [depth].

    ahead(params, hidden [B, T, D], tokens [B, T], *, positions, mask) -> [depth, B, T, D]: hidden as `model.apply`
    makes it of these tokens; the result is to be unembedded as it is. Entry k - 1 at column i predicts the token of
    column i + k + 1; the last k columns have no meaning.

    read(params, before [B, T, D], tokens [B, T], *, positions, mask, cache) -> (hidden, before, cache): the first
    module step by step. Column i takes token i and what the network had made of the token before it; `hidden` is for
    the head, the new `before` stands for the hidden state that the Transformer has not computed yet.
    init_cache(batch, length) -> its empty cache.
    """

    model: LanguageModel
    ahead: Callable
    read: Callable
    init_cache: Callable


def multi_token_model(
    config: TransformerConfig,
    depth: int = 1,
    *,
    attend: Callable = attention,
    log_probs: Callable = token_log_probs,
    experts: Callable = experts,
) -> MultiToken:
    """The decoder of a config with modules for multi-token prediction.

    Args:
      config: of the Transformer; the modules' blocks are like its last layer.
      depth: how many modules; DeepSeek-V3 has one.
      attend, log_probs, experts: as in `language_model`.

    Raises:
      ValueError: depth below 1; embeddings that are more than a table (learned positions, token types, a norm or
        another width), linear layers, a bias of the logits, or norms in another place than before each part.
    """
    plain = config.positions != "learned" and not (config.token_types or config.embed_norm or config.embed_width)
    plain = plain and config.linear is None and not config.unembed_bias
    if depth < 1 or not plain or config.norm_place != "pre" or not config.causal:
        raise ValueError(
            f"multi_token_model: depth {depth}, norm_place {config.norm_place!r}, causal {config.causal}, positions "
            f"{config.positions!r}: expected depth >= 1 and a causal decoder with norms before each part and no linear "
            "layers, whose embedding is one table (no learned positions, token types, embed_norm, embed_width or "
            "unembed_bias)"
        )
    main = language_model(config, attend=attend, log_probs=log_probs, experts=experts)
    stacked = modules(config, depth, attend=attend, experts=experts)
    # what has a cache is not differentiated, but may be called for rows one by one (`posttrain.speculative`)
    decoding = over_rows(experts)
    cached, single = language_model(config, attend=attend, experts=decoding), MultiTokenModule(config, attend, decoding)

    def init(key):
        first, second = jax.random.split(key)
        x = jnp.zeros((1, 1, config.width), config.dtype)
        cos, sin = rotations(config, jnp.zeros((1, 1), jnp.int32))
        own = stacked.init(second, (x, None, None), jnp.zeros((depth, *x.shape), x.dtype), cos, sin, Causal(), 0)
        return {**main.init(first), NAME: own["params"]}

    def apply(params, tokens, **options):
        return (main if options.get("cache") is None else cached).apply(params, tokens, **options)

    def embedded(params, tokens):
        return jnp.take(params["embed"]["embedding"], tokens, axis=0).astype(config.dtype)

    def ahead(params, hidden, tokens, *, positions=None, mask: Mask | None = None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        following = jnp.stack([jnp.roll(tokens, -k, axis=1) for k in range(1, depth + 1)])
        arrays = (embedded(params, following), *rotations(config, positions))
        mask = Causal() if mask is None else mask
        return stacked.apply({"params": params[NAME]}, (hidden, None, None), *arrays, mask, 0)[1]

    def read(params, before, tokens, *, positions, mask: Mask, cache: Cache):
        first = {"params": jax.tree.map(lambda x: x[0], params[NAME])}
        arrays = (embedded(params, tokens), *rotations(config, positions))
        (after, keys, values), hidden = single.apply(first, (before, cache.k, cache.v), *arrays, mask, cache.length)  # pyright: ignore
        return hidden, after, cache._replace(k=keys, v=values, length=cache.length + tokens.shape[1])

    one_layer = replace(config, layers=1, experts=None, window_layers=None)
    return MultiToken(main._replace(init=init, apply=apply), ahead, read, partial(init_cache, one_layer))
