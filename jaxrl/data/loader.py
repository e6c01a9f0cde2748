"""A loader whose place is a small dictionary: for data that does not fit on the device, or comes as a stream.

    for batch, place in loader.batches(source, encode, batch=64, state=saved):
        state, metrics = step(state, batch)
        ...                                     # save `place` beside the train state; next time it is `saved`

It is a function of (source, seed, place) and nothing else. The global order of records depends neither on the
batch size nor on the number of processes, so a run may be resumed with other ones. What is handed out comes with
the place after it, so batches that were only read ahead are read again.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.data.sources import JsonLines, Record

State = dict[str, Any]
"""{"epoch", "position": records handed out of it, "seed", "shuffle", "size": records or None for a stream,
"buffer"}: plain numbers, JSON can hold it."""


def batches(
    source: Any,
    encode: Callable[[list[Record]], Any],
    *,
    batch: int,
    seed: int = 0,
    shuffle: bool = True,
    buffer: int = 4096,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 1,
    state: State | None = None,
) -> Iterator[tuple[Any, State]]:
    """Batches in a reproducible order, each with the place after it.

    Epochs follow each other without a gap: a batch may hold the end of one and the beginning of the next, and
    every record is drawn once in each. Only what is left of the last of `epochs`, less than a batch, is not.

    source: a JSON Lines file (read where needed, `JsonLines`); anything with a length and an index, such as a list
      or a Hugging Face `Dataset`; or a stream: an iterable that can be read again, or a function that returns a
      fresh one. A stream is read from its epoch's beginning when resumed.
    encode: the records of this process -> its batch, for example
      `lambda rows: encode_examples(rows, tokenizer, pad_to=512)`.
    batch: records of all processes together; each gets its equal, contiguous share.
    seed, shuffle: the order of an epoch is a permutation drawn from (seed, epoch), or the source's own.
    buffer: records held from which a stream draws; its shuffle reaches no further.
    epochs: None never ends.
    process_index, process_count: `jax.process_index()` and `jax.process_count()`.
    prefetch: batches made ahead by a thread, 0 for none.
    state: the place to go on from; None is the beginning.

    Yields (what `encode` returned, place).
    Raises ValueError if numbers do not fit, the source cannot be read twice or is empty, or the place is of
    another source, seed or order.
    """
    if isinstance(source, str | Path):
        source = JsonLines(source)
    indexed = _is_indexed(source)
    if not indexed and not _is_renewable(source):
        raise ValueError(
            f"the source is a {type(source).__name__}, which cannot be read again for a second epoch or on resume. "
            "Give a list, a data set, or a function that returns a fresh iterator"
        )
    if process_count < 1 or not 0 <= process_index < process_count or batch < 1 or batch % process_count:
        raise ValueError(
            f"batch is {batch}, process_index {process_index}, process_count {process_count}; expected a batch that "
            "the count divides, and an index from 0 to count - 1"
        )
    if buffer < 1 or prefetch < 0:
        raise ValueError(f"buffer is {buffer} and prefetch {prefetch}; expected at least 1 and at least 0")
    size = len(source) if indexed else None
    if size == 0:
        raise ValueError("the source holds no record; expected at least one")
    order = {"seed": seed, "shuffle": shuffle, "size": size, "buffer": None if indexed or not shuffle else buffer}
    start = {"epoch": 0, "position": 0, **order} if not state else _checked(state, order)

    def epoch(number: int) -> Any:
        if size is not None:
            return _permutation(size, seed, number) if shuffle else range(size)
        stream: Any = source() if callable(source) else source
        return _shuffled(stream, seed, number, buffer) if shuffle else stream

    fetch = (lambda index: source[int(index)]) if indexed else lambda record: record

    def made() -> Iterator[tuple[Any, State]]:
        share = batch // process_count
        drawn = _draw(epoch, start["epoch"], start["position"], epochs)
        while len(rows := list(itertools.islice(drawn, batch))) == batch:
            mine = [fetch(item) for item, *_ in rows[process_index * share :][:share]]
            _, number, position = rows[-1]
            yield encode(mine), {"epoch": number, "position": position, **order}

    return _ahead(made(), prefetch) if prefetch else made()


def _is_indexed(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping)


def _is_renewable(source: Any) -> bool:
    return callable(source) or (
        hasattr(source, "__iter__") and iter(source) is not source and not isinstance(source, Mapping)
    )


def _checked(state: State, order: State) -> State:
    if set(state) != {"epoch", "position", *order}:
        raise ValueError(f"the place has {sorted(state)}; expected {sorted(['epoch', 'position', *order])}")
    for name, value in order.items():
        if state[name] != value:
            raise ValueError(
                f"the place was saved with {name} = {state[name]} and is now used with {value}: the records would come "
                "in another order. Use the same data and options, or begin anew with state=None"
            )
    return state


def _draw(
    epoch: Callable[[int], Any], number: int, position: int, epochs: int | None
) -> Iterator[tuple[Any, int, int]]:
    """Items of all epochs from a place on, each with its epoch and the position after it."""
    while epochs is None or number < epochs:
        items = epoch(number)
        count = skipped = position if hasattr(items, "__getitem__") else 0  # a stream is read from its beginning
        for count, item in enumerate(items[skipped:] if skipped else items, start=skipped + 1):
            if count > position:
                yield item, number, count
        if count < max(position, 1):
            raise ValueError(
                f"the source ended after {count} records of epoch {number}; expected {max(position, 1)} or more. Has "
                "it changed, or is it an iterator that was read before?"
            )
        number, position = number + 1, 0


def _random(seed: int, epoch: int) -> np.random.PCG64:
    """Raw bits, which NumPy keeps the same from version to version, unlike its shuffles."""
    return np.random.PCG64(np.random.SeedSequence([seed, epoch]))


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(_random(seed, epoch).random_raw(size), kind="stable")


def _shuffled(stream: Iterable[Any], seed: int, epoch: int, buffer: int) -> Iterator[Any]:
    """Each item is drawn from the `buffer` oldest that have not been."""
    random, held = _random(seed, epoch), []
    for item in stream:
        held.append(item)
        if len(held) == buffer:
            yield _take(held, random)
    while held:
        yield _take(held, random)


def _take(held: list[Any], random: np.random.PCG64) -> Any:
    chosen = int(random.random_raw()) % len(held)
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()


def _ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same items, up to `depth` of them made ahead by a thread; its errors are raised here."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stop, end = threading.Event(), StopIteration()

    def put(entry: tuple[Any, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, end))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="jaxrl-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is end:
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)
