"""From a loss to the next state: gradients that add up exactly, clipping, and a guard against non-finite updates."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl.losses.reduce import Weighted
from jaxrl.nets import moe
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain.compact_adam import scale_by_compact_adam


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices, with warm-up, a schedule and a global gradient-norm clip."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    warmup_steps: int = 0
    """Updates over which the rate rises linearly from 0."""
    decay: str = "constant"
    """What follows the warm-up: constant, linear or cosine (both down to `final_fraction` at `decay_steps`), or
    multi_step (31.6 % of the peak from 80 % of `decay_steps` on, 10 % from 90 % on)."""
    decay_steps: int = 0
    """Updates, the warm-up included, after which the decay has ended; with multi_step all updates of the run."""
    final_fraction: float = 0.0
    """Rate at the end of the decay, as a fraction of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; on matrices only, never on norms and biases."""
    max_grad_norm: float = 1.0
    """Global norm above which gradients are scaled down; 0 leaves them."""
    state: str = "float32"
    """How the two moments are kept: float32 (8 bytes a parameter), bfloat16 (4) or int8 (about 2, in blocks)."""
    kind: str = "adamw"
    """adamw, or muon: matrices of layers by Muon, embeddings, heads, norms and biases by AdamW."""
    muon_momentum: float = 0.95
    """Decay of Muon's (Nesterov) momentum."""
    router_bias_rate: float = 1e-3
    """What a router's bias moves by in an update: up for experts with less than the mean load, down for the others."""

    def __post_init__(self):
        if self.learning_rate < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, warmup_steps {self.warmup_steps} and weight_decay "
                f"{self.weight_decay}; expected at least 0"
            )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The schedule of a config: update count -> learning rate."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    after = config.decay_steps - config.warmup_steps
    if config.decay == "constant":
        decay = optax.constant_schedule(peak)
    elif config.decay not in ("linear", "cosine", "multi_step"):
        raise ValueError(f"optimizer decay is {config.decay!r}; expected constant, linear, cosine or multi_step")
    elif after <= 0:
        raise ValueError(
            f"optimizer decay_steps is {config.decay_steps} with warmup_steps {config.warmup_steps}; "
            "a decay needs decay_steps larger than warmup_steps"
        )
    elif config.decay == "linear":
        decay = optax.linear_schedule(peak, final, after)
    elif config.decay == "multi_step":
        decay = multi_step(peak, config.decay_steps, start=config.warmup_steps)
    else:
        decay = optax.cosine_decay_schedule(peak, after, config.final_fraction)
    if config.warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup_steps), decay], [config.warmup_steps])


def multi_step(peak: float, steps: int, *, start: int = 0) -> optax.Schedule:
    """DeepSeek LLM's schedule after its warm-up (2024, arXiv 2401.02954, section 2.3): update count -> learning rate.

    The peak, times 0.316 from 80 % of all `steps` on, times 0.1 from 90 % on. Updates are counted from `start`, where
    the warm-up (2000 in the paper) ends. 0.316 is sqrt(0.1).
    """
    borders = [round(share * steps) - start for share in (0.8, 0.9)]
    if borders[0] < 1:
        raise ValueError(
            f"multi_step: {steps} updates, of which {start} are the warm-up, are over it at 80 %; "
            "give more updates or a shorter warm-up"
        )
    return optax.piecewise_constant_schedule(peak, {borders[0]: 0.316, borders[1]: 0.1 / 0.316})


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW or Muon as the config says. The gradient clip belongs to `apply_gradients`, which knows the norm already.

    Raises:
      ValueError: an unknown kind, decay or state.
    """
    matrices = lambda params: jax.tree_util.tree_map_with_path(lambda path, p: not _is_vector(path, p), params)
    rule = scale_by_compact_adam(b1=config.b1, b2=config.b2, eps=config.eps, state=config.state)
    if config.kind == "muon":
        muon = scale_by_muon(momentum=config.muon_momentum)
        rule = optax.partition({"muon": muon, "adam": rule}, _muon_or_adam)
    elif config.kind != "adamw":
        raise ValueError(f"optimizer kind is {config.kind!r}; expected adamw or muon")
    chain = optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay, matrices),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    return _balancing(chain, config.router_bias_rate)


def scale_by_muon(*, momentum: float = 0.95) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024), scaled as by Liu et al. (2025, arXiv 2502.16982), for trees of matrices.

        M <- momentum M + (1 - momentum) G;   update = 0.2 sqrt(max(in, out)) orthogonalised(Nesterov(M))

    by five Newton-Schulz steps of `optax.contrib.scale_by_muon`. Every matrix of a stack, [L, in, out] or
    [L, E, in, out], is orthogonalised by itself; the factor makes a root mean square of about 0.2, AdamW's. The mean of
    gradients, where the papers have a sum, and its bias correction change the scale alone, which is divided out.
    """
    last = optax.contrib.MuonDimensionNumbers(-2, -1)
    each = lambda tree: jax.tree.map(lambda _: last, tree)
    scale = lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)
    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=each), optax.stateless(scale)
    )


