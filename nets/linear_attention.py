"""Linear attention in a decoder layer: feature maps, norms, decays and gates of the published forms, and the state that
takes the place of a cache of keys and values."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.linear_attention import divided, linear_attention
from jaxrl.nets.attention import Attention
from jaxrl.nets.cache import Slot, read_state, write_state
from jaxrl.nets.documents import documents
from jaxrl.nets.layers import Linear, RMSNorm

MAPS = {
    "identity": lambda x: x,
    "elu": nn.elu,
    "elu+1": lambda x: nn.elu(x) + 1,
    "relu": nn.relu,
    "silu": nn.silu,
    "sigmoid": nn.sigmoid,
}
"""Functions of one number."""
RANDOM = ("performer", "performer_relu")
POSITIVE = ("elu+1", "relu", "sigmoid", *RANDOM)
CHOICES = {
    "features": (*MAPS, *RANDOM),
    "values": tuple(MAPS),
    "norm": ("none", "heads", "all"),
    "decay": ("none", "retention", "lightning"),
    "gate": ("none", "sigmoid", "silu"),
    "row_norms": ("chi", "sqrt"),
    "implementation": (None, "chunked", "recurrent"),
}


@dataclass(frozen=True)
class LinearConfig:
    """What stands in the place of the softmax.

    features "elu+1", normalised: Linear Transformer (Katharopoulos et al. 2020, arXiv:2006.16236). "performer" or
    "performer_relu", normalised: Performer (Choromanski et al. 2020, arXiv:2009.14794). "elu" or "elu+1", a norm:
    NormAttention of TransNormer (Qin et al. 2022, arXiv:2210.10340). "silu" for values too, decay "lightning", a norm
    and a gate "sigmoid": Lightning Attention (MiniMax 2025, arXiv:2501.08313). "identity", decay "retention", a norm
    "heads" and a gate "silu": like RetNet (Sun et al. 2023, arXiv:2307.08621), but values are as wide as keys.
    """

    features: str = "elu+1"  # of queries and keys: one of MAPS, or random ones
    normalise: bool = True  # divide by the sum of weights, which must not be negative
    norm: Literal["none", "heads", "all"] = "none"  # RMSNorm after: of each head, or of all heads together
    decay: Literal["none", "retention", "lightning"] = "none"
    gate: Literal["none", "sigmoid", "silu"] = "none"  # act(x W) times what comes out, after the norm
    values: str = "identity"  # one of MAPS, of the values
    kv_heads: int | None = None  # None: the config's
    rotary: bool = True  # queries and keys turn, where the config's do, before they are mapped
    random: int = 256  # features of the random maps
    orthogonal: bool = True  # their directions, in blocks of head_dim; False: independent ones
    row_norms: Literal["chi", "sqrt"] = "chi"  # lengths of orthogonal directions: those of normal vectors, or sqrt(Dh)
    eps: float | None = None  # beside the sum of weights, and in the norm; None: 1e-6, of "performer" 1e-30
    implementation: Literal["chunked", "recurrent"] | None = None  # of `kernels.linear_attention`; None: its choice

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"linear.{name} is {getattr(self, name)!r}, expected one of {known}")
        if self.normalise and self.features not in POSITIVE:
            raise ValueError(
                f"linear.features is {self.features!r} with normalise: sums of weights of either sign may vanish; "
                f"expected one of {POSITIVE}, or normalise=False with a norm"
            )
        if self.random < 1:
            raise ValueError(f"linear.random is {self.random}, expected at least one feature")

    @property
    def own_eps(self) -> float:
        """eps as a number: sums of positive features may be tiny."""
        return (1e-30 if self.features == "performer" else 1e-6) if self.eps is None else self.eps

    @property
    def stabilised(self) -> bool:
        """Are keys' features divided by the largest so far? A ratio does not notice it."""
        return self.features == "performer" and self.normalise

    def state(self, heads: int, kv_heads: int, head_dim: int) -> tuple[int, int, int]:
        """Shape of one row's state: heads, features of a key, numbers of a value (the sum of weights, its scale)."""
        own = heads if self.decay != "none" else self.kv_heads or kv_heads
        features = self.random if self.features in RANDOM else head_dim
        return own, features, head_dim + self.normalise + self.stabilised


