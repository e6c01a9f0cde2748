"""The loader: every record once an epoch, the same order however it is cut up, and a place that is restored."""

import itertools
import json
import threading

import numpy as np
import pytest

from jaxrl.data import loader
from jaxrl.data.sources import JsonLines

RECORDS = [{"n": n} for n in range(23)]


def numbers(rows):
    return [row["n"] for row in rows]


def stream():
    yield from ({"n": n} for n in range(23))


class Dataset:
    """What a Hugging Face `Dataset` offers: a length, an index that gives a dictionary, and iteration."""

    column_names = ("n",)

    def __len__(self):
        return len(RECORDS)

    def __getitem__(self, index):
        assert isinstance(index, int)
        return dict(RECORDS[index])


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(json.dumps(record) for record in RECORDS))
    return file


SOURCES = {"list": RECORDS, "data set": Dataset(), "stream": stream}


def take(source, count, **options):
    return list(itertools.islice(loader.batches(source, numbers, **options), count))


def order(source, batches, **options):
    return [n for batch, _ in take(source, batches, **options) for n in batch]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_every_record_is_drawn_once_in_every_epoch(source, prefetch):
    drawn = order(source, 23, batch=4, prefetch=prefetch, buffer=5)  # 92 records: four epochs, across their borders
    epochs = [drawn[23 * e :][:23] for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(23)) not in epochs


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_order_depends_on_the_seed_alone(source):
    assert order(source, 10, batch=4, seed=1) == order(source, 5, batch=8, seed=1, prefetch=0)
    assert order(source, 5, batch=4, seed=1) != order(source, 5, batch=4, seed=2)
    assert order(source, 12, batch=4, shuffle=False) == [n % 23 for n in range(48)]


def test_a_file_a_list_and_a_data_set_give_one_order(path):
    expected = order(RECORDS, 12, batch=4)
    assert order(str(path), 12, batch=4) == expected == order(JsonLines(path), 12, batch=4)
    assert order(Dataset(), 12, batch=4) == expected


def test_the_order_of_a_seed_never_changes():
    """Saved places stay good: the order comes from raw bits, which NumPy promises to keep."""
    assert order(RECORDS, 2, batch=4, seed=7) == [int(i) for i in _by_hand(23, 7, 0)[:8]]
    assert order(list(RECORDS[:6]), 1, batch=6, seed=0) == GOLDEN


def _by_hand(size, seed, epoch):
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    drawn = [int(bits.random_raw()) for _ in range(size)]
    return sorted(range(size), key=lambda i: drawn[i])


GOLDEN = [3, 2, 1, 0, 4, 5]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("done", [1, 5, 6, 11])
def test_a_killed_run_reads_on_where_it_stopped(source, done):
    """Places travel through JSON; batches that were only prefetched are read again."""
    whole = take(source, 14, batch=4, buffer=6, prefetch=2)
    first = loader.batches(source, numbers, batch=4, buffer=6, prefetch=2)
    for _ in range(done):
        _, place = next(first)
    first.close()
    place = json.loads(json.dumps(place))
    assert take(source, 14 - done, batch=4, buffer=6, state=place) == whole[done:]


def test_a_run_may_be_resumed_with_another_batch_and_process_count():
    place = take(RECORDS, 5, batch=4)[-1][1]
    assert order(RECORDS, 4, batch=2, state=place) == order(RECORDS, 7, batch=4)[20:]
    share = [take(RECORDS, 3, batch=4, state=place, process_index=p, process_count=2) for p in range(2)]
    assert [a + b for (a, _), (b, _) in zip(*share, strict=True)] == [b for b, _ in take(RECORDS, 8, batch=4)[5:]]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_processes_see_disjoint_records_that_cover_all(source):
    shares = [order(source, 23, batch=4, process_index=p, process_count=2) for p in range(2)]
    first = [order(source, 5, batch=4, epochs=1, process_index=p, process_count=2) for p in range(2)]
    assert not set(first[0]) & set(first[1]) and len(first[0]) == len(first[1]) == 10
    together = [n for a, b in zip(*(np.reshape(s, (-1, 2)).tolist() for s in shares), strict=True) for n in a + b]
    assert together == order(source, 23, batch=4)
    assert all(sorted(together[23 * e :][:23]) == list(range(23)) for e in range(4))


