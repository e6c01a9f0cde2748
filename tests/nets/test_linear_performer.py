"""Performer beyond its estimator: long keys, early tokens that know nothing of later ones, projections drawn anew."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop
from jaxrl.kernels.attention import Causal, Full, Segments
from jaxrl.nets import presets
from jaxrl.nets.cache import Slot
from jaxrl.nets.language_model import language_model
from jaxrl.nets.linear_attention import LinearAttention, LinearConfig, log_features, redraw, redraw_every
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
SIZE, FEATURES, TOKENS = 64, 128, 24
STARTS = (0, 7, 16)  # of documents
IDS = jnp.asarray(np.searchsorted(STARTS, np.arange(TOKENS), side="right"))[None]


def module(**changes) -> Any:
    return LinearAttention(2, 1, SIZE, linear=LinearConfig("performer", random=FEATURES, rotary=False, **changes))


def inputs(lengths):
    """x [1, T, 1 + D], whose first number is 1, and parameters: keys of these lengths, o one head after the other."""
    draw = np.random.default_rng(0).normal(size=(TOKENS, SIZE))
    x = draw / np.linalg.norm(draw, axis=1, keepdims=True) * np.asarray(lengths)[:, None]
    x = jnp.asarray(np.concatenate([np.ones((TOKENS, 1)), x], axis=1), jnp.float32)[None]
    params = module().init(jax.random.key(1), x, None, None, Causal())["params"]
    plain = jnp.eye(1 + SIZE)[:, 1:]
    turned = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, SIZE)))[0], jnp.float32)
    kernels = {"q": jnp.concatenate([plain, plain @ turned], axis=1), "k": plain, "v": plain / 32}
    return x, params | {name: {"kernel": kernel} for name, kernel in kernels.items()}


def heads(params, x, mask, cache=None, **changes):
    """What the heads give [1, T, 2, D], and the slot; the last map is that of one head at a time."""
    out = []
    for head in range(2):
        own = jnp.zeros((2, SIZE, 1 + SIZE)).at[head, :, 1:].set(jnp.eye(SIZE)).reshape(2 * SIZE, 1 + SIZE)
        y, slot = module(**changes).apply({"params": params | {"o": {"kernel": own}}}, x, None, None, mask, cache)
        out.append(y[..., 1:])
    return jnp.stack(out, axis=2), slot


outputs = jit(heads, static_argnames=("decay", "implementation"))


def by_hand(params, x, causal, documents=True, decay=(1.0, 1.0)):
    """float64, weights as logarithms: sum_j sum_f exp(log phi(q) + log phi(k)) v_j over the same divided by v = 1."""
    found, w = [], np.asarray(params["projection"], np.float64)
    q, k, v = (np.asarray(x[0] @ params[name]["kernel"], np.float64) for name in "qkv")
    log = lambda a: (a * SIZE**-0.25) @ w.T - np.square(a * SIZE**-0.25).sum(1, keepdims=True) / 2
    t, ids = np.arange(TOKENS), np.asarray(IDS[0]) if documents else np.zeros(TOKENS)
    seen = ids[:, None] == ids[None]
    seen = seen & (t[:, None] >= t[None]) if causal else seen
    for head in range(2):
        pairs = log(q[:, head * SIZE : (head + 1) * SIZE])[:, None] + log(k)[None]
        weights = np.log(np.exp(pairs - pairs.max(2, keepdims=True)).sum(2)) + pairs.max(2)
        weights = np.where(seen, weights + np.log(decay[head]) * (t[:, None] - t[None]), -np.inf)
        weights = np.exp(weights - weights.max(1, keepdims=True))
        found.append(weights @ v / weights.sum(1, keepdims=True))
    return np.stack(found, axis=1)[None]


LENGTHS = {"32": np.full(TOKENS, 32.0), "mixed": np.random.default_rng(2).permutation(np.linspace(1, 40, TOKENS))}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_long_keys_are_weighed_as_in_float64(lengths):
    x, params = inputs(LENGTHS[lengths])
    masks = {"causal": Causal(), "causal packed": Causal() & Segments(IDS), "full": Full(), "packed": Segments(IDS)}
    run = lambda mask, **changes: outputs(params, x, mask, **changes)[0]
    for name, mask in masks.items():
        want = by_hand(params, x, "causal" in name, "packed" in name)
        np.testing.assert_allclose(run(mask), want, atol=2e-4, err_msg=name)
        if "causal" in name:
            np.testing.assert_allclose(run(mask, implementation="recurrent"), want, atol=2e-4, err_msg=name)
    ones = params | {"v": {"kernel": jnp.zeros((1 + SIZE, SIZE)).at[0].set(1.0)}}
    for mask in masks.values():
        np.testing.assert_allclose(outputs(ones, x, mask)[0], 1.0, atol=1e-4)  # of keys alone it was 7e-6

    loss = lambda params, x: jnp.square(heads(params, x, masks["causal packed"])[0]).sum()
    gradients = jit(jax.grad(loss, (0, 1)))(params, x)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)) and jnp.any(gradients[0]["k"]["kernel"])
    assert not jnp.any(gradients[0]["projection"])


def test_gradients_are_those_of_the_formula():
    """Differences of float64 `by_hand`, the largest feature so far being a constant that a ratio does not notice."""
    x, params = inputs(LENGTHS["mixed"] / 2)
    along = np.random.default_rng(3).normal(size=(1 + SIZE, SIZE))
    loss = lambda k: jnp.square(heads(params | {"k": {"kernel": k}}, x, Causal())[0]).sum()
    got = jit(jax.grad(loss))(params["k"]["kernel"])
    moved = lambda e: params | {"k": {"kernel": np.asarray(params["k"]["kernel"], np.float64) + e * along}}
    wide = np.asarray(x, np.float64)
    up, down = (np.square(by_hand(moved(e), wide, True, False)).sum() for e in (1e-6, -1e-6))
    np.testing.assert_allclose(np.sum(np.asarray(got, np.float64) * along), (up - down) / 2e-6, rtol=2e-3)


@pytest.mark.parametrize("decay", ["none", "retention"])
def test_the_state_carries_its_scale(decay):
    """Through a cache in pieces, the longest keys first, last or between; a state of zeros is an empty one."""
    shares = (1.0, 1.0) if decay == "none" else (1 - 2.0**-5, 1 - 2.0**-6)
    for lengths in (np.linspace(1, 40, TOKENS), np.linspace(40, 1, TOKENS), LENGTHS["mixed"]):
        x, params = inputs(lengths)
        shape = LinearConfig("performer", random=FEATURES, decay=decay).state(2, 1, SIZE)
        assert shape == (1 if decay == "none" else 2, FEATURES, SIZE + 2)
        for mask, packed in ((Causal(), False), (Causal() & Segments(IDS), True)):
            states, pieces = jnp.zeros((1, 1, shape[0], 1, *shape[1:])), []
            for part in (slice(0, 1), slice(1, 9), slice(9, 10), slice(10, 11), slice(11, TOKENS)):
                slot = Slot(states, None, jnp.int32(0), jnp.int32(part.start))
                here: Any = Causal() & Segments(IDS[:, part], IDS) if packed else mask
                y, slot = outputs(params, x[:, part], here, slot, decay=decay)
                states = slot.k
                pieces.append(y)
            want = by_hand(params, x, True, packed, shares)
            np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=3e-4)


def test_early_tokens_know_nothing_of_later_keys():
    """To the bit, however large the later ones; a scale of the whole sequence leaves nothing of the early keys."""
    x, params = inputs(LENGTHS["mixed"])
    after = x.at[:, 12:, 1:].multiply(-7.0)
    run = lambda x: outputs(params, x, Causal())[0][:, :12]
    np.testing.assert_array_equal(run(x), run(after))
    largest = jnp.max(log_features(after[0] @ params["k"]["kernel"], params["projection"]), axis=-1)
    assert float(largest.max() - largest.min()) > 90  # float32 ends at exp(-87)


CONFIG = presets.performer(12, 16, 2, heads=2, kv_heads=2, max_length=32, linear=LinearConfig("performer", random=8))
PROJECTION = ("linear_layers", "attention", "projection")


def test_projections_are_drawn_anew_in_a_run_and_a_resumed_run_is_the_same():
    model, every = language_model(CONFIG), 3
    recipe = sft.make(sft.SFTConfig(batch=4), model, optax.adamw(1e-2, weight_decay=0.0))
    rows = TokenBatch(jnp.tile(jnp.arange(2, 8)[None], (8, 1)), jnp.ones((8, 6)))
    of = lambda params: functools.reduce(lambda tree, name: tree[name], PROJECTION, params)
    params = jit(model.init)(jax.random.key(0))
    assert CONFIG.linear is not None
    step = jit(redraw_every(recipe.step, every, CONFIG.linear))

    def run(state, steps):
        found = [np.asarray(of(state.params))]
        for progress in loop.run(step, state, rows, steps=steps, chunk=1, jit=False):
            state = progress.state
            found.append(np.asarray(of(state.params)))
            assert progress.metrics[-1]["train/loss"] < 10
        return state, found

    final, drawn = run(recipe.init(jax.random.key(1), params), 8)
    changed = [i for i in range(8) if (drawn[i] != drawn[i + 1]).any()]
    assert changed == [3, 6]  # before the steps of these numbers
    for at in changed:
        assert (drawn[at] != drawn[at + 1]).all()
        np.testing.assert_allclose(np.square(drawn[at + 1]).sum(-1).mean(), 8, rtol=0.5)  # of rows of Dh = 8 numbers
    assert (drawn[4] != drawn[7]).all()

    half, _ = run(recipe.init(jax.random.key(1), params), 5)
    resumed, _ = run(half, 8)
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    other, drawn_by_other = run(recipe.init(jax.random.key(2), params), 4)
    assert other.step == 4 and (drawn_by_other[4] != drawn[4]).all()  # by the run's key


def test_what_cannot_be_drawn_anew():
    for n, linear in ((0, CONFIG.linear), (5, LinearConfig())):
        with pytest.raises(ValueError, match="redraw_every"):
            redraw_every(lambda state, data: (state, {}), n, linear)  # pyright: ignore
    same = dataclasses.replace(LinearConfig("performer_relu"), random=4)
    tree = {"a": {"projection": jnp.zeros((4, 4))}, "b": jnp.ones(3)}
    new = redraw(same, tree, jax.random.key(0))
    assert jnp.any(new["a"]["projection"]) and (new["b"] == 1).all()
