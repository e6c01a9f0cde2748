# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The GRPO family, side by side
#
# GRPO has a dozen relatives, each with a paper that calls it better. Here seven of them start from the same small
# model, see the same problems, and are compared in what one can measure: accuracy of the greedy answer and of a
# majority of samples, entropy, length, samples drawn. Three seeds each, so that one can see what is noise.
#
# Then two claims are looked at on their own: what *dynamic sampling* costs, and what a higher upper clip does to the
# entropy. The second is often shown on tasks where the reward decides it; it is really there with a reward that says
# nothing.
#
# - **Hardware**: any machine; written for 2 CPU cores. Nothing is downloaded.
# - **Running time**: about 10 minutes.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size, in seconds, and nothing is learnt.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import dataclasses
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxrl.data import arithmetic
from jaxrl.data.split import split_by_problem
from jaxrl.losses import group as family
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, judge, sft, task, update
from jaxrl.posttrain.rewards import exact_answer
from jaxrl.posttrain.rollout import Sampling
from jaxrl.returns import group_relative

SMOKE = os.environ.get("SMOKE", "0") == "1"
WARM_UP_STEPS, WARM_UP_BATCH = (4, 8) if SMOKE else (700, 128)
STEPS, PROMPTS, GROUP, SEEDS = (2, 4, 4, 2) if SMOKE else (60, 32, 8, 3)
HELD_OUT = 16 if SMOKE else 512
WIDTH = 16 if SMOKE else 64

# %% [markdown]
# ## One start for all
#
# The task is two-digit addition with its working shown (`47+85=` -> `120+12=132`). The model has imitated somebody who
# slips in four problems of five: it knows how to go about it, and the mistake. (The notebook *GRPO from scratch* says
# more about both.)

# %%
tokenizer = arithmetic.tokenizer()
training, held_out = split_by_problem(arithmetic.problems(), held_out=HELD_OUT)
sloppy, _ = split_by_problem(arithmetic.sloppy_problems(), held_out=HELD_OUT)
examples = task.examples_of(sloppy, tokenizer)
problems = grpo.Problems(task.prompts_of(training, tokenizer), task.answers_of(training, tokenizer))
tests, test_answers = task.prompts_of(held_out, tokenizer), task.answers_of(held_out, tokenizer)
reward = partial(exact_answer, marker=tokenizer.token_id(arithmetic.MARKER))

model = language_model(
    TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=WIDTH,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=4 * WIDTH,
        tie_embeddings=True,
        max_length=max(tests.tokens.shape[1] + arithmetic.MAX_COMPLETION, examples.tokens.shape[1]),
        remat="none",
    )
)
schedule = update.OptimizerConfig(learning_rate=4e-3, warmup_steps=1, decay="cosine", decay_steps=WARM_UP_STEPS)
warm_up = sft.make(sft.SFTConfig(batch=WARM_UP_BATCH), model, update.make_optimizer(schedule))


@jax.jit
def imitate(params):
    state = warm_up.init(jax.random.key(1), params)
    return jax.lax.scan(lambda state, _: warm_up.step(state, examples), state, length=WARM_UP_STEPS)[0].params


start = imitate(jax.jit(model.init)(jax.random.key(0)))

# %% [markdown]
# Greedy answers and eight samples of each held-out problem say where it stands. `judge` has the unbiased estimators:
# `pass@k` asks whether any of $k$ samples is right, `maj@k` whether the most frequent answer is.

# %%
greedy = task.make_generate(model, tokenizer, Sampling(temperature=0.0, max_tokens=arithmetic.MAX_COMPLETION))
sampled = task.make_generate(model, tokenizer, Sampling(max_tokens=arithmetic.MAX_COMPLETION), samples=8)


def scores(params):
    """Greedy accuracy, pass@1, pass@8 and maj@8 on the held-out problems."""
    best = reward(greedy(params, tests, jax.random.key(0)), test_answers).mean()
    tries = sampled(params, tests, jax.random.key(7))
    right = reward(tries, jax.tree.map(lambda x: jnp.repeat(x, 8, axis=0), test_answers)).reshape(-1, 8)
    said = [text.split(arithmetic.MARKER)[-1] for text in task.text_of(jax.device_get(tries), tokenizer)]
    said = [said[i : i + 8] for i in range(0, len(said), 8)]
    right = np.asarray(right)
    return {
        "greedy": float(best),
        "pass@1": judge.pass_at_k(right, k=1).mean(),
        "maj@8": judge.maj_at_k(said, right, k=8).mean(),
        "pass@8": judge.pass_at_k(right, k=8).mean(),
    }


