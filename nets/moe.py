"""Mixture of experts: each token goes through a few of many feed-forward layers, which a router picks.

Switch, GShard, Mixtral, Qwen-MoE and DeepSeek are settings (`GATINGS`). No loss knows of any of this: the balancing
losses are added to the gradient where the layer's own gradient passes (`balanced`), the load that moves a router's bias
travels as the gradient of that bias, and the figures of a run as that of zeros which nothing depends on (`tally`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl.kernels.experts import combine, dispatch, sort_by_expert
from jaxrl.kernels.grouped_matmul import grouped_matmul
from jaxrl.nets.layers import ACTIVATIONS, FeedForward, Linear, Operator, normal

PRODUCT = "expert_product"
"""Name, for policies of `jax.checkpoint`, of products whose rows are all in use (exchanged ones may be mostly room)."""
FAINT = 2.0**-80
"""Scale of a load that travels as a gradient: signs survive it, squares vanish beside those of any real gradient."""


@dataclass(frozen=True)
class MoEConfig:
    """Experts, gating and balance of the feed-forward layers. Frozen and hashable; `GATINGS` names published ones."""

    experts: int  # E
    top_k: int  # k, experts of each token
    ffn: int  # F, inner width of an expert
    gated: bool = True  # experts are (act(x W_gate) * x W_up) W_down, or act(x W_up) W_down; the shared one, too
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "silu"
    shared: int = 0  # inner width of the expert that every token goes through; 0: none. Several are one wide one
    shared_gate: bool = False  # its output times sigmoid(x w) (Qwen2-MoE)
    first_dense: int = 0  # so many first layers have the config's plain `ffn` instead
    score: Literal["softmax", "sigmoid"] = "softmax"  # what logits become, over all experts
    normalise: bool = False  # weights of the chosen divided by their sum
    scale: float = 1.0  # of the weights, last
    groups: int = 1  # of experts; a token chooses in top_groups of them only
    top_groups: int = 1
    group_score: int = 1  # a group counts as the sum of so many of its best
    bias: bool = False  # added to the scores for choosing, not for weighing; moved by the load alone
    capacity_factor: float | None = None  # an expert's room in a row, in units of k T / E; None: no choice is dropped
    eval_capacity_factor: float | None = None  # where no key is given (scoring, sampling); None: the same
    jitter: float = 0.0  # training: the router sees x times U(1 - jitter, 1 + jitter)
    noisy: bool = False  # training: logits plus N(0, 1) softplus(x W_noise)
    random_second: bool = False  # training: the second choice is kept with probability 2 w_2
    aux_coef: float = 0.0  # balance over the pass
    aux_choices: int | None = None  # how many of the k choices count in it; None: all
    sequence_coef: float = 0.0  # balance in each row
    z_coef: float = 0.0  # small logits

    def __post_init__(self):
        per_group = self.experts // max(self.groups, 1)
        if min(self.experts, self.top_k, self.ffn, self.groups) < 1:
            raise ValueError(
                f"experts is {self.experts}, top_k {self.top_k}, ffn {self.ffn} and groups {self.groups}: expected at "
                "least 1 of each"
            )
        if self.experts % self.groups or not 1 <= self.group_score <= per_group:
            raise ValueError(
                f"{self.experts} experts in {self.groups} groups, scored by their best {self.group_score}: groups must "
                "divide experts, and a group hold as many as are scored"
            )
        if not 1 <= self.top_groups <= self.groups or self.top_k > self.top_groups * per_group:
            raise ValueError(
                f"top_k {self.top_k} of {self.experts} experts, in {self.top_groups} of {self.groups} groups: expected "
                "at most all groups, with at least top_k experts in those chosen"
            )
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score is {self.score!r}, expected 'softmax' or 'sigmoid'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"{name} is {factor}, expected a number above 0, or None to drop nothing")
        if self.eval_capacity_factor is not None and self.capacity_factor is None:
            raise ValueError(
                f"eval_capacity_factor is {self.eval_capacity_factor} without a capacity_factor: give both, or neither"
            )
        if self.random_second and not (self.top_k == 2 and self.normalise):
            raise ValueError(f"random_second with top_k {self.top_k}: expected top_k=2 and normalise=True")
        if self.aux_choices is not None and not 1 <= self.aux_choices <= self.top_k:
            raise ValueError(f"aux_choices is {self.aux_choices}, expected 1 to top_k {self.top_k}, or None for all")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate without a shared expert: give the inner width of one as shared")
        if not 0 <= self.jitter < 1 or self.first_dense < 0 or self.shared < 0:
            raise ValueError(
                f"jitter is {self.jitter}, first_dense {self.first_dense} and shared {self.shared}: expected a jitter "
                "in [0, 1) and no negative number"
            )

    @property
    def draws(self) -> bool:
        """Whether a pass with a key differs from one without."""
        return bool(self.jitter or self.random_second or self.noisy or self.eval_capacity_factor)

    @property
    def drops(self) -> bool:
        """Whether a choice may find no room: not where an expert has that of all tokens."""
        factors = (self.capacity_factor, self.eval_capacity_factor)
        return any(factor is not None and factor * self.top_k < self.experts for factor in factors)


class Routers(NamedTuple):
    """What a loop knows of a network with experts.

    draws: whether its pass of training takes a key. drops: whether the result for a token may depend on those after it,
    which take room of experts. layers: how many have experts. experts: of one layer; a tally is [layers, experts + 2].
    """

    draws: bool
    drops: bool
    layers: int
    experts: int


GATINGS = {
    # Fedus et al. 2021, arXiv:2101.03961; Switch-Base with 128 experts
    "switch": MoEConfig(
        128, 1, 3072, gated=False, activation="relu", capacity_factor=1.25, jitter=0.01, aux_coef=0.01
    ),
    # Lepikhin et al. 2020, arXiv:2006.16668; the 600B model's 2048 experts
    "gshard": MoEConfig(
        2048, 2, 8192, gated=False, activation="relu", normalise=True, capacity_factor=1.0, random_second=True,
        aux_coef=0.01, aux_choices=1,
    ),
    # Jiang et al. 2024, arXiv:2401.04088; 8x7B
    "mixtral": MoEConfig(8, 2, 14336, normalise=True, aux_coef=0.02),
    # Qwen 2024, arXiv:2407.10671 and its Qwen1.5-MoE-A2.7B
    "qwen_moe": MoEConfig(60, 4, 1408, shared=5632, shared_gate=True, aux_coef=0.001),
    # Qwen 2025, arXiv:2505.09388; 30B-A3B
    "qwen3_moe": MoEConfig(128, 8, 768, normalise=True, aux_coef=0.001),
    # DeepSeek-AI 2024, arXiv:2405.04434; 236B
    "deepseek_v2": MoEConfig(
        160, 6, 1536, shared=2 * 1536, first_dense=1, scale=16.0, groups=8, top_groups=3, aux_coef=0.003
    ),
    "deepseek_v2_lite": MoEConfig(64, 6, 1408, shared=2 * 1408, first_dense=1, sequence_coef=0.001),
    # DeepSeek-AI 2024, arXiv:2412.19437; 671B
    "deepseek_v3": MoEConfig(
        256, 8, 2048, shared=2048, first_dense=3, score="sigmoid", normalise=True, scale=2.5,
        groups=8, top_groups=4, group_score=2, bias=True, sequence_coef=1e-4,
    ),
}  # fmt: skip
"""Gating of published models with their published sizes; `dataclasses.replace` makes smaller ones.

