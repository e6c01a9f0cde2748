"""The contract between language models and everything that uses them: a few pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl.kernels.attention import Causal, attention
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.nets.cache import init_cache
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.moe import Routers, experts
from jaxrl.nets.transformer import Transformer, tallies


class LanguageModel(NamedTuple):
    """Pure functions; whatever offers them plugs into every loss and loop.

    init(key) -> params: a plain nested dict of arrays; consumes the key. One program under `jax.jit`.

    apply(params, tokens [B, T], *, positions [B, T] = None, mask = None, cache = None, key = None, tally = None)
    -> (hidden [B, T, D], cache): without a cache, one pass over whole sequences. With one, the T columns are
    written at [cache.length, cache.length + T), attention is over all S columns with q_offset = cache.length,
    and the advanced cache is returned. Positions default to arange(T) + cache.length. Without a mask a decoder sees
    what came before (`Causal`), a network with causal=False all (`Full`). The mask is given over cache columns: batches
    of unequal prompts are padded on the left; the caller hides the padding with `Segments` and gives positions that
    start at 0 at the first real token. The cursor is unknown under jit: a write past the last column is not refused but
    overwrites it, so make the cache long enough. A key, consumed, is for what routers draw in training; without one, as
    in scoring and sampling, they draw nothing. A tally is zeros whose gradient says how the routers spread tokens
    (`moe.tally`). Only a model with `routers` is given either.

    unembedding(params) -> [D, V]: logits are `logits(hidden, unembedding(params))`.

    init_cache(batch, length) -> an empty Cache: a NamedTuple with length, and k and v, arrays or trees of arrays. The
    samplers repeat k and v along axis 1, the rows; `posttrain.slots` moves columns too, on axis 3.

    log_probs(hidden, unembedding, targets, *, temperature, chunk, return_lse) -> (log_probs, entropy), with return_lse
    and the log-sum-exp behind them: `token_log_probs`, or one that knows where the arrays lie.

    routers: what loops know of a mixture of experts; None: there is none.
    """

    init: Callable
    apply: Callable
    unembedding: Callable
    init_cache: Callable
    log_probs: Callable = token_log_probs
    routers: Routers | None = None


def language_model(
    config: TransformerConfig,
    *,
    attend: Callable = attention,
    log_probs: Callable = token_log_probs,
    experts: Callable = experts,
) -> LanguageModel:
    """The decoder of `jaxrl.nets.transformer` as a LanguageModel.

    Args:
      config: of the network.
      attend, experts, log_probs: what it calls as `attention` and `moe.experts` and offers as `token_log_probs`; those
        of `jaxrl.parallel.model_on` know a mesh.
    """
    model = Transformer(config, attend, experts)
    routers = None
    if config.experts is not None:
        spread = config.layers - config.dense_layers, config.experts.experts
        routers = Routers(config.experts.draws, config.experts.drops, *spread)

    def init(key):
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(params, tokens, *, positions=None, mask=None, cache=None, key=None, tally=None):
        rngs = {"router": key} if key is not None and routers is not None and routers.draws else {}
        variables = {"params": params} | ({} if tally is None else {"tally": tallies(params, tally)})
        out: Any = model.apply(variables, tokens, positions=positions, mask=mask, cache=cache, rngs=rngs)
        return with_one(config, out[0]), out[1]

    def unembedding(params):
        kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["unembed"]["kernel"]
        if config.unembed_bias:
            kernel = jnp.concatenate([kernel, params["unembed_bias"][None].astype(kernel.dtype)])
        return kernel.astype(config.dtype)

    def empty(batch, length):
        return init_cache(config, batch, length)

    return LanguageModel(init, apply, unembedding, empty, log_probs, routers)


def with_one(config: TransformerConfig, hidden: jax.Array) -> jax.Array:
    """Hidden states as they meet the unembedding: with `unembed_bias` [..., D + 1], the last number always 1.

    Against it stands the bias of the logits, the last row of the unembedding [D + 1, V], so whatever works with the
    two, such as `token_log_probs`, needs to know nothing of a bias.
    """
    return jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1) if config.unembed_bias else hidden


def from_nnx(make: Callable, unembedding: Callable, init_cache: Callable) -> LanguageModel:
    """An NNX module as a LanguageModel: split once, merge inside the compiled function.

    The same three lines adapt any NNX module to a function of a plain dict of parameters (measured as quick
    to call as Linen, where `nnx.jit` on the module costs 25-45 times more per call):

        graph, state = nnx.split(module, nnx.Param)
        params = nnx.to_pure_dict(state)
        apply = lambda params, *args: nnx.merge(graph, params)(*args)

    Args:
      make: (nnx.Rngs) -> module, whose call is the contract's `apply` without params. All its variables
      must be
        nnx.Param: what else it holds (dropout keys, running statistics) has no place in a pure function.
      unembedding: (params) -> [D, V].
      init_cache: (batch, length) -> Cache, in the form that the module takes.

    Raises:
      ValueError: if the module holds variables that are not parameters.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(key):
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params, tokens, *, positions=None, mask=None, cache=None):
        mask = Causal() if mask is None else mask
        return nnx.merge(graph, params)(tokens, positions=positions, mask=mask, cache=cache)

    return LanguageModel(init, apply, unembedding, init_cache)


def logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden [..., D] under unembedding [D, V], accumulated in float32."""
    return jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
