"""Mixture of experts: each token goes through a few of many feed-forward layers, which a router picks.

Switch, GShard, Mixtral, Qwen-MoE and DeepSeek are settings (`GATINGS`). No loss knows of any of this: the balancing
losses are added to the gradient where the layer's own gradient passes (`balanced`), the load that moves a router's bias
travels as the gradient of that bias, and the figures of a run as that of zeros which nothing depends on (`tally`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl.kernels.experts import combine, dispatch, sort_by_expert
from jaxrl.kernels.grouped_matmul import grouped_matmul
from jaxrl.nets.layers import ACTIVATIONS, FeedForward, Linear, Operator, normal
from jaxrl.nets.routing import GATINGS as GATINGS
from jaxrl.nets.routing import MoEConfig as MoEConfig
from jaxrl.nets.routing import Routed as Routed
from jaxrl.nets.routing import Routers as Routers
from jaxrl.nets.routing import noised as noised
from jaxrl.nets.routing import route as route
from jaxrl.nets.routing import scores_of

PRODUCT = "expert_product"
"""Name, for policies of `jax.checkpoint`, of products whose rows are all in use (exchanged ones may be mostly room)."""
FAINT = 2.0**-80
"""Scale of a load that travels as a gradient: signs survive it, squares vanish beside those of any real gradient."""


def experts(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    *,
    dtype=None,
    activation: Callable = jax.nn.silu,
) -> jax.Array:
    """The weighted sum of what a token's experts make of it; no choice is dropped for want of room.

        y_t = sum_j w_tj (act(x_t gate[e]) * (x_t up[e])) down[e]   with e = ids_tj

    Args:
      x: [..., D].
      ids: int [..., k]. An id outside [0, E) is no expert and adds nothing.
      weights: [..., k].
      gate, up: [E, D, F], in the dtype of x; without a gate act(x_t up[e]) down[e]. down: [E, F, D].
      dtype: of the result, summed in float32; default that of x.
      activation: act.

    Returns:
      [..., D].
    """
    k, width = ids.shape[-1], x.shape[-1]
    routing = sort_by_expert(ids.reshape(-1, k), num_experts=up.shape[0])
    rows = dispatch(x.reshape(-1, width), routing)
    keep = lambda y: checkpoint_name(y, PRODUCT)
    rows = of_each(rows, gate, up, down, routing.group_sizes, activation=activation, keep=keep)
    return combine(rows, routing, weights.reshape(-1, k), dtype=dtype).reshape(x.shape)


def of_each(
    rows: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    sizes: jax.Array,
    *,
    activation: Callable = jax.nn.silu,
    keep: Callable = lambda y: y,
) -> jax.Array:
    """Experts on rows [R, D] that are sorted by them, `sizes` [E] of each; `keep` sees each product."""
    product = lambda x, matrices: keep(grouped(x, matrices, sizes))
    inner = activation(product(rows, up)) if gate is None else activation(product(rows, gate)) * product(rows, up)
    return product(inner, down)


@runtime_checkable
class GroupedOperator(Operator, Protocol):
    """An `Operator` that may stand in the place of stacked matrices [E, in, out]."""

    def times_grouped(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """As `grouped_matmul`: rows [R, in], sorted by expert, `sizes` [E] of each -> [R, out]."""
        ...


def grouped(rows: jax.Array, kernel: Any, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by stacked matrices, an array or a `GroupedOperator`."""
    if isinstance(kernel, GroupedOperator):
        return kernel.times_grouped(rows, sizes)
    return grouped_matmul(rows, kernel, sizes)


