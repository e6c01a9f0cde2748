"""Decoder-only Transformer: Llama, Qwen2, Qwen3 and Mistral are one module under different configs."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal
from jaxrl.nets.attention import Attention, Slot
from jaxrl.nets.layers import STD, Kernel, RMSNorm, SwiGLU
from jaxrl.nets.rope import RopeScaling, rotation


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of one decoder. Frozen and hashable; `jaxrl.nets.presets` names published ones."""

    vocab_size: int
    width: int  # D, the residual stream
    layers: int  # L
    heads: int  # H query heads
    kv_heads: int  # K, divides H
    ffn: int  # inner width of SwiGLU
    head_dim: int | None = None  # Dh; None: width // heads
    max_length: int = 2048  # the longest sequence or cache accepted
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_embeddings: bool = False
    window: int | None = None  # sliding window: a query sees the last `window` columns, itself included
    window_layers: tuple[int, ...] | None = None  # which layers use it; None: all
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"  # storage
    remat: Literal["none", "full", "dots"] = "none"  # recompute in the backward pass: nothing, all, all but matmuls
    attention: str | None = None  # implementation of the attention door; None: its choice
    unroll: int = 1  # layers per step of the layer loop: more is slower to compile, sometimes quicker to run
    decode_unroll: int = 1  # the same with a cache

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly: give a kv_heads that divides heads"
            )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: give head_dim explicitly")
        if self.head_size % 2:
            raise ValueError(f"head_dim is {self.head_size}, but rotary embedding turns pairs: give an even head_dim")
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(f"remat is {self.remat!r}, expected 'none', 'full' or 'dots'")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, expected at least 1 (a token sees itself), or None")
        if not all(0 <= i < self.layers for i in self.window_layers or ()):
            raise ValueError(f"window_layers {self.window_layers} names layers outside 0..{self.layers - 1}")
        if self.window_layers is not None and (self.window is None or not self.window_layers):
            raise ValueError(
                "window_layers and window come together: give both (the layers, and the number of columns seen) or neither"
            )

    @property
    def head_size(self) -> int:
        """Dh as a number."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Per layer: does it use the sliding window, if there is one?"""
        return tuple(self.window_layers is None or i in self.window_layers for i in range(self.layers))


class Cache(NamedTuple):
    """Keys and values of the columns written so far; all rows share the column cursor.

    k, v: [L, B, K, S, Dh]; length: int32 scalar, columns written. Batches of unequal prompts are padded on the left,
    and the caller's mask hides the padding (`Segments`).
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


def init_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` columns for `batch` rows, in the compute dtype.

    Raises:
      ValueError: if `length` exceeds `config.max_length`.
    """
    if length > config.max_length:
        raise ValueError(
            f"a cache of {length} columns was asked for, but the config's max_length is {config.max_length}: "
            "generate fewer tokens, or raise max_length"
        )
    shape = (config.layers, batch, config.kv_heads, length, config.head_size)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.int32(0))


class Block(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += SwiGLU(norm(x)).

    Written as the body of the layer loop: the carry is (x, cache keys, cache values), the whole cache travelling
    through and being written in place. Parameters: attention_norm, attention, ffn_norm, ffn.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, carry, layer, windowed, cos, sin, mask, length):
        """(carry, index of this layer, does it use the window, None if all do) -> (carry, None)."""
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        out_std = STD / math.sqrt(2 * c.layers)
        x, keys, values = carry
        slot = None if keys is None else Slot(keys, values, layer, length)
        attend = Attention(
            c.heads, c.kv_heads, c.head_size, qkv_bias=c.qkv_bias, qk_norm=c.qk_norm, norm_eps=c.norm_eps,
            window=c.window, out_std=out_std, implementation=c.attention, **types, name="attention",
        )  # fmt: skip
        y, slot = attend(RMSNorm(c.norm_eps, **types, name="attention_norm")(x), cos, sin, mask, slot, windowed)
        x = x + y
        x = x + SwiGLU(c.ffn, out_std, **types, name="ffn")(RMSNorm(c.norm_eps, **types, name="ffn_norm")(x))
        return (x, None, None) if slot is None else (x, slot.k, slot.v), None


_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Transformer(nn.Module):
    """tokens [B, T] -> hidden [B, T, D]: embedding, L scanned layers, final norm.

    Parameters (a plain nested dict; the layers' carry a leading axis L):
      embed/embedding [V, D]
      layers/attention_norm/scale [L, D], layers/attention/{q,k,v,o}/kernel [L, in, out] (+ {q,k,v}/bias,
      {q,k}_norm/scale), layers/ffn_norm/scale [L, D], layers/ffn/{gate,up,down}/kernel
      norm/scale [D]
      unembed/kernel [D, V], unless the embeddings are tied
    Initialisation: normal(0.02); o and down normal(0.02 / sqrt(2 L)) (Radford et al. 2019); norms 1, biases 0.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, mask: Any = None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """See `jaxrl.nets.language_model.LanguageModel.apply`."""
        c = self.config
        length = check(c, tokens, positions, cache)
        if positions is None:
            positions = jnp.broadcast_to((length + jnp.arange(tokens.shape[1]))[None], tokens.shape)
        mask = Causal() if mask is None else mask
        cos, sin = rotation(positions, c.head_size, base=c.rope_base, scaling=c.rope_scaling)
        x = nn.Embed(c.vocab_size, c.width, dtype=jnp.dtype(c.dtype), param_dtype=jnp.dtype(c.param_dtype),
                     embedding_init=nn.initializers.normal(STD), name="embed")(tokens)  # fmt: skip

        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=c.unroll if cache is None else c.decode_unroll,
        )(c, name="layers")
        carry = (x, None, None) if cache is None else (x, cache.k, cache.v)
        mixed = len(set(c.windowed)) == 2
        steps = jnp.arange(c.layers), jnp.array(c.windowed) if mixed else None
        (x, keys, values), _ = layers(carry, *steps, cos, sin, mask, length)
        if not c.tie_embeddings:
            Kernel((c.width, c.vocab_size), c.param_dtype, name="unembed")()
        x = RMSNorm(c.norm_eps, c.dtype, c.param_dtype, name="norm")(x)
        return x, None if cache is None else Cache(keys, values, length + tokens.shape[1])


def check(config: TransformerConfig, tokens: jax.Array, positions: jax.Array | None, cache: Cache | None):
    """Check shapes and lengths at trace time; return the number of columns already written (0 without a cache)."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tokens.shape}, expected [B, T]: add a batch axis with tokens[None]")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens have dtype {tokens.dtype}, expected integers: token ids, not embeddings")
    if positions is not None and positions.shape != tokens.shape:
        raise ValueError(f"positions have shape {positions.shape}, expected that of tokens [B, T] = {tokens.shape}")
    b, t = tokens.shape
    if cache is None:
        if t > config.max_length:
            raise ValueError(f"{t} tokens are longer than the config's max_length {config.max_length}: shorten or raise it")
        return 0
    want = (config.layers, b, config.kv_heads, cache.k.shape[3], config.head_size)
    if cache.k.shape != want or cache.v.shape != want:
        raise ValueError(
            f"the cache has keys {cache.k.shape} and values {cache.v.shape}, expected [L, B, K, S, Dh] = {want} for these "
            "tokens and this config: make it with init_cache(batch, length) of the same model"
        )
    written = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if written + t > want[3]:
        raise ValueError(
            f"{t} new tokens after {written} do not fit into a cache of {want[3]} columns: shorten the prompts, or make "
            f"the cache at least {written + t} columns long"
        )
    return cache.length
