"""Reductions: a fixture in which all differ, packing, what an empty row counts for, and exactness under
splitting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.losses import reduce, segments
from tests.losses.devices import psum_over_shards
from tests.oracles import losses as oracle

# Two sequences: one token of loss 2, and three of losses 0, 0, 3.
VALUES = jnp.array([[2.0, jnp.nan, jnp.nan], [0.0, 0.0, 3.0]])
MASK = jnp.array([[1, 0, 0], [1, 1, 1]])
PACKED, PACKED_MASK = jnp.array([[2.0, 0.0, 0.0, 3.0, jnp.nan]]), jnp.array([[1, 1, 1, 1, 0]])
IDS = jnp.array([[1, 2, 2, 2, 0]])
FIXTURE = {"tokens": 1.25, "sequences": 1.5, "sums": 2.5, "constant": 0.625}
REDUCTIONS = {
    "tokens": reduce.tokens,
    "sequences": reduce.sequences,
    "sums": reduce.by_name("constant", length=1),
    "constant": reduce.by_name("constant", length=4),
}
every = pytest.mark.parametrize("name", REDUCTIONS)


@every
def test_every_reduction_differs_on_the_fixture(name):
    assert REDUCTIONS[name](VALUES, MASK).mean == FIXTURE[name]
    assert REDUCTIONS[name](PACKED, PACKED_MASK, segment_ids=IDS).mean == FIXTURE[name]


@every
def test_a_batch_in_parts(name):
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(8, 5)), rng.random((8, 5)) > 0.5
    mask[3] = False
    rows = [list(v[m]) for v, m in zip(values, mask, strict=True)]
    total, weight = {
        "tokens": lambda: oracle.reduce_tokens(rows),
        "sequences": lambda: oracle.reduce_sequences(rows),
        "sums": lambda: oracle.reduce_constant(rows, 1),
        "constant": lambda: oracle.reduce_constant(rows, 4),
    }[name]()
    whole = REDUCTIONS[name](values, mask)
    np.testing.assert_allclose(whole.total, total, rtol=1e-5)
    assert whole.weight == weight
    parts = [REDUCTIONS[name](values[i : i + 3], mask[i : i + 3]) for i in range(0, 8, 3)]
    np.testing.assert_allclose(sum(p.total for p in parts), total, rtol=1e-5)
    assert sum(p.weight for p in parts) == weight
    sharded = psum_over_shards(lambda v, m: REDUCTIONS[name](v, m), jnp.float32(values), jnp.asarray(mask))
    np.testing.assert_allclose(sharded.mean, total / weight, rtol=1e-5)


@every
def test_an_empty_row_counts_for_nothing(name):
    nothing = jnp.zeros((1, 3))
    more = REDUCTIONS[name](jnp.concatenate([VALUES, nothing]), jnp.concatenate([MASK, nothing]))
    assert more.mean == FIXTURE[name]
    empty = REDUCTIONS[name](nothing, nothing)
    assert empty.total == empty.weight == empty.mean == 0.0


def test_an_empty_row_may_count_as_a_sequence():
    values, mask = jnp.concatenate([VALUES, jnp.ones((1, 3))]), jnp.concatenate([MASK, jnp.zeros((1, 3))])
    assert reduce.sequences(values, mask, count_empty=True) == (3.0, 3.0)
    assert reduce.constant(values, mask, length=4, count_empty=True) == (1.25, 3.0)


@every
def test_gradient_is_what_each_token_weighs(name):
    grad = jax.grad(lambda v: REDUCTIONS[name](v, MASK).mean)(VALUES)
    token = {
        "tokens": [1 / 4, 1 / 4],
        "sequences": [1 / 2, 1 / 6],
        "sums": [0.5, 0.5],
        "constant": [1 / 8, 1 / 8],
    }
    expected = np.where(MASK, np.array(token[name])[:, None], 0.0)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
    nothing = jax.grad(lambda v: REDUCTIONS[name](v, jnp.zeros_like(MASK)).mean)(VALUES)
    assert not nothing.any()


@every
def test_bfloat16_is_summed_in_float32(name):
    values, mask = jnp.ones((2, 300), jnp.bfloat16), jnp.ones((2, 300), bool)
    result = REDUCTIONS[name](values, mask)
    assert result.total.dtype == result.weight.dtype == jnp.float32
    assert result.mean == {"tokens": 1, "sequences": 1, "sums": 300, "constant": 75}[name]


def test_sequence_sums_and_spread():
    values, ids = jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([[7, 7, 3, 0]])
    sums = segments.sequence_sums(values, jnp.ones((1, 4)), segment_ids=ids)
    assert sums.tolist() == [[3.0, 3.0, 4.0, 0.0]]
    assert segments.spread(sums, length=4, segment_ids=ids).tolist() == [[3.0, 3.0, 3.0, 4.0]]
    assert segments.sequence_sums(values, jnp.array([[1, 0, 1, 1]])).tolist() == [[8.0]]
    again = jnp.array([[1, 1, 2, 1]])  # equal ids apart are not one sequence
    assert segments.sequence_sums(values, jnp.ones((1, 4)), segment_ids=again).tolist() == [[3.0, 3.0, 4.0, 0.0]]


def test_elements_of_any_shape():
    assert reduce.elements(jnp.arange(4.0)) == (6.0, 4.0)
    assert reduce.elements(jnp.array([1.0, jnp.nan]), jnp.array([1, 0])).mean == 1.0
    assert reduce.elements(jnp.float32(3.0)).mean == 3.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reduce.tokens(np.ones(3), np.ones(3)), r"expected \[B, T\]"),
        (lambda: reduce.sequences(np.ones((2, 3)), np.ones((3, 2))), r"mask has shape \(3, 2\)"),
        (lambda: reduce.elements(np.ones(3), np.ones(2)), "nothing is broadcast"),
        (lambda: reduce.by_name("mean"), "'sequences'"),
        (lambda: reduce.by_name("constant"), "pass length="),
        (lambda: reduce.sequences(PACKED, PACKED_MASK, segment_ids=IDS, count_empty=True), "unpack the rows"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
