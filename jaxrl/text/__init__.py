"""Statistics of text: tokenisers learnt from it, n-gram models, word vectors."""

from jaxrl.text import ngram as ngram
from jaxrl.text import pretokenize as pretokenize
from jaxrl.text import unigram as unigram
from jaxrl.text import wordpiece as wordpiece
from jaxrl.text.bpe import BPETokenizer as BPETokenizer
from jaxrl.text.bpe import train_bpe as train_bpe
from jaxrl.text.ngram import ngram_perplexity as ngram_perplexity
from jaxrl.text.tokenizer import TrainedTokenizer as TrainedTokenizer
from jaxrl.text.tokenizer import from_json as from_json
from jaxrl.text.tokenizer import load as load
from jaxrl.text.tokenizer import save as save
from jaxrl.text.unigram import UnigramTokenizer as UnigramTokenizer
from jaxrl.text.unigram import train_unigram as train_unigram
from jaxrl.text.wordpiece import WordPieceTokenizer as WordPieceTokenizer
from jaxrl.text.wordpiece import train_wordpiece as train_wordpiece
