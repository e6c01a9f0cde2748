"""A reward in a process of its own: one that hangs is ended, which a thread never can be."""

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Reward = Callable[..., Sequence[float | None]]

_START = 120.0
"""Seconds in which the process must have imported the file."""


def isolated(
    function: str,
    *,
    timeout: float,
    each: bool = False,
    strict: bool = False,
    evaluation: bool = True,
    memory_gb: float | None = None,
) -> Reward:
    """A Python reward of a file, called in a process of its own, with a time limit that holds.

    The process starts with the first call and imports only what the file imports, JAX on the CPU if it does. After a
    call that took too long, or that the process did not survive, it is ended and the next call starts another.

    Args:
      function: `path/to/file.py:function`, as `load_reward` takes it; the file's `prepare()`, if any, is called first.
      timeout: seconds for a call.
      each: call the function with one completion at a time, so that one that hangs costs only its own reward.
      strict: raise TimeoutError, or RuntimeError where the process died; otherwise warn and answer None.
      evaluation: False switches off eval, exec and compile of text while a call is answered, but for code that begins
        with one of the file's `GENERATED`.
      memory_gb: gigabytes of address space; None is no limit, nor is there one on Windows.

    Returns:
      A reward. Columns must be sequences that `pickle` takes, values plain numbers or None.

    Raises:
      ValueError: no such file, or a time limit that is not positive; from a call, that the file cannot be loaded.
      RuntimeError: from a call, an exception of the function.
    """
    file, _, name = function.rpartition(":") if not function.endswith(".py") else (function, "", "reward")
    if not Path(file).is_file() or not timeout > 0:
        raise ValueError(
            f"isolated: function {function!r}, timeout {timeout}; expected path/to/rewards.py:function and more than "
            "0 seconds"
        )
    settings = {"file": file, "name": name, "evaluation": evaluation, "memory_gb": memory_gb}
    worker = _Worker(json.dumps(settings), function)

    def ask(inputs: Mapping[str, Sequence], count: int) -> list[float | None]:
        try:
            return worker.ask(inputs, timeout)
        except (TimeoutError, _Died) as error:
            if strict:
                raise
            warnings.warn(f"{error}; its completions have no reward", RuntimeWarning, stacklevel=3)
            return [None] * count

    def reward(**inputs: Sequence) -> list[float | None]:
        counts = {name: len(values) for name, values in inputs.items()}
        count = next(iter(counts.values()), 0)
        if len(set(counts.values())) > 1:
            raise ValueError(f"isolated: columns of {counts} values; expected one value of each for every completion")
        if not each:
            return ask(inputs, count)
        rows = ({name: values[i : i + 1] for name, values in inputs.items()} for i in range(count))
        return [value for row in rows for value in ask(row, 1)]

    reward.__name__ = name
    return reward


class _Died(RuntimeError):
    pass


class _Worker:
    """The process behind a reward; started when first asked, ended with the reward or the program."""

    def __init__(self, settings: str, name: str):
        self.settings, self.name = settings, name
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def ask(self, inputs: Mapping[str, Sequence], timeout: float) -> list[float | None]:
        with self.lock:
            if self.process is None:
                self.process = self._start()
            return self._answer(pickle.dumps(dict(inputs)), timeout)["values"]

    def _start(self) -> subprocess.Popen:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), self.settings]
        environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.end = weakref.finalize(self, _end, self.process)
        try:
            self._answer(b"", _START)
        except RuntimeError as error:
            self._stop()
            raise ValueError(f"{self.name} cannot be loaded: {error}") from None
        return self.process

    def _answer(self, message: bytes, timeout: float) -> dict[str, Any]:
        process, late = self.process, threading.Event()
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(timeout, lambda: (late.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(message)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it is gone
            line = b""
        except BaseException:  # an interrupt: the answer to come would be taken for that of the next call
            self._stop()
            raise
        finally:
            timer.cancel()
        if late.is_set() or not line:
            self._stop()
        if not line and late.is_set():
            raise TimeoutError(f"{self.name} took longer than {timeout:g} s and was ended")
        if not line:
            raise _Died(f"{self.name}: its process ended, exit status {process.returncode}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _stop(self) -> None:
        self.end()
        self.process = None


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        try:
            if stream is not None:
                stream.close()
        except OSError:  # what was not yet written
            pass
