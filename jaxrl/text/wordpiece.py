"""WordPiece as BERT uses it (Schuster and Nakajima 2012; Devlin et al. 2018, arXiv 1810.04805)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jaxrl.text.bpe import check_size
from jaxrl.text.merges import learn_merges
from jaxrl.text.pretokenize import bert_words, count_words
from jaxrl.text.tokenizer import TrainedTokenizer

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class WordPieceTokenizer(TrainedTokenizer):
    """The longest piece that fits, from the left; pieces inside a word begin with "##".

    A word that no pieces spell, or of more than 100 characters, is one [UNK]. Decoding puts a space between words:
    the text's own spaces, and with `lowercase` its capitals and accents, are lost.
    """

    special: tuple[str, ...] = BERT
    bos_token: str | None = "[CLS]"
    eos_token: str = "[SEP]"
    pad_token: str = "[PAD]"
    lowercase: bool = True

    def _encode(self, text: str) -> list[int]:
        return [i for word in bert_words(text, lowercase=self.lowercase) for i in self._word(word)]

    @cached_property
    def _word(self):
        return lru_cache(1 << 16)(self._pieces)

    def _pieces(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= 100:
            mark = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in self._plain)
            if (end := next(ends, None)) is None:
                break
            ids.append(self._plain[mark + word[start:end]])
            start = end
        return ids if start == len(word) else [self._ids["[UNK]"]]

    def _decode(self, tokens: Sequence[str]) -> str:
        words = [token.removeprefix("##") if token.startswith("##") else f" {token}" for token in tokens[1:]]
        return "".join([*tokens[:1], *words])

    def _parts(self) -> dict[str, Any]:
        clean = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": self.lowercase}
        switches = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        return {
            "normalizer": {"type": "BertNormalizer", **clean},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {"type": "WordPiece", **switches, "vocab": self._ids},
        }

    @classmethod
    def _from_parts(cls, parts: dict[str, Any], **common: Any) -> "WordPieceTokenizer":
        return cls(lowercase=(parts["normalizer"] or {}).get("lowercase", True), **common)


def train_wordpiece(
    texts: str | Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    score: str = "likelihood",
    min_count: int = 2,
) -> WordPieceTokenizer:
    """Learn pieces from texts.

    "likelihood" joins the pair of the largest count(ab) / (count(a) count(b)), which is the algorithm's own score and
    likes rare pairs: hence `min_count`. "count" joins the most frequent pair: so trains `tokenizers`, whose WordPiece
    trainer is its BPE trainer with a prefix (with ties broken by chance). Encoding is the same for both.

    Args:
      texts: a text, or several.
      vocab_size: of all tokens: BERT's special ones, each character at the beginning of a word and inside, pieces.
      lowercase: whether capitals and accents are dropped.
      score: "likelihood" or "count".
      min_count: of a pair.

    Raises:
      ValueError: a vocabulary smaller than the alphabet and the special tokens, or another score.
    """
    words = count_words(texts, lambda text: bert_words(text, lowercase=lowercase))
    alphabet = sorted({c for word in words for c in word})
    alphabet += sorted({f"##{c}" for word in words for c in word[1:]})
    room = check_size("train_wordpiece", vocab_size, len(alphabet), BERT)
    ids = {piece: i for i, piece in enumerate(alphabet)}
    spelt = {tuple(ids[f"##{c}" if i else c] for i, c in enumerate(word)): count for word, count in words.items()}
    join = lambda left, right: left + right.removeprefix("##")
    tokens, _ = learn_merges(spelt, alphabet, room, join=join, score=score, min_count=min_count)
    return WordPieceTokenizer(tokens=(*BERT, *tokens), lowercase=lowercase)
