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
# # Inside a mixture of experts
#
# A feed-forward layer of many experts, of which each token uses a few. A router picks them. It learns with the rest of
# the network, and nothing in the language-model loss asks it to use all experts alike. Here a small mixture is trained
# on a language whose tokens belong to known classes, and its routers are looked at.
#
# 1. many parameters, few of them used
# 2. two ways to keep the load even: a loss, and a bias that the loss does not know of
# 3. load over training, with neither, with the loss, with the bias
# 4. which tokens go to which expert
# 5. groups of experts, of which a token may choose a few
# 6. experts with limited room, and what is dropped
# 7. what a layer costs, against a dense one
#
# - **Hardware**: any machine; written for 2 CPU cores. Nothing is downloaded.
# - **Running time**: about two minutes, compilation included.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size, and nothing is learnt.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import dataclasses
import io
import json
import os
from pathlib import Path

import IPython.display
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

from jaxrl.data import markov
from jaxrl.nets import moe, presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import GATINGS, MoEConfig
from jaxrl.nets.transformer import Transformer, TransformerConfig, router_statistics
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

jax.config.update("jax_platforms", "cpu")

SMOKE = os.environ.get("SMOKE", "0") == "1"
STEPS, EVERY, BATCH = (4, 2, 4) if SMOKE else (400, 10, 16)
ROWS, HELD_OUT = (64, 16) if SMOKE else (4096, 256)
ROOM = (1.0,) if SMOKE else (0.5, 1.0, 1.5, 2.0)  # capacity factors
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
COLOURS = [f"C{i}" for i in range(10)]


