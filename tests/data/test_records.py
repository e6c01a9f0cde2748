import numpy as np
import pytest

from jaxrl.data.records import (
    check_vocabulary,
    encode_answers,
    encode_examples,
    encode_prompts,
    read_jsonl,
)
from jaxrl.data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer

DIGITS = CharTokenizer("0123456789+=")  # digit d has id d; "+" 10, "=" 11, BOS 12, EOS 13, padding 14
EOS, PAD = 13, 14


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Reading


def test_read_jsonl_takes_a_bom_blank_lines_windows_ends_and_no_last_newline(file):
    path = file(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\xc3\xa9"}')
    assert read_jsonl(path) == [{"a": 1}, {"b": "é"}]


def test_only_newlines_separate_records(file):
    path = file('{"a": "x\u2028y\x85z"}\n{"a": 2}\n')
    assert read_jsonl(path) == [{"a": "x\u2028y\x85z"}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a": 1}\n\n{"a": 1 "b"}\n',
            r"data.jsonl:3: column 9: Expecting ',' delimiter; found '\"b\"}'. Write each",
        ),
        ('{"a": 1\n', "data.jsonl:1: column 8: .*the line ends there"),
        ("{'a': 1}\n", r"data.jsonl:1: column 2: .*found .*with double quotes"),
        ('[\n{"a": 1}\n]', "data.jsonl:1: column 2: .*looks like one JSON array: write each"),
        ('[{"a": 1}]', "data.jsonl:1: found a list, expected one JSON object"),
        ('{"a": 1}\n3\n', "data.jsonl:2: found 3, expected one JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}', "data.jsonl:2: byte 0xff at byte 8 is not UTF-8"),
        ("\n \n", "data.jsonl holds no record"),
    ],
)
def test_a_malformed_line_is_named_with_its_file_line_and_column(file, content, message):
    with pytest.raises(ValueError, match=message):
        read_jsonl(file(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file .*none.jsonl; expected a JSON Lines file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_missing_column_names_the_columns_found_and_the_nearest(file):
    path = file('{"prompt": "1", "answer": "1"}\n{"promt": "1", "answer": "1"}\n')
    with pytest.raises(
        ValueError, match=r"data.jsonl:2: no column 'prompt'; found \['answer', 'promt'\]. Did you mean"
    ):
        read_jsonl(path, require=["prompt", "answer"])
    with pytest.raises(ValueError, match="Add 'solution' to every record"):
        read_jsonl(path, require=["solution"])


# Prompts and answers


def test_prompts_are_padded_on_the_left():
    tokens, lengths = encode_prompts([{"prompt": "1+1="}, {"prompt": "2="}], DIGITS)
    np.testing.assert_array_equal(tokens, [[1, 10, 1, 11], [PAD, PAD, 2, 11]])
    np.testing.assert_array_equal(lengths, [4, 2])
    assert tokens.dtype == lengths.dtype == np.int32


def test_prompts_take_a_width_and_a_bos():
    tokens, lengths = encode_prompts([{"prompt": "2="}], DIGITS, pad_to=5, add_bos=True)
    np.testing.assert_array_equal(tokens, [[PAD, PAD, 12, 2, 11]])
    np.testing.assert_array_equal(lengths, [3])
    with pytest.raises(ValueError, match="pad_to = 1 is less than the longest row, 2 tokens"):
        encode_prompts([{"prompt": "2="}], DIGITS, pad_to=1)


def test_a_prompt_of_messages_is_rendered_up_to_the_assistants_turn():
    tokenizer = ByteTokenizer()
    tokens, lengths = encode_prompts([{"prompt": [{"role": "user", "content": "hi"}]}], tokenizer)
    expected = [256, *b"user\nhi", 257, *b"\n", 256, *b"assistant\n"]
    assert tokens[0].tolist() == expected and lengths[0] == len(expected)
    with pytest.raises(ValueError, match="record 0: the prompt is an empty list"):
        encode_prompts([{"prompt": []}], tokenizer)


def test_answers_are_padded_on_the_right_and_may_be_integers():
    tokens, lengths = encode_answers([{"answer": 12}, {"answer": "3"}], DIGITS)
    np.testing.assert_array_equal(tokens, [[1, 2], [3, PAD]])
    np.testing.assert_array_equal(lengths, [2, 1])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "1+1+1="}, r"record 1: the prompt '1\+1\+1=' has 6 tokens, longer than max_length = 4"),
        ({"prompt": " "}, "record 1: 'prompt' is empty"),
        ({"prompt": 3}, r"record 1: 'prompt' is '3' \(int\), expected text"),
        ({"text": "1"}, r"record 1: no column 'prompt'; found \['text'\]"),
        ({"prompt": "1-1"}, "record 1: character '-' at position 1"),
        ({"prompt": [{"role": "user"}]}, r"record 1: message 0 has \['role'\]"),
    ],
)
def test_a_bad_prompt_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts([{"prompt": "1="}, record], DIGITS, max_length=4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": ""}, "record 0: 'answer' is empty"),
        ({"answer": True}, r"'answer' is 'true' \(bool\), expected text"),
        ({"answer": 0.5}, r"'answer' is '0.5' \(float\), expected text"),
        ({"answer": "1234"}, "record 0: the answer '1234' has 4 tokens, longer than max_length = 3"),
        ({"anser": "1"}, "no column 'answer'; found .*Did you mean 'anser'"),
    ],
)
def test_a_bad_answer_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        encode_answers([record], DIGITS, max_length=3)


