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
# # Off-policy control: from Q-learning to SAC
#
# To learn about one policy from what another one did: from old data, from random moves, from a bolder self. There are
# two ways. *Value methods* ask what the best action would be worth, whoever acted; *importance weights* correct for who
# acted.
#
# 1. the maximum of noisy values is too large: double Q-learning
# 2. DQN, and what breaks without replay or without a target network
# 3. importance weights, their price, and off-policy actor-critic
# 4. the deterministic policy gradient
# 5. DDPG, TD3 and SAC on the pendulum
#
# - **Hardware**: any machine; written for 2 CPU cores.
# - **Running time**: two to three minutes, compilation included.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import dataclasses
import io
import itertools
import math
import os

import IPython.display
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

from jaxrl import envs
from jaxrl.agents import continuous, ddpg, dqn, film, off_policy_actor_critic, sac, td3
from jaxrl.agents.evaluate import evaluate
from jaxrl.tabular import dynamic_programming, episodes, gridworld, mdp
from jaxrl.tabular import temporal_difference as td

SMOKE = os.environ.get("SMOKE", "0") == "1"
SEEDS = 1 if SMOKE else 3
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
# ## The maximum is an optimist
#
# Q-learning's target is $r + \gamma \max_a q(s', a)$. Where the $q$ are estimates, the maximum picks the luckiest
# error, and $\mathbb{E} \max_a q \ge \max_a \mathbb{E} q$. **Double Q-learning** (van Hasselt 2010) keeps two tables:
# one chooses the action, the other says what it is worth, and has no part in the first one's luck.
#
# The example is Sutton and Barto's. From A, one action leads to B, the others end the episode with 0. In B, ten actions
# each pay +0.9 or -1.1 with equal chance: on average a *loss* of 0.1.

# %%
A, B, WON, LOST, END = range(5)
transition, reward = np.zeros((5, 10, 5)), np.zeros((5, 10, 5))
transition[A, 0, B], transition[A, 1:, END] = 1.0, 1.0
transition[B, :, WON] = transition[B, :, LOST] = 0.5
reward[B, :, WON], reward[B, :, LOST] = 0.9, -1.1
transition[(WON, LOST, END), :, END] = 1.0
trap = mdp.make_mdp(transition, reward, terminal=[0, 0, 1, 1, 1], start=[1, 0, 0, 0, 0])

single = lambda q: jnp.stack([q[A].argmax() == 0, q[B].max()])
double = lambda q: jnp.stack([q.mean(axis=0)[A].argmax() == 0, q[1, B, q[0, B].argmax()]])
settings = {"discount": 1.0, "step_size": 0.1, "epsilon": 0.1, "episodes": 10 if SMOKE else 400}
learners = {
    "Q-learning": lambda key: td.control(trap, key, td.q_learning, record=single, **settings).record,
    "double Q-learning": lambda key: td.double_q_learning(trap, key, record=double, **settings).record,
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for name, learner in learners.items():
    record = jax.vmap(learner)(jax.random.split(jax.random.key(0), 3 if SMOKE else 1000)).mean(axis=0)
    axes[1].plot(100 * record[:, 0], linewidth=2)
    axes[2].plot(record[:, 1], linewidth=2, label=name)
axes[2].axhline(-0.1, color="black", linestyle=":", label="truth")
axes[1].set(title="runs that prefer B (%)", xlabel="episode", ylim=(0, 100))
axes[2].set(title="what B is believed to be worth", xlabel="episode")
axes[2].legend(fontsize=8)

noise = np.random.default_rng(0).normal(size=(2, 20_000, 100))
counts = np.arange(1, 101)
axes[0].plot(counts, np.maximum.accumulate(noise[0], axis=1).mean(axis=0), linewidth=2, label="max of one set")
chosen = [np.take_along_axis(noise[1], noise[0, :, :n].argmax(axis=1)[:, None], 1).mean() for n in counts]
axes[0].plot(counts, chosen, linewidth=2, label="one set chooses,\nanother values")
axes[0].set(title="n actions, all worth 0, noise 1", xlabel="n")
axes[0].legend(fontsize=8)
show(figure)

# %% [markdown]
# ## DQN
#
# Put a network where the table was, and two things go wrong. Consecutive steps look alike, so the network forgets the
# rest of the world: DQN draws minibatches from a **replay** of old steps, which Q-learning may, being off-policy. And
# the target moves with every update of the network it is to teach: DQN takes it from a **copy** that follows in jumps.
#
# We take away one at a time. All agents of this library are `(state) -> (state, metrics)`, so one function trains them
# all: seeds one after another inside a single program, with greedy test episodes on the way.


# %%
def train(agent, env, *, points, updates, probe=None):
    """Parameters of all seeds, and [seeds, points] of what `probe(params, key)` says (mean greedy return if None)."""

    def returned(params, key):
        return evaluate(agent, env, params, key, episodes=2 if SMOKE else 10).returns.mean()

    def one(key):
        def point(state, number):
            state, rows = jax.lax.scan(lambda state, _: agent.step(state), state, length=updates)
            measured = (probe or returned)(state.params, jax.random.fold_in(key, number))
            return state, (measured, {name: row[-1] for name, row in rows.items()})

        state, curves = jax.lax.scan(point, agent.init(key), jnp.arange(points))
        return state.params, *curves

    return jax.device_get(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), SEEDS)))


