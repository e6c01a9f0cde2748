"""Linear layers in 8-bit floats: kept, served, trained, and read from files as DeepSeek-V3 writes them."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl.kernels.quantised import rounding_bound
from jaxrl.nets import presets
from jaxrl.nets.adapters import dequantise_base
from jaxrl.nets.fp8 import POWERS, FP8Kernel, quantise_fp8, to_fp8, train_in_fp8
from jaxrl.nets.language_model import language_model
from jaxrl.nets.layers import Operator
from jaxrl.nets.weights import from_checkpoint, read_safetensors, to_checkpoint
from jaxrl.nets.weights.files import INDEX
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

CONFIG = presets.tiny(13, width=32, heads=2, kv_heads=1, ffn=48, max_length=32, tie_embeddings=False)


@functools.cache
def network():
    model = language_model(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0))


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
    apply = jax.jit(lambda p: model.apply(p, tokens)[0])
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