def show(figure):
    """Displays a figure in 256 colours, which keeps the notebook small."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(full).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    IPython.display.display(IPython.display.Image(small.getvalue()))


# %% [markdown]
# ## 1. Many parameters, few of them used
#
# For a token $x$ the router computes one score for each of $E$ experts, picks the $k$ largest, and adds up what these
# experts make of the token:
#
# $$s = \sigma(x W_r) \text{ or } \mathrm{softmax}(x W_r), \qquad
# y = \sum_{e \,\in\, \text{top-}k(s)} w_e\, \mathrm{expert}_e(x), \qquad w_e = \frac{s_e}{\sum_{e'} s_{e'}} .$$
#
# Whether the weights are divided by their sum, whether there is a shared expert that every token goes through, and how
# the top $k$ are found differs between models. In the library these are settings of one layer, and `GATINGS` has those
# of published models. Below: all their parameters, and those that one token meets.


# %%
def parameters(config):
    """(all, of them met by one token); shapes only, nothing is allocated."""
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    leaves = [(jax.tree_util.keystr(path), leaf.size) for path, leaf in jax.tree.leaves_with_path(shapes)]
    routed = sum(size for path, size in leaves if "'moe'" in path and path.endswith(("['gate']", "['up']", "['down']")))
    total = sum(size for _, size in leaves)
    return total, total - routed * (1 - config.experts.top_k / config.experts.experts)


print(f"{'':18}{'experts':>8}{'chosen':>8}{'shared':>8}{'parameters':>14}{'of a token':>13}{'share':>8}")
for make in (presets.mixtral_8x7b, presets.qwen3_30b_a3b, presets.deepseek_v2_lite, presets.deepseek_v3):
    config = make()
    total, active = parameters(config)
    e = config.experts
    print(f"{make.__name__:18}{e.experts:8}{e.top_k:8}{e.shared // e.ffn:8}"
          f"{total / 1e9:12.1f} G{active / 1e9:11.1f} G{active / total:8.0%}")  # fmt: skip

# %% [markdown]
# The more experts, the smaller the part that a token meets: 28 % of Mixtral's, 6 % of DeepSeek-V3's. The arithmetic of
# a token is that of a dense model of the size in the column before. What it does not save is memory, and the saving is
# only real if the experts are used alike: with experts on many devices the busiest one sets the pace.
#
# ## 2. Two ways to keep the load even
#
# Let $f_e$ be the share of all choices that expert $e$ gets and $P_e$ its mean probability. The measure used below is
#
# $$\mathrm{MaxVio} = E \max_e f_e - 1,$$
#
# by how much the busiest expert exceeds the mean (Wang et al. 2024,
# [arXiv 2408.15664](https://arxiv.org/abs/2408.15664)). Zero is perfect, $E / k - 1$ the worst.
#
# **A loss** (Fedus et al. 2021, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961)): add $\alpha E \sum_e f_e P_e$.
# The counts $f$ have no gradient, $P$ has: experts with many choices get smaller scores. But this gradient is not the
# language's, and it pulls on the same weights.
#
# **A bias** (DeepSeek-V3, 2024, [arXiv 2412.19437](https://arxiv.org/abs/2412.19437)): choose by $s_e + b_e$, weigh by
# $s_e$. After every update the bias moves by a fixed rate, up where the load is below the mean and down where it is
# above. The loss has no gradient in $b$, so nothing pulls on anything.
#
# In the library no training loop knows of either. The layer's last operation is `balanced`, which returns its input and
# on the way back lets the gradient of the balance loss join in. The load travels the same road, as what arrives in the
# place of the bias' gradient, scaled by $2^{-80}$ so that no norm notices it; so it adds up over micro-batches and
# devices as gradients do. Looked at:

# %%
gating = MoEConfig(4, 1, 8, score="sigmoid", normalise=True, bias=True)
layer = moe.MoE(gating)
x = jax.random.normal(jax.random.key(0), (1, 40, 16))
variables = layer.init(jax.random.key(1), x)
gradient = jax.grad(lambda v: jnp.sum(layer.apply(v, x) ** 2))(variables)["params"]
seen = layer.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]["statistics"][0]
load = 40 * np.asarray(seen.load)
print("choices of each expert    ", load)
print("less their mean           ", load - load.mean())
print("'gradient' of the bias    ", np.asarray(gradient["bias"]))
print("divided by 2^-80          ", np.asarray(gradient["bias"]) / moe.FAINT)

# %% [markdown]
# The optimizer of `posttrain.update` moves a router's bias by `router_bias_rate` against the sign of that, and all else
# by its rule.
#
# ## 3. Load over training
#
# ### A language with classes
#
# Six classes of six symbols each. The next symbol stays in its class with probability 0.9 and follows the class' own
# order-2 chain; else the class is drawn anew. Classes are not equally frequent: class $c$ has a share like $1 / c$. As
# it is a Markov chain, the least loss that any model can reach is known.

# %%
CLASSES, SYMBOLS, STAY, LENGTH = 6, 6, 0.9, 48
SHARE = 1.0 / np.arange(1, CLASSES + 1)
SHARE /= SHARE.sum()


def language(key):
    """Probabilities of the next symbol given the last two, [V, V, V]; symbol v is of class v // SYMBOLS."""
    chains = [markov.chain(own, symbols=SYMBOLS, order=2, scale=2.5) for own in jax.random.split(key, CLASSES)]
    own, inner = np.divmod(np.arange(CLASSES * SYMBOLS), SYMBOLS)
    inside = jnp.stack(chains)[own[None, :], inner[:, None], inner[None, :]]
    inside = jax.nn.one_hot(own, CLASSES)[None, :, :, None] * inside[:, :, None, :]
    return STAY * inside.reshape(len(own), len(own), -1) + (1 - STAY) * jnp.repeat(SHARE / SYMBOLS, SYMBOLS)


