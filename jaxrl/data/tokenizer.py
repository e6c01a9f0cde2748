"""Tokenisers: bytes and characters built in, a Hugging Face `tokenizer.json` through the extra `hf`.

Every tokeniser is a frozen value with the same few members (`Tokenizer`). The ids of BOS, EOS and padding are
three different ids unless a Hugging Face file says otherwise, and nothing here or later looks for the end of
a text by comparing ids with the padding id: lengths and masks are carried explicitly.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, Self


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokeniser.

    encode(text) -> ids, without BOS or EOS. `special=False` keeps the text of a special token as plain text,
      so that a user's message cannot forge one. decode(ids) -> text, special tokens left out. token_id(text)
      -> the id of one named token, or None. token_text(id) -> one token as a person should see it. to_json()
      -> a plain dictionary from which `load_tokenizer` builds the same tokeniser again.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    def encode(self, text: str, *, special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, text: str) -> int | None: ...
    def token_text(self, token: int) -> str: ...
    def to_json(self) -> dict[str, Any]: ...


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether the ids of two tokenisers mean the same."""
    content = lambda it: {name: value for name, value in it.to_json().items() if name != "file"} | {"": it.vocab_size}
    return content(one) == content(other)


@dataclass(frozen=True)
class ByteTokenizer:
    """One token per UTF-8 byte (ids 0 to 255), then BOS, EOS, padding (256, 257, 258). Knows every text."""

    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 259

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the UTF-8 bytes of `text`. No text can produce BOS, EOS or padding."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens are left out, broken UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def token_id(self, text: str) -> int | None:
        """Return the id of `<bos>`, `<eos>`, `<pad>` or of a text of one byte; None for anything else."""
        special = {"<bos>": self.bos_id, "<eos>": self.eos_id, "<pad>": self.pad_id}
        encoded = self.encode(text)
        return special.get(text, encoded[0] if len(encoded) == 1 else None)

    def token_text(self, token: int) -> str:
        """Return the token as a person should see it: `<eos>`, a character, `<0xE2>` above ASCII."""
        check_ids([token], self.vocab_size)
        if token >= 256:
            return ("<bos>", "<eos>", "<pad>")[token - 256]
        return chr(token) if token < 128 else f"<0x{token:02X}>"

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary from which `load_tokenizer` builds this tokeniser again."""
        return {"kind": "byte"}

    @classmethod
    def from_json(cls, spec: dict[str, Any]) -> Self:
        """Build the tokeniser that `to_json` described."""
        return cls()


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character of `alphabet` (in its order), then BOS, EOS and padding.

    Raises ValueError if the alphabet is empty or holds a character twice.
    """

    alphabet: str

    def __post_init__(self):
        if not self.alphabet:
            raise ValueError("CharTokenizer got an empty alphabet; expected a string of distinct characters")
        twice = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if twice:
            raise ValueError(
                f"CharTokenizer got an alphabet that holds {twice} more than once: {self.alphabet!r}. "
                "Each character stands for one id: write each once"
            )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.alphabet)}

    @property
    def bos_id(self) -> int:
        return len(self.alphabet)

    @property
    def eos_id(self) -> int:
        return len(self.alphabet) + 1

    @property
    def pad_id(self) -> int:
        return len(self.alphabet) + 2

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet) + 3

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return one id per character. Raises ValueError for a character outside the alphabet."""
        for position, character in enumerate(text):
            if character not in self._ids:
                raise ValueError(
                    f"character {character!r} at position {position} of {_excerpt(text)} is not in the "
                    f"alphabet {self.alphabet!r}. Add it to the alphabet (a new model), or use the byte "
                    "tokeniser, which knows every text"
                )
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens are left out. Raises ValueError for an id out of range."""
        check_ids(ids, self.vocab_size)
        return "".join(self.alphabet[i] for i in ids if i < len(self.alphabet))

    def token_id(self, text: str) -> int | None:
        """Return the id of a character or of `<bos>`, `<eos>`, `<pad>`; None for anything else."""
        special = {"<bos>": self.bos_id, "<eos>": self.eos_id, "<pad>": self.pad_id}
        return special.get(text, self._ids.get(text))

    def token_text(self, token: int) -> str:
        """Return the character, or `<bos>`, `<eos>`, `<pad>`."""
        check_ids([token], self.vocab_size)
        characters = len(self.alphabet)
        return self.alphabet[token] if token < characters else ("<bos>", "<eos>", "<pad>")[token - characters]

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary from which `load_tokenizer` builds this tokeniser again."""
        return {"kind": "char", "alphabet": self.alphabet}

    @classmethod
    def from_json(cls, spec: dict[str, Any]) -> Self:
        """Build the tokeniser that `to_json` described."""
        return cls(spec["alphabet"])


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` package (`pip install 'jaxrl[hf]'`).

    file: path of the `tokenizer.json`, or of the folder that holds it.
    eos_token, pad_token, bos_token: token texts such as "<|im_end|>". What is not given is read from
      `tokenizer_config.json` beside the file. BOS may be missing; EOS and padding may not: padding is never
      quietly taken to be EOS. A file or argument that itself makes them equal is followed, with a warning.
    text, settings: the contents of `tokenizer.json` and `tokenizer_config.json` themselves, where they come from
      elsewhere (GGUF metadata); `file` then only says from where.

    `encode` adds neither BOS nor EOS. `vocab_size` counts the added tokens too; a checkpoint's embedding may
    have more rows (padding of the matrix), whose ids decode to nothing.

    Raises ValueError if the file is missing, a token is not in the vocabulary, or EOS or padding is not
    known; ImportError with the command to run if `tokenizers` is not installed.
    """

    file: str
    eos_token: str | None = None
    pad_token: str | None = None
    bos_token: str | None = None
    text: str | None = field(default=None, repr=False)
    settings: str | None = field(default=None, repr=False)

    def __post_init__(self):
        path = Path(self.file)
        if self.text is None:
            path = (path / "tokenizer.json" if path.is_dir() else path).resolve()
            if not path.is_file():
                raise ValueError(f"no file {path}; expected a Hugging Face tokenizer.json or the folder that holds it")
            object.__setattr__(self, "file", str(path))
        for name in ("eos_token", "pad_token", "bos_token"):
            text = getattr(self, name) or _token_content(self.config.get(name))
            object.__setattr__(self, name, text)
            if text is not None and self.token_id(text) is None:
                raise ValueError(
                    f"{name} is {text!r}, which is not in the vocabulary of {path}. Pass {name}= one of its "
                    f"tokens, for example {self._special_tokens}"
                )
        for name, use in (("eos_token", "ends every text"), ("pad_token", "fills short rows")):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{path} says nothing about {name} (it {use}), and neither does tokenizer_config.json "
                    f"beside it. Pass {name}= one of the vocabulary's tokens, for example "
                    f"{self._special_tokens}. Padding should be a token that no text contains, not EOS"
                )
        if self.pad_id == self.eos_id:
            warnings.warn(
                f"{path}: padding and EOS are the same token {self.eos_token!r}. EOS is still trained, since "
                "masks come from lengths; but another program that masks by id would never learn to stop. "
                "Pass pad_token= an unused token to keep them apart",
                stacklevel=3,
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `tokenizer_config.json` beside the file, or an empty dictionary.

        `chat_template` is that of `chat_template.jinja` where there is one.
        """
        if self.text is not None:
            return json.loads(self.settings or "{}")
        beside = Path(self.file).parent
        path, template = beside / "tokenizer_config.json", beside / "chat_template.jinja"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return config | ({"chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {})

    @property
    def adds_bos(self) -> bool:
        """Whether the tokeniser's own rule puts BOS before every text: its models were trained so."""
        if self.bos_id is None:
            return False
        return self._reader().encode("", add_special_tokens=True).ids[:1] == [self.bos_id] or bool(
            self.config.get("add_bos_token")
        )

    def _reader(self, special: bool = True) -> Any:
        return _tokenizers(self.file, self.text, special)

    @property
    def _special_tokens(self) -> list[str]:
        added = self._reader().get_added_tokens_decoder()
        return [added[i].content for i in sorted(added)][:8]

    @property
    def vocab_size(self) -> int:
        vocabulary = self._reader().get_vocab(with_added_tokens=True)
        return max(vocabulary.values()) + 1

    @property
    def eos_id(self) -> int:
        return self._ids["eos_token"]

    @property
    def pad_id(self) -> int:
        return self._ids["pad_token"]

    @property
    def bos_id(self) -> int | None:
        return self._ids.get("bos_token")

    @cached_property
    def _ids(self) -> dict[str, int]:
        reader = self._reader()
        names = {"eos_token": self.eos_token, "pad_token": self.pad_token, "bos_token": self.bos_token}
        ids = {name: reader.token_to_id(text) for name, text in names.items() if text is not None}
        return {name: i for name, i in ids.items() if i is not None}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`. special: whether "<|im_end|>" in the text becomes one token."""
        return self._reader(special).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out. Raises ValueError for a negative id."""
        check_ids(ids, None)
        return self._reader().decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, text: str) -> int | None:
        """Return the id of the token written exactly so in the vocabulary, or None."""
        return self._reader().token_to_id(text)

    def token_text(self, token: int) -> str:
        """Return the text of one token, special ones too; `<token 17>` where it has none of its own."""
        text = self._reader().decode([token], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else f"<token {token}>"

    def to_json(self) -> dict[str, Any]:
        """Return the file's path and hash and the three tokens: enough to rebuild it or see a change.

        Without a file, its text in place of the hash.
        """
        tokens = {"eos_token": self.eos_token, "pad_token": self.pad_token, "bos_token": self.bos_token}
        source = {"text": self.text, "settings": self.settings} if self.text else {"sha256": _sha256(self.file)}
        return {"kind": "huggingface", "file": self.file, **source, **tokens}

    @classmethod
    def from_json(cls, spec: dict[str, Any]) -> Self:
        """Build the tokeniser that `to_json` described. Raises ValueError if the file has changed since."""
        tokens = {name: spec.get(name) for name in ("eos_token", "pad_token", "bos_token", "text", "settings")}
        tokenizer = cls(spec["file"], **tokens)
        if "sha256" in spec and spec["sha256"] != _sha256(tokenizer.file):
            raise ValueError(
                f"{tokenizer.file} is not the file it was when this was saved (sha256 differs): its ids may "
                "mean other texts. Put the old tokenizer.json back, or edit `file` in the saved description"
            )
        return tokenizer


def load_tokenizer(spec: str | dict[str, Any]) -> Tokenizer:
    """Return the tokeniser that `spec` names.

    spec: "byte"; "char:0123456789+=" (the alphabet after the colon); the path of a tokenizer.json or of its
      folder; or the dictionary that a tokeniser's `to_json` returned.

    Raises ValueError if it is none of these.
    """
    kinds = {"byte": ByteTokenizer, "char": CharTokenizer, "huggingface": HuggingFaceTokenizer}
    if isinstance(spec, dict):
        if spec.get("kind") == "trained":  # by jaxrl.text
            from jaxrl.text.tokenizer import from_json

            return from_json(spec)
        if spec.get("kind") not in kinds:
            expected = sorted((*kinds, "trained"))
            raise ValueError(f"a tokeniser's kind is one of {expected}, got {spec.get('kind')!r} in {spec}")
        return kinds[spec["kind"]].from_json(spec)
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("char:"):
        return CharTokenizer(spec.removeprefix("char:"))
    if Path(spec).exists():
        return HuggingFaceTokenizer(spec)
    raise ValueError(
        f'no tokeniser {spec!r}; expected "byte", "char:ALPHABET", or the path of a tokenizer.json or its folder'
    )


def check_ids(ids: Sequence[int], vocab_size: int | None) -> None:
    """Raise ValueError naming the first id outside [0, vocab_size) (None: no upper bound)."""
    for position, token in enumerate(ids):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            limit = "at least 0" if vocab_size is None else f"in [0, {vocab_size})"
            raise ValueError(
                f"token id {int(token)} at position {position} is outside the vocabulary; expected ids "
                f"{limit}. Is this text from another tokeniser, or from a model with a larger vocabulary?"
            )


@lru_cache(maxsize=8)
def _tokenizers(file: str, text: str | None, special: bool):
    """Read the file once per process; a second reader treats the text of special tokens as plain text.

    The reader stays as it is read: `adds_bos` asks for its post-processor, `encode` never runs it.
    """
    try:
        from tokenizers import Tokenizer as Reader
    except ImportError as error:
        raise ImportError(
            f"reading {file} takes the package `tokenizers`, which is not installed. "
            "Run: pip install 'jaxrl[hf]'   (or: pip install tokenizers)"
        ) from error
    try:
        reader = Reader.from_file(file) if text is None else Reader.from_str(text)
    except Exception as error:
        raise ValueError(f"{file} is not a Hugging Face tokenizer.json: {error}") from error
    reader.no_padding()
    reader.no_truncation()
    reader.encode_special_tokens = not special
    return reader


def _token_content(entry: Any) -> str | None:
    return entry["content"] if isinstance(entry, dict) else entry


def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _excerpt(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[: length - 3] + "...")
