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
# # GRPO from scratch
#
# A small Transformer learns two-digit addition in two stages. First it imitates worked examples by somebody who mostly
# gets the carry wrong. Then **GRPO** (Shao et al. 2024, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300)) lets it
# try, checks the answers, and makes what led to right ones more likely.
#
# The GRPO step is put together here, in about thirty lines, from the library's pure functions: sampler, reward,
# advantages, loss, reduction, and optax for the update. There is no trainer behind it.
#
# - **Hardware**: any machine; written for 2 CPU cores. Nothing is downloaded.
# - **Running time**: about 2 minutes, compilation included.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size, in seconds, and nothing is learnt.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from jaxrl import returns
from jaxrl.data import arithmetic
from jaxrl.data.split import split_by_problem
from jaxrl.losses import group, reduce
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, sft, task, update
from jaxrl.posttrain.rewards import exact_answer
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout

SMOKE = os.environ.get("SMOKE", "0") == "1"
WARM_UP_STEPS, WARM_UP_BATCH = (4, 8) if SMOKE else (700, 128)
STEPS, PROMPTS, GROUP = (4, 4, 4) if SMOKE else (80, 64, 8)
EVALUATE_EVERY = 2 if SMOKE else 5
HELD_OUT = 16 if SMOKE else 512
WIDTH = 16 if SMOKE else 64

# %% [markdown]
# ## The task
#
# The prompt `47+85=` is to be continued by its working, `120+12=132`: the tens, the units, and what they add up to.
# Whatever stands after the last `=` is the answer, so a program can check it.
#
# The examples to imitate are by somebody who slips in four problems of five: forgets the carry, or carries at 9, one
# too early. The model learns how to go about a problem, and the mistake. The held-out problems are in neither stage's
# training data.

# %%
tokenizer = arithmetic.tokenizer()
training, held_out = split_by_problem(arithmetic.problems(), held_out=HELD_OUT)
sloppy, _ = split_by_problem(arithmetic.sloppy_problems(), held_out=HELD_OUT)

prompts, answers = task.prompts_of(training, tokenizer), task.answers_of(training, tokenizer)
held_out_prompts, held_out_answers = task.prompts_of(held_out, tokenizer), task.answers_of(held_out, tokenizer)
examples = task.examples_of(sloppy, tokenizer)
marker = tokenizer.token_id(arithmetic.MARKER)

print(f"{len(training)} problems to train on, {len(held_out)} held out, a vocabulary of {tokenizer.vocab_size} tokens")
for record in [record for record in sloppy if record["prompt"].startswith("47+8")][:6]:
    print(f"  {record['prompt']}{record['completion']:12} (right: {record['answer']})")

# %% [markdown]
# ## The model
#
# A language model is four pure functions: `init`, `apply`, `unembedding` and `init_cache`. Its parameters are a plain
# nested dict. Everything below works with any four functions that keep the same contract.

# %%
model = language_model(
    TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=WIDTH,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=4 * WIDTH,
        tie_embeddings=True,
        max_length=max(prompts.tokens.shape[1] + arithmetic.MAX_COMPLETION, examples.tokens.shape[1]),
    )
)
params = jax.jit(model.init)(jax.random.key(0))
print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# Two ways to sample are needed: greedy, to evaluate on the held-out problems, and at temperature 1, to explore.

# %%
greedy = task.make_generate(model, tokenizer, Sampling(temperature=0.0, max_tokens=arithmetic.MAX_COMPLETION))
sampled = task.make_generate(model, tokenizer, Sampling(max_tokens=arithmetic.MAX_COMPLETION), samples=4)


def accuracy(params):
    """Fraction of held-out problems answered exactly."""
    completions = greedy(params, held_out_prompts, jax.random.key(0))
    return exact_answer(completions, held_out_answers, marker=marker).mean()


