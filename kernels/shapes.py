"""Shapes of attention in published models: tests, benchmarks and block sizes are held to these."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Heads and options of one layer; `window` is that of its local layers."""

    heads: int
    key_heads: int
    size: int  # of a query and a key
    value_size: int
    soft_cap: float | None = None
    sinks: bool = False
    window: int | None = None


SHAPES = {
    "smollm2-135m": AttentionShape(9, 3, 64, 64),
    "gpt-oss-20b": AttentionShape(64, 8, 64, 64, sinks=True, window=128),
    "qwen3-0.6b": AttentionShape(16, 8, 128, 128),
    "llama-3-8b": AttentionShape(32, 8, 128, 128),
    "deepseek-v3": AttentionShape(128, 128, 192, 128),
    "gemma-2-9b": AttentionShape(16, 8, 256, 256, soft_cap=50.0, window=4096),
}
