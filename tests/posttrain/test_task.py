"""Records on their way to batches: where they come from, how pairs are split, what length they need."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data.tokenizer import ByteTokenizer
from jaxrl.posttrain import task

BYTES = ByteTokenizer()


def says(role, content):
    return {"role": role, "content": content}


def pair(n, answer):
    """Two answers to one question, without a column for it."""
    ask = says("user", f"{n}?")
    return {"chosen": [ask, says("assistant", answer)], "rejected": [ask, says("assistant", "no")]}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(data, held_out=0):
    return task.load_task(data, tokenizer="", marker="", held_out=held_out, columns=())


def test_data_may_be_several_files_or_a_pattern(tmp_path):
    rows = [{"prompt": str(n), "answer": str(n)} for n in range(6)]
    first, second = write(tmp_path / "a.jsonl", rows[:3]), write(tmp_path / "b.jsonl", rows[3:])
    for data in (f"{first}, {second}", f"{tmp_path}/*.jsonl"):
        assert task.load_records(data, columns=("prompt",)) == rows
    assert task.load_records(write(tmp_path / "a,b.jsonl", rows[:1]), columns=()) == rows[:1]
    with pytest.raises(ValueError, match="data '.*c.jsonl' is no file; expected a .jsonl file or one of arithmetic"):
        task.load_records(f"{first},{tmp_path}/c.jsonl", columns=())
    with pytest.raises(ValueError, match="is a folder; expected a JSON Lines file, or a pattern"):
        task.load_records(str(tmp_path), columns=())
    with pytest.raises(ValueError, match="b.jsonl:1: no column 'reply'"):
        task.load_records(second, columns=("reply",))


def test_conversations_without_a_prompt_are_split_by_their_common_beginning(tmp_path):
    rows = [pair(n, answer) for n in range(20) for answer in ("yes", "well")]
    work = load(write(tmp_path / "pairs.jsonl", rows), held_out=4)
    questions = [{record["prompt"][0]["content"] for record in side} for side in (work.training, work.held_out)]
    assert not questions[0] & questions[1] and len(questions[1]) == 4 and len(work.held_out) == 8
    assert work.held_out[0].where.rpartition("/")[2].startswith("pairs.jsonl:")
    assert task.prompts_of(work.held_out, work.tokenizer).tokens.shape[0] == 8
    same = [says("user", "a"), says("assistant", "b")]
    path = write(tmp_path / "bad.jsonl", [*rows, {"chosen": same, "rejected": same}])
    with pytest.raises(ValueError, match="bad.jsonl:41: chosen and rejected are the same: 2 messages in common"):
        load(path)


def test_pairs_and_labels_come_as_jax_arrays():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "cd", "margin": 1.0}]
    pairs = task.pairs_of(rows, BYTES)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pairs)) and pairs.margin.dtype == jnp.float32
    np.testing.assert_array_equal(pairs.rejected.loss_mask, [[0, 1, 1, 1]])
    labelled = task.labelled_of([{"prompt": "a", "completion": "b", "label": False}], BYTES)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(labelled))
    assert labelled.desirable.dtype == bool and not labelled.desirable.any()


@pytest.mark.parametrize(
    ("record", "length"),
    [
        ({"text": "abc"}, 4),
        ({"prompt": "ab", "completion": "c"}, 4),
        ({"prompt": "ab", "completion": "c", "label": True}, 4),
        ({"prompt": "ab", "chosen": "c", "rejected": "cdef"}, 7),
        ({"prompt": "ab", "chosen": "cdef", "rejected": "c"}, 7),
    ],
)
def test_the_longest_sequence_of_any_form(record, length):
    assert task.longest_of([{"text": "a"}, record], BYTES) == length
    assert task.longest_of([], BYTES) == 0
    with pytest.raises(ValueError, match="record 1: "):
        task.longest_of([record, {"question": "a"}], BYTES)
