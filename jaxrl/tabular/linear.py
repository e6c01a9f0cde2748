"""Linear value functions: features of states, and least squares.

Features are arrays [S, D], one row to a state, made from points with coordinates in [0, 1]. TD, Sarsa, Q-learning and
their relatives with linear values are those of `jaxrl.tabular.temporal_difference`, given `features`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.tabular.episodes import Transition
from jaxrl.tabular.mdp import MDP


def polynomial(points: jax.Array, *, order: int) -> jax.Array:
    """All products of powers up to `order` of each coordinate: [..., K] -> [..., (order + 1)^K].

    Two coordinates, order 1: 1, y, x, x y.
    """
    points, exponents = _points(points), _multi_indices(points, order)
    powers = points[..., None, :] ** _like(np.maximum(exponents, 1), points)
    return jnp.prod(jnp.where(_like(exponents, points) == 0, 1.0, powers), axis=-1)


def fourier(points: jax.Array, *, order: int) -> jax.Array:
    """Fourier basis cos(pi c . x), c in {0 .. order}^K (Konidaris et al. 2011): [..., K] -> [..., (order + 1)^K].

    Points belong in [0, 1]: the cosines are even and have period 2.
    """
    points, c = _points(points), _multi_indices(points, order)
    return jnp.cos(jnp.pi * (points[..., None, :] * _like(c, points)).sum(axis=-1))


def tile_coding(points: jax.Array, *, tilings: int, tiles: int) -> jax.Array:
    """Tile coding (Sutton and Barto 2018, 9.5.4): one tile of each tiling is 1, all others 0.

    Tiling i of n is shifted by i / n of a tile times (1, 3, 5, ...), which shows fewer diagonal artefacts than equal
    shifts. A step size of alpha / tilings moves a value by alpha of its error.

    Args:
      points: [..., K] in [0, 1].
      tilings: how many grids, laid over each other.
      tiles: how many tiles of a tiling cover [0, 1] in each coordinate; one more is there for the shift.

    Returns:
      [..., tilings * (tiles + 1)^K] float32.
    """
    if tilings < 1 or tiles < 1:
        raise ValueError(f"{tilings} tilings of {tiles} tiles: expected at least one of each")
    points = _points(points)
    size = points.shape[-1]
    shifts = np.arange(tilings)[:, None] * (2 * np.arange(size) + 1) / tilings % 1.0
    tile = jnp.floor(points[..., None, :] * tiles + _like(shifts, points)).astype(jnp.int32)
    tile = jnp.clip(tile, 0, tiles)
    strides = (tiles + 1) ** np.arange(size)[None, ::-1]
    number = (tile * _like(strides, points).astype(jnp.int32)).sum(axis=-1)
    of_tiling = jax.nn.one_hot(number, (tiles + 1) ** size)
    return of_tiling.reshape(*points.shape[:-1], -1)


def lstd(stream: Transition, features: jax.Array, *, regularisation: jax.Array | float = 0.0) -> jax.Array:
    """Least-squares TD (Bradtke and Barto 1996): the weights at which TD(0) on this stream would not move any more.

        w = (sum phi_tm1 (phi_tm1 - discount_t phi_t)^T + regularisation I)^{-1} sum phi_tm1 r_t

    Args:
      stream: Transition of [T].
      features: [S, D]. With one feature to a state: the values of the model that the stream suggests.
      regularisation: above zero where features are dependent or states have not been visited.

    Returns:
      [D] weights; values are features @ weights.
    """
    _check_features(features)
    now, then = features[stream.s_tm1], features[stream.s_t]
    a = now.T @ (now - stream.discount_t[:, None] * then)
    return jnp.linalg.solve(a + regularisation * jnp.eye(a.shape[0]), now.T @ stream.r_t)


def td_fixed_point(
    mdp: MDP, policy: jax.Array, features: jax.Array, weights: jax.Array, *, discount: jax.Array | float
) -> jax.Array:
    """Where linear TD(0) converges to: LSTD with expectations in place of the stream (Tsitsiklis and Van Roy 1997).

    Args:
      mdp: the model.
      policy: [S, A] that is followed.
      features: [S, D], independent.
      weights: [S] how often each state is visited; `stationary_distribution` on policy.
      discount: gamma.

    Returns:
      [D] weights.
    """
    _check_features(features)
    follows = jnp.where(mdp.terminal[None], 0.0, jnp.einsum("sa,san->sn", policy, mdp.transition))
    rewards = jnp.einsum("sa,san,san->s", policy, mdp.transition, mdp.reward)
    weighted = jnp.where(mdp.terminal, 0.0, weights)[:, None] * features
    return jnp.linalg.solve(weighted.T @ (features - discount * follows @ features), weighted.T @ rewards)


def stationary_distribution(mdp: MDP, policy: jax.Array) -> jax.Array:
    """How often a policy visits each state in the long run, [S]: d = d P_pi, an episode following the other.

    There must be one such distribution only; with two or more sets of states that are never left there are many.
    """
    starts_anew = jnp.where(mdp.terminal[:, None], mdp.start[None], jnp.einsum("sa,san->sn", policy, mdp.transition))
    # What comes in is what is there, and all adds up to one: S + 1 equations, one of them superfluous.
    balance = jnp.concatenate([starts_anew.T - jnp.eye(mdp.states), jnp.ones((1, mdp.states))])
    right = jnp.zeros(mdp.states + 1).at[-1].set(1.0)
    return jnp.linalg.solve(balance.T @ balance, balance.T @ right)


def _points(points) -> jax.Array:
    if jnp.ndim(points) < 1 or jnp.shape(points)[-1] < 1:
        raise ValueError(f"points has shape {jnp.shape(points)}, expected [..., K]: one coordinate is [..., 1]")
    return jnp.asarray(points, jnp.float32)


def _multi_indices(points, order) -> np.ndarray:
    if order < 0:
        raise ValueError(f"order is {order}, expected zero or more")
    return np.array(list(itertools.product(range(order + 1), repeat=jnp.shape(points)[-1])))


def _like(table, points) -> jax.Array:
    """The table [N, K] with as many axes before it as the points have."""
    return jnp.asarray(table, jnp.float32).reshape((1,) * (points.ndim - 1) + np.shape(table))


def _check_features(features):
    if jnp.ndim(features) != 2:
        raise ValueError(f"features has shape {jnp.shape(features)}, expected [S, D]: one row to a state")
