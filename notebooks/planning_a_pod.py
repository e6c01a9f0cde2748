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
# # Planning a 70B GRPO run on a TPU slice, from a laptop
#
# Llama-70B, completions of 1024 tokens after prompts of as many, groups of eight, 512 completions a step, on 512 chips
# of TPU v5p. Does it fit? On which mesh? Where does the time go, and what would more chips or longer answers cost? All
# of that can be known before anyone rents a chip: sizes are arithmetic, and the compiler for the chip runs anywhere.
#
# - **Hardware**: any machine. With the TPU compiler (`pip install --editable "..[aot]"`) the last part compiles the
#   real programs, which takes some minutes; without it that part says so.
# - **Running time**: seconds for what is counted, about five minutes for what is compiled.
# - **Smaller**: with `SMOKE=1` in the environment a small model is planned, and nothing compiled.

# %%
# Install, from a checkout of the repository (remove the #s):
# # %pip install --quiet --editable "..[notebook,aot]"

# %%
import dataclasses
import io
import os

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from jaxrl.display import Display
from jaxrl.plan import chips, command, search
from jaxrl.plan.options import Plan

SMOKE = os.environ.get("SMOKE", "0") == "1"
GIB = 2**30
COLOURS = plt.get_cmap("tab10").colors
RUN = Plan(
    model="llama-70b", topology="v5p:8x8x8", mesh="fsdp=64,tensor=8", task="grpo", batch=512, length=2048, group=8,
    compile=False,
)  # fmt: skip
if SMOKE:
    RUN = dataclasses.replace(RUN, model="qwen3-0.6b", topology="v5p:4x4x4", mesh="fsdp=8,tensor=8", batch=64)


def plan(**changes):
    """The figures of the run with something else in it; `jaxrl plan` prints them as tables."""
    return command.run(
        dataclasses.replace(RUN, **changes), display=Display(Console(file=io.StringIO(), force_jupyter=False))
    )


found = plan()
print(f"{found['parameters']['all']:,} parameters on {found['devices']} chips with "
      f"{found['memory_limit'] / GIB:.1f} GiB each, mesh {found['mesh']}")  # fmt: skip
print("fits" if found["fits"] else "does not fit", f"- the largest batch is {found['largest_batch']:,} completions")

# %% [markdown]
# ## What lies on a chip
#
# Parameters and Adam's two moments in float32 are 12 bytes a parameter, 790 GiB in all, eight times what a chip has;
# divided over the slice they are little. What grows with the batch are the activations that the backward pass needs
# (here each layer's input; the rest is computed again) and, while sampling, the cache of keys and values.


# %%
def bars(axis, rows, *, unit, legend=True):
    """Horizontal stacked bars of {name: {kind: value}}."""
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    left = np.zeros(len(rows))
    for number, kind in enumerate(kinds):
        values = np.array([parts.get(kind, 0.0) for parts in rows.values()])
        axis.barh(list(rows), values, left=left, label=kind, color=COLOURS[number % 10])
        left += values
    axis.set_xlabel(unit)
    axis.invert_yaxis()
    if legend:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


memory = {name: {kind: size / GIB for kind, size in parts.items()} for name, parts in found["memory"].items()}
figure, axis = plt.subplots(figsize=(9, 2.2), layout="constrained")
bars(axis, memory, unit=f"GiB of one chip, which has {found['memory_limit'] / GIB:.1f}")

# %% [markdown]
# ## Where the time goes
#
# Each phase takes at least as long as its slowest resource: multiplying, reading memory, or sending along an axis of
# the mesh. Training is bound by products, as it should be. Drawing tokens on the training mesh is not: every token of
# every row gathers all parameters over `fsdp`, for a handful of rows on each chip.


# %%
def times(figures):
    return {
        name: {"products": one["compute"], "memory": one["memory"], **one["network"]}
        for name, one in figures["phases"].items()
    }


def show(axis, name, figures):
    """Each resource's seconds, phase by phase."""
    phases = times(figures)
    resources = list(dict.fromkeys(key for parts in phases.values() for key in parts))
    for number, resource in enumerate(resources):
        values = [parts.get(resource, np.nan) for parts in phases.values()]
        places = np.arange(len(phases)) + 0.8 * (number + 0.5) / len(resources) - 0.4
        axis.bar(places, values, width=0.8 / len(resources), label=resource, color=COLOURS[number])
    axis.set(yscale="log", ylabel="seconds", title=name)
    axis.set_xticks(range(len(phases)), list(phases))
    axis.legend(frameon=False, fontsize=8)


