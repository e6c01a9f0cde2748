"""One Transformer: Llama, Qwen, DeepSeek, BERT, LLaDA and others are this module under different configs."""

import math
from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxrl.kernels.attention import Causal, Full, Mask, attention
from jaxrl.nets.attention import Attention
from jaxrl.nets.cache import Cache as Cache
from jaxrl.nets.cache import Layered, Slot, empty_cache
from jaxrl.nets.config import Kind
from jaxrl.nets.config import TransformerConfig as TransformerConfig
from jaxrl.nets.documents import real
from jaxrl.nets.latent_attention import LatentAttention
from jaxrl.nets.layers import FeedForward, Kernel, Linear, make_norm, normal
from jaxrl.nets.linear_attention import LinearAttention
from jaxrl.nets.moe import PRODUCT, MoE, RouterStatistics, experts
from jaxrl.nets.rope import rotation, score_factor


class Block(nn.Module):
    """One layer: x += attention(norm(x)); x += ffn(norm(x)), or the experts of x; norms where the config has them.

    Written as the body of the layer loop: the carry is (x, cache keys, cache values); the whole cache
    travels through and is written in place. Parameters: attention_norm, attention, ffn_norm, and ffn or moe.
    """

    config: TransformerConfig
    attend: Callable = attention
    experts: Callable = experts
    kind: Kind = Kind()

    @nn.compact
    def __call__(self, carry, layer, windowed, cos, sin, mask, length):
        """(carry, index of this layer, does it use the window (None: all do), ...) -> (carry, None)."""
        linear = self.kind.linear
        c = self.config
        x, keys, values = carry
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        out_init = normal(0.02 / math.sqrt(2 * c.layers))
        options: dict[str, Any] = {"implementation": c.attention, "attend": self.attend, **types, "name": "attention"}
        biases = (c.qkv_bias, c.bias is True)
        shared = {"qk_norm": c.qk_norm, "norm_eps": c.norm_eps, "out_init": out_init, **options}
        if linear:
            assert c.linear is not None
            sizes = (c.heads, c.linear.kv_heads or c.kv_heads, c.head_size)
            mixer = LinearAttention(*sizes, *biases, **shared, linear=c.linear, layers=c.layers)
        elif c.latent is None:
            sizes, masked = (c.heads, c.kv_heads, c.head_size), {"window": c.window, "pattern": c.pattern}
            mixer = Attention(*sizes, *biases, **shared, **masked, rectified=c.rectified)
        else:
            mixer = LatentAttention(c.heads, c.latent, score_factor(c.rope_scaling), out_init, **options)
        if c.experts is None or self.kind.dense:
            feed = FeedForward(c.ffn, out_init, c.gated, c.activation, bool(c.bias), **types, name="ffn")
        else:
            mixture = MoE(c.experts, out_init, self.experts, **types, name="moe")
            tokens = real(mask, x.shape[1], length) if c.experts.drops else None
            feed = partial(mixture, real=tokens)

        def before(norm, x):
            return norm(x) if c.norm_place == "pre" else x

        def after(norm, x, y):
            x = x if c.residual == 1.0 else c.residual * x
            return norm(x + y) if c.norm_place == "post" else x + (norm(y) if c.norm_place == "branch" else y)

        norm = make_norm(c.norm, c.norm_eps, **types, name="attention_norm")
        slot = None if keys is None else _own(c, linear, keys, values, layer, length)
        y, slot = mixer(before(norm, x), cos, sin, mask, slot, layer if linear else windowed)
        x = after(norm, x, y)
        norm = make_norm(c.norm, c.norm_eps, **types, name="ffn_norm")
        x = after(norm, x, feed(before(norm, x)))
        return (x, None, None) if slot is None else (x, *_put_back(linear, keys, values, slot)), None


def _own(config: TransformerConfig, linear: bool, keys: Any, values, layer, length) -> Slot:
    """A layer's place in the cache: in the arrays of its kind, whose rows are the layers of that kind alone."""
    alike = [kind.linear == linear for kind in config.kinds]
    row = layer if all(alike) else jnp.asarray([sum(alike[:i]) for i in range(config.layers)])[layer]
    if not isinstance(keys, Layered):
        return Slot(keys, values, row, length)
    own: Any = keys.states if linear else keys.keys
    return Slot(own, None if linear else values, row, length)


