"""Several Python rewards as one: weights, time limits, failures that do not end a run, and the numbers of each part."""

import asyncio
import functools
import inspect
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl.returns.group import group_relative

Reward = Callable[..., Any]

_GRACE = 0.5
"""Seconds that an async reward has to end after it was cancelled."""


class Scores(list):
    """What a combined reward returns: a number or None for each completion, and `metrics` of its parts."""

    __slots__ = ("metrics",)

    def __init__(self, values: Sequence[float | None], metrics: Mapping[str, float]):
        super().__init__(values)
        self.metrics = dict(metrics)


def combine(
    parts: Mapping[str, Reward | tuple[Reward, float]],
    *,
    timeout: float | None = None,
    normalise: bool = False,
    strict: bool = False,
) -> Reward:
    """One reward, the weighted sum of several: r_i = sum_k w_k r_k,i over the parts that give completion i a number.

    A part that answers None for a completion is left out of its sum, with the weights as they are; where all parts of
    non-zero weight do, the sum is None. A part of weight 0 is only reported. With `normalise` each part is taken
    relative to the other completions of its prompt before the sum (GDPO, Liu et al. 2026, arXiv 2601.05242),

        r_i = sum_k w_k (r_k,i - mean of group) / (std of group + eps)

    so that no part drowns the others; `scale="batch"` of the GRPO family is the paper's second normalisation. A group
    are neighbours with one prompt. Where no prompt has a second completion, as in evaluation, it is the plain sum.

    A part that raises, takes too long or answers something that is no row of numbers is None for all its completions,
    and a RuntimeWarning says why; `rewards/NAME/missing` counts it. Only a column that a part needs and the data has
    not is an error at once. Async parts (`async def`) and, with a time limit, all parts run side by side, each in a
    thread with an event loop of its own. A limit cancels a coroutine but cannot end a thread: a sync part that hangs
    is left behind. `isolated` runs a function in a process, which can be ended.

    Args:
      parts: names to rewards, or to (reward, weight); weight 1 where there is none.
      timeout: seconds for each part and call; None is no limit.
      normalise: normalise, then sum; otherwise the sum is left to be normalised.
      strict: let failures of a part end the call.

    Returns:
      A reward that returns `Scores`, with `rewards/NAME/mean`, `rewards/NAME/std` (over all completions that have a
      number, before weights) and `rewards/NAME/missing` (the fraction that has none). It can be combined again.

    Raises:
      ValueError: no parts, a weight that is not finite, a time limit that is not positive; from a call, a column that
        is missing, or with `strict` a bad result.
      TimeoutError, or whatever a part raises: from a call, with `strict`.
    """
    pairs = {name: part if isinstance(part, tuple) else (part, 1.0) for name, part in parts.items()}
    functions = {name: function for name, (function, _) in pairs.items()}
    weights = np.asarray([weight for _, weight in pairs.values()], np.float64)
    if not pairs or not np.isfinite(weights).all() or not all(map(callable, functions.values())):
        raise ValueError(f'combine: parts are {parts!r}; expected names to functions, such as {{"format": (f, 0.2)}}')
    if timeout is not None and not timeout > 0:
        raise ValueError(f"combine: timeout is {timeout}; expected more than 0 seconds, or None for no limit")
    threads = timeout is not None or any(map(_is_async, functions.values()))

    def combined(**inputs: Any) -> Scores:
        for name, function in functions.items():
            check_columns(name, function, inputs)
        start, count = time.monotonic(), len(inputs["completions"])
        calls = {name: (launch if threads else _call)(f, inputs, timeout) for name, f in functions.items()}
        values, metrics = np.full((len(calls), count), np.nan), {}
        for row, (name, call) in zip(values, calls.items(), strict=True):
            try:
                answer = _wait(call, start, timeout, _is_async(functions[name]))
                row[:] = numbers(answer, count, name=f"reward {name!r}")
                metrics |= getattr(answer, "metrics", {})
            except Exception as error:
                if strict or isinstance(error, MissingColumn):
                    raise
                reason = (
                    f"took longer than {timeout:g} s" if isinstance(error, TimeoutError) and timeout else repr(error)
                )
                warnings.warn(f"reward {name!r}: {reason}; its completions have none", RuntimeWarning, stacklevel=2)
            metrics |= _metrics(name, row)
        if normalise:
            values = _normalised(values, inputs["prompts"])
        known = ~np.isnan(values)
        total = np.where(known, weights[:, None] * np.where(known, values, 0.0), 0.0).sum(axis=0)
        some = (known & (weights[:, None] != 0.0)).any(axis=0)
        return Scores(
            [float(value) if is_known else None for value, is_known in zip(total, some, strict=True)], metrics
        )

    return combined


