"""Real Hugging Face data sets as sources: every kind of column, in memory and as streams, whatever their format."""

import json
from functools import partial
from itertools import islice

import pytest

from jaxrl.data.loader import batches
from jaxrl.data.sources import read_records

datasets = pytest.importorskip("datasets")


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {name: {"type": t}}}},
    }
    for name, t in (("f", "string"), ("g", "integer"))
]
ROWS = {
    "text": [{"text": "abc"}, {"text": "de"}],
    "answer": [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+2=", "answer": 4}],
    "completion": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "dd"}],
    "messages": [
        {"messages": [message("user", "a"), message("assistant", "b")]},
        {"messages": [message("system", "s"), message("user", "c"), message("assistant", "d", train=False)]},
    ],
    "pairs": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5},
        {"prompt": "d", "chosen": "e", "rejected": "f", "margin": 0.5},
    ],
    "chats": [
        {
            "chosen": [message("user", "q"), message("assistant", x)],
            "rejected": [message("user", "q"), message("user", x)],
        }
        for x in "ab"
    ],
    "label": [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}],
    "tools": [
        {
            "messages": [
                message("user", "a"),
                message("assistant", None, tool_calls=[CALL]),
                message("tool", "3", name="f"),
                message("assistant", "c"),
            ],
            "tools": TOOLS,
        },
        {"messages": [message("user", "a"), message("assistant", "b")], "tools": TOOLS[:1]},
    ],
}
WAYS = {
    "rows": datasets.Dataset.from_list,
    "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "sharded": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2),
    "generator": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "mapped": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row),
    "filtered": lambda rows: datasets.Dataset.from_list([rows[1], *rows]).select([1, 2]),
    "numpy": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "numpy stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("numpy"),
    "pandas": lambda rows: datasets.Dataset.from_list(rows).with_format("pandas"),
    "arrow": lambda rows: datasets.Dataset.from_list(rows).with_format("arrow"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_come_back_as_they_were_written(kind, way, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    records = read_records(WAYS[way](ROWS[kind]), require=list(ROWS[kind][0]))
    assert records == ROWS[kind] and all(type(record) is dict for record in records)
    for record, row in zip(records, ROWS[kind], strict=True):  # 1 == 1.0 == True
        assert [type(value) for value in record.values()] == [type(value) for value in row.values()]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_it_reads(streaming, tmp_path):
    """A stream of a file does not know its columns before it is read."""
    (tmp_path / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["tools"]))
    data = datasets.load_dataset(
        "json", data_files=str(tmp_path / "tools.jsonl"), split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    assert read_records(data) == ROWS["tools"]


def test_what_is_kept_as_json_keeps_its_nulls():
    if not hasattr(datasets, "Json"):
        pytest.skip("an older `datasets`")
    rows = [{"messages": [{"role": "user", "content": "a", "extra": {"x": None, "y": [{"z": None}]}, "name": None}]}]
    kinds = {"role": datasets.Value("string"), "content": datasets.Value("string"), "name": datasets.Value("string")}
    features = datasets.Features({"messages": datasets.List(kinds | {"extra": datasets.Json()})})
    (record,) = read_records(datasets.Dataset.from_list(rows, features=features))
    assert record["messages"] == [{"role": "user", "content": "a", "extra": {"x": None, "y": [{"z": None}]}}]


def test_columns_of_a_data_set_are_lists_and_splits_are_none():
    for kind in ("answer", "tools"):
        data = datasets.Dataset.from_list(ROWS[kind])
        assert read_records({name: data[name] for name in data.column_names}) == ROWS[kind]
    data = datasets.Dataset.from_list(ROWS["answer"])
    for splits in (datasets.DatasetDict(train=data), datasets.IterableDatasetDict(train=data.to_iterable_dataset())):
        with pytest.raises(
            ValueError, match=r"whose \['train'\] hold no list of values. .* choose one: data\['train'\]"
        ):
            read_records(splits)
    with pytest.raises(ValueError, match="record 0: no column 'completion'"):
        read_records(data, require=["completion"])
    with pytest.raises(ValueError, match="the data holds no record"):
        read_records(data.select([]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_loader_takes_it_and_goes_on(stream):
    rows = [{"prompt": str(number)} for number in range(11)]
    data = datasets.Dataset.from_list(rows)
    source = data.to_iterable_dataset() if stream else data
    start = partial(batches, source, lambda records: [record["prompt"] for record in records], batch=2, seed=3)
    seen = list(islice(start(), 8))
    drawn = [prompt for prompts, _ in seen for prompt in prompts]
    assert sorted(drawn[:11]) == sorted(row["prompt"] for row in rows) and drawn[:5] != list("01234")
    assert [prompts for prompts, _ in islice(start(state=seen[2][1]), 5)] == [prompts for prompts, _ in seen[3:]]