def band(panel, steps, curves, label, **style):
    """Mean over seeds, and the range of the seeds."""
    (line,) = panel.plot(steps, curves.mean(axis=0), linewidth=2, label=label, **style)
    panel.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15, linewidth=0)


cartpole = envs.make("CartPole-v1")
points, updates = (2, 1) if SMOKE else (20, 2)
small = {"rounds": 5, "warmup": 20, "hidden": (8,), "batch": 4} if SMOKE else {}
basic = dqn.DQNConfig(
    **({"learning_rate": 1e-3, "warmup": 1_000, "epsilon_steps": 10_000, "target_every": 200} | small)
)
variants = {
    "DQN": basic,
    "no replay": dataclasses.replace(basic, capacity=basic.envs),
    "no target network": dataclasses.replace(basic, target_every=1),
    "double DQN": dataclasses.replace(basic, double=True),
}
if SMOKE:
    variants = {"DQN": basic}

figure, axes = plt.subplots(1, 2, figsize=(10, 3.7))
for name, config in variants.items():
    agent = dqn.make(config, cartpole)
    _, scores, metrics = train(agent, cartpole, points=points, updates=updates)
    steps = agent.env_steps * updates * np.arange(1, points + 1)
    band(axes[0], steps, scores, name)
    band(axes[1], steps, metrics["q/target"], name)
    late = {what: x[:, -5:].mean() for what, x in {"return": scores, "target": metrics["q/target"]}.items()}
    print(f"{name:18} last fifth: return {late['return']:5.0f}, mean target {late['target']:7.1f}")
axes[0].set(title=f"greedy return, {SEEDS} seeds and their range", xlabel="environment steps")
axes[1].axhline(sum(0.99**t for t in range(500)), color="black", linestyle=":", label="largest possible")
axes[1].set(title="mean target value", xlabel="environment steps", ylim=(0, 140))
axes[1].legend(fontsize=8)
show(figure)

# %% [markdown]
# Replay matters most here: ten fresh steps teach little beyond themselves. Without the copy learning is slower, and the
# targets, chasing themselves, run ahead: at 4,000 steps they promise several times what the others do. Double DQN
# changes little on CartPole, where the maximum has only two actions to be lucky with.

