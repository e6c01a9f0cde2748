"""The one driver: a chunk of steps as one program, then Python over chunks for everything that is not a computation."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Progress(NamedTuple):
    """What a run looks like after a chunk.

    `state`: the state now; the next chunk takes its buffers, so copy what must outlive it. `step`: steps done.
    `metrics`: one dict of floats for each step of the chunk. `compile_seconds`: spent on tracing and compiling in this
    chunk. `seconds`: spent on running it.
    """

    state: Any
    step: int
    metrics: list[dict[str, float]]
    compile_seconds: float
    seconds: float


class NonFinite(FloatingPointError):
    """A run in which nothing finite came out for too many steps in a row."""


def run(
    step: Callable,
    state: Any,
    data: Any,
    *,
    steps: int,
    chunk: int = 10,
    jit: bool = True,
    patience: int = 10,
) -> Iterator[Progress]:
    """Runs a step until `steps` are done, a chunk at a time.

    Chunks end at multiples of `chunk` counted from step 0, so that a resumed run goes through the very programs of the
    uninterrupted one and ends bitwise where that one ends.

    Args:
      step: `(state, data) -> (state, metrics)`, where `state.step` counts and `metrics` holds scalars.
      state: the state to start from, at whatever step it is. Its buffers are donated.
      data: passed to every step unchanged.
      steps: total to be done, those before `state.step` included.
      chunk: steps per program: metrics, checkpoints and evaluations happen between chunks.
      jit: True compiles a chunk into one program (`scan`); False calls `step` as it is, for steps that visit Python.
      patience: skipped updates in a row after which the run stops.

    Yields:
      A `Progress` for each chunk.

    Raises:
      ValueError: when `chunk` is not positive.
      NonFinite: after `patience` skipped updates in a row; nothing of the chunk is yielded, so what was saved stays.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected at least 1 step")
    programs: dict[int, Callable] = {}
    done = int(state.step)
    while done < steps:
        length = min(chunk - done % chunk, steps - done)
        start = time.perf_counter()
        if length not in programs:
            programs[length] = _compiled(step, state, data, length) if jit else _plain(step, length)
        compiled = time.perf_counter()
        state, stacked = programs[length](state, data)
        stacked = jax.tree.map(np.asarray, jax.device_get(stacked))
        finished = time.perf_counter()
        done += length
        if int(getattr(state, "skipped_in_a_row", 0)) >= patience:
            raise NonFinite(
                f"loss or gradient was not finite for {int(state.skipped_in_a_row)} steps in a row, up to step {done}. "
                "The parameters are those of the last good update; lower the learning rate or look at the data, "
                "and resume from the last checkpoint"
            )
        rows = [{name: float(values[i]) for name, values in stacked.items()} for i in range(length)]
        yield Progress(state, done, rows, compiled - start, finished - compiled)


def _compiled(step: Callable, state: Any, data: Any, length: int) -> Callable:
    def program(state, data):
        return jax.lax.scan(lambda state, _: step(state, data), state, length=length)

    layout = jax.tree.map(lambda x: x.sharding, state)  # a state stays where it lies, and everyone reads the metrics
    return jax.jit(program, donate_argnums=0, out_shardings=(layout, layout.step)).lower(state, data).compile()


def _plain(step: Callable, length: int) -> Callable:
    def program(state, data):
        rows = []
        for _ in range(length):
            state, metrics = step(state, data)
            rows.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *rows)

    return program
