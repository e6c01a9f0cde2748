"""Which experts a token goes to: gatings of published networks as settings of one rule."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl.nets.layers import ACTIVATIONS


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
    scores = scores_of(c, logits)
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


def scores_of(config: MoEConfig, logits: jax.Array) -> jax.Array:
    """What experts are ranked and weighed by, before groups and bias; [..., E]."""
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
