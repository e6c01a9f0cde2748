"""Segment Anything against torch, through the values of tests/golden/make_sam.py, and what its parts promise."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Full, attention
from jaxrl.nets.vision import sam, sam_encoder
from jaxrl.nets.vision.sam import SAM, SIZES, Prompts, prompt
from jaxrl.nets.weights import maps
from jaxrl.nets.weights.sam import IGNORED, names

TINY = SIZES["tiny"]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CASES = ("points", "box", "points_box", "mask", "point_mask", "box_mask")
jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.lru_cache
def golden():
    """(arrays, params, checkpoint): params is ours, checkpoint {name: float32 array}."""
    with np.load(Path(__file__).parents[1] / "golden" / "sam.npz") as stored:
        arrays = dict(stored)
    checkpoint = unpacked(arrays, arrays["weights"].astype(np.float32))
    return arrays, maps.from_checkpoint(names(TINY), shapes(TINY), checkpoint, ignored=IGNORED), checkpoint


def unpacked(arrays, vector):
    found, start = {}, 0
    for name, shape in json.loads(str(arrays["names"])).items():
        size = int(np.prod(shape))
        found[name], start = vector[start : start + size].reshape(shape), start + size
    return found


def shapes(config):
    """Paths and shapes of our parameters."""
    return maps.shapes(SAM(config), jnp.zeros((1, config.image, config.image, 3)), prompt(points=jnp.zeros((1, 1, 2))))


def images(arrays):
    return jnp.asarray(arrays["images"].astype(np.float32)).transpose(0, 2, 3, 1)


def given(arrays, case):
    """(the image of each prompt, the prompts), a row for each."""
    stored = {k.split("/")[1]: jnp.asarray(v) for k, v in arrays.items() if k.startswith(f"{case}/")}
    rows = {"points": [0, 0, 1, 1], "box": [1], "box_mask": [1]}.get(case, [0])
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in stored.items() if k in ("points", "labels", "boxes")}
    if "masks" in stored:
        flat["masks"] = stored["masks"][:, 0]
    return rows, prompt(**flat)


def together(arrays, cases):
    """Prompts of several cases as one batch: (the image of each, `Prompts` with room for the longest)."""
    rows, prompts = zip(*(given(arrays, case) for case in cases), strict=True)
    room = max(p.labels.shape[1] for p in prompts)
    pad = lambda x, value: jnp.pad(
        x, ((0, 0), (0, room - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=value
    )
    masks = [jnp.zeros((len(p.labels), 16, 16)) if p.masks is None else p.masks for p in prompts]
    return jnp.array(sum(rows, [])), Prompts(
        jnp.concatenate([pad(p.points, 7.0) for p in prompts]),
        jnp.concatenate([pad(p.labels, sam.ABSENT) for p in prompts]),
        jnp.concatenate(masks),
        jnp.concatenate([jnp.full(len(p.labels), p.masks is not None) for p in prompts]),
    )


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_embeddings_equal_those_of_torch():
    arrays, params, _ = golden()
    got = jit(functools.partial(SAM(TINY).apply, method="encode"))({"params": params}, images(arrays))
    close(np.moveaxis(np.asarray(got), -1, 1), arrays["embeddings"])


@functools.lru_cache
def decoder():
    """(params, embeddings, prompts) -> (logits, IoUs), compiled for each shape once."""
    return jit(lambda params, *args: SAM(TINY).apply({"params": params}, *args, method="decode"))


@functools.lru_cache
def answers():
    """{case: (logits, IoUs)}, all cases in one batch."""
    arrays, params, _ = golden()
    rows, prompts = together(arrays, CASES)
    logits, ious = decoder()(params, jnp.asarray(arrays["embeddings"]).transpose(0, 2, 3, 1)[rows], prompts)
    ends = np.cumsum([len(given(arrays, case)[0]) for case in CASES])[:-1]
    return dict(zip(CASES, zip(np.split(logits, ends), np.split(ious, ends), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_masks_and_ious_equal_those_of_torch(case):
    arrays, (logits, ious) = golden()[0], answers()[case]
    close(logits.reshape(arrays[f"{case}/logits"].shape), arrays[f"{case}/logits"])
    close(ious.reshape(arrays[f"{case}/ious"].shape), arrays[f"{case}/ious"])


def test_answers_do_not_depend_on_room_for_points_or_on_other_prompts():
    arrays, params, _ = golden()
    rows, alone = given(arrays, "points")
    embeddings = jnp.asarray(arrays["embeddings"]).transpose(0, 2, 3, 1)[jnp.array(rows)]
    for got, want in zip(decoder()(params, embeddings, alone), answers()["points"], strict=True):
        close(got, want)


@functools.lru_cache
def gradients():
    """(loss, its gradient) of make_sam.py."""
    arrays, params, _ = golden()
    waves = lambda x: jnp.cos(jnp.arange(x[0].size, dtype=jnp.float32)).reshape(1, *x.shape[1:])
    rows, prompts = together(arrays, ("point_mask", "box"))
    seen = images(arrays)[rows]

    def loss(params):
        logits, ious = SAM(TINY).apply({"params": params}, seen, prompts)
        return jnp.sum(waves(logits) * logits) / 10 + jnp.sum(waves(ious) * ious)

    return jit(jax.value_and_grad(loss))(params)


def test_loss_and_gradients_equal_those_of_torch():
    arrays, _, _ = golden()
    value, gradient = gradients()
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    ours, theirs = maps.to_checkpoint(names(TINY), gradient), unpacked(arrays, arrays["grads"])
    assert ours.keys() == theirs.keys()
    frequencies = "shared_image_embedding.positional_embedding"  # constants here, as in the original code
    assert not ours.pop(frequencies).any() and theirs.pop(frequencies).any()
    scale = max(np.abs(want).max() for want in theirs.values())
    for name, want in theirs.items():
        # the gradient of a key's bias is rounding and nothing else
        atol = 1e-4 * np.abs(want).max() + 3e-7 * scale
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=atol, err_msg=name)


def test_checkpoint_round_trip_is_exact():
    _, params, checkpoint = golden()
    again = maps.to_checkpoint(names(TINY), params)
    assert again.keys() == checkpoint.keys()
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_have_the_published_number_of_parameters(size):
    ours = shapes(SIZES[size])
    assert sum(int(np.prod(shape)) for shape in ours.values()) == golden()[0][f"count/{size}"]
    maps.check_total(names(SIZES[size]), ours)


def test_every_parameter_has_a_name_and_every_name_a_place():
    arrays, _, checkpoint = golden()
    spoiled = dict(checkpoint) | {"extra": np.zeros(3)}
    del spoiled["vision_encoder.pos_embed"]
    with pytest.raises(ValueError) as error:
        maps.from_checkpoint(names(TINY), shapes(TINY), spoiled, ignored=IGNORED)
    assert "missing vision_encoder.pos_embed" in str(error.value) and "unused extra" in str(error.value)
    both = dict(checkpoint) | {IGNORED[0]: checkpoint["shared_image_embedding.positional_embedding"]}
    maps.from_checkpoint(names(TINY), shapes(TINY), both, ignored=IGNORED)


def test_folded_positions_are_a_bias():
    b, h, w, heads, d = 2, 3, 5, 2, 4
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(b, h, w, heads, d)).astype(np.float32) for _ in range(3))
    rows, columns = (draw.normal(size=(2 * n - 1, d)).astype(np.float32) for n in (h, w))
    bias = np.zeros((b, heads, h * w, h * w), np.float32)
    for i in np.ndindex(h, w):
        for j in np.ndindex(h, w):
            table = rows[i[0] - j[0] + h - 1] + columns[i[1] - j[1] + w - 1]
            bias[:, :, i[0] * w + i[1], j[0] * w + j[1]] = q[:, i[0], i[1]] @ table
    flat = lambda x: jnp.asarray(x).reshape(b, h * w, heads, d)
    want = attention(flat(q), flat(k), flat(v), mask=Full(), bias=jnp.asarray(bias))
    got = attention(
        *sam_encoder.fold_positions(*map(jnp.asarray, (q, k, rows, columns))), flat(v), mask=Full(), scale=1.0
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_global_attention_holds_no_array_of_queries_times_keys():
    n, heads = 32, 2
    module = sam_encoder.Attention(heads, 8, (n, n))
    x = jax.ShapeDtypeStruct((1, n * n, 8), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x, x, x)
    compiled = jit(lambda v, x: module.apply(v, x, x, x)).lower(variables, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * heads * n**4 / 2


@pytest.mark.parametrize(("h", "w", "n"), [(4, 4, 3), (3, 5, 2), (1, 1, 4), (6, 3, 3)])
def test_windows_come_back(h, w, n):
    x = np.random.default_rng(0).normal(size=(2, h, w, 3))
    windows = np.asarray(sam_encoder.to_windows(jnp.asarray(x), n))
    rows, columns = -(-h // n), -(-w // n)
    assert windows.shape == (2 * rows * columns, n, n, 3)
    padded = np.zeros((2, rows * n, columns * n, 3))
    padded[:, :h, :w] = x
    for b, i, j in np.ndindex(2, rows, columns):
        window = windows[(b * rows + i) * columns + j]
        np.testing.assert_array_equal(window, padded[b, i * n : i * n + n, j * n : j * n + n].astype(np.float32))
    np.testing.assert_array_equal(sam_encoder.from_windows(jnp.asarray(windows), h, w), x.astype(np.float32))


@pytest.mark.parametrize("windowed", [True, False])
def test_a_windowed_block_sees_its_window_alone(windowed):
    block = sam_encoder.Block(TINY, windowed)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    params = jit(block.init)(jax.random.key(1), x)
    reach = jit(jax.jacobian(lambda x: block.apply(params, x)[0][0, 1, 1].sum()))(x)
    touched = np.abs(np.asarray(reach))[0].max(-1) > 0
    expected = np.zeros((4, 4), bool)
    expected[:3, :3] = True  # the window of patch (1, 1)
    np.testing.assert_array_equal(touched, expected if windowed else np.ones((4, 4), bool))


def test_the_program_does_not_grow_with_depth():
    def program(layers):
        config = dataclasses.replace(TINY, layers=layers, global_every=layers // 2, decoder_layers=layers)
        variables = jax.eval_shape(SAM(config).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), alone)
        return str(jax.make_jaxpr(SAM(config).apply)(variables, jnp.zeros((1, 16, 16, 3)), alone)).count(" = ")

    alone = prompt(points=jnp.zeros((1, 1, 2)))
    assert program(4) == program(12)


def test_the_order_of_points_and_what_is_absent_do_not_matter():
    arrays, params, _ = golden()
    rows, prompts = together(arrays, CASES)
    embeddings = jnp.asarray(arrays["embeddings"]).transpose(0, 2, 3, 1)[rows]
    want = decoder()(params, embeddings, prompts)
    turned = prompts._replace(points=prompts.points[:, ::-1], labels=prompts.labels[:, ::-1])
    for got, value in zip(decoder()(params, embeddings, turned), want, strict=True):
        close(got, value)
    absent, unused = prompts.labels == sam.ABSENT, ~prompts.has_mask
    moved = prompts._replace(
        points=prompts.points + 3 * absent[..., None], masks=prompts.masks + 5 * unused[:, None, None]
    )
    for got, value in zip(decoder()(params, embeddings, moved), want, strict=True):
        np.testing.assert_array_equal(got, value)
    kinds = prompts._replace(labels=jnp.where(prompts.labels == 1, 0, prompts.labels))
    assert np.abs(decoder()(params, embeddings, kinds)[0] - want[0]).max() > 0.1


def test_several_prompts_of_one_image_are_a_vmap():
    arrays, params, _ = golden()
    prompts = given(arrays, "points")[1]
    prompts = jax.tree.map(lambda x: x[:2, None], prompts)
    embedding = jnp.asarray(arrays["embeddings"]).transpose(0, 2, 3, 1)[:1]
    decode = lambda params, p: SAM(TINY).apply({"params": params}, embedding, p, method="decode")
    each = jit(jax.vmap(decode, in_axes=(None, 0)))
    close(each(params, prompts)[0][:, 0], arrays["points/logits"][0])


def test_half_precision_and_intermediates():
    arrays, params, _ = golden()
    config = dataclasses.replace(TINY, dtype="bfloat16")
    rows, prompts = together(arrays, ("point_mask", "box"))
    apply = jit(functools.partial(SAM(config).apply, mutable=["intermediates"]))
    (logits, ious), kept = apply({"params": params}, images(arrays)[rows], prompts)
    assert logits.dtype == ious.dtype == jnp.float32
    want = np.concatenate([arrays[f"{case}/logits"][0] for case in ("point_mask", "box")])
    assert np.abs(np.asarray(logits) - want).max() < 0.1 * np.abs(want).max()
    blocks = kept["intermediates"]["image_encoder"]["blocks"]
    assert blocks["windowed"]["hidden"][0].shape == (2, 1, 2, 4, 4, 8)
    assert blocks["global"]["hidden"][0].shape == (2, 2, 4, 4, 8)


@pytest.mark.slow
def test_rematerialised_blocks_have_the_same_gradients():
    arrays, params, _ = golden()

    def total(config, params):
        return jnp.square(SAM(config).apply({"params": params}, images(arrays), method="encode")).sum()

    again = dataclasses.replace(TINY, remat=True)
    plain, remat = (jit(jax.grad(functools.partial(total, c)))(params) for c in (TINY, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": 18}, "image is 18 and patch 4"),
        ({"heads": 3}, "width is 8 and heads 3"),
        ({"global_every": 3}, "layers is 4 and global_every 3"),
        ({"channels": 12}, "channels is 12"),
        ({"decoder_heads": 3}, "3 decoder_heads"),
        ({"mask_channels": 6}, "mask_channels 6"),
        ({"iou_depth": 1}, "iou_depth 1"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompt(), "prompt was given nothing"),
        (lambda: prompt(labels=jnp.zeros((1, 1)), boxes=jnp.zeros((1, 4))), "labels were given without points"),
        (lambda: prompt(points=jnp.zeros((2, 2))), "points have shape"),
        (lambda: prompt(points=jnp.zeros((1, 2, 2)), labels=jnp.zeros((1, 3))), "points have shape"),
        (lambda: prompt(points=jnp.zeros((2, 1, 2)), boxes=jnp.zeros((1, 4))), "one box for each prompt"),
        (lambda: decoded(embeddings=jnp.zeros((1, 4, 4, 8))), "embeddings has shape"),
        (lambda: decoded(prompts=prompt(boxes=jnp.zeros((2, 4)))), "prompts.labels has shape"),
        (lambda: decoded(prompts=prompt(masks=jnp.zeros((1, 4, 4)))), "prompts.masks has shape"),
        (lambda: decoded(prompts=prompt(boxes=jnp.zeros((1, 4)))._replace(has_mask=jnp.ones(1))), "without masks"),
        (lambda: encoded(jnp.zeros((1, 3, 16, 16))), "channels last"),
        (lambda: encoded(jnp.zeros((1, 16, 12, 3))), "pad the other"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def decoded(embeddings=None, prompts=None):
    embeddings = jnp.zeros((1, 4, 4, 16)) if embeddings is None else embeddings
    prompts = prompt(points=jnp.zeros((1, 1, 2))) if prompts is None else prompts
    return SAM(TINY).apply({"params": golden()[1]}, embeddings, prompts, method="decode")


def encoded(images):
    return SAM(TINY).apply({"params": golden()[1]}, images, method="encode")
