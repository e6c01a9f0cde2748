"""What the on-policy agents share: a state, a rollout with values and advantages, and a gradient step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxrl import returns
from jaxrl.agents import interact, normalise
from jaxrl.agents.networks import Network
from jaxrl.distributions import Categorical, Gaussian
from jaxrl.envs import statistics
from jaxrl.envs.env import Discrete, Env, Space

ACTING, LEARNING, BEGINNING = range(3)
PURPOSES = 3
"""What the random numbers of a step are for. Before the first step: actor, critic, environments."""


class State(NamedTuple):
    """All there is of an on-policy run.

    `step`: int32, updates done. `key`: never changes; every use folds in the step and a purpose. `params`: {"actor",
    "critic", "observations": `Statistics` or ()}. `optimizer`: of actor and critic as one flat vector, which costs far
    fewer small operations than a tree. `interaction`: where the environments
    stand, with the actor's memory. `critic_memory`: [N, *]. `rewards`: a `RewardScale` or ().
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, Any]
    optimizer: Any
    interaction: interact.Interaction
    critic_memory: Any
    rewards: Any


class Batch(NamedTuple):
    """A rollout ready to be learnt from; every leaf is [T, N, ...] but the memories, [N, ...] before the first step.

    `policy` is the distribution acted from, `log_prob` that of the action under it.
    """

    observation: Any
    starts: jax.Array
    mask: jax.Array | None
    action: jax.Array
    policy: Any
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array
    target: jax.Array
    done: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array
    actor_memory: Any
    critic_memory: Any


def init(
    config: Any,
    env: Env,
    actor: Network,
    critic: Network,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    only: str | None = None,
) -> State:
    """The state before the first step, by the config's `envs`, `normalise_observations` and `normalise_rewards`.

    The key is kept. With `only` ("actor" or "critic") the optimizer is that network's, not both's.
    """
    keys = [jax.random.fold_in(key, purpose) for purpose in range(PURPOSES)]
    trained = {"actor": actor.init(keys[0]), "critic": critic.init(keys[1])}
    if config.normalise_observations and isinstance(env.observation_space, Discrete):
        raise ValueError(f"{env.name} observes {env.observation_space}, which cannot be normalised: leave it one-hot")
    observations = statistics.statistics(env.observation_space.shape) if config.normalise_observations else ()
    return State(
        step=jnp.int32(0),
        key=key,
        params=trained | {"observations": observations},
        optimizer=optimizer.init(ravel_pytree(trained[only] if only else trained)[0]),
        interaction=interact.begin(env, keys[2], config.envs, memory=actor.memory()),
        critic_memory=interact.copies(critic.memory(), config.envs),
        rewards=normalise.reward_scale(config.envs) if config.normalise_rewards else (),
    )


def draw_key(state: State, purpose: int) -> jax.Array:
    """The key of the step that comes next, for one purpose."""
    return jax.random.fold_in(state.key, PURPOSES * (state.step + 1) + purpose)


def draw_noise(actions: Space, keys: jax.Array, steps: int) -> jax.Array:
    """Standard noise [T, N, *] for a policy over `actions`; keys [N], one for each environment, are consumed."""
    if isinstance(actions, Discrete):
        return jax.vmap(lambda key: Categorical.noise(key, (steps, actions.n)), out_axes=1)(keys)
    return jax.vmap(lambda key: Gaussian.noise(key, (steps, *actions.shape)), out_axes=1)(keys)


def see(params: dict[str, Any], observation: Any) -> Any:
    """The observation [..., *shape] as the networks get it."""
    seen = params["observations"]
    return observation if seen == () else statistics.normalise(seen, observation)


def allowed(policy: Any, mask: jax.Array | None) -> Any:
    """The policy among allowed actions; only a `Categorical` can have a mask."""
    return policy if mask is None else policy.masked(mask)


def acting(actor: Network) -> Callable:
    """`Agent.act` of a policy network: greedy without a key."""

    def act(params, observation, memory, key=None, mask=None):
        policy, memory = actor.step(params["actor"], see(params, observation), memory)
        policy = allowed(policy, mask)
        if key is None:
            return policy.mode(), memory
        return policy.sample(policy.noise(key, jax.tree.leaves(policy)[0].shape)), memory

    return act


