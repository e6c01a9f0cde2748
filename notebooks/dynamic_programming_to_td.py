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
# # From dynamic programming to temporal differences
#
# One small world, and the ways to solve it with less and less knowledge: with its model (**dynamic programming**), with
# whole episodes only (**Monte Carlo**), and with single steps (**temporal differences**). Between them stands
# **stochastic approximation**, which says why averaging noisy numbers as they come in works at all.
#
# The order is that of Zhao, *Mathematical Foundations of Reinforcement Learning* (2025), the last figures are those of
# Sutton and Barto, *Reinforcement Learning* (2018). All methods are pure functions of arrays in `jaxrl.tabular`.
#
# - **Hardware**: any machine; written for 2 CPU cores.
# - **Running time**: about two minutes, most of it compilation.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import io
import os
from functools import partial

import IPython.display
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import PIL.Image

from jaxrl.tabular import dynamic_programming, episodes, gridworld, mdp, monte_carlo
from jaxrl.tabular import stochastic_approximation as sa
from jaxrl.tabular import temporal_difference as td
from jaxrl.tabular.picture import draw_grid

SMOKE = os.environ.get("SMOKE", "0") == "1"
RUNS = 2 if SMOKE else 200
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10}


def show(figure):
    """Displays a figure in 256 colours, which keeps the notebook small."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(full).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    IPython.display.display(IPython.display.Image(small.getvalue()))


# %% [markdown]
# ## The world
#
# Five by five cells. The actions are up, right, down, left and stay. Entering the target (green) pays 1, entering a
# forbidden cell (red) or bumping into the border pays -1, all else 0. Nothing ever ends: at the target the agent
# may stay and collect 1 at each step, so with discount $\gamma = 0.9$ the target is worth $1 / (1 - \gamma) = 10$.
#
# As data this is three arrays: transition probabilities $p(s' \mid s, a)$, rewards $r(s, a, s')$, and the distribution
# of the first state.

# %%
GAMMA = 0.9
layout, world = gridworld.ZHAO, gridworld.grid_world()
harsh = gridworld.grid_world(forbidden_reward=-10.0)
print({name: (x.shape, str(x.dtype)) for name, x in world._asdict().items()})

# %% [markdown]
# ## A policy and its value
#
# The value of a policy obeys the **Bellman equation** $v = r_\pi + \gamma P_\pi v$: 25 linear equations, solved exactly
# by `evaluate_policy`. Here for the policy that moves at random and for the one that always goes right.

# %%
uniform = mdp.uniform_policy(world)
right = mdp.deterministic_policy(world, 1)
figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.4))
for panel, policy, title in zip(axes, (uniform, right), ("at random", "always right"), strict=True):
    draw_grid(layout, mdp.evaluate_policy(world, policy, discount=GAMMA), policy, axes=panel, title=title)
show(figure)

# %% [markdown]
# ## Dynamic programming: the model is known
#
# The optimal value obeys $v = \max_a [r + \gamma P v]$. The right-hand side is a **contraction**: it brings any two
# value functions together by the factor $\gamma$, so iterating it leads to the one solution (*value iteration*).
# *Policy iteration* evaluates each policy to the end before improving it, *truncated* policy iteration by a few sweeps.
# In the library all three are one loop with another way to evaluate.
#
# On the right forbidden cells cost 10 instead of 1, and the best policy walks around them. Where several arrows leave a
# cell they are equally good.

# %%
best = dynamic_programming.value_iteration(world, discount=GAMMA)
careful = dynamic_programming.value_iteration(harsh, discount=GAMMA)
figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.4))
for panel, solution, title in zip(axes, (best, careful), ("forbidden: -1", "forbidden: -10"), strict=True):
    arrows = mdp.greedy(solution.action_values, ties=1e-3)
    draw_grid(layout, solution.values, arrows, axes=panel, title=f"optimal values, {title}")
show(figure)

# %% [markdown]
# How the error falls: each curve is the largest error after so many improvements of the policy. Value iteration (one
# sweep) loses a factor of exactly 0.9 each time; policy iteration needs a handful of improvements, each of which costs
# a linear solve.


# %%
@partial(jax.jit, static_argnames="sweeps")
def errors_of(sweeps):
    """Largest error after each improvement."""

    def improve(v, _):
        v = dynamic_programming.truncated_policy_iteration(
            world, discount=GAMMA, sweeps=sweeps, max_iterations=1, values=v
        ).values
        return v, jnp.abs(v - best.values).max()

    return jax.lax.scan(improve, jnp.zeros(world.states), length=60)[1]


stay = mdp.deterministic_policy(world, 4)
exact = [jnp.abs(mdp.evaluate_policy(world, stay, discount=GAMMA) - best.values).max()]
for number in range(1, 7):
    found = dynamic_programming.policy_iteration(world, stay, discount=GAMMA, max_iterations=number)
    exact.append(jnp.abs(found.values - best.values).max())

figure, panel = plt.subplots(figsize=(6.4, 3.3))
for sweeps in (1, 3, 10):
    panel.semilogy(range(1, 61), errors_of(sweeps), label=f"{sweeps} sweep{'s' * (sweeps > 1)}")
panel.semilogy(range(7), exact, "o-", color="black", markersize=4, label="policy iteration (exact)")
panel.set(xlabel="improvements of the policy", ylabel="largest error", ylim=(1e-4, 50))
panel.legend()
show(figure)

# %% [markdown]
# ## Monte Carlo: no model, whole episodes
#
# Without a model, $q(s, a)$ is still the *mean* of the returns that follow $(s, a)$, and a mean can be estimated.
# **MC Basic** is policy iteration with such means. How long must an episode be? As long as the way to the target:
# cells farther away than that are worth nothing yet. (With one step less than it takes, the corner at the bottom left
# does not know about the target at all.)

# %%
lengths = (2, 4) if SMOKE else (5, 15, 30)
figure, axes = plt.subplots(1, len(lengths), figsize=(9.5, 3.3))
for panel, length in zip(axes, lengths, strict=True):
    found = monte_carlo.basic(harsh, jax.random.key(0), discount=GAMMA, length=length, iterations=16)
    values = found.action_values.max(axis=1)
    draw_grid(layout, values, found.policy, axes=panel, title=f"episodes of {length}", limits=(0, 10))
show(figure)

# %% [markdown]
# Two ways to see every action without starting from every pair: **exploring starts** at random, or a policy that never
# stops exploring, **$\epsilon$-greedy**. The second finds the best among *exploring* policies. With a large $\epsilon$
# that is a different thing: where walking at random is dangerous, the target (surrounded by forbidden cells) is no
# longer worth staying at. Dynamic programming tells what Monte Carlo will converge to.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.3))
for panel, epsilon in zip(axes, (0.0, 0.1, 0.5), strict=True):
    solution = dynamic_programming.value_iteration(harsh, discount=GAMMA, epsilon=epsilon)
    arrows = mdp.greedy(solution.action_values, ties=1e-3)
    draw_grid(layout, solution.values, arrows, axes=panel, title=f"best policy with $\\epsilon$ = {epsilon}")
show(figure)

# %%
epsilon, count = 0.3, 50 if SMOKE else 4000
found = monte_carlo.epsilon_greedy(
    world, jax.random.key(1), discount=GAMMA, episodes=count, length=80, tail=40, epsilon=epsilon
)
limit = dynamic_programming.value_iteration(world, discount=GAMMA, epsilon=epsilon)
reached = mdp.evaluate_policy(world, found.policy, discount=GAMMA)
print(f"after {count} episodes the policy found is at most {jnp.max(limit.values - reached):.2f} below the best one")
print(f"with epsilon = {epsilon}, in cells worth {limit.values.min():.1f} to {limit.values.max():.1f}")

# %% [markdown]
# ## Stochastic approximation: means without waiting
#
# The mean of $x_1, x_2, \dots$ can be had without storing them: $w \leftarrow w - a_k (w - x_k)$ with $a_k = 1/k$. This
# is a case of **Robbins and Monro** (1951): to find the root of $g$ from noisy values of it,
# $w \leftarrow w - a_k \tilde g(w)$. It converges if $\sum a_k = \infty$ (the steps reach far enough) and
# $\sum a_k^2 < \infty$ (the noise dies away); SGD is another case, with $g$ the gradient.
#
# Left: the root of $\tanh(w - 1)$ through noise, for four powers of $1/k$. A constant step size never settles, $1/k^2$
# gives up before it arrives. Right: with steps $1/k$ and $g(w) = w^3 - 5$, nearly all runs fly off to infinity, because
# the conditions hold but $g$ is too steep for the first steps; starting at $1/3$ they all converge.

# %%
STEPS = 100 if SMOKE else 1000


def many(g, first, step_sizes, seed):
    keys = jax.random.split(jax.random.key(seed), RUNS)
    return jax.vmap(lambda key: sa.robbins_monro(g, first, step_sizes, key))(keys)


noisy_tanh = lambda w, key: jnp.tanh(w - 1.0) + jax.random.normal(key)
noisy_cubic = lambda w, key: w**3 - 5.0 + jax.random.normal(key)

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
for number, power in enumerate((0.0, 0.75, 1.0, 2.0)):
    scale = 0.3 if power == 0 else 1.0
    sizes = sa.power_schedule(STEPS, scale=scale, power=power)
    error = jnp.sqrt(jnp.mean((many(noisy_tanh, 3.0, sizes, number) - 1.0) ** 2, axis=0))
    label = "$0.3$" if power == 0 else f"$1/k^{{{power:g}}}$"
    axes[0].loglog(range(1, STEPS + 2), error, label=label + ("" if sa.converges(power) else " (condition fails)"))
axes[0].set(xlabel="step k", ylabel="rms error", title=r"root of $\tanh(w - 1)$")
axes[0].legend(fontsize=8)

root = 5.0 ** (1 / 3)
lost = jnp.mean(~(jnp.abs(many(noisy_cubic, 0.0, sa.power_schedule(STEPS), 5)[:, -1] - root) < 1.0))
paths = many(noisy_cubic, 0.0, sa.power_schedule(STEPS, offset=2.0), 6)
axes[1].semilogx(range(1, STEPS + 2), paths[:30].T, color="tab:blue", alpha=0.3, linewidth=0.8)
axes[1].axhline(root, color="black", linewidth=0.8)
axes[1].set(xlabel="step k", title=r"root of $w^3 - 5$, step sizes $1/(k+2)$", ylim=(0, 3.5))
print(f"with step sizes 1/k {lost:.1%} of {RUNS} runs are lost")
show(figure)

# %% [markdown]
# ## Temporal differences: single steps
#
# Put the Bellman equation where $g$ was and the algorithm is **TD**:
#
# $$v(s) \leftarrow v(s) + \alpha \bigl[r + \gamma v(s') - v(s)\bigr].$$
#
# It learns at every step, from a value that is itself an estimate. For control, the same with $q$; the methods differ
# in the target only, and in the library the target is what is handed in: `control(..., td.sarsa)`.
#
# **Q-learning** learns the optimal values from *any* behaviour that visits everything. Here it watches one episode of
# 100,000 steps taken at random:

# %%
steps = 1000 if SMOKE else 100_000
stream = episodes.sample_stream(world, jax.random.key(7), uniform, steps=steps, discount=GAMMA)
rms = lambda q: jnp.sqrt(jnp.mean((q.max(axis=1) - best.values) ** 2))

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), width_ratios=(1.35, 1))
for first in (0.0, 10.0, 100.0):
    start = jnp.full((world.states, world.actions), first)
    q, error = td.control_from_stream(stream, start, td.q_learning, step_size=0.1, record=rms)
    axes[0].semilogy(range(0, steps, 100), error[::100], label=f"all q = {first:g} at first")
    if first == 10.0:
        learnt = q
axes[0].set(xlabel="step of a random walker", ylabel="rms error of the values", title="off-policy Q-learning")
axes[0].legend()
draw_grid(layout, learnt.max(axis=1), mdp.greedy(learnt, ties=1e-3), axes=axes[1], title="what it learnt")
assert SMOKE or jnp.abs(learnt.max(axis=1) - best.values).max() < 1e-3
show(figure)

# %% [markdown]
# ### Between TD and Monte Carlo
#
# A target may take $n$ rewards before it trusts a value. On a **random walk** of 19 states (left end -1, right end +1)
# neither end of the range is best: $n = 1$ moves news by one state at a time, large $n$ is as noisy as Monte Carlo.
# TD($\lambda$) mixes all $n$ and looks much the same. Each point is an average over many runs; the whole curve is one
# `vmap` over step sizes and seeds.

# %%
walk = gridworld.random_walk()
truth = mdp.evaluate_policy(walk, mdp.uniform_policy(walk), discount=1.0)
walk_error = lambda v: jnp.sqrt(jnp.mean((v - truth)[1:-1] ** 2))
settings = {"discount": 1.0, "episodes": 10, "record": walk_error}


def curve(method, step_sizes, seed=0):
    """Error over the first 10 episodes for each step size, mean over seeds."""
    one = lambda key, size: method(walk, key, mdp.uniform_policy(walk), step_size=size, **settings).record.mean()
    keys = jax.random.split(jax.random.key(seed), RUNS)
    return jax.vmap(lambda size: jax.vmap(one, (0, None))(keys, size).mean())(step_sizes)


figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
sizes = (
    jnp.array([0.2, 0.8]) if SMOKE else jnp.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
)
for n in (1, 2) if SMOKE else (1, 2, 4, 8, 16, 64):
    axes[0].plot(sizes, curve(partial(td.prediction, n=n), sizes), marker=".", label=f"n = {n}")
for lambda_ in (0.4,) if SMOKE else (0.0, 0.4, 0.8, 0.9, 0.95, 1.0):
    error = curve(partial(td.td_lambda, lambda_=lambda_), sizes)
    axes[1].plot(sizes, jnp.where(error < 1, error, jnp.nan), marker=".", label=f"$\\lambda$ = {lambda_:g}")
axes[0].set(title="n-step TD", xlabel="step size", ylabel="rms error, first 10 episodes", ylim=(0.24, 0.56))
axes[1].set(title="TD($\\lambda$), accumulating traces", xlabel="step size")
for panel in axes:
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# ### Learning about one policy, living by another
#
# **Cliff walking**: -1 a step, -100 for falling off (and back to the start). With $\epsilon = 0.1$ the short way along
# the edge is dangerous. Sarsa learns the value of the policy it follows, slips included, and keeps away from the edge.
# Q-learning learns the optimal policy and falls while following it. Expected Sarsa averages over the slips instead of
# sampling them.

# %%
cliff = gridworld.cliff_walking()
EPISODES = 20 if SMOKE else 500
names = {"Sarsa": td.sarsa, "expected Sarsa": td.expected_sarsa, "Q-learning": td.q_learning}
run = {"discount": 1.0, "step_size": 0.5, "epsilon": 0.1, "episodes": EPISODES}
learnt = {}
for number, (name, target) in enumerate(names.items()):
    keys = jax.random.split(jax.random.key(number), RUNS)
    learnt[name] = jax.vmap(lambda key, target=target: td.control(cliff, key, target, **run))(keys)

figure, panel = plt.subplots(figsize=(6.6, 3.4))
window = max(EPISODES // 50, 1)
for name, result in learnt.items():
    mean = result.returns.mean(axis=0)
    panel.plot(jnp.arange(window, EPISODES + 1, window), mean.reshape(-1, window).mean(axis=1), label=name)
    late = result.returns[:, -100:].mean()
    print(f"{name:15} mean return of the last 100 episodes {late:6.1f}")
panel.set(xlabel="episode", ylabel=f"return (mean of {RUNS} runs)", ylim=(-105, -10))
panel.legend(loc="lower right")
show(figure)

# %%
figure, axes = plt.subplots(2, 1, figsize=(8.0, 5.6))
for panel, name in zip(axes, ("Sarsa", "Q-learning"), strict=True):
    q = learnt[name].values.mean(axis=0)
    acted_on = (q != 0).any(axis=1)  # not the goal, nor the cliff
    values = jnp.where(acted_on, q.max(axis=1), jnp.nan)
    arrows = jnp.where(acted_on[:, None], mdp.greedy(q), 0.0)
    draw_grid(gridworld.CLIFF, values, arrows, axes=panel, title=f"{name}: values and greedy moves, mean of the runs")
show(figure)

# %% [markdown]
# ## Try
#
# - `td.control(..., td.tree_backup, n=4)`: $n$ steps, off policy, without importance weights.
# - `td.double_q_learning`: two tables, so that the best of several noisy estimates is not taken at its word.
# - `features=linear.tile_coding(points, tilings=4, tiles=5)` in any of these functions: the values become linear, the
#   formulas stay.
# - `gridworld.Layout(...)`: a world of your own.
