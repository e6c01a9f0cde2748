"""Encoders and GPT-2 against torch, by the values of tests/golden/make_encoders.py, and what their form implies."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Segments
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.nets.encoder import Encoder, EncoderConfig, masked_language_model, unembedding, with_embeddings_of
from jaxrl.nets.encoder_presets import GPT2_SIZES, SIZES, encoder
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.weights import bert, gpt2, maps, names
from tests.nets.vision_cases import close, golden, random_params

CASES = {
    "bert": ("bert", "bert_body", "bert_classes"),
    "roberta": ("roberta", "roberta_classes"),
    "albert": ("albert",),
    "electra": ("electra", "electra_generator", "electra_classes"),
    "distilbert": ("distilbert", "distilbert_classes"),
}
COUNTS = {  # of transformers' classes
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "bert_base_cased": 108_932_934,
    "bert_base_multilingual": 178_566_653,
    "bert_tiny": 4_433_468,
    "bert_mini": 11_267_900,
    "bert_small": 29_058_876,
    "bert_medium": 41_668_412,
    "minilm_l6": 22_713_216,
    "roberta_base": 124_697_433,
    "roberta_large": 355_412_057,
    "distilroberta": 82_170_201,
    "xlm_roberta_base": 278_295_186,
    "xlm_roberta_large": 560_142_482,
    "albert_base": 11_813_810,
    "albert_large": 17_847_474,
    "albert_xlarge": 59_021_490,
    "albert_xxlarge": 223_158_450,
    "electra_small": 13_549_057,
    "electra_base": 109_483_009,
    "electra_large": 335_142_913,
    "electra_small_generator": 4_620_026,
    "electra_base_generator": 33_740_602,
    "electra_large_generator": 51_295_290,
    "distilbert": 66_985_530,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}
TINY = SIZES["tiny"]


@functools.cache
def arrays(case):
    return golden(case.split("_")[0])[1][case]


def part(case, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays(case).items() if name.startswith(prefix)}


@functools.cache
def network(case):
    """(config, parameters)."""
    config = bert.from_hugging_face(json.loads(str(arrays(case)["config"])))
    return config, jax.tree.map(jnp.asarray, bert.from_checkpoint(config, part(case, "weight/")))


def outputs(config, params, case):
    """What the network makes of a case's tokens, by the names of the golden file."""
    real = jnp.asarray(case["real"])
    found: Any = Encoder(config).apply(
        {"params": params}, jnp.asarray(case["ids"]), token_types=jnp.asarray(case["types"]), mask=Segments(real)
    )
    scores = {} if found.masked is None else {"logits": logits(found.masked, unembedding(config, params))}
    return found._asdict() | scores


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases])
def test_outputs_equal_those_of_torch(case):
    config, params = network(case)
    given = {name: arrays(case)[name] for name in ("ids", "real", "types")}
    found = jax.jit(outputs, static_argnums=0)(config, params, given)
    for name, want in part(case, "out/").items():
        real = given["real"] > 0 if want.ndim > 1 and want.shape[1] == 9 else slice(None)
        close(np.asarray(found[name])[real], want[real])


