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
# # Policy gradients: from REINFORCE to TRPO and PPO
#
# A policy with parameters $\theta$, a return $J(\theta)$, and the wish to climb. First in a world so small that all of
# its episodes can be listed: there, bias and variance of every estimator are exact numbers. Then on CartPole.
#
# 1. the policy gradient theorem, checked
# 2. variance, and what baselines and critics do about it
# 3. how far to step: natural gradients and trust regions (TRPO)
# 4. the same wish, cheaper: PPO's clip
# 5. all of them on CartPole
#
# - **Hardware**: any machine; written for 2 CPU cores.
# - **Running time**: about a minute and a half, compilation included.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import io
import itertools
import os

import IPython.display
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from jax.flatten_util import ravel_pytree

from jaxrl import envs, losses, returns, statistics
from jaxrl.agents import a2c, film, networks, on_policy, ppo, reinforce, trpo
from jaxrl.agents.evaluate import evaluate
from jaxrl.conjugate_gradient import conjugate_gradient
from jaxrl.tabular import mdp

SMOKE = os.environ.get("SMOKE", "0") == "1"
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
# ## A world of two states
#
# Kakade's (2001): in state 0 *staying* pays 1, in state 1 it pays 2; *moving* to the other state pays nothing. Episodes
# have eight steps and mostly begin in state 0. The best policy moves to state 1 and stays there, but a policy that does
# not know yet how to stay in state 1 is better off in state 0.
#
# The policy has two parameters, $\pi(\text{stay} \mid s) = \sigma(\theta_s)$. There are $2 \cdot 2^8$ episodes: here
# they all are.

# %%
HORIZON = 8
STAY, MOVE = 0, 1
transition = np.stack([np.eye(2), np.eye(2)[::-1]], axis=1)  # [state, action, next state]
world = mdp.make_mdp(transition, reward=[[1.0, 0.0], [2.0, 0.0]], start=[0.8, 0.2])

actions = np.array(list(itertools.product((STAY, MOVE), repeat=HORIZON)))
first = np.repeat([0, 1], len(actions))
actions = np.tile(actions, (2, 1))  # [512, 8]
states = (first[:, None] + np.cumsum(actions, axis=1) - actions) % 2
rewards = np.asarray(world.reward)[states, actions, (states + actions) % 2]


def policy(theta):
    stay = jax.nn.sigmoid(theta)
    return jnp.stack([stay, 1.0 - stay], axis=1)  # [state, action]


@jax.jit
def probabilities(theta):
    """Of all episodes: [512]."""
    return world.start[first] * jnp.prod(policy(theta)[states, actions], axis=1)


def J(theta):
    return probabilities(theta) @ rewards.sum(axis=1)


theta = jnp.array([0.6, -0.4])
print(f"{len(states)} episodes, probabilities add up to {probabilities(theta).sum():.6f}, J = {J(theta):.3f}")

# %% [markdown]
# ## The theorem
#
# $$\nabla J = \sum_t \sum_s d_t(s) \sum_a q_t(s, a)\, \nabla \pi(a \mid s)
# = \mathbb{E}\Bigl[\sum_t q_t(s_t, a_t)\, \nabla \log \pi(a_t \mid s_t)\Bigr]$$
#
# The remarkable part is what is *missing*: $\theta$ also changes which states are visited, and yet no derivative of
# $d_t$ appears. Below: automatic differentiation of $J$ (which knows nothing of the theorem), the theorem's sum, and
# REINFORCE, where the return that followed stands for $q$, averaged over all episodes.


# %%
@jax.jit
def values(theta):
    """v [T + 1, S] and q [T, S, A] with t steps done: Bellman's equation from the end."""

    def back(v, _):
        q = mdp.action_values(world, v, discount=1.0)
        v = (policy(theta) * q).sum(axis=1)
        return v, (v, q)

    _, (v, q) = jax.lax.scan(back, jnp.zeros(2), length=HORIZON, reverse=True)
    return jnp.concatenate([v, jnp.zeros((1, 2))]), q


@jax.jit
def visits(theta):
    """d [T, S]: the distribution of the state at time t."""
    forward = lambda d, _: (jnp.einsum("s,sa,san->n", d, policy(theta), world.transition), d)
    return jax.lax.scan(forward, world.start, length=HORIZON)[1]


v, q = values(theta)
score = jax.jit(jax.jacobian(lambda theta: jnp.log(policy(theta))))(theta)[states, actions]  # grad log pi: [512, T, 2]
rewards_to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]


