"""Vision-language networks against torch, through the values that tests/golden/make_vision_language.py stored."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.nets.language_model import logits
from jaxrl.nets.vision import packed
from jaxrl.nets.vision.layers import bicubic
from jaxrl.nets.vision.packed import PackedViT, PackedViTConfig, Patches, pack, patchify, smart_resize
from jaxrl.nets.vision_language import (
    SIZES,
    VisionLanguageConfig,
    features,
    image_ids,
    mrope_positions,
    with_images,
)
from jaxrl.nets.weights import vision_language as weights
from jaxrl.posttrain import grpo, preference, sft
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.posttrain.score import log_probs_of
from jaxrl.types import Pairs, Prompts, TokenBatch
from tests.nets.vision_cases import close, golden, gradients_close, quick, random_params

TINY = SIZES["tiny"]
IMAGE = 38  # the placeholder of the golden files
GIVEN = {"qwen2_vl": ("images", "video"), "qwen25_vl": ("large", "timed"), "kimi_vl": ("images",)}
CASES = [(file, name) for file, names in GIVEN.items() for name in names]
COUNTS = {  # of transformers' classes
    "qwen2_vl_2b": 2_208_985_600,
    "qwen2_vl_7b": 8_291_375_616,
    "qwen2_vl_72b": 73_405_560_320,
    "qwen25_vl_3b": 3_754_622_976,
    "qwen25_vl_7b": 8_292_166_656,
}
MOONVIT = 447_545_840  # tower and projector


def places_of(grid, merge=2):
    """Places of an image's patches in merged order, written out."""
    frames, height, width = grid
    block = [(r, c) for r in range(merge) for c in range(merge)]
    blocks = [(r, c) for r in range(height // merge) for c in range(width // merge)]
    return [(t, R * merge + r, C * merge + c) for t in range(frames) for R, C in blocks for r, c in block]


def bank_of(config, case):
    """The images of a case as `Patches`, a row for each row of tokens."""
    rows, at = {}, 0
    times = case.get("seconds", np.ones(len(case["grids"]), np.float32))
    for row, grid, seconds in zip(case["rows"], case["grids"], times, strict=True):
        count = int(np.prod(grid))
        values, places = case["pixels"][at : at + count], np.array(places_of(grid, config.vision.merge))
        if config.vision.grid:  # stored row by row
            values = values[places[:, 1] * grid[2] + places[:, 2]]
        rows.setdefault(int(row), []).append((values, places, np.tile(grid, (count, 1)), np.full(count, seconds)))
        at += count
    longest = max(sum(len(values) for values, *_ in row) for row in rows.values())

    def padded(parts):
        parts = np.concatenate(parts)
        return np.pad(parts, [(0, longest - len(parts)), *[(0, 0)] * (parts.ndim - 1)])

    def each_of(row):
        values, places, grids, seconds = (padded(parts) for parts in zip(*row, strict=True))
        numbers = padded([np.full(len(image[0]), number) for number, image in enumerate(row, 1)])
        return values, places, grids, numbers, seconds

    each = [each_of(row) for row in rows.values()]
    return Patches(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*each, strict=True)))


@functools.cache
def torch_case(file, name):
    """(config, params, arrays, bank, ids)."""
    tensors, cases = golden(file)
    case = cases[name]
    config = weights.from_hugging_face(json.loads(str(case["config"])))
    params = jax.tree.map(jnp.asarray, weights.from_checkpoint(config, tensors))
    bank = bank_of(config, case)
    ids = case["ids"].copy()
    ids[ids == IMAGE] = np.concatenate([i for row in image_ids(config, bank) for i in row])
    return config, params, case, bank, jnp.asarray(ids)


