"""What a Transformer is made of: sizes and choices of one network."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jaxrl.kernels.attention import Pattern
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.layers import ACTIVATIONS
from jaxrl.nets.linear_attention import LinearConfig
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.rope import RopeScaling

CACHE_DTYPES = ("float32", "bfloat16", "int8")
CHOICES = {
    "positions": ("rotary", "learned", "none"),
    "norm": ("rms", "layer"),
    "norm_place": ("pre", "post", "branch"),
    "activation": tuple(ACTIVATIONS),
    "bias": (False, True, "ffn"),
    "qk_norm": (False, True, "heads"),
    "remat": ("none", "full", "dots"),
}


class Kind(NamedTuple):
    """In what a layer may differ from others of its network, so that their parameters do not stack."""

    dense: bool = False  # plain ffn though the config has experts
    linear: bool = False  # linear attention

    @property
    def name(self) -> str:
        """Of the stack of such layers in the tree of parameters."""
        return "dense_" * self.dense + "linear_" * self.linear + "layers"


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of one network. Frozen and hashable; `jaxrl.nets.presets` names published ones.

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
    ffn: int  # inner width of the feed-forward layers
    experts: MoEConfig | None = None  # in their place, but for `first_dense` layers
    latent: LatentConfig | None = None  # multi-head latent attention (DeepSeek); head_dim has no meaning then
    linear: LinearConfig | None = None  # linear attention (Performer, TransNormer, MiniMax), in the place of softmax
    linear_layers: tuple[int, ...] | None = None  # which layers have it; None: all
    rectified: bool = False  # the others: relu in the place of the softmax, a norm after (ReLA)
    head_dim: int | None = None  # Dh; None: width / heads
    max_length: int = 2048  # the longest sequence or cache accepted
    causal: bool = True  # what a token sees where no mask is given: those before it, or all
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rotary_dim: int | None = None  # how many numbers of a head turn, the first ones; None: all
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_sections: tuple[int, ...] | None = None  # frequencies of each axis of positions [axes, B, T] (Qwen2-VL)
    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["pre", "post", "branch"] = "pre"  # x + f(norm(x)), norm(x + f(x)), x + norm(f(x))
    norm_eps: float = 1e-6
    residual: float = 1.0  # factor on x in all these sums (DeepNorm's alpha)
    gated: bool = True  # feed-forward layers, but not experts: act(x W_gate) * x W_up, or act(x W_up)
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "silu"
    bias: bool | Literal["ffn"] = False  # beside every matrix of a layer; "ffn": of its feed-forward layer alone (DiT)
    qkv_bias: bool = False  # beside those of queries, keys and values (Qwen2)
    qk_norm: bool | Literal["heads"] = False  # RMSNorm of each head (Qwen3); "heads": LayerNorm, own scales (Chameleon)
    tie_embeddings: bool = False
    unembed_bias: bool = False  # of the logits (DiT), see `language_model.with_one`
    embed_width: int | None = None  # of the embedding, which a matrix maps to D (ALBERT, ELECTRA); None: D
    embed_norm: bool = False  # a norm after the embeddings
    token_types: int = 0  # kinds of tokens with an embedding each (BERT's segments)
    share_layers: bool = False  # one layer's parameters for all (ALBERT)
    window: int | None = None  # a query sees the last `window` columns, itself included
    pattern: Pattern | None = None  # a sparse mask laid over the given one, as the window is
    window_layers: tuple[int, ...] | None = None  # which layers use window and pattern; None: all that attend
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
        if self.positions == "rotary" and self.rotated % 2:
            name = "latent.rope" if self.latent else "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"{name} is {self.rotated}, but rotary embedding turns pairs: give an even one")
        if self.rotary_dim is not None:
            whole = self.latent or self.rope_sections or self.positions != "rotary"
            if whole or not 2 <= self.rotary_dim < self.head_size:
                raise ValueError(
                    f"rotary_dim is {self.rotary_dim} of {self.head_size}, with positions {self.positions!r}, "
                    f"rope_sections {self.rope_sections} and {'' if self.latent else 'no '}latent attention: expected "
                    "an even part of a head, rotary positions and neither of the others (None: all numbers turn)"
                )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache_dtype is {self.cache_dtype!r}, expected None (that of compute) or {CACHE_DTYPES}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, expected None or at least 1: a token sees itself")
        for name, what in (("window", self.window or self.pattern), ("linear", self.linear)):
            layers = getattr(self, f"{name}_layers")
            if layers is not None and (what is None or not layers):
                raise ValueError(
                    f"{name} is {getattr(self, name)} and {name}_layers {layers}: name at least one layer "
                    f"(None: all), together with a {name}{' or a pattern' * (name == 'window')}"
                )
            if not all(0 <= i < self.layers for i in layers or ()):
                raise ValueError(f"{name}_layers {layers} names layers outside 0..{self.layers - 1}")
        if self.linear and self.linear.kv_heads and self.heads % self.linear.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.linear.kv_heads} linear.kv_heads: give a divisor")
        if self.linear and self.linear.decay != "none" and not self.causal:
            raise ValueError(
                f"linear.decay is {self.linear.decay!r} without causal: a decay knows only what came before"
            )
        masked = self.window or self.pattern or self.rectified
        if self.latent and (self.kv_heads != self.heads or masked or self.qk_norm or self.positions != "rotary"):
            raise ValueError(
                f"latent attention with kv_heads {self.kv_heads}, window {self.window}, pattern {self.pattern}, "
                f"rectified {self.rectified}, qk_norm {self.qk_norm} and positions {self.positions!r}: expected "
                f"kv_heads = heads = {self.heads}, rotary positions, neither window nor qk_norm nor the others"
            )
        if self.latent and self.linear and self.linear.rotary:
            raise ValueError("latent and linear layers turn different numbers of a head: give linear.rotary=False")
        if self.latent and (self.bias or self.qkv_bias):
            raise ValueError("latent attention with bias or qkv_bias: its matrices have none")
        if self.experts and self.bias:
            raise ValueError(f"experts with bias {self.bias}: they have none")
        if not self.latent and getattr(self.rope_scaling, "mscale_all_dim", 0.0):
            raise ValueError("rope_scaling.mscale_all_dim is of latent attention's scores; expected 0 without latent")
        if any(self.kinds[i].linear for i in self.window_layers or ()):
            raise ValueError(f"window_layers {self.window_layers} names linear layers, which have no window")
        if self.rope_sections and sum(self.rope_sections) != self.rotated // 2:
            raise ValueError(f"rope_sections {self.rope_sections} must sum to half of the {self.rotated} that turn")
        if self.share_layers and self.experts:
            raise ValueError("share_layers with experts: layers that share all parameters have plain ffn")
        if self.share_layers and len(set(self.kinds)) > 1:
            raise ValueError("share_layers with linear_layers: layers that share all parameters are all alike")
        if self.dense_layers > self.layers:
            raise ValueError(f"experts.first_dense is {self.dense_layers}, but there are {self.layers} layers")

    def with_room(self, length: int) -> "TransformerConfig":
        """The same network, with the same parameters, for rows of `length` tokens where it takes fewer.

        Raises:
          ValueError: longer than its table of learned positions.
        """
        if length <= self.max_length:
            return self
        if self.positions == "learned":
            raise ValueError(
                f"{length} tokens are longer than the network's table of {self.max_length} learned positions: shorten "
                "prompts or examples, or ask for fewer new tokens (max-tokens)"
            )
        return replace(self, max_length=length)

    @property
    def head_size(self) -> int:
        """Dh as a number."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def rotated(self) -> int:
        """Numbers of a head that rotary positions turn."""
        if self.latent is not None:
            return self.latent.rope
        return self.head_size if self.rotary_dim is None else self.rotary_dim

    @property
    def dense_layers(self) -> int:
        """Layers before the first one with experts; 0 where there are none at all."""
        return 0 if self.experts is None else self.experts.first_dense

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each layer."""
        linear = self.linear_layers or range(self.layers) if self.linear else ()
        return tuple(Kind(i < self.dense_layers, i in linear) for i in range(self.layers))