def show_samples(params):
    """Four samples for each of four held-out problems."""
    problems = held_out[3 :: len(held_out) // 4]
    texts = task.text_of(sampled(params, task.prompts_of(problems, tokenizer), jax.random.key(7)), tokenizer)
    for i, record in enumerate(problems):
        tries = ["right" if text.endswith("=" + record["answer"]) else "wrong" for text in texts[4 * i : 4 * i + 4]]
        tries = [f"{text} {verdict}" for text, verdict in zip(texts[4 * i : 4 * i + 4], tries, strict=True)]
        print(f"{record['prompt']:>6}  " + "   ".join(f"{one:16}" for one in tries))


# %% [markdown]
# ## Warm-up: imitation
#
# Reinforcement learning needs a model that is right now and then, or all rewards are zero. Next-token cross-entropy on
# the sloppy workings gives one. The library's SFT step is `(state, data) -> (state, metrics)`, so a whole run is one
# `scan`.

# %%
warm_up = sft.make(
    sft.SFTConfig(batch=WARM_UP_BATCH),
    model,
    update.make_optimizer(
        update.OptimizerConfig(learning_rate=4e-3, warmup_steps=1, decay="cosine", decay_steps=WARM_UP_STEPS)
    ),
)


@jax.jit
def imitate(state, examples):
    return jax.lax.scan(lambda state, _: warm_up.step(state, examples), state, length=WARM_UP_STEPS)


begun = time.perf_counter()
state, log = imitate(warm_up.init(jax.random.key(1), params), examples)
params = state.params
print(f"cross-entropy {log['train/loss'][0]:.2f} -> {log['train/loss'][-1]:.2f} nats per token, "
      f"{time.perf_counter() - begun:.0f} s")  # fmt: skip

accuracy_before = float(accuracy(params))
print(f"held-out accuracy {accuracy_before:.1%}\n")
show_samples(params)

# %% [markdown]
# ## The advantage
#
# For each prompt we draw a *group* of $G$ completions with rewards $R_1, \dots, R_G$, here 1 for a right answer and 0
# for any other. GRPO has no value network: a completion is compared with the others to the same prompt,
#
# $$A_i = \frac{R_i - \operatorname{mean}(R)}{\operatorname{std}(R) + \epsilon}.$$
#
# Every token of completion $i$ gets $A_i$. Positive means "more of this", negative "less of this". In a group whose
# rewards are all equal, all right or all wrong, there is nothing to compare and every advantage is exactly zero: such
# *zero-std groups* teach nothing. Early on they are prompts too hard for the model, at the end prompts it has mastered;
# the run is over when all groups are like that.

# %%
for rewards in ([1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]):
    print(rewards, "->", returns.group_relative(jnp.array(rewards)).round(2))

# %% [markdown]
# ## The loss
#
# With the ratio $r_t = \pi(y_t) / \pi_{\text{old}}(y_t)$ of the token's probability under the policy being trained and
# under the one that sampled it, the loss of a token is PPO's clipped surrogate,
#
# $$\ell_t = -\min\bigl(r_t A,\ \operatorname{clip}(r_t, 1 - 0.2, 1 + 0.2)\, A\bigr).$$
#
# Once a token has become 20 % more likely (where $A > 0$) or 20 % less likely (where $A < 0$), its gradient stops: the
# samples were drawn from the old policy and say little about one far away from it.
#
# `group.PRESETS` holds this as a row of a table, and its relatives (Dr.GRPO, DAPO, GSPO, CISPO, RLOO, ...) as other
# rows. We leave out the KL term to a reference model, which a short run with a reward that cannot be gamed does not
# need.

# %%
variant = dataclasses.replace(group.PRESETS["grpo"], kl_coef=0.0)
reduction = reduce.by_name(variant.reduction)  # "sequences": mean over a completion's tokens, then over completions
print(variant)


# %%
def loss(params, completions, old_log_probs, advantages):
    """GRPO's loss, and what to watch."""
    mask = completions.mask  # 1 on the tokens of each completion, its end-of-sequence token included
    log_probs, entropy = completion_log_probs(model, params, completions)  # one forward pass
    values, diagnostics = group.loss(log_probs, old_log_probs, None, advantages, mask, variant=variant)
    watched = {
        "entropy": entropy,
        "ratio": diagnostics["ratio"],
        "clipped": diagnostics["clipped_low"] + diagnostics["clipped_high"],
    }
    return reduction(values, mask).mean, {name: reduce.tokens(x, mask).mean for name, x in watched.items()}


learning_rate = optax.warmup_constant_schedule(init_value=3e-5, peak_value=1.5e-4, warmup_steps=5)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate, b2=0.95))


def learn(params, opt_state, completions, old_log_probs, advantages):
    """One update from completions and their advantages."""
    (value, watched), gradient = jax.value_and_grad(loss, has_aux=True)(params, completions, old_log_probs, advantages)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    watched |= {"loss": value, "gradient norm": optax.global_norm(gradient)}
    return optax.apply_updates(params, updates), opt_state, watched


# %% [markdown]
# ## Sample and score
#
# `rollout` prefills each prompt once, then decodes `GROUP` completions of it; rows of one prompt follow each other. The
# reward is written in JAX too, so that nothing leaves the device.

# %%
sampling = Sampling(temperature=1.0, max_tokens=arithmetic.MAX_COMPLETION)


def explore(params, key, step):
    """Completions of the step's prompts, their rewards [PROMPTS, GROUP] and advantages [PROMPTS * GROUP, T]."""
    order_key, sample_key = jax.random.split(key)
    rows = update.epoch_batch(order_key, step, batch=PROMPTS, examples=len(training))
    of_rows = lambda tree, times=1: jax.tree.map(lambda x: jnp.repeat(x[rows], times, axis=0), tree)
    completions = rollout(
        model,
        params,
        of_rows(prompts),
        jax.random.fold_in(sample_key, step),
        sampling=sampling,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        samples=GROUP,
    )
    rewards = exact_answer(completions, of_rows(answers, GROUP), marker=marker).reshape(PROMPTS, GROUP)
    return completions, rewards, group.advantages(rewards, completions.mask, variant=variant)