# %% [markdown]
# ## Importance weights
#
# The other way to learn from somebody else's actions $a \sim b$: weigh them.
#
# $$\mathbb{E}_{b}[\rho f] = \mathbb{E}_{\pi}[f], \qquad
# \rho = \frac{\pi(a_1 \mid s_1)\, \pi(a_2 \mid s_2) \cdots}{b(a_1 \mid s_1)\, b(a_2 \mid s_2) \cdots}$$
#
# The world of two states (staying pays 1 in state 0 and 2 in state 1, moving nothing) is small enough to list all
# episodes, so that expectation and variance are exact. We ask what $\pi$, which mostly stays, would earn; the episodes
# come from $b$, which tosses a coin.


# %%
def weighted_returns(horizon, stay=0.9):
    """{estimator: (expectation, std)} by listing the 2^(horizon + 1) episodes, and the true value."""
    moves = np.tile(list(itertools.product((0, 1), repeat=horizon)), (2, 1))
    first = np.repeat([0, 1], len(moves) // 2)
    states = (first[:, None] + np.cumsum(moves, axis=1) - moves) % 2
    rewards = np.where(moves == 0, 1.0 + states, 0.0)
    ratio = np.where(moves == 0, stay, 1.0 - stay) / 0.5
    so_far = np.cumprod(ratio, axis=1)
    chance = np.full(len(moves), 0.5 / 2**horizon)
    of = lambda x, p=chance: (p @ x, np.sqrt(p @ x**2 - (p @ x) ** 2))
    return {
        "on policy": of(rewards.sum(axis=1), chance * so_far[:, -1]),
        "whole weight": of(so_far[:, -1] * rewards.sum(axis=1)),
        "weight so far": of((so_far * rewards).sum(axis=1)),
        "each ratio at most 1": of((np.cumprod(np.minimum(ratio, 1.0), axis=1) * rewards).sum(axis=1)),
    }


for name, (mean, std) in weighted_returns(8).items():
    print(f"{name:22} expectation {mean:7.4f}   std {std:7.2f}")

# %% [markdown]
# The product of ratios has expectation 1 and a variance that grows *exponentially* with the length of the episode. A
# reward needs only the weight of the actions before it, which helps a little. Bounding each ratio stops the growth, at
# the price of a large bias. (**V-trace** bounds them where it does less harm, as factors of TD errors: there the bound
# changes which policy's value is learnt, between $b$'s and $\pi$'s, and how fast.)

# %%
horizons = np.arange(1, 6 if SMOKE else 13)
table = [weighted_returns(horizon) for horizon in horizons]
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.3))
for name, colour in zip(table[0], ("black", "tab:red", "tab:orange", "tab:blue"), strict=True):
    style = {"color": colour, "linewidth": 2, "linestyle": ":" if name == "on policy" else "-"}
    axes[0].semilogy(horizons, [row[name][1] for row in table], label=name, **style)
    axes[1].plot(horizons, [row[name][0] for row in table], label=name, **style)
axes[0].set(title="standard deviation of one episode's estimate", xlabel="steps in an episode")
axes[1].set(title="expectation", xlabel="steps in an episode")
axes[0].legend(fontsize=8)
show(figure)

# %% [markdown]
# One step at a time, weights are harmless: $v(s) \leftarrow v(s) + \alpha\, \rho\, [r + \gamma v(s') - v(s)]$ with the
# ratio of a single action. A walker strolls at random through the grid world; we learn what another policy would be
# worth, one that takes the best action in seven cases of ten. Without the ratio one learns the walker's own value.

# %%
grid, GAMMA, STEPS = gridworld.grid_world(), 0.9, 500 if SMOKE else 100_000
best = dynamic_programming.value_iteration(grid, discount=GAMMA)
behaviour = mdp.uniform_policy(grid)
target = mdp.epsilon_greedy(best.action_values, 0.375)
stream = episodes.sample_stream(grid, jax.random.key(1), behaviour, steps=STEPS, discount=GAMMA)
ratios = (target / behaviour)[stream.s_tm1, stream.a_tm1]
truth = {"target policy": target, "walker": behaviour}
truth = {name: mdp.evaluate_policy(grid, policy, discount=GAMMA) for name, policy in truth.items()}


