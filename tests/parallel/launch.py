"""Several real processes on this machine, each with fake CPU devices, that find each other on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WORKER = ["-m", "tests.parallel.worker"]
JAXRL = ["-m", "jaxrl.cli"]


class Group(NamedTuple):
    """Started processes and the files that they write to."""

    processes: list[subprocess.Popen]
    outputs: list[Path]

    def alone(self, index: int, seconds: float) -> int:
        """The exit status of one process that ends within so many seconds; then all end."""
        try:
            return self.processes[index].wait(seconds)
        finally:
            self.end()

    def text(self, index: int) -> str:
        return self.outputs[index].read_text()

    def wait(self, seconds: float = 150.0) -> list[int]:
        """The exit statuses; whoever does not end in time is killed, and the test fails."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(self.text(i)[-3000:] for i in range(len(self.processes)))) from None
        finally:
            self.end()

    def end(self) -> None:
        """Kills whoever still runs, a stopped one too."""
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, condition, seconds: float = 120.0) -> None:
        """Waits for a condition while all run."""
        end = time.monotonic() + seconds
        while not condition():
            running = [process.poll() is None for process in self.processes]
            if not all(running) or time.monotonic() > end:
                self.end()
                raise AssertionError(
                    f"running: {running}\n" + "\n".join(self.text(i)[-3000:] for i in range(len(self.processes)))
                )
            time.sleep(0.002)

    def send(self, index: int, number: signal.Signals) -> float:
        """Sends a signal to one process; the time."""
        self.processes[index].send_signal(number)
        return time.monotonic()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: Path, *words: str, count: int = 2, devices: int = 4, each=None, **environment: str) -> Group:
    """Starts `count` processes of `python *words`; `each(i)` gives more words for process `i`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAXRL_TIMEOUT": "60",
        "JAXRL_HEARTBEAT": "20",
        **environment,
    }
    processes, outputs = [], []
    for i in range(count):
        outputs.append(folder / f"output{i}")
        with outputs[-1].open("w") as file:
            command = [sys.executable, *words, *(each(i) if each else [])]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env={**common, "JAX_PROCESS_ID": str(i)}, stdout=file, stderr=subprocess.STDOUT
                )
            )
    return Group(processes, outputs)


def run(folder: Path, *words: str, **options) -> list[str]:
    """Starts processes, waits until all have ended well, and returns what they wrote."""
    group = start(folder, *words, **options)
    statuses = group.wait()
    texts = [group.text(i) for i in range(len(statuses))]
    assert not any(statuses), f"{statuses}\n" + "\n".join(text[-3000:] for text in texts)
    return texts
