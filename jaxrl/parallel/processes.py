"""Several processes as one program: how they find each other, agree, and share what lies on their hosts.

Each process runs the same commands on its own devices; `jax.distributed` joins them. With one process all of this does
nothing. What only one host may do goes through `on_main`, and every process learns what came of it.
"""

import builtins
import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters, distributed, xla_bridge
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.parallel import faults
from jaxrl.parallel.sharding import BATCH

PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables by which any launcher can say who is who."""

TIMEOUT, HEARTBEAT = 300.0, 60.0
"""Seconds: to wait for all processes at the start, and of silence after which one counts as lost."""

_PAGE = 4096


class Processes(NamedTuple):
    """Which process this is, and of how many."""

    index: int
    count: int


def initialise(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
    expected: int | None = None,
    timeout: float = TIMEOUT,
    heartbeat: float = HEARTBEAT,
) -> Processes:
    """Joins the processes of a run. Call it first: before any array, `jax.devices()` or jitted function.

    What is not given comes from the environment variables `PLAIN`, else from what JAX finds by itself: Slurm, Open MPI,
    Cloud TPU (with GKE and JobSet), Kubernetes. Where nothing speaks of several processes it has no effect.

    Args:
      coordinator: "host:port" of process 0, which listens there.
      processes: how many.
      process: the number of this one, from 0.
      expected: how many there must be; None takes what is found.
      timeout: seconds to wait for the others.
      heartbeat: seconds of silence after which a process counts as lost, and all others end.

    Returns:
      `(index, count)`.

    Raises:
      ValueError: values that are missing or do not fit together, or another count than `expected`.
      RuntimeError: a backend was queried before, or the processes disagree on their number.
      TimeoutError: the others did not come; it says what to run on every host. The process must end then.
    """
    if distributed.global_state.client is not None:
        return _checked(
            Processes(distributed.global_state.process_id, distributed.global_state.num_processes), expected
        )
    found = _found(coordinator, processes, process, timeout)
    if found is None or found[1] == 1:
        return _checked(Processes(0, 1), expected)
    address, count, index, devices = found
    _checked(Processes(index, count), expected)
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            f"initialise: a JAX backend was queried before in process {index} of {count} (an array, jax.devices(), a "
            "jitted function); expected to be called first. Put jaxrl.parallel.initialise() right after the imports"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is `preemption`'s
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                address,
                count,
                index,
                devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(timeout) + 60,  # it would end the process without a word of ours
                heartbeat_timeout_seconds=max(int(heartbeat), 1),
            )
        except Exception as error:
            failures.append(error)

    joining = threading.Thread(target=connect, name="jaxrl-initialise", daemon=True)
    joining.start()
    joining.join(timeout)
    if failures:
        raise failures[0]
    if joining.is_alive():
        distributed.global_state.client = None
        raise TimeoutError(_how(address, count, index, timeout))
    client: Any = distributed.global_state.client
    if index == 0:
        client.key_value_set("jaxrl/count", str(count))
    said = int(client.blocking_key_value_get("jaxrl/count", int(1000 * timeout)))
    if said != count:
        raise RuntimeError(
            f"initialise: process {index} was told of {count} processes, and process 0 of {said}; give all of them the "
            f"same {PLAIN[1]}"
        )
    if jax.process_count() != count:
        raise RuntimeError(
            f"initialise: {count} processes have joined, and the {jax.default_backend()} backend knows "
            f"{jax.process_count()}; start one process on each host of it"
        )
    faults.watch()
    return Processes(index, count)


def _checked(here: Processes, expected: int | None) -> Processes:
    if expected is not None and here.count != expected:
        raise ValueError(
            f"initialise: {here.count} processes were started, expected {expected}; start as many, or change `expected`"
        )
    return here


def _found(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> tuple[str, int, int, Any] | None:
    """Address, count, own number and devices; None where nothing speaks of several processes."""
    given = [coordinator, processes, process]
    values = [os.environ.get(name) if value is None else str(value) for name, value in zip(PLAIN, given, strict=True)]
    for name, value in zip(PLAIN[1:], values[1:], strict=True):
        if value is not None and not value.isdigit():
            raise ValueError(f"initialise: {name} is {value!r}; expected a number")
    address, count, index = values[0], *(None if value is None else int(value) for value in values[1:])
    if count == 1:
        return None
    chosen = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(number) for number in chosen.split(",")] if chosen else None
    if None in (address, count, index) and _in_cluster():
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, count, index, devices = detect(address, count, index, devices, None, int(timeout))
    elif count is None and index is None and "OMPI_COMM_WORLD_SIZE" in os.environ:  # an MPI that JAX does not know
        count, index = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK"))
        if count == 1:
            return None
    elif address is count is index is None:
        return None
    missing = [name for name, value in zip(PLAIN, (address, count, index), strict=True) if value is None]
    if address is None or count is None or index is None:
        raise ValueError(
            f"initialise: {' and '.join(missing)} not set; several processes need all of {', '.join(PLAIN)}, such as\n"
            f"  {_command(address or 'HOST0:8476', count or 2, index or 0)}"
        )
    if not 0 <= index < count:
        raise ValueError(f"initialise: process {index} of {count}; expected a number from 0 to {count - 1}")
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise ValueError(
            f"initialise: {PLAIN[0]} is {address!r}; expected host:port of process 0, such as 10.0.0.1:8476"
        )
    return address, count, index, devices


def _in_cluster() -> bool:
    """Whether JAX would find a launcher. A pod that is no member of an indexed job is alone."""
    job = "JOB_COMPLETION_INDEX" in os.environ
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if job or kind.__name__ != "K8sCluster"]
    return any(not kind.opt_in_only_method and kind.is_env_present() for kind in kinds)


def _how(address: str, count: int, index: int, timeout: float) -> str:
    shown = [*range(min(count, 3)), *([count - 1] if count > 3 else [])]
    lines = [f"  process {i}: {_command(address, count, i)}" for i in shown]
    return (
        f"initialise: not all of {count} processes came to {address} within {timeout:g} s; this is process {index} on "
        f"{socket.gethostname()}. Start each of them, process 0 on the host of that address, the port open to all:\n"
        + "\n".join(lines)
    )


def _command(address: str, count: int, index: int) -> str:
    program = Path(sys.argv[0]).name
    words = ["jaxrl" if program in ("jaxrl", "cli.py") else f"python {program}", shlex.join(sys.argv[1:])]
    values = zip(PLAIN, (address, count, index), strict=True)
    return " ".join([*(f"{name}={value}" for name, value in values), *words]).rstrip()


def is_main() -> bool:
    """Whether this is process 0, which writes files and speaks to people."""
    return distributed.global_state.process_id == 0


def count() -> int:
    """How many processes there are; queries no backend."""
    return distributed.global_state.num_processes


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(values: Any) -> np.ndarray:
    """Numbers of every process, `[count, ...]`, on every process; float32 or less."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def on_main(function: Callable[[], Any]) -> Any:
    """Runs a function on process 0; its result, or its error, is that of every process.

    Args:
      function: returns what JSON can hold. It must not wait for other processes.

    Raises:
      What the function raised there; elsewhere an error of the same kind if that is built in, else a RuntimeError.
    """
    if count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if is_main():
        try:
            outcome = {"value": function()}
        except Exception as error:
            failure, outcome = error, {"error": type(error).__name__, "message": str(error)}
    outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise getattr(builtins, outcome["error"], RuntimeError)(outcome["message"])
    return outcome["value"]