def test_bos_must_exist_to_be_added():
    class NoBos(CharTokenizer):
        bos_id = None  # pyright: ignore

    with pytest.raises(ValueError, match="add_bos=True, but the tokeniser has no BOS"):
        encode_prompts([{"prompt": "1"}], NoBos("1"), add_bos=True)


# Supervised examples


def test_a_completion_is_trained_with_its_eos_and_its_prompt_is_not():
    records = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1=", "completion": "1"}]
    examples = encode_examples(records, DIGITS)
    np.testing.assert_array_equal(examples.tokens, [[1, 10, 1, 11, 2, EOS], [1, 11, 1, EOS, PAD, PAD]])
    np.testing.assert_array_equal(examples.loss_mask, [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(examples.lengths, [6, 4])
    assert examples.tokens.dtype == np.int32 and examples.loss_mask.dtype == np.float32


def test_text_is_trained_whole_with_its_eos():
    examples = encode_examples([{"text": "12"}], DIGITS, add_bos=True, pad_to=5)
    np.testing.assert_array_equal(examples.tokens, [[12, 1, 2, EOS, PAD]])
    np.testing.assert_array_equal(examples.loss_mask, [[0, 1, 1, 1, 0]])


def test_a_text_that_ends_with_eos_gets_no_second_one(folder):
    tokenizer = HuggingFaceTokenizer(str(folder))
    for record in ({"text": "he<|im_end|>"}, {"prompt": "a", "completion": "he<|im_end|>"}):
        examples = encode_examples([record], tokenizer)
        assert examples.tokens[0].tolist()[-2:] == [256, 259] and examples.tokens[0].tolist().count(259) == 1
        assert examples.loss_mask[0].tolist()[-2:] == [1, 1]


def test_eos_is_trained_where_padding_is_eos():
    class PadIsEos(CharTokenizer):
        pad_id = EOS  # pyright: ignore

    examples = encode_examples([{"text": "1"}, {"text": "123"}], PadIsEos("0123456789+="))
    np.testing.assert_array_equal(examples.tokens[0], [1, EOS, EOS, EOS])
    np.testing.assert_array_equal(examples.loss_mask[0], [1, 1, 0, 0])


def test_assistant_messages_are_trained():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    examples = encode_examples([{"messages": messages}], ByteTokenizer())
    assert examples.tokens[0][examples.loss_mask[0] == 1].tolist() == [*b"bc", 257]
    completion = {"prompt": messages[:1], "completion": messages[1:]}
    again = encode_examples([completion], ByteTokenizer())
    assert again.tokens[0].tolist() == examples.tokens[0].tolist()[:-1]  # all but the template's last newline
    assert again.tokens[0][again.loss_mask[0] == 1].tolist() == [*b"bc", 257]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "1", "completion": ""}, "record 1: 'completion' is empty"),
        ({"prompt": "", "completion": "1"}, "record 1: 'prompt' is empty"),
        ({"completion": "1"}, "record 1: no column 'prompt'"),
        ({"text": None}, "record 1: 'text' is 'null' .*expected text"),
        (
            {"prompt": "1", "completion": "11111"},
            "record 1: the example with its EOS has 7 tokens, longer than .* 4",
        ),
        (
            {"prompt": "1", "completions": "1"},
            r"found columns \['completions', 'prompt'\]; expected .*Did you mean 'completion'",
        ),
        (
            {"messages": [{"role": "user", "content": "1"}]},
            "record 1: .messages. ends with a message of the user; expected the assist",
        ),
        ({"prompt": "1", "completion": ["1"]}, "the completion is a list but not of one assistant message"),
    ],
)
def test_a_bad_example_is_named(record, message):
    tokenizer = CharTokenizer("1\nuser")
    with pytest.raises(ValueError, match=message):
        encode_examples([{"text": "1"}, record], tokenizer, max_length=4)


def test_an_id_outside_the_models_vocabulary_is_named():
    tokens = encode_examples([{"text": "12"}], DIGITS).tokens
    check_vocabulary(tokens, 14)
    with pytest.raises(ValueError, match=r"tokens \[N, T\] = \[1, 3\] holds id 13 at row 0, column 2; .*\[0, 13\)"):
        check_vocabulary(tokens, 13)
    with pytest.raises(ValueError, match="prompts .* holds id -1"):
        check_vocabulary(np.array([[0, -1]]), 13, name="prompts")