def test_only_what_is_encoded_by_a_process_is_read_by_it():
    read = []

    class Counting(Dataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    mine = order(Counting(), 5, batch=4, process_index=1, process_count=2, prefetch=0)
    assert read == mine and len(mine) == 10


def test_epochs_end_and_leave_out_less_than_a_batch():
    assert len(take(RECORDS, 99, batch=4, epochs=2)) == 46 // 4
    assert len(order(RECORDS, 99, batch=23, epochs=1)) == 23


def test_a_stream_is_shuffled_within_its_buffer():
    drawn = order(stream, 5, batch=4, buffer=3, epochs=1)
    assert all(n <= position + 2 for position, n in enumerate(drawn)) and drawn != sorted(drawn)
    assert order(stream, 5, batch=4, buffer=1, epochs=1) == list(range(20))


def test_the_next_batch_is_made_ahead_and_no_more():
    made, ready = [], threading.Semaphore(0)

    def encode(rows):
        made.append(numbers(rows))
        ready.release()
        return made[-1]

    batches = loader.batches(RECORDS, encode, batch=4, prefetch=1)
    first, _ = next(batches)
    for _ in range(3):  # one handed out, one ready, one waiting for room
        assert ready.acquire(timeout=10)
    assert not ready.acquire(timeout=0.3)
    assert made[0] == first and next(batches)[0] == made[1]
    batches.close()


def test_the_thread_ends_with_the_iterator():
    alive = lambda: [thread for thread in threading.enumerate() if thread.name == "jaxrl-loader"]
    batches = loader.batches(RECORDS, numbers, batch=4)
    assert not alive()
    next(batches)
    assert alive()
    batches.close()
    assert not alive()


def test_errors_of_the_thread_are_raised_where_batches_are_read(path):
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3\n')
    batches = loader.batches(str(path), numbers, batch=1, shuffle=False)
    assert [next(batches)[0] for _ in range(2)] == [[1], [2]]
    with pytest.raises(ValueError, match="data.jsonl:3: column 8"):
        next(batches)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (RECORDS, {"batch": 0}, "batch is 0, .*; expected a batch that the count divides"),
        (RECORDS, {"batch": 3, "process_count": 2}, "batch is 3, process_index 0, process_count 2; expected"),
        (RECORDS, {"process_index": 1}, "process_index 1, process_count 1; .* an index from 0"),
        (RECORDS, {"prefetch": -1}, "prefetch -1; expected"),
        (RECORDS, {"buffer": 0}, "buffer is 0"),
        ([], {}, "the source holds no record"),
        (stream(), {}, "the source is a generator, which cannot be read again"),
        ({"train": RECORDS}, {}, "the source is a dict, which cannot be read again .* Give a list, a data set"),
        (3, {}, "the source is a int"),
        (RECORDS, {"state": {"epoch": 0}}, r"the place has \['epoch'\]; expected \['buffer', 'epoch'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(source, options, message):
    with pytest.raises(ValueError, match=message):
        loader.batches(source, numbers, **{"batch": 4, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "saved with seed = 0 and is now used with 1: the records would come in another order"),
        ({"shuffle": False}, "saved with shuffle = True and is now used with False"),
        ({"source": RECORDS[:-1]}, "saved with size = 23 and is now used with 22"),
        ({"source": stream}, "saved with size = 23 and is now used with None"),
    ],
)
def test_a_place_of_other_data_or_order_is_refused(change, message):
    place = take(RECORDS, 1, batch=4)[0][1]
    with pytest.raises(ValueError, match=message):
        loader.batches(**{"source": RECORDS, "encode": numbers, "batch": 4, "state": place, **change})


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_that_became_shorter_or_is_empty_is_refused(shuffle):
    place = take(stream, 5, batch=4, shuffle=shuffle)[-1][1]
    with pytest.raises(ValueError, match="the source ended after 9 records of epoch 0; expected 20 or more"):
        take(lambda: stream_of(9), 1, batch=4, shuffle=shuffle, state=place)
    with pytest.raises(ValueError, match="the source ended after 0 records of epoch 0; expected 1 or more"):
        take(lambda: stream_of(0), 1, batch=4, shuffle=shuffle)


def stream_of(count):
    yield from RECORDS[:count]