# %% [markdown]
# ### Why the loss is near zero
#
# Before the first update the policy *is* the one that sampled, so every ratio is 1 and the loss is minus the mean of
# the advantages, which add up to zero in each group. The loss says nothing, and it will not fall; its *gradient* is the
# policy gradient and is not zero. Watch the reward instead.
#
# When several updates are made from the same completions, the ratio moves away from 1 and the clip sets in. Here are
# six updates from one batch (with the old log-probs held fixed), only to be looked at:

# %%
completions, rewards, advantages = jax.jit(explore)(params, jax.random.key(2), 0)
old_log_probs, _ = jax.jit(lambda params, completions: completion_log_probs(model, params, completions))(
    params, completions
)
print(f"mean reward {rewards.mean():.2f}, groups with equal rewards {(rewards.std(axis=1) == 0).mean():.0%}")
trial, once = (params, optimizer.init(params)), jax.jit(learn)
for number in range(6):
    *trial, watched = once(*trial, completions, old_log_probs, advantages)
    print(f"update {number}: " + ", ".join(f"{name} {float(x):.4f}" for name, x in watched.items()))

# %% [markdown]
# ## The loop
#
# One step: sample, score, learn. With one update for each batch the samples are on policy; then `old_log_probs` may be
# `None`, which means a ratio of 1 that still has its gradient, and saves a forward pass.
#
# The whole run is one compiled program: an inner `scan` over steps, an outer one that evaluates on the held-out
# problems after every few. `grpo.summary` is the library's description of a batch of completions.


# %%
@jax.jit
def train(params, key):
    def step(state, number):
        params, opt_state = state
        completions, rewards, advantages = explore(params, key, number)
        params, opt_state, watched = learn(params, opt_state, completions, None, advantages)
        return (params, opt_state), watched | grpo.summary(completions, rewards)

    def some_steps(state, numbers):
        state, log = jax.lax.scan(step, state, numbers)
        return state, (log, accuracy(state[0]))

    numbers = jnp.arange(STEPS).reshape(-1, EVALUATE_EVERY)
    (params, _), (log, accuracies) = jax.lax.scan(some_steps, (params, optimizer.init(params)), numbers)
    return params, jax.tree.map(jnp.ravel, log), accuracies


begun = time.perf_counter()
tuned, log, accuracies = jax.block_until_ready(train(params, jax.random.key(3)))
print(f"{STEPS} steps of {PROMPTS} x {GROUP} completions in {time.perf_counter() - begun:.0f} s, compilation included")

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", dpi=80)
steps = range(1, STEPS + 1)
accuracy_steps = range(0, STEPS + 1, EVALUATE_EVERY)

axes[0, 0].plot(steps, log["reward/mean"])
axes[0, 0].set(title="mean reward of the samples", ylim=(-0.02, 1.02))
axes[0, 1].plot(accuracy_steps, [accuracy_before, *accuracies.tolist()], marker="o", markersize=4)
axes[0, 1].set(title="held-out accuracy, greedy", ylim=(-0.02, 1.02))
axes[1, 0].plot(steps, log["entropy"])
axes[1, 0].set(title="entropy of the next token (nats)", ylim=(0, None), xlabel="step")
axes[1, 1].plot(steps, log["reward/zero_std"], label="share of groups with equal rewards")
axes[1, 1].plot(steps, log["loss"], label="loss")
axes[1, 1].set(title="groups that teach nothing, and the loss", ylim=(-0.2, 1.02), xlabel="step")
axes[1, 1].legend(frameon=False)
for panel in axes.flat:
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# Reward and accuracy rise together, though no held-out problem was ever trained on: what is learnt is the carry, not
# the answers. The reward stays below the accuracy, because samples at temperature 1 still go astray where the greedy
# choice is right; with ten tokens to each completion a little entropy is enough for that. About a fifth of the
# groups had equal rewards and taught nothing. The loss has been a flat line all along.

# %%
print(f"held-out accuracy {accuracy_before:.1%} -> {float(accuracies[-1]):.1%}\n")
print("before")
show_samples(params)
print("\nafter")
show_samples(tuned)

# %% [markdown]
# ## Try
#
# - Another member of the family: `variant = group.PRESETS["dapo"]`, or `"rloo"` with `kl_coef=0.0`. Dr.GRPO's
#   `reduction="constant"` needs `reduce.by_name("constant", length=arithmetic.MAX_COMPLETION)`.
# - A KL to the start: keep `reference = params`, give its log-probs as the third argument of `group.loss`, and set
#   `kl_coef`.
# - Several updates from each batch: `old_log_probs` from before the first, as in the trial above.
# - Your own reward: any JAX function from a `Rollout` to one number for each completion.
#
# `jaxrl demo` runs the same thing with checkpoints, a progress display and a run folder; `jaxrl.posttrain.grpo` is the
# step with minibatches, KL, and protection against non-finite updates.
