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
# # Preference tuning, end to end
#
# From a file of comparisons to a model that people prefer: data in TRL's columns, a supervised start, DPO with its
# reference computed once, the relatives of DPO on the same pairs, a reward model, and DPO online, where the model's own
# answers are judged as it learns.
#
# The task is two-digit addition with its working shown, because there the truth is known: a *judge* can say without
# error which of two answers is better, and we can see what learning from comparisons does and does not repair.
#
# - **Hardware**: any machine; written for 2 CPU cores. Nothing is downloaded.
# - **Running time**: about 8 minutes.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size, in seconds, and nothing is learnt.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from jaxrl.data import arithmetic, sources
from jaxrl.data.show import show
from jaxrl.data.split import split_by_problem
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, judge, online, preference, reward_model, sft, task, update
from jaxrl.posttrain.rewards import exact_answer
from jaxrl.posttrain.rollout import Sampling

SMOKE = os.environ.get("SMOKE", "0") == "1"
WARM_UP_STEPS, WARM_UP_BATCH = (4, 8) if SMOKE else (700, 128)
STEPS, BATCH, ONLINE_STEPS = (3, 4, 2) if SMOKE else (150, 64, 60)
HELD_OUT = 16 if SMOKE else 512
WIDTH = 16 if SMOKE else 64

# %% [markdown]
# ## The comparisons
#
# `47+85=` is to be continued by `120+12=132`. Somebody slips in four problems of five: forgets the carry, or carries
# one too early. Where he does, his working is the *rejected* response and the right one the *chosen*. What matters of a
# record are its columns, `prompt`, `chosen` and `rejected`, those that TRL's users have in their files already; chat
# messages in place of texts work as well.

# %%
tokenizer = arithmetic.tokenizer()
training, held_out = split_by_problem(arithmetic.problems(), held_out=HELD_OUT)
sloppy, sloppy_held_out = split_by_problem(arithmetic.sloppy_problems(), held_out=HELD_OUT)


def comparisons(right, wrong):
    """Records of the problems whose two workings differ."""
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in zip(right, wrong, strict=True)
        if a["completion"] != b["completion"]
    ]


os.chdir(tempfile.mkdtemp())
file = Path("comparisons.jsonl")
file.write_text("".join(json.dumps(record) + "\n" for record in comparisons(training, sloppy)))
records = sources.read_records([str(file)], require=("prompt", "chosen", "rejected"))
print(f"{len(records)} comparisons")
Console(width=100).print(show(file, tokenizer, 3))

# %% [markdown]
# A line that is broken is named with its file and number, before anything is compiled:

# %%
broken = file.with_name("broken.jsonl")
broken.write_text('{"prompt": "1+2=", "chosen": "3", "rejected": "4"}\n{"prompt": "2+2=", "chosen": "4"}\n')
try:
    task.pairs_of(sources.read_records([str(broken)]), tokenizer)
except ValueError as error:
    print(error)

# %% [markdown]
# ## A supervised start
#
# Preference losses compare log-probabilities of whole responses under the model and under its start, the *reference*.
# They assume that the start already writes such responses. Ours imitates the one who slips.

# %%
pairs = task.pairs_of(records, tokenizer)
held_out_pairs = task.pairs_of(comparisons(held_out, sloppy_held_out), tokenizer)
examples = task.examples_of(sloppy, tokenizer)
prompts, answers = task.prompts_of(training, tokenizer), task.answers_of(training, tokenizer)
tests, test_answers = task.prompts_of(held_out, tokenizer), task.answers_of(held_out, tokenizer)

model = language_model(
    TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=WIDTH,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=4 * WIDTH,
        tie_embeddings=True,
        max_length=tests.tokens.shape[1] + arithmetic.MAX_COMPLETION,
        remat="none",
    )
)
schedule = update.OptimizerConfig(learning_rate=4e-3, warmup_steps=1, decay="cosine", decay_steps=WARM_UP_STEPS)
warm_up = sft.make(sft.SFTConfig(batch=WARM_UP_BATCH), model, update.make_optimizer(schedule))


def run(step, state, data, steps):
    """So many steps as one program."""
    return jax.jit(lambda state, data: jax.lax.scan(lambda s, _: step(s, data), state, length=steps))(state, data)


state, log = run(warm_up.step, warm_up.init(jax.random.key(1), jax.jit(model.init)(jax.random.key(0))),
                 examples, WARM_UP_STEPS)  # fmt: skip