def test_gradients_of_the_pretraining_loss_equal_those_of_torch():
    config, params = network("bert")
    case = {name: value for name, value in arrays("bert").items() if "/" not in name and name != "config"}

    def loss(params):
        found = outputs(config, params, case)
        chosen = case["labels"] >= 0
        picked = jnp.take_along_axis(jax.nn.log_softmax(found["logits"]), (case["labels"] * chosen)[..., None], -1)
        pair = jnp.take_along_axis(jax.nn.log_softmax(found["pair"]), case["pair"][:, None], -1)
        return -(picked[..., 0] * chosen).sum() / chosen.sum() - pair.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    ours, theirs = bert.to_checkpoint(config, gradient), part("bert", "grad/")
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(want).max() for want in theirs.values())
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_gpt2_has_the_logits_of_torch():
    published = json.loads(str(arrays("gpt2")["config"]))
    config = gpt2.from_hugging_face(published)
    weights = part("gpt2", "weight/")
    params = gpt2.from_checkpoint(config, weights)
    model = language_model(config)
    hidden, _ = jax.jit(model.apply)(params, jnp.asarray(arrays("gpt2")["ids"]))
    close(logits(hidden, model.unembedding(params)), arrays("gpt2")["out/logits"])
    again = gpt2.to_checkpoint(config, params)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    jax.tree.map(np.testing.assert_array_equal, params, gpt2.from_checkpoint(config, bare | {"h.0.attn.bias": 1.0}))
    assert gpt2.from_hugging_face(gpt2.to_hugging_face(config)) == config
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True"):
        gpt2.from_hugging_face(published | {"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(ValueError, match="no GPT-2"):
        gpt2.to_hugging_face(replace(config, norm_place="post"))


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases])
def test_checkpoints_and_configs_go_both_ways(case):
    config, params = network(case)
    weights, again = part(case, "weight/"), bert.to_checkpoint(config, params)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert bert.from_hugging_face(bert.to_hugging_face(config)) == config
    assert bert.architecture(config) == json.loads(str(arrays(case)["config"]))["architectures"][0]


def test_old_names_prefixes_and_repetitions_are_understood():
    config, params = network("bert_body")
    weights = part("bert_body", "weight/")
    old = {
        f"bert.{k}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in weights.items()
    }
    found = bert.from_checkpoint(config, old | {"bert.embeddings.position_ids": np.arange(16)[None]})
    jax.tree.map(np.testing.assert_array_equal, found, params)
    config, params = network("bert")
    tensors = part("bert", "weight/") | {"extra": np.zeros(3)}
    del tensors["cls.predictions.bias"]
    with pytest.raises(ValueError, match="(?s)missing cls.predictions.bias.*unused extra"):
        bert.from_checkpoint(config, tensors)


def test_published_sizes_have_as_many_parameters_as_published_and_their_names():
    for name, want in COUNTS.items():
        if name in GPT2_SIZES:
            found = names.shapes(GPT2_SIZES[name])
        else:
            found, config = bert.shapes(SIZES[name]), SIZES[name]
            maps.check_total(bert.names(config), found)
            assert bert.from_hugging_face(bert.to_hugging_face(config)) == config, name
        assert sum(np.prod(shape, dtype=int) for shape in found.values()) == want, name
    assert set(COUNTS) == {*SIZES, *GPT2_SIZES} - {"tiny"}


@functools.cache
def tiny():
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 64)
    params = random_params(Encoder(TINY), tokens)
    return params, tokens, jax.jit(Encoder(TINY).apply)


def test_every_token_sees_both_sides_and_no_padding():
    params, tokens, apply = tiny()
    columns = np.broadcast_to(np.arange(10), (2, 10))

    def hidden(tokens, real, positions):
        mask = Segments(jnp.asarray(real, jnp.int32))
        return np.asarray(apply({"params": params}, tokens, positions=positions, mask=mask).hidden)

    plain = hidden(tokens, columns >= 0, columns)
    np.testing.assert_allclose(plain, apply({"params": params}, tokens).hidden, atol=1e-5)
    for changed in (0, 9):
        moved = hidden(tokens.at[0, changed].add(1) % 64, columns >= 0, columns)
        assert (np.abs(moved - plain)[0].max(-1) > 1e-4).all()
        np.testing.assert_array_equal(moved[1], plain[1])
    masked = hidden(tokens, columns < 7, columns)
    np.testing.assert_array_equal(masked[:, :7], hidden(tokens.at[:, 8].add(1) % 64, columns < 7, columns)[:, :7])
    np.testing.assert_allclose(masked[:, :7], apply({"params": params}, tokens[:, :7]).hidden, atol=1e-5)
    rolled = hidden(jnp.roll(tokens, 3, 1), columns >= 3, np.maximum(columns - 3, 0))
    np.testing.assert_allclose(rolled[:, 3:], masked[:, :7], atol=1e-5)