table = language(jax.random.key(0))
least = markov.entropy_rate(table)
tokens = markov.sample(jax.random.key(1), table, rows=ROWS + HELD_OUT, length=LENGTH)
data, held_out = (TokenBatch(x, jnp.ones(x.shape)) for x in (tokens[HELD_OUT:], tokens[:HELD_OUT]))
print(f"{CLASSES * SYMBOLS} symbols; no model gets below {least:.3f} nats a token")
print("share of each class:", " ".join(f"{x:.2f}" for x in np.bincount(np.ravel(tokens) // SYMBOLS) / tokens.size))
print("a row, a letter for the class:", " ".join(f"{'ABCDEF'[v // SYMBOLS]}{v % SYMBOLS + 1}" for v in tokens[3, :24]))

# %% [markdown]
# ### Five runs
#
# A decoder of two layers, each with 16 experts of which a token uses 2. Same start, same data, same rate; only the
# balancing differs. A run is one compiled scan: every few updates it looks at the load of the routers on held-out rows
# (`router_statistics`).

# %%
GATING = MoEConfig(16, 2, 16, score="sigmoid", normalise=True, bias=True)
SETTINGS = {  # coefficient of the loss, rate of the bias
    "nothing": (0.0, 0.0),
    "loss, 0.01": (0.01, 0.0),
    "loss, 0.1": (0.1, 0.0),
    "bias, 0.003": (0.0, 0.003),
    "bias, 0.01": (0.0, 0.01),
}


def config_of(**changes):
    return TransformerConfig(
        vocab_size=CLASSES * SYMBOLS, width=48, layers=2, heads=4, kv_heads=4, ffn=96, max_length=LENGTH, remat="none",
        experts=dataclasses.replace(GATING, **changes),
    )  # fmt: skip


def make_run(coefficient):
    """rate of the bias -> (parameters, statistics over training [looks, layers, ...], loss)."""
    config = config_of(aux_coef=coefficient)
    model = language_model(config)

    def run(rate):
        optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=3e-3, router_bias_rate=rate))
        recipe = sft.make(sft.SFTConfig(batch=BATCH), model, optimizer)

        def some(state, _):
            seen = router_statistics(config, state.params, held_out.tokens[:64])
            state, metrics = jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=EVERY)
            return state, (seen, metrics["train/loss"].mean())

        state = recipe.init(jax.random.key(10), model.init(jax.random.key(20)))
        state, (seen, losses) = jax.lax.scan(some, state, length=STEPS // EVERY)
        return state.params, seen, losses

    return jax.jit(run)


programs = {coefficient: make_run(coefficient) for coefficient, _ in SETTINGS.values()}  # one for each coefficient
runs = {name: programs[coefficient](rate) for name, (coefficient, rate) in SETTINGS.items()}
held_out_loss = jax.jit(lambda params: sft.loss(language_model(config_of()), params, held_out)[0])

print(f"{'':14}{'loss':>8}{'above least':>13}{'MaxVio, layer 1':>18}{'layer 2':>9}   (mean of the last ten looks)")
for name, (params, seen, _) in runs.items():
    loss = float(held_out_loss(params).mean)
    violation = np.asarray(seen.max_violation)[-10:].mean(0)
    print(f"{name:14}{loss:8.3f}{loss - least:13.3f}{violation[0]:18.2f}{violation[1]:9.2f}")

# %%
updates = EVERY * np.arange(STEPS // EVERY)
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
for axis, name in zip(axes, ("nothing", "loss, 0.01", "loss, 0.1", "bias, 0.003"), strict=True):
    load = np.asarray(runs[name][1].load)[:, 1]
    order = np.argsort(-load[-10:].mean(0))
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.95, load.shape[1]))
    axis.stackplot(updates, load[:, order].T, colors=colours, edgecolor="white", linewidth=0.4)
    axis.set(title=name, xlabel="updates", ylim=(0, 1), xlim=(0, updates[-1]))
axes[0].set_ylabel("share of all choices, layer 2")
show(figure)

# %% [markdown]
# Each band is an expert, the busiest at the end lowest. An even load would be sixteen bands of 1/16.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for axis, layer in zip(axes, (0, 1), strict=True):
    for colour, (name, (_, seen, _)) in zip(COLOURS, runs.items(), strict=False):
        axis.plot(updates, np.asarray(seen.max_violation)[:, layer], color=colour, label=name)
    axis.set(title=f"MaxVio, layer {layer + 1}", xlabel="updates")
    axis.grid(alpha=0.3)
axes[0].set_ylim(bottom=0)
axes[1].legend(fontsize=9, ncols=2, loc="upper right")
show(figure)

# %% [markdown]
# With nothing, some experts win early: who is chosen learns, and who has learnt is chosen. In layer 1 the busiest ends
# with four times the mean load (MaxVio 3.07). The loss mends this, slowly with Switch's coefficient 0.01, within one to
# two hundred updates with 0.1; the bias takes about as long or less. Neither gets to zero: each batch is another one,
# and the bias moves by steps of one size, so that it never rests.
#
# The losses say little: all runs end 0.14 to 0.16 nats above the least, and with two other seeds they changed places.
# At this size an uneven load does not cost much loss. What it costs is room and time, of which sections 6 and 7 tell.
# (`benchmarks/moe/balance.md` has a smaller mixture with three seeds.)
#
# ## 4. Which tokens go to which expert
#
# The router's logits of every held-out token, and from them its choices, by flax's `capture_intermediates`. For each
# symbol: which share of its choices goes to which expert?


# %%
@jax.jit
def router_logits(params):
    """Of the held-out tokens, [layers, B, T, E]."""
    of_router = lambda module, _: module.name == "router"
    options = {"capture_intermediates": of_router, "mutable": ["intermediates"]}
    _, found = Transformer(config_of()).apply({"params": params}, held_out.tokens, **options)
    return found["intermediates"]["layers"]["moe"]["router"]["__call__"][0]


