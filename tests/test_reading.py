"""Messages with pictures as tokens, against the published processors (reading.npz); from a folder to a trained step."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.data.tokenizer_files import open_tokenizer
from jaxrl.nets import chameleon as nets_chameleon
from jaxrl.nets.vision import prepare, vq
from jaxrl.nets.vision.packed import PackedViTConfig
from jaxrl.nets.vision_language import SIZES, VisionLanguageConfig, image_ids, with_images
from jaxrl.nets.weights import chameleon, maps, vision_language
from jaxrl.posttrain import sft
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.pretrained import Chameleon, VisionLanguage, load_vision_language
from jaxrl.reading import batch_of, prompts_of, read, read_chameleon
from tests.nets.test_vit import published
from tests.nets.vision_cases import quick

STORED = dict(np.load(Path(__file__).parent / "golden" / "reading.npz"))
PICTURES = [STORED[f"picture{i}"] for i in range(3)]
MESSAGES = json.loads(str(STORED["qwen/messages"]))
VOCABULARY = 300
QWEN = PackedViTConfig(16, 2, 2, 32, 32, patch=2, frames=2)


def text_of(key):
    return str(STORED[key])


def tokenizer(folder, key="tokenizer", **more):
    """In a folder, with the chat template of the golden file."""
    (folder / "tokenizer.json").write_text(text_of(key), encoding="utf-8")
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": text_of("template"), **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return open_tokenizer(str(folder))


def opened(folder, kind="qwen2_vl", tower=QWEN, said=None):
    text = dataclasses.replace(SIZES["tiny"].text, vocab_size=VOCABULARY)
    config = VisionLanguageConfig(text, tower)
    how = vision_language.preparation(config, kind, said or json.loads(text_of("qwen/preprocessor")))
    words, placeholder = tokenizer(folder), vision_language.PLACEHOLDERS[kind]
    pad = "<|media_pad|>" if kind == "kimi_vl" else "<|image_pad|>"
    return VisionLanguage(config, None, words, how, words.token_id(pad), placeholder)


def test_pixels_and_tokens_of_qwen_are_those_of_its_processor(tmp_path):
    model = opened(tmp_path)
    seen = read(model, [MESSAGES], [PICTURES[:2]], add_generation_prompt=True)
    away = np.abs(seen.bank.values[0] - STORED["qwen/pixels"])
    assert (away > 1e-6).sum() <= 2 and away.max() < 1.05 / 255 / min(model.preparation.deviation)  # a tie, of 2 frames
    grids = np.asarray(seen.bank.grids[0])
    counts = STORED["qwen/grids"].prod(1)
    np.testing.assert_array_equal(grids, np.repeat(STORED["qwen/grids"], counts, axis=0))
    got = np.asarray(seen.tokens[0])
    np.testing.assert_array_equal(got[got >= VOCABULARY], np.concatenate(image_ids(model.config, seen.bank)[0]))
    np.testing.assert_array_equal(np.where(got >= VOCABULARY, model.image_token, got), STORED["qwen/ids"])
    assert not any(seen.learnt[0])


def test_what_the_assistant_wrote_is_learnt_and_rows_have_the_shapes_asked_for(tmp_path):
    model = opened(tmp_path)
    answered = [*MESSAGES, {"role": "assistant", "content": "A cat."}]
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    seen = read(model, [answered, plain], [PICTURES[:2], []], length=256)
    assert seen.bank.values.shape[:2] == (2, 256) and not seen.bank.images[1].any()
    batch = batch_of(seen, model.tokenizer, 160)
    assert batch.tokens.shape == (2, 160)
    learnt = [np.asarray(row)[np.asarray(mask) > 0] for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)]
    end = model.tokenizer.eos_id
    assert [row.tolist() for row in learnt] == [[*model.tokenizer.encode(x), end] for x in ("A cat.", "Yes.")]
    prompts = prompts_of(seen, model.tokenizer)
    assert prompts.tokens.shape == (2, len(seen.tokens[0])) and prompts.tokens[1, -1] == seen.tokens[1][-1]
    written = [{"role": "user", "content": f"One: {model.placeholder}"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "One: "}, {"type": "image"}]}]
    assert read(model, [written], [PICTURES[:1]]).tokens == read(model, [parts], [PICTURES[:1]]).tokens


KIMI = PackedViTConfig(16, 2, 2, 32, 32, patch=2, grid=(5, 5))
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("limit", "pad", "shape", "resized"),
    [
        (400, True, (32, 48), (31, 45)),  # 15 x 22 patches: filled up to multiples of 4
        (100, True, (20, 24), (17, 24)),  # scaled by sqrt(100 / 330)
        (100, False, (16, 24), (17, 24)),  # cut to multiples of 2
    ],
)
def test_pictures_of_kimi_by_its_rule(limit, pad, shape, resized):
    image = pytest.importorskip("PIL.Image")
    config = VisionLanguageConfig(SIZES["tiny"].text, KIMI)
    how = vision_language.preparation(config, "kimi_vl", HALF | {"in_token_limit": limit, "pad_input": pad})
    found = prepare.prepare_native(how, KIMI, PICTURES[1])
    want = np.asarray(image.fromarray(PICTURES[1]).resize(resized[::-1], image.Resampling.BICUBIC))
    want = want[: shape[0], : shape[1]]
    want = np.pad(want, ((0, shape[0] - len(want)), (0, shape[1] - want.shape[1]), (0, 0)))
    np.testing.assert_allclose(found, want / 127.5 - 1, atol=1e-6)


def test_tokens_of_kimi(tmp_path):
    model = opened(tmp_path, "kimi_vl", KIMI, HALF | {"in_token_limit": 100, "pad_input": True})
    seen = read(model, [[{"role": "user", "content": [{"type": "image"}]}]], [[PICTURES[1]]])
    named = np.asarray(seen.tokens[0])
    words = model.tokenizer
    start = named.tolist().index(words.token_id("<|media_start|>"))
    content = start + 1 + len("image")
    assert words.decode(named[start + 1 : content]) == "image" and named[content] == words.token_id("<|media_content|>")
    np.testing.assert_array_equal(named[content + 1 :][: 5 * 6], VOCABULARY + np.arange(5 * 6))
    assert named[content + 1 + 5 * 6] == words.token_id("<|media_end|>")


def chameleon_model(folder, how):
    config = vq.SIZES["tiny"]
    ids = tuple(range(40, 40 + config.codes))
    words = tokenizer(folder, "chameleon/tokenizer", bos_token="<s>", sep_token="<reserved08706>")
    begin, end = (words.token_id(mark) for mark in (chameleon.BEGIN, chameleon.END))
    own = nets_chameleon.Pictures(ids, begin, end, config.tokens)
    params = quick(functools.partial(vq.VQ(config).init, method="encode"))(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return Chameleon(None, None, words, None, vq.VQ(config), params["params"], own, how)  # pyright: ignore[reportArgumentType]


def test_pixels_and_tokens_of_chameleon_are_those_of_its_processor(tmp_path):
    how = chameleon.preparation(json.loads(text_of("chameleon/preprocessor")))
    pixels = np.stack([prepare.prepare(how, picture) for picture in PICTURES[1:]])
    np.testing.assert_allclose(pixels, STORED["chameleon/pixels"].transpose(0, 2, 3, 1), atol=1e-6)
    model = chameleon_model(tmp_path, how)
    (row,) = read_chameleon(model, [text_of("chameleon/text")], [PICTURES[1:]])
    want, words = STORED["chameleon/ids"], model.tokenizer
    places = want == words.token_id("<image>")
    np.testing.assert_array_equal(np.asarray(row)[~places], want[~places])
    encode = quick(lambda params, x: model.vq.apply({"params": params}, x, method="encode").ids)
    codes = encode(model.vq_params, jnp.asarray(pixels))
    np.testing.assert_array_equal(np.asarray(row)[places], 40 + np.asarray(codes).reshape(-1))
    (text,) = read_chameleon(model, ["What"], [[]], chat=False)
    assert text == [words.bos_id, *words.encode("What")]


def test_what_does_not_fit_is_refused(tmp_path):
    model = opened(tmp_path)
    with pytest.raises(ValueError, match="conversation 0 names 2 pictures, and 1 are given"):
        read(model, [MESSAGES], [PICTURES[:1]])
    with pytest.raises(ValueError, match="float32, expected uint8"):
        read(model, [MESSAGES], [[np.zeros((8, 8, 3), np.float32)] * 2])
    with pytest.raises(ValueError, match="holds .*'video'.*expected"):
        read(model, [[{"role": "user", "content": [{"type": "video"}]}]], [[]])
    with pytest.raises(ValueError, match="204 patches, expected at most length = 100"):
        read(model, [MESSAGES], [PICTURES[:2]], length=100)
    with pytest.raises(ValueError, match="has no preprocessor_config.json"):
        read(model._replace(preparation=None), [MESSAGES], [PICTURES[:2]])
    with pytest.raises(ValueError, match="does not say how large pictures become"):
        read(model._replace(preparation=model.preparation._replace(area=None)), [MESSAGES], [PICTURES[:2]])
    with pytest.raises(ValueError, match="patch_size is 14, but the network's 2"):
        vision_language.preparation(model.config, "qwen2_vl", {"patch_size": 14})
    for shape, message in (((8, 8), "np.repeat"), ((8, 8, 4), "leave out the transparency"), ((8, 0, 3), "expected")):
        with pytest.raises(ValueError, match=message):
            read(model, [MESSAGES], [[PICTURES[0], np.zeros(shape, np.uint8)]])


def test_limits_are_read_as_the_published_files_write_them(tmp_path):
    config = opened(tmp_path).config
    of = lambda **said: vision_language.preparation(config, "qwen2_vl", said)
    assert of().area == (3136, 1003520) and of().method == "cubic" and of().mean == vision_language.CLIP["image_mean"]
    assert of(min_pixels=10, max_pixels=99).area == of(size={"shortest_edge": 10, "longest_edge": 99}).area == (10, 99)
    later = vision_language.preparation(config, "kimi_k25", {"media_proc_cfg": {"image_std": [0.25] * 3}})
    assert (later.mean, later.deviation, later.area, later.patches) == ((0.5,) * 3, (0.25,) * 3, None, None)
    with pytest.raises(ValueError, match="resized and cropped to one square"):
        chameleon.preparation({"size": {"shortest_edge": 256}})
    assert chameleon.preparation({}).scale == 0.0078


CONFIG = {
    "model_type": "qwen2_5_vl", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "vision_config": {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                      "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 8,
                      "fullatt_block_indexes": [1], "tokens_per_second": 2},
}  # fmt: skip


def test_from_a_folder_to_an_answer_and_a_step_of_tuning(tmp_path):
    config, words = vision_language.from_hugging_face(CONFIG), tokenizer(tmp_path)
    draw = np.random.default_rng(0)
    shapes = vision_language.shapes(config).items()
    params = maps.nested({path: draw.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes})
    said = CONFIG | {"image_token_id": words.token_id("<|image_pad|>")}
    how = json.loads(text_of("qwen/preprocessor"))
    published(tmp_path, said, vision_language.to_checkpoint(config, params), preprocessor_config=how)
    model = load_vision_language(tmp_path)

    asked = read(model, [MESSAGES], [PICTURES[:2]], add_generation_prompt=True)
    answered = read(model, [[*MESSAGES, {"role": "assistant", "content": "Two."}]], [PICTURES[:2]])
    np.testing.assert_array_equal(asked.bank.values, answered.bank.values)
    recipe = lambda bank: sft.make(sft.SFTConfig(batch=1), with_images(model.config, bank), optax.sgd(0.1))
    sampling = Sampling(max_tokens=3, temperature=0.0)

    @quick
    def answer(params, bank, prompts):
        return rollout(
            with_images(model.config, bank), params, prompts, jax.random.key(0), sampling=sampling,
            eos_id=words.eos_id, pad_id=words.pad_id,
        )  # fmt: skip

    out = answer(model.params, asked.bank, prompts_of(asked, words))
    assert out.lengths[0] == 3 and (out.completions < VOCABULARY).all() and jnp.isfinite(out.log_probs).all()
    other = asked.bank._replace(values=-asked.bank.values)
    assert jnp.abs(answer(model.params, other, prompts_of(asked, words)).log_probs - out.log_probs).max() > 1e-5
    step = quick(lambda state, bank, batch: recipe(bank).step(state, batch))
    state = recipe(answered.bank).init(jax.random.key(0), model.params)
    losses = []
    for _ in range(2):
        state, metrics = step(state, answered.bank, batch_of(answered, words))
        losses.append(float(metrics["train/loss"]))
    assert losses[1] < losses[0]
