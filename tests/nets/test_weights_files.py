"""Safetensors and GGUF: tiny random models of every architecture there and back, and files that cannot be right."""

import dataclasses
import json
import struct
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, dequantize, get_tensor_name_map
from safetensors.numpy import save_file

from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.rope import DynamicNTK, LinearScaling, Llama3Scaling, Yarn
from jaxrl.nets.weights import (
    from_checkpoint,
    from_gguf,
    from_hugging_face,
    read_gguf,
    read_safetensors,
    to_checkpoint,
    to_hugging_face,
    write_safetensors,
)
from jaxrl.nets.weights.files import INDEX, Stored
from jaxrl.nets.weights.gguf import QUANTS

SIZES = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24, "max_length": 64, "norm_eps": 1e-5}
TINY = {
    "llama": presets.tiny(32, **SIZES, tie_embeddings=False),
    "smollm2": presets.tiny(32, **SIZES, tie_embeddings=True),
    "qwen2": presets.tiny(32, **SIZES, qkv_bias=True, rope_base=1e6),
    "qwen3": presets.tiny(32, **SIZES, qk_norm=True, head_dim=6, tie_embeddings=False),
    "mistral": presets.tiny(32, **SIZES, window=8, tie_embeddings=False),
}


def random_params(config, seed=0):
    """Random numbers in every parameter, norms and biases too, as NumPy arrays in the config's type."""
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    draw = np.random.default_rng(seed)
    make = lambda leaf: draw.normal(0.5, 0.3, leaf.shape).astype(np.float32).astype(jnp.dtype(config.param_dtype))
    return jax.tree.map(make, shapes)


def assert_same(params, again):
    def same(path, ours, theirs):
        assert ours.dtype == theirs.dtype, path
        np.testing.assert_array_equal(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, params, again)


# Safetensors


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_round_trip_is_bitwise(name, dtype, tmp_path):
    config = dataclasses.replace(TINY[name], param_dtype=dtype)
    params = random_params(config)
    (file,) = write_safetensors(tmp_path, to_checkpoint(config, params), dtype=dtype)
    assert file.name == "model.safetensors" and not (tmp_path / INDEX).exists()
    assert_same(params, from_checkpoint(config, read_safetensors(tmp_path)))
    assert_same(params, from_checkpoint(config, read_safetensors(file)))


def test_device_arrays_are_written_like_numpy(tmp_path):
    config = TINY["qwen3"]
    params = random_params(config)
    write_safetensors(tmp_path, to_checkpoint(config, jax.tree.map(jnp.asarray, params)))
    assert_same(params, from_checkpoint(config, read_safetensors(tmp_path)))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_a_narrow_type_rounds_once_and_widens_exactly(dtype, kind, tmp_path):
    config = TINY["llama"]
    params = random_params(config)
    write_safetensors(tmp_path, to_checkpoint(config, params), dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(np.float32), params)
    assert_same(rounded, from_checkpoint(config, read_safetensors(tmp_path)))


def test_shards_hold_at_most_their_limit_and_the_index_names_them(tmp_path):
    config = TINY["llama"]
    params = random_params(config)
    tensors = to_checkpoint(config, params)
    files = write_safetensors(tmp_path, tensors, shard_bytes=3000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(files) > 3 and [f.name for f in files] == sorted({*index["weight_map"].values()})
    assert index["metadata"]["total_size"] == sum(t.size * 4 for t in tensors.values())
    sizes: dict = {}
    for name, file in index["weight_map"].items():
        sizes.setdefault(file, []).append(tensors[name].size * 4)
    assert all(sum(held) <= 3000 or len(held) == 1 for held in sizes.values())
    assert_same(params, from_checkpoint(config, read_safetensors(tmp_path)))


def test_each_tensor_is_read_once_and_none_before_all_fit():
    config, read = TINY["llama"], []

    def stored(name, array):
        return Stored(array.shape, lambda: read.append(name) or array)

    params = random_params(config)
    tensors = {name: stored(name, array) for name, array in to_checkpoint(config, params).items()}
    assert_same(params, from_checkpoint(config, tensors))
    assert sorted(read) == sorted(tensors)
    read.clear()
    with pytest.raises(ValueError, match="unused extra"):
        from_checkpoint(config, tensors | {"extra": stored("extra", np.zeros(2))})
    assert not read


def test_tables_of_frequencies_in_old_files_are_passed_over():
    config = TINY["llama"]
    params = random_params(config)
    tensors = to_checkpoint(config, params)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2)
    assert_same(params, from_checkpoint(config, tensors))


