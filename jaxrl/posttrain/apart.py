"""Sampling on one mesh and training on another: the same devices in another layout, or devices of their own.

With devices of their own both work at the same time: while the trainer learns from a batch, the sampler draws the next
one with the policy of `lag` updates ago. JAX dispatches to devices without waiting, so one thread of Python is enough,
and the order of things, and with it the whole run, is always the same.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import parallel
from jaxrl.parallel.mesh import mesh_sizes
from jaxrl.posttrain.adapter import Over
from jaxrl.posttrain.rewards import Scored


class Drawn(NamedTuple):
    """A batch that waits to be learnt from. `version`: updates of the policy that drew it."""

    completions: Any
    rows: jax.Array
    version: jax.Array


@flax.struct.dataclass
class Apart:
    """A run on two meshes as one pytree.

    `train`: the state that learns, on the training mesh. `policy`: what of it the sampler needs, on the sampling mesh.
    `pending`: batches that were drawn and not learnt from, the oldest first.
    """

    train: Any
    policy: Any
    pending: tuple[Drawn, ...]

    @property
    def params(self) -> Any:
        """Those that were trained last."""
        return self.train.params

    @property
    def step(self) -> jax.Array:
        """Iterations done."""
        return self.train.step

    @property
    def skipped(self) -> jax.Array:
        """As in `TrainState`."""
        return self.train.skipped

    @property
    def skipped_in_a_row(self) -> jax.Array:
        """As in `TrainState`."""
        return self.train.skipped_in_a_row


def two_meshes(training: str, sampling: str, *, devices=None) -> tuple[Mesh, Mesh]:
    """A mesh to train on and one to sample on.

    Args:
      training, sampling: as in `parallel.make_mesh`. Either both take all devices, or they add up to them: then the
        first ones train.
      devices: defaults to all devices.

    Raises:
      ValueError: sizes that do neither.
    """
    devices = jax.devices() if devices is None else devices
    first, second = (math.prod(mesh_sizes(spec, len(devices)).values()) for spec in (training, sampling))
    if first == second == len(devices):
        return parallel.make_mesh(training, devices=devices), parallel.make_mesh(sampling, devices=devices)
    if first + second == len(devices):
        return (
            parallel.make_mesh(training, devices=devices[:first]),
            parallel.make_mesh(sampling, devices=devices[first:]),
        )
    raise ValueError(
        f"mesh {training!r} takes {first} devices and the sampler's {sampling!r} takes {second}, of {len(devices)}; "
        "let both take all of them, or share them out so that they add up"
    )


def light(state: Any, dtype: str | None = None) -> Any:
    """A state without what only the trainer needs: optimizer, reference, and digits that `dtype` does not hold."""
    if isinstance(state, Over):
        return Over(state.base, light(state.state))  # adapters are small and scaled before they are rounded
    params = state.params if dtype is None else as_computed(state.params, dtype)
    return dataclasses.replace(state, opt_state=None, reference=None, params=params)


def as_computed(params: Any, dtype: str) -> Any:
    """Parameters with their matrices in the type of the computation, to which each use would round them.

    Norms, biases, routers and random projections, which may be used in float32, stay as they are: the network computes
    the same.
    """

    def rounded(path, x):
        wide = re.search("norm|bias|router|projection", jax.tree_util.keystr(path))
        return x if wide or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(rounded, params)


def _at(fresh: Any, policy: Any) -> Any:
    """A light state that draws on where another stopped."""
    if isinstance(fresh, Over):
        return Over(fresh.base, _at(fresh.state, policy.state))
    return dataclasses.replace(fresh, drawn=policy.drawn)


def shardings(shapes: Apart, train: Callable, policy: Callable, sampling: Mesh) -> Apart:
    """Where an `Apart` lies.

    Args:
      shapes: it, or its shapes.
      train, policy: from a state's shapes to its shardings, on the mesh of each.
      sampling: the mesh to sample on; batches lie whole on all of it.
    """
    everywhere = NamedSharding(sampling, PartitionSpec())
    return Apart(train(shapes.train), policy(shapes.policy), jax.tree.map(lambda _: everywhere, shapes.pending))


def make(
    sample: Callable,
    learn: Callable,
    reward: Callable,
    *,
    place_batch: Callable,
    policy_shardings: Callable,
    lag: int,
    dtype: str | None = None,
) -> tuple[Callable, Callable]:
    """An iteration over two meshes, for `loop.run(..., jit=False)`.

    A batch is learnt from `lag` updates after the policy that drew it; the first few sooner. Correct for it with
    `GRPOConfig.importance_cap`: behaviour log-probs are the sampler's own. (Truncated weights: Espeholt et al. 2018,
    arXiv:1802.01561; between a language model's sampler and trainer: Fu et al. 2025, arXiv:2505.24298.)

    Args:
      sample: `(light state, problems) -> (light state, completions, rows)`, of `grpo.make` with the sampler's model.
      learn: `(state, completions, rewards, rows) -> (state, metrics)`, of `grpo.make` with the trainer's.
      reward: `(completions on the training mesh, rows) -> rewards [B]`, or `rewards.Scored` as for `grpo.hosted`.
      place_batch: puts a batch onto the training mesh.
      policy_shardings: from a light state to its shardings on the sampling mesh. It is copied there, as the trainer's
        own buffers are given away at each update.
      lag: updates between drawing and learning, at least 0.
      dtype: type of the sampler's computation, in which it keeps its matrices; None keeps the trainer's.

    Returns:
      `(begin, step)`: `begin(state, problems) -> Apart` draws the first `lag` batches, `step(Apart, problems) ->
      (Apart, metrics)` also measures `policy/lag`.

    Raises:
      ValueError: a negative lag.
    """
    if lag < 0:
        raise ValueError(f"lag is {lag}; expected 0 (sample, then learn) or a number of updates")
    sample, learn = jax.jit(sample), jax.jit(learn, donate_argnums=0)
    rounded = jax.jit(lambda state: light(state, dtype))

    def place_policy(policy):
        return parallel.relaid(policy, policy_shardings(policy))

    def draw(policy, problems):
        version = policy.step
        policy, completions, rows = sample(policy, problems)
        return policy, Drawn(completions, rows, version)

    def begin(state, problems) -> Apart:
        policy, pending = place_policy(rounded(state)), ()
        for _ in range(lag):
            policy, drawn = draw(policy, problems)
            pending = (*pending, drawn)
        return Apart(state, policy, pending)

    def step(state: Apart, problems):
        policy, drawn = draw(state.policy, problems)
        oldest, *pending = (*state.pending, drawn)
        batch = place_batch(oldest)
        age = jnp.copy(state.train.step)
        given = reward(batch.completions, batch.rows)
        values, parts = given if isinstance(given, Scored) else (given, {})
        train, metrics = learn(state.train, batch.completions, jnp.asarray(values, jnp.float32), batch.rows)
        metrics = metrics | parts | {"policy/lag": (age - batch.version).astype(jnp.float32)}
        return Apart(train, place_policy(_at(rounded(train), policy)), tuple(pending)), metrics

    return begin, step
