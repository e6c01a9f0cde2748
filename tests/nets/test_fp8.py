"""Linear layers in 8-bit floats: kept, served, trained, and read from files as DeepSeek-V3 writes them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl import runs
from jaxrl.data import ByteTokenizer
from jaxrl.kernels.quantised import rounding_bound
from jaxrl.nets import presets
from jaxrl.nets.adapters import dequantise_base
from jaxrl.nets.adapters.adapted import get
from jaxrl.nets.fp8 import POWERS, FP8Kernel, matrices, quantise_fp8, to_fp8, train_in_fp8
from jaxrl.nets.language_model import language_model
from jaxrl.nets.layers import Operator
from jaxrl.nets.moe import GroupedOperator
from jaxrl.nets.weights import from_checkpoint, read_safetensors, to_checkpoint
from jaxrl.nets.weights.files import INDEX, _open
from jaxrl.posttrain import sft, update
from jaxrl.pretrained import load_pretrained, save_pretrained
from jaxrl.types import TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
CONFIG = presets.tiny(13, width=32, heads=2, kv_heads=1, ffn=48, max_length=32, tie_embeddings=False)


@functools.cache
def network():
    model = language_model(CONFIG)
    return model, jit(model.init)(jax.random.key(0))


def test_a_stored_model_computes_almost_the_same():
    model, params = network()
    stored = quantise_fp8(params)
    kernel = stored["layers"]["attention"]["q"]["kernel"]
    assert isinstance(kernel, FP8Kernel) and isinstance(kernel, Operator) and kernel.values.dtype == jnp.float8_e4m3fn
    assert not isinstance(stored["unembed"]["kernel"], Operator) and kernel.shape == (2, 32, 32)
    plain = params["layers"]["attention"]["q"]["kernel"]
    error = jnp.abs(kernel.dense() - plain)
    assert (error <= rounding_bound(plain, dtype=jnp.float8_e4m3fn, block=(128, 128))).all() and error.max() > 0
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 13)
    apply = jit(lambda p: model.apply(p, tokens)[0])
    exact, rounded, weights_only = apply(params), apply(stored), apply(dequantise_base(stored))
    away = lambda y: float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    assert 0 < away(weights_only) < away(rounded) < 0.05
    gradient = jax.jit(jax.grad(lambda p: model.apply({**stored, "embed": p}, tokens)[0][0, 0, 0]))(params["embed"])
    assert gradient["embedding"].any()


@pytest.mark.parametrize("scheme", [POWERS._replace(power_of_two=False), POWERS], ids=["amax", "powers"])
def test_training_in_eight_bits_follows_float32(scheme):
    model, params = network()
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(1, 3, (32, 1)) * np.ones((32, 12), int), axis=1) % 13  # steps of 1 or of 2
    data = TokenBatch(jnp.asarray(tokens), jnp.ones(tokens.shape))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    losses = {}
    for name, one in (("float32", model), ("fp8", train_in_fp8(model, scheme=scheme))):
        run = sft.make(sft.SFTConfig(batch=16), one, optimizer)

        def step(state, _, run=run):
            state, figures = run.step(state, data)
            return state, figures["train/loss"]

        state, losses[name] = jax.jit(lambda state: jax.lax.scan(step, state, None, 40))(
            run.init(jax.random.key(1), params)
        )
        assert state.params["layers"]["ffn"]["up"]["kernel"].dtype == jnp.float32
    exact, rounded = (losses[name][-10:].mean() for name in ("float32", "fp8"))
    assert exact < 0.4 * losses["float32"][0] and not np.array_equal(losses["float32"], losses["fp8"])
    assert abs(rounded - exact) < 0.03, (exact, rounded)


MIXTURE = presets.shrunk(presets.deepseek_v3(), 13, width=64, layers=2, heads=2, ffn=128, max_length=32)


@functools.cache
def mixture():
    model = language_model(MIXTURE)
    return model, jit(model.init)(jax.random.key(0))


def by_type(tree):
    """Numbers in 8 bits, and others by path."""
    eight, others = 0, {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, FP8Kernel)):
        if isinstance(leaf, FP8Kernel):
            eight += leaf.values.size
        else:
            others[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf.size
    return eight, others


def test_deepseek_v3_is_in_eight_bits():
    """At its own size, from shapes: all that its checkpoints have in 8 bits, 99.7 % of its parameters."""
    shapes = jax.eval_shape(language_model(presets.deepseek_v3()).init, jax.random.key(0))
    eight, others = by_type(jax.eval_shape(quantise_fp8, shapes))
    assert eight + sum(others.values()) == 671_026_419_200 and eight / 671_026_419_200 > 0.997
    left = {path.rpartition("/")[0].rpartition("/")[2] for path in others}
    assert left == {
        "embed",
        "unembed",
        "norm",
        "attention_norm",
        "ffn_norm",
        "q_down_norm",
        "kv_down_norm",
        "router",
        "moe",
    }
    assert sum(n for path, n in others.items() if "moe" in path) == 58 * (7168 * 256 + 256)  # router and its bias
    before = jax.eval_shape(lambda p: quantise_fp8(p, targets=("q_down", "q_up", "kv_down", "o")), shapes)
    assert by_type(before)[0] < 0.03 * eight
    with pytest.raises(ValueError, match="targets are .'q', .*expected some of the layers down, gate, kv_down"):
        jax.eval_shape(lambda p: quantise_fp8(p, targets=("q", "o")), shapes)


def test_a_mixture_in_eight_bits_computes_almost_the_same():
    model, params = mixture()
    stored = quantise_fp8(params)
    up = stored["layers"]["moe"]["up"]
    assert isinstance(up, FP8Kernel) and isinstance(up, GroupedOperator) and up.shape == (1, 8, 64, 32)
    assert up.values.dtype == jnp.float8_e4m3fn and up.scales.shape == (1, 8, 1, 1)
    plain = params["layers"]["moe"]["up"]
    assert (jnp.abs(up.dense() - plain) <= rounding_bound(plain, dtype=jnp.float8_e4m3fn, block=(128, 128))).all()
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 13)
    apply = jit(lambda p: model.apply(p, tokens)[0])
    exact, rounded, weights_only = apply(params), apply(stored), apply(dequantise_base(stored))
    away = lambda y: float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    assert 0 < away(weights_only) and 0 < away(rounded) < 0.05
    some = apply(quantise_fp8(params, targets=("kv_up",)))
    assert 0 < away(some) < away(rounded)

    cache, pieces = model.init_cache(2, 8), []
    step = jit(lambda p, tokens, cache: model.apply(p, tokens, cache=cache))
    for part in (slice(0, 7), slice(7, 8)):
        y, cache = step(stored, tokens[:, part], cache)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), rounded, atol=0.02)  # latents are met in another order


def test_a_mixture_trains_in_eight_bits():
    """Gradients are those of float32 up to the rounding, for every matrix; SFT moves parameters that stay float32."""
    model, params = mixture()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (8, 12)))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(8, 12, 64)), jnp.float32)
    loss = lambda model: lambda p: (model.apply(p, tokens)[0] * weights).sum()
    # all experts are chosen, so that rounding sends no token elsewhere
    assert MIXTURE.experts is not None
    every = dataclasses.replace(MIXTURE.experts, experts=4, top_k=4, groups=1, top_groups=1, group_score=1)
    every = language_model(dataclasses.replace(MIXTURE, experts=every))
    given = jit(every.init)(jax.random.key(0))
    exact, found = (jit(jax.grad(loss(m)))(given) for m in (every, train_in_fp8(every)))
    for path, matrix in matrices(given).items():
        a, b = get(found, path), get(exact, path)
        away = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert matrix.shape == a.shape and 0 < away < 0.12, (path, away)
    assert (jnp.abs(get(found, "layers/moe/up")).sum((-1, -2)) > 0).all()

    data = TokenBatch(tokens, jnp.ones(tokens.shape))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=2e-3))
    run = sft.make(sft.SFTConfig(batch=8), train_in_fp8(model), optimizer)
    state, step, losses = run.init(jax.random.key(1), params), jit(run.step), []
    for _ in range(6):
        state, metrics = step(state, data)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.95 * losses[0] and state.skipped == 0, losses
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params["layers"]["moe"], params["layers"]["moe"])
    assert all(jax.tree.leaves(moved)) and all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


def block_scaled(tensor):
    """A matrix as DeepSeek-V3's files have it, by NumPy: e4m3 values, and the factor of each block."""
    rows, columns = (-(-n // 128) for n in tensor.shape)
    values, scales = np.zeros(tensor.shape, ml_dtypes.float8_e4m3fn), np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            at = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scales[i, j] = np.abs(tensor[at]).max() / 448
            values[at] = (tensor[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return values, scales


def plain_product(values, scales):
    wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: values.shape[0], : values.shape[1]]
    return values.astype(np.float32) * wide


def test_files_with_scales_are_read_as_floats(tmp_path):
    config = presets.tiny(13, width=160, heads=2, kv_heads=1, ffn=200, layers=1, max_length=32, tie_embeddings=False)
    params = jax.device_get(jax.jit(language_model(config).init)(jax.random.key(0)))
    shards, want = ({}, {}), {}
    for name, tensor in to_checkpoint(config, params).items():
        if "proj" not in name:
            shards[0][name] = want[name] = np.ascontiguousarray(tensor)
            continue
        values, scales = block_scaled(tensor)
        shards[0][name], shards[1][f"{name}_scale_inv"] = values, scales  # scales may be in another file
        want[name] = plain_product(values, scales)
    names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, tmp_path / file)
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    found = read_safetensors(tmp_path)
    assert set(found) == set(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor, err_msg=name)
    loaded = from_checkpoint(config, found)
    kernel = jnp.asarray(loaded["layers"]["ffn"]["up"]["kernel"])
    assert kernel.dtype == jnp.float32
    values = np.asarray(to_fp8(kernel).values[0]).T.astype(np.float32)
    file_values = shards[0]["model.layers.0.mlp.up_proj.weight"].astype(np.float32)
    assert (values == file_values).mean() > 0.999  # rounding twice changes next to nothing


def test_a_folder_in_eight_bits_is_read_back(tmp_path):
    """As DeepSeek-V3's: what `quantise_fp8` keeps, with a factor for each block, and the rest in bfloat16."""
    config = dataclasses.replace(MIXTURE, vocab_size=300, width=160, tie_embeddings=False)
    network = language_model(config)
    params = jit(network.init)(jax.random.key(0))
    model = runs.Model(network, params, ByteTokenizer(), config, "", 8, "")
    save_pretrained(model, tmp_path / "a", dtype="fp8")
    kinds = {name: stored.kind for name, stored in _open(tmp_path / "a" / "model.safetensors")[0].items()}
    for name, kind in kinds.items():
        eight = name.endswith("proj.weight") or name.endswith("proj_with_mqa.weight")
        assert kind == ("F8_E4M3" if eight else "F32" if name.endswith("_scale_inv") else "BF16"), name
        assert not eight or name + "_scale_inv" in kinds
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    loaded = load_pretrained(tmp_path / "a")
    assert loaded.transformer.latent == config.latent
    stored = dequantise_base(quantise_fp8(params))
    eight = matrices(params)
    for path, leaf in jax.tree.leaves_with_path(stored):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bound = 1e-6 if name in eight else 2.0**-8
        np.testing.assert_allclose(get(loaded.params, name), leaf, rtol=bound, atol=1e-30, err_msg=name)
    (tmp_path / "b").mkdir()
    save_pretrained(loaded._replace(params=quantise_fp8(params)), tmp_path / "b", dtype="fp8")  # from 8 bits, too
    again = load_pretrained(tmp_path / "b").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-30), loaded.params, again)


def test_files_that_cannot_be_right(tmp_path):
    values, scales = block_scaled(np.random.default_rng(0).normal(size=(130, 4)).astype(np.float32))
    file = tmp_path / "model.safetensors"
    save_file({"w": values}, file)
    with pytest.raises(ValueError, match="w is F8_E4M3 and there is no w_scale_inv"):
        read_safetensors(file)
    save_file({"w": values, "w_scale_inv": scales[:1]}, file)
    with pytest.raises(ValueError, match=r"w_scale_inv is \(1, 1\), expected \(2, 1\)"):
        read_safetensors(file)
    save_file({"w": np.zeros((2, 2), np.int8)}, file)
    with pytest.raises(ValueError, match="w in model.safetensors is I8"):
        read_safetensors(file)
