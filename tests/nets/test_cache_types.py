"""Caches of other types than compute: what they hold, how far they are off, how large they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets import presets
from jaxrl.nets.cache import Int8, Slot, init_cache, load, pack, store, unpack
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import language_model

TYPES = (None, "float32", "bfloat16", "int8")
HALF_STEP = 0.5 / 127  # of the largest number of a token and head


def config(cache_dtype=None, **changes):
    sizes = {"vocab_size": 16, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64, "max_length": 32}
    return TransformerConfig(**(sizes | changes), cache_dtype=cache_dtype)


@functools.cache
def network(cache_dtype=None, **changes):
    model = language_model(config(cache_dtype, **changes))
    return model._replace(apply=jax.jit(model.apply))


@pytest.fixture(scope="module")
def params():
    """Kernels spread out, so that attention and the next token are far from uniform."""
    fresh = jax.jit(network().init)(jax.random.key(0))
    return jax.tree.map_with_path(lambda path, x: x if path[-1].key == "scale" else 6.0 * x, fresh)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 14), 0, 16)


def rounded(x):
    """Each vector of the last axis in 127 steps to either side of zero, number by number."""
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        largest = max(abs(float(number)) for number in x[place])
        if largest > 0:
            out[place] = [round(float(number) / (largest / 127)) * (largest / 127) for number in x[place]]
    return out


def log_probs(model, params, tokens, pieces):
    """Of all next tokens, [B, T, V], with the tokens fed to a cache in pieces."""
    cache, out, start = model.init_cache(tokens.shape[0], tokens.shape[1] + 2), [], 0
    for n in pieces:
        hidden, cache = model.apply(params, tokens[:, start : start + n], cache=cache)
        out.append(hidden)
        start += n
    logits = jnp.concatenate(out, axis=1) @ model.unembedding(params)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64), cache


def test_rounding_is_that_of_the_formula_and_within_half_a_step():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)) * np.logspace(-6, 6, 5)[:, None]
    x[0, 0, 0] = 0
    x = np.float32(x)
    packed = pack(jnp.asarray(x))
    assert packed.values.dtype == jnp.int8 and packed.scales.dtype == jnp.float32
    assert packed.shape == x.shape and packed.scales.shape == x.shape[:-1]
    assert packed.values.max() == 127 and packed.values.min() >= -127
    again = np.asarray(unpack(packed, "float32"), np.float64)
    largest = np.abs(np.float64(x)).max(-1, keepdims=True)
    np.testing.assert_allclose(again, rounded(x), atol=1e-30, rtol=1e-6)
    assert (np.abs(again - x) <= HALF_STEP * largest * (1 + 1e-5)).all()
    assert np.abs(again - x).max(where=largest > 0, initial=0) > 0
    assert not again[0, 0, 0].any()


@pytest.mark.parametrize("cache_dtype", TYPES[1:])
def test_a_write_changes_its_layer_and_columns_alone(cache_dtype):
    draw = np.random.default_rng(0)
    k, v = (jnp.asarray(draw.normal(size=(3, 2, 2, 16)), jnp.float32) for _ in range(2))
    empty = init_cache(config(cache_dtype), 3, 6)
    slot = store(Slot(empty.k, empty.v, jnp.int32(1), jnp.int32(3)), k, v)
    for layer in range(2):
        for kept, x in zip(load(slot._replace(layer=jnp.int32(layer)), "float32"), (k, v), strict=True):
            want = np.zeros((3, 6, 2, 16))
            if layer == 1:
                want[:, 3:5] = rounded(x) if cache_dtype == "int8" else x.astype(cache_dtype).astype(jnp.float32)
            np.testing.assert_allclose(kept, want, atol=1e-6)


def test_the_compute_dtype_by_name_changes_nothing(params, tokens):
    for piece in ([14], [6, 1, 7]):
        own, named = (log_probs(network(name), params, tokens, piece)[0] for name in (None, "float32"))
        np.testing.assert_array_equal(own, named)


def greedy(model, params, tokens, steps):
    hidden, cache = model.apply(params, tokens, cache=model.init_cache(tokens.shape[0], tokens.shape[1] + steps))
    out = []
    for _ in range(steps):
        out.append((hidden[:, -1] @ model.unembedding(params)).argmax(-1).astype(jnp.int32))
        hidden, cache = model.apply(params, out[-1][:, None], cache=cache)
    return np.stack(out, axis=1)


def test_greedy_continuations_do_not_change_with_a_float32_cache(params, tokens):
    first, second = (greedy(network(name), params, tokens, 8) for name in (None, "float32"))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first)) > 2


def test_errors_are_of_the_size_of_the_rounding(params, tokens):
    """Against float32, root mean square over all log-probs.

    The error of a number x in a head of 16 numbers of standard deviation s: bfloat16 is off by at most 2^-9 |x|,
    about 0.001 s on average; int8 by an even error of width max |x| / 127, about 1.8 s / 127 / sqrt(12) = 0.004 s.
    So int8 costs about four times what bfloat16 does, and not ten times.
    """
    exact = log_probs(network(), params, tokens, [6, *[1] * 8])[0]
    error = {}
    for name in ("bfloat16", "int8"):
        got = log_probs(network(name), params, tokens, [6, *[1] * 8])[0]
        error[name] = np.sqrt(np.square(got - exact).mean())
    assert 0 < error["bfloat16"] < 0.01
    assert error["bfloat16"] < error["int8"] < 10 * error["bfloat16"]
    assert error["int8"] < 0.05


@pytest.mark.parametrize("cache_dtype", TYPES)
def test_a_prompt_in_pieces_is_the_prompt(cache_dtype, params, tokens):
    """The scale is a token's own: neither pieces nor other tokens change what is held."""
    model = network(cache_dtype)
    whole, pieces = (log_probs(model, params, tokens, p) for p in ([14], [5, 1, 8]))
    # a number at the border between two steps may fall to either side
    np.testing.assert_allclose(whole[0], pieces[0], atol={"bfloat16": 0.02, "int8": 0.05}.get(cache_dtype, 1e-4))
    assert np.sqrt(np.square(whole[0] - pieces[0]).mean()) < 2e-3


