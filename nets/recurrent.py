"""Recurrent networks: tanh and relu RNNs, LSTM and GRU are one module over a table of cells.

A state is one vector, [..., S H]: h, and behind it c where the cell has one. It is float32 in every dtype of compute.
Time is the first axis. `Recurrent` is one layer in one direction, for agents; `RNN` stacks layers, in one direction or
both; `recurrent_language_model` is an RNN between embedding and unembedding, in the place of a Transformer.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.kernels.attention import Causal, Mask
from jaxrl.nets.documents import documents
from jaxrl.nets.initializers import orthogonal
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.layers import Kernel, Linear, normal


class Cell(NamedTuple):
    """gates: blocks of width H in its products. states: vectors of width H in its state.

    step(x, h, state, forget_bias) -> state: x and h are the products of input and h, biases included, [..., gates H].
    """

    gates: int
    states: int
    step: Callable


def _gru(x, h, state, forget_bias):
    x_r, x_z, x_n = jnp.split(x, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(h, 3, axis=-1)
    z = nn.sigmoid(x_z + h_z)
    return (1.0 - z) * jnp.tanh(x_n + nn.sigmoid(x_r + h_r) * h_n) + z * state


def _lstm(x, h, state, forget_bias):
    i, f, g, o = jnp.split(x + h, 4, axis=-1)
    c = nn.sigmoid(f + forget_bias) * jnp.split(state, 2, axis=-1)[1] + nn.sigmoid(i) * jnp.tanh(g)
    return jnp.concatenate([nn.sigmoid(o) * jnp.tanh(c), c], axis=-1)


CELLS = {
    "tanh": Cell(1, 1, lambda x, h, state, forget_bias: jnp.tanh(x + h)),
    "relu": Cell(1, 1, lambda x, h, state, forget_bias: nn.relu(x + h)),
    "lstm": Cell(4, 2, _lstm),
    "gru": Cell(3, 1, _gru),
}
"""Blocks of the products are in torch's order: r, z, n of a GRU, i, f, g, o of an LSTM."""


