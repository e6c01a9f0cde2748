"""Sources of records: files, patterns, iterables, columns, what looks like a Hugging Face data set."""

import copy
import json
import pickle

import numpy as np
import pytest

from jaxrl.data.records import encode_prompts
from jaxrl.data.sources import JsonLines, Line, read_jsonl, read_records
from jaxrl.data.tokenizer import ByteTokenizer

ROWS = [{"prompt": str(n), "answer": n} for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    """a.jsonl holds records 0 and 1 (and a blank line), b.jsonl the others; c.txt is something else."""
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[2:]))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS[:2]))
    (tmp_path / "c.txt").write_text("no records")
    return tmp_path


class Dataset:
    """A Hugging Face `Dataset` as far as it matters: columns by name, rows as dictionaries."""

    column_names = ("prompt", "answer")

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, key):
        return [row[key] for row in ROWS] if isinstance(key, str) else dict(ROWS[key])

    def __iter__(self):
        return (dict(row) for row in ROWS)


class Splits(dict):
    """A Hugging Face `DatasetDict`."""


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        Dataset(),
        {"prompt": [row["prompt"] for row in ROWS], "answer": np.arange(5)},
    ],
    ids=["list", "tuple", "generator", "data set", "columns"],
)
def test_records_come_from_any_iterable_of_dictionaries(source):
    records = read_records(source, require=["prompt", "answer"])
    assert records == ROWS and all(type(record) is dict for record in records)


def test_records_come_from_files_patterns_and_lists_of_them(folder):
    assert read_records(folder / "a.jsonl") == ROWS[:2]
    assert read_records(f"{folder}/*.jsonl") == ROWS
    assert read_records([folder / "b.jsonl", str(folder / "a.jsonl")]) == ROWS[2:] + ROWS[:2]
    assert read_records([f"{folder}/a*", f"{folder}/b*"]) == ROWS


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "part[1].jsonl").write_text('{"a": 1}')
    assert read_records(tmp_path / "part[1].jsonl") == read_jsonl(tmp_path / "part[1].jsonl") == [{"a": 1}]


def test_a_record_knows_its_line_and_so_do_complaints(folder):
    records = read_records(f"{folder}/*.jsonl")
    assert [record.where.rpartition("/")[2] for record in records[:3]] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1"]
    with pytest.raises(ValueError, match="^record 0: 'prompt' is empty"):
        encode_prompts([{"prompt": ""}], ByteTokenizer())
    with pytest.raises(ValueError, match="^x.jsonl:7: 'prompt' is empty"):
        encode_prompts([Line({"prompt": ""}, "x.jsonl:7")], ByteTokenizer())


def test_a_line_is_a_dictionary_that_can_be_copied():
    line = Line({"a": [1]}, "x.jsonl:7")
    assert line == {"a": [1]} and json.dumps(line) == '{"a": [1]}'
    for other in (copy.copy(line), copy.deepcopy(line), pickle.loads(pickle.dumps(line))):
        assert other == line and other.where == "x.jsonl:7"


def test_records_can_stay_in_their_files(folder):
    lines = JsonLines(f"{folder}/*.jsonl", require=["prompt"])
    assert len(lines) == 5 and list(lines) == ROWS and lines[-1] == ROWS[4] and lines[1:4:2] == [ROWS[1], ROWS[3]]
    assert lines[1].where.endswith("a.jsonl:3")
    with pytest.raises(IndexError):
        lines[5]
    assert list(pickle.loads(pickle.dumps(lines))) == ROWS


def test_what_is_wrong_in_a_file_is_found_when_it_is_read(folder):
    with (folder / "b.jsonl").open("a") as file:
        file.write('{"answer": 5}\nno\n')
    lines = JsonLines([folder / "a.jsonl", folder / "b.jsonl"], require=["prompt"])
    assert len(lines) == 7 and lines[4] == ROWS[4]
    with pytest.raises(ValueError, match="b.jsonl:4: no column 'prompt'; found"):
        lines[5]
    with pytest.raises(ValueError, match="b.jsonl:5: column 1: Expecting value"):
        lines[6]


def test_joined_files_may_keep_their_byte_order_marks(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\xef\xbb\xbf{"a": 2}\r\n')
    assert read_jsonl(tmp_path / "data.jsonl") == [{"a": 1}, {"a": 2}]