@pytest.mark.parametrize(("file", "name"), CASES)
def test_features_and_logits_equal_those_of_torch(file, name):
    config, params, case, bank, ids = torch_case(file, name)
    model = with_images(config, bank, per_row=1 if name == "images" else None)

    @quick
    def run(params):
        hidden, _ = model.apply(params, ids)
        found = PackedViT(config.vision).apply({"params": params["vision"]}, bank)
        return found, logits(hidden, model.unembedding(params))

    found, scores = run(params)
    real = np.asarray(bank.images)[:, :: config.vision.merge**2] > 0
    close(np.asarray(found)[real], case["features"])
    close(scores, case["logits"])


@pytest.mark.parametrize(("file", "name"), [pair for pair in CASES if pair[0] != "kimi_vl"])
def test_positions_equal_those_of_torch(file, name):
    config, _, case, bank, ids = torch_case(file, name)
    of = functools.partial(mrope_positions, ids, features(config, bank), vocab_size=40)
    np.testing.assert_array_equal(of(), case["positions"])
    assert (case["positions"][1] != case["positions"][2]).any()
    ending = of(from_end=True)
    shift = np.asarray(ending - case["positions"])
    assert (shift == shift[:1, :, :1]).all() and (ending[:, :, -1] == ids.shape[1] - 1).all()