def of_each_gate(gates: int, scale: float) -> Callable:
    """Orthogonal matrices side by side: a gate's block [in, H] is one by itself."""

    def init(key, shape, dtype=jnp.float32):
        block = (shape[0], shape[1] // gates)
        drawn = jax.vmap(lambda key: orthogonal(scale)(key, block, dtype))(jax.random.split(key, gates))
        return jnp.moveaxis(drawn, 0, 1).reshape(shape)

    return init


class Recurrent(nn.Module):
    """One recurrent layer in one direction, over streams that may hold several episodes.

        tanh, relu: h' = act(x W + b + h U + b')                                        (Elman 1990)
        lstm: i, f, o = sigmoid(.), g = tanh(.) of x W + b + h U + b'; c' = f c + i g, h' = o tanh(c')
              f = sigmoid(. + forget_bias)        (Hochreiter and Schmidhuber 1997; Gers et al. 2000)
        gru:  r, z = sigmoid(.), n = tanh(x W_n + b_n + r (h U_n + b'_n)), h' = (1 - z) n + z h
              (Cho et al. 2014, arXiv:1406.1078, with the reset gate after the product, as cuDNN)

    The forget bias is a constant of the cell, as TensorFlow's: 1 lets gradients pass from the first step on
    (Jozefowicz et al. 2015); torch's weights are those of 0. Parameters: input/kernel [D, gates H], input/bias,
    memory/kernel [H, gates H], memory/bias; each gate's part of a kernel is orthogonal.
    """

    features: int  # H
    cell: str = "tanh"
    forget_bias: float = 1.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self):
        types: dict[str, Any] = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates = CELLS[self.cell].gates
        self.input = Linear(gates * self.features, kernel_init=of_each_gate(gates, math.sqrt(2)), **types)
        self.memory = Linear(gates * self.features, kernel_init=of_each_gate(gates, 1.0), **types)

    def __call__(self, x: jax.Array, state: jax.Array) -> jax.Array:
        """One step: x [..., D], state [..., S H] -> the new state."""
        return self._next(self.input(x), state)

    def unroll(self, x: jax.Array, starts: jax.Array, state: jax.Array) -> jax.Array:
        """Steps through streams, forgetting where an episode starts.

        Args:
          x: [T, N, D].
          starts: bool [T, N], true where x is the first of an episode: the state is zero before it.
          state: [N, S H] before the first step.

        Returns:
          [T, N, S H], the state after each step.
        """
        return self.scan(x, state, starts=starts)[1]

    def scan(
        self,
        x: jax.Array,
        state: jax.Array,
        *,
        starts: jax.Array | None = None,
        live: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """`unroll` with all it can do.

        Args:
          x, state, starts: as in `unroll`; None: no episode starts.
          live: bool [T, N]; where false the state is held as it is. None: everywhere true.
          reverse: go from the last step to the first; an episode is then entered at its end.

        Returns:
          (state [N, S H] after the last step taken, states [T, N, S H] after each).
        """
        width = CELLS[self.cell].states * self.features
        flags = [flag.shape for flag in (starts, live) if flag is not None]
        if x.ndim != 3 or any(shape != x.shape[:2] for shape in flags) or state.shape != (x.shape[1], width):
            raise ValueError(
                f"x has shape {x.shape}, starts or live {flags}, the state {state.shape}, expected [T, N, D], [T, N] "
                f"and [N, {width}]"
            )
        if reverse and starts is not None:
            starts = jnp.concatenate([starts[1:], jnp.zeros_like(starts[:1])])
        projected = self.input(x)  # all steps in one product; only the state has to wait for the step before

        def step(module, state, now):
            x, start, live = now
            before = state if start is None else jnp.where(start[:, None], 0.0, state)
            after = module._next(x, before)
            after = after if live is None else jnp.where(live[:, None], after, before)
            return after, after

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, reverse=reverse)
        return scan(self, state.astype(jnp.float32), (projected, starts, live))

    def _next(self, projected, state):
        recurrent = self.memory(state[..., : self.features])
        wide = (a.astype(jnp.float32) for a in (projected, recurrent, state))
        return CELLS[self.cell].step(*wide, self.forget_bias)


class GRU(Recurrent):
    """`Recurrent` with a gated recurrent unit, in the order r, z, n."""

    cell: str = "gru"


