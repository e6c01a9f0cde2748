"""A GRPO step of jaxrl as a user runs it: `grpo.make`, `fused` with a reward in JAX, `loop.run` in chunks."""

import time
from importlib.metadata import version

import cases
import jax
import jax.numpy as jnp

from jaxrl import loop
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, update
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Prompts

CHUNK = 10  # steps per program, the default of loop.run


def build(case: cases.Case, *, problems: int = 64):
    """(state, data, step, functions of the run) of a case."""
    model = language_model(
        TransformerConfig(
            vocab_size=case.vocabulary,
            width=case.width,
            layers=case.layers,
            heads=case.heads,
            kv_heads=case.kv_heads,
            ffn=case.ffn,
            qkv_bias=True,
        )
    )
    config = grpo.GRPOConfig(
        prompts=case.prompts, group=case.group, kl_coef=case.beta, sampling=Sampling(max_tokens=case.new_tokens)
    )
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=case.learning_rate))
    run = grpo.make(config, model, optimizer, eos_id=case.eos, pad_id=0, max_grad_norm=case.clip_norm)
    state = jax.jit(lambda key: run.init(key, model.init(jax.random.key(1))))(jax.random.key(0))
    prompts = Prompts(
        jnp.asarray(case.prompt_ids(problems), jnp.int32), jnp.full(problems, case.prompt_tokens, jnp.int32)
    )
    return state, grpo.Problems(prompts, None), grpo.fused(run, reward, config), run


def reward(completions, answers):
    """`cases.reward` in JAX."""
    even = (completions.completions % 2 == 0) * completions.mask
    return even.sum(axis=1) / completions.lengths


def main():
    """Prints one JSON line."""
    options = cases.arguments()
    case = cases.CASES[options.case]
    state, data, step, _ = build(case)
    begun = time.perf_counter()
    watch, first, compiled, tokens = cases.Stopwatch(), 0.0, 0.0, 0.0
    steps = options.steps + CHUNK * -(-options.warm_up // CHUNK)
    for progress in loop.run(step, state, data, steps=steps, chunk=CHUNK):
        if progress.compile_seconds > 1e-2:
            first, compiled = time.perf_counter() - begun, progress.compile_seconds
        tokens = progress.metrics[-1]["throughput/tokens"]
        watch.lap(CHUNK)
    cases.report(
        "jaxrl",
        options.case,
        watch.laps[-(options.steps // CHUNK) :],
        first,
        tokens=int(tokens),
        versions={name: version(name) for name in ("jax", "flax", "optax")},
        compile_s=compiled,
        steps_per_chunk=CHUNK,
    )


if __name__ == "__main__":
    main()