def gather(
    env: Env, actor: Network, state: State, *, steps: int, axis_name: str | None = None
) -> tuple[State, interact.Trajectory, jax.Array]:
    """Acts for T steps in the N environments.

    Every environment has random numbers of its own, so that the samples do not depend on the number of devices.

    Returns:
      The state with the interaction after it, the trajectory with the policies acted from as `extras`, and noise [N, *]
      for one action more of each environment.
    """
    params, n = state.params, state.interaction.episode_return.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
    key = draw_key(state, ACTING)
    noise_keys, env_keys = (
        jax.vmap(lambda i: jax.random.fold_in(key, 2 * i + purpose))(first + jnp.arange(n)) for purpose in range(2)
    )

    def act(observation, mask, memory, noise):
        policy, memory = actor.step(params["actor"], see(params, observation), memory)
        policy = allowed(policy, mask)
        return policy.sample(noise), memory, policy

    noise = draw_noise(env.action_space, noise_keys, steps + 1)
    interaction, trajectory = interact.collect(
        env, act, state.interaction, env_keys, steps=steps, noise=noise[:-1], memory=actor.memory()
    )
    return state._replace(interaction=interaction), trajectory, noise[-1]


def rollout(
    env: Env,
    actor: Network,
    critic: Network,
    state: State,
    *,
    steps: int,
    discount: Any,
    lambda_: Any,
    axis_name: str | None = None,
) -> tuple[State, Batch, dict[str, jax.Array]]:
    """Acts for T steps, then judges them: values, advantages by `returns.gae`, targets.

    The critic runs once over the whole trajectory, and once over the successors: at a truncation that is the true last
    observation of the episode. Observations are those the policy saw, normalised with the statistics it saw them with.

    Returns:
      The state, in which the networks, the optimizer and the step are those of before; the batch; metrics of the
      episodes.
    """
    params, n = state.params, state.interaction.episode_return.shape[0]
    after, trajectory, _ = gather(env, actor, state, steps=steps, axis_name=axis_name)
    seen, successor = see(params, trajectory.observation), see(params, trajectory.successor)
    v_tm1, memories = critic.unroll(params["critic"], seen, trajectory.starts, state.critic_memory)
    v_t, _ = critic.step(params["critic"], successor, memories)
    scale, rewards = scaled(state, trajectory, discount=discount, axis_name=axis_name)
    estimates = jax.vmap(
        lambda *streams: returns.gae(*streams, discount=discount, lambda_=lambda_), in_axes=1, out_axes=1
    )(v_tm1, rewards, v_t, trajectory.terminated, trajectory.truncated)
    batch = Batch(
        observation=seen,
        starts=trajectory.starts,
        mask=trajectory.mask,
        action=trajectory.action,
        policy=trajectory.extras,
        log_prob=trajectory.extras.log_prob(trajectory.action),
        value=v_tm1,
        advantage=estimates.advantages,
        target=estimates.targets,
        done=trajectory.done,
        episode_return=trajectory.episode_return,
        episode_length=trajectory.episode_length,
        actor_memory=state.interaction.memory,
        critic_memory=state.critic_memory,
    )
    last = jax.tree.map(lambda m: m[-1], memories)
    after = after._replace(
        params=params | {"observations": watched(params, trajectory, axis_name=axis_name)},
        critic_memory=interact.where(trajectory.done[-1], interact.copies(critic.memory(), n), last),
        rewards=scale,
    )
    return after, batch, interact.episodes(trajectory, axis_name=axis_name)


def scaled(
    state: State, trajectory: interact.Trajectory, *, discount: Any, axis_name: str | None = None
) -> tuple[Any, jax.Array]:
    """(the scale of rewards after a trajectory, its rewards [T, N] in that scale); (), as they are, without a scale."""
    if state.rewards == ():
        return (), trajectory.reward
    return normalise.scale_rewards(
        state.rewards, trajectory.reward, trajectory.done, discount=discount, axis_name=axis_name
    )


def begin_again(env: Env, actor: Network, critic: Network, state: State, *, axis_name: str | None = None) -> State:
    """The state with all environments at the start of an episode."""
    n = state.interaction.episode_return.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
    keys = jax.vmap(lambda i: jax.random.fold_in(draw_key(state, BEGINNING), i))(first + jnp.arange(n))
    rewards = state.rewards
    return state._replace(
        interaction=interact.begin(env, keys, n, memory=actor.memory()),
        critic_memory=interact.copies(critic.memory(), n),
        rewards=rewards if rewards == () else rewards._replace(returns=jnp.zeros(n)),
    )


def columns(config: Any, whole_streams: bool, minibatches: int) -> int:
    """How many columns a rollout is cut into for minibatches: whole streams, or single steps.

    Raises:
      ValueError: where `minibatches` does not divide them.
    """
    count = config.envs if whole_streams else config.envs * config.steps
    if count % minibatches:
        raise ValueError(
            f"minibatches is {minibatches}, expected a divisor of {count}, the "
            + ("environments (a policy with memory learns from whole streams)" if whole_streams else "envs * steps")
        )
    return count