@pytest.mark.parametrize(("file", "name"), [("qwen2_vl", "images"), ("qwen25_vl", "large"), ("kimi_vl", "images")])
def test_loss_and_gradients_equal_those_of_torch(file, name):
    config, params, case, bank, ids = torch_case(file, name)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, remat=file == "qwen2_vl"))
    model = with_images(config, bank)
    batch = TokenBatch(ids, (ids < 40).astype(jnp.float32))

    def loss(params):
        value, _ = sft.loss(model, params, batch)
        return value.total / value.weight

    value, gradient = quick(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    ours = {k: v for k, v in weights.to_checkpoint(config, gradient).items() if "correction_bias" not in k}
    gradients_close(ours, published({k.removeprefix("grad/"): v for k, v in case.items() if k.startswith("grad/")}))


def published(tensors):
    """Under the names of `to_checkpoint`."""
    named = {}
    for name, value in tensors.items():
        found = next((k for k in weights.RENAMED if name.startswith(k)), None)
        named[name if found is None else weights.RENAMED[found] + name.removeprefix(found)] = value
    return named


@pytest.mark.parametrize(("file", "name"), [CASES[0], CASES[2], CASES[4]])
def test_checkpoint_round_trip_is_exact(file, name):
    config, params, *_ = torch_case(file, name)
    tensors, _ = golden(file)
    again = weights.to_checkpoint(config, params)
    named = published(tensors)
    assert again.keys() == named.keys()
    for name, value in named.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_as_many_parameters_as_published(name):
    assert sum(np.prod(shape, dtype=int) for shape in weights.shapes(SIZES[name]).values()) == COUNTS[name]


def test_moonvit_has_as_many_parameters_as_published():
    found = weights.shapes(SIZES["kimi_vl_a3b"])
    tower = {path: shape for path, shape in found.items() if path.startswith("vision/")}
    assert sum(np.prod(shape, dtype=int) for shape in tower.values()) == MOONVIT


def test_published_config_files_are_read():
    """Flat, as Qwen wrote them, and Kimi's."""
    flat = {
        "model_type": "qwen2_vl", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": False,
        "sliding_window": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                          "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }  # fmt: skip
    assert weights.from_hugging_face(flat) == SIZES["qwen2_vl_2b"]
    assert weights.from_hugging_face(flat, dtype="bfloat16").text.dtype == "bfloat16"
    timed = flat | {"model_type": "qwen2_5_vl", "vision_config": {"tokens_per_second": 2, "patch_size": 14}}
    assert weights.from_hugging_face(timed).tokens_per_second == SIZES["qwen25_vl_3b"].tokens_per_second == 2
    with pytest.raises(ValueError, match="model_type is 'llava'"):
        weights.from_hugging_face({"model_type": "llava"})


def images_of(seed, *sizes):
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return [jax.random.normal(key, (height, width, 3)) for key, (height, width) in zip(keys, sizes, strict=True)]


def rows_of(config, images, length):
    packed = [pack(config, [image], length) for image in images]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *packed)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 16, "full_layers": (1,)},
        {"grid": (5, 3), "rope": "alternating", "final_norm": True},
        {"merge": 1, "frames": 2, "patch_bias": True, "norm": "rms", "gated": True, "activation": "silu"},
    ],
    ids=["plain", "windows", "grid", "other"],
)
def test_packed_images_are_as_if_each_were_alone(options):
    """On mixed sizes, with padding whose values are noise, in any order: features to 1e-5."""
    config = dataclasses.replace(TINY.vision, **options)
    images = images_of(0, (16, 24), (8, 8), (40, 8), (24, 32))
    sizes = [image.shape[0] * image.shape[1] // config.side**2 for image in images]
    params = random_params(PackedViT(config), pack(config, images))
    length = 160
    together = pack(config, images, length)
    noise = jnp.where((together.images == 0)[..., None], 7.0, together.values)
    rows = (rows_of(config, images, length), together._replace(values=noise), pack(config, images[::-1], length))
    rows = jax.tree.map(lambda *rows: jnp.concatenate(rows), *rows)
    *alone, whole, backwards = np.asarray(quick(PackedViT(config).apply)({"params": params}, rows))
    at = 0
    for row, size in zip(alone, sizes, strict=True):
        close(whole[at : at + size], row[:size])
        at += size
    close(backwards[: sizes[-1]], alone[-1][: sizes[-1]])


def test_patches_lie_as_written_out():
    config = dataclasses.replace(TINY.vision, frames=2)
    video = jax.random.normal(jax.random.key(0), (4, 16, 24, 3))
    values, places = patchify(config, video)
    np.testing.assert_array_equal(places, places_of((2, 4, 6)))
    for value, (t, r, c) in zip(values, places, strict=True):
        part = video[2 * t : 2 * t + 2, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        np.testing.assert_array_equal(value, part.transpose(3, 0, 1, 2).reshape(-1))
    image = patchify(config, video[0])[0]
    np.testing.assert_array_equal(image, patchify(config, jnp.stack([video[0], video[0]]))[0])


def test_learned_positions_are_resampled_as_one_image_would_be():
    config = dataclasses.replace(TINY.vision, grid=(5, 3))
    table = jax.random.normal(jax.random.key(0), (5, 3, 8))
    patches = pack(config, images_of(0, (16, 24), (40, 16)))
    found = quick(packed.resampled)(table, patches)[0]
    rows, columns = patches.places[0, :, 1], patches.places[0, :, 2]
    close(found[:24], quick(bicubic, static_argnums=1)(table, (4, 6))[rows[:24], columns[:24]])
    close(found[24:], quick(bicubic, static_argnums=1)(table, (10, 4))[rows[24:], columns[24:]])


def test_a_change_outside_the_window_is_not_seen_before_a_full_layer():
    config = dataclasses.replace(TINY.vision, layers=1, window=8)
    image = images_of(0, (16, 16))[0]
    params = random_params(PackedViT(config), pack(config, [image]))
    both = rows_of(config, [image, image.at[0, 0].add(1.0)], 16)
    change = lambda config: np.abs(np.subtract(*quick(PackedViT(config).apply)({"params": params}, both))).max(-1)
    near, far = change(config), change(dataclasses.replace(config, full_layers=(0,)))
    assert near[0] > 1e-3 and (near[1:] == 0).all() and (far > 1e-6).all()


def test_sizes_of_resized_images():
    assert smart_resize(1080, 1920) == (728, 1316)
    assert smart_resize(28, 28) == (56, 56)
    assert smart_resize(5, 627) == (28, 644)
    assert smart_resize(4000, 3000) == (1148, 840)
    assert smart_resize(300, 410) == (308, 420)
    with pytest.raises(ValueError, match="too long"):
        smart_resize(1, 300)


ROWS = pack(TINY.vision, images_of(1, (16, 24)), 32), pack(TINY.vision, images_of(2, (8, 8), (16, 16)), 32)
BANK = Patches(*(jnp.concatenate(arrays) for arrays in zip(*ROWS, strict=True)))
MODEL = with_images(TINY, BANK)
(FIRST,), (SMALL, SQUARE) = image_ids(TINY, BANK)


@pytest.fixture(scope="module")
def params():
    return quick(MODEL.init)(jax.random.key(0))


def test_packed_rows_are_as_if_each_example_were_alone(params):
    """Three images in the two examples of a row."""
    one, two = [3, *FIRST, 4, 5], [6, *SMALL, 7, *SQUARE, 8, 9]
    width, n = len(one) + len(two), len(one) - 1
    rows = [one + two, one + [0] * len(two), two + [0] * len(one)]
    segments = [[1] * len(one) + [2] * len(two), [1] * width, [1] * width]
    batch = TokenBatch(jnp.asarray(rows), jnp.ones((3, width)), jnp.asarray(segments))
    model = with_images(TINY, BANK, per_row=2)
    whole, first, second = quick(lambda params: log_probs_of(model, params, batch)[0])(params)
    words = np.asarray(rows[0][1:]) < 64
    np.testing.assert_allclose(whole[:n], first[:n], atol=1e-5)
    np.testing.assert_allclose(whole[n + 1 :], second[: len(two) - 1], atol=1e-5)
    assert (whole[~words] == 0).all() and (whole[words] < 0).all()
    lonely = quick(MODEL.apply)(params, batch.tokens[:1])[0]
    assert jnp.isnan(lonely[0, -1]).all()  # a second row of the bank, which per_row=1 has no place for


@pytest.mark.parametrize("per_row", [1, None])
def test_a_feature_past_the_bank_is_nan(params, per_row):
    model = with_images(TINY, BANK, per_row=per_row)
    last = 64 + 2 * 8 - 1
    ids = jnp.asarray([[3, last, 4], [3, last + 1, 4], [3, last + 100, 4]])
    hidden, _ = quick(model.apply)(params, ids)
    np.testing.assert_array_equal(jnp.isnan(hidden[:, 1:]).all((1, 2)), [False, True, True])
    assert not jnp.isnan(hidden[0]).any()


def counted(example, *, from_end):
    """Positions [3, n] of one example, word by word and feature by feature."""
    of = {}
    for ids, width in ((FIRST, 3), (SMALL, 1), (SQUARE, 2)):
        of |= {int(i): divmod(n, width) for n, i in enumerate(ids)}
    found, start, largest = [], 0, -1
    for token in map(int, example):
        if token not in of:
            found.append((largest + 1,) * 3)
        else:
            start = largest + 1 if of[token] == (0, 0) else start
            found.append((start, start + of[token][0], start + of[token][1]))
        ends = token in of and of.get(token + 1, (0, 0)) == (0, 0)
        largest = max(max(x) for x in found) if ends or token not in of else largest
    return np.array(found).T + (len(example) - 1 - largest) * from_end


@pytest.mark.parametrize("from_end", [False, True])
def test_positions_of_packed_and_padded_rows_are_as_counted(from_end):
    """Examples begin anew, wherever in the row they stand; padding on the left is 0."""
    examples = [3, *FIRST, 4, 5], [6, *SMALL, 7, *SQUARE, 8, 9], [3, 4, *SQUARE, 5]
    row = jnp.asarray([[0, 0, *examples[0], *examples[1], *examples[2]]])
    plain = jnp.asarray([[0, 0, *(i for example in examples for i in range(len(example)))]])
    of = features(TINY, BANK)
    got = np.asarray(mrope_positions(row, of, vocab_size=64, positions=plain, from_end=from_end))[:, 0]
    want = [counted(example, from_end=from_end) for example in examples]
    np.testing.assert_array_equal(got, np.concatenate([np.zeros((3, 2), int), *want], axis=1))


@pytest.mark.parametrize(
    ("seconds", "frames", "following"),
    [
        ([3.0, 1.0], [0, 2, 4], 5),  # text goes on after the last frame
        ([3.0, 0.4], [0, 0, 1], 2),  # 0, 0.8 and 1.6: here after the last row
        (None, [0, 2, 4], 5),
    ],
)
def test_frames_stand_at_their_times(seconds, frames, following):
    """Two words, an image of 1 x 1, a video of three frames of 2 x 1, two words."""
    config = dataclasses.replace(TINY, tokens_per_second=2)
    video = jnp.zeros((3, 16, 8, 3))
    bank = pack(config.vision, [jnp.zeros((8, 8, 3)), video], seconds=seconds)
    ((image, film),) = image_ids(config, bank)
    ids = jnp.asarray([[3, 4, *image, *film, 5, 6]])
    found = np.asarray(mrope_positions(ids, features(config, bank), vocab_size=64))[:, 0]
    assert found[0].tolist() == [0, 1, 2, *(3 + t for t in frames for _ in range(2)), 3 + following, 4 + following]
    assert found[1].tolist() == [0, 1, 2, *[3, 4] * 3, 3 + following, 4 + following]
    assert found[2].tolist() == [0, 1, 2, *[3] * 6, 3 + following, 4 + following]


PROMPTS = Prompts(jnp.asarray([[0, 3, *FIRST, 4], [3, *SMALL, 5, *SQUARE, 4, 6]]), jnp.asarray([8, 9]))


def moved(old, new, *path):
    """How far a parameter went."""
    for name in path:
        old, new = old[name], new[name]
    return float(jnp.abs(new - old).max())


TOKENS = jnp.asarray([[3, *FIRST, 4, 10, 1], [3, *SMALL, 5, *SQUARE, 4, 11, 1][-10:]])
LEARNT = TokenBatch(TOKENS, jnp.zeros(TOKENS.shape).at[:, -2:].set(1.0))


def test_sft_learns_from_images(params):
    """The loop as it is: the loss falls, and the tower learns with the decoder."""
    recipe = sft.make(sft.SFTConfig(batch=2), MODEL, optax.adam(3e-3))
    state, losses = quick(recipe.init)(jax.random.key(0), params), []
    step = quick(recipe.step)
    for _ in range(5):
        state, metrics = step(state, LEARNT)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert moved(params, state.params, "vision", "patches", "kernel") > 1e-3


def traced(run):
    """(`run`, compiled; a list that grows with every tracing)."""
    traces = []

    def counting(*args):
        traces.append(len(args))
        return run(*args)

    return quick(counting), traces


OTHERS = BANK._replace(values=-BANK.values)


def test_another_bank_of_the_same_shape_takes_no_other_program(params):
    """A bank as an argument gives what a model closed over it gives: sampling, and a step of tuning."""
    sampling = Sampling(max_tokens=3, temperature=0.0)
    draw = lambda model, params: (
        rollout(model, params, PROMPTS, jax.random.key(0), sampling=sampling, eos_id=1, pad_id=0).log_probs
    )
    recipe = lambda model: sft.make(sft.SFTConfig(batch=2), model, optax.sgd(0.1))

    def both(state, bank):
        model = with_images(TINY, bank)
        after, metrics = recipe(model).step(state, LEARNT)
        return draw(model, state.params), metrics["train/loss"], after.params["vision"]["merger"]["down"]["kernel"]

    state = recipe(MODEL).init(jax.random.key(0), params)
    run, traces = traced(both)
    first, second = run(state, BANK), run(state, OTHERS)
    assert len(traces) == 1
    assert all(jnp.abs(x - y).max() > 1e-5 for x, y in zip(first, second, strict=True))
    closed = quick(functools.partial(draw, with_images(TINY, OTHERS)))(params)
    np.testing.assert_allclose(second[0], closed, atol=1e-6)


@pytest.mark.slow
def test_dpo_learns_from_images(params):
    make = lambda bank: preference.make(
        preference.DPOConfig(variant="simpo", batch=2), with_images(TINY, bank), optax.sgd(0.1)
    )
    pairs = preference.Referenced(Pairs(LEARNT, TokenBatch(TOKENS.at[:, 8].add(1), LEARNT.loss_mask)))
    step, traces = traced(lambda state, bank, pairs: make(bank).step(state, pairs))
    state, metrics = step(make(BANK).init(jax.random.key(0), params), BANK, pairs)
    assert jnp.isfinite(metrics["train/loss"])
    assert moved(params, state.params, "vision", "merger", "down", "kernel") > 0
    step(state, OTHERS, pairs)
    assert len(traces) == 1


def test_grpo_learns_from_images(params):
    """The prompt's images are seen from a cache as in the trainer's one pass, though text is counted from the end."""
    config = grpo.GRPOConfig(prompts=2, group=4, kl_coef=0.0, sampling=Sampling(max_tokens=4))
    run = grpo.make(config, MODEL, optax.sgd(0.1), eos_id=1, pad_id=0)
    reward = lambda completions, answers: (completions.completions[:, 0] % 2 == 0) + 0.0 * answers
    one = quick(grpo.fused(run, reward, config))
    after, metrics = one(run.init(jax.random.key(1), params), grpo.Problems(PROMPTS, jnp.zeros(2)))
    assert metrics["sampler/log_prob_gap"] < 1e-5 and metrics["train/grad_norm"] > 0
    assert moved(params, after.params, "vision", "merger", "down", "kernel") > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "not a multiple of 4 x heads 3"),
        ({"rope": "both"}, "rope is 'both'"),
        ({"window": 12}, "window 12 is not a multiple of patch x merge = 8"),
        ({"full_layers": (2,)}, "outside 0..1"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY.vision, **options)


def test_bad_inputs_are_refused():
    config = TINY.vision
    with pytest.raises(ValueError, match="multiple of 1 frames.*= 8 pixels"):
        patchify(config, jnp.zeros((16, 12, 3)))
    with pytest.raises(ValueError, match="expected floats"):
        patchify(config, jnp.zeros((16, 16, 3), jnp.uint8))
    for images, message in (
        ([], "no images to pack"),
        ([jnp.zeros((0, 8, 3))], "is 1 x 0 x 8, expected"),
        ([[jnp.zeros((8, 8, 3))]], "an image is a list, expected an array"),
        ([jnp.zeros((8, 8))], r"repeat the grey: np.repeat\(image\[..., None\], 3"),
        ([jnp.zeros((8, 8, 1))], r"repeat the grey: np.repeat\(image, 3"),
        ([jnp.zeros((8, 8, 4))], r"leave out the transparency, image\[..., :3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(config, images)  # pyright: ignore[reportArgumentType]
    for sides in ((0, 5), (0, 0), (5, 0)):
        with pytest.raises(ValueError, match="has no pixels"):
            smart_resize(*sides)
    with pytest.raises(ValueError, match="length is 8, expected a multiple of merge.2 = 4, at least the 16 patches"):
        pack(config, [jnp.zeros((16, 16, 3))], 8)
    with pytest.raises(ValueError, match=r"expected \[B, N, 48\]"):
        PackedViT(config).init(jax.random.key(0), BANK._replace(values=jnp.zeros((2, 32, 5))))
    with pytest.raises(ValueError, match="tower's out is 16"):
        VisionLanguageConfig(TINY.text, PackedViTConfig(32, 2, 2, 64, 16))
    with pytest.raises(ValueError, match="must be 3"):
        VisionLanguageConfig(dataclasses.replace(TINY.text, rope_sections=(2, 2)), config)
