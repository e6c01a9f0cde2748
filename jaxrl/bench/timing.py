"""How a form is compiled and timed, and how much memory it may take."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Program(NamedTuple):
    """A compiled form: the call, seconds to trace and compile it, and its bytes (None: XLA does not say)."""

    call: Callable[[Any], Any]
    compile_s: float
    temporary: int | None
    needed: int


def compile_form(form: Callable, shapes: Any, wrt: tuple[str, ...]) -> Program:
    """The form of the named arrays alone, or (with `wrt`) half its squared norm and the gradients of those arrays."""

    def gradients(arrays):
        def loss(part):
            return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(form(arrays | part))) / 2

        return jax.value_and_grad(loss)({name: arrays[name] for name in wrt})

    begun = time.perf_counter()
    call = jax.jit(gradients if wrt else lambda arrays: form(arrays)).lower(shapes).compile()
    seconds = time.perf_counter() - begun
    memory = call.memory_analysis()
    if memory is None:
        return Program(call, seconds, None, 0)
    temporary = memory.temp_size_in_bytes
    return Program(call, seconds, temporary, temporary + memory.output_size_in_bytes + memory.argument_size_in_bytes)


def in_turn(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, refused: Callable[[str, Exception], None]
) -> dict[str, dict[str, float]]:
    """Times the calls in turn, round after round, after one call of each that does not count.

    Args:
      calls: by name.
      rounds: timed calls of each.
      refused: told of a call whose first run raises; the others go on.

    Returns:
      by name, the median and least CPU milliseconds (of all threads) and the median wall milliseconds.
    """
    running = {}
    for name, call in calls.items():
        try:
            jax.block_until_ready(call())
            running[name] = call
        except Exception as error:  # noqa: BLE001  (any library's way to say no)
            refused(name, error)
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, call in running.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(call())
            laps[name].append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    return {name: _medians(times) for name, times in laps.items()}


def _medians(laps: list[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = zip(*laps, strict=True)
    return {"cpu_ms": statistics.median(cpu), "cpu_min_ms": min(cpu), "wall_ms": statistics.median(wall)}


def free_bytes() -> int:
    """Memory that a program may take on the first device: of the device where it says, else of this machine."""
    found = jax.local_devices()[0].memory_stats()
    if found and "bytes_limit" in found:
        return found["bytes_limit"] - found.get("bytes_in_use", 0)
    free = []
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        free.append(1024 * int(fields["MemAvailable"].split()[0]))
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        free.append(int(limit) - int((group / "memory.current").read_text()))
    return min(free) if free else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
