"""Trace, compilation and runs of a training that is one JAX program."""

import time
from collections.abc import Callable
from typing import Any

import jax


def time_training(train: Callable, *keys: Any) -> tuple[dict, Any]:
    """({"trace", "compile": wall seconds, "runs": [(CPU, wall) seconds of each key]}, the last result)."""
    begun = time.perf_counter()
    lowered = jax.jit(train).lower(keys[0])
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    runs, result = [], None
    for key in keys:
        cpu, wall = time.process_time(), time.perf_counter()
        result = jax.block_until_ready(program(key))
        runs.append((time.process_time() - cpu, time.perf_counter() - wall))
    return {"trace": traced - begun, "compile": compiled - traced, "runs": runs}, result
