"""The decoder: cached decode, layer loop, remat, dtypes, sizes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.presets import tiny
from jaxrl.nets.rope import rotation
from jaxrl.nets.transformer import Block, Transformer, TransformerConfig

SMALL = {"vocab_size": 16, "width": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "max_length": 32}


def small(layers=2, **changes):
    return TransformerConfig(**({"layers": layers, "tie_embeddings": True} | SMALL | changes))


@functools.cache
def network(config):
    """The language model with its functions compiled once per config and shape."""
    model = language_model(config)
    return model._replace(init=jax.jit(model.init), apply=jax.jit(model.apply))


def setup(config, batch=2, length=10, seed=0, spread=8.0):
    """(model, params, tokens); kernels spread out so that attention is far from uniform."""
    model = network(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = np.random.default_rng(seed)

    def leaf(path, x):
        name = path[-1].key
        std = 0.02 * spread if name in ("kernel", "embedding") else 0.1
        return jnp.asarray((name == "scale") + draw.normal(0, std, x.shape), jnp.float32)

    params = jax.tree.map_with_path(leaf, shapes)
    tokens = jax.random.randint(jax.random.key(seed + 1), (batch, length), 0, config.vocab_size)
    return model, params, tokens


def decode(model, params, tokens, pieces, mask=None, positions=None):
    """Hidden states of tokens fed to a cache in pieces of the given lengths."""
    cache = model.init_cache(tokens.shape[0], tokens.shape[1])
    out, start = [], 0
    for n in pieces:
        these = slice(start, start + n)
        hidden, cache = model.apply(
            params,
            tokens[:, these],
            positions=None if positions is None else positions[:, these],
            mask=None if mask is None else mask(these),
            cache=cache,
        )
        out.append(hidden)
        start += n
    assert int(cache.length) == tokens.shape[1]
    return jnp.concatenate(out, axis=1)


WINDOWS = {
    "window": {"window": 3},
    "mixed": {"window": 3, "window_layers": (1,)},
    "qwen": {"qkv_bias": True, "qk_norm": True, "head_dim": 6, "tie_embeddings": False},
}


@pytest.mark.parametrize("changes", WINDOWS.values(), ids=WINDOWS)
def test_cached_decode_equals_the_full_forward(changes):
    model, params, tokens = setup(small(**changes))
    full, none = model.apply(params, tokens)
    assert none is None
    got = decode(model, params, tokens, [4, 4, 1, 1])  # the prompt in two chunks, then token by token
    np.testing.assert_allclose(got, full, atol=2e-5)


def test_decode_unrolled_equals_the_loop():
    model, params, tokens = setup(small())
    unrolled = network(small(decode_unroll=2, unroll=2))
    full = model.apply(params, tokens)[0]
    np.testing.assert_allclose(unrolled.apply(params, tokens)[0], full, atol=2e-5)
    np.testing.assert_allclose(decode(unrolled, params, tokens, [5, 5]), full, atol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"window": 3}], ids=["full", "window"])
def test_left_padded_rows_decode_as_if_they_stood_alone(changes):
    model, params, tokens = setup(small(**changes))
    padding = jnp.array([0, 5])
    columns = jnp.arange(tokens.shape[1])[None]
    real = (columns >= padding[:, None]).astype(jnp.int32)
    positions = jnp.maximum(columns - padding[:, None], 0)
    got = decode(model, params, tokens, [6, 4], lambda these: Causal() & Segments(real[:, these], real), positions)
    alone, _ = model.apply(params, tokens[1:, 5:])
    np.testing.assert_allclose(got[1, 5:], alone[0], atol=2e-5)


def test_window_of_the_config_limits_what_a_token_sees():
    """One layer, window 3: the last token depends on the last three tokens and on no other."""
    model, params, tokens = setup(small(layers=1, window=3), batch=1, length=8)
    changed = (tokens + jnp.eye(9, 8, dtype=jnp.int32)) % 16  # row i changes token i; the last row none
    last = model.apply(params, changed)[0][:, -1]
    differs = np.abs(last[:8] - last[8:]).max(axis=1) > 1e-4
    assert differs.tolist() == [False] * 5 + [True] * 3


def test_window_layers_say_which_layers_use_it():
    """Full attention in one of two layers lets the last token see the first; windows of 2 in both do not."""
    for layers, sees in (((0,), True), (None, False)):
        model, params, tokens = setup(small(window=2, window_layers=layers), batch=1, length=8)
        pair = jnp.concatenate([tokens, tokens.at[0, 0].set((tokens[0, 0] + 1) % 16)])
        hidden = model.apply(params, pair)[0][:, -1]
        assert bool(np.abs(hidden[0] - hidden[1]).max() > 1e-4) == sees, layers


def test_scanned_layers_equal_a_python_loop():
    config = small(layers=3, window=3, window_layers=(0, 2))
    model, params, tokens = setup(config)
    x = params["embed"]["embedding"][tokens]
    cos, sin = rotation(jnp.broadcast_to(jnp.arange(10)[None], (2, 10)), config.head_size)
    block = jax.jit(lambda layer, *inputs: Block(config).apply({"params": layer}, *inputs, cos, sin, Causal(), 0))
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        (x, _, _), _ = block(layer, (x, None, None), jnp.int32(i), jnp.bool_(i != 1))
    x = np.asarray(x)
    want = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * np.asarray(params["norm"]["scale"])
    np.testing.assert_allclose(model.apply(params, tokens)[0], want, atol=2e-5)


def jaxpr_size(jaxpr):
    """Number of equations, those of inner programs included."""
    inner = [v for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values())) if hasattr(v, "jaxpr")]
    return len(jaxpr.eqns) + sum(jaxpr_size(getattr(v, "jaxpr", v)) for v in inner)


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for layers in (2, 12):
        model = language_model(small(layers=layers))
        params = jax.eval_shape(model.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

        def step(params, tokens, model=model):
            cache = model.init_cache(1, 8)
            hidden, cache = model.apply(params, tokens, cache=cache)
            grad = jax.grad(lambda p: model.apply(p, tokens)[0].sum())(params)
            return hidden, cache, grad

        sizes.append(jaxpr_size(jax.make_jaxpr(step)(params, tokens).jaxpr))
    assert sizes[0] == sizes[1] and sizes[0] > 100


def test_remat_changes_the_program_and_not_the_gradients():
    _, params, tokens = setup(small())
    gradients, programs = {}, {}
    for remat in ("none", "full", "dots"):
        model = language_model(small(remat=remat))
        grad = jax.grad(lambda p, model=model: jnp.square(model.apply(p, tokens)[0][:, :, 0]).sum())
        gradients[remat] = jax.jit(grad)(params)
        programs[remat] = str(jax.make_jaxpr(grad)(params))
    for remat in ("full", "dots"):
        assert "remat" in programs[remat] or "checkpoint" in programs[remat]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            gradients["none"],
            gradients[remat],
        )
    assert "checkpoint" not in programs["none"]
    assert programs["full"] != programs["dots"]


def test_bfloat16_compute_follows_float32_and_keeps_its_types():
    model, params, tokens = setup(small(), spread=1.0)
    half = network(small(dtype="bfloat16"))
    hidden = half.apply(params, tokens)[0]
    assert hidden.dtype == jnp.bfloat16 and half.unembedding(params).dtype == jnp.bfloat16
    assert half.init_cache(2, 4).k.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0))))
    stored = network(small(dtype="bfloat16", param_dtype="bfloat16"))
    shapes = jax.eval_shape(stored.init, jax.random.key(0))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(shapes))
    np.testing.assert_allclose(hidden.astype(jnp.float32), model.apply(params, tokens)[0], atol=0.06)
    assert logits(hidden, half.unembedding(params)).dtype == jnp.float32
    got = decode(half, params, tokens, [5, 5])
    np.testing.assert_allclose(got.astype(jnp.float32), hidden.astype(jnp.float32), atol=0.06)


def test_tied_embeddings_share_one_matrix():
    model, params, _ = setup(small(tie_embeddings=True))
    assert "unembed" not in params
    np.testing.assert_array_equal(model.unembedding(params), params["embed"]["embedding"].T)
    model, params, _ = setup(small(tie_embeddings=False))
    assert params["unembed"]["kernel"].shape == (16, 16)
    np.testing.assert_array_equal(model.unembedding(params), params["unembed"]["kernel"])


def test_parameter_paths_and_initialisation():
    config = TransformerConfig(
        vocab_size=512, width=128, layers=8, heads=4, kv_heads=2, ffn=256, qkv_bias=True, qk_norm=True
    )
    params = jax.jit(language_model(config).init)(jax.random.key(0))
    flat = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(params)}
    kernels = {"q": 128, "k": 64, "v": 64}
    want = {
        "embed/embedding": (512, 128),
        "layers/attention_norm/scale": (8, 128),
        "layers/attention/o/kernel": (8, 128, 128),
        "layers/attention/q_norm/scale": (8, 32),
        "layers/attention/k_norm/scale": (8, 32),
        "layers/ffn_norm/scale": (8, 128),
        "layers/ffn/gate/kernel": (8, 128, 256),
        "layers/ffn/up/kernel": (8, 128, 256),
        "layers/ffn/down/kernel": (8, 256, 128),
        "norm/scale": (128,),
        "unembed/kernel": (128, 512),
    }
    want |= {f"layers/attention/{n}/kernel": (8, 128, size) for n, size in kernels.items()}
    want |= {f"layers/attention/{n}/bias": (8, size) for n, size in kernels.items()}
    assert {k: v.shape for k, v in flat.items()} == want
    for path, x in flat.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(x, jnp.ones_like(x))
        elif path.endswith("bias"):
            np.testing.assert_array_equal(x, jnp.zeros_like(x))
        else:
            std = 0.02 / 4 if path in ("layers/attention/o/kernel", "layers/ffn/down/kernel") else 0.02
            np.testing.assert_allclose(np.std(x), std, rtol=0.03, err_msg=path)
    first, second = flat["layers/ffn/gate/kernel"][:2]
    assert np.abs(first - second).max() > 1e-3  # every layer draws its own


PUBLISHED = {
    presets.smollm2_135m: 134_515_008,
    presets.llama2_7b: 6_738_415_616,
    presets.llama31_8b: 8_030_261_248,
    presets.llama32_1b: 1_235_814_400,
    presets.qwen25_0_5b: 494_032_768,
    presets.qwen25_1_5b: 1_543_714_304,
    presets.qwen25_7b: 7_615_616_512,
    presets.qwen3_0_6b: 596_049_920,
    presets.qwen3_1_7b: 1_720_574_976,
    presets.qwen3_8b: 8_190_735_360,
    presets.deepseek_llm_7b: 6_910_365_696,
    presets.deepseek_llm_67b: 67_425_001_472,
    presets.mixtral_8x7b: 46_702_792_704,
    presets.qwen15_moe_a2_7b: 14_315_784_192,
    presets.qwen3_30b_a3b: 30_532_122_624,
    presets.deepseek_v2_lite: 15_706_484_224,
    presets.deepseek_v2: 235_741_434_880,
    presets.deepseek_v3: 671_026_419_200,
    presets.moonlight_16b_a3b: 15_960_110_208,
}


@pytest.mark.parametrize(("preset", "count"), PUBLISHED.items(), ids=[p.__name__ for p in PUBLISHED])
def test_published_parameter_counts(preset, count):
    params = jax.eval_shape(language_model(preset()).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert f"{count:,}" in preset.__doc__
    assert preset(dtype="bfloat16").dtype == "bfloat16"


def test_small_presets_follow_their_rule():
    config = presets.llama_like(100, 192, 3, max_length=64)
    assert (config.heads, config.ffn, config.head_size, config.layers) == (3, 512, 64, 3)
    assert tiny().ffn == 128 and tiny(32, layers=1).vocab_size == 32 and tiny(32, layers=1).layers == 1


BAD_CONFIGS = {
    "divisor": ({"kv_heads": 3}, "4 heads cannot share 3 kv_heads"),
    "width": ({"width": 18}, "width 18 is not a multiple of heads 4"),
    "odd": ({"head_dim": 5}, "head_dim is 5"),
    "remat": ({"remat": "some"}, "remat is 'some'"),
    "window": ({"window": 0}, "window is 0"),
    "alone": ({"window_layers": (0,)}, "together with a window"),
    "outside": ({"window": 2, "window_layers": (2,)}, r"outside 0\.\.1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_bad_calls_are_refused():
    model = language_model(small())
    params = jax.eval_shape(model.init, jax.random.key(0))

    def call(tokens, cache=None, **rest):
        jax.eval_shape(lambda p: model.apply(p, tokens, cache=cache, **rest), params)

    tokens = jnp.zeros((2, 6), jnp.int32)
    with pytest.raises(ValueError, match=r"shape \(6,\), expected \[B, T\]"):
        call(tokens[0])
    with pytest.raises(ValueError, match="float32, expected integers"):
        call(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"positions have shape \(1, 6\)"):
        call(tokens, positions=tokens[:1])
    with pytest.raises(ValueError, match="33 tokens exceed the config's max_length 32"):
        call(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match="cache of 33 columns was asked for"):
        model.init_cache(2, 33)
    with pytest.raises(ValueError, match="6 new tokens after 0 do not fit into a cache of 5 columns"):
        call(tokens, model.init_cache(2, 5))
    with pytest.raises(ValueError, match="6 new tokens after 4 do not fit into a cache of 8 columns"):
        call(tokens, model.init_cache(2, 8)._replace(length=jnp.int32(4)))
    with pytest.raises(ValueError, match="make it with the same model's init_cache"):
        call(tokens, model.init_cache(3, 8))
    with pytest.raises(ValueError, match="make it with the same model's init_cache"):
        call(tokens, language_model(small(layers=3)).init_cache(2, 8))


def test_module_and_functions_are_the_same_network():
    config = small()
    model, params, tokens = setup(config)
    hidden, _ = jax.jit(Transformer(config).apply)({"params": params}, tokens, mask=Causal())
    np.testing.assert_array_equal(hidden, model.apply(params, tokens)[0])
