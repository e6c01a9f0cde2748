"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + s P diag(E) Q, with the rank given to the layers that need it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets.adapters.adapted import LINEAR, Adapter, drawn, get, kernels, put
from jaxrl.nets.adapters.low_rank import HIGHEST, graft_pairs


@dataclasses.dataclass(frozen=True)
class AdaLoRAConfig:
    """Ranks and the schedule of the budget."""

    rank: int = 12
    """Rank of every kernel at the start."""
    target_rank: int = 8
    """Mean rank of the kernels at the end."""
    alpha: float = 16.0
    """s = alpha / rank."""
    steps: int = 1000
    """T, updates in all."""
    warmup: int = 100
    """Updates before the budget falls."""
    final: int = 300
    """Updates at the end, with the last choice of what stays."""
    every: int = 10
    """Updates between two choices."""
    sensitivity_decay: float = 0.85
    """beta_1 of the importance."""
    uncertainty_decay: float = 0.85
    """beta_2 of the importance."""
    orthogonality: float = 0.1
    """gamma, the weight of the penalty that keeps P and Q orthogonal."""
    targets: tuple[str, ...] = LINEAR
    """Layers, as in `LoRAConfig`."""
    param_dtype: str = "float32"
    """Storage of the adapter."""

    def __post_init__(self):
        if not 1 <= self.target_rank <= self.rank:
            raise ValueError(f"target_rank is {self.target_rank}; expected 1 to the rank at the start, {self.rank}")
        if min(self.warmup, self.final) < 0 or self.every < 1 or self.warmup + self.final >= self.steps:
            raise ValueError(
                f"warmup is {self.warmup}, final {self.final}, every {self.every} and steps {self.steps}; expected "
                "every of at least 1, and steps left between warm-up and final, where the budget falls"
            )


def adalora(config: AdaLoRAConfig) -> Adapter:
    """The adapter of a config: y = x W + s ((x P) * E) Q, P and Q ~ N(0, 0.02^2), E = 0: the base at the start.

    Parameters of a target: p [L, in, r], e [L, r], q [L, r, out]. Train it with `allocate(config, optimizer)`, which
    brings the penalty and the choice of what stays into any trainer.
    """

    def init(key, model, base):
        return drawn(key, kernels(base, config.targets, who="adalora"), triplets)

    def triplets(key, kernel):
        *stack, rows, columns = kernel.shape
        dtype = jnp.dtype(config.param_dtype)
        draw = lambda key, *shape: 0.02 * jax.random.normal(key, (*stack, *shape), dtype)
        first, second = jax.random.split(key)
        e = jnp.zeros((*stack, config.rank), dtype)
        return {"p": draw(first, rows, config.rank), "e": e, "q": draw(second, config.rank, columns)}

    def ready(model, base, params):
        parts = {}
        for path in kernels(base, config.targets, who="adalora"):
            part = get(params, path)
            scaled = part["e"] * (config.alpha / config.rank)
            parts[path] = {"down": part["p"] * scaled[..., None, :], "up": part["q"], "gain": None}
        return parts

    return Adapter(init, ready, graft_pairs, merges=True)


def budget(config: AdaLoRAConfig, step: Any, *, kernels: int) -> jax.Array:
    """Triplets (a column of P, an entry of E, a row of Q) that may stay after update `step`, counted from 1, int32.

    b_0 up to the warm-up; then b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3, rounded down; b_T in the last t_f
    updates; with b_0 = rank * kernels and b_T = target_rank * kernels.
    """
    first, last = config.rank * kernels, config.target_rank * kernels
    done = (step - config.warmup) / (config.steps - config.warmup - config.final)
    falling = last + (first - last) * (1.0 - jnp.clip(done, 0.0, 1.0)) ** 3
    return jnp.floor(falling + 1e-4).astype(jnp.int32)


def orthogonality(params: Any) -> jax.Array:
    """R = sum over kernels of |P^T P - 1|_F^2 + |Q Q^T - 1|_F^2."""

    def off(x):
        gram = jnp.einsum("...ir,...is->...rs", x, x, precision=HIGHEST)
        eye = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
        return jnp.square(gram - eye).sum()

    parts = _triplets(params).values()
    return jnp.asarray(sum(off(part["p"]) + off(jnp.swapaxes(part["q"], -1, -2)) for part in parts), jnp.float32)


