"""Text in, padded arrays out: tokenisers, JSON Lines records, chat templates, splits. NumPy only, no JAX."""

from jaxrl.data.chat import chatml as chatml
from jaxrl.data.chat import jinja as jinja
from jaxrl.data.records import Examples as Examples
from jaxrl.data.records import check_vocabulary as check_vocabulary
from jaxrl.data.records import encode_answers as encode_answers
from jaxrl.data.records import encode_examples as encode_examples
from jaxrl.data.records import encode_prompts as encode_prompts
from jaxrl.data.records import read_jsonl as read_jsonl
from jaxrl.data.split import split_by_problem as split_by_problem
from jaxrl.data.tokenizer import ByteTokenizer as ByteTokenizer
from jaxrl.data.tokenizer import CharTokenizer as CharTokenizer
from jaxrl.data.tokenizer import HuggingFaceTokenizer as HuggingFaceTokenizer
from jaxrl.data.tokenizer import Tokenizer as Tokenizer
from jaxrl.data.tokenizer import load_tokenizer as load_tokenizer
