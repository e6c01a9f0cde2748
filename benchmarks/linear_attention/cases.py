"""Calls of causal attention over one row of 8 heads of 64, float32; standard library only."""

import statistics
import time
from collections.abc import Callable

HEADS, SIZE = 8, 64
LENGTHS = (512, 2048, 4096, 16384)
PASSES = ("forward", "both")
"""The result alone, or the result and the gradients of all arrays."""
FORMS = ("plain", "normalised", "by head", "by channel", "recurrent", "softmax")
"""Chunked linear attention with no decay, with the sum of weights below, with a decay per token and head or channel;
the recurrence with no decay; our tiles of softmax attention."""
LONGEST = {"recurrent": 512}


def timed(call: Callable[[], None], *, least: float = 1.0, rounds: int = 3) -> float:
    """Median CPU milliseconds of `call`: `rounds` times and `least` seconds at least, after one call more."""
    call()
    laps, begun = [], time.perf_counter()
    while len(laps) < rounds or time.perf_counter() - begun < least:
        cpu = time.process_time()
        call()
        laps.append(time.process_time() - cpu)
    return 1e3 * statistics.median(laps)
