"""Text in, padded arrays out: tokenisers, records, chat templates, preferences, packing, a loader, splits.

Arrays are NumPy's; JAX is not loaded before a batch of its types is made.
"""

from jaxrl.data.chat import chatml as chatml
from jaxrl.data.chat import jinja as jinja
from jaxrl.data.loader import batches as batches
from jaxrl.data.packing import best_fit as best_fit
from jaxrl.data.packing import limit_length as limit_length
from jaxrl.data.packing import pack as pack
from jaxrl.data.preferences import encode_labelled as encode_labelled
from jaxrl.data.preferences import encode_pairs as encode_pairs
from jaxrl.data.records import Examples as Examples
from jaxrl.data.records import check_vocabulary as check_vocabulary
from jaxrl.data.records import encode_answers as encode_answers
from jaxrl.data.records import encode_examples as encode_examples
from jaxrl.data.records import encode_prompts as encode_prompts
from jaxrl.data.sources import JsonLines as JsonLines
from jaxrl.data.sources import read_jsonl as read_jsonl
from jaxrl.data.sources import read_records as read_records
from jaxrl.data.split import split_by_problem as split_by_problem
from jaxrl.data.tokenizer import ByteTokenizer as ByteTokenizer
from jaxrl.data.tokenizer import CharTokenizer as CharTokenizer
from jaxrl.data.tokenizer import HuggingFaceTokenizer as HuggingFaceTokenizer
from jaxrl.data.tokenizer import Tokenizer as Tokenizer
from jaxrl.data.tokenizer import load_tokenizer as load_tokenizer