start = state.params

greedy = task.make_generate(model, tokenizer, Sampling(temperature=0.0, max_tokens=arithmetic.MAX_COMPLETION))
right = partial(exact_answer, marker=tokenizer.token_id(arithmetic.MARKER))


def accuracy(params):
    """Fraction of held-out problems answered exactly."""
    return float(right(greedy(params, tests, jax.random.key(0)), test_answers).mean())


print(f"cross-entropy {log['train/loss'][-1]:.3f} nats per token, held-out accuracy {accuracy(start):.3f}")

# %% [markdown]
# ## DPO
#
# DPO (Rafailov et al. 2023, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) needs no reward model. A policy that
# maximises a reward under a KL to the reference has the reward inside it,
# $r(x, y) = \beta \log \pi(y|x) / \pi_{\text{ref}}(y|x)$ up to a constant of the prompt, so one fits the policy to the
# comparisons directly:
#
# $$\ell = -\log \sigma\Bigl(\beta \bigl[\log \tfrac{\pi(y_w|x)}{\pi_{\text{ref}}(y_w|x)} -
# \log \tfrac{\pi(y_l|x)}{\pi_{\text{ref}}(y_l|x)}\bigr]\Bigr).$$
#
# The reference never changes, so its log-probs are computed once, by `reference`, and the reference itself can go.


# %%
def tune(variant, *, steps=STEPS, learning_rate=1e-4, **changes):
    """The whole run of a row of the family: its end, its metrics, its margins on the held-out pairs."""
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=learning_rate, warmup_steps=10))
    recipe = preference.make(preference.DPOConfig(variant=variant, batch=BATCH, **changes), model, optimizer)
    data = jax.jit(recipe.reference)(start, pairs)
    state, log = run(recipe.step, recipe.init(jax.random.key(2), start), data, steps)
    margins = jax.jit(recipe.margins)(state.params, jax.jit(recipe.reference)(start, held_out_pairs))
    return state.params, jax.device_get(log), np.asarray(margins)


begun = time.perf_counter()
tuned, log, margins = tune("dpo")
print(f"{STEPS} steps in {time.perf_counter() - begun:.0f} s, compilation included")
print(f"held-out pairs in order {(margins > 0).mean():.3f}, held-out accuracy {accuracy(tuned):.3f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained", dpi=80)
axes[0].plot(log["rewards/accuracies"])
axes[0].set(title="pairs in the right order", ylim=(0, 1.02))
axes[1].plot(log["rewards/chosen"], label="chosen")
axes[1].plot(log["rewards/rejected"], label="rejected")
axes[1].set(title="implicit reward")
axes[2].plot(log["logps/chosen"], label="chosen")
axes[2].plot(log["logps/rejected"], label="rejected")
axes[2].set(title="log-prob of the whole response (nats)")
axes[1].legend(frameon=False)
axes[2].legend(frameon=False)
for axis in axes:
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# Every held-out pair is in the right order now, and hardly a problem is still answered right. The panel on the right
# says why; look at it whenever you train with DPO. Only the *difference* of the two is in the loss: nothing keeps the
# chosen response from becoming less likely, as long as the rejected one falls faster. What becomes likely in their
# place are responses that nobody compared. A gentler rate or fewer steps put it off; the loss as it stands does not
# prevent it.
#
# ## The relatives
#
# All rows of the family share the step; a row says what a response is scored by, how the scores make a margin, and the
# link from margins to losses.

# %%
rows = {
    "dpo": {},
    "ipo": {"beta": 0.1},
    "hinge": {},
    "sppo": {"beta": 0.1},
    "apo_zero": {},
    "simpo": {},
    "orpo": {},
    "dpo + nll": {"variant": "dpo", "nll_coef": 1.0},
}
rows = dict(list(rows.items())[-2:]) if SMOKE else rows
print(f"{'':12}{'in order':>10}{'accuracy':>10}{'log-prob of chosen':>20}{'of rejected':>13}")
print(f"{'start':12}{'':10}{accuracy(start):10.3f}{log['logps/chosen'][0]:20.2f}{log['logps/rejected'][0]:13.2f}")
for name, changes in rows.items():
    ends, curve, margins = tune(**({"variant": name} | changes))
    print(f"{name:12}{(margins > 0).mean():10.3f}{accuracy(ends):10.3f}"
          f"{curve['logps/chosen'][-5:].mean():20.2f}{curve['logps/rejected'][-5:].mean():13.2f}")  # fmt: skip

