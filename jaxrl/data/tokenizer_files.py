"""Tokenisers as the files of published models hold them: GGUF metadata in, `tokenizer.json` in and out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl.data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer

PADDING = (
    *("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]", "<|fim_pad|>", "<|vision_pad|>"),
    *("<|reserved_special_token_0|>", "<unk>"),
)
"""Tokens that may pad, the first in the vocabulary that is not EOS."""

_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # `tokenizer.ggml.pre` -> how text is cut before the merges: a regular expression, digits, or GPT-2's way
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": _CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "qwen2": _CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
}
CONTROL, USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type`


def open_tokenizer(file: str, *, text: str | None = None, settings: str | None = None) -> HuggingFaceTokenizer:
    """A published model's tokeniser, as `HuggingFaceTokenizer`, with padding that is not EOS.

    Many published files pad with EOS, or name no padding: one of `PADDING` takes its place where the vocabulary has
    one. Nothing here compares ids with padding, so the model does not notice; programs that do would never learn EOS.
    """
    path = Path(file)
    where = path if path.is_dir() or text is not None else path.parent
    if text is None and path.is_dir() and not (path / "tokenizer.json").is_file():
        old = [name for name in ("tokenizer.model", "vocab.json") if (path / name).is_file()]
        found = f"only {old[0]}, the form before it" if old else "no tokenizer.json"
        raise ValueError(
            f"{path} holds {found}; expected a tokenizer.json beside the weights. transformers writes one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder). Or name another: tokenizer=PATH"
        )
    config = json.loads(settings or "{}") if text is not None else _read_json(where / "tokenizer_config.json")
    names = {name: _content(config.get(name)) for name in ("eos_token", "pad_token", "bos_token")}
    if names["pad_token"] is None or names["pad_token"] == names["eos_token"]:
        plain = text if text is not None else (path / "tokenizer.json" if path.is_dir() else path).read_text("utf-8")
        known = {token["content"] for token in json.loads(plain).get("added_tokens", ())}
        free = [token for token in PADDING if token in known and token != names["eos_token"]]
        names["pad_token"] = free[0] if free else names["pad_token"]
    return HuggingFaceTokenizer(file, **names, text=text, settings=settings)


def from_gguf(metadata: Mapping[str, Any], file: str) -> HuggingFaceTokenizer:
    """The tokeniser that a GGUF file describes: byte-level BPE from its tokens and merges.

    Args:
      metadata: key -> value, as `jaxrl.nets.weights.read_gguf` gives it.
      file: where it is from.

    Raises:
      ValueError: another kind than byte-level BPE, or a way to split words that is not in `SPLITS`.
      ImportError: with the command to run, if `tokenizers` is not installed.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    remedy = "Name the tokenizer.json of the model it was made from: tokenizer=PATH"
    if not tokens or kind is None:
        raise ValueError(f"{file} holds no tokeniser (no tokenizer.ggml.tokens). {remedy}")
    if kind != "gpt2" or not merges:
        raise ValueError(f"{file} has a tokeniser of the kind {kind!r}; expected 'gpt2' (byte-level BPE). {remedy}")
    if pre not in SPLITS:
        raise ValueError(f"{file} splits words as {pre!r}; expected one of {', '.join(SPLITS)}. {remedy}")
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    name = lambda key: None if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is None else tokens[i]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "eos_token": name("eos"),
        "pad_token": name("padding"),
        "bos_token": name("bos"),
        "unk_token": name("unknown"),
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    text = _byte_level_bpe(
        {token: i for i, token in enumerate(tokens)},
        [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
        special=[t for t, k in zip(tokens, kinds, strict=True) if k == CONTROL],
        added=[t for t, k in zip(tokens, kinds, strict=True) if k == USER_DEFINED],
        pre=pre,
        bos=settings.get("bos_token") if settings["add_bos_token"] else None,
    )
    return open_tokenizer(file, text=text, settings=json.dumps(settings))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, from which transformers and `open_tokenizer` read it again.

    Bytes and characters become BPE without merges: same ids, same texts.
    """
    from jaxrl.text.tokenizer import TrainedTokenizer, save

    folder = Path(folder)
    if isinstance(tokenizer, TrainedTokenizer):
        return save(tokenizer, folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text = tokenizer.text if tokenizer.text is not None else Path(tokenizer.file).read_text(encoding="utf-8")
        names = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token", "bos_token")}
        config = tokenizer.config | {name: token for name, token in names.items() if token is not None}
    else:
        special = ["<bos>", "<eos>", "<pad>"]
        text = _without_merges(tokenizer, special)
        names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(written, encoding="utf-8")


def _byte_level_bpe(
    vocabulary: dict[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    special: Sequence[str],
    added: Sequence[str],
    pre: str,
    bos: str | None,
) -> str:
    """A `tokenizer.json`. pre: a key of `SPLITS`. bos: what goes before every text, or None."""
    parts = _parts()
    byte_level, split = parts.pre_tokenizers.ByteLevel, SPLITS[pre]
    if split is None:
        steps = [byte_level(add_prefix_space=False)]
    elif split == "digits":
        steps = [parts.pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
    else:
        cut = parts.pre_tokenizers.Split(parts.Regex(split), behavior="isolated")
        steps = [cut, byte_level(add_prefix_space=False, use_regex=False)]
    writer = parts.Tokenizer(parts.models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=pre == "llama-bpe"))
    writer.pre_tokenizer = parts.pre_tokenizers.Sequence(steps)
    writer.decoder = parts.decoders.ByteLevel()
    if pre == "qwen2":
        writer.normalizer = parts.normalizers.NFC()
    if bos is not None:
        rule = parts.processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
        writer.post_processor = rule
    writer.add_special_tokens([parts.AddedToken(token, special=True, normalized=False) for token in special])
    writer.add_tokens([parts.AddedToken(token, special=False, normalized=False) for token in added])
    return writer.to_str()


def _without_merges(tokenizer: Tokenizer, special: Sequence[str]) -> str:
    """The `tokenizer.json` of bytes or characters."""
    parts = _parts()
    if isinstance(tokenizer, ByteTokenizer):
        letters = [letter(byte) for byte in range(256)]
        writer = parts.Tokenizer(parts.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        writer.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        writer.decoder = parts.decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        alphabet = {character: i for i, character in enumerate(tokenizer.alphabet)}
        writer = parts.Tokenizer(parts.models.BPE(vocab=alphabet, merges=[]))
        writer.decoder = parts.decoders.Fuse()
    else:
        raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json; expected bytes, characters or a file's")
    writer.add_special_tokens([parts.AddedToken(token, special=True, normalized=False) for token in special])
    return writer.to_str()


def letter(byte: int) -> str:
    """The printable letter that stands for a byte in GPT-2's vocabularies: itself, or one above U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def _parts() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "building a tokenizer.json takes the package `tokenizers`, which is not installed. "
            "Run: pip install 'jaxrl[hf]'   (or: pip install tokenizers)"
        ) from error
    return tokenizers


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(entry: Any) -> str | None:
    return entry["content"] if isinstance(entry, dict) else entry