def _is_vector(path, p) -> bool:
    return p.ndim < 2 or jax.tree_util.keystr(path[-1:], simple=True) in ("scale", "bias", "projection")


def _muon_or_adam(params):
    """ "muon" for matrices that map features to features, "adam" for the rest."""
    tables = ("embed", "embedding", "position_embed", "type_embed", "unembed")
    ends = (*tables, "head", "masked", "pooled", "pair", "classes", "replaced", "replaced_hidden")

    def one(path, p):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return "adam" if _is_vector(path, p) or any(part in ends for part in parts) else "muon"

    return jax.tree_util.tree_map_with_path(one, params)


def _balancing(optimizer: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """The optimizer, but a router's bias, whose gradient is load (`nets.moe.balanced`), moves by the rate against it.

    (Wang et al. 2024, arXiv:2408.15664, algorithm 1.)
    """

    def update(updates, state, params=None):
        gradient = updates
        updates, state = optimizer.update(gradient, state, params)

        def one(path, load, update):
            bias = jax.tree_util.keystr(path, simple=True, separator="/").endswith("moe/bias")
            return -rate * jnp.sign(load) if bias else update

        return jax.tree_util.tree_map_with_path(one, gradient, updates), state

    return optax.GradientTransformation(optimizer.init, update)


@flax.struct.dataclass
class TrainState:
    """One run as one pytree: checkpointing it is checkpointing the run.

    `step`: iterations done. `drawn`: batches of problems drawn, the data cursor of loops that may draw several in a
    step. `params`, `opt_state`: what is trained. `key`: the run's random key, never changed: each step folds its number
    in. `reference`: frozen parameters for a KL term, or None. `success`: how often each problem was solved, where
    problems are drawn by it. `skipped`: updates skipped because something was not finite, in all; `skipped_in_a_row`:
    since the last good one.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    reference: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    drawn: jax.Array
    success: Any = None


def init_state(
    params, optimizer: optax.GradientTransformation, key: jax.Array, *, reference=None, success=None
) -> TrainState:
    """The state before the first step. `key` is kept for the whole run.

    Parameters and key are copied: a loop donates its state, and the caller's own stay alive.
    """
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero(),
        params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=jnp.copy(key),
        reference=reference,
        skipped=zero(),
        skipped_in_a_row=zero(),
        drawn=zero(),
        success=success,
    )


LossFunction = Callable[[Any, Any], tuple[Weighted, dict[str, Weighted]]]
"""`(params, batch) -> (loss, metrics)`, all as (total, weight) so that parts of a batch add up to the whole."""


def value_and_grad(loss: LossFunction, params, batch, *, micro_batches: int = 1):
    """Loss, metrics and gradient of a batch, optionally in `micro_batches` equal parts by `lax.scan`.

    Totals, weights and the gradients of totals are summed over the parts and divided once, so the result is that of the
    whole batch however uneven the masks are. Weights must not depend on the parameters.

    Args:
      loss: `(params, batch) -> (Weighted, {name: Weighted})`.
      params: pytree.
      batch: pytree whose leaves have a leading axis that `micro_batches` divides.
      micro_batches: number of parts; peak memory falls by about as much.

    Returns:
      `(loss, metrics, gradient)`: a float32 scalar, a dict of scalars, a tree like `params`.
    """

    def total(params, part):
        value, metrics = loss(params, part)
        return value.total, (value, metrics)

    one = jax.grad(total, has_aux=True)
    if micro_batches == 1:
        gradient, (value, metrics) = one(params, batch)
    else:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % micro_batches:
            raise ValueError(
                f"micro_batches is {micro_batches} and the batch has {rows} rows; choose a divisor of {rows}"
            )
        split = lambda x: x.reshape(micro_batches, rows // micro_batches, *x.shape[1:])
        parts = jax.tree.map(split, batch)
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, params, first))
        (gradient, (value, metrics)), _ = jax.lax.scan(
            lambda carry, part: (add(carry, one(params, part)), None), zeros, parts
        )
    scale = 1.0 / jnp.maximum(value.weight, 1e-8)
    gradient = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradient)
    return value.mean, {name: metric.mean for name, metric in metrics.items()}, gradient


ROUTED = (1 << 30) + 9
"""Folded into a run's key for what the routers of a model draw in its passes of training."""


def value_and_grad_of(
    model: LanguageModel | None,
    loss: Callable,
    params,
    batch,
    *,
    key: jax.Array,
    number: jax.Array | int,
    micro_batches: int = 1,
):
    """`value_and_grad` of a language model's pass of training, in which its routers draw and are watched.

    The loss is given a model whose `apply` has a key and a tally already, so it knows of neither; each micro-batch has
    its own key.

    Args:
      model: see `LanguageModel`; without `routers` it is used as it is. None, of a loss that knows its network, too.
      loss: `(model, params, batch) -> (Weighted, {name: Weighted})`.
      params, batch, micro_batches: as in `value_and_grad`.
      key: the run's; not consumed.
      number: of the pass in the run.

    Returns:
      As `value_and_grad`; of a model with routers the metrics have `router_metrics`.
    """
    if model is None or model.routers is None:
        return value_and_grad(partial(loss, model), params, batch, micro_batches=micro_batches)
    zeros = jnp.zeros((model.routers.layers, model.routers.experts + 2))
    key = jax.random.fold_in(jax.random.fold_in(key, ROUTED), number)
    rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0])

    def of_part(params_and_tally, numbered):
        (params, tally), (part, rows) = params_and_tally, numbered
        apply = partial(model.apply, key=jax.random.fold_in(key, rows[0]), tally=tally)
        return loss(model._replace(apply=apply), params, part)

    value, metrics, (gradient, tally) = value_and_grad(
        of_part, (params, zeros), (batch, rows), micro_batches=micro_batches
    )
    return value, {**metrics, **router_metrics(tally)}, gradient