# %% [markdown]
# All of them order the pairs. Whether they still answer depends on what they do to the chosen response: a likelihood
# (orpo, dpo + nll), or a target for each side (sppo), or for the difference (ipo), holds it up; a link that only wants
# the two further apart does not. (The rates were not tuned for each; a KL-regularised optimum is a matter of `beta`.)
#
# ## A reward model
#
# The other way is to learn the reward first (Bradley and Terry 1952) and then to maximise it. The reward model is the
# same Transformer with a head of one number, read at the response's last token.

# %%
recipe = reward_model.make(
    reward_model.RMConfig(batch=BATCH), model, update.make_optimizer(update.OptimizerConfig(learning_rate=3e-4))
)
state, log = run(recipe.step, recipe.init(jax.random.key(3), start), pairs, STEPS)
difference = np.asarray(reward_model.margins(model, state.params, held_out_pairs))
measured = reward_model.calibration(difference)
print(f"held-out pairs in order {measured.accuracy:.3f}, calibration error {measured.error:.3f}")

# %% [markdown]
# ## DPO online
#
# Comparisons from a file are of somebody else's answers. Online DPO (Guo et al. 2024,
# [arXiv 2402.04792](https://arxiv.org/abs/2402.04792)) draws answers from the model as it is now, asks a judge for the
# best and the worst of each group, and learns from these two. Two judges: the reward model just learnt, and the truth.

# %%
config = online.OnlineConfig(
    prompts=4 if SMOKE else 32, group=4, beta=0.1, sampling=Sampling(max_tokens=arithmetic.MAX_COMPLETION)
)
judges = {
    "the reward model": lambda completions, _: reward_model.score_rollout(model, scorer, completions),
    "the truth": right,
}
scorer = state.params
finals = {}
for name, score in judges.items():
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-4, warmup_steps=10))
    recipe = online.make(config, model, optimizer, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    step = online.fused(recipe, score, config)
    ended, log = run(step, recipe.init(jax.random.key(4), start), grpo.Problems(prompts, answers), ONLINE_STEPS)
    finals[name] = ended.params
    print(f"judged by {name:17} accuracy {accuracy(start):.3f} -> {accuracy(ended.params):.3f}, "
          f"groups decided at the end {log['judge/decided'][-5:].mean():.2f}")  # fmt: skip

# %% [markdown]
# The reward model orders nearly all held-out pairs and is still a bad judge of the policy's own answers: it has only
# ever seen one kind of mistake, and what scores well elsewhere is not what is right. The truth cannot be fooled, and
# the same loss now repairs the mistake: the pairs are the model's own, so pushing one down leaves no gap to fall into.
#
# ## Which one wins?
#
# The question that users have is about two models: how often is the one's answer better than the other's? `win_rate`
# asks a judge about each pair in both orders, counts ties, and gives an interval. The judge here compares with the
# known answer; in practice it is a person or a larger model.

# %%
written = {
    name: task.text_of(greedy(params, tests, jax.random.key(0)), tokenizer)
    for name, params in {"start": start, "dpo": tuned, "online": finals["the truth"]}.items()
}
correct = lambda *, completions, answer, **_: [
    float(text.split(arithmetic.MARKER)[-1] == truth) for text, truth in zip(completions, answer, strict=True)
]
ask = judge.judge_by(correct, answer=[record["answer"] for record in held_out])
questions = [record["prompt"] for record in held_out]
for first, second in (("dpo", "start"), ("online", "start"), ("online", "dpo")):
    result = judge.win_rate(ask, questions, written[first], written[second])
    print(f"{first} against {second}: {result.rate:.3f} [{result.low:.3f}, {result.high:.3f}], "
          f"{result.wins} wins, {result.ties} ties, {result.losses} losses")  # fmt: skip

# %% [markdown]
# ## The same from the command line
#
#     jaxrl data show comparisons.jsonl
#     jaxrl train sft --data workings.jsonl --out runs/start
#     jaxrl train dpo --init runs/start --data comparisons.jsonl --dpo.beta 0.1
#     jaxrl train rm --init runs/start --data comparisons.jsonl
#
# ## Try
#
# - `mixture={"dpo": 0.8, "bco": 0.2, "nll": 1.0}` in `DPOConfig`: MPO.
# - `label_smoothing=0.1` with some comparisons turned around: cDPO and `robust` against plain DPO.
# - `reference_every=50`: a reference that follows the policy (TR-DPO).
