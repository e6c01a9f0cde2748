import json

import pytest
from tokenizers import Tokenizer as Reader
from tokenizers import decoders, models, pre_tokenizers, processors


@pytest.fixture
def folder(tmp_path):
    """A byte-level Hugging Face tokeniser of 256 letters, one merge and four special tokens."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"he": 256}
    reader = Reader(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    reader.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"])
    reader.post_processor = processors.TemplateProcessing("$A <|im_end|>", special_tokens=[("<|im_end|>", 259)])
    reader.save(str(tmp_path / "tokenizer.json"))
    tokens = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return tmp_path