print(", ".join(f"{name} {value:.3f}" for name, value in scores(start).items()))

# %% [markdown]
# ## The rows
#
# A member of the family is a row of `losses.group.PRESETS`: what the reward is compared with, what divides the
# difference, at which level the ratio stands, the form of the surrogate, the KL, the reduction.

# %%
VARIANTS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "kimi"]
VARIANTS = VARIANTS[-2:] if SMOKE else VARIANTS
fields = ("baseline", "scale", "level", "form", "clip_high", "kl_coef", "reduction")
print(f"{'':8}" + "".join(f"{name:>15}" for name in fields))
for name in VARIANTS:
    print(f"{name:8}" + "".join(f"{getattr(family.PRESETS[name], field)!s:>15}" for field in fields))

# %% [markdown]
# Every run is 60 steps of 32 prompts and 8 samples, four updates a step (so that the ratio moves and the clips have
# something to do), Adam at the same rate. Kimi's reference is the policy at the start of the step, and its moments
# begin afresh with it. GRPO and RLOO keep the KL of their papers; the others have none.


# %%
def train(config, seed_key, params):
    """A whole run as one function: the parameters at its end, and the metrics of its steps."""
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-4, warmup_steps=10))
    run = grpo.make(config, model, optimizer, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    step = grpo.fused(run, reward, config)
    state, log = jax.lax.scan(lambda state, _: step(state, problems), run.init(seed_key, params), length=STEPS)
    return state.params, log


def compare(configs):
    """Every config with every seed: name -> (scores by seed, metrics [seeds, steps])."""
    found = {}
    for name, config in configs.items():
        begun = time.perf_counter()
        once = jax.jit(partial(train, config))
        ends, logs = zip(*[once(jax.random.key(seed), start) for seed in range(SEEDS)], strict=True)
        results = [scores(params) for params in ends]
        found[name] = (
            {key: np.array([result[key] for result in results]) for key in results[0]},
            jax.tree.map(lambda *x: np.stack(x), *jax.device_get(logs)),
        )
        print(f"{name:14} {time.perf_counter() - begun:4.0f} s")
    return found


base = grpo.GRPOConfig(
    prompts=PROMPTS, group=GROUP, minibatches=4, sampling=Sampling(max_tokens=arithmetic.MAX_COMPLETION)
)
runs = compare({name: dataclasses.replace(base, variant=name) for name in VARIANTS})


# %%
def table(runs):
    print(f"{'':14}{'greedy':>16}{'pass@1':>16}{'maj@8':>16}{'entropy':>9}{'length':>8}{'samples':>9}")
    for name, (ends, log) in runs.items():
        cells = [f"{ends[key].mean():.3f} +- {ends[key].std(ddof=1):.3f}" for key in ("greedy", "pass@1", "maj@8")]
        last = {key: log[key][:, -5:].mean() for key in ("policy/entropy", "completion/length")}
        samples = PROMPTS * GROUP * log.get("sampling/rounds", np.ones((1, STEPS))).sum(axis=1).mean()
        print(f"{name:14}" + "".join(f"{cell:>16}" for cell in cells)
              + f"{last['policy/entropy']:9.2f}{last['completion/length']:8.2f}{samples:9,.0f}")  # fmt: skip


table(runs)


# %%
def curves(runs, names):
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.2), layout="constrained", dpi=80)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        for row, (variant, (_, log)) in enumerate(runs.items()):
            middle, steps = log[name].mean(axis=0), np.arange(1, STEPS + 1)
            axis.plot(steps, middle, color=f"C{row}", linewidth=1.3, label=variant)
            axis.fill_between(steps, log[name].min(axis=0), log[name].max(axis=0), color=f"C{row}", alpha=0.12, lw=0)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)


curves(runs, {
    "reward/mean": "samples right",
    "policy/entropy": "entropy (nats a token)",
    "completion/length": "length (tokens)",
})  # fmt: skip