@dataclass(frozen=True)
class RNNConfig:
    """Sizes and choices of an `RNN`."""

    cell: Literal["tanh", "relu", "lstm", "gru"]
    features: int  # H
    layers: int = 1  # L
    bidirectional: bool = False
    forget_bias: float = 1.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.cell not in CELLS:
            raise ValueError(f"cell is {self.cell!r}, expected one of {', '.join(CELLS)}")
        for name in ("features", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def directions(self) -> tuple[str, ...]:
        """The names of a layer's passes."""
        return ("forward", "backward") if self.bidirectional else ("forward",)

    def state_shape(self, rows: int) -> tuple[int, int, int, int]:
        """[L, directions, N, S H]."""
        return self.layers, len(self.directions), rows, CELLS[self.cell].states * self.features


class Layer(nn.Module):
    """One layer of an `RNN`: x [T, N, D] -> y [T, N, directions H], written as the body of the layer loop."""

    config: RNNConfig

    @nn.compact
    def __call__(self, x, state, starts, live):
        """(x, state [directions, N, S H], starts, live) -> (y, state)."""
        c = self.config
        outputs, finals = [], []
        for i, name in enumerate(c.directions):
            one = Recurrent(c.features, c.cell, c.forget_bias, c.dtype, c.param_dtype, name=name)
            final, states = one.scan(x, state[i], starts=starts, live=live, reverse=i == 1)
            outputs.append(states[..., : c.features])
            finals.append(final)
        y = jnp.concatenate(outputs, axis=-1).astype(c.dtype)
        return (y if live is None else jnp.where(live[..., None], y, 0)), jnp.stack(finals)


class RNN(nn.Module):
    """L recurrent layers, each in one direction or both; that of torch.nn.RNN, LSTM and GRU under one config.

    Parameters: first/forward/... as in `Recurrent`, with `bidirectional` first/backward/..., and for L > 1 rest/... of
    the layers behind, with a leading axis L - 1: they are scanned. No dropout between layers.
    """

    config: RNNConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        starts: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Run over whole streams.

        Args:
          x: [T, N, D].
          state: [L, directions, N, S H] before the first step; None: zeros.
          starts: bool [T, N], true where an episode starts; both directions stay inside episodes. None: nowhere.
          lengths: int [N] of the streams: behind it the state is held, and the output is 0. None: T.

        Returns:
          (outputs of the last layer [T, N, directions H], state after the last step).
        """
        c = self.config
        shape = c.state_shape(x.shape[1] if x.ndim == 3 else 0)
        state = jnp.zeros(shape) if state is None else state
        rows = shape[2:3] if lengths is None else lengths.shape
        if x.ndim != 3 or state.shape != shape or rows != shape[2:3]:
            raise ValueError(
                f"x has shape {x.shape}, the state {state.shape}, lengths {rows}, expected [T, N, D], "
                f"[L, directions, N, S H] = {shape} and [N]"
            )
        live = None if lengths is None else jnp.arange(x.shape[0])[:, None] < lengths[None]
        x, first = Layer(c, name="first")(x, state[0], starts, live)
        if c.layers == 1:
            return x, first[None]
        in_axes: Any = (0, nn.broadcast, nn.broadcast)
        scanned: Any = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes)
        x, rest = scanned(c, name="rest")(x, state[1:], starts, live)
        return x, jnp.concatenate([first[None], rest])


def truncated(f: Callable, state: Any, xs: Any, *, chunk: int) -> tuple[Any, Any]:
    """Truncated back-propagation through time: the state passes from chunk to chunk, the gradient does not.

    f(state, xs of one chunk) -> (state, ys), as it would be called on the whole; the result is equal to that. With
    chunk = T the gradients are too. (Williams and Peng 1990, with as many steps forward as back.) The backward pass
    keeps what f keeps for all chunks; `jax.checkpoint(f)` keeps that of one.

    Args:
      f: the network, and what it needs of the loss.
      state: before the first step; gradients of the first chunk reach it.
      xs: pytree of arrays [T, ...].
      chunk: steps; divides T.

    Returns:
      (state, without a gradient; ys [T, ...]).
    """
    lengths = {x.shape[0] for x in jax.tree.leaves(xs)}
    if len(lengths) != 1 or chunk < 1 or max(lengths) % chunk:
        raise ValueError(f"chunk is {chunk} for arrays of {sorted(lengths)} steps, expected one length and a divisor")
    cut = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), xs)

    def step(state, xs):
        state, ys = f(state, xs)
        return lax.stop_gradient(state), ys

    state, ys = lax.scan(step, state, cut)
    return state, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes and choices of a recurrent language model; embeddings and layers share one width."""

    vocab_size: int  # V
    width: int  # D = H
    layers: int = 1
    cell: Literal["tanh", "relu", "lstm", "gru"] = "lstm"
    forget_bias: float = 1.0
    tie_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def rnn(self) -> RNNConfig:
        """The config of its layers."""
        shared = {field.name for field in dataclasses.fields(RNNConfig)} & {f.name for f in dataclasses.fields(self)}
        return RNNConfig(features=self.width, **{name: getattr(self, name) for name in shared})


class Memory(NamedTuple):
    """The cache of a recurrent language model, of the same size at every length.

    k: [L, B, S H] float32, the states. v: nothing. length: int32 scalar, columns read so far.
    """

    k: jax.Array
    v: tuple[()]
    length: jax.Array


class RecurrentDecoder(nn.Module):
    """tokens [B, T] -> hidden [B, T, D]: embedding and an `RNN`.

    Parameters: embed/embedding [V, D] ~ N(0, 1 / D), rnn/... as in `RNN`, unembed/kernel [D, V] unless tied.
    """

    config: RecurrentConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, starts: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(tokens [B, T], starts bool [B, T], state [L, B, S H]) -> (hidden [B, T, D], state)."""
        c = self.config
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        x = nn.Embed(c.vocab_size, c.width, embedding_init=normal(c.width**-0.5), **dtypes, name="embed")(tokens)
        if not c.tie_embeddings:
            Kernel((c.width, c.vocab_size), c.param_dtype, name="unembed")()
        x, state = RNN(c.rnn, name="rnn")(jnp.swapaxes(x, 0, 1), state[:, None], starts=starts.T)
        return jnp.swapaxes(x, 0, 1), state[:, 0]


def recurrent_language_model(config: RecurrentConfig) -> LanguageModel:
    """A recurrent network as a LanguageModel: every loss and loop takes it where it takes a Transformer.

    `apply` begins from a zero state wherever the mask's `Segments` begin a new id: at packed documents, and where
    padding on the left ends. Its masks are `Causal()` and `Causal() & Segments(...)`; positions are not looked at. The
    cache is a `Memory`, whatever length is asked for: rows can be repeated, but columns cannot be moved
    (`posttrain.slots`), nor can rows share a prompt behind one mask (`share_prompt`).
    """
    model = RecurrentDecoder(config)

    def init_cache(batch, length):
        shape = config.rnn.state_shape(batch)
        return Memory(jnp.zeros((shape[0], *shape[2:])), (), jnp.int32(0))

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return model.init(key, tokens, tokens == 0, init_cache(1, 1).k)["params"]

    def apply(params, tokens, *, positions=None, mask=None, cache=None):
        mask = Causal() if mask is None else mask
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}, expected [B, T]: one sequence is tokens[None]")
        memory = init_cache(len(tokens), 0) if cache is None else cache
        starts = segment_starts(mask, memory.length, tokens.shape)
        out: Any = model.apply({"params": params}, tokens, starts, memory.k)
        hidden, state = out
        return hidden, None if cache is None else Memory(state, (), memory.length + tokens.shape[1])

    def unembedding(params):
        kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["unembed"]["kernel"]
        return kernel.astype(config.dtype)

    return LanguageModel(init, apply, unembedding, init_cache)


def segment_starts(mask: Mask, first: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Where tokens of `shape` [B, T], the columns from `first` on, begin a segment of the mask: bool [B, T].

    Raises:
      ValueError: if the mask says more than that tokens see all before them in their own segment.
    """
    causal, starts = documents(mask, shape[0], shape[1], first)
    if not causal:
        raise ValueError(
            f"the mask is {type(mask).__name__}; expected Causal() & ...: a recurrent state knows what came before"
        )
    begin = jnp.broadcast_to((first + jnp.arange(shape[1]) == 0)[None], shape)
    return begin if starts is None else begin | starts


SIZES: dict[str, RecurrentConfig] = {
    "tiny": RecurrentConfig(vocab_size=64, width=32, layers=2),
    # Zaremba et al. 2014, arXiv:1409.2329: words of the Penn Treebank, 20 and 66 million parameters
    "zaremba_medium": RecurrentConfig(vocab_size=10_000, width=650, layers=2),
    "zaremba_large": RecurrentConfig(vocab_size=10_000, width=1500, layers=2),
    # the medium one with other cells, of our own
    "rnn_medium": RecurrentConfig(vocab_size=10_000, width=650, layers=2, cell="tanh"),
    "gru_medium": RecurrentConfig(vocab_size=10_000, width=650, layers=2, cell="gru"),
}
