"""What recomputation costs a decoder with experts: python benchmarks/moe/remat.py"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import GATINGS
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

FFN = {"qwen3_moe": 96, "mixtral": 896}
MODES = ("none", "dots", "full")


def main():
    """Prints a table: CPU milliseconds (median of 5 calls, the modes in turn) and temporary megabytes of a gradient."""
    tokens = jax.random.randint(jax.random.key(1), (2, 257), 0, 256)
    batch = TokenBatch(tokens, jnp.ones(tokens.shape))
    print("| gating | " + " | ".join(f"{mode}, CPU ms / MB" for mode in MODES) + " |" + "\n|" + "---|" * 4)
    for name, ffn in FFN.items():
        calls = {}
        for mode in MODES:
            gating = dataclasses.replace(GATINGS[name], ffn=ffn)
            sizes = {"vocab_size": 256, "width": 256, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 512}
            model = language_model(TransformerConfig(**sizes, experts=gating, remat=mode))
            params = jax.jit(model.init)(jax.random.key(0))
            step = functools.partial(update.value_and_grad, functools.partial(sft.loss, model))
            calls[mode] = jax.jit(step).lower(params, batch).compile(), params
        laps: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(6):
            for mode, (call, params) in calls.items():
                start = time.process_time()
                jax.block_until_ready(call(params, batch))
                laps[mode].append(1e3 * (time.process_time() - start))
        memory = {mode: call.memory_analysis().temp_size_in_bytes / 1e6 for mode, (call, _) in calls.items()}
        cells = [f"{statistics.median(laps[mode][1:]):.0f} / {memory[mode]:.0f}" for mode in MODES]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
