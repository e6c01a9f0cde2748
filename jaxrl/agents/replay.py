"""What the agents with replay share: act, remember, draw minibatches, learn; everything but what is learnt.

A step of such an agent is `rounds` rounds in one scan. A round takes `steps` steps in each of `envs` environments, then
makes `updates` updates on minibatches of `batch` transitions drawn from the last `capacity`. Before `warmup`
environment steps it acts uniformly at random and learns nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import devices, interact
from jaxrl.agents.agent import Agent
from jaxrl.buffers import prioritised, ring
from jaxrl.envs.env import Env


class Config(Protocol):
    """What `make` reads of an agent's config."""

    @property
    def envs(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def discount(self) -> Any: ...


class Transition(NamedTuple):
    """What is remembered of a step; `successor` is the true one, before any reset."""

    observation: Any
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    successor: Any


class Batch(NamedTuple):
    """What is learnt from, [U, B, ...] for U updates: reward + discount v(successor) is the target.

    `reward` may be the discounted sum of several, `discount` the matching power, zero where the episode terminated.
    `weights`: of each loss, 1 unless replay is prioritised.
    """

    observation: Any
    action: jax.Array
    reward: jax.Array
    discount: jax.Array
    successor: Any
    weights: jax.Array


class Learnt(NamedTuple):
    """What learning changes. `params`, `target` and `optimizer` are the agent's own; `updates`: int32, made so far."""

    params: Any
    target: Any
    optimizer: Any
    updates: jax.Array


class Learner(NamedTuple):
    """What one agent with replay is beside another.

    `init`: `(key) -> Learnt`.
    `explore`: `(params, observation [N, ...], key, env_steps) -> (action [N, ...], stored [N, ...])`: the action for
    the environments, and the form of it that is remembered. `uniform`: the same before the warm-up's end.
    `noise`: `(key) -> noise` of one update, any pytree; drawn for all rounds at once, which is cheaper.
    `learn`: `(learnt, batch [U, B, ...], noise [U, ...], env_steps before the round, after it) -> (learnt, TD errors
    [U, B], metrics)`.
    `act`: as `Agent.act`.
    `hold`: environment steps through which `explore` and `uniform` get the same key, and so the same noise.
    """

    init: Callable
    explore: Callable
    uniform: Callable
    noise: Callable
    learn: Callable
    act: Callable
    hold: int = 1


class Memory(NamedTuple):
    """What is remembered and how it is drawn.

    `init`: `(transition, slots, streams) -> buffer`. `extend`: `(buffer, transitions [T, N, ...]) -> buffer`. `draw`:
    `(buffer, key, n) -> (transitions [n, length, ...], weights [n], index [n])`. `update`: `(buffer, index [n], TD
    errors [n], learning) -> buffer`, changing nothing unless `learning`. `length`: of the sequences drawn, and so the
    rewards in a target.
    """

    init: Callable
    extend: Callable
    draw: Callable
    update: Callable
    length: int


def uniform(length: int = 1) -> Memory:
    """Uniform replay of sequences of `length`."""

    def draw(buffer, key, n):
        items = ring.sample_sequences(buffer, key, n, length=length)
        return items, jnp.ones(n), jnp.zeros(n, jnp.int32)

    init = lambda item, slots, streams: ring.init(item, slots=slots, streams=streams)
    return Memory(init, ring.extend, draw, lambda buffer, index, errors, learning: buffer, length)


def proportional(
    length: int = 1,
    *,
    alpha: jax.Array | float = 0.6,
    beta: jax.Array | float = 0.4,
    eps: float = 1e-6,
    axis_name: str | None = None,
) -> Memory:
    """Prioritised replay: priorities (|TD error| + eps)^alpha, importance weights to the power of beta.

    With an `axis_name` each device draws by the priorities of its own items and divides weights by its own largest;
    new items get the largest priority of all devices.
    """

    def extend(buffer, items):
        add = lambda buffer, moment: (prioritised.add(buffer, moment, length=length), None)
        return jax.lax.scan(add, buffer, items)[0]

    def update(buffer, index, errors, learning):
        new = (jnp.abs(errors) + eps) ** jnp.asarray(alpha, jnp.float32)
        buffer = prioritised.update(buffer, index, jnp.where(learning, new, prioritised.priorities(buffer, index)))
        return buffer if axis_name is None else buffer._replace(largest=jax.lax.pmax(buffer.largest, axis_name))

    init = lambda item, slots, streams: prioritised.init(item, slots=slots, streams=streams)
    draw = lambda buffer, key, n: prioritised.sample(buffer, key, n, beta=beta, length=length)
    return Memory(init, extend, draw, update, length)


def latest() -> Memory:
    """No replay: what is drawn is all that the ring holds, each transition once. For agents that learn as they go."""

    def draw(buffer, key, n):
        items = jax.tree.map(lambda x: x.reshape(n, 1, *x.shape[2:]), buffer.items)
        return items, jnp.ones(n), jnp.zeros(n, jnp.int32)

    return uniform()._replace(draw=draw)


class State(NamedTuple):
    """All there is of a run with replay.

    `step`: int32, steps done. `key`: never changes; every use folds in the step, the round and a purpose.
    `learnt`: parameters, targets, optimizer. `interaction`: where the environments stand. `buffer`: a `Ring` or
    `Prioritised`.
    """

    step: jax.Array
    key: jax.Array
    learnt: Learnt
    interaction: interact.Interaction
    buffer: Any

    @property
    def params(self) -> Any:
        """What `act` takes."""
        return self.learnt.params


def make(
    env: Env,
    learner: Learner,
    config: Config,
    memory: Memory,
    *,
    constrain: Callable = lambda batch: batch,
    axis_name: str | None = None,
) -> Agent:
    """An agent from its learner.

    Args:
      env: one environment with its time limit.
      learner: see `Learner`.
      config: sizes of a round and of the memory.
      memory: `uniform` or `proportional`. Priorities change once a round, after its updates.
      constrain: puts a `Batch`, leaves [U, B, ...], onto a mesh (`anakin.spread`); the identity on one device.
      axis_name: a mapped axis of devices that learn together. `envs`, `capacity` and `batch` are those of one device;
        environment steps are counted over all of them, as in `warmup`. The learner averages its gradients.

    Raises:
      ValueError: sizes that do not fit each other, or an environment with action masks.
    """
    slots = config.capacity // config.envs
    _check(env, config, memory.length, slots)

    def init(key: jax.Array) -> State:
        purposes = [jax.random.fold_in(jax.random.fold_in(key, 0), purpose) for purpose in (0, 1)]
        learnt = learner.init(purposes[0])
        interaction = interact.begin(env, purposes[1], config.envs)
        _, stored = jax.eval_shape(learner.uniform, learnt.params, interaction.observation, key, 0)
        one = jax.tree.map(lambda x: x[0], interaction.observation)
        flag = jnp.zeros((), bool)
        item = Transition(one, jnp.zeros(stored.shape[1:], stored.dtype), jnp.zeros(()), flag, flag, one)
        return State(jnp.int32(0), key, learnt, interaction, memory.init(item, slots, config.envs))

    def draw(buffer, key) -> tuple[Batch, jax.Array]:
        items, weights, index = memory.draw(buffer, key, config.updates * config.batch)
        collapse = jax.vmap(lambda sequence: n_step_transition(sequence, discount=config.discount))
        batch = Batch(*collapse(items), weights)
        batch = jax.tree.map(lambda x: x.reshape(config.updates, config.batch, *x.shape[1:]), batch)
        return constrain(batch), index

    def noise_keys(key, base, before):
        if learner.hold == 1:
            return jax.random.split(key, config.steps)
        times = before // (config.envs * devices.count(axis_name)) + jnp.arange(config.steps)
        return jax.vmap(lambda time: jax.random.fold_in(base, time // learner.hold))(times)

    def one_round(carry, now):
        learnt, interaction, buffer = carry
        key, base, before, after, learning_noise = now
        act_key, env_key, draw_key = jax.random.split(key, 3)
        env_keys = devices.rows(lambda n: jax.random.split(env_key, n), config.envs, axis_name)
        noise, to_key = interact.key_numbers(noise_keys(act_key, base, before))

        def act(observation, mask, _, noise):
            key = to_key(noise)
            choices = [
                lambda: learner.uniform(learnt.params, observation, key, before),
                lambda: learner.explore(learnt.params, observation, key, before),
            ]
            action, stored = jax.lax.cond(before < config.warmup, *choices)
            return action, (), stored

        interaction, trajectory = interact.collect(env, act, interaction, env_keys, steps=config.steps, noise=noise)
        buffer = memory.extend(buffer, _transitions(trajectory))
        batch, index = draw(buffer, devices.own(draw_key, axis_name))

        def learn():
            return learner.learn(learnt, batch, learning_noise, before, after)

        shapes = jax.eval_shape(learn)

        def skip():
            nothing = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
            return learnt, nothing(shapes[1]), nothing(shapes[2])

        learning = after >= config.warmup
        learnt, errors, metrics = jax.lax.cond(learning, learn, skip)
        buffer = memory.update(buffer, index, errors.reshape(-1), learning)
        return (learnt, interaction, buffer), (_ends(trajectory), learning, metrics)

    def step(state: State, data: Any = None) -> tuple[State, dict[str, jax.Array]]:
        now = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        round_key, noise_key = jax.random.split(now)
        keys = jax.random.split(round_key, config.rounds)
        per_round = config.envs * config.steps * devices.count(axis_name)
        before = (state.step * config.rounds + jnp.arange(config.rounds)) * per_round
        carry = (state.learnt, state.interaction, state.buffer)
        noise_key = devices.own(noise_key, axis_name)
        noise = jax.vmap(learner.noise)(jax.random.split(noise_key, config.rounds * config.updates))
        noise = jax.tree.map(lambda x: x.reshape(config.rounds, config.updates, *x.shape[1:]), noise)
        numbers, to_key = interact.key_numbers(keys)
        base = jax.random.fold_in(state.key, 2)
        play = lambda carry, now: one_round(carry, (to_key(now[0]), base, *now[1:]))
        carry, (ends, learning, metrics) = jax.lax.scan(play, carry, (numbers, before, before + per_round, noise))
        learnt, interaction, buffer = carry
        mean = lambda x: jnp.where(learning, x, 0.0).sum() / learning.sum(dtype=jnp.float32)
        metrics = devices.mean(jax.tree.map(mean, metrics), axis_name)
        metrics = interact.episodes(ends, axis_name=axis_name) | metrics
        return State(state.step + 1, state.key, learnt, interaction, buffer), metrics

    return Agent(init, step, learner.act, lambda: (), config.envs * config.steps * config.rounds)


def n_step_transition(
    sequence: Transition, *, discount: jax.Array | float
) -> tuple[Any, jax.Array, jax.Array, jax.Array, Any]:
    """One transition from L consecutive ones: as many rewards as the episode gave, then a bootstrap.

        R = r_1 + g r_2 + ... + g^(k-1) r_k,     discount = g^k, or 0 if step k terminated

    with k = L, or the step that ended the episode. A truncated episode bootstraps from its true last observation.

    Args:
      sequence: leaves [L, ...].
      discount: g.

    Returns:
      observation, action, R [], discount [], successor: the fields of a `Batch` up to its weights.
    """
    length = sequence.reward.shape[0]
    going = jnp.cumprod(1.0 - (sequence.terminated | sequence.truncated))
    counts = jnp.concatenate([jnp.ones(1), going[:-1]])
    last = counts.sum(dtype=jnp.int32) - 1
    powers = jnp.asarray(discount, jnp.float32) ** jnp.arange(length)
    at = lambda x: x[0] if length == 1 else jax.lax.dynamic_index_in_dim(x, last, keepdims=False)
    first = jax.tree.map(lambda x: x[0], (sequence.observation, sequence.action))
    bootstrap = jnp.where(at(sequence.terminated), 0.0, at(powers) * discount)
    return *first, jnp.sum(powers * counts * sequence.reward), bootstrap, jax.tree.map(at, sequence.successor)


def over_minibatches(update: Callable, learnt: Learnt, batch: Any, noise: Any) -> tuple[Learnt, Any, Any]:
    """Scans `update`: `(learnt, batch [B, ...], noise) -> (learnt, TD errors [B], metrics)` over [U, B, ...].

    Returns:
      learnt, TD errors [U, B], and metrics meant over the updates.
    """

    def one(learnt, now):
        learnt, errors, metrics = update(learnt, *now)
        return learnt, (errors, metrics)

    learnt, (errors, metrics) = jax.lax.scan(one, learnt, (batch, noise))
    return learnt, errors, jax.tree.map(lambda x: x.mean(axis=0), metrics)


def descend(learnt: Learnt, part: str, gradient: Any, optimizer: optax.GradientTransformation) -> Learnt:
    """One update of `params[part]` by its own optimizer."""
    updates, state = optimizer.update(gradient, learnt.optimizer[part], learnt.params[part])
    params = optax.apply_updates(learnt.params[part], updates)
    return learnt._replace(params=learnt.params | {part: params}, optimizer=learnt.optimizer | {part: state})


def polyak(target: Any, params: Any, rate: jax.Array | float) -> Any:
    """(1 - rate) target + rate params, leaf by leaf: 0 keeps the target, 1 copies, both exactly."""
    return jax.tree.map(lambda old, new: (1.0 - rate) * old + rate * new, target, params)


def crossings(before: jax.Array, after: jax.Array, every: int) -> jax.Array:
    """How many multiples of `every` lie in (before, after]: int32.

    A condition such as `steps % every == 0` would miss those that fall between two rounds.
    """
    return after // every - before // every


def _transitions(trajectory: interact.Trajectory) -> Transition:
    return Transition(
        trajectory.observation,
        trajectory.extras,
        trajectory.reward,
        trajectory.terminated,
        trajectory.truncated,
        trajectory.successor,
    )


def _ends(trajectory: interact.Trajectory) -> interact.Trajectory:
    """Only what the metrics of episodes need."""
    return trajectory._replace(observation=(), mask=None, action=(), reward=(), successor=(), extras=())


def _check(env: Env, config: Config, length: int, slots: int) -> None:
    sizes = {name: getattr(config, name) for name in ("envs", "steps", "updates", "batch", "rounds")} | {
        "n_step": length
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    if slots < max(length, config.steps):
        raise ValueError(
            f"capacity is {config.capacity} for {config.envs} environments, {slots} steps of each; expected at least "
            f"{max(length, config.steps)} (the longer of a round's steps and n_step) x {config.envs}"
        )
    if config.warmup < length * config.envs:
        raise ValueError(
            f"warmup is {config.warmup}; expected at least {length * config.envs} environment steps "
            "(n-step length x environments), that there is something to learn from"
        )
    if env.action_mask is not None:
        raise ValueError(
            f"{env.name} has action masks, which agents with replay do not heed: a successor's mask is not remembered; "
            "use ppo or a2c"
        )
