"""Which problems are drawn, and batches that are kept full."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.posttrain import draw
from jaxrl.posttrain.rewards import relative_length, soft_overlong


def state(drawn=0, success=None, seed=0):
    return SimpleNamespace(key=jax.random.key(seed), drawn=jnp.int32(drawn), success=success)


def test_problems_are_drawn_the_more_the_less_they_were_solved():
    success = jnp.asarray([1.0, 0.5, 0.0, 0.0])
    one = jax.jit(lambda n: draw.problems(state(n, success), None, batch=1, number=4, prioritised=True)[0])
    counts = np.bincount([int(one(n)) for n in range(3000)], minlength=4) / 3000
    expected = 1 + draw.FLOOR - np.asarray(success)
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)
    pair = draw.problems(state(5, success), None, batch=4, number=4, prioritised=True)
    assert sorted(pair.tolist()) == [0, 1, 2, 3]  # without repetition


def test_a_curriculum_begins_with_the_easiest_and_lets_all_in():
    difficulty = jnp.asarray([3.0, -1.0, 7.0, 0.0, 5.0, 2.0, 6.0, 4.0])
    drawn = lambda n: set(draw.problems(state(n), difficulty, batch=2, number=8, curriculum_steps=10).tolist())
    assert drawn(0) == {1, 3}
    seen = set().union(*(drawn(n) for n in range(5)))
    assert seen <= {1, 3, 5, 0, 7}  # ceil(0.25 + 0.75 * 0.4 of 8) = 5 at the fifth batch
    assert set().union(*(drawn(n) for n in range(10, 60))) == set(range(8))
    with pytest.raises(ValueError, match="add a column `difficulty`"):
        draw.problems(state(), None, batch=2, number=8, curriculum_steps=10)


def test_success_rates():
    success = jnp.asarray([0.0, 0.5, 0.5, 1.0])
    rewards = jnp.asarray([[1.0, 0.0, jnp.nan, 1.0], [0.2, 0.4, 0.0, 0.0], [jnp.nan] * 4])
    got = draw.record(success, jnp.asarray([0, 3, 1]), rewards, solved=1.0, rate=0.5)
    np.testing.assert_allclose(got, [1 / 3, 0.5, 0.5, 0.5], rtol=1e-6)


def test_groups_that_teach():
    nan = np.nan
    rewards = jnp.asarray([[0, 0, 0], [0, 1, 0], [nan, 1, 1], [nan, nan, nan], [nan, 0, 1]])
    np.testing.assert_array_equal(draw.teaches(rewards), [False, True, False, False, True])


def test_a_batch_is_filled_in_order_and_what_is_left_over_is_dropped():
    rng = np.random.default_rng(0)
    for _ in range(20):
        places, batch, taken = 5, [None] * 5, 0
        arrays, filled = jnp.full((5, 2), -1), jnp.int32(0)
        for number in range(4):
            wanted = rng.random(5) < 0.4
            fresh = 10 * number + np.arange(5)
            for value, good in zip(fresh, wanted, strict=True):
                if good and taken < places:
                    batch[taken], taken = value, taken + 1
            arrays, filled = draw.fill(arrays, jnp.stack([fresh, fresh], 1), filled, jnp.asarray(wanted))
            assert filled == taken
            np.testing.assert_array_equal(arrays[:taken, 1], batch[:taken])
        np.testing.assert_array_equal(arrays[taken:], -1)


def test_soft_overlong_punishment_by_hand():
    lengths = jnp.asarray([1, 12, 13, 14, 16, 20])
    np.testing.assert_allclose(soft_overlong(lengths, limit=16, buffer=4), [0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(ValueError, match="overlong buffer is 0 tokens; expected 1 to the limit of 16"):
        soft_overlong(lengths, limit=16, buffer=0)


def test_length_reward_by_hand():
    lengths = jnp.asarray([[10, 20, 15, 20], [7, 7, 7, 7]])
    correct = jnp.asarray([[True, True, False, False], [True, False, True, True]])
    np.testing.assert_allclose(relative_length(lengths, correct), [[0.5, -0.5, 0.0, -0.5], [0, 0, 0, 0]])
    wrong_and_short = relative_length(lengths[:1], ~correct[:1])
    np.testing.assert_allclose(wrong_and_short, [[0.0, -0.5, 0.0, -0.5]])
