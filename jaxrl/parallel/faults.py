"""What goes wrong with one of several processes: it fails, is told to stop, or is slow; and how the others learn of it.

A process that dies without a word (SIGKILL, a lost host) is noticed by `jax.distributed` alone: see `initialise`.
"""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

_FAILED = "jaxrl/failed/"


class Preempted(SystemExit):
    """A run that saved and stopped because it was told to (SIGTERM). Ends the program with status 75: start again."""

    def __init__(self):
        super().__init__(75)


class Pace(NamedTuple):
    """What the processes know of each other after a chunk.

    `stop`: one was told to stop. `slowest`: the slowest one. `factor`: its seconds over the median of the others'.
    `lost`: its seconds less that.
    """

    stop: bool
    slowest: int
    factor: float
    lost: float

    @property
    def straggles(self) -> bool:
        """Whether the slowest is worth a word: half as slow again as the others, and half a second a chunk."""
        return self.factor > 1.5 and self.lost > 0.5

    def complaint(self) -> str:
        """What to say of the slowest."""
        times, lost = f"{self.factor:.1f} times as long as the others", f"{self.lost:.1f} s a chunk"
        return f"process {self.slowest} takes {times}, which wait {lost} for it"


def meet(*, stop: bool, host: float, chunk: float) -> Pace:
    """What the processes tell each other once a chunk.

    Inside a program all wait for the slowest, and for whoever begins it late, so the seconds of a chunk say nothing of
    one process. It is judged by `host + shortest chunk * probe / slowest probe`: its seconds between programs, and what
    its own devices needed of the chunk, if a small product (`probe`) tells their speeds.

    Args:
      stop: whether this process was told to stop.
      host: its seconds between the last chunk and this one.
      chunk: seconds of this one.
    """
    if distributed.global_state.num_processes == 1:
        return Pace(stop, 0, 1.0, 0.0)
    told = np.asarray([stop, host, chunk, _probe()], np.float32)
    stops, hosts, chunks, probes = np.asarray(multihost_utils.process_allgather(told)).T
    return judge(stops > 0, hosts + chunks.min() * probes / probes.max())


def judge(stops: np.ndarray, seconds: np.ndarray) -> Pace:
    """The pace of processes that took `seconds` each; both `[count]`."""
    slowest = int(seconds.argmax())
    most, median = float(seconds[slowest]), float(np.median(np.delete(seconds, slowest)))
    return Pace(bool(stops.any()), slowest, most / max(median, 1e-9), most - median)


def _probe() -> float:
    """Seconds of a small product on the slowest device of this process, the best of three."""
    program, arrays = _probe_program()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([program(x) for x in arrays])
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def _probe_program() -> tuple[Callable, list[jax.Array]]:
    width, repeats = (256, 1) if jax.default_backend() == "cpu" else (2048, 16)
    program = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: (y @ x) / width, x))
    arrays = [jax.device_put(np.ones((width, width), np.float32), device) for device in jax.local_devices()]
    jax.block_until_ready([program(x) for x in arrays])
    return program, arrays


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM only sets a flag, which the function that is given reads. Outside the main thread: never set.

    After `Preempted` it stays so: a launcher may tell each process, and one of them late.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    note = lambda *_: asked.set()
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    except Preempted:
        before = note
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def fail(message: str, status: int, *, patience: float = 10.0) -> None:
    """Ends this process after an error, and tells the others why; with one process it returns.

    An error that all make alike ends all of them in the same way. Others are ended by `watch` within some seconds.

    Args:
      message: what went wrong.
      status: the exit status.
      patience: seconds to wait for the others, so that process 0 can answer them as long.
    """
    state: Any = distributed.global_state
    if state.client is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        state.client.key_value_set(f"{_FAILED}{state.process_id}", message, allow_overwrite=True)
        until = time.monotonic() + patience
        while len(_failed()) < state.num_processes and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5 if state.process_id == 0 else 0.0)
    os._exit(status)


def watch() -> None:
    """Starts a thread that ends this process after another one has failed; errors that nobody catches are told, too."""
    state: Any = distributed.global_state
    here, over, hook = state.process_id, threading.Event(), sys.excepthook

    def look() -> None:
        with contextlib.suppress(Exception):
            while not _failed():
                if over.wait(1.0):
                    return
            if over.wait(2.0) or here in _failed():  # an error that all make alike is told by each of them
                return
            number, message = next(iter(_failed().items()))
            print(f"process {here} ends, because process {number} failed: {message}", file=sys.stderr)
            fail(f"process {number} failed", 1)

    thread = threading.Thread(target=look, name="jaxrl-watch", daemon=True)
    thread.start()

    def uncaught(kind, error, trace) -> None:
        hook(kind, error, trace)
        fail(f"{kind.__name__}: {error}", 1)

    def leave() -> None:
        """No thread may be inside the client when Python ends, and process 0 answers until all have left."""
        over.set()
        thread.join(10.0)
        if state.client is not None:
            state.client.shutdown()  # waits for all
            state.client = None
            time.sleep(1.0 if here == 0 else 0.0)

    sys.excepthook = uncaught
    atexit.register(leave)


def _failed() -> dict[int, str]:
    client: Any = distributed.global_state.client
    return {int(key.removeprefix(_FAILED)): message for key, message in client.key_value_dir_get(_FAILED)}
