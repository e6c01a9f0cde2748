"""Calls of attention that every library makes; standard library only."""

import dataclasses
import statistics
import time
from collections.abc import Callable

HEADS, SIZE = 8, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """`rows` streams of `length` queries and keys, 8 heads of 64, float32; with or without a causal mask."""

    rows: int
    length: int
    causal: bool


CASES = {
    f"{'causal' if causal else 'full'}-{rows}x{length}": Case(rows, length, causal)
    for causal in (True, False)
    for rows, length in ((1, 512), (1, 2048), (1, 8192), (4, 512), (4, 2048))
}
PASSES = ("forward", "both")
"""The result alone, or the result and the gradients of q, k and v."""


def timed(call: Callable[[], None], *, least: float = 2.0, rounds: int = 5) -> dict:
    """Median CPU and wall milliseconds of `call`: `rounds` times and `least` seconds at least, after one call more."""
    call()
    laps, begun = [], time.perf_counter()
    while len(laps) < rounds or time.perf_counter() - begun < least:
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        laps.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = zip(*laps, strict=True)
    return {
        "cpu_ms": 1e3 * statistics.median(cpu),
        "cpu_min_ms": 1e3 * min(cpu),
        "wall_ms": 1e3 * statistics.median(wall),
    }