@jax.jit
def prediction(ratios, step_size=0.03):
    """Values after every step of the stream: root mean square distance to both true values."""

    def step(v, now):
        s, r, discount, s_next, rho = now
        v = v.at[s].add(step_size * rho * (r + discount * v[s_next] - v[s]))
        return v, jnp.stack([jnp.sqrt(jnp.mean((v - true) ** 2)) for true in truth.values()])

    steps = (stream.s_tm1, stream.r_t, stream.discount_t, stream.s_t, ratios)
    return jax.lax.scan(step, jnp.zeros(grid.states), steps)[1]


figure, panel = plt.subplots(figsize=(6.8, 3.3))
for colour, (name, rho) in zip(
    ("tab:blue", "tab:red"), {"with ratio": ratios, "without": jnp.ones_like(ratios)}.items(), strict=True
):
    errors = np.asarray(prediction(rho))[:: max(STEPS // 400, 1)]
    for style, which, error in zip(("-", ":"), truth, errors.T, strict=True):
        panel.semilogy(
            np.linspace(0, STEPS, len(error)), error, style, color=colour, label=f"{name}: to {which}'s value"
        )
panel.set(xlabel="steps of the walker", ylabel="rms distance")
panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# **Off-policy actor-critic** (Degris et al. 2012) multiplies the actor's gradient by the same ratio. Here its behaviour
# takes every third action at random. With longer returns (V-trace) it learns faster than with one-step errors.

# %%
points, updates = (2, 1) if SMOKE else (25, 12)
small = {"envs": 2, "steps": 5, "hidden": (8,)} if SMOKE else {}
figure, panel = plt.subplots(figsize=(6.8, 3.3))
for name, vtrace in {"V-trace": True, "one-step errors": False}.items():
    if SMOKE and not vtrace:
        continue
    config = off_policy_actor_critic.OffPolicyActorCriticConfig(explore=0.33, vtrace=vtrace, **small)
    agent = off_policy_actor_critic.make(config, cartpole)
    _, scores, _ = train(agent, cartpole, points=points, updates=updates)
    band(panel, agent.env_steps * updates * np.arange(1, points + 1), scores, name)
panel.set(title=f"CartPole, greedy return, {SEEDS} seeds and their range", xlabel="environment steps")
panel.legend(fontsize=8)
show(figure)

# %% [markdown]
# ## The deterministic policy gradient
#
# With continuous actions there is no table to maximise over. But if $q(s, a)$ is differentiable, its slope says where
# better actions are:
#
# $$\nabla_\theta J = \mathbb{E}_s\bigl[\nabla_a q(s, a)\big|_{a = \mu(s)}\, \nabla_\theta \mu(s)\bigr]$$
#
# (Silver et al. 2014). It is the limit of the stochastic policy gradient as the policy's $\sigma$ goes to zero. The
# *expectation* goes there; the score function's *variance* does not.
#
# One state, $a = \mu + \sigma \epsilon$, and the slope of $\mathbb{E}[q(a)]$ estimated in three ways.

# %%
q_of = lambda a: np.exp(-((a - 1.0) ** 2)) + 0.3 * np.sin(4 * a)
slope_of = lambda a: -2 * (a - 1.0) * np.exp(-((a - 1.0) ** 2)) + 1.2 * np.cos(4 * a)
mu, sigmas = 0.3, np.logspace(-2, 0.3, 30)
epsilon = np.random.default_rng(1).normal(size=(len(sigmas), 100_000))
action = mu + sigmas[:, None] * epsilon
estimators = {
    "score function": q_of(action) * epsilon / sigmas[:, None],
    "score function, baseline $q(\\mu)$": (q_of(action) - q_of(mu)) * epsilon / sigmas[:, None],
    "slope of $q$": slope_of(action),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
a = np.linspace(-1, 3, 200)
axes[0].plot(a, q_of(a), color="tab:gray", linewidth=2)
axes[0].plot(mu, q_of(mu), "o", color="black")
tangent = np.array([-0.5, 0.5])
axes[0].plot(mu + tangent, q_of(mu) + tangent * slope_of(mu), color="black", linewidth=1)
axes[0].set(title="$q(a)$, the slope at $\\mu$", xlabel="a")
for name, estimate in estimators.items():
    axes[1].loglog(sigmas, estimate.std(axis=1), linewidth=2, label=name)
axes[2].semilogx(sigmas, estimators["slope of $q$"].mean(axis=1), color="tab:green", linewidth=2)
axes[2].axhline(slope_of(mu), color="black", linestyle=":")
axes[1].set(title="standard deviation of a sample", xlabel="$\\sigma$")
axes[1].legend(fontsize=8)
axes[2].set(title="expectation, and its limit $q'(\\mu)$", xlabel="$\\sigma$")
show(figure)

# %% [markdown]
# ## DDPG, TD3, SAC
#
# - **DDPG** ([1509.02971](https://arxiv.org/abs/1509.02971)): the deterministic policy gradient with replay and slow
#   copies of actor and critic.
# - **TD3** ([1802.09477](https://arxiv.org/abs/1802.09477)): the actor climbs on the critic's errors, the maximum
#   again. So: two critics, of which the smaller is believed; noise on the target's action; a slower actor.
# - **SAC** ([1801.01290](https://arxiv.org/abs/1801.01290)): a stochastic policy that is paid for its entropy, at a
#   price that is learnt.
#
# The task: swing a pendulum up with too weak a motor. About -1200 is a random policy, -150 as good as it gets. We also
# ask each deterministic agent at the start of an episode what it will earn (discounted), and compare with what it does.

# %%
pendulum = envs.make("Pendulum-v1")
points, updates = (2, 1) if SMOKE else (14, 5)
small = {"rounds": 5, "warmup": 10, "hidden": (8,), "batch": 4} if SMOKE else {"warmup": 500, "batch": 64}
contestants = {
    "DDPG": (ddpg, ddpg.DDPGConfig(**small)),
    "TD3": (td3, td3.TD3Config(**small)),
    "SAC": (sac, sac.SACConfig(**small)),
}
if SMOKE:
    del contestants["DDPG"], contestants["SAC"]


def test_episodes(agent, config, params, key, count=10):
    """Means over episodes of 200 steps: return, discounted return, and what the first critic expected of it."""
    critics = continuous.critics(pendulum, count=config.critics, sizes=config.hidden)
    act = lambda observation: agent.act(params, observation, (), None)[0]

    def episode(key):
        def step(carry, _):
            state, observation = carry
            state, timestep = pendulum.step(key, state, act(observation))
            return (state, timestep.observation), timestep.reward

        state, observation = pendulum.reset(key)
        torque = act(observation) / 2.0  # the critics know actions in [-1, 1]
        belief = critics.apply(params["critic"], observation, torque)[0]
        _, rewards = jax.lax.scan(step, (state, observation), length=200)
        return jnp.stack([rewards.sum(), rewards @ 0.99 ** jnp.arange(200), belief])

    return jax.vmap(episode)(jax.random.split(key, count)).mean(axis=0)


trained, figure = {}, plt.figure(figsize=(11, 3.6))
axes = figure.subplots(1, 2)
for number, (name, (module, config)) in enumerate(contestants.items()):
    agent = module.make(config, pendulum)
    probe = lambda params, key, agent=agent, config=config: test_episodes(agent, config, params, key)
    params, measured, _ = train(agent, pendulum, points=points, updates=updates, probe=probe)
    trained[name] = agent, jax.tree.map(lambda x: x[0], params)
    steps = agent.env_steps * updates * np.arange(1, points + 1)
    band(axes[0], steps, measured[..., 0], name, color=f"C{number}")
    if name != "SAC":
        band(axes[1], steps, measured[..., 2] - measured[..., 1], name, color=f"C{number}")
    print(f"{name:5} last quarter: {measured[:, -4:, 0].mean():6.0f}")
axes[0].set(title=f"greedy return, {SEEDS} seeds and their range", xlabel="environment steps")
axes[1].axhline(0.0, color="black", linestyle=":")
axes[1].set(title="expected at the start, less what was earned", xlabel="environment steps")
axes[0].legend(loc="lower right")
show(figure)

# %% [markdown]
# All three swing it up after a few minutes of the pendulum's time. In a world of costs a fresh critic, which says about
# 0, is an optimist; **right**, both critics come down to earth as they learn. The task is easy enough that DDPG needs
# none of TD3's remedies, and the slower actor of TD3 takes longer. They were made for bodies with many joints.
#
# What was learnt, over the whole state space: the torque for each angle (0 is upright) and velocity, and one episode
# from hanging at rest, white, ending at the circle. Swing with the motion until there is enough energy, then catch.

# %%
side = 15 if SMOKE else 121
angle, velocity = np.meshgrid(np.linspace(-math.pi, math.pi, side), np.linspace(-8, 8, side))
observations = np.stack([np.cos(angle), np.sin(angle), velocity], axis=-1).astype(np.float32)
from_rest = pendulum.reset(jax.random.key(0))[0]
figure, axes = plt.subplots(1, len(trained), figsize=(11, 3.4), sharey=True, squeeze=False)
for panel, (name, (agent, params)) in zip(axes[0], trained.items(), strict=True):
    torque = jax.jit(lambda params, observations, agent=agent: agent.act(params, observations, (), None)[0])
    picture = panel.pcolormesh(angle, velocity, torque(params, observations)[..., 0], cmap="RdBu", vmin=-2, vmax=2)
    path, here = [], (math.pi - 1e-3, 0.0)
    for _ in range(10 if SMOKE else 120):
        path.append(((here[0] + math.pi) % (2 * math.pi) - math.pi, here[1]))
        now = np.array([math.cos(here[0]), math.sin(here[0]), here[1]], np.float32)
        push = float(torque(params, now)[0])
        speed = np.clip(here[1] + 0.05 * (15 * math.sin(here[0]) + 3 * push), -8, 8)
        here = here[0] + 0.05 * speed, speed
    panel.plot(*zip(*path, strict=True), ".", color="white", markersize=4)
    panel.plot(*path[-1], "o", color="yellow", markeredgecolor="black", markersize=9)
    panel.set(title=name, xlabel="angle")
    panel.grid(False)
axes[0, 0].set(ylabel="velocity")
figure.colorbar(picture, ax=axes[0].tolist(), label="torque")
show(figure)

# %%
name, (agent, params) = list(trained.items())[-1]
pictures = film.record(agent, pendulum, params, jax.random.key(4), steps=5 if SMOKE else 100)
figure, axes = plt.subplots(1, 8, figsize=(11, 1.7))
for panel, number in zip(axes, np.linspace(0, len(pictures) - 1, 8).astype(int), strict=True):
    panel.imshow(pictures[number])
    panel.set(xticks=[], yticks=[])
    panel.set_title(f"{name}, {0.05 * number:.1f} s", fontsize=8)
    panel.grid(False)
show(figure)

# %% [markdown]
# ## Try
#
# - `dqn.DQNConfig(prioritised=True, n_step=3, dueling=True, double=True)`: most of Rainbow.
# - `td3.TD3Config(critics=1)`: TD3 without its second critic. Look at the right-hand curve again.
# - `sac.SACConfig(temperature=0.01)`: an agent that hardly explores at first.
# - `from jaxrl.agents import dpg`: the deterministic policy gradient without replay and slow copies, as it was before
#   DDPG.
