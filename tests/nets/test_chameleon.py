"""Chameleon against torch (chameleon.npz), its picture tokens, and sampling that keeps pictures and text apart."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.nets import chameleon, presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.vision.vq import SIZES, VQ
from jaxrl.nets.weights import from_hugging_face, maps
from jaxrl.nets.weights import names as decoder
from jaxrl.nets.weights.chameleon import VQ_PREFIX, from_checkpoint, vq_names
from jaxrl.posttrain import sft
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.types import Prompts, TokenBatch
from tests.golden.drawn import drawn
from tests.nets.vision_cases import gradients_close

GOLDEN = Path(__file__).parents[1] / "golden" / "chameleon.npz"
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def checkpoint(config):
    """The torch checkpoint that the golden values are of: its weights follow from a seed, its names and shapes."""
    places = decoder.names(config)
    text = {name: maps._stored_shape((place,), decoder.shapes(config)) for name, place in places.items()}
    ours = maps.shapes(VQ(TINY), np.zeros((1, 16, 16, 3), np.float32), method="encode")
    seen = {name: maps._stored_shape((place,), ours) for name, place in vq_names(TINY).items()}
    rest = {f"{VQ_PREFIX}post_quant_conv.weight": (8, 8, 1, 1), f"{VQ_PREFIX}post_quant_conv.bias": (8,)}
    return drawn(text | seen | rest, 7)


@pytest.mark.parametrize("case", ["pre", "branch"])
def test_logits_equal_those_of_torch(case, golden):
    config = from_hugging_face(json.loads(str(golden[f"{case}/config"])))
    assert (config.norm_place, config.qk_norm) == (case, "heads")
    params, _ = from_checkpoint(config, TINY, checkpoint(config))
    model = language_model(config)
    hidden, _ = jax.jit(model.apply)(params, jnp.asarray(golden["ids"]))
    want = golden[f"{case}/logits"]
    np.testing.assert_allclose(logits(hidden, model.unembedding(params)), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", ["pre", "branch"])
def test_loss_and_gradients_equal_those_of_torch(case, golden):
    config = from_hugging_face(json.loads(str(golden[f"{case}/config"])))
    params, _ = from_checkpoint(config, TINY, checkpoint(config))
    model = language_model(config)
    batch = TokenBatch(jnp.asarray(golden["ids"]), jnp.ones(golden["ids"].shape))

    def loss(params):
        value, _ = sft.loss(model, params, batch)
        return value.total / value.weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden[f"{case}/loss"], rtol=1e-5)
    begin = f"{case}/grad/"
    gradients_close(
        decoder.to_checkpoint(config, gradient),
        {name.removeprefix(begin): x for name, x in golden.items() if name.startswith(begin)},
    )


def test_picture_tokens_equal_those_of_torch(golden):
    config = from_hugging_face(json.loads(str(golden["pre/config"])))
    _, params = from_checkpoint(config, TINY, checkpoint(config))
    pictures = jnp.asarray(golden["pictures"]).transpose(0, 2, 3, 1)
    module = VQ(TINY)
    latent = jax.jit(lambda p, x: module.apply({"params": p}, x, method=lambda m, x: m.encoder(x)))(params, pictures)
    want = golden["latent"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(latent, want, atol=1e-5 * np.abs(want).max())
    ids = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode").ids)(params, pictures)
    np.testing.assert_array_equal(ids.reshape(2, -1), golden["codes"])


def test_the_tokeniser_learns_to_put_pictures_together_again():
    """Straight-through gradients reach the encoder; the codebook moves by its own term."""
    module = VQ(TINY)
    pictures = jnp.sign(jnp.sin(jnp.arange(16.0)[None, :, None, None] * jnp.array([0.4, 0.8])[:, None, None, None]))
    pictures = jnp.broadcast_to(pictures, (2, 16, 16, 3)) * 0.8
    params = jax.jit(module.init)(jax.random.key(0), pictures)["params"]

    def loss(params):
        again, quantised = module.apply({"params": params}, pictures)
        return jnp.mean(jnp.square(again - pictures)) + quantised.loss

    gradient = jax.jit(jax.grad(loss))(params)
    sizes = jax.tree.map(lambda g: jnp.abs(g).max(), {n: gradient[n] for n in ("encoder", "codebook", "decoder")})
    assert all(size > 0 for size in (sizes["codebook"], sizes["encoder"]["conv_in"]["kernel"]))

    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(40):  # convolutions in a scan are slow on CPUs
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0], values


def test_bytes_are_refused():
    with pytest.raises(ValueError, match="dtype uint8, expected floats"):
        VQ(TINY).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3), jnp.uint8))


IMAGE = chameleon.Pictures(ids=(10, 12, 14, 16), begin=3, end=4, tokens=4)


def test_pictures_stand_between_their_marks():
    codes = jnp.array([[[0, 1], [3, 2]]])
    tokens = IMAGE.embed(codes)
    np.testing.assert_array_equal(tokens, [[3, 10, 12, 16, 14, 4]])
    np.testing.assert_array_equal(IMAGE.codes(tokens), [[-1, 0, 1, 3, 2, -1]])
    assert IMAGE.codes(jnp.array(500)) == -1
    with pytest.raises(ValueError, match="expected 4 in all"):
        IMAGE.embed(jnp.zeros((1, 3, 2), jnp.int32))


def test_published_names_of_codes_are_digits_as_letters():
    config = dataclasses.replace(TINY, codes=12)
    names = {f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(c))}Z": 100 - c for c in range(12)} | {"cat": 5}
    assert chameleon.pictures(names, config, begin=1, end=2).ids == tuple(100 - c for c in range(12))
    with pytest.raises(ValueError, match="no names for 1 of 12 codes, such as 11"):
        del names["IMGIMGBBZ"]
        chameleon.pictures(names, config, begin=1, end=2)


def test_sampling_finishes_a_picture_before_it_speaks_again():
    model = language_model(presets.tiny(20, width=16, heads=2, kv_heads=2, ffn=16))
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = Prompts(jnp.array([[5, 6], [5, 3]]), jnp.array([2, 2]))  # the second has begun a picture
    draw = lambda key: rollout(
        model, params, prompts, key, sampling=Sampling(max_tokens=24), eos_id=1, pad_id=0, samples=8,
        allowed=IMAGE.allowed(20),
    )  # fmt: skip
    out = jax.jit(draw)(jax.random.key(1))
    whole = 0
    for row, length in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True):
        text = list(row[: 2 + length])
        while 3 in text:
            at = text.index(3)
            part, text = text[at + 1 : at + 6], text[:at] + text[at + 6 :]
            assert all(token in IMAGE.ids for token in part[:4]) and part[4:] in ([], [4])
            whole += len(part) == 5
        assert not set(text) & {4, *IMAGE.ids}
    assert whole > 8
    free = completion_log_probs(model, params, out)[0] * out.mask
    np.testing.assert_allclose(out.log_probs, free, atol=1e-5)  # of the model itself
    assert jnp.all(out.behaviour_log_probs >= out.log_probs - 1e-6)
    assert jnp.any(out.behaviour_log_probs > out.log_probs + 0.1)


def test_published_parameter_counts():
    for preset, count in ((chameleon.chameleon_7b, 7_013_666_816), (chameleon.chameleon_34b, 34_294_308_864)):
        params = jax.eval_shape(language_model(preset()).init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(params)) == count
        assert f"{count:,}" in preset.__doc__
    config = SIZES["chameleon"]
    shapes = maps.shapes(VQ(config), np.zeros((1, 512, 512, 3), np.float32), method="encode")
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 7_043_090_432 - 7_013_666_816 - 256 * 257
    assert config.tokens == 1024