@jax.jit
def estimates(weights):
    """The gradient estimate of every episode, sum_t weight_t grad log pi: [512, 2]."""
    return (weights[:, :, None] * score).sum(axis=1)


three = {
    "autodiff of J": jax.jit(jax.grad(J))(theta),
    "the theorem": np.einsum("ts,tsa,sap->p", visits(theta), q, jax.jit(jax.jacobian(policy))(theta)),
    "REINFORCE, expected": probabilities(theta) @ estimates(rewards_to_go),
}
for name, gradient in three.items():
    print(f"{name:20} {gradient[0]:+.6f} {gradient[1]:+.6f}")
    assert np.allclose(gradient, three["autodiff of J"], rtol=1e-4)

# %% [markdown]
# ## Variance
#
# All these weights of $\nabla \log \pi(a_t \mid s_t)$ have the same expectation:
#
# | weight | why it is allowed |
# |---|---|
# | whole return $R$ | the log-derivative trick |
# | return to go $G_t$ | an action has no influence on the past |
# | $G_t - v_t(s_t)$ | a baseline that ignores the action: $\mathbb{E}_a[\nabla \log \pi] = 0$ |
# | $r_t + v_{t+1}(s_{t+1}) - v_t(s_t)$ | a critic's TD error, unbiased only if the critic is right |
#
# Each dot is what one episode says the gradient is; the cross is the truth.

# %%
v = np.asarray(v)
v_now, v_next = v[np.arange(HORIZON), states], v[np.arange(1, HORIZON + 1), (states + actions) % 2]
weights = {
    "whole return": np.broadcast_to(rewards.sum(axis=1, keepdims=True), rewards.shape),
    "return to go": rewards_to_go,
    "return to go - v": rewards_to_go - v_now,
    "TD error of the true v": rewards + v_next - v_now,
}
truth, chance = three["autodiff of J"], probabilities(theta)


@jax.jit
def bias_and_std(weights):
    """Exact: length of the bias, root of the summed variances."""
    mean, square = chance @ estimates(weights), chance @ jnp.square(estimates(weights))
    return jnp.linalg.norm(mean - truth), jnp.sqrt((square - mean**2).sum())


random = np.random.default_rng(0)
drawn = random.choice(len(states), 500, p=np.asarray(chance) / chance.sum(dtype=float))
jitter = 0.2 * random.normal(size=(500, 2))
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharex=True, sharey=True)
for panel, (name, weight) in zip(axes, weights.items(), strict=True):
    cloud = np.asarray(estimates(weight))[drawn] + jitter
    panel.plot(*cloud.T, ".", alpha=0.35, markersize=5, markeredgewidth=0)
    panel.plot(*truth, "k+", markersize=14, markeredgewidth=2)
    panel.set(title=f"{name}\nstd {bias_and_std(weight)[1]:.2f}", xlabel=r"$\partial J / \partial \theta_0$")
    assert bias_and_std(weight)[0] < 1e-4
axes[0].set(ylabel=r"$\partial J / \partial \theta_1$", xlim=(-16, 16), ylim=(-10, 20))
show(figure)

# %% [markdown]
# ### The best baseline, and a critic that is wrong
#
# **Left**: one state, three actions, exact $q$. The variance is a parabola in the baseline, with its minimum at
#
# $$b^* = \frac{\sum_a \pi(a)\, |\nabla \log \pi(a)|^2\, q(a)}{\sum_a \pi(a)\, |\nabla \log \pi(a)|^2},$$
#
# which is *not* the value $v = \sum_a \pi(a) q(a)$: rare actions have long score vectors and count for more. But $v$ is
# near enough, and can be learnt.
#
# **Right**: back in the world of eight steps. GAE's $\lambda$ goes from the TD error ($\lambda = 0$) to the return
# minus the critic ($\lambda = 1$). With the true critic $\lambda = 0$ is best. With the critic of *another* policy it
# is biased, and $\lambda$ buys the bias off with variance.

# %%
p_arm, q_arm = np.array([0.75, 0.2, 0.05]), np.array([2.0, 5.0, 4.0])
squared_score = np.square(np.eye(3) - p_arm).sum(axis=1)  # |grad log pi(a)|^2, softmax
gradient_arm = p_arm * (q_arm - p_arm @ q_arm)
variance = lambda b: (p_arm * squared_score) @ (q_arm - b) ** 2 - gradient_arm @ gradient_arm
marks = {
    "$b = 0$": (0.0, "o"),
    "$v$": (p_arm @ q_arm, "s"),
    "$b^*$": ((p_arm * squared_score) @ q_arm / (p_arm @ squared_score), "*"),
}


