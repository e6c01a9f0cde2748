"""What `jaxrl bench` can be told, a dataclass for each subject; free of JAX, so that help is there at once."""

import dataclasses
from typing import Literal

Pass = Literal["forward", "both"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Options of every subject. Shapes count from 1; a field that may be 0 says what 0 stands for."""

    out: str = ""
    """Folder for results; empty is runs/bench-SUBJECT. Results in it are never overwritten."""
    rounds: int = 5
    """Timed calls of each program, all programs in turn, after one call that does not count."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the arrays; auto is float32 on CPU and bfloat16 elsewhere."""
    memory_gb: float = 0.0
    """Programs that need more are left out; 0 is nine tenths of what is free."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value == ():
                if name != "implementations":
                    raise ValueError(f"{name} is empty, expected at least one value")
                continue
            values = value if isinstance(value, tuple) else (value,)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {' '.join(map(str, values))} names a value twice")
            low = 0 if name in ("memory_gb", "key_heads") else 1
            for x in values:
                if isinstance(x, int | float) and not isinstance(x, bool) and x < low:
                    raise ValueError(f"{name} is {x}, expected at least {low}")
        heads, key_heads = getattr(self, "heads", 0), getattr(self, "key_heads", 0)
        if key_heads and heads % key_heads:
            raise ValueError(f"heads is {heads}, expected a multiple of key_heads {key_heads}")


@dataclasses.dataclass(frozen=True)
class Attention(Bench):
    """Softmax attention: tiles, all pairs at once, JAX's own, and PyTorch's where it is installed."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Queries and keys of a row."""
    rows: int = 1
    """Batch size."""
    heads: int = 8
    """Query heads."""
    key_heads: int = 0
    """Heads of keys and values, each shared by a run of query heads; 0 is as many as query heads."""
    size: int = 64
    """Width of a head."""
    masks: tuple[Literal["causal", "full"], ...] = ("causal",)
    """What a query may see."""
    passes: tuple[Pass, ...] = ("forward", "both")
    """The result alone, or the result and the gradients of q, k and v."""
    implementations: tuple[
        Literal["xla", "reference", "pallas", "mosaic_gpu", "cudnn", "jax.nn", "splash", "torch"], ...
    ] = ()
    """Ours by name ("cudnn" is NVIDIA's through it), and others'; empty is all that this platform has."""


@dataclasses.dataclass(frozen=True)
class LogProbs(Bench):
    """Log-probabilities of tokens from hidden states: ours against all logits at once."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    """Tokens of a row."""
    rows: int = 1
    """Batch size."""
    size: int = 256
    """Width of the hidden states."""
    vocabulary: int = 16_384
    """Tokens to choose from."""
    passes: tuple[Pass, ...] = ("forward", "both")
    """The result alone, or the result and the gradients of hidden states and unembedding."""
    implementations: tuple[Literal["ours", "reference", "naive"], ...] = ()
    """Ours as it chooses, ours with all logits at once, all logits at once by autodiff; empty is all."""


@dataclasses.dataclass(frozen=True)
class Decode(Bench):
    """One new token for each row over a cache of keys and values; it has no backward pass."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Room in each row's cache."""
    rows: int = 8
    """Batch size."""
    heads: int = 8
    """Query heads."""
    key_heads: int = 2
    """Heads of keys and values; 0 is as many as query heads."""
    size: int = 64
    """Width of a head."""
    page: int = 16
    """Tokens in a page of the paged cache; it divides every length."""
    ragged: bool = False
    """Fill the caches from little to full, not all to the end."""
    implementations: tuple[Literal["dense", "paged", "attention", "jax.nn"], ...] = ()
    """Ours over a dense cache, over pages, `attention` with a mask over all of the cache, JAX's own; empty is all."""

    def __post_init__(self):
        super().__post_init__()
        odd = [n for n in self.lengths if n % self.page]
        if odd:
            raise ValueError(f"lengths has {odd[0]}, expected a multiple of page {self.page}")


@dataclasses.dataclass(frozen=True)
class LinearAttention(Bench):
    """Causal linear attention in chunks, without and with decay, against our softmax attention."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Tokens of a row."""
    rows: int = 1
    """Batch size."""
    heads: int = 8
    """Heads."""
    size: int = 64
    """Width of a head."""
    passes: tuple[Pass, ...] = ("forward", "both")
    """The result alone, or the result and the gradients of the arrays."""
    implementations: tuple[Literal["chunked", "decayed", "softmax"], ...] = ()
    """No decay, a decay for each token and head, softmax attention; empty is all."""


@dataclasses.dataclass(frozen=True)
class GroupedMatmul(Bench):
    """A layer of SwiGLU experts: products of groups of rows against all experts for all tokens."""

    tokens: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens that go through the layer."""
    experts: int = 16
    """Experts of the layer."""
    chosen: int = 2
    """Experts of each token."""
    width: int = 256
    """Width of a token."""
    hidden: int = 256
    """Units of an expert."""
    passes: tuple[Pass, ...] = ("forward", "both")
    """The result alone, or the result and the gradients of tokens, gate weights and matrices."""
    implementations: tuple[Literal["tiles", "ragged_dot", "dense", "int8", "fp8"], ...] = ()
    """Ours by tiles, by `ragged_dot`, all experts for all tokens, ours in 8 bits; empty is all."""

    def __post_init__(self):
        super().__post_init__()
        if self.chosen > self.experts:
            raise ValueError(f"chosen is {self.chosen}, expected at most the {self.experts} experts")


OPTIONS: dict[str, type[Bench]] = {
    "attention": Attention,
    "log-probs": LogProbs,
    "decode": Decode,
    "linear-attention": LinearAttention,
    "grouped-matmul": GroupedMatmul,
}