def damaged(folder, how):
    """Spoil a good checkpoint of two or more files in one way."""
    config = TINY["llama"]
    files = write_safetensors(folder, to_checkpoint(config, random_params(config)), shard_bytes=10_000)
    if how == "short":
        files[1].write_bytes(files[1].read_bytes()[:-100])
    elif how == "text":
        files[1].write_text("<html>not found</html>")
    elif how == "lost":
        files[1].unlink()
    elif how == "index":
        (folder / INDEX).write_text("{}")
    elif how == "no index":
        (folder / INDEX).unlink()
    elif how == "moved":
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["model.layers.1.mlp.down_proj.weight"] = files[0].name
        (folder / INDEX).write_text(json.dumps(index))
    elif how == "eight bits":
        save_file({"model.norm.weight": np.zeros(4, np.int8)}, files[1])
    elif how == "pickle":
        for file in folder.iterdir():
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"PK")
    elif how == "empty":
        for file in folder.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("short", "model-00002-of-.*is not a whole safetensors file.*Download it again"),
        ("text", "model-00002-of-.*is not a whole safetensors file"),
        ("lost", "lacks 1 of the . files that model.safetensors.index.json names: model-00002"),
        ("index", "is not an index of safetensors"),
        ("no index", "safetensors files but no model.safetensors.index.json"),
        ("moved", "down_proj.weight is not in model-00001-of-.*where model.safetensors.index.json says"),
        ("eight bits", "expected floats(?s:.)*model.norm.weight in model-00002-of-.* is I8"),
        ("pickle", "pytorch_model.bin, a pickle, and reading a pickle can run any program"),
        ("empty", "holds no .safetensors file"),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong(how, message, tmp_path):
    damaged(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        read_safetensors(tmp_path)


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path):
    config = TINY["llama"]
    write_safetensors(tmp_path, to_checkpoint(config, random_params(config)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert read_safetensors(tmp_path)
    with pytest.raises(ValueError, match="a pickle"):
        read_safetensors(tmp_path / "pytorch_model.bin")


def test_writing_refuses_what_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8', expected float32"):
        write_safetensors(tmp_path, {}, dtype="int8")
    with pytest.raises(ValueError, match="w holds 70000, too large for float16"):
        write_safetensors(tmp_path, {"w": np.array([7e4], np.float32)}, dtype="float16")
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        write_safetensors(tmp_path, {}, shard_bytes=0)


# config.json

QWEN = {"vocab_size": 32, **SIZES, "tie_embeddings": True}


@pytest.mark.parametrize(
    "config",
    [
        *TINY.values(),
        presets.llama32_1b(),
        presets.qwen3_0_6b(),
        presets.tiny(**QWEN, qkv_bias=True, window=8, window_layers=(1,)),
        presets.tiny(**QWEN, qk_norm=True, window=8),
        presets.tiny(**QWEN, rope_scaling=LinearScaling(4.0)),
        presets.tiny(**QWEN, rope_scaling=DynamicNTK(2.0, 64)),
        presets.tiny(**QWEN, rope_scaling=Llama3Scaling(8.0, 16)),
        presets.tiny(**QWEN, rope_scaling=Yarn(4.0, 16, truncate=False, attention_factor=1.5)),
    ],
)
def test_a_published_config_describes_the_same_network(config):
    published = json.loads(json.dumps(to_hugging_face(config)))
    again = from_hugging_face(published)
    assert dataclasses.replace(again, head_dim=None) == dataclasses.replace(config, head_dim=None)
    assert again.head_size == config.head_size


def test_transformers_reads_the_published_config():
    transformers = pytest.importorskip("transformers", reason="transformers is in the extra `test`")
    config = presets.llama32_1b()
    theirs = transformers.LlamaConfig.from_dict(to_hugging_face(config))
    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.rms_norm_eps) == (64, 8, 1e-5)
    assert theirs.rope_parameters["rope_theta"] == 5e5 and theirs.rope_parameters["rope_type"] == "llama3"
    assert from_hugging_face(theirs.to_dict(), head_dim=None) == config


def test_a_network_without_a_published_name_is_refused():
    with pytest.raises(ValueError, match="qkv_bias and qk_norm are both set"):
        to_hugging_face(presets.tiny(qkv_bias=True, qk_norm=True))
    with pytest.raises(ValueError, match=r"window_layers is \(0,\).*Mistral's window is on all layers"):
        to_hugging_face(presets.tiny(window=4, window_layers=(0,)))
    with pytest.raises(ValueError, match=r"the weights are quantised \(gptq\)"):
        from_hugging_face(to_hugging_face(presets.tiny()) | {"quantization_config": {"quant_method": "gptq"}})


# GGUF


def interleave(rows, heads):
    """Rows of heads in llama.cpp's order, written by loops: row 2 i + half of a head is row half * Dh / 2 + i."""
    head_dim = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                out[head * head_dim + 2 * pair + half] = rows[head * head_dim + half * (head_dim // 2) + pair]
    return out


def write_gguf(file, config, params, kind, *, extra=None, raw=None, **metadata):
    """A GGUF file of these parameters. raw: tensor -> (bytes, type), in place of its values."""
    writer = GGUFWriter(file, kind)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], config.layers)  # the package's own table
    for name, array in to_checkpoint(config, params).items():
        theirs, array = names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array)
        if kind == "llama" and theirs.endswith(("attn_q.weight", "attn_k.weight")):
            array = interleave(array, config.heads if "attn_q" in theirs else config.kv_heads)
        if theirs in (raw or {}):
            writer.add_tensor(theirs, raw[theirs][0], raw_dtype=raw[theirs][1])
        else:
            writer.add_tensor(theirs, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("name", ["llama", "smollm2", "qwen2", "qwen3"])
def test_gguf_round_trip_is_bitwise(name, tmp_path):
    config = TINY[name]
    params = random_params(config)
    kind = "llama" if name == "smollm2" else name
    metadata, tensors = read_gguf(write_gguf(tmp_path / "model.gguf", config, params, kind))
    found = from_gguf(metadata, tensors)
    assert found == config
    assert_same(params, from_checkpoint(found, tensors))


def test_half_floats_in_gguf_are_read_exactly(tmp_path):
    config = TINY["smollm2"]
    params = random_params(config)
    tensors = to_checkpoint(config, params)
    up, down = tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.down_proj.weight"]
    raw = {
        "blk.0.ffn_up.weight": (np.ascontiguousarray(up.astype(np.float16)), GGMLQuantizationType.F16),
        "blk.1.ffn_down.weight": (
            np.ascontiguousarray(down.astype(ml_dtypes.bfloat16)).view(np.uint8),
            GGMLQuantizationType.BF16,
        ),
    }
    found = read_gguf(write_gguf(tmp_path / "m.gguf", config, params, "llama", raw=raw)).tensors
    np.testing.assert_array_equal(found["model.layers.0.mlp.up_proj.weight"], up.astype(np.float16))
    wanted = down.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found["model.layers.1.mlp.down_proj.weight"], wanted)


