"""The driver: chunks, exact resumption, and the stop after too many bad steps."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import loop


@flax.struct.dataclass
class State:
    step: jax.Array
    value: jax.Array
    skipped_in_a_row: jax.Array


def step(state, data):
    value = state.value * 1.1 + data[state.step % 3]
    return state.replace(step=state.step + 1, value=value), {"value": value, "step": state.step}


def start(step=0, value=1.0):
    return State(jnp.int32(step), jnp.float32(value), jnp.int32(0))


DATA = jnp.asarray([0.5, -1.0, 2.0])


@pytest.mark.parametrize("jit", [True, False])
def test_every_step_is_done_and_reported_once(jit):
    progress = list(loop.run(step, start(), DATA, steps=7, chunk=3, jit=jit))
    assert [p.step for p in progress] == [3, 6, 7]
    assert [row["step"] for p in progress for row in p.metrics] == list(range(7))
    expected = 1.0
    for p in progress:
        for row in p.metrics:
            expected = np.float32(expected * np.float32(1.1) + np.asarray(DATA)[int(row["step"]) % 3])
            np.testing.assert_allclose(row["value"], expected, rtol=1e-6)


@pytest.mark.parametrize("stopped_at", [3, 6])
def test_resuming_at_a_chunk_is_bitwise_the_same(stopped_at):
    *_, whole = loop.run(step, start(), DATA, steps=8, chunk=3)
    *_, first = loop.run(step, start(), DATA, steps=stopped_at, chunk=3)
    *_, second = loop.run(step, first.state, DATA, steps=8, chunk=3)
    assert second.state.value == whole.state.value and second.step == 8


def test_a_run_that_is_done_does_nothing():
    assert list(loop.run(step, start(step=5), DATA, steps=5)) == []


def test_too_many_skipped_updates_stop_the_run():
    """What came before is yielded; the chunk that crossed the limit is not."""

    def failing(state, data):
        bad = state.step >= 4
        return state.replace(step=state.step + 1, skipped_in_a_row=jnp.where(bad, state.skipped_in_a_row + 1, 0)), {
            "bad": bad
        }

    seen = []
    with pytest.raises(loop.NonFinite, match="not finite for 4 steps in a row, up to step 8.*lower the learning rate"):
        for progress in loop.run(failing, start(), DATA, steps=20, chunk=2, patience=3):
            seen.append(progress.step)
    assert seen == [2, 4, 6]


def test_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk is 0; expected at least 1 step"):
        list(loop.run(step, start(), DATA, steps=1, chunk=0))
