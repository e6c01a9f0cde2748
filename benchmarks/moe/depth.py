"""Seconds to trace and compile a supervised gradient, against depth: python benchmarks/moe/depth.py"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import GATINGS
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

SMALL = {"experts": 16, "top_k": 4, "ffn": 64, "shared": 64, "groups": 4, "top_groups": 2}


def main():
    """Prints a table: DeepSeek-V3's gating with few experts, and a decoder without experts."""
    gating = dataclasses.replace(GATINGS["deepseek_v3"], **SMALL)
    batch = TokenBatch(jnp.ones((2, 65), jnp.int32), jnp.ones((2, 65)))
    print("| layers | experts, s | dense, s |\n|---|---|---|")
    for layers in (4, 16, 64):
        seconds = []
        for experts in (gating, None):
            sizes = {"vocab_size": 64, "width": 128, "heads": 4, "kv_heads": 4, "ffn": 256}
            model = language_model(TransformerConfig(**sizes, layers=layers, experts=experts))
            params = jax.eval_shape(model.init, jax.random.key(0))
            step = functools.partial(update.value_and_grad, functools.partial(sft.loss, model))
            start = time.process_time()
            jax.jit(step).lower(params, batch).compile()
            seconds.append(time.process_time() - start)
        print(f"| {layers} | {seconds[0]:.1f} | {seconds[1]:.1f} |")


if __name__ == "__main__":
    main()