def half(data):
    return struct.unpack("<e", bytes(data))[0]


def block_oracle(data, kind):
    """One block of bytes, by the description of its format in llama.cpp: a scale, perhaps a minimum, and integers."""
    low, high = lambda b: [x & 15 for x in b], lambda b: [x >> 4 for x in b]
    if kind == "Q4_0":
        return [half(data[:2]) * (q - 8) for q in (*low(data[2:]), *high(data[2:]))]
    if kind == "Q4_1":
        return [half(data[:2]) * q + half(data[2:4]) for q in (*low(data[4:]), *high(data[4:]))]
    if kind == "Q8_0":
        return [half(data[:2]) * (b - 256 if b > 127 else b) for b in data[2:]]
    if kind == "Q5_1":
        bits = int.from_bytes(bytes(data[4:8]), "little")
        quants = (*low(data[8:]), *high(data[8:]))
        return [half(data[:2]) * (q | (bits >> i & 1) << 4) + half(data[2:4]) for i, q in enumerate(quants)]
    assert kind == "Q4_K"  # eight groups of 32, with scales and minima of six bits
    d, dmin, packed, quants, out = half(data[:2]), half(data[2:4]), data[4:16], data[16:], []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        part = quants[32 * (group // 2) : 32 * (group // 2 + 1)]
        out += [d * scale * q - dmin * minimum for q in (high(part) if group % 2 else low(part))]
    return out


@pytest.mark.parametrize("kind", [kind for kind in QUANTS if kind not in ("F32", "F16", "BF16")])
def test_quantised_tensors(kind, tmp_path):
    config = presets.tiny(32, **(SIZES | {"width": 256, "layers": 1, "ffn": 16}), tie_embeddings=True)
    params = random_params(config)
    number = GGMLQuantizationType[kind]
    size = {"Q4_0": 144, "Q4_1": 160, "Q5_0": 176, "Q5_1": 192, "Q8_0": 272}
    size |= {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    data = np.random.default_rng(1).integers(0, 256, (16, size[kind]), np.uint8)
    block = size[kind] // 8 if "_K" not in kind else size[kind]
    halves = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}.get(kind, (0, 2 if kind[-1] == "0" else 4))
    for start in range(0, size[kind], block):
        data[:, start + halves[0] : start + halves[1]] %= 60  # finite float16 numbers below 1
    raw = {"blk.0.ffn_up.weight": (data, number)}
    found = read_gguf(write_gguf(tmp_path / "m.gguf", config, params, "llama", raw=raw)).tensors
    got = found["model.layers.0.mlp.up_proj.weight"]
    assert got.shape == (16, 256)
    np.testing.assert_array_equal(np.asarray(got), dequantize(data, number))
    if kind in ("Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K"):
        rows = [[block_oracle(row[i : i + block].tolist(), kind) for i in range(0, len(row), block)] for row in data]
        np.testing.assert_allclose(np.asarray(got), np.array(rows).reshape(16, 256), rtol=1e-5, atol=1e-5)


def test_llama3_scaling_is_found_in_the_table_of_factors(tmp_path):
    config = dataclasses.replace(TINY["llama"], head_dim=16, rope_base=5e5, rope_scaling=Llama3Scaling(32.0, 8192))
    table = []
    for pair in range(8):  # as llama.cpp's converter writes it
        turns = 8192 / (2 * np.pi * 5e5 ** (2 * pair / 16))
        smooth = min(max((turns - 1) / (4 - 1), 0), 1)
        table.append(1 / ((1 - smooth) / 32 + smooth))
    table = np.array(table, np.float32)
    params, extra = random_params(config), {"rope_freqs.weight": table}
    metadata, tensors = read_gguf(write_gguf(tmp_path / "m.gguf", config, params, "llama", extra=extra))
    assert from_gguf(metadata, tensors) == config
    assert_same(params, from_checkpoint(config, tensors))
    tensors["rope_freqs.weight"] = table * np.array([1, 2, 1, 1, 1, 1, 1, 1], np.float32)
    with pytest.raises(ValueError, match="not the table of Llama 3's scaling"):
        from_gguf(metadata, tensors)


METADATA = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 16,
    "llama.feed_forward_length": 24, "llama.attention.head_count": 4, "llama.vocab_size": 32,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3', expected one of llama, qwen2, qwen3"),
        ({"general.architecture": None}, "general.architecture is None"),
        ({"llama.block_count": None}, "the GGUF metadata lack llama.block_count"),
        ({"llama.attention.head_count": [4, 2]}, r"head_count differs by layer \(\[4, 2\]\)"),
        ({"llama.expert_count": 8}, "expert_count is 8: expert layers are not supported"),
        ({"llama.rope.dimension_count": 2}, "rope.dimension_count is 2, expected all 4 of a head"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope', expected none, linear or yarn"),
    ],
)
def test_gguf_metadata_that_describe_no_network_of_ours(changes, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(METADATA | changes, {})


def test_gguf_metadata_fill_what_they_leave_out():
    found = from_gguf(METADATA, {}, dtype="bfloat16")
    assert (found.kv_heads, found.rope_base, found.norm_eps, found.tie_embeddings) == (4, 1e4, 1e-5, True)
    assert found.dtype == "bfloat16" and found.vocab_size == 32
    scaled = METADATA | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    assert from_gguf(scaled | {"llama.rope.scaling.original_context_length": 16}, {}).rope_scaling == Yarn(4.0, 16)
    scaled = METADATA | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert from_gguf(scaled, {}).rope_scaling == LinearScaling(2.0)


def test_a_gguf_file_that_cannot_be_read_says_why(tmp_path):
    config = TINY["llama"]
    file = write_gguf(tmp_path / "m.gguf", config, random_params(config), "llama")
    whole = file.read_bytes()
    for length in (len(whole) - 200, 900, 30, 8):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole GGUF file"):
            read_gguf(file)
    file.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(ValueError, match=r"is not a GGUF file: it starts with b'PK"):
        read_gguf(file)
    with pytest.raises(ValueError, match="no file .*gone.gguf"):
        read_gguf(tmp_path / "gone.gguf")


def test_an_unknown_quantisation_is_named(tmp_path):
    config = presets.tiny(32, **(SIZES | {"width": 256, "layers": 1}), tie_embeddings=True)
    raw = {"blk.0.ffn_up.weight": (np.zeros((24, 66), np.uint8), GGMLQuantizationType.IQ2_XXS)}
    file = write_gguf(tmp_path / "m.gguf", config, random_params(config), "llama", raw=raw)
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight is IQ2_XXS"):
        read_gguf(file)


# Transformers, where torch is


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch, which is in no extra: pip install torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TINY)
def test_transformers_computes_the_same_logits_from_our_files(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = TINY[name]
    params = random_params(config)
    write_safetensors(tmp_path, to_checkpoint(config, params), shard_bytes=10_000)
    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(config)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, 32, (2, 20))
    model = language_model(config)
    ours = logits(model.apply(params, jnp.asarray(tokens))[0], model.unembedding(params))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_choices_without_published_names_are_refused():
    for changes, message in (
        ({"norm": "layer", "gated": False}, "norm, gated differ from a Llama's"),
        ({"experts": MoEConfig(2, 1, 8, score="sigmoid", bias=True)}, "latent attention and a router's bias"),
    ):
        with pytest.raises(ValueError, match=message):
            to_checkpoint(dataclasses.replace(TINY["llama"], **changes), {})
