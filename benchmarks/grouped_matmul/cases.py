"""Expert layers of real models, their widths divided so that a CPU can run them; standard library only."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` tokens of `width`, each to `chosen` of `experts` SwiGLU layers of `hidden` units; float32."""

    tokens: int
    experts: int
    chosen: int
    width: int
    hidden: int


CASES = {
    "mixtral-8x7b/8": Case(256, 8, 2, 512, 1792),
    "deepseek-v3/16": Case(128, 256, 8, 448, 128),
    "qwen3-30b-a3b/8": Case(256, 128, 8, 256, 96),
    "qwen3-30b-a3b/8, 8 tokens": Case(8, 128, 8, 256, 96),
}
PASSES = ("forward", "both")
"""The result alone, or the result and the gradients of tokens, gate weights and matrices."""
FORMS = ("tiles", "ragged_dot", "dense", "loop", "int8", "fp8")
"""Ours by tiles, by `ragged_dot`, and in 8 bits; all experts for all tokens at once, and one expert after the other."""
