"""Folders as Hugging Face has them, of every architecture that is no plain decoder, through the door that opens it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl.data import CharTokenizer
from jaxrl.data.tokenizer_files import save_tokenizer
from jaxrl.embed import load_encoder
from jaxrl.nets.vision import prepare, sam, vq
from jaxrl.nets.weights import (
    bert,
    chameleon,
    from_hugging_face,
    read_safetensors,
    vision_language,
    write_safetensors,
)
from jaxrl.nets.weights import sam as sam_weights
from jaxrl.pretrained import load_chameleon, load_pretrained, load_vision_language, save_pretrained
from jaxrl.segment import DEVIATION, MEAN, load_sam
from tests.golden.drawn import drawn
from tests.nets import test_chameleon, test_golden, test_sam
from tests.nets.test_vit import published, said
from tests.nets.vision_cases import GOLDEN, close, golden, random_params


def write_folder(folder, config, tensors):
    """As transformers writes it, with a tokenizer of 13 tokens."""
    save_tokenizer(CharTokenizer("0123456789"), folder)
    return published(folder, config, tensors)


def test_a_folder_of_minimax_opens_and_is_written_again(tmp_path):
    with np.load(GOLDEN / "minimax_odd.npz") as arrays:
        tensors = {k.removeprefix("weight/"): arrays[k] for k in arrays if k.startswith("weight/")}
    config, params, stored = test_golden.load("minimax_odd", "plain")
    assert any(name.endswith("diagonal_decay") for name in tensors)
    model = load_pretrained(write_folder(tmp_path, json.loads(str(stored["config"])), tensors), max_length=64)
    assert model.transformer == config and (config.residual, config.linear_layers) == (1.0, (0, 2))
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    save_pretrained(model, tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert again.transformer == config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_a_folder_of_minimax_as_published_turns_a_part_of_its_heads(tmp_path):
    with np.load(GOLDEN / "minimax_odd.npz") as arrays:
        tensors = {k.removeprefix("weight/"): arrays[k] for k in arrays if k.startswith("weight/")}
    config, params, stored = test_golden.load("minimax_odd", "plain")
    folder = write_folder(tmp_path, json.loads(str(stored["config"])) | {"rotary_dim": 4}, tensors)
    assert load_pretrained(folder, max_length=64, rotary_dim=None).transformer == config
    save_pretrained(load_pretrained(folder, max_length=64), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rotary_dim"] == 4
    again = load_pretrained(tmp_path / "again")
    assert again.transformer == dataclasses.replace(config, rotary_dim=4)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_a_folder_of_an_encoder(tmp_path):
    """Beside the weights lies a table of integers, as in older files."""
    case = golden("bert")[1]["bert"]
    config = json.loads(str(case["config"]))
    tensors = {name.removeprefix("weight/"): x for name, x in case.items() if name.startswith("weight/")}
    write_folder(tmp_path, config, tensors)
    save_file(tensors | {"bert.embeddings.position_ids": np.arange(8)[None]}, tmp_path / "model.safetensors")
    names = {"cls_token": "<bos>", "sep_token": "<eos>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    opened = load_encoder(tmp_path)
    want = bert.from_hugging_face(config)
    assert opened.model.config == want and opened.tokenizer.encode("12") and opened.tokenizer.bos_id is not None
    jax.tree.map(np.testing.assert_array_equal, opened.params, bert.from_checkpoint(want, tensors))
    with pytest.raises(ValueError, match="model_type is 'bert': open it with jaxrl.embed.load_encoder"):
        load_pretrained(tmp_path)


def test_a_folder_of_segment_anything(tmp_path):
    _, params, checkpoint = test_sam.golden()
    share = lambda values: [value / 255 for value in values]
    how = {"size": {"longest_edge": 16}, "image_mean": share(MEAN), "image_std": share(DEVIATION)}
    published(tmp_path, said("sam_tiny"), checkpoint, preprocessor_config=how)
    opened = load_sam(tmp_path)
    assert opened.config == sam.SIZES["tiny"]
    jax.tree.map(np.testing.assert_array_equal, opened.params, params)
    published(tmp_path, said("sam_tiny"), checkpoint, preprocessor_config=how | {"image_mean": share(MEAN[::-1])})
    with pytest.raises(ValueError, match="normalises pictures by .* expected those of ImageNet"):
        load_sam(tmp_path)
    del (lacking := dict(checkpoint))["mask_decoder.iou_token.weight"]
    with pytest.raises(ValueError, match="missing mask_decoder.iou_token.weight"):
        sam_weights.from_checkpoint(opened.config, lacking)


def test_published_configs_of_segment_anything():
    published = said("sam_vit_b")
    assert sam_weights.from_hugging_face(published) == sam.SIZES["vit_b"]
    assert sam_weights.from_hugging_face({"model_type": "sam"}) == sam.SIZES["vit_b"]
    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    }
    assert sam_weights.from_hugging_face({"model_type": "sam", "vision_config": large}) == sam.SIZES["vit_l"]
    for part, change, message in (
        ("vision", {"use_rel_pos": False}, "vision_config.use_rel_pos is False, expected True"),
        ("vision", {"global_attn_indexes": [2, 5, 8]}, "global_attn_indexes is .2, 5, 8., expected .2, 5, 8, 11."),
        (
            "prompt_encoder",
            {"image_size": 512, "hidden_size": 8},
            "image_size is 512, .*hidden_size is 8, expected 256",
        ),
        ("mask_decoder", {"hidden_act": "gelu"}, "mask_decoder_config.hidden_act is 'gelu', expected 'relu'"),
    ):
        wrong = published | {f"{part}_config": published[f"{part}_config"] | change}
        with pytest.raises(ValueError, match=message):
            sam_weights.from_hugging_face(wrong)
    with pytest.raises(ValueError, match="model_type is 'sam2', expected 'sam'"):
        sam_weights.from_hugging_face({"model_type": "sam2"})


def test_a_folder_of_a_vision_language_network(tmp_path):
    tensors, cases = golden("qwen2_vl")
    config = json.loads(str(cases["images"]["config"]))
    how = {"min_pixels": 3136, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(how))
    opened = load_vision_language(write_folder(tmp_path, config, tensors))
    want = vision_language.from_hugging_face(config)
    assert opened.config == want and opened.image_token == config["image_token_id"]
    area = (3136, 28 * 28 * 1280)
    assert opened.preparation == prepare.Preparation(None, (0.5,) * 3, (0.25,) * 3, "cubic", area=area)
    assert opened.placeholder == "<|vision_start|><|image_pad|><|vision_end|>"
    jax.tree.map(np.testing.assert_array_equal, opened.params, vision_language.from_checkpoint(want, tensors))


def chameleon_folder(folder, **changes):
    """(config.json, checkpoint) of the tiny Chameleon, in a folder."""
    with np.load(test_chameleon.GOLDEN) as arrays:
        config = json.loads(str(arrays["pre/config"]))
    config["vocabulary_map"] |= {"<racm3:break>": 4, "<eoss>": 5} | changes
    checkpoint = test_chameleon.checkpoint(from_hugging_face(config))
    write_folder(folder, config, checkpoint)
    return config, checkpoint


def test_a_folder_of_chameleon_and_the_tokeniser_of_the_paper(tmp_path):
    config, checkpoint = chameleon_folder(tmp_path)
    text, encoder = chameleon.from_checkpoint(from_hugging_face(config), vq.SIZES["tiny"], checkpoint)
    opened = load_chameleon(tmp_path)
    assert opened.vq.config == vq.SIZES["tiny"] and opened.pictures.ids == tuple(range(8, 24))
    assert (opened.pictures.begin, opened.pictures.end, opened.pictures.tokens) == (4, 5, 64)
    jax.tree.map(np.testing.assert_array_equal, (opened.params, opened.vq_params), (text, encoder))
    with pytest.raises(ValueError, match="model_type is 'chameleon': open it with jaxrl.pretrained.load_chameleon"):
        load_pretrained(tmp_path)

    whole = random_params(vq.VQ(vq.SIZES["tiny"]), jnp.zeros((1, 16, 16, 3)))
    tensors = chameleon.vq_to_checkpoint(vq.SIZES["tiny"], whole)
    write_safetensors(tmp_path / "vqgan", tensors | {"loss.discriminator.weight": np.zeros(2)})
    both = load_chameleon(tmp_path, vqgan=tmp_path / "vqgan" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, (both.params, both.vq_params), (text, whole))


def test_a_chameleon_without_names_for_its_pictures_is_refused(tmp_path):
    config, _ = chameleon_folder(tmp_path)
    with pytest.raises(ValueError, match="vq_config.double_latent is True, expected False"):
        chameleon.from_hugging_face(config | {"vq_config": config["vq_config"] | {"double_latent": True}})
    del config["vocabulary_map"]["<eoss>"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: vocabulary_map has no <eoss>, which stand around a picture"):
        load_chameleon(tmp_path)


def test_pictures_are_put_together_again_as_by_torch():
    """Both sides of a VQ-GAN under the names of taming-transformers, and a map that is all of them."""
    with np.load(GOLDEN / "vqgan.npz") as arrays:
        stored = dict(arrays)
    shapes = {name: tuple(shape) for name, shape in json.loads(str(stored["names"])).items()}
    config = vq.VQConfig(codes=12, width=6, latent=4, size=16, channels=32, multipliers=(1, 2, 1), blocks=1)
    tensors = drawn(shapes, 8)
    params = jax.tree.map(jnp.asarray, chameleon.vq_from_checkpoint(config, tensors))
    again = chameleon.vq_to_checkpoint(config, params)
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    module, last = vq.VQ(config), lambda x: np.moveaxis(x, 1, -1)
    run = jax.jit(lambda method, *args: module.apply({"params": params}, *args, method=method), static_argnums=0)
    np.testing.assert_array_equal(run("encode", last(stored["pictures"])).ids, stored["ids"])
    close(run("decode", stored["ids"]), last(stored["again"]))
    close(run("decode", stored["other"]), last(stored["made"]))
    del tensors["decoder.up.1.upsample.conv.bias"]
    with pytest.raises(ValueError, match=r"missing decoder.up.1.upsample.conv.bias, expected \(64,\)"):
        chameleon.vq_from_checkpoint(config, tensors)


def test_tables_of_integers_may_be_left_out_where_they_are_read(tmp_path):
    save_file({"weight": np.ones(2, np.float32), "a.table": np.zeros(3, np.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a.table in model.safetensors is I64"):
        read_safetensors(tmp_path)
    assert read_safetensors(tmp_path, ignored=("table",)).keys() == {"weight"}
    index = {"weight_map": dict.fromkeys(("weight", "lost", "b.table"), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        read_safetensors(tmp_path, ignored=("table",))
    assert "lost is not in" in str(error.value) and "b.table" not in str(error.value)
