"""What tokenisers learnt from text have in common: special tokens, ids, and the file `tokenizer.json`.

`save` writes the file without the package `tokenizers`, which reads it and encodes equally; `load` reads it again, also
a published model's, where it is made of the parts that are here.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from jaxrl.data.tokenizer import check_ids

SPECIAL = ("<bos>", "<eos>", "<pad>")


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """The base of the three: a `jaxrl.data.Tokenizer` that says how words become ids.

    tokens: id -> token as the file spells it. special: those of them that are never cut and that no plain text can
    write; the longest match wins. bos_token, eos_token, pad_token: which of them have a part to play.
    """

    tokens: tuple[str, ...]
    special: tuple[str, ...] = SPECIAL
    bos_token: str | None = "<bos>"
    eos_token: str = "<eos>"
    pad_token: str = "<pad>"

    def __post_init__(self):
        name = type(self).__name__
        if len(self._ids) != len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise ValueError(f"{name} got a vocabulary that holds {twice[:8]} more than once; expected distinct tokens")
        roles = {self.eos_token, self.pad_token, self.bos_token or self.eos_token}
        if missing := sorted({*self.special, *roles} - {*self._ids}) + sorted(roles - {*self.special}):
            raise ValueError(
                f"{name} got special tokens that are not among its tokens or not in special: {missing}; expected BOS, "
                f"EOS and padding in special={self.special}, and all of those in the vocabulary"
            )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def _plain(self) -> dict[str, int]:
        """The vocabulary of the model itself: text can become these."""
        return {token: i for token, i in self._ids.items() if token not in self.special}

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def bos_id(self) -> int | None:
        return None if self.bos_token is None else self._ids[self.bos_token]

    @property
    def eos_id(self) -> int:
        return self._ids[self.eos_token]

    @property
    def pad_id(self) -> int:
        return self._ids[self.pad_token]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`. special: whether "<eos>" in the text becomes one token."""
        if not special or not self.special:
            return self._encode(text)
        rule = "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True))
        parts = re.split(f"({rule})", text)
        return [i for n, part in enumerate(parts) for i in ([self._ids[part]] if n % 2 else self._encode(part))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out. Raises ValueError for an id out of range."""
        check_ids(ids, self.vocab_size)
        return self._decode([token for i in ids if (token := self.tokens[i]) not in self.special])

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that the vocabulary spells so, or None."""
        return self._ids.get(text)

    def token_text(self, token: int) -> str:
        """Return the token as a person should see it, special ones too."""
        check_ids([token], self.vocab_size)
        text = self.tokens[token] if self.tokens[token] in self.special else self._decode([self.tokens[token]])
        return text if text and "\ufffd" not in text else f"<token {token}>"

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary from which `from_json` builds this tokeniser again."""
        roles = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        return {"kind": "trained", "content": tokenizer_json(self), **roles}

    # What each kind says for itself.

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, tokens: Sequence[str]) -> str:
        raise NotImplementedError

    def _parts(self) -> dict[str, Any]:
        """The entries "normalizer", "pre_tokenizer", "decoder" and "model" of the file."""
        raise NotImplementedError

    @classmethod
    def _from_parts(cls, parts: dict[str, Any], **common: Any) -> Self:
        raise NotImplementedError


def tokenizer_json(tokenizer: TrainedTokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": tokenizer._ids[token], "content": token, **flags} for token in tokenizer.special]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": sorted(added, key=lambda t: t["id"])}
    return {**head, "normalizer": None, "post_processor": None, **tokenizer._parts()}


def save(tokenizer: TrainedTokenizer, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `load`, `jaxrl.data` and transformers read."""
    roles = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    roles = {role: token for role, token in roles.items() if token is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    for name, content in (("tokenizer.json", tokenizer_json(tokenizer)), ("tokenizer_config.json", settings)):
        (Path(folder) / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: str | Path) -> TrainedTokenizer:
    """Read what `save` wrote. Raises ValueError for a file of parts that are not here: `jaxrl.data` reads all kinds."""
    file, settings = (
        json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    content = lambda entry: entry["content"] if isinstance(entry, dict) else entry
    roles = {role: content(settings.get(role)) for role in ("bos_token", "eos_token", "pad_token")}
    return from_json({"content": file, **roles})


def from_json(spec: dict[str, Any]) -> TrainedTokenizer:
    """Build the tokeniser that `to_json` described."""
    from jaxrl.text import bpe, unigram, wordpiece  # they build on this file

    kinds = {
        "BPE": bpe.BPETokenizer,
        "WordPiece": wordpiece.WordPieceTokenizer,
        "Unigram": unigram.UnigramTokenizer,
    }
    file, kind = spec["content"], spec["content"]["model"]["type"]
    if kind not in kinds:
        raise ValueError(f"from_json: the file's model is {kind!r}; expected one of {', '.join(kinds)}")
    vocabulary = file["model"]["vocab"]
    ids = dict(vocabulary) if kind != "Unigram" else {token: i for i, (token, _) in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in file["added_tokens"]}
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"from_json: {len(ids)} tokens do not have the ids 0 to {len(ids) - 1}; expected no gap")
    roles = {role: spec.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    special = tuple(token["content"] for token in file["added_tokens"] if token["special"])
    found = kinds[kind]._from_parts(file, tokens=tuple(sorted(ids, key=lambda t: ids[t])), special=special, **roles)
    if (again := tokenizer_json(found)) != file:
        differ = sorted(key for key in {*again, *file} if again.get(key) != file.get(key))
        raise ValueError(
            f"from_json: {', '.join(differ)} of this tokenizer.json are of a kind that is not here; "
            "jaxrl.data.HuggingFaceTokenizer reads it (pip install 'jaxrl[hf]')"
        )
    return found
