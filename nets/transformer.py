"""Decoder-only Transformer: Llama, Mistral, Qwen2 and Qwen3 are one module under different configs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxrl.kernels.attention import Causal, Mask, attention
from jaxrl.nets.attention import Attention, Int8, Slot
from jaxrl.nets.layers import Kernel, RMSNorm, SwiGLU, normal
from jaxrl.nets.moe import PRODUCT, MoE, MoEConfig, RouterStatistics, experts
from jaxrl.nets.rope import RopeScaling, rotation

CACHE_DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of one decoder. Frozen and hashable; `jaxrl.nets.presets` names published ones.

    `unroll` and `decode_unroll` are layers per step of the layer loop, without and with a cache: more
    compiles slower and may run faster. `remat` says what the backward pass recomputes: nothing ("none"),
    everything ("full"), or everything but products with weights ("dots"), which on CPU takes a third of the
    memory of "none" and less time.
    """

    vocab_size: int
    width: int  # D, the residual stream
    layers: int  # L
    heads: int  # H query heads
    kv_heads: int  # K, divides H
    ffn: int  # inner width of SwiGLU
    experts: MoEConfig | None = None  # in its place, but for `first_dense` layers
    head_dim: int | None = None  # Dh; None: width / heads
    max_length: int = 2048  # the longest sequence or cache accepted
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_embeddings: bool = False
    window: int | None = None  # a query sees the last `window` columns, itself included
    window_layers: tuple[int, ...] | None = None  # which layers use the window; None: all
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"  # storage
    cache_dtype: str | None = None  # keys and values of a cache: "float32", "bfloat16", "int8"; None: dtype
    remat: Literal["none", "full", "dots"] = "dots"
    attention: str | None = None  # implementation of the attention door; None: its choice
    unroll: int = 1
    decode_unroll: int = 1

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads: give a divisor of heads")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: give head_dim")
        if self.head_size % 2:
            raise ValueError(f"head_dim is {self.head_size}, but rotary embedding turns pairs: give an even one")
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(f"remat is {self.remat!r}, expected 'none', 'full' or 'dots'")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache_dtype is {self.cache_dtype!r}, expected None (that of compute) or {CACHE_DTYPES}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, expected None or at least 1: a token sees itself")
        if self.window_layers is not None and (self.window is None or not self.window_layers):
            raise ValueError(
                f"window is {self.window} and window_layers {self.window_layers}: name at least one layer "
                "(None: all), together with a window"
            )
        if not all(0 <= i < self.layers for i in self.window_layers or ()):
            raise ValueError(f"window_layers {self.window_layers} names layers outside 0..{self.layers - 1}")
        if self.dense_layers > self.layers:
            raise ValueError(f"experts.first_dense is {self.dense_layers}, but there are {self.layers} layers")

    @property
    def head_size(self) -> int:
        """Dh as a number."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def dense_layers(self) -> int:
        """Layers before the first one with experts; 0 where there are none at all."""
        return 0 if self.experts is None else self.experts.first_dense


class Cache(NamedTuple):
    """Keys and values of the columns written so far; all rows share the column cursor.

    k, v: [L, B, K, S, Dh]: heads before columns, the order in which attention reads them, so that a decode
    step copies nothing. Each is an array or, with cache_dtype "int8", an `Int8`: code that moves rows or
    columns goes through `jax.tree.map`. length: int32 scalar, columns written. Batches of unequal prompts are
    padded on the left, and the caller's mask hides the padding (`Segments`).
    """

    k: jax.Array | Int8
    v: jax.Array | Int8
    length: jax.Array


def init_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` columns for `batch` rows, in the config's cache_dtype.

    In 8 bits a token and kv head take Dh + 4 bytes, for keys and values each. Attention sees the rounded keys and
    values from the first call on, a prompt's own included; they are turned into the compute dtype layer by layer.

    Raises:
      ValueError: if `length` exceeds `config.max_length`.
    """
    if length > config.max_length:
        raise ValueError(
            f"a cache of {length} columns was asked for, but the config's max_length is {config.max_length}: "
            "shorten the prompts, generate fewer tokens, or raise max_length"
        )
    shape = (config.layers, batch, config.kv_heads, length, config.head_size)

    def empty():
        if config.cache_dtype == "int8":
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, config.cache_dtype or config.dtype)

    return Cache(empty(), empty(), jnp.int32(0))