def choices(params, layer, **changes):
    """The routing of the held-out tokens in a layer."""
    gating = dataclasses.replace(GATING, **changes)
    return moe.route(gating, router_logits(params)[layer], params["layers"]["moe"]["bias"][layer])


def joint(labels, number, ids):
    """How often a label meets an expert, as shares of all choices [number, E]."""
    counts = np.zeros((number, GATING.experts))
    np.add.at(counts, (np.repeat(np.ravel(labels), GATING.top_k), np.ravel(ids)), 1)
    return counts / counts.sum()


def information(p):
    """Nats that one of the two tells about the other."""
    even = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, even, 1))).sum())


symbols, classes = held_out.tokens, held_out.tokens // SYMBOLS
entropy = -(SHARE * np.log(SHARE)).sum()
start = jax.jit(language_model(config_of()).init)(jax.random.key(20))
print(f"nats that a choice tells about the class, of {entropy:.2f}; and about the symbol")
for name, params in {"before": start, **{name: run[0] for name, run in runs.items()}}.items():
    cells = []
    for layer in (0, 1):
        ids = choices(params, layer).ids
        cells.append(information(joint(classes, CLASSES, ids)))
        cells.append(information(joint(symbols, CLASSES * SYMBOLS, ids)))
    print(f"{name:14} layer 1: {cells[0]:.2f}, {cells[1]:.2f}    layer 2: {cells[2]:.2f}, {cells[3]:.2f}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(11.5, 4.6), sharey=True)
panels = {"before training": start, **{name: runs[name][0] for name in ("nothing", "loss, 0.1", "bias, 0.003")}}
for axis, (name, params) in zip(axes, panels.items(), strict=True):
    p = joint(symbols, CLASSES * SYMBOLS, choices(params, 1).ids)
    of_class = p.reshape(CLASSES, SYMBOLS, -1).sum(1)
    of_class = of_class / of_class.sum(1, keepdims=True)
    order = np.lexsort((-of_class.max(0), of_class.argmax(0)))  # experts by the class that uses them most
    drawn = axis.imshow((p / p.sum(1, keepdims=True))[:, order], aspect="auto", cmap="magma_r", vmin=0, vmax=0.5)
    for c in range(1, CLASSES):
        axis.axhline(c * SYMBOLS - 0.5, color="grey", linewidth=0.6)
    axis.set(title=name, xlabel="experts, sorted", xticks=[])
    axis.spines[:].set_visible(True)
axes[0].set_yticks(SYMBOLS * np.arange(CLASSES) + SYMBOLS / 2 - 0.5)
axes[0].set_yticklabels([f"class {c}\n{share:.0%}" for c, share in zip("ABCDEF", SHARE, strict=True)])
figure.colorbar(drawn, ax=axes, label="share of a symbol's choices, layer 2")
show(figure)

# %% [markdown]
# A router tells symbols apart before it has learnt anything: a random matrix sends a symbol to the same experts nearly
# always, whatever the class (left; 1.61 nats about the symbol, 0.42 about its class). Training turns this round. With
# nothing, a choice of layer 2 tells 0.71 nats about the class and only 1.26 about the symbol: bands appear, experts of
# a class, and the same symbol goes different ways in different contexts.
#
# With the strong loss the load is even, but the bands are blurred: 0.42 nats, no more than before training. To be even
# *in probability* it spreads the frequent class over experts that had others. With the bias the load is as even and the
# bands are the sharpest, 0.81 nats: the frequent class A has several experts of its own, the rare F two. In layer 2
# this order, bias before nothing before the strong loss, was the same with two other seeds.
#
# ## 5. Groups of experts
#
# With experts on many devices a token's choices may lie on as many devices as it has choices, and it must be sent to
# all. DeepSeek-V3 has 256 experts in 8 groups, one group to a node. A token first opens 4 groups, those with the
# largest sum of their two best $s + b$, and chooses its 8 experts in these only. First one token on a small scale, then
# how many groups 4,096 tokens of random scores reach.

# %%
small = MoEConfig(24, 4, 1, score="sigmoid", normalise=True, groups=6, top_groups=2, group_score=2)
logits = 1.5 * jax.random.normal(jax.random.key(4), (24,))
scores = np.asarray(jax.nn.sigmoid(logits))
free = np.asarray(moe.route(dataclasses.replace(small, groups=1, top_groups=1, group_score=1), logits).ids)
limited = np.asarray(moe.route(small, logits).ids)
best_two = np.sort(scores.reshape(6, 4), 1)[:, -2:].sum(1)
opened = np.argsort(-best_two)[:2]

V3 = GATINGS["deepseek_v3"]
WITHOUT = dataclasses.replace(V3, groups=1, top_groups=1, group_score=1)
many = jax.random.normal(jax.random.key(5), (4096, V3.experts))
reached = {}
for name, gating in {"8 groups, 4 opened": V3, "no limit": WITHOUT}.items():
    ids = np.asarray(moe.route(gating, many).ids)
    groups = np.array([len(set(row)) for row in ids // (V3.experts // V3.groups)])
    taken = np.take_along_axis(np.asarray(jax.nn.sigmoid(many)), ids, 1).sum(1).mean()
    reached[name] = groups
    print(f"{name:20} a token reaches {groups.mean():.2f} groups, {groups.max()} at most; scores sum to {taken:.2f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=(3, 2))
place = np.arange(24) + np.arange(24) // 4  # a gap after each group
colour = np.where(np.isin(np.arange(24) // 4, opened), COLOURS[0], "lightgrey")
left.bar(place, scores, color=colour)
left.plot(place[limited], scores[limited] + 0.04, "v", color=COLOURS[0], label="chosen in the opened groups")
left.plot(place[free], scores[free] + 0.1, "v", color=COLOURS[1], label="chosen without groups")
left.set(title="one token: 24 experts, 2 of 6 groups opened", ylabel="score", ylim=(0, 1.3))
left.set_xticks(place.reshape(6, 4).mean(1), [f"{best:.2f}" for best in best_two])
left.set_xlabel("sum of the two best scores of each group")
left.legend(loc="upper center", ncols=2, fontsize=9)
for number, (name, groups) in enumerate(reached.items()):
    shares = np.bincount(groups, minlength=9)[1:] / len(groups)
    right.bar(np.arange(1, 9) + 0.4 * number - 0.2, shares, width=0.4, label=name)
right.set(title="groups that a token reaches (V3's gating)", xlabel="groups", ylabel="share of tokens")
right.legend(fontsize=9)
show(figure)

# %% [markdown]
# On the left, two of the four experts that the token would choose freely lie in closed groups: each is the one good
# expert of its group, and it takes two to open one. On the right, without a limit a token of random scores reaches 5.31
# of the 8 groups, sometimes all; with it never more than 4. What is given up is small: the scores of the chosen sum to
# 7.14 instead of 7.18. Trained scores are not random, but that is the bargain.
#
# ## 6. Limited room
#
# The library's layer drops nothing: tokens are sorted by expert, and each expert takes what comes. Switch and GShard
# gave every expert a fixed room, $\lceil c\,kT / E \rceil$ choices of a row of $T$ tokens, since arrays of fixed shape
# were what the hardware liked; a choice that finds no room is dropped, and the token goes on with what is left.
# `capacity_factor` is $c$. What do the trained networks lose, when room is limited afterwards?

# %%
LIMITED = {"nothing": runs["nothing"][0], "bias, 0.003": runs["bias, 0.003"][0]}
lost = {name: [] for name in LIMITED}
print(f"{'room':>6}{'':4}" + "".join(f"{name + ': dropped':>24}{'loss':>8}" for name in LIMITED))
for c in ROOM:
    limited = config_of(capacity_factor=c)

    @jax.jit
    def with_room(params, limited=limited):
        loss, _ = sft.loss(language_model(limited), params, held_out)
        return router_statistics(limited, params, held_out.tokens).dropped.mean(), loss.mean

    cells = {name: tuple(map(float, with_room(params))) for name, params in LIMITED.items()}
    for name, found in cells.items():
        lost[name].append(found)
    print(f"{c:6.2f}{'':4}" + "".join(f"{dropped:24.1%}{loss:8.3f}" for dropped, loss in cells.values()))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.1))
for colour, (name, params) in zip((COLOURS[0], COLOURS[3]), LIMITED.items(), strict=True):
    axes[0].plot(ROOM, [100 * dropped for dropped, _ in lost[name]], marker="o", color=colour, label=name)
    axes[1].plot(ROOM, [loss for _, loss in lost[name]], marker="o", color=colour)
    axes[1].axhline(float(held_out_loss(params).mean), color=colour, linestyle=":", linewidth=1)
    kept = np.asarray(choices(params, 1, capacity_factor=1.0).kept)
    for slot, style in ((0, "-"), (1, "--")):
        axes[2].plot(100 * (1 - kept[..., slot].mean(0)), style, color=colour, label=f"{name}, choice {slot + 1}")
axes[0].set(title="dropped (%)", xlabel="capacity factor", ylim=(0, None))
axes[1].set(title="loss (dotted: nothing dropped)", xlabel="capacity factor")
axes[2].set(title="dropped by place (%), layer 2, factor 1", xlabel="place in the row")
axes[0].legend(fontsize=9)
axes[2].legend(fontsize=8)
for axis in axes:
    axis.grid(alpha=0.3)
show(figure)

# %% [markdown]
# At factor 1 there is room for as many choices as there are: here 6 for each expert in a row of 48 tokens. The uneven
# router loses 44.5 % of its choices and the loss rises from 1.491 to 1.621. The even one loses 32.0 %, though it is
# even over a batch: a row stays in one class for a while, and in a row its experts are crowded. At factor 2 it is 7.9 %
# against 22.3 %, and the room costs twice the arithmetic, used or not.
#
# On the right is who loses. First choices are served first, in the order of tokens, so the first six tokens never lose
# theirs, and the last ones lose about half; second choices get what is left. What becomes of a token depends on how
# many others stand before it. These networks were trained without drops; one trained with them would learn to live with
# them.
#
# ## 7. What it costs
#
# Equal arithmetic is not equal time. `benchmarks/moe/compare.py` measures one layer, with the gating of a published
# model and its widths divided by 8 or 16, on 512 tokens and one core of a CPU, four ways: sorted by expert (the
# library's); products with one-hot matrices (GShard's, with room 1.25); every expert for every token; and one dense
# layer with the arithmetic of a token's share. The numbers are read from its committed results.

# %%
results = json.loads(Path("../benchmarks/moe/results.json").read_text())
print(f"measured on: {results['about']['processor']}, {results['about']['rounds']} rounds, median CPU time")
rows = {(row["case"], row["pass"], row["form"]): row for row in results["results"]}
cases, forms = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 2))
print(f"{'times the dense layer':22}{'pass':>9}" + "".join(f"{form:>13}" for form in forms[:-1]))
for case in cases:
    for which in ("forward", "both"):
        dense = rows[case, which, "dense layer"]["cpu_ms"]
        ratios = [rows[case, which, form]["cpu_ms"] / dense for form in forms[:-1]]
        print(f"{case:22}{which:>9}" + "".join(f"{ratio:13.1f}" for ratio in ratios))

figure, axes = plt.subplots(1, 2, figsize=(11, 3.2))
for axis, (key, title) in zip(axes, {"cpu_ms": "CPU ms", "temporary_mb": "temporary MB"}.items(), strict=True):
    for number, form in enumerate(forms):
        values = [rows[case, "both", form][key] for case in cases]
        axis.bar(np.arange(len(cases)) + 0.2 * number - 0.3, values, width=0.2, label=form, color=COLOURS[number])
    axis.set_xticks(range(len(cases)), cases, fontsize=9)
    axis.set(title=f"{title}, forward and gradient", yscale="log")
axes[0].legend(fontsize=9, ncols=2)
show(figure)

# %% [markdown]
# Sorted by expert, the layer takes 1.5 to 2.8 times as long as a dense layer of the same arithmetic: rows are sorted,
# gathered and added up, and each product has few rows (512 tokens with 8 choices of 128 experts are 32 rows an expert).
# Products with one-hot matrices take 1.9 to 30.8 times as long; they grow with the experts, not with the choices. Every
# expert for every token takes 4.3 to 26.1 times as long: about what a dense layer with all these parameters would.
#
# So the bargain of a mixture on this machine: the parameters of the green bar for about twice the time of the red one.
# On accelerators the figures are others, as products of few rows and the exchange between devices weigh differently.
#
# ## Try
#
# - `top_k=1` in `GATING`, as Switch: does the load collapse further?
# - `score="softmax"`: the bias then adds to numbers that sum to 1, of about $1 / E$ each. Which rate fits?
# - A shared expert, `shared=16`: what is left for the others to tell apart?
# - In section 5, give the tokens' scores a common part, as trained routers have: which groups stay closed?
#
# The layer is `nets/moe.py`, its kernels `kernels/experts.py` and `kernels/grouped_matmul.py`; over a mesh,
# `jaxrl.parallel.model_on` sends tokens to their experts and back.