def gae_weights(critic, lambda_):
    """Advantages of all episodes with a critic [T + 1, S]."""
    never, last = jnp.zeros(HORIZON, bool), jnp.arange(HORIZON) == HORIZON - 1
    now, then = critic[np.arange(HORIZON), states], critic[np.arange(1, HORIZON + 1), (states + actions) % 2]
    one = lambda now, r, then: returns.gae(now, r, then, last, never, discount=1.0, lambda_=lambda_).advantages
    return jax.vmap(one)(now, rewards, then)


lambdas = jnp.linspace(0.0, 1.0, 3 if SMOKE else 21)
bias_by_lambda = jax.jit(lambda critic: jax.vmap(lambda lambda_: bias_and_std(gae_weights(critic, lambda_)))(lambdas))
stale, _ = values(jnp.array([-1.0, 0.8]))
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.3))
grid = np.linspace(-0.5, 8.0, 100)
axes[0].plot(grid, [variance(b) for b in grid], color="tab:gray")
for name, (b, marker) in marks.items():
    axes[0].plot(b, variance(b), marker, markersize=11, label=f"{name}: variance {variance(b):.2f}")
axes[0].set(xlabel="baseline", ylabel="variance of the gradient", title="one state, three actions")
axes[0].legend()
for colour, (name, critic) in zip(("tab:blue", "tab:red"), {"true": v, "another policy's": stale}.items(), strict=True):
    bias, std = bias_by_lambda(critic)
    axes[1].plot(lambdas, std, color=colour, label=f"std, {name} critic")
    axes[1].plot(lambdas, bias, "--", color=colour, label=f"bias, {name} critic")
axes[1].set(xlabel="$\\lambda$", title="generalised advantage estimation")
axes[1].legend(fontsize=8)
show(figure)

# %% [markdown]
# ## How far, and in which metric?
#
# A gradient is the steepest way up *per unit of parameters*. But parameters are arbitrary: what matters is how much the
# **policy** changes, and KL divergence measures that. To second order
# $\mathrm{KL}(\pi_\theta \,\|\, \pi_{\theta + d}) \approx \tfrac12 d^\top F d$ with the **Fisher matrix**
# $F = \mathbb{E}[\nabla \log \pi \, \nabla \log \pi^\top]$, so the steepest way up per unit of policy is the **natural
# gradient** $F^{-1} \nabla J$ (Kakade 2001).
#
# In the world of two states, exactly: the plain gradient (white, then grey) first learns to stay in state 0, hence
# hardly visits state 1, hence learns slowly that it is good to stay there: a detour along the edge of the square. The
# natural gradient divides by how often a state is visited. All steps have the same KL, only the directions differ.


# %%
def fisher(theta):
    score = jax.jacobian(lambda theta: jnp.log(policy(theta)))(theta)[states, actions]
    return jnp.einsum("e,etp,etq->pq", probabilities(theta), score, score)


def climb(theta, direction, *, updates, kl=2e-3):
    """The path [updates, 2] in steps of a constant 1/2 d'Fd, and J along it."""

    def step(theta, _):
        d = direction(theta)
        return theta + d * jnp.sqrt(2 * kl / (d @ fisher(theta) @ d)), theta

    path = jax.lax.scan(step, theta, length=updates)[1]
    return np.asarray(jax.nn.sigmoid(path)), jax.vmap(J)(path)


natural_direction = lambda theta: jnp.linalg.solve(fisher(theta) + 1e-6 * jnp.eye(2), jax.grad(J)(theta))
start, updates = jnp.array([1.2, -1.6]), 20 if SMOKE else 130
paths = {
    "gradient": climb(start, jax.grad(J), updates=updates),
    "natural gradient": climb(start, natural_direction, updates=updates),
}
p = np.linspace(0.005, 0.995, 60)
logits = np.log(p / (1 - p))
height = jax.jit(jax.vmap(J))(np.stack(np.meshgrid(logits, logits), axis=-1).reshape(-1, 2)).reshape(60, 60)

figure, axes = plt.subplots(1, 2, figsize=(9.8, 4.0), width_ratios=(1, 1.1))
hills = axes[0].contourf(p, p, height, levels=24, cmap="viridis")
for colour, (name, (path, climbed)) in zip(("white", "tab:red"), paths.items(), strict=True):
    axes[0].plot(*path.T, color=colour, linewidth=2.2)
    axes[0].plot(*path[::20].T, ".", color=colour, markersize=9)
    axes[1].plot(climbed, color="tab:gray" if colour == "white" else colour, linewidth=2, label=name)