class Transformation(NamedTuple):
    """A gradient transformation as optax has them: `init(params)` and `update(gradient, state, params)`."""

    init: Callable
    update: Callable


class Allocation(NamedTuple):
    """State of `allocate`: the optimizer's, the updates done, smoothed importance, and which triplets stay."""

    inner: Any
    count: jax.Array
    sensitivity: Any
    uncertainty: Any
    kept: dict[str, jax.Array]


def allocate(config: AdaLoRAConfig, optimizer: Any) -> Transformation:
    """An optimizer that trains AdaLoRA's parameters, to be given to any trainer in the place of `optimizer`.

    With g the gradient of the loss + gamma R (`orthogonality`), and for every number w of P, E and Q

        I = |w g|,   S = beta_1 S + (1 - beta_1) I,   U = beta_2 U + (1 - beta_2) |I - S|,   s = S U
        importance of a triplet = s(E_i) + mean of s over the column of P + mean of s over the row of Q

    Every `every` updates the E of all but the `budget` most important triplets of all kernels become 0; they keep
    their gradients and may come back, until the last choice, which stays.

    Args:
      config: that of `adalora`.
      optimizer: an optax transformation.
    """

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        kept = {path: jnp.ones(part["e"].shape, bool) for path, part in _triplets(params).items()}
        return Allocation(optimizer.init(params), jnp.zeros((), jnp.int32), zeros(), zeros(), put({}, kept))

    def update(gradient, state, params):
        penalty = jax.grad(lambda params: config.orthogonality * orthogonality(params))(params)
        gradient = jax.tree.map(jnp.add, gradient, penalty)
        updates, inner = optimizer.update(gradient, state.inner, params)
        smooth = lambda decay: lambda old, new: decay * old + (1.0 - decay) * new
        touched = jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient)
        sensitivity = jax.tree.map(smooth(config.sensitivity_decay), state.sensitivity, touched)
        apart = jax.tree.map(lambda i, s: jnp.abs(i - s), touched, sensitivity)
        uncertainty = jax.tree.map(smooth(config.uncertainty_decay), state.uncertainty, apart)

        count, last = state.count + 1, config.steps - config.final
        due = (count > config.warmup) & (count < last) & (count % config.every == 0) | (count == last)
        scores = importance(jax.tree.map(jnp.multiply, sensitivity, uncertainty))
        matrices = sum(score[..., 0].size for score in scores.values())
        chosen = most_important(scores, budget(config, count, kernels=matrices))
        kept = {path: jnp.where(due, now, get(state.kept, path)) for path, now in chosen.items()}
        changed = {}
        for path, stays in kept.items():
            e, change = get(params, path)["e"], get(updates, path)["e"]
            changed[f"{path}/e"] = jnp.where(stays | ~(due | (count > last)), change, -e)
        return put(updates, changed), Allocation(inner, count, sensitivity, uncertainty, put({}, kept))

    return Transformation(init, update)


def importance(s: Any) -> dict[str, jax.Array]:
    """Importance [L, r] of each kernel's triplets from that of single numbers, a tree like the parameters."""
    return {path: x["e"] + x["p"].mean(-2) + x["q"].mean(-1) for path, x in _triplets(s).items()}


def most_important(scores: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    """Which triplets are among the `count` largest scores of all kernels together; the first of equal ones."""
    flat = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    order = jnp.argsort(-flat, stable=True)
    stays = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < count)
    kept, start = {}, 0
    for path, score in scores.items():
        kept[path] = stays[start : start + score.size].reshape(score.shape)
        start += score.size
    return kept


def _triplets(tree: Any, path: str = "") -> dict[str, dict]:
    """Path of a layer -> its p, e and q."""
    if set(tree) == {"p", "e", "q"}:
        return {path: tree}
    inner = [_triplets(node, f"{path}/{name}" if path else name) for name, node in tree.items()]
    return {path: part for parts in inner for path, part in parts.items()}