def _put_back(linear: bool, keys, values, slot: Slot):
    """Keys and values of the whole cache once the slot has been written."""
    if not isinstance(keys, Layered):
        return slot.k, slot.v
    return (keys._replace(states=slot.k), values) if linear else (keys._replace(keys=slot.k), slot.v)


class Group(NamedTuple):
    """Layers from `start` on that are one scan: `repeats` times a period of layers of these kinds."""

    start: int
    kinds: tuple[Kind, ...]
    repeats: int

    @property
    def layers(self) -> int:
        """In all."""
        return len(self.kinds) * self.repeats


def runs(kinds: tuple[Kind, ...], start: int = 0) -> tuple[Group, ...]:
    """Neighbours of one kind, as groups whose period is one layer."""
    found = []
    for kind, same in groupby(kinds):
        found.append(Group(start, (kind,), len(list(same))))
        start += found[-1].repeats
    return tuple(found)


def groups(config: TransformerConfig) -> tuple[Group, ...]:
    """The scans that a network is: its runs, or, of kinds that come round again and again, one over the period."""
    first, kinds = config.dense_layers, config.kinds
    rest = kinds[first:]
    period = next((n for n in range(1, len(rest)) if rest[:n] * (len(rest) // n) == rest), len(rest))
    if 1 < period < len(rest):
        return (*runs(kinds[:first]), Group(first, rest[:period], len(rest) // period))
    return runs(kinds)


def through(config, attend, experts, parts: tuple[Group, ...], carry, own, *rest, unroll: int = 1):
    """The carry after these groups of layers; own: (index, windowed) of every layer from the first group's on."""
    for number, group in enumerate(parts):
        name = group.kinds[0].name if len(group.kinds) == 1 else "periods"
        if any(group.kinds == other.kinds for other in parts[:number]):
            name = f"run_{number}_{name}"
        begin = group.start - parts[0].start
        mine = jax.tree.map(itemgetter(slice(begin, begin + group.layers)), own)
        if len(group.kinds) == 1:
            layers = stack(config, attend, experts, layers=group.repeats, unroll=unroll, kind=group.kinds[0], name=name)
        else:
            mine = jax.tree.map(lambda a, n=group.repeats: a.reshape(n, -1), mine)
            layers = _scanned(Period, config, group.repeats, 1)(config, attend, experts, group.kinds, unroll, name=name)
        carry, _ = layers(carry, *mine, *rest)
    return carry


class Period(nn.Module):
    """Layers of several kinds, one after another, called as a block is. Parameters: those of its runs, by kind."""

    config: TransformerConfig
    attend: Callable
    experts: Callable
    kinds: tuple[Kind, ...]
    unroll: int = 1

    @nn.compact
    def __call__(self, carry, layer, windowed, *rest):
        """As `Block`, layer and windowed [layers of the period]."""
        own = (layer, windowed)
        parts = runs(self.kinds)
        return through(self.config, self.attend, self.experts, parts, carry, own, *rest, unroll=self.unroll), None


class Transformer(nn.Module):
    """tokens [B, T], or embeddings [B, T, D] in their place, -> hidden [B, T, D]: L scanned layers, final norm.

    Parameters (a plain nested dict; the layers' carry a leading axis L, but with share_layers):
      embed/embedding [V, D]; with their settings also position_embed/embedding [max_length, D], type_embed/embedding,
      embed_norm/scale, embed_up/{kernel, bias} [E, D] behind embed/embedding [V, E]
      layers/attention_norm/scale [L, D] and layers/ffn_norm/scale; with norm "layer" a bias beside every scale
      layers/attention/{q,k,v,o}/kernel [L, in, out], biases and norms of `jaxrl.nets.attention.Attention`, or those of
      `jaxrl.nets.latent_attention.LatentAttention`
      linear_layers/... in the place of layers/... for those with `jaxrl.nets.linear_attention.LinearAttention`; where
      kinds of layers alternate, periods/{layers, linear_layers}/... [periods, layers of a run, ...]
      layers/ffn/{gate,up,down}/kernel [L, in, out], or layers/moe (`jaxrl.nets.moe.MoE`), with dense_layers/... for
      the first_dense layers, which are not in layers/...
      norm/scale [D], but with norm_place "post"
      unembed/kernel [D, V], unless the embeddings are tied; with its setting unembed_bias [V]
    Initialisation: normal(0.02); o and down normal(0.02 / sqrt(2 L)), as GPT-2; norms 1, biases 0.
    """

    config: TransformerConfig
    attend: Callable = attention
    experts: Callable = experts

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        token_types: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """See `apply` of `jaxrl.nets.language_model.LanguageModel`. token_types: [B, T], default 0."""
        c = self.config
        written = check(c, tokens, positions, cache)
        if positions is None:
            positions = jnp.broadcast_to((written + jnp.arange(tokens.shape[1]))[None], tokens.shape[:2])
        if mask is None:
            mask = Causal() if c.causal else Full()
        cos, sin = rotations(c, positions)
        x = self._embedded(tokens, positions, token_types)
        unroll = c.unroll if cache is None else c.decode_unroll
        carry = (x, None, None) if cache is None else (x, cache.k, cache.v)
        own = (jnp.arange(c.layers), windowed(c))
        rest = (cos, sin, mask, written)
        carry = through(c, self.attend, self.experts, groups(c), carry, own, *rest, unroll=unroll)
        x, keys, values = carry
        if not c.tie_embeddings:
            Kernel((c.width, c.vocab_size), c.param_dtype, name="unembed")()
        if c.unembed_bias:
            self.param("unembed_bias", nn.initializers.zeros, (c.vocab_size,), jnp.dtype(c.param_dtype))
        if c.norm_place != "post":
            x = make_norm(c.norm, c.norm_eps, c.dtype, c.param_dtype, name="norm")(x)
        if cache is not None:
            cache = cache._replace(k=keys, v=values, length=cache.length + tokens.shape[1])
        return x, cache

    def _embedded(self, tokens, positions, token_types):
        """What the first layer sees, [B, T, D]."""
        c = self.config
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        table = lambda rows, name, width=c.width: nn.Embed(
            rows, width, embedding_init=normal(0.02), **dtypes, name=name
        )
        if tokens.ndim == 3:
            x = tokens.astype(c.dtype)
        else:
            x = table(c.vocab_size, "embed", c.embed_width or c.width)(tokens)
        if c.positions == "learned":
            x = x + table(c.max_length, "position_embed", x.shape[-1])(positions)
        if c.token_types:
            kinds = jnp.zeros(x.shape[:2], jnp.int32) if token_types is None else token_types
            x = x + table(c.token_types, "type_embed", x.shape[-1])(kinds)
        if c.embed_norm:
            x = make_norm(c.norm, c.norm_eps, c.dtype, c.param_dtype, name="embed_norm")(x)
        if c.embed_width:
            x = Linear(c.width, use_bias=True, dtype=c.dtype, param_dtype=c.param_dtype, name="embed_up")(x)
        return x


def rotations(config: TransformerConfig, positions: jax.Array) -> tuple[Any, Any]:
    """cos and sin of `rope.rotation` for the config's heads; (None, None) where positions turn nothing."""
    c = config
    if c.positions != "rotary":
        return None, None
    return rotation(positions, c.rotated, base=c.rope_base, scaling=c.rope_scaling, sections=c.rope_sections)


def stack(
    config: TransformerConfig, attend: Callable, experts: Callable = experts, *, layers: int, unroll: int = 1, **options
) -> Any:
    """`Block` scanned over so many layers, as a module that is called as the block is; options are fields of either."""
    return _scanned(_remat(Block, config.remat), config, layers, unroll)(config, attend, experts, **options)


def _scanned(block, config: TransformerConfig, length: int, unroll: int) -> Any:
    """A module that is called as a block is, scanned over layers or periods."""
    each, same = 0, nn.broadcast
    own = not config.share_layers
    stacked: dict[Any, Any] = {"intermediates": 0, "tally": 0, **({"params": 0} if own else {})}
    return nn.scan(
        block,
        variable_axes=stacked,
        variable_broadcast=False if own else "params",
        split_rngs={"params": own, "router": True},
        in_axes=(each, each, same, same, same, same),  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=unroll,
    )


def tallies(params: Any, tally: jax.Array) -> dict:
    """The rows of a tally [layers with experts, E + 2], laid to these layers as their parameters lie in the tree."""
    rows = iter(range(len(tally)))

    def laid(tree):
        found = {}
        for name, node in tree.items():
            if name == "moe":
                lead = node["down"].shape[:-3]
                own = tally[jnp.asarray([next(rows) for _ in range(math.prod(lead))])]
                found[name] = {"tally": own.reshape(*lead, tally.shape[-1])}
            elif name.endswith(("layers", "periods")):
                found[name] = laid(node)
        return found

    return laid(params)


def router_statistics(
    config: TransformerConfig, params: Any, tokens: jax.Array, *, positions=None, mask: Mask | None = None
) -> RouterStatistics:
    """How the routers of one pass over `tokens` spread them: each field [layers with experts, ...].

    The layers come as their stacks do in the tree of parameters: where kinds of layers alternate, by kind.
    """
    apply, variables = Transformer(config).apply, {"params": params}
    found: Any = apply(variables, tokens, positions=positions, mask=mask, mutable=["intermediates"])[1]

    def of(tree) -> list[RouterStatistics]:
        return [tree["moe"]["statistics"][0]] if "moe" in tree else [x for name in tree for x in of(tree[name])]

    # a layer's own: load [E], which periods stack twice
    flat = lambda x, own: x.reshape(-1, *x.shape[x.ndim - own :])
    stacks = [jax.tree.map(lambda x, n=s.load.ndim: flat(x, x.ndim - n + 1), s) for s in of(found["intermediates"])]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)


def windowed(config: TransformerConfig) -> jax.Array | None:
    """Which layers use window and pattern, [L] booleans; None where all do, or there is none."""
    if config.window_layers is None:
        return None
    return jnp.array([i in config.window_layers for i in range(config.layers)])


def _remat(block, name: str):
    if name == "none":
        return block
    of = jax.checkpoint_policies
    products = of.save_from_both_policies(of.dots_with_no_batch_dims_saveable, of.save_only_these_names(PRODUCT))
    return nn.remat(block, policy=products if name == "dots" else None, prevent_cse=False)


def check(
    config: TransformerConfig, tokens: jax.Array, positions: jax.Array | None, cache: Cache | None
) -> int | jax.Array:
    """Check shapes and lengths at trace time; return the columns written so far (0 without a cache)."""
    embedded = tokens.ndim == 3 and jnp.issubdtype(tokens.dtype, jnp.floating)
    if embedded and tokens.shape[2] != config.width:
        raise ValueError(f"embeddings have shape {tokens.shape}, expected [B, T, D = {config.width}]")
    if tokens.ndim != 2 and not embedded:
        raise ValueError(f"tokens have shape {tokens.shape}, expected [B, T]: one sequence is tokens[None]")
    if not embedded and not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens have dtype {tokens.dtype}, expected integers: token ids")
    sections = config.rope_sections or ()
    allowed = (tokens.shape[:2], (len(sections), *tokens.shape[:2])) if sections else (tokens.shape[:2],)
    if positions is not None and positions.shape not in allowed:
        raise ValueError(f"positions have shape {positions.shape}, expected tokens' [B, T] = {tokens.shape[:2]}")
    b, t = tokens.shape[:2]
    if t > config.max_length:
        raise ValueError(f"{t} tokens exceed the config's max_length {config.max_length}: shorten them or raise it")
    if cache is None:
        return 0
    columns = cache.columns
    want = jax.eval_shape(lambda: empty_cache(config, b, columns or 0))
    got, expected = (jax.tree.map(jnp.shape, (x.k, x.v)) for x in (cache, want))
    if got != expected:
        raise ValueError(
            f"the cache has keys and values {got}, expected [L, B, K, S, Dh] = {expected} for these tokens and this "
            "config: make it with the same model's init_cache(batch, length)"
        )
    # under jit the cursor is unknown: only the new columns can be checked
    written = 0 if isinstance(cache.length, Tracer) else int(cache.length)
    if columns is not None and written + t > columns:
        raise ValueError(
            f"{t} new tokens after {written} do not fit into a cache of {columns} columns: shorten the "
            f"prompts, or make the cache at least {written + t} columns long"
        )
    return cache.length