apart = plan(sampler_mesh="auto")
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
show(axes[0], f"samples where it trains: {found['mesh']}", found)
show(axes[1], f"samples on {apart['sampler_mesh']}", apart)
for name, one in (("one mesh", found), ("two meshes", apart)):
    bound = ", ".join(f"{phase} by {part['bound']}" for phase, part in one["phases"].items())
    print(f"{name:<11} at least {one['step_seconds']:7.1f} s a step; {bound}")

# %% [markdown]
# With a mesh of its own for sampling, on the same chips (weights are laid out anew in between, `--sampler-mesh` of
# `jaxrl train grpo`), drawing tokens reads the parameters from memory and nothing else.
#
# ## Which mesh
#
# All meshes that divide, with all choices of recomputation and micro-batches, take a second to count. Time against
# memory: the lower left is where to be.

# %%
place = chips.topology(RUN.topology)
ways = search.search(command.work_of(RUN, place), place, own_sampler=True)
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
marks = {"none": "o", "dots": "s", "full": "^"}
tensors = sorted({way.work.mesh["tensor"] for way in ways})
for remat, mark in marks.items():
    own = [way for way in ways if way.work.config.remat == remat]
    colours = [COLOURS[tensors.index(way.work.mesh["tensor"]) % 10] for way in own]
    axis.scatter([w.memory / GIB for w in own], [w.seconds for w in own], marker=mark, c=colours, s=18)
    axis.scatter([], [], marker=mark, color="grey", label=f"recomputes {remat}")
for number, tensor in enumerate(tensors):
    axis.scatter([], [], color=COLOURS[number % 10], label=f"tensor={tensor}")
axis.set(yscale="log", xlabel="GiB of a chip", ylabel="seconds of a step, all overlapping")
axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
for way in ways[:5]:
    sizes = ",".join(f"{axis}={n}" for axis, n in way.work.mesh.items() if n > 1)
    print(f"{sizes:<28} recomputes {way.work.config.remat:<5} {way.work.micro_batches} micro-batches  "
          f"{way.memory / GIB:5.1f} GiB  {way.seconds:6.1f} to {way.serial:6.1f} s")  # fmt: skip

# %% [markdown]
# ## What if
#
# Longer answers cost in proportion while reading the parameters, once for every token, outweighs reading the cache. A
# larger batch costs decoding next to nothing, for the same reason: here one could draw eight times as many completions
# before training takes as long as sampling.

# %%
best = ",".join(f"{axis}={n}" for axis, n in ways[0].work.mesh.items() if n > 1)
of_best = dict(mesh=best, sampler_mesh="auto", remat=ways[0].work.config.remat, micro_batches=1)
completions = [256, 512, 1024, 2048, 4096]
batches = [RUN.batch * n for n in (1, 2, 4, 8)]
longer = [plan(**of_best, length=1024 + n, completion=n) for n in completions]
larger = [plan(**of_best, batch=n) for n in batches]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axis, values, figures, what in (
    (axes[0], completions, longer, "tokens of a completion"),
    (axes[1], batches, larger, "completions of a step"),
):
    for number, phase in enumerate(figures[0]["phases"]):
        seconds = [one["phases"][phase]["seconds"] for one in figures]
        axis.plot(values, seconds, "o-", color=COLOURS[number], label=phase)
    axis.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds", xticks=values)
    axis.set_xticks(values, [f"{v:,}" for v in values])
    axis.minorticks_off()
axes[0].legend(frameon=False)
rates = " ".join(f"{batch:,}: {one['tokens_per_second']:,.0f}" for batch, one in zip(batches, larger, strict=True))
print("tokens a second by batch, at most -", rates)

# %% [markdown]
# ## Asking the compiler
#
# Counting can be wrong; the compiler decides. `jaxrl plan` without `--no-compile` compiles the train step, the prefill
# and the decoding step that `jaxrl train grpo` would run, for those chips, and reads memory, FLOPs and collectives out
# of the programs. Loops count as often as they run.

# %%
compiled = plan(**of_best, compile=not SMOKE)
if compiled["not_compiled"]:
    print("not compiled:", compiled["not_compiled"])
for name, one in compiled["compiled"].items():
    if isinstance(one, str):
        print(f"{name}: {one}")
        continue
    counted = compiled["memory"]["train" if name == "train" else "sample"]
    print(f"{name:<8} {one['memory'] / GIB:6.2f} GiB ({sum(counted.values()) / GIB:.2f} counted), "
          f"{one['flops']:.3g} FLOPs a chip, compiled in {one['seconds']:.0f} s")  # fmt: skip
    for kind, size in one["traffic"].items():
        print(f"         {kind}: {size / 1e6:,.0f} MB")

# %% [markdown]
# The same from the command line, with tables in place of pictures:
#
#     jaxrl plan --model llama-70b --topology v5p:8x8x8 --task grpo --batch 512 --search --sampler-mesh auto
