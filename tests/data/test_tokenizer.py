import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from jaxrl.data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, check_ids, load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def configure(folder, **tokens):
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


# Bytes


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_every_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_bytes_decode_anything_a_model_writes(ids):
    assert ByteTokenizer().decode(list(ids)) == ids.decode("utf-8", errors="replace")


def test_byte_special_tokens_are_three_ids_no_text_can_write():
    tokenizer = ByteTokenizer()
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert special == {256, 257, 258} and tokenizer.vocab_size == 259
    assert tokenizer.encode("<eos>") == list(b"<eos>")
    assert tokenizer.decode([256, 104, 105, 257, 258]) == "hi"
    assert [tokenizer.token_text(i) for i in (256, 257, 258, 65, 0xE2)] == [
        "<bos>",
        "<eos>",
        "<pad>",
        "A",
        "<0xE2>",
    ]
    assert [tokenizer.token_id(t) for t in ("<bos>", "<eos>", "<pad>", "A", "AB")] == [
        256,
        257,
        258,
        65,
        None,
    ]


def test_an_id_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"token id 259 at position 1 .* expected ids in \[0, 259\)"):
        ByteTokenizer().decode([0, 259])
    with pytest.raises(ValueError, match="token id -1 at position 0"):
        CharTokenizer("ab").decode([-1])
    with pytest.raises(ValueError, match="at least 0"):
        check_ids([-1], None)


# Characters


def test_characters_round_trip_and_keep_their_order():
    tokenizer = CharTokenizer("0123+=é")
    assert tokenizer.encode("3é+") == [3, 6, 4]
    assert tokenizer.decode([3, 6, 4, tokenizer.eos_id, tokenizer.pad_id]) == "3é+"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (7, 8, 9, 10)
    assert [tokenizer.token_text(i) for i in range(5, 10)] == ["=", "é", "<bos>", "<eos>", "<pad>"]
    assert [tokenizer.token_id(t) for t in ("=", "<eos>", "x")] == [5, 8, None]


def test_an_unknown_character_is_named_with_its_position_and_the_alphabet():
    with pytest.raises(ValueError, match="character 'x' at position 2 of '12x' is not in the alphabet '012'"):
        CharTokenizer("012").encode("12x")


@pytest.mark.parametrize(("alphabet", "message"), [("", "empty alphabet"), ("abca", r"holds \['a'\] more than once")])
def test_a_bad_alphabet_is_refused(alphabet, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(alphabet)


# Hugging Face


def test_hugging_face_reads_its_special_tokens_from_the_file_beside_it(folder):
    tokenizer = HuggingFaceTokenizer(str(folder))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size) == (
        259,
        260,
        None,
        261,
    )
    assert tokenizer == HuggingFaceTokenizer(str(folder / "tokenizer.json"))
    assert HuggingFaceTokenizer(str(folder), bos_token="<|endoftext|>").bos_id == 257
    assert HuggingFaceTokenizer(str(folder), eos_token="<|endoftext|>").eos_id == 257


def test_hugging_face_encodes_merges_and_special_tokens(folder):
    tokenizer = HuggingFaceTokenizer(str(folder))
    assert tokenizer.encode("he<|im_end|>") == [256, 259]
    plain = tokenizer.encode("he<|im_end|>", special=False)
    assert 259 not in plain and tokenizer.decode(plain) == "he<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("héllo ∑")) == "héllo ∑"
    assert tokenizer.decode([256, 259, 260]) == "he"
    assert tokenizer.decode([256, 9999]) == "he", "rows that pad a checkpoint's embedding decode to nothing"
    assert tokenizer.token_text(259) == "<|im_end|>" and tokenizer.token_text(256) == "he"
    assert tokenizer.token_text(ALPHABET.index("Ã")) == f"<token {ALPHABET.index('Ã')}>"
    with pytest.raises(ValueError, match="token id -2 at position 0"):
        tokenizer.decode([-2])


def test_padding_is_never_quietly_eos(folder):
    configure(folder, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="says nothing about pad_token.*Pass pad_token= one of"):
        HuggingFaceTokenizer(str(folder))
    configure(folder, pad_token="<|pad|>")
    with pytest.raises(ValueError, match="says nothing about eos_token"):
        HuggingFaceTokenizer(str(folder))
    configure(folder, eos_token="<|im_end|>", pad_token="<|im_end|>")
    with pytest.warns(UserWarning, match="padding and EOS are the same token '<|im_end|>'"):
        assert HuggingFaceTokenizer(str(folder)).pad_id == 259


def test_a_token_that_is_not_in_the_vocabulary_is_named(folder):
    with pytest.raises(ValueError, match=r"eos_token is '</s>', which is not in the vocabulary.*im_end"):
        HuggingFaceTokenizer(str(folder), eos_token="</s>")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file .*tokenizer.json"):
        HuggingFaceTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizer.json"):
        HuggingFaceTokenizer(str(tmp_path), eos_token="a", pad_token="b")


def test_a_missing_package_gives_the_command_to_run(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxrl\[hf\]'"):
        HuggingFaceTokenizer(str(folder))


def test_a_file_changed_since_it_was_saved_is_refused(folder):
    spec = HuggingFaceTokenizer(str(folder)).to_json()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match="sha256 differs"):
        load_tokenizer(spec)


# All of them


def test_every_tokenizer_is_rebuilt_from_json(folder):
    for tokenizer in (ByteTokenizer(), CharTokenizer("01+="), HuggingFaceTokenizer(str(folder))):
        again = load_tokenizer(json.loads(json.dumps(tokenizer.to_json())))
        assert again == tokenizer and again.encode("01") == tokenizer.encode("01")


def test_load_tokenizer_takes_names_and_paths(folder):
    assert load_tokenizer("byte") == ByteTokenizer()
    assert load_tokenizer("char:01:") == CharTokenizer("01:")
    assert load_tokenizer(str(folder)).vocab_size == 261
    with pytest.raises(ValueError, match="no tokeniser 'bite'; expected \"byte\""):
        load_tokenizer("bite")
    with pytest.raises(ValueError, match="kind is one of .*got 'word'"):
        load_tokenizer({"kind": "word"})