axes[0].plot(*path[0], "o", color="black")
axes[0].set(
    xlabel="probability to stay in state 0", ylabel="probability to stay in state 1", title="J (a dot every 20)"
)
axes[0].grid(False)
figure.colorbar(hills, ax=axes[0])
axes[1].set(xlabel="steps of the same KL", ylabel="J", title="the return on the way")
axes[1].legend()
show(figure)

# %% [markdown]
# ## Trust regions: TRPO
#
# With a network, $F$ has millions of entries, but a solver only asks for products $F v$. Two lines of automatic
# differentiation give them: a forward derivative (jvp) of a reverse one (the gradient of the KL, which is zero at the
# old policy, its Hessian being $F$). **Conjugate gradients** then solve $F x = g$ in ten products.
#
# Take a CartPole policy that is half way, and a rollout of it:

# %%
env = envs.make("CartPole-v1")
spaces, sizes = (env.observation_space, env.action_space), (8,) if SMOKE else (64, 64)
actor, critic = networks.actor(*spaces, sizes=sizes), networks.critic(env.observation_space, sizes=sizes)
agent = a2c.make(a2c.A2CConfig(), env, actor=actor, critic=critic)
max_kl = 0.01


@jax.jit
def half_way(key):
    state, _ = jax.lax.scan(lambda state, _: agent.step(state), agent.init(key), length=1 if SMOKE else 40)
    return state, on_policy.rollout(env, actor, critic, state, steps=8 if SMOKE else 512, discount=0.99, lambda_=0.95)[
        1
    ]


state, batch = half_way(jax.random.key(0))
flat, unflatten = ravel_pytree(state.params["actor"])
advantage = returns.whiten(batch.advantage, jnp.ones_like(batch.advantage, bool))
print(f"{flat.size} parameters, {batch.advantage.size} steps")


def network_policy(flat):
    return actor.unroll(unflatten(flat), batch.observation, batch.starts, ())[0]


def kl(flat_new):
    return jax.lax.stop_gradient(batch.policy).kl(network_policy(flat_new)).mean()


def surrogate(flat_new):
    """mean of ratio * advantage: what a policy near by would earn, by the old one's rollout."""
    ratio = jnp.exp(network_policy(flat_new).log_prob(batch.action) - batch.log_prob)
    return (ratio * advantage).mean()


def fisher_product(flat, v):
    return jax.jvp(jax.grad(kl), (flat,), (v,))[1]


@jax.jit
def gradient_and_products(flat):
    g = jax.grad(surrogate)(flat)
    return g, fisher_product(flat, g), trpo.fisher_product(network_policy, flat)(g)


g, ours, theirs = map(np.asarray, gradient_and_products(flat))
print(f"the library's product differs by {np.abs(ours - theirs).max() / np.abs(theirs).max():.1e} (relative)")

# %% [markdown]
# Now walk along both directions, farther and farther, and compare three things as functions of the KL: the quadratic
# model with the true KL (**left**), the surrogate that TRPO maximises (**middle**), and the return that the policy
# really earns (**right**). Per unit of KL the natural direction gains more. And both surrogates go on rising long after
# the real return has given up: the promise holds near the old policy only. That is what the **trust region** is for.

# %%
damping = 0.1
damped = lambda flat: lambda v: fisher_product(flat, v) + damping * v
x = jax.jit(lambda flat, g: conjugate_gradient(damped(flat), g, iterations=10).x)(flat, g)
directions = {"gradient": g, "natural gradient": x}
models = np.logspace(-4, 0, 4 if SMOKE else 17)  # of 1/2 d'Fd
episodes = 2 if SMOKE else 100


@jax.jit
def walk(flat, d):
    """KL, surrogate and returns [episodes] along a direction."""
    d = d / jnp.sqrt(d @ fisher_product(flat, d))

    def at(model):
        new = flat + jnp.sqrt(2 * model) * d
        params = state.params | {"actor": unflatten(new)}
        earned = evaluate(agent, env, params, jax.random.key(5), episodes=episodes, greedy=False).returns
        return kl(new), surrogate(new) - surrogate(flat), earned

    return jax.lax.map(at, models)


figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
for colour, (name, d) in zip(("tab:gray", "tab:red"), directions.items(), strict=True):
    true_kl, gain, earned = walk(flat, d)
    axes[0].loglog(models, true_kl, ".-", color=colour, label=name)
    axes[1].semilogx(models, gain, ".-", color=colour)
    mean, error = np.mean(earned, axis=1), np.std(earned, axis=1) / episodes**0.5
    axes[2].semilogx(models, mean, ".-", color=colour)
    axes[2].fill_between(models, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, linewidth=0)
axes[0].loglog(models, models, ":", color="black", label=r"model $\frac{1}{2} d^\top F d$")
axes[0].legend(fontsize=8)
for panel, title in zip(axes, ("measured KL", "surrogate", f"return, {episodes} episodes"), strict=True):
    panel.axvline(max_kl, color="tab:green", linewidth=6, alpha=0.3)
    panel.set(title=title, xlabel="step, as KL of the model")
show(figure)

# %% [markdown]
# TRPO (Schulman et al. 2015, [arXiv 1502.05477](https://arxiv.org/abs/1502.05477)) steps to the green line, and
# shortens the step until the *measured* KL is within the bound and the surrogate has grown. In the library that is one
# function of two functions, `trust_region_step`; here for one batch and several bounds. The KL ends up below its
# bound, but not far: most of the region is used.


# %%
def of_policy(policy):
    return (jnp.exp(policy.log_prob(batch.action) - batch.log_prob) * advantage).mean()


step = jax.jit(lambda flat, bound: trpo.trust_region_step(network_policy, of_policy, flat, max_kl=bound)[1])
print("  bound   measured KL   surrogate gain   shortened")
for bound in (0.001, 0.01, 0.1):
    done = step(flat, bound)
    print(f"{bound:7.3f}   {done.kl:11.5f}   {done.gain:14.4f}   {done.backtracks:6d} times")
    assert done.kl <= bound

# %% [markdown]
# ## PPO: the clip
#
# PPO (Schulman et al. 2017, [arXiv 1707.06347](https://arxiv.org/abs/1707.06347)) wants the same with first derivatives
# only. With the ratio $r = \pi(a \mid s) / \pi_{old}(a \mid s)$ it minimises
#
# $$-\min\bigl(r A,\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon)\, A\bigr).$$
#
# Once an action has become likely enough (or unlikely enough), its gradient is zero: nothing more to gain. The minimum
# makes it a pessimist: a ratio that moved the *wrong* way keeps its gradient.
#
# **Right**: many gradient steps on the rollout from above. Without the clip the policy runs away from the data it
# learns from. The clip is no bound on the KL, but a brake.

# %%
ratio = np.linspace(0.0, 2.0, 201)
clipped = jax.jit(jax.value_and_grad(lambda ratio, sign: -losses.policy.clipped_surrogate(ratio, sign)[0]))
clipped = jax.vmap(clipped, (0, None))
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1, 1, 1.4))
for panel, sign in zip(axes, (1.0, -1.0), strict=False):
    objective, slope = clipped(ratio, sign)
    panel.plot(ratio, sign * ratio, ":", color="tab:gray", label="$r A$")
    panel.plot(ratio, objective, color="tab:blue", linewidth=2.5, label="clipped")
    panel.fill_between(
        ratio, *panel.get_ylim(), where=np.asarray(slope) == 0, color="tab:orange", alpha=0.2, label="no gradient"
    )
    panel.plot(1.0, sign, "ko", markersize=5)
    panel.set(title=f"$A = {sign:+.0f}$", xlabel="ratio $r$")
    panel.legend(fontsize=8)


@jax.jit
def run_away(flat, clip):
    """KL after each of many gradient steps on one rollout."""

    def loss(flat):
        ratio = jnp.exp(network_policy(flat).log_prob(batch.action) - batch.log_prob)
        return jnp.maximum(-ratio * advantage, -jnp.clip(ratio, 1 - clip, 1 + clip) * advantage).mean()

    descend = lambda flat, _: (flat - 0.1 * jax.grad(loss)(flat), kl(flat))
    return jax.lax.scan(descend, flat, length=10 if SMOKE else 300)[1]


for clip in (0.1, 0.2, 0.4, 1e6):
    axes[2].semilogy(run_away(flat, clip)[1:], label="no clip" if clip > 1 else f"$\\epsilon$ = {clip}")