Switch and GShard are T5's encoders and decoders, of which this library has none: here their layers are in decoders of
other kinds. Shazeer et al. 2017 (arXiv:1701.06538) are `noisy` and `normalise` with layers as theirs; their losses of
importance and load are not here.

Deviations: balance losses are 1 at perfect balance: GShard's own is that / E^2, the one of transformers' Mixtral and
Qwen-MoE is k times it. DeepSeek-V2's losses over devices and communication are left out.
"""


class Routed(NamedTuple):
    """Where tokens go.

    ids: int32 [..., T, k], the experts chosen, best first. weights: float32 [..., T, k]. kept: bool [..., T, k], False
    where a choice is dropped; None if none can be.
    """

    ids: jax.Array
    weights: jax.Array
    kept: jax.Array | None = None


def noised(logits: jax.Array, spread: jax.Array, key: jax.Array) -> jax.Array:
    """logits + N(0, 1) softplus(spread), of one shape (Shazeer et al. 2017, arXiv:1701.06538, equation 4).

    With `normalise` what `route` makes of it is the paper's softmax over the k largest. The key is consumed.
    """
    return logits + jax.random.normal(key, logits.shape) * jax.nn.softplus(spread)


def route(
    config: MoEConfig,
    logits: jax.Array,
    bias: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    real: jax.Array | None = None,
) -> Routed:
    """The experts of each token and their weights.

        s = softmax(logits) or sigmoid(logits);   ids = top-k of s + bias, in the best groups;   w_j = s[ids_j]
        w = w / (sum w + 1e-20)  if normalise;   w = scale w

    (Groups and bias: DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2; Wang et al. 2024, arXiv:2408.15664.) With a
    capacity factor c an expert takes ceil(c k N / E) choices of a row with N tokens: all first choices in the order of
    tokens, then all second ones (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1, with rows as groups). Weights are
    not renormalised after a drop. Rows are the groups, so the result does not depend on how a batch is divided, and
    padding neither takes room nor adds any.

    With a capacity a later token can change what an earlier one gets: it adds to the room, and its first choice goes
    before the other's second. A row decoded token by token drops nothing. So log-probs of a whole row are not those
    under which it was sampled: reinforcement learning should drop nothing, and `grpo` refuses what does.

    A key says that this is training; without one an `eval_capacity_factor` counts.

    Args:
      config: the gating.
      logits: float32 [..., T, E].
      bias: float32 [E], or None.
      key: of training, for `random_second`; None keeps every second choice. Consumed.
      real: bool [..., T] broadcastable, False on padding, which a capacity gives no expert; None: all are tokens.

    Returns:
      `Routed`.
    """
    c = config
    scores = _scores(c, logits)
    ranked = lax.stop_gradient(scores)
    if bias is not None:
        ranked = ranked + jnp.broadcast_to(lax.stop_gradient(bias), ranked.shape)
    if c.groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], c.groups, -1)
        of_group = jnp.sum(lax.top_k(grouped, c.group_score)[0], axis=-1)
        opened = jnp.any(jax.nn.one_hot(lax.top_k(of_group, c.top_groups)[1], c.groups, dtype=bool), axis=-2)
        ranked = jnp.where(opened[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    ids = lax.top_k(ranked, c.top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if c.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    factor = c.capacity_factor if key is not None or c.eval_capacity_factor is None else c.eval_capacity_factor
    kept = None if factor is None else _within_capacity(factor, c.experts, ids, real)
    if c.random_second and key is not None:
        drawn = jax.random.uniform(key, weights.shape[:-1]) < 2 * lax.stop_gradient(weights[..., 1])
        drawn = jnp.stack([jnp.ones_like(drawn), drawn], axis=-1)
        kept = drawn if kept is None else kept & drawn
    return Routed(ids, c.scale * weights, kept)


def _scores(config, logits):
    return jax.nn.softmax(logits, axis=-1) if config.score == "softmax" else jax.nn.sigmoid(logits)


def _within_capacity(factor, experts, ids, real):
    """Whether each choice finds room, [..., T, k]."""
    *lead, t, k = ids.shape
    real = jnp.broadcast_to(True if real is None else real, (*lead, t))
    rooms = np.minimum(-(-factor * k * np.arange(t + 1) // experts), t).astype(np.int32)
    room = jnp.asarray(rooms)[jnp.sum(real, axis=-1)][..., None]
    slots = lambda x: jnp.swapaxes(x, -1, -2).reshape(*lead, k * t)
    counted = slots(jnp.broadcast_to(real[..., None], ids.shape))
    chosen = jax.nn.one_hot(slots(ids), experts, dtype=jnp.int32) * counted[..., None]
    before = jnp.sum((jnp.cumsum(chosen, axis=-2) - 1) * chosen, axis=-1)
    return jnp.swapaxes((counted & (before < room)).reshape(*lead, k, t), -1, -2)


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
    scores = _scores(config, logits)
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
    scores = _scores(config, logits)
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
