import json

import pytest

from jaxrl.data.show import show
from jaxrl.data.tokenizer import ByteTokenizer

USER = {"role": "user", "content": "hi"}
RECORDS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "1+1=", "answer": 2},
    {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yo"}]},
    {"prompt": "1+1="},
    {"prompt": "1+1=", "chosen": "2", "rejected": "34", "margin": 0.5},
    {
        "chosen": [USER, {"role": "assistant", "content": "yo"}],
        "rejected": [USER, {"role": "assistant", "content": "no"}],
    },
    {"prompt": "1+1=", "completion": "3", "label": False},
    {"prompt": "1+1=", "chosen": "2"},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in RECORDS))
    return file


def test_show_says_what_is_read_what_is_trained_and_where_eos_stands(path):
    text = show(path, ByteTokenizer(), 0)
    assert "6 tokens, 2 trained" in text.plain
    assert "0 to 3     read     '1+1='" in text.plain and "4 to 5     trained  '2<eos>'" in text.plain
    assert "EOS (id 257) ends the example and is trained" in text.plain


def test_show_colours_the_trained_tokens_only(path):
    text = show(path, ByteTokenizer(), 0)
    start = text.plain.index("1+1=2<eos>")
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans if start <= s.start < start + 10}
    assert styles == {"1": "dim", "+": "dim", "=": "dim", "2": "green", "<eos>": "green reverse"}


def test_show_of_a_verifiable_problem_gives_the_expected_answer(path):
    plain = show(path, ByteTokenizer(), 1).plain
    assert "4 tokens, the model writes the rest" in plain and "expected answer: 2 (1 tokens: [50])" in plain


def test_show_of_a_conversation_marks_the_assistants_turns(path):
    plain = show(path, ByteTokenizer(), 2).plain
    assert "read     '<bos>user\\nh<0xC3><0xA9><eos>\\n<bos>assistant\\n'" in plain
    assert "trained  'yo<eos>'" in plain and "the last trained token, 24, is EOS" in plain


def test_show_of_a_pair_gives_the_prompt_once_and_both_responses(path):
    plain = show(path, ByteTokenizer(), 4).plain
    assert "margin: 0.5" in plain and "prompt: 4 tokens" in plain
    assert plain.count("0 to 3     read     '1+1='") == 1
    assert "chosen: 2 tokens, 2 trained\n\n2<eos>\n\n    4 to 5     trained  '2<eos>'" in plain
    assert "rejected: 3 tokens, 3 trained\n\n34<eos>\n\n    4 to 6     trained  '34<eos>'" in plain
    assert plain.count("EOS (id 257) ends the example and is trained") == 2


def test_show_of_two_conversations_finds_their_prompt(path):
    plain = show(path, ByteTokenizer(), 5).plain
    assert "read     '<bos>user\\nhi<eos>\\n<bos>assistant\\n'" in plain and "margin" not in plain
    assert "trained  'yo<eos>'" in plain and "trained  'no<eos>'" in plain


def test_show_of_a_labelled_response_says_whether_it_is_wanted(path):
    plain = show(path, ByteTokenizer(), 6).plain
    assert "label: the completion is not wanted\n6 tokens, 2 trained" in plain and "trained  '3<eos>'" in plain


def test_show_names_a_record_that_is_not_there_or_cannot_be_used(path):
    with pytest.raises(ValueError, match="no record 8; .* holds 8, counted from 0"):
        show(path, ByteTokenizer(), 8)
    with pytest.raises(ValueError, match="record 3 of 8: found columns"):
        show(path, ByteTokenizer(), 3)
    with pytest.raises(ValueError, match="record 7 of 8: no column 'rejected'"):
        show(path, ByteTokenizer(), 7)