def auxiliary_losses(
    config: MoEConfig, logits: jax.Array, ids: jax.Array, live: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What keeps the router even and its logits small, each as mean over tokens times their number N.

        balance = N E sum_e f_e P_e,   f_e = choices of e / (k N),   P_e = mean of s_e / sum_j s_j
        sequence = the same in each row, summed over rows
        z = sum_t logsumexp(logits_t)^2

    balance / N is 1 where choices or probabilities are even; gradients reach P alone. (Balance: Fedus et al. 2021,
    arXiv:2101.03961, equations 4-6. Sequence: DeepSeek-AI 2024, arXiv:2412.19437, equations 17-20: with a bias f
    counts the k best scores without it. z: Zoph et al. 2022, arXiv:2202.08906, equation 5.)

    Args:
      config: of the layer.
      logits: float32 [B, T, E].
      ids: [B, T, k] of `route`.
      live: bool [B, T], the tokens that count; None: all.

    Returns:
      {"balance", "sequence", "z"}: scalars.
    """
    live = jnp.ones(ids.shape[:-1], bool) if live is None else live
    scores = scores_of(config, logits)
    share = scores / jnp.sum(scores, axis=-1, keepdims=True) * live[..., None]
    chosen = lax.top_k(scores, config.top_k)[1] if config.bias else ids

    def even(chosen, axes):
        counts = _counts(config, chosen, live).sum(axes)
        number = jnp.maximum(jnp.sum(live, axis=(*axes, -1)), 1) * chosen.shape[-1]
        return config.experts * jnp.sum(jnp.sum(counts * share.sum((*axes, -2)), axis=-1) / number)

    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * live)
    return {"balance": even(chosen[..., : config.aux_choices], (0,)), "sequence": even(chosen, ()), "z": z}


def _counts(config, ids, live):
    """Choices of each expert in each row, float32 [B, E]."""
    hits = jax.nn.one_hot(ids, config.experts, dtype=jnp.float32) * live[..., None, None]
    return lax.stop_gradient(hits.sum((-3, -2)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def balanced(
    config: MoEConfig,
    y: jax.Array,
    logits: jax.Array,
    routed: Routed,
    bias: jax.Array | None = None,
    zeros: jax.Array | None = None,
) -> jax.Array:
    """y as it is; on the way back the gradients of the auxiliary losses join in, and the load becomes that of the bias.

        d logits += d (aux_coef balance + sequence_coef sequence + z_coef z) / d logits
        d bias    = 2^-80 (load - mean load)
        d zeros   = `tally`

    So they add up over micro-batches and devices as any gradient does, and cost nothing in a pass without one. The
    tokens that count are those whose y has a gradient other than 0: not padding, not what no loss reads (in the last
    layer: tokens whose prediction is not counted). Losses in this library are totals over tokens, divided once by
    their weight: with a loss that is a mean over tokens, each counted by a weight of 1, the coefficients are those of
    the papers; where n tokens count and the weight is w they are n / w times as large, as in Megatron-Core's mode of
    losses per token (DPO counts pairs: divide coefficients by the tokens of one).

    Args:
      config: of the layer.
      y: [B, T, D], what the layer adds to the residual stream.
      logits: float32 [B, T, E], and what was `routed` by them.
      bias: [E], or None.
      zeros: [E + 2], or None.
    """
    return y


def _balanced_backward(config, residuals, dy):
    logits, routed, bias, zeros = residuals
    live = jnp.any(dy != 0, axis=-1)

    def total(logits):
        losses = auxiliary_losses(config, logits, routed.ids, live)
        terms = {"balance": config.aux_coef, "sequence": config.sequence_coef, "z": config.z_coef}
        return sum((coef * losses[name] for name, coef in terms.items() if coef), jnp.float32(0))

    load = _counts(config, routed.ids, live).sum(0)
    push = None if bias is None else (FAINT * (load - jnp.mean(load, keepdims=True))).astype(bias.dtype)
    counted = None if zeros is None else tally(config, logits, routed, live).astype(zeros.dtype)
    return dy, jax.grad(total)(logits), None, push, counted


def _balanced_forward(config, y, logits, routed, bias=None, zeros=None):
    return y, (logits, routed, bias, zeros)


balanced.defvjp(_balanced_forward, _balanced_backward)


class RouterStatistics(NamedTuple):
    """How a layer's router spreads tokens.

    load: [E], share of all choices. max_violation, mean_violation: (largest load / mean load) - 1 and the mean of
    |load / mean load - 1| (MaxVio of Wang et al. 2024, arXiv:2408.15664). entropy: nats, of a token's s / sum s, on
    average; log E at most. dropped: share of choices that found no room.
    """

    load: jax.Array
    max_violation: jax.Array
    mean_violation: jax.Array
    entropy: jax.Array
    dropped: jax.Array


def tally(config: MoEConfig, logits: jax.Array, routed: Routed, live: jax.Array) -> jax.Array:
    """What adds up over tokens: choices of each expert, those dropped, and entropy times k; float32 [E + 2].

    Args:
      config: the gating.
      logits: [B, T, E].
      routed: of these logits.
      live: bool [B, T], the tokens that count.
    """
    scores = scores_of(config, logits)
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    entropy = config.top_k * jnp.sum(jax.scipy.special.entr(share), axis=-1)
    lost = jnp.zeros(live.shape) if routed.kept is None else jnp.sum(1.0 - routed.kept, axis=-1)
    both = jnp.stack([jnp.sum(x * live) for x in (lost, entropy)])
    return jnp.concatenate([_counts(config, routed.ids, live).sum(0), both])


def figures(tally: jax.Array) -> RouterStatistics:
    """Of a tally [..., E + 2], in any unit; all 0 where nothing was counted."""
    counts = tally[..., :-2]
    choices = jnp.sum(counts, axis=-1, keepdims=True)
    load, rest = (x / jnp.where(choices > 0, choices, 1) for x in (counts, tally[..., -2:]))
    violation = jnp.where(choices > 0, counts.shape[-1] * load - 1, 0)
    mean = jnp.mean(jnp.abs(violation), axis=-1)
    return RouterStatistics(load, jnp.max(violation, axis=-1), mean, dropped=rest[..., 0], entropy=rest[..., 1])


def statistics(config: MoEConfig, logits: jax.Array, routed: Routed, live: jax.Array | None = None) -> RouterStatistics:
    """`figures` of one routing; arguments as in `tally`, live=None counts all tokens."""
    return figures(tally(config, logits, routed, jnp.ones(routed.ids.shape[:-1], bool) if live is None else live))


class MoE(nn.Module):
    """y = sum_j w_j expert_j(x) (+ shared(x)), over the k experts that the router chose, in float32.

    Parameters: router/kernel [D, E]; gate (if gated), up [E, D, F] and down [E, F, D] (from `out_init`), in whose place
    a `GroupedOperator` may stand; with `bias` bias [E] = 0, float32; with `noisy` router_noise/kernel [D, E] = 0; with
    `shared` shared/{gate,up,down}/kernel as in `FeedForward`; with `shared_gate` shared_gate/kernel [D, 1].
    A stream "router" says that this is training and gives its draws (`jitter`, `noisy`, `random_second`).
    Where the collection "intermediates" is asked for, it gets `statistics`; where a collection "tally" is given, with
    zeros [E + 2] of that name, their gradient is the `tally` of the tokens that count in `balanced`.
    """

    config: MoEConfig
    out_init: Callable = normal(0.02)
    experts: Callable = experts  # or one that knows a mesh
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]; real as in `route`."""
        c = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        d = x.shape[-1]

        def kernel(name, init, *shape):
            stored, shape = self.get_variable("params", name), (c.experts, *shape)
            if not isinstance(stored, GroupedOperator):
                return self.param(name, init, shape, jnp.dtype(self.param_dtype)).astype(self.dtype)
            if stored.shape != shape:
                raise ValueError(f"{'/'.join(self.path)}/{name} is a map of shape {stored.shape}, expected {shape}")
            return stored

        matrices = (
            kernel("gate", normal(0.02), d, c.ffn) if c.gated else None,
            kernel("up", normal(0.02), d, c.ffn),
            kernel("down", self.out_init, c.ffn, d),
        )
        seen = x.astype(jnp.float32)
        training = c.draws and self.has_rng("router")
        of_jitter, of_noise, key = jax.random.split(self.make_rng("router"), 3) if training else (None,) * 3
        if c.jitter and of_jitter is not None:
            seen = seen * jax.random.uniform(of_jitter, x.shape, minval=1 - c.jitter, maxval=1 + c.jitter)
        dot: Any = partial(jnp.dot, precision=lax.Precision.HIGHEST)
        scores = partial(Linear, c.experts, dtype="float32", param_dtype=self.param_dtype, dot=dot)
        logits = scores(name="router")(seen)
        if c.noisy:
            spread = scores(kernel_init=nn.initializers.zeros, name="router_noise")(seen)
            logits = logits if of_noise is None else noised(logits, spread, of_noise)
        bias = self.param("bias", nn.initializers.zeros, (c.experts,), jnp.float32) if c.bias else None
        routed = route(c, logits, bias, key=key, real=real)
        if self.is_mutable_collection("intermediates"):
            live = None if real is None else jnp.broadcast_to(real, x.shape[:2])
            self.sow("intermediates", "statistics", statistics(c, logits, routed, live))
        ids = routed.ids if routed.kept is None else jnp.where(routed.kept, routed.ids, c.experts)
        x = x.astype(self.dtype)
        form = {} if c.activation == "silu" else {"activation": ACTIVATIONS[c.activation]}
        y = self.experts(x, ids, routed.weights, *matrices, **form)
        if c.shared:
            always = FeedForward(c.shared, self.out_init, c.gated, c.activation, **types, name="shared")(x)
            if c.shared_gate:
                always = always * nn.sigmoid(Linear(1, **types, name="shared_gate")(x))
            y = y + always
        zeros = self.get_variable("tally", "tally")
        if c.bias or c.aux_coef or c.sequence_coef or c.z_coef or zeros is not None:
            y: Any = balanced(c, y, logits, routed, bias, zeros)
        return y