def router_metrics(tally: jax.Array) -> dict[str, jax.Array]:
    """Means over layers of `nets.moe.figures` of a tally `[layers, experts + 2]`, in any unit."""
    found = moe.figures(tally)
    names = ("max_violation", "dropped", "entropy")
    return {f"router/{name}": jnp.mean(getattr(found, name)) for name in names}


def apply_gradients(
    state: TrainState,
    gradient,
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update; a non-finite loss or gradient leaves parameters and optimizer state as they were.

    Args:
      state: before the update.
      gradient: a tree like `state.params`.
      loss: scalar.
      optimizer: an optax transformation.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.

    Returns:
      The state (its `step` untouched) and `train/loss`, `train/grad_norm` (before clipping), `train/skipped`.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    if max_grad_norm > 0:
        scale = jnp.where(norm > max_grad_norm, max_grad_norm / norm, 1.0)
        gradient = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    state = dataclasses.replace(
        state,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {"train/loss": loss, "train/grad_norm": norm, "train/skipped": state.skipped}
    return state, metrics


def descend(
    state: TrainState,
    model: LanguageModel | None,
    loss: Callable,
    batch,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float,
    micro_batches: int = 1,
    number: jax.Array | int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update from one batch: `value_and_grad_of`, then `apply_gradients`.

    Args:
      state, optimizer, max_grad_norm: of `apply_gradients`.
      model, loss, batch, micro_batches: of `value_and_grad_of`, whose params and key are the state's.
      number: of the update in the run; None: the state's step, of which this is the only one.

    Returns:
      The state (its `step` untouched) and the metrics of both.
    """
    value, metrics, gradient = value_and_grad_of(
        model,
        loss,
        state.params,
        batch,
        key=state.key,
        number=state.step if number is None else number,
        micro_batches=micro_batches,
    )
    state, trained = apply_gradients(state, gradient, value, optimizer, max_grad_norm=max_grad_norm)
    return state, {**metrics, **trained}


def reset_moments(opt_state, params, optimizer: optax.GradientTransformation):
    """The optimizer's state as at the start, but for its place in the learning-rate schedule."""
    schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    keep = lambda new, old: old if schedule(old) else new
    return jax.tree.map(keep, optimizer.init(params), opt_state, is_leaf=schedule)


def is_finite(params) -> jax.Array:
    """Whether every number of a tree is finite (and small enough to be squared)."""
    return jnp.isfinite(optax.tree.norm(params))


def epoch_batch(key: jax.Array, step: jax.Array, *, batch: int, examples: int) -> jax.Array:
    """Indices of a step's examples: every epoch is a fresh permutation, its ragged tail left out.

    A function of the run's key and the step alone, so a resumed run reads on where it stopped.

    Args:
      key: the same for the whole run.
      step: int32 scalar, batches drawn before this one.
      batch, examples: sizes, `batch <= examples`.

    Returns:
      `[batch]` int32, without repetition.
    """
    if not 1 <= batch <= examples:
        raise ValueError(f"a batch of {batch} was asked from {examples} examples; give more data or a smaller batch")
    per_epoch = examples // batch
    epoch, position = step // per_epoch, step % per_epoch
    order = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
    return jax.lax.dynamic_slice_in_dim(order, position * batch, batch)