@pytest.mark.parametrize("cache_dtype", TYPES)
def test_left_padded_rows_decode_as_if_they_stood_alone(cache_dtype, params, tokens):
    model = network(cache_dtype)
    padding = jnp.array([0, 5, 2])
    columns = jnp.arange(14)[None]
    real = (columns >= padding[:, None]).astype(jnp.int32)
    positions = jnp.maximum(columns - padding[:, None], 0)
    cache, got = model.init_cache(3, 14), []
    for these in (slice(0, 9), slice(9, 10), slice(10, 14)):
        mask = Causal() & Segments(real[:, these], real)
        hidden, cache = model.apply(params, tokens[:, these], positions=positions[:, these], mask=mask, cache=cache)
        got.append(hidden)
    alone, _ = model.apply(params, tokens[1:2, 5:], cache=model.init_cache(1, 9))
    error = np.abs(jnp.concatenate(got, axis=1)[1, 5:] - alone[0])
    assert np.sqrt(np.square(error).mean()) < (1e-5 if cache_dtype in (None, "float32") else 3e-3)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_donated_cache_is_written_in_place_and_a_scan_decodes_the_same(cache_dtype, params, tokens):
    model = network(cache_dtype)

    def step(cache, token):
        hidden, cache = model.apply(params, token[:, None], cache=cache)
        return cache, hidden[:, 0]

    once = jax.jit(step, donate_argnums=0)
    cache, by_hand = model.init_cache(3, 14), []
    for token in tokens.T:
        before = cache
        cache, hidden = once(cache, token)
        by_hand.append(hidden)
        assert all(x.is_deleted() for x in jax.tree.leaves((before.k, before.v)))
    scanned, hidden = jax.jit(lambda cache: jax.lax.scan(step, cache, tokens.T))(model.init_cache(3, 14))
    np.testing.assert_allclose(hidden, np.stack(by_hand), atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=1),
        *((scanned.k, scanned.v), (cache.k, cache.v)),
    )
    assert int(scanned.length) == 14


def test_gradients_reach_what_is_not_in_an_int8_cache(params, tokens):
    """Rounding has no gradient: keys and values get none, queries do."""
    model = language_model(config("int8"))

    def loss(params):
        return jnp.square(model.apply(params, tokens, cache=model.init_cache(3, 14))[0]).mean(
            where=tokens[:, :, None] > 3
        )

    grads = jax.jit(jax.grad(loss))(params)["layers"]["attention"]
    assert not grads["k"]["kernel"].any() and not grads["v"]["kernel"].any() and grads["q"]["kernel"].any()


def size(cache):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))


def test_bytes():
    """Keys and values of a token and head take Dh numbers each; in int8 as many bytes and a scale of 4."""
    for name, number in {None: 2, "float32": 4, "bfloat16": 2, "int8": 1}.items():
        shape = presets.qwen3_0_6b(dtype="bfloat16", cache_dtype=name)
        cache = jax.eval_shape(lambda shape=shape: init_cache(shape, 4, 1024))
        scale = 4 if name == "int8" else 0
        assert size(cache) == 2 * 28 * 8 * (128 * number + scale) * 4 * 1024
    assert isinstance(cache.k, Int8) and cache.k.shape == cache.v.shape == (28, 4, 8, 1024, 128)
    assert size(init_cache(config("int8"), 2, 3)) == 2 * 2 * 2 * 2 * 3 * (16 + 4)


@pytest.mark.parametrize("name", ["int4", "float16", "", "INT8"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"cache_dtype is '{name}', expected None"):
        config(name)


def test_a_cache_of_the_wrong_shape_is_refused(params, tokens):
    model = language_model(config("int8"))
    with pytest.raises(ValueError, match="make it with the same model's init_cache"):
        model.apply(params, tokens, cache=model.init_cache(2, 14))