def _broadcast(data: bytes) -> bytes:
    """Those of process 0, in whole pages, so that few programs are compiled."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    page = np.zeros(-(-size // _PAGE) * _PAGE, np.uint8)
    if is_main():
        page[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(page))[:size].tobytes()


def same(what: str, number: int) -> None:
    """Raises ValueError on every process where a number is not that of process 0.

    Args:
      what: it stands for, such as "data and options".
      number: 32 bits, such as a checksum.
    """
    if count() == 1:
        return
    numbers = gather(np.uint32(number & 0xFFFFFFFF))
    others = np.flatnonzero(numbers != numbers[0])
    if others.size:
        raise ValueError(
            f"process {', '.join(map(str, others))} has other {what} than process 0; "
            "start every process with the same command, files and versions"
        )


def everywhere(tree: Any, shardings: Any) -> Any:
    """Host values, the same on every process, as arrays over all devices; each process copies only its own shards.

    Args:
      tree: pytree of arrays, typed random keys included. Those that lie over all devices already are laid out anew.
      shardings: a sharding for each leaf, or a prefix of the tree: one replicates or divides all of it.
    """
    if count() == 1:
        return jax.device_put(tree, shardings)

    def place(x, sharding):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, jax.tree.broadcast(shardings, tree))


def fetch(tree: Any) -> Any:
    """The whole arrays of a pytree as numpy, on every process; those that lie apart are gathered."""
    whole = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    take = lambda x: jax.device_get(x) if whole(x) else multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(take, tree)


def global_batch(rows: Any, mesh: Mesh) -> Any:
    """The rows that each process read, as one batch over the mesh: nothing of another process passes through it.

    With `data.loader.batches(..., process_index=jax.process_index(), process_count=jax.process_count())` the batch is
    that of one process. Where devices of two processes hold the same rows (tensor, context or stage reach across
    them), both must give those rows.

    Args:
      rows: pytree of numpy arrays `[rows of this process, ...]`.
      mesh: of `make_mesh`.

    Returns:
      The same tree with arrays `[rows of all processes, ...]`, divided over the mesh's batch axes.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)