class Block(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += SwiGLU(norm(x)), or the experts of x.

    Written as the body of the layer loop: the carry is (x, cache keys, cache values); the whole cache
    travels through and is written in place. Parameters: attention_norm, attention, ffn_norm, and ffn or moe.
    """

    config: TransformerConfig
    attend: Callable = attention
    experts: Callable = experts
    dense: bool = False  # SwiGLU though the config has experts

    @nn.compact
    def __call__(self, carry, layer, windowed, cos, sin, mask, length):
        """(carry, index of this layer, does it use the window (None: all do), ...) -> (carry, None)."""
        c = self.config
        x, keys, values = carry
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        out_init = normal(0.02 / math.sqrt(2 * c.layers))
        slot = None if keys is None else Slot(keys, values, layer, length)
        normed = RMSNorm(c.norm_eps, **types, name="attention_norm")(x)
        y, slot = Attention(
            c.heads,
            c.kv_heads,
            c.head_size,
            qkv_bias=c.qkv_bias,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            window=c.window,
            out_init=out_init,
            implementation=c.attention,
            attend=self.attend,
            **types,
            name="attention",
        )(normed, cos, sin, mask, slot, windowed)
        x = x + y
        normed = RMSNorm(c.norm_eps, **types, name="ffn_norm")(x)
        if c.experts is None or self.dense:
            x = x + SwiGLU(c.ffn, out_init, **types, name="ffn")(normed)
        else:
            x = x + MoE(c.experts, out_init, self.experts, **types, name="moe")(normed)
        return (x, None, None) if slot is None else (x, slot.k, slot.v), None


class Transformer(nn.Module):
    """tokens [B, T], or embeddings [B, T, D] in their place, -> hidden [B, T, D]: L scanned layers, final norm.

    Parameters (a plain nested dict; the layers' carry a leading axis L):
      embed/embedding [V, D]
      layers/attention_norm/scale [L, D]
      layers/attention/{q,k,v,o}/kernel [L, in, out], with qkv_bias {q,k,v}/bias, with qk_norm
      {q,k}_norm/scale layers/ffn_norm/scale [L, D] layers/ffn/{gate,up,down}/kernel [L, in, out] norm/scale
      [D] unembed/kernel [D, V], unless the embeddings are tied
      with experts layers/moe (`jaxrl.nets.moe.MoE`) in the place of layers/ffn, and dense_layers/... for
      the first_dense layers, which are not in layers/...
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
    ) -> tuple[jax.Array, Cache | None]:
        """See `apply` of `jaxrl.nets.language_model.LanguageModel`."""
        c = self.config
        written = check(c, tokens, positions, cache)
        if positions is None:
            positions = jnp.broadcast_to((written + jnp.arange(tokens.shape[1]))[None], tokens.shape[:2])
        mask = Causal() if mask is None else mask
        cos, sin = rotation(positions, c.head_size, base=c.rope_base, scaling=c.rope_scaling)
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        if tokens.ndim == 3:
            x = tokens.astype(c.dtype)
        else:
            x = nn.Embed(c.vocab_size, c.width, embedding_init=normal(0.02), **dtypes, name="embed")(tokens)

        unroll, first = c.unroll if cache is None else c.decode_unroll, c.dense_layers
        carry = (x, None, None) if cache is None else (x, cache.k, cache.v)
        for start, end, name in ((0, first, "dense_layers"), (first, c.layers, "layers")):
            if start < end:
                options: dict[str, Any] = {"dense": start < first, "unroll": unroll, "name": name}
                layers = stack(c, self.attend, self.experts, layers=end - start, **options)
                own = jax.tree.map(itemgetter(slice(start, end)), (jnp.arange(c.layers), windowed(c)))
                carry, _ = layers(carry, *own, cos, sin, mask, written)
        x, keys, values = carry
        if not c.tie_embeddings:
            Kernel((c.width, c.vocab_size), c.param_dtype, name="unembed")()
        x = RMSNorm(c.norm_eps, c.dtype, c.param_dtype, name="norm")(x)
        if cache is not None:
            cache = cache._replace(k=keys, v=values, length=cache.length + tokens.shape[1])
        return x, cache


def stack(
    config: TransformerConfig, attend: Callable, experts: Callable = experts, *, layers: int, unroll: int = 1, **options
) -> Any:
    """`Block` scanned over so many layers, as a module that is called as the block is; options are fields of either."""
    each, same = 0, nn.broadcast
    in_axes: Any = (each, each, same, same, same, same)
    scanned = nn.scan(
        _remat(Block, config.remat),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "router": True},
        in_axes=in_axes,
        length=layers,
        unroll=unroll,
    )
    return scanned(config, attend, experts, **options)


def router_statistics(
    config: TransformerConfig, params: Any, tokens: jax.Array, *, positions=None, mask: Mask | None = None
) -> RouterStatistics:
    """How the routers of one pass over `tokens` spread them: each field [layers with experts, ...]."""
    apply, variables = Transformer(config).apply, {"params": params}
    found: Any = apply(variables, tokens, positions=positions, mask=mask, mutable=["intermediates"])[1]
    return found["intermediates"]["layers"]["moe"]["statistics"][0]


def windowed(config: TransformerConfig) -> jax.Array | None:
    """Which layers use the window, [L] booleans; None where all do, or there is none."""
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
    if positions is not None and positions.shape != tokens.shape[:2]:
        raise ValueError(f"positions have shape {positions.shape}, expected tokens' [B, T] = {tokens.shape[:2]}")
    b, t = tokens.shape[:2]
    if t > config.max_length:
        raise ValueError(f"{t} tokens exceed the config's max_length {config.max_length}: shorten them or raise it")
    if cache is None:
        return 0
    want = (config.layers, b, config.kv_heads, cache.k.shape[3], config.head_size)
    if cache.k.shape != want or cache.v.shape != want:
        raise ValueError(
            f"the cache has keys {cache.k.shape} and values {cache.v.shape}, expected "
            f"[L, B, K, S, Dh] = {want} for these tokens and this config: "
            "make it with the same model's init_cache(batch, length)"
        )
    # under jit the cursor is unknown: only the new columns can be checked
    written = 0 if isinstance(cache.length, Tracer) else int(cache.length)
    if written + t > want[3]:
        raise ValueError(
            f"{t} new tokens after {written} do not fit into a cache of {want[3]} columns: shorten the "
            f"prompts, or make the cache at least {written + t} columns long"
        )
    return cache.length
