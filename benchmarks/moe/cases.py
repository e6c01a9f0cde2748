"""Mixture-of-experts layers of real models, their widths divided so that a CPU can run them; standard library only."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of `tokens` tokens of `width` under the gating of that name, with inner widths `ffn`, `shared`; float32."""

    gating: str
    tokens: int
    width: int
    ffn: int
    shared: int = 0


CASES = {
    "mixtral-8x7b/8": Case("mixtral", 512, 512, 1792),
    "qwen3-30b-a3b/8": Case("qwen3_moe", 512, 256, 96),
    "deepseek-v2-lite/8": Case("deepseek_v2_lite", 512, 256, 176, 352),
    "deepseek-v3/16": Case("deepseek_v3", 512, 448, 128, 128),
}
PASSES = ("forward", "both")
"""The layer alone, or with the gradients of its input and parameters."""
FORMS = ("grouped", "one-hot", "all experts", "dense layer")
"""Ours, dropless; products with one-hot matrices [T, E, C], an expert's room C 1.25 times its share; every expert for
every token; and one SwiGLU layer of the same FLOP per token, without a router."""