def numbers(values: Any, count: int, *, name: str) -> np.ndarray:
    """What a reward returned, as `[count]` float64 with NaN for None.

    Raises:
      ValueError: another number of values, text, something else that is no number, or one that float32 cannot hold.
    """
    if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != count:
        found = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise ValueError(
            f"{name} returned {found} for {count} completions; return one number (or None) for each completion"
        )
    try:
        text = next((value for value in values if isinstance(value, str)), None)
        if text is not None:
            raise ValueError(f"the text {text!r}")
        row = np.asarray([math.nan if value is None else float(value) for value in values], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} returned something that is no number: {error}") from error
    wrong = np.abs(row) > np.finfo(np.float32).max
    if wrong.any():
        raise ValueError(f"{name} returned {row[wrong][0]:g}; expected finite numbers of float32, or None")
    return row


def call_async(function: Reward, inputs: Mapping[str, Any], timeout: float | None = None) -> Any:
    """Calls a function in this thread, which has no event loop, and waits for what it returns if that is awaitable."""
    answer = function(**inputs)

    async def awaited():
        return await asyncio.wait_for(answer, timeout)

    return asyncio.run(awaited()) if inspect.isawaitable(answer) else answer


def _call(function: Reward, inputs: Mapping[str, Any], timeout: float | None) -> Future:
    future = Future()
    try:
        future.set_result(call_async(function, inputs, timeout))
    except Exception as error:
        future.set_exception(error)
    return future


def launch(function: Reward, inputs: Mapping[str, Any], timeout: float | None) -> Future:
    """`_call` in a thread that does not keep the program alive: a reward may hang for ever."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(call_async(function, inputs, timeout))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reward").start()
    return future


def _wait(call: Future, start: float, timeout: float | None, is_async: bool) -> Any:
    left = None if timeout is None else max(start + timeout + _GRACE * is_async - time.monotonic(), 0.0)
    return call.result(left)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class MissingColumn(ValueError):
    """A reward needs what it is not given: an error of the set-up, which no call can mend."""


def check_columns(name: str, function: Reward, inputs: Mapping[str, Any]) -> None:
    """Raises `MissingColumn` if a reward cannot be called with these keywords."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(**inputs)
    except TypeError as error:
        raise MissingColumn(f"reward {name!r} cannot be called: {error}; it is given {', '.join(inputs)}") from None


def _metrics(name: str, row: np.ndarray) -> dict[str, float]:
    known = row[~np.isnan(row)]
    mean, std = (float(known.mean()), float(known.std())) if known.size else (math.nan, math.nan)
    missing = 1.0 - known.size / row.size if row.size else 0.0
    return {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std, f"rewards/{name}/missing": missing}


def _normalised(values: np.ndarray, prompts: Sequence[Any]) -> np.ndarray:
    """Each row of `values [K, B]` relative to the neighbours with one prompt."""
    begins = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
    sizes = np.diff([*begins, len(prompts)])
    if sizes.max(initial=1) < 2:
        return values
    group, place = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])
    padded = np.full((len(values), len(sizes), sizes.max()), np.nan)
    padded[:, group, place] = values
    relative = np.asarray(group_relative(jnp.asarray(padded.reshape(-1, sizes.max()))), np.float64).reshape(
        padded.shape
    )
    return np.where(np.isnan(values), np.nan, relative[:, group, place])