# %% [markdown]
# Lines are means over seeds, bands go from the lowest to the highest. Compare the distance between two lines with the
# width of a band before you believe in a ranking: grpo, dr_grpo, dapo and gspo cannot be told apart here. RLOO was made
# for one update a batch and has no clip; with four, its seeds end far from each other. Kimi's row, whose moments begin
# afresh with each batch, is behind at this rate, too.
#
# ## What dynamic sampling costs
#
# DAPO throws away groups whose rewards are all equal, which teach nothing, and draws others until the batch is full.
# Here at most four rounds. Steps are then worth more, and cost more samples: the last column above and below is what
# was drawn.

# %%
dapo = dataclasses.replace(base, variant="dapo")
dynamic = compare({"dapo": dapo, "dapo, dynamic": dataclasses.replace(dapo, dynamic_rounds=4)})
table(dynamic)

# %%
figure, axis = plt.subplots(figsize=(4.6, 3), layout="constrained", dpi=80)
for row, (name, (_, log)) in enumerate(dynamic.items()):
    drawn = PROMPTS * GROUP * np.cumsum(log.get("sampling/rounds", np.ones((SEEDS, STEPS))), axis=1).mean(axis=0)
    axis.plot(drawn, log["policy/entropy"].mean(axis=0), label=name, color=f"C{row}")
axis.set(title="entropy by samples drawn", xlabel="samples")
axis.legend(frameon=False)
axis.grid(alpha=0.3)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## What the upper clip does to entropy
#
# DAPO raises the upper clip from 0.2 to 0.28 so that unlikely tokens may grow. On a task with a clear reward, entropy
# falls because the answer is known, whatever the clip. The effect stands alone where the reward is noise: a table of
# logits, 50 actions in each of 128 states, rewards 0 or 1 by the toss of a coin, 16 samples for a state and 16 Adam
# steps on each batch. Nothing can be learnt, and entropy falls all the same, by how much depends on the clip.


# %%
def noise(clip_low, clip_high, *, states=128, actions=50, group=16, rounds=2 if SMOKE else 120, inner=16):
    """Mean entropy before each round."""
    optimizer = optax.adam(0.02)
    row = dataclasses.replace(family.PRESETS["dapo"], clip_low=clip_low, clip_high=clip_high)
    entropy = lambda logits: -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()

    def loss(logits, drawn, old, advantages):
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn, axis=1).reshape(-1, 1)
        values, _ = family.loss(log_probs, old, None, advantages, jnp.ones_like(log_probs), variant=row)
        return values.mean()

    def one_round(carry, key):
        logits, moments = carry
        draw, toss = jax.random.split(key)
        drawn = jax.random.categorical(draw, logits[:, None], shape=(states, group))
        rewards = jax.random.bernoulli(toss, 0.5, (states, group)).astype(jnp.float32)
        advantages = group_relative(rewards).reshape(-1, 1)
        old = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn, axis=1).reshape(-1, 1)

        def update_once(carry, _):
            logits, moments = carry
            change, moments = optimizer.update(jax.grad(loss)(logits, drawn, old, advantages), moments)
            return (optax.apply_updates(logits, change), moments), None

        after, _ = jax.lax.scan(update_once, (logits, moments), length=inner)
        return after, entropy(logits)

    logits = jax.random.normal(jax.random.key(0), (states, actions))
    keys = jax.random.split(jax.random.key(1), rounds)
    return jax.jit(lambda x: jax.lax.scan(one_round, (x, optimizer.init(x)), keys)[1])(logits)


figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained", dpi=80)
for low, high in ((0.2, 0.1), (0.2, 0.2), (0.2, 0.28), (0.2, 0.5), (0.4, 0.2)):
    curve = noise(low, high)
    axis.plot(curve, label=f"{low} below, {high} above")
    print(f"clip {low} below, {high} above: entropy {curve[0]:.2f} -> {curve[-1]:.2f} nats")
axis.set(title="entropy with a reward that is noise", xlabel="round", ylim=(0, None))
axis.legend(frameon=False, fontsize=8)
axis.grid(alpha=0.3)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# A wider clip above keeps entropy, a wider clip below loses it. That is DAPO's argument. On the addition above, where
# the reward means something, the entropies of the rows with a clip do not differ. (At larger steps than Adam's 0.02
# here the order is lost: the clip stops a gradient, but not a step that is too long.)
#
# ## Try
#
# - `length_weight=0.5` in a config: Kimi k1.5's length reward, which prefers the shorter of two right answers.
# - `kl_coef=0.0` for grpo and rloo, to see what of their curves is the KL.
# - The same rows on a language model of 135 million parameters: `benchmarks/smollm2`.
