"""The work of `work.py` by jaxrl; prints one JSON line."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import work

from jaxrl import loop
from jaxrl.posttrain import grpo, preference, sft, update
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.pretrained import load_pretrained
from jaxrl.types import Pairs, Prompts, TokenBatch


def padded(rows: list[list[int]], *, left: bool = False) -> tuple[jax.Array, np.ndarray]:
    """Token rows of one width, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[len(row) - len(values) if left else 0 :][: len(values)] = values
    return jnp.asarray(tokens), lengths


def reward(completions, answers):
    """`work.reward` in JAX."""
    return ((completions.completions % 2 == 0) * completions.mask).sum(axis=1) / completions.lengths


def main():
    """Measures."""
    options = work.arguments()
    opened = load_pretrained(options.model, max_length=512, dtype=options.dtype)
    model, encode = opened.language_model, opened.tokenizer.encode
    never = opened.transformer.vocab_size  # an EOS that cannot be drawn: all completions are of one length
    tokens, lengths = padded([encode(text) for text in work.prompts()], left=True)
    prompts = Prompts(tokens, jnp.asarray(lengths, jnp.int32))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=work.LEARNING_RATE, b2=0.999))
    sampling = Sampling(max_tokens=work.NEW_TOKENS)

    if options.task.startswith("generate"):
        asked, group = work.asked(options.task)
        batch = jax.tree.map(lambda x: x[: len(asked)], prompts)
        generate = jax.jit(
            lambda params, key: rollout(
                model, params, batch, key, sampling=sampling, eos_id=never, pad_id=0, samples=group
            )
        )
        watch = work.Stopwatch()
        for seed in range(1 + options.steps):
            counted = int(generate(opened.params, jax.random.key(seed)).lengths.sum())
            watch.lap()
        return finish(options, watch.laps[1:], counted)

    if options.task == "grpo":
        sizes = {"prompts": work.PROMPTS, "group": work.GROUP, "share_prompt": options.share_prompt}
        config = grpo.GRPOConfig(**sizes, kl_coef=work.BETA, sampling=sampling)
        run = grpo.make(config, model, optimizer, eos_id=never, pad_id=0)
        step, data = grpo.fused(run, reward, config), grpo.Problems(prompts, None)
        state = jax.jit(run.init)(jax.random.key(0), opened.params)
    elif options.task == "sft":
        rows, _ = padded([encode(text)[: work.LENGTH] for text in work.texts()])
        run = sft.make(sft.SFTConfig(batch=work.EXAMPLES), model, optimizer)
        step, data = run.step, TokenBatch(rows, jnp.ones(rows.shape))
        state = jax.jit(run.init)(jax.random.key(0), opened.params)
    else:
        config = preference.DPOConfig(batch=work.PAIRS)
        run = preference.make(config, model, optimizer)
        sides = []
        for side in ("chosen", "rejected"):
            starts = [encode(pair["prompt"]) for pair in work.pairs()]
            rows = [a + encode(pair[side]) for a, pair in zip(starts, work.pairs(), strict=True)]
            tokens, lengths = padded(rows)
            columns, first = np.arange(tokens.shape[1]), np.array([len(a) for a in starts])[:, None]
            mask = (columns >= first) & (columns < lengths[:, None])
            sides.append(TokenBatch(tokens, jnp.asarray(mask, jnp.float32)))
        data = jax.jit(run.reference)(opened.params, Pairs(*sides))
        step, state = run.step, jax.jit(run.init)(jax.random.key(0), opened.params)

    watch, counted = work.Stopwatch(), 0
    for progress in loop.run(step, state, data, steps=1 + options.steps, chunk=1):
        counted = int(progress.metrics[-1]["throughput/tokens"])
        watch.lap()
    finish(options, watch.laps[1:], counted)


def finish(options, laps, tokens):
    """Reports."""
    library = "jaxrl, shared prompt" if options.share_prompt else "jaxrl"
    work.report(library, options, laps, tokens=tokens, versions={name: version(name) for name in ("jax", "flax")})


if __name__ == "__main__":
    main()
