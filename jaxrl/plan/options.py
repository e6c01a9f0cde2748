"""What `jaxrl plan` can be told; free of JAX, so that help is there at once."""

import dataclasses
from typing import Literal

MODELS = {
    "tiny": "tiny",
    "smollm2-135m": "smollm2_135m",
    "llama-1b": "llama32_1b",
    "llama-8b": "llama31_8b",
    "llama-70b": "llama31_70b",
    "llama2-7b": "llama2_7b",
    "qwen2.5-0.5b": "qwen25_0_5b",
    "qwen2.5-1.5b": "qwen25_1_5b",
    "qwen2.5-7b": "qwen25_7b",
    "qwen3-0.6b": "qwen3_0_6b",
    "qwen3-1.7b": "qwen3_1_7b",
    "qwen3-4b": "qwen3_4b",
    "qwen3-8b": "qwen3_8b",
    "qwen3-14b": "qwen3_14b",
    "qwen3-32b": "qwen3_32b",
    "qwen3-30b-a3b": "qwen3_30b_a3b",
    "mixtral-8x7b": "mixtral_8x7b",
    "deepseek-7b": "deepseek_llm_7b",
    "deepseek-67b": "deepseek_llm_67b",
    "deepseek-v2-lite": "deepseek_v2_lite",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "moonlight-16b-a3b": "moonlight_16b_a3b",
    "minimax-text-01": "minimax_text_01",
}
"""Short names, and the functions of `jaxrl.nets.presets`."""

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of training takes on chips that need not be here: counted, and read from its compiled programs."""

    model: str = "llama-8b"
    """smollm2-135m, llama-8b, llama-70b, qwen3-0.6b to qwen3-32b, deepseek-v3, ... (a wrong name lists them), or any
    network of `jaxrl nets`: of encoders and vision-language networks the Transformer, without heads and towers."""
    topology: str = "v5e:16x16"
    """Chips: v4, v5e, v5p, v6e or tpu7x and the shape of a slice, 2xv5e:16x16 for two, h100:HOSTSxGPUS, or cpu:8."""
    mesh: str = "auto"
    """Sizes of stage, data, fsdp, expert, context and tensor, such as fsdp=64,tensor=4; auto is all on fsdp."""
    sampler_mesh: str = ""
    """grpo: the mesh on which it samples, on the same chips; empty is `mesh`, auto is the best that fits."""
    task: Literal["sft", "dpo", "grpo"] = "sft"
    """Whose step: rows of examples, pairs, or completions that are sampled first."""
    batch: int = 256
    """Rows of sft, pairs of dpo, completions of grpo in one step."""
    length: int = 2048
    """Tokens of a row, prompt and completion."""
    completion: int = 0
    """grpo: tokens that are sampled; 0 is half of the length."""
    group: int = 8
    """grpo: completions of each prompt."""
    reference: bool = False
    """grpo: keep a frozen copy of the parameters for a KL."""
    micro_batches: int = 1
    """Parts in which the gradient is computed."""
    remat: Remat = "full"
    """What the backward pass computes again."""
    zero: Literal[1, 2, 3] = 3
    """What fsdp divides: 1 the optimizer's state, 2 gradients too, 3 parameters too."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation."""
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the parameters."""
    optimizer: Literal["float32", "bfloat16", "int8"] = "float32"
    """How Adam's moments are kept."""
    cache: Literal["", "bfloat16", "float32", "int8"] = ""
    """grpo: type of the sampler's keys and values; empty is that of the computation."""
    search: bool = False
    """Look for the mesh, the remat and the micro-batches with the shortest step that fits."""
    compile: bool = True
    """Compile the programs; with --search, those of the best `candidates`. Without it all is counted, in a second."""
    candidates: int = 3
    """Found by --search: how many are compiled."""
    effort: Literal["quick", "full"] = "quick"
    """Of the compiler: quick takes less than half the time, and finds programs that need a little more memory. Networks
    that are no decoders are compiled in full: on some of theirs libtpu's quick way stops at a check of its own."""
    out: str = ""
    """JSON file to write; empty writes none."""

    def __post_init__(self):
        for name in ("batch", "group", "micro_batches", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.length < 2 or not 0 <= self.completion < self.length:
            raise ValueError(
                f"length is {self.length} and completion {self.completion}, expected a row of at least 2 tokens and a "
                "completion shorter than it"
            )
        if self.task == "grpo" and (self.group < 2 or self.batch % self.group):
            raise ValueError(
                f"batch is {self.batch} completions in groups of {self.group}; expected whole groups of 2 or more"
            )
        if self.reference and self.task != "grpo":
            raise ValueError("reference is for grpo: dpo takes its reference's log-probs once, before the run")
