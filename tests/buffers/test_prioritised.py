"""The sum tree against sums, its draws against the priorities."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.buffers import prioritised
from tests.buffers.test_ring import chi_square, stamp

ADD = jax.jit(prioritised.add, donate_argnums=0, static_argnames="length")
UPDATE = jax.jit(prioritised.update, donate_argnums=0)
SAMPLE = jax.jit(prioritised.sample, static_argnums=2, static_argnames="length")


def filled(slots, streams, moments, length=1):
    item = jax.tree.map(lambda x: x[0], stamp(0, streams))
    buffer = prioritised.init(item, slots=slots, streams=streams)
    for moment in range(1, moments + 1):
        buffer = ADD(buffer, stamp(moment, streams), length=length)
    return buffer


def check_sums(tree):
    tree = np.asarray(tree)
    leaves = tree.size // 2
    for node in range(1, leaves):
        assert tree[node] == tree[2 * node] + tree[2 * node + 1]


@settings(max_examples=15, deadline=None)
@given(
    size=st.sampled_from([(1, 1), (4, 3), (5, 2)]),
    moments=st.integers(1, 13),
    data=st.data(),
)
def test_sums_stay_sums(size, moments, data):
    slots, streams = size
    buffer = filled(slots, streams, moments)
    size = min(slots, moments) * streams
    leaves = buffer.tree.shape[0] // 2
    assert leaves >= slots * streams
    assert (np.asarray(buffer.tree[leaves : leaves + size]) == 1).all()
    assert not buffer.tree[leaves + size :].any()
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=4, max_size=4)))
    values = np.array(data.draw(st.lists(st.floats(0.01, 100), min_size=4, max_size=4)), np.float32)
    buffer = UPDATE(buffer, index, values)
    check_sums(buffer.tree)
    for i in set(index):
        assert buffer.tree[leaves + i] in values[index == i]
    assert float(buffer.largest) == max(1.0, values.max())
    buffer = ADD(buffer, stamp(0, streams))
    check_sums(buffer.tree)
    assert (np.asarray(buffer.tree)[leaves + (moments % slots) * streams] == buffer.largest).all()


def test_draws_follow_the_priorities():
    buffer = filled(5, 2, 8)
    priorities = np.array([1, 2, 0.5, 4, 8, 1, 0.25, 3, 5, 2], np.float32)
    buffer = UPDATE(buffer, jnp.arange(10), priorities)
    expected = priorities / priorities.sum()
    n, counts = 32, np.zeros(10)
    for seed in range(400):
        sample = SAMPLE(buffer, jax.random.key(seed), n, beta=0.5)
        counts += np.bincount(np.asarray(sample.index), minlength=10)
    assert chi_square(counts, expected * n * 400) < 27.9  # 99.9 % point of 9 degrees of freedom
    weights = (10 * expected) ** -0.5
    index = np.asarray(sample.index)
    np.testing.assert_allclose(sample.weights, weights[index] / weights[index].max(), rtol=1e-5)
    flat = np.asarray(buffer.ring.items["time"]).reshape(-1)
    np.testing.assert_array_equal(sample.items["time"][:, 0], flat[index])


def test_a_single_draw_follows_the_priorities_too():
    """Without strata to help: one draw a call."""
    buffer = UPDATE(filled(4, 1, 4), jnp.arange(4), jnp.array([1.0, 2.0, 3.0, 4.0]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    index = jax.vmap(lambda key: prioritised.sample(buffer, key, 1, beta=1.0).index[0])(keys)
    counts = np.bincount(np.asarray(index), minlength=4)
    assert chi_square(counts, np.array([0.1, 0.2, 0.3, 0.4]) * 20_000) < 16.3  # 3 degrees


def test_priority_zero_is_never_drawn_even_at_the_edge():
    tree = prioritised.init(jnp.zeros(()), slots=8).tree
    tree = prioritised._write(tree, jnp.array([1, 4]), jnp.array([0.3, 0.7]))
    places = jnp.array([0.0, 0.299, 0.3, 0.999, 1.0, 1.5])
    np.testing.assert_array_equal(prioritised._find(tree, places), [1, 1, 4, 4, 4, 4])


@settings(max_examples=10, deadline=None)
@given(size=st.sampled_from([(4, 3), (5, 2)]), length=st.integers(2, 4), moments=st.integers(4, 13))
def test_sequences_are_complete(size, length, moments):
    slots, streams = size
    buffer = filled(slots, streams, moments, length)
    sample = SAMPLE(buffer, jax.random.key(0), 64, beta=1.0, length=length)
    times, where = np.asarray(sample.items["time"]), np.asarray(sample.items["stream"])
    assert (np.diff(times, axis=1) == 1).all()
    assert (where == where[:, :1]).all()
    assert times.min() >= max(1, moments - slots + 1)
    assert set(times[:, -1]) == set(range(max(length, moments - slots + length), moments + 1))


def test_add_and_update_do_not_copy():
    buffer = prioritised.init(jnp.zeros((4,)), slots=100_000)
    for program, *arguments in ((ADD, jnp.ones((1, 4))), (UPDATE, jnp.arange(3), jnp.ones(3))):
        analysis = program.lower(buffer, *arguments).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < 20_000
        assert analysis.alias_size_in_bytes >= 100_000 * 16 + (1 << 18) * 4
