"""A parent for one of several processes: it hands signals on and says in plain words what ended the child.

What JAX's runtime writes when another host is gone comes from deep inside, and it ends the process there and then; only
somebody outside can add a sentence. Imports no JAX.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PARENT = "JAXRL_PARENT"
"""Environment variable by which a child knows its parent."""

STARTED = (
    "JAX_NUM_PROCESSES",
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "JOB_COMPLETION_INDEX",
)
"""Environment variables that launchers of several processes set."""


def is_due() -> bool:
    """Whether this process was started beside others and has no parent of this kind yet."""
    if PARENT in os.environ or os.environ.get("JAX_NUM_PROCESSES") == "1":
        return False
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several = "," in hosts and not hosts.startswith("WARNING")  # of libtpu, where there is no TPU
    return several or any(name in os.environ for name in STARTED)


def supervise(command: Sequence[str], *, again: str) -> int:
    """Runs a command as a child to its end.

    SIGTERM goes on to the child, which outlives its parent in no case (on Linux).

    Args:
      command: words of the command.
      again: the command that continues the run.

    Returns:
      The child's exit status; 128 and the signal's number where a signal ended it, after a word on why.
    """
    child = subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())})
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child, too
    status = child.wait()
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    if status == -signal.SIGABRT:
        why = (
            "another process is gone or was silent for too long (the lines above name it where it is known), "
            "or this one has crashed"
        )
    elif status == -signal.SIGKILL:
        why = "somebody killed it, or the host ran out of memory"
    else:
        why = "it has crashed, or somebody ended it"
    print(f"jaxrl: ended by {name}: {why}. When all have ended, start every process again: {again}", file=sys.stderr)
    return 128 - status


def follow() -> None:
    """In the child: ends with the parent."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
