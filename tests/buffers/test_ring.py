"""The ring against a list, over wrap-around, with hypothesis choosing the sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.buffers import ring

SIZES = dict(size=st.sampled_from([(1, 1), (4, 3), (5, 2)]), moments=st.integers(0, 13))
ADD = jax.jit(ring.add, donate_argnums=0)
SAMPLE = jax.jit(ring.sample, static_argnums=2)
SEQUENCES = jax.jit(ring.sample_sequences, static_argnums=2, static_argnames="length")


def stamp(moment, streams):
    """An item that says when and where it was written, its successor written with it."""
    return {
        "time": jnp.full((streams,), moment, jnp.int32),
        "stream": jnp.arange(streams, dtype=jnp.int32),
        "image": jnp.full((streams, 2, 2), moment % 256, jnp.uint8),
    }


def filled(slots, streams, moments):
    item = jax.tree.map(lambda x: x[0], stamp(0, streams))
    buffer = ring.init(item, slots=slots, streams=streams)
    for moment in range(1, moments + 1):
        buffer = ADD(buffer, stamp(moment, streams))
    return buffer


@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_holds_the_last_moments(size, moments):
    slots, streams = size
    buffer = filled(slots, streams, moments)
    kept = min(slots, moments)
    assert int(buffer.size) == kept
    assert int(buffer.cursor) == moments % slots
    times = np.asarray(buffer.items["time"])
    assert sorted(times[: slots if moments >= slots else kept, 0]) == list(range(moments - kept + 1, moments + 1))
    assert (times == times[:, :1]).all()
    assert (np.asarray(buffer.items["stream"])[:kept] == np.arange(streams)).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), **SIZES)
def test_samples_only_what_is_there(seed, size, moments):
    slots, streams = size
    buffer = filled(slots, streams, moments + 1)
    batch = SAMPLE(buffer, jax.random.key(seed), 64)
    oldest = max(1, moments + 1 - slots + 1)
    assert set(np.asarray(batch["time"])) <= set(range(oldest, moments + 2))
    np.testing.assert_array_equal(batch["image"][:, 0, 0], batch["time"] % 256)
    assert batch["image"].dtype == jnp.uint8
    assert batch["image"].shape == (64, 2, 2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(1, 4), moments=st.integers(4, 13))
def test_sequences_are_contiguous(seed, length, moments):
    slots, streams = 5, 2
    buffer = filled(slots, streams, moments)
    batch = SEQUENCES(buffer, jax.random.key(seed), 64, length=length)
    times, streams_ = np.asarray(batch["time"]), np.asarray(batch["stream"])
    assert times.shape == (64, length)
    assert (np.diff(times, axis=1) == 1).all()
    assert (streams_ == streams_[:, :1]).all()
    assert times.min() >= max(1, moments - slots + 1)
    assert times.max() <= moments


def test_every_item_and_every_start_is_equally_likely():
    buffer = filled(5, 2, 8)  # holds moments 4..8 of two streams
    n = 20_000
    batch = ring.sample(buffer, jax.random.key(0), n)
    counts = np.bincount(np.asarray(batch["time"] * 2 + batch["stream"]), minlength=18)[8:]
    assert counts.sum() == n
    assert chi_square(counts, np.full(10, n / 10)) < 27.9  # 99.9 % point of 9 degrees of freedom
    batch = ring.sample_sequences(buffer, jax.random.key(1), n, length=3)
    counts = np.bincount(np.asarray(batch["time"] * 2 + batch["stream"])[:, 0], minlength=18)[8:]
    assert chi_square(counts[:6], np.full(6, n / 6)) < 20.5  # 5 degrees: starts 4, 5, 6
    assert not counts[6:].any()


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_add_does_not_copy_the_memory():
    buffer = ring.init(jnp.zeros((4,)), slots=100_000)
    compiled = ADD.lower(buffer, jnp.ones((1, 4))).compile()
    analysis = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 1_000
    assert analysis.alias_size_in_bytes >= 100_000 * 16
    before = buffer.items.unsafe_buffer_pointer()
    assert compiled(buffer, jnp.ones((1, 4))).items.unsafe_buffer_pointer() == before


def test_works_under_vmap_over_seeds():
    buffers = jax.vmap(lambda _: ring.init(jnp.zeros(()), slots=3, streams=2))(jnp.arange(4))
    values = jnp.arange(8.0).reshape(4, 2)
    buffers = jax.vmap(ring.add)(buffers, values)
    batch = jax.vmap(lambda b, k: ring.sample(b, k, 16))(buffers, jax.random.split(jax.random.key(0), 4))
    for i in range(4):
        assert set(np.asarray(batch[i])) == set(np.asarray(values[i]))


def test_refuses_what_does_not_fit():
    buffer = ring.init({"a": jnp.zeros(3)}, slots=2, streams=2)
    with pytest.raises(ValueError, match="at least 1"):
        ring.init(jnp.zeros(()), slots=0)
    with pytest.raises(ValueError, match="structure"):
        ring.add(buffer, {"b": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"item\['a'\] has shape \(3,\)"):
        ring.add(buffer, {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match="length 3"):
        ring.sample_sequences(buffer, jax.random.key(0), 1, length=3)