def single_steps(batch: Batch) -> Batch:
    """A batch [T, N, ...] of networks without memory as one of T * N streams of one step: [1, T * N, ...]."""
    return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)


def mean_over(x: jax.Array, axis_name: str | None, *, total: bool = False) -> jax.Array:
    """The mean (or sum) of all elements, and the mean of that over a mapped axis if one is given."""
    x = x.sum() if total else x.mean()
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def watched(params: dict[str, Any], trajectory: interact.Trajectory, *, axis_name: str | None = None) -> Any:
    """The statistics of observations after a trajectory; () if they are not kept."""
    seen = params["observations"]
    return seen if seen == () else statistics.update(seen, trajectory.observation, axis_name=axis_name)


def descend(
    optimizer: optax.GradientTransformation,
    loss: Callable,
    trained: Any,
    optimizer_state: Any,
    *,
    rate: jax.Array | float,
    axis_name: str | None = None,
) -> tuple[Any, Any, Any]:
    """One gradient step: trained - rate * optimizer(gradient of the loss).

    Args:
      optimizer: gives updates in the direction of the gradient, without a learning rate.
      loss: `(trained) -> (scalar, metrics)`.
      trained, optimizer_state: a pytree of parameters, and the optimizer's state of it.
      rate: the learning rate.
      axis_name: a mapped axis over which gradients and metrics are averaged.

    Returns:
      The new parameters, the new optimizer state, and the metrics.
    """
    gradient, metrics = jax.grad(loss, has_aux=True)(trained)
    if axis_name is not None:
        gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, trained)
    return jax.tree.map(lambda p, u: p - rate * u, trained, updates), optimizer_state, metrics


def learn(
    optimizer: optax.GradientTransformation,
    loss: Callable,
    state: State,
    *,
    rate: jax.Array | float,
    axis_name: str | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One `descend` of a state's networks and one step more; `loss` takes {"actor", "critic"}."""
    flat, unflatten = ravel_pytree(trained(state.params))
    flat, optimizer_state, metrics = descend(
        optimizer, lambda flat: loss(unflatten(flat)), flat, state.optimizer, rate=rate, axis_name=axis_name
    )
    params = state.params | unflatten(flat)
    return state._replace(step=state.step + 1, params=params, optimizer=optimizer_state), metrics


def annealed(rate: jax.Array | float, step: jax.Array, anneal: int) -> jax.Array | float:
    """The learning rate of an update: from `rate` linearly to zero over `anneal` updates; constant if that is 0.

    Raises:
      ValueError: a negative `anneal`; -1 is for `training`, which knows how long a run is.
    """
    if anneal < 0:
        raise ValueError(f"anneal is {anneal}; give the number of updates (only a run of `jaxrl train` knows its own)")
    return rate * jnp.maximum(1.0 - step / anneal, 0.0) if anneal else rate


def trained(params: dict[str, Any]) -> dict[str, Any]:
    """What gradients change: actor and critic."""
    return {name: params[name] for name in ("actor", "critic")}


def means(elements: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The mean of every array of a dict, all of one shape: one reduction in place of many."""
    return dict(zip(elements, jnp.stack([x.reshape(-1) for x in elements.values()]).mean(axis=1), strict=True))


def shuffles(key: jax.Array, n: int, epochs: int) -> jax.Array:
    """Random orders of 0 .. n - 1, one for each epoch: int32 [epochs, n]. The key is consumed.

    Sorts one array of random numbers whose low bits are the index: on CPU that takes a tenth of the time of `argsort`,
    which sorts pairs. Numbers that agree in the other 32 - log2(n) bits stay in order, which no learner will notice.
    """
    width = max(n - 1, 1).bit_length()
    numbers = jax.random.bits(key, (epochs, n), jnp.uint32)
    indices = jnp.broadcast_to(jnp.arange(n, dtype=jnp.uint32), (epochs, n))
    return (jnp.sort((numbers >> width << width) | indices, axis=1) & ((1 << width) - 1)).astype(jnp.int32)


def take(batch: Batch, columns: jax.Array) -> Batch:
    """The columns [B] of a batch [T, N, ...]: [T, B, ...], memories [B, ...]."""
    rows = {name: getattr(batch, name) for name in ("actor_memory", "critic_memory")}
    taken = jax.tree.map(lambda x: x[:, columns], batch._replace(**dict.fromkeys(rows, ())))
    return taken._replace(**jax.tree.map(lambda x: x[columns], rows))