def test_a_masked_language_model_is_a_language_model_with_a_bias():
    params, tokens, _ = tiny()
    model = masked_language_model(TINY)
    hidden, cache = jax.jit(model.apply)(params, tokens, token_types=jnp.ones_like(tokens))
    assert cache is None and hidden.shape == (2, 10, 33)
    np.testing.assert_array_equal(hidden[..., -1], 1.0)
    table = model.unembedding(params)
    scores = hidden[..., :-1] @ params["transformer"]["embed"]["embedding"].T
    scores = scores + jnp.broadcast_to(params["masked_bias"], scores.shape)
    np.testing.assert_allclose(logits(hidden, table), scores, atol=1e-4)
    found, _ = token_log_probs(hidden, table, tokens)
    want = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, want, atol=1e-4)
    fresh = jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert fresh == jax.tree.map(jnp.shape, params)
    with pytest.raises(ValueError, match="an encoder has no cache"):
        model.init_cache(2, 10)


def test_a_generator_shares_its_embeddings_and_their_gradient():
    config, generator = network("electra_generator")
    _, discriminator = network("electra")
    both = with_embeddings_of(generator, discriminator)
    assert bert.shapes(config) == {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(both)
    }
    for name in ("embed", "position_embed", "type_embed"):
        np.testing.assert_array_equal(
            both["transformer"][name]["embedding"], discriminator["transformer"][name]["embedding"]
        )
    assert both["transformer"]["layers"] is generator["transformer"]["layers"]


def test_compute_in_bfloat16_keeps_logits_of_classes_float32():
    config = replace(TINY, transformer=replace(TINY.transformer, dtype="bfloat16"), classes=3, replaced=True)
    found = jax.eval_shape(lambda: Encoder(config).init_with_output(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[0])
    assert [found.hidden.dtype, found.masked.dtype] == [jnp.bfloat16] * 2
    assert {found.pair.dtype, found.classes.dtype, found.replaced.dtype} == {jnp.dtype("float32")}
    assert found.replaced.shape == (1, 4) and found.classes.shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: EncoderConfig(encoder(causal=True)), "causal=True"),
        (lambda: EncoderConfig(encoder(tie_embeddings=False)), "tie_embeddings=False"),
        (lambda: replace(TINY, pooled="sigmoid"), "pooled 'sigmoid'"),
        (lambda: replace(TINY, pooled=None), "read from the pooled token"),
        (lambda: replace(TINY, family="xlnet"), "family is 'xlnet'"),
        (lambda: masked_language_model(SIZES["electra_base"]), "no head for masked tokens"),
        (lambda: bert.names(replace(TINY, replaced=True)), "no published Bert has"),
        (lambda: bert.from_hugging_face({"model_type": "t5"}), "model_type is 't5'"),
        (
            lambda: bert.from_hugging_face(
                bert.to_hugging_face(TINY) | {"architectures": ["BertForTokenClassification"]}
            ),
            "architectures is",
        ),
        (lambda: bert.from_hugging_face(bert.to_hugging_face(TINY) | {"hidden_act": "swish"}), "activation is 'swish'"),
        (
            lambda: bert.from_hugging_face(bert.to_hugging_face(SIZES["albert_base"]) | {"num_hidden_groups": 2}),
            "num_hidden_groups is 2",
        ),
        (
            lambda: jax.eval_shape(
                lambda: Encoder(SIZES["roberta_base"]).init(jax.random.key(0), jnp.zeros((1, 513), jnp.int32))
            ),
            "513 tokens exceed the 512 positions",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_golden_files_are_small():
    for name in (*CASES, "gpt2", "minilm"):
        assert (Path(__file__).parents[1] / "golden" / f"{name}.npz").stat().st_size < 150_000