def random_projection(
    key: jax.Array, features: int, size: int, *, orthogonal: bool = True, row_norms: str = "chi"
) -> jax.Array:
    """Directions w [features, size] float32 of random features, each distributed as a standard normal vector.

    Orthogonal ones are orthogonal to each other within blocks of `size`; with row_norms "sqrt" all have length
    sqrt(size), and the features are those of a slightly other kernel. (arXiv:2009.14794, section 2.4.)
    """
    ours, other = jax.random.split(key)
    if not orthogonal:
        return jax.random.normal(ours, (features, size))
    q, r = jnp.linalg.qr(jax.random.normal(ours, (-(-features // size), size, size)))
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]  # uniform over all rotations
    rows = jnp.swapaxes(q, 1, 2).reshape(-1, size)[:features]
    if row_norms == "sqrt":
        return rows * size**0.5
    return rows * jnp.linalg.norm(jax.random.normal(other, (features, size)), axis=1, keepdims=True)


def log_features(x: jax.Array, w: jax.Array) -> jax.Array:
    """Logarithms of FAVOR+'s features but for their common factor, w x' - |x'|^2 / 2 of `positive_features`."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    return x @ w.T - jnp.sum(jnp.square(x), axis=-1, keepdims=True) / 2


def positive_features(
    x: jax.Array, w: jax.Array, *, largest: bool = False, scale: jax.Array | None = None
) -> jax.Array:
    """FAVOR+: phi(x) with E phi(q) . phi(k) = exp(q . k / sqrt(Dh)) over standard normal rows of w.

        phi(x) = exp(w x' - |x'|^2 / 2) / sqrt(m),   x' = x / Dh^(1/4)

    Args:
      x: [..., Dh].
      w: [m, Dh].
      largest: divide each vector by its largest feature, which a ratio notices by its eps alone: for queries.
      scale: [..., 1], logarithms by which to divide: for keys, `running_largest`. Without, features of keys of length
        32 are about 1e-11 in a head of 64.

    Returns:
      [..., m] float32.
    """
    power = log_features(x, w)
    if largest:
        scale = jnp.max(power, axis=-1, keepdims=True)
    if scale is not None:
        power = power - jax.lax.stop_gradient(scale)
    return jnp.exp(power) * w.shape[0] ** -0.5


def running_largest(
    largest: jax.Array, starts: jax.Array | None = None, before: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The largest so far in each document, and what a sum must decay by to follow it.

        m_t = max(m_{t-1}, largest_t),   log decay = m_{t-1} - m_t

    The paper's code divides all keys by the largest feature of the sequence; with this running one no token's numbers
    depend on later ones, and a sum over keys S_t / exp(m_t) neither overflows nor dies out.

    Args:
      largest: [B, T, H].
      starts: bool [B, T], where documents begin, at which the decay is 0; None: nowhere.
      before: [B, H], m before the first token; None, or -inf: none.

    Returns:
      (m, log decay), float32 [B, T, H].
    """
    first = jnp.full_like(largest[:, :1], -jnp.inf) if before is None else before[:, None]
    values = jnp.concatenate([first, largest], axis=1)
    if starts is None:
        m = jax.lax.cummax(values, axis=1)
    else:

        def joined(a, b):
            return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

        anew = jnp.pad(starts, ((0, 0), (1, 0)))[..., None]
        m = jax.lax.associative_scan(joined, (jnp.broadcast_to(anew, values.shape), values), axis=1)[1]
    last = m[:, :-1]
    fresh = jnp.isneginf(last) if starts is None else jnp.isneginf(last) | starts[..., None]
    return m[:, 1:], jnp.where(fresh, 0.0, last - m[:, 1:])


def relu_features(x: jax.Array, w: jax.Array) -> jax.Array:
    """Performer's generalised kernel: relu(w x / Dh^(1/4)) + 1e-3, float32 [..., m]."""
    return nn.relu((x.astype(jnp.float32) * x.shape[-1] ** -0.25) @ w.T) + 1e-3


def redraw(config: LinearConfig, params: Any, key: jax.Array) -> Any:
    """The parameters with new random projections, each leaf and layer its own; what else there is stays."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("projection"):
            return leaf
        own = jax.random.fold_in(key, sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        options = {"orthogonal": config.orthogonal, "row_norms": config.row_norms}
        draw = partial(random_projection, features=leaf.shape[-2], size=leaf.shape[-1], **options)
        for _ in leaf.shape[:-2]:
            draw = jax.vmap(draw)
        return draw(jax.random.split(own, leaf.shape[:-2])).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


REDRAWN = (1 << 30) + 5
"""Folded into a run's key for new projections, beside the step's number."""


def redraw_every(step: Callable, n: int, config: LinearConfig) -> Callable:
    """A loop's step that draws the projections anew before step n, 2n, 3n ... (arXiv:2009.14794, section 2.4).

    Any loop whose state has `step`, `key` and `params` takes it in the step's place; what is drawn follows from the
    state alone, so a resumed run is the uninterrupted one.

    Args:
      step: `(state, data) -> (state, metrics)`.
      n: steps between draws; 1000 in the authors' code.
      config: of the layers.

    Raises:
      ValueError: n below 1, or a form without random features.
    """
    if n < 1 or config.features not in RANDOM:
        raise ValueError(
            f"redraw_every {n} steps with features {config.features!r}: expected n >= 1 and one of {RANDOM}"
        )

    def with_new(state, *data):
        key = jax.random.fold_in(jax.random.fold_in(state.key, REDRAWN), state.step)
        due = (state.step > 0) & (state.step % n == 0)
        params = jax.lax.cond(due, lambda p: redraw(config, p, key), lambda p: p, state.params)
        return step(replace(state, params=params), *data)

    return with_new


def log_decays(kind: str, heads: int, layer: jax.Array | int, layers: int) -> jax.Array | None:
    """Logarithms of the factors by which each head's state shrinks with every token, [heads]; None for "none".

    retention: log(1 - 2^(-5 - h)), h = 0 ... heads - 1
    lightning: -2^(-8 h / heads) (1 - l / (layers - 1 + 1e-5) + 1e-5), h = 1 ... heads, in layer l of all
    """
    if kind == "none":
        return None
    h = jnp.arange(heads, dtype=jnp.float32)
    if kind == "retention":
        return jnp.log1p(-(2.0 ** (-5.0 - h)))
    return -(2.0 ** (-8.0 * (h + 1) / heads)) * (1.0 - layer / (layers - 1 + 1e-5) + 1e-5)


def both_ways(q, k, v, starts, **options) -> jax.Array:
    """Linear attention of tokens that see their whole document: what came before, what comes after, less itself once.

    q, k, v as in `linear_attention`; starts: bool [B, T].
    """
    normalise, eps = options.pop("normalise"), options.pop("eps")
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if normalise:
        v = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1))], axis=3)
    ids = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    back = lambda x: jnp.flip(x, axis=1)
    before: Any = linear_attention(q, k, v, segments=ids, **options)
    after: Any = linear_attention(back(q), back(k), back(v), segments=back(ids), **options)
    spread = lambda x: jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)
    o = before + back(after) - jnp.sum(q * spread(k), axis=-1, keepdims=True) * spread(v)
    return divided(o, eps) if normalise else o


class LinearAttention(Attention):
    """Attention without the softmax, of which `LinearConfig` says the form.

        o_t = sum_{j <= t} (phi(q_t) . phi(k_j)) decay^(t - j) v_j,   y = (gate(x) * norm(o)) W_o

    Projections and their options are those of `Attention`, whose window and pattern have no meaning here. The past is
    one float32 matrix for each head (`Cache`), so a token's cost does not depend on what came before. Masks: see
    `documents`; without `Causal`, every token sees its whole document, and there is neither cache nor decay.

    Parameters: those of `Attention`; with a norm out_norm/scale [Dh] or [H Dh], with a gate gate/kernel [D, H Dh], with
    random features projection [random, Dh] float32. That one is a constant to gradients: it is drawn by init, lies in
    checkpoints, and `redraw_every` draws it anew, between updates so that sampler and trainer hold the same.
    """

    linear: LinearConfig = LinearConfig()
    layers: int = 1  # of the network, for decays that depend on depth

    @nn.compact
    def __call__(self, x, cos, sin, mask, slot: Slot | None = None, layer=0):
        """As `Attention`, but a slot's k holds states, and layer is the layer's index in the network."""
        c, types = self.linear, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        b, t, _ = x.shape
        q, k, v = self.projected(x, *((cos, sin) if c.rotary else (None, None)))
        v = MAPS[c.values](v)
        offset = 0 if slot is None else slot.length
        if slot is None:
            mask.check((b, self.heads, t, t), 0)
        causal, starts = documents(mask, b, t, offset)
        y: Any
        options: dict[str, Any] = {"normalise": c.normalise, "eps": c.own_eps}
        if not causal and (slot is not None or c.decay != "none"):
            raise ValueError(
                f"linear attention with decay {c.decay!r} and {'no' if slot is None else 'a'} cache got a mask without "
                "Causal: a state and its decay know only what came before; give Causal() & the mask"
            )
        state = None
        if slot is not None:
            state = read_state(slot)
            if starts is not None:
                state = jnp.where(starts[:, 0, None, None, None], 0.0, state)
        scales = None
        if c.features in RANDOM:
            q, k, scales = self._random_features(q, k, causal, starts, state)
        else:
            q, k = MAPS[c.features](q), MAPS[c.features](k)
        if causal:
            options |= {
                "log_decay": self._log_decay(layer, scales),
                "segments": None if starts is None or t == 1 else jnp.cumsum(starts, axis=1, dtype=jnp.int32),
                "implementation": c.implementation,
            }
        if slot is not None:
            assert state is not None
            given = state if scales is None else state[..., :-1]
            y, state = linear_attention(q, k, v, state=given, return_state=True, **options)
            if scales is not None:
                last = jnp.repeat(scales[0][:, -1], state.shape[1] // scales[0].shape[2], axis=1)
                last = jnp.broadcast_to(last[..., None, None], (*state.shape[:3], 1))
                state = jnp.concatenate([state, last], axis=-1)
            slot = write_state(slot, state)
        elif causal or starts is None:
            y = linear_attention(q, k, v, causal=causal, **options)
        else:
            y = both_ways(q, k, v, starts, **options)
        return self._out(x, y.astype(self.dtype), types), slot

    def _random_features(self, q, k, causal, starts, state):
        """Mapped queries and keys, and `running_largest` of the keys where a ratio does not notice it."""
        c, size = self.linear, self.head_dim
        options = {"orthogonal": c.orthogonal, "row_norms": c.row_norms}
        w = self.param("projection", lambda key: random_projection(key, c.random, size, **options))
        w = jax.lax.stop_gradient(w)
        if c.features == "performer_relu":
            return relu_features(q, w), relu_features(k, w), None
        query = positive_features(q, w, largest=True)
        if not c.stabilised:
            return query, positive_features(k, w), None
        largest = jax.lax.stop_gradient(jnp.max(log_features(k, w), axis=-1))
        if causal:
            before = None
            if state is not None:  # zeros where nothing was written
                before = jnp.where(jnp.any(state[..., -2] != 0, axis=-1), state[..., 0, -1], -jnp.inf)
                before = before[:, :: before.shape[1] // largest.shape[2]]
            m, decay = running_largest(largest, starts, before)
            return query, positive_features(k, w, scale=m[..., None]), (m, decay)
        if starts is None:
            m = jnp.max(largest, axis=1, keepdims=True)
        else:  # of the whole document
            ends = jnp.flip(jnp.roll(starts, -1, axis=1).at[:, -1].set(True), axis=1)
            m = running_largest(jnp.flip(running_largest(largest, starts)[0], axis=1), ends)[0]
            m = jnp.flip(m, axis=1)
        return query, positive_features(k, w, scale=m[..., None]), None

    def _log_decay(self, layer, scales):
        """Of the config, and of the keys' scales [B, T, heads of keys]."""
        own = log_decays(self.linear.decay, self.heads, layer, self.layers)
        if scales is None:
            return own
        decay = scales[1]
        return decay if own is None else jnp.repeat(decay, self.heads // decay.shape[2], axis=2) + own[None, None]

    def _out(self, x, y, types):
        c, whole = self.linear, (*x.shape[:2], self.heads * self.head_dim)
        y = y if c.norm == "heads" else y.reshape(whole)
        if c.norm != "none":
            y = RMSNorm(c.own_eps, **types, name="out_norm")(y)
        y = y.reshape(whole)
        if c.gate != "none":
            y = MAPS[c.gate](Linear(whole[2], **types, name="gate")(x)) * y
        return Linear(x.shape[-1], use_bias=self.bias, kernel_init=self.out_init, **types, name="o")(y)
