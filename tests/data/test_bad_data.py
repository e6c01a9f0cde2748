"""Malformed data: every fault is named with its place, what was expected and what to do about it."""

import numpy as np
import pytest

from jaxrl.data import preferences, records, sources
from jaxrl.data.tokenizer import ByteTokenizer, CharTokenizer

BYTES, DIGITS = ByteTokenizer(), CharTokenizer("0123456789+=")
GOOD = b'{"prompt": "1", "completion": "2"}\n'
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
PAIR = {"prompt": "1", "chosen": "2", "rejected": "3"}
CHAT = {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "no"}]}
JUDGED = {"prompt": "1", "completion": "2", "label": True}

FILES = {
    "broken JSON": (
        GOOD + b'{"prompt": "1" "answer": 2}',
        "data.jsonl:2: column 16: Expecting ',' .* Write each record",
    ),
    "torn last line": (GOOD + b'{"prompt": "1", "comp', "data.jsonl:2: column 17: Unterminated string .* Write each"),
    "single quotes": (b"{'prompt': '1'}", "data.jsonl:1: column 2: .* with double quotes"),
    "trailing comma": (GOOD + b'{"prompt": "1",}', "data.jsonl:2: column 1[56]: .* Write each record"),
    "raw line break": (b'{"prompt": "a\tb"}', r"data.jsonl:1: .* A raw tab or line break .* write \\t or \\n"),
    "two on a line": (b'{"a": 1} {"a": 2}', "data.jsonl:1: column 10: Extra data.* A second value stands on the line"),
    "array": (
        b'[{"a": 1}, {"a": 2}]',
        "data.jsonl:1: found a list, expected one JSON object .* looks like one JSON arr",
    ),
    "array over lines": (b'[\n{"a": 1},\n{"a": 2}\n]', "data.jsonl:1: .* one JSON array: .* python -c"),
    "pretty-printed": (b'{\n  "a": 1\n}', "data.jsonl:1: .* seems to go on on the next line: write each record"),
    "a list in the middle": (GOOD + b"[1]", "data.jsonl:2: found a list, expected one JSON object per line"),
    "a number": (GOOD + b"3", "data.jsonl:2: found 3, expected one JSON object per line"),
    "null": (GOOD + b"null", "data.jsonl:2: found None, expected one JSON object per line"),
    "CSV": (b"prompt,answer\n1,2\n", "data.jsonl:1: column 1: Expecting value; found 'prompt,answer'. Write each"),
    "Latin-1": (GOOD + '{"prompt": "é"}'.encode("latin-1"), "data.jsonl:2: byte 0xe9 at byte 13 is not UTF-8. Save"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "data.jsonl:1: the file begins like UTF-16 text: save it as UTF-8"),
    "UTF-16 without a mark": (
        GOOD.decode().encode("utf-16-le"),
        "data.jsonl:1: .* looks like UTF-16: save it as UTF-8",
    ),
    "gzip": (b"\x1f\x8b\x08\x00", "data.jsonl:1: the file begins like compressed by gzip: unpack it"),
    "Parquet": (b"PAR1\x15\x04", "data.jsonl:1: the file begins like Parquet: load it with `datasets` or pandas"),
    "CR line ends": (b'{"a": 1}\r{"a": 2}\r', "data.jsonl:1: column 10: Extra data"),
    "NaN": (GOOD + b'{"margin": NaN}', "data.jsonl:2: NaN is not JSON; expected a number or null"),
    "infinity": (b'{"margin": -Infinity}', "data.jsonl:1: -Infinity is not JSON"),
    "duplicate keys": (
        GOOD + b'{"a": 1, "b": 2, "a": 3}',
        "data.jsonl:2: the key 'a' stands twice in one object; .* Rem",
    ),
    "nested duplicate keys": (b'{"a": [{"role": 1, "role": 2}]}', "data.jsonl:1: the key 'role' stands twice"),
    "a huge integer": (b'{"answer": ' + b"9" * 5000 + b"}", "data.jsonl:1: an integer has 5000 digits; .* Quote it"),
    "too deep": (b'{"a": ' + b"[" * 200_000, "data.jsonl:1: lists or objects are nested too deep"),
    "half a character": (
        b'{"a": "\\ud83d"}',
        r"data.jsonl:1: half a character, \\ud83d, stands in a text .*; expected",
    ),
    "empty file": (b"", "data.jsonl holds no record; expected one JSON object per line"),
    "only blank lines": (b"\n  \r\n", "data.jsonl holds no record"),
    "only a mark": (b"\xef\xbb\xbf", "data.jsonl holds no record"),
    "missing column": (
        GOOD + b'{"promt": "1", "completion": "2"}',
        r"data.jsonl:2: no column 'prompt'; found \['completion', 'promt'\]. Did you mean 'promt'\? Rename it",
    ),
    "missing column without a like": (
        b'{"question": "1"}',
        "data.jsonl:1: no column 'prompt'; .* Add 'prompt' to every",
    ),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_malformed_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.read_records(path, require=["prompt"] if "no column" in message else [])


def test_a_malformed_file_is_found_where_it_stands(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(GOOD)
    for name, message in {
        "data.json": "no file .*data.json; expected a JSON Lines file, .* Did you mean .*data.jsonl",
        "nothing.txt": "no file .*nothing.txt; expected a JSON Lines file, one JSON object per line$",
        "": r"is a folder; expected a JSON Lines file, or a pattern such as .*/\*.jsonl",
        "*.json": "no file matches .*json; expected at least one",
        "no/where.jsonl": "no file .*where.jsonl",
    }.items():
        with pytest.raises(ValueError, match=message):
            sources.read_records(f"{tmp_path}/{name}")


SOURCES = {
    "rows of text": (["a", {"b": 1}], r"record 0 is 'a' \(str\), expected a dictionary of columns"),
    "a row that is none": ([{"a": 1}, None], r"record 1 is 'null' \(NoneType\), expected a dictionary"),
    "nothing": ([], "the data holds no record"),
    "a number": (3, "the data is a int; expected a file or an iterable of dictionaries"),
    "splits": ({"train": range(3), "test": range(2)}, r"\['test', 'train'\] hold no list of values. .* data\['test'\]"),
    "ragged columns": ({"a": [1, 2], "b": [1]}, "the columns have different lengths: {'a': 2, 'b': 1}"),
    "missing column": ([{"prompt": 1}, {"promt": 1}], "record 1: no column 'prompt'; .* Did you mean 'promt'"),
}


@pytest.mark.parametrize(("source", "message"), SOURCES.values(), ids=SOURCES)
def test_a_malformed_source_is_named_with_its_record(source, message):
    with pytest.raises(ValueError, match=message):
        sources.read_records(source, require=["prompt"] if "no column" in message else [])


EXAMPLES = {
    "empty prompt": ({"prompt": "", "completion": "1"}, "'prompt' is empty .* Remove the record or fill it"),
    "empty completion": ({"prompt": "1", "completion": " \n"}, "'completion' is empty"),
    "null text": ({"text": None}, r"'text' is 'null' \(NoneType\), expected text"),
    "a number": ({"prompt": 1, "completion": "2"}, r"'prompt' is '1' \(int\), expected text: put it in quotes"),
    "no messages": ({"messages": []}, "messages is .*; expected a list of at least one"),
    "messages as columns": ({"messages": {"role": ["user"], "content": ["a"]}}, "messages is .*; expected a list"),
    "null message": ({"messages": [USER, None]}, "message 1 has None; expected the keys 'role' and 'content'"),
    "null content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 1 has content None; expec"),
    "null role": ({"messages": [{"role": None, "content": "a"}]}, "message 0 has role None; expected system, user"),
    "unknown role": ({"messages": [{"role": "human", "content": "a"}]}, "message 0 has role 'human'; expected system"),
    "the names of others": (
        {"messages": [{"from": "human", "value": "a"}]},
        r"message 0 has \['from', 'value'\]; expe",
    ),
    "ends with the user": (
        {"messages": [USER, ASSISTANT, USER]},
        "'messages' ends with a message of the user; expected",
    ),
    "completion of two": (
        {"prompt": "1", "completion": [USER, ASSISTANT]},
        "the completion is a list but not of one ass",
    ),
    "completion of the user": (
        {"prompt": [USER], "completion": [USER]},
        "'completion' begins with a message of the user",
    ),
    "prompt ends with the assistant": (
        {"prompt": [USER, ASSISTANT], "completion": "a"},
        "the prompt ends with a message",
    ),
    "empty prompt list": ({"prompt": [], "completion": "a"}, "the prompt is an empty list; expected at least one"),
    "no columns": ({}, r"found columns \[\]; expected `prompt` and `completion`, `messages`, or `text`"),
    "misspelt": ({"prompt": "1", "completions": "1"}, "found columns .* Did you mean 'completion'"),
    "too long": ({"text": "1" * 40}, "the example with its EOS has 41 tokens, longer than max_length = 40. Raise the"),
    "tools nobody reads": ({"messages": [USER, ASSISTANT], "tools": [{}]}, "the chat template takes none"),
    "tools as text": ({"messages": [USER, ASSISTANT], "tools": "add"}, "'tools' is 'add'; expected a list of objects"),
}
PAIRS = {
    "no chosen": ({"prompt": "1", "rejected": "3"}, r"no column 'chosen'; found \['prompt', 'rejected'\]"),
    "misspelt": ({**PAIR, "choosen": "2", "chosen": None}, r"'chosen' is 'null' \(NoneType\), expected text"),
    "no prompt": ({"chosen": "2", "rejected": "3"}, "no column 'prompt'"),
    "the same": ({**PAIR, "rejected": "2"}, "chosen and rejected are the same tokens: '2'. Nothing can be preferred"),
    "the same conversation": ({**CHAT, "rejected": CHAT["chosen"]}, "chosen and rejected are the same: 2 messages"),
    "one begins the other": ({**CHAT, "chosen": [USER]}, "are the beginning one of the other: 1 messages in common"),
    "nothing in common": (
        {"chosen": [ASSISTANT], "rejected": [USER]},
        "no `prompt`, and chosen and rejected have no mess",
    ),
    "ends with the user": ({**CHAT, "chosen": [*CHAT["chosen"], USER]}, "'chosen' ends with a message of the user"),
    "empty response": ({**PAIR, "rejected": ""}, "'rejected' is empty"),
    "empty answer": ({**CHAT, "prompt": [USER], "chosen": "", "rejected": "a"}, "'chosen' is empty"),
    "unknown role": (
        {"prompt": [USER], "chosen": [{"role": "gpt", "content": "a"}], "rejected": "b"},
        "'chosen': message 0 has role 'gpt'; expected",
    ),
    "NaN margin": ({**PAIR, "margin": float("nan")}, r"'margin' is 'NaN' \(float\); expected a finite number"),
    "infinite margin": ({**PAIR, "margin": 1e999}, r"'margin' is 'Infinity' \(float\); expected"),
    "huge margin": ({**PAIR, "margin": 10**5000}, r"'margin' is '<int>' \(int\); expected a finite number"),
    "margin as text": ({**PAIR, "margin": "0.5"}, r"'margin' is '0.5' \(str\); expected a finite number"),
    "margin true": ({**PAIR, "margin": True}, r"'margin' is 'true' \(bool\); expected a finite number"),
    "margin now and then": (
        {**PAIR, "margin": 1.0},
        "it has a 'margin', unlike the records before it; give one to all",
    ),
    "too long": (
        {**PAIR, "rejected": "3" * 40},
        "the prompt with the rejected response and its EOS has 42 tokens, long",
    ),
    "another alphabet": ({**PAIR, "rejected": "x"}, "character 'x' at position 0"),
}
LABELLED = {
    "label as number": ({**JUDGED, "label": 1}, r"'label' is '1' \(int\); expected true or false, without quotes"),
    "label as text": ({**JUDGED, "label": "true"}, r"'label' is 'true' \(str\); expected true or false"),
    "null label": ({**JUDGED, "label": None}, r"'label' is 'null' \(NoneType\); expected true or false"),
    "no label": ({"prompt": "1", "completion": "2", "labels": True}, "no column 'label'; .* Did you mean 'labels'"),
    "empty completion": ({**JUDGED, "completion": ""}, "'completion' is empty"),
}

TABLES = {"example": EXAMPLES, "pair": PAIRS, "labelled": LABELLED}


@pytest.mark.parametrize(
    ("encode", "good", "record", "message"),
    [
        *((records.encode_examples, {"text": "1"}, *case) for case in EXAMPLES.values()),
        *((preferences.encode_pairs, PAIR, *case) for case in PAIRS.values()),
        *((preferences.encode_labelled, JUDGED, *case) for case in LABELLED.values()),
    ],
    ids=[f"{kind}: {name}" for kind, table in TABLES.items() for name in table],
)
def test_a_malformed_record_is_named_with_its_number_or_its_line(encode, good, record, message):
    chat = any(isinstance(value, list | dict) for value in record.values())
    tokenizer = BYTES if chat else DIGITS
    with pytest.raises(ValueError, match=f"^record 1: .*{message}"):
        encode([good, record], tokenizer, max_length=40 if not chat else None)
    with pytest.raises(ValueError, match=f"^mine.jsonl:9: .*{message}"):
        encode([good, sources.Line(record, "mine.jsonl:9")], tokenizer, max_length=40 if not chat else None)


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(ValueError, match="record 1: the prompt '12345' has 5 tokens, longer than max_length = 4"):
        records.encode_prompts([{"prompt": "1"}, {"prompt": "12345"}], DIGITS, max_length=4)


def test_a_width_less_than_a_pair_is_named():
    with pytest.raises(ValueError, match="pad_to = 2 is less than the longest row, 3 tokens"):
        preferences.encode_pairs([PAIR], DIGITS, pad_to=2)


def test_ids_outside_the_vocabulary_are_named():
    tokens = preferences.encode_pairs([PAIR], DIGITS).chosen.tokens
    with pytest.raises(ValueError, match=r"chosen .* holds id 13 at row 0, column 2; .* \[0, 13\). Use the tokeniser"):
        records.check_vocabulary(np.asarray(tokens), 13, name="chosen")


def test_there_are_more_than_thirty_faults():
    assert len(FILES) + len(SOURCES) + len(EXAMPLES) + len(PAIRS) + len(LABELLED) > 60