axes[2].axhline(max_kl, color="tab:green", linewidth=6, alpha=0.3)
axes[2].set(title="KL(old || new) on one rollout", xlabel="gradient step", ylim=(1e-4, None))
axes[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# ## All of them on CartPole
#
# REINFORCE (with a baseline) waits for the end of episodes and uses each step once. A2C makes one gradient step for
# each short rollout. TRPO and PPO take much more from the same data. Lines are interquartile means over the seeds,
# bands their 95 % bootstrap intervals; the return is that of the exploring policy. (For REINFORCE the steps of whole
# episodes count, which is what it learns from.)

# %%
SEEDS = 1 if SMOKE else 5
BUDGET = 2_000 if SMOKE else 120_000
small = {"envs": 2, "steps": 20, "hidden": (8,)} if SMOKE else {}
contestants = {
    "REINFORCE": (reinforce, reinforce.ReinforceConfig(**small), 160),
    "A2C": (a2c, a2c.A2CConfig(learning_rate=1e-3, **small), None),
    "TRPO": (trpo, trpo.TRPOConfig(**small), None),
    "PPO": (ppo, ppo.PPOConfig(**({"envs": 32, "steps": 32, "learning_rate": 2.5e-3} | small)), None),
}
if SMOKE:
    contestants = {name: contestants[name] for name in ("REINFORCE", "PPO")}


def train(module, config, updates):
    """Agent, parameters of all seeds, and per seed and update: environment steps, mean return, finished episodes."""
    agent = module.make(config, env)
    updates = 2 if SMOKE else updates or BUDGET // agent.env_steps

    def one(key):
        state, rows = jax.lax.scan(lambda state, _: agent.step(state), agent.init(key), length=updates)
        returns, counts = rows["episode/return"], rows["episode/count"]
        used = (
            jnp.cumsum(counts * rows["episode/length"])
            if module is reinforce
            else agent.env_steps * jnp.arange(updates)
        )
        return state.params, used, returns, counts

    return agent, *jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(1), SEEDS))


def binned(steps, returns, counts, edges):
    """Mean return of the episodes that ended between the edges, or the one before where none did."""
    which, curve = np.digitize(steps, edges), []
    for number in range(1, len(edges)):
        here = (which == number) & (counts > 0)
        curve.append(np.average(returns[here], weights=counts[here]) if here.any() else (curve or [20.0])[-1])
    return np.array(curve)


edges = np.linspace(0, BUDGET, 31)
trained, (figure, panel) = {}, plt.subplots(figsize=(8.2, 4.2))
for name, (module, its_config, updates) in contestants.items():
    agent, params, *rows = train(module, its_config, updates)
    trained[name] = agent, jax.tree.map(lambda x: np.asarray(x)[0], params)
    scores = np.stack([binned(*row, edges) for row in zip(*jax.device_get(rows), strict=True)])
    (line,) = panel.plot(edges[1:], statistics.interquartile_mean(scores), linewidth=2, label=name)
    panel.fill_between(edges[1:], *statistics.bootstrap(scores), color=line.get_color(), alpha=0.15, linewidth=0)
    print(f"{name:10} last tenth: {scores[:, -3:].mean():5.0f}")
panel.axhline(500, color="black", linewidth=0.8, linestyle=":")
panel.set(xlabel="environment steps", ylabel="return", title=f"CartPole, {SEEDS} seeds")
panel.legend(fontsize=9)
show(figure)

# %% [markdown]
# A policy before training falls at once; PPO's keeps the pole upright for the whole ten seconds of an episode.

# %%
agent, after = trained["PPO"]
before = jax.jit(agent.init)(jax.random.key(3)).params
length = 10 if SMOKE else 500
figure, axes = plt.subplots(2, 6, figsize=(11, 2.1))
for line, (name, params) in zip(axes, {"before": before, "after": after}.items(), strict=True):
    pictures = film.record(agent, env, params, jax.random.key(9), steps=length)
    for panel, number in zip(line, np.linspace(0, len(pictures) - 1, 6).astype(int), strict=True):
        panel.imshow(pictures[number])
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"{name}, {0.02 * number:.2f} s", fontsize=8)
        panel.grid(False)
show(figure)

# %% [markdown]
# ## Try
#
# - `kl=2e-2` in `climb`: larger steps. Which of the two paths still arrives?
# - `trpo.TRPOConfig(max_kl=0.1)` and `PPOConfig(clip=0.05)`: too bold and too timid.
# - `a2c.A2CConfig(lambda_=0.0)`: the TD error of the textbooks instead of GAE, as in the figure of bias and variance.
# - `envs.make("Pendulum-v1")` with `ppo` and `jaxrl.agents.presets`: the same code with continuous actions.
