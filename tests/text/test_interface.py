"""A tokenizer that was trained here goes where the project takes one: into a run's files and out again."""

import json

from jaxrl import text
from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.data.tokenizer_files import open_tokenizer, save_tokenizer

WORDS = "the cat sat on the mat and the rat sat on the cat " * 4


def test_a_run_opens_its_trained_tokenizer_again(tmp_path):
    trained = text.train_bpe([WORDS], 300, special=["<bos>", "<eos>", "<pad>"])
    again = load_tokenizer(json.loads(json.dumps(trained.to_json())))
    assert again.encode(WORDS) == trained.encode(WORDS) and again.vocab_size == trained.vocab_size
    save_tokenizer(trained, tmp_path)
    published = open_tokenizer(tmp_path)
    assert published.encode(WORDS) == trained.encode(WORDS) and published.decode(trained.encode(WORDS)) == WORDS
