"""Multi-head latent attention: both forms, its cache, and the loops that use it. Parity with torch: test_golden.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import parallel
from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets import adapters, presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.rope import Yarn, score_factor
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.posttrain.slots import rollout_in_slots
from jaxrl.types import Prompts

LATENT = LatentConfig(kv_rank=12, nope=6, rope=4, value=5, q_rank=10)
CONFIG = presets.tiny(32, width=16, heads=4, kv_heads=4, ffn=24, max_length=64, latent=LATENT)


def changed(**latent):
    return dataclasses.replace(CONFIG, latent=dataclasses.replace(LATENT, **latent))


def network(config):
    """(model, params) with weights large enough that attention is not flat."""
    model = language_model(config)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0)))
    return model, params


@pytest.mark.parametrize("q_rank", [None, 10])
def test_absorbed_plain_and_uncached_forms_are_equal(q_rank):
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
    real = jnp.array([[1] * 9, [0, 0, 0] + [1] * 6])
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    found = {}
    for name, absorb in (("plain", 0), ("absorbed", 64)):
        model, params = network(changed(absorb=absorb, q_rank=q_rank))

        @jax.jit
        def cached(params, model=model):
            cache, found = model.init_cache(2, 12), []
            for part in (slice(0, 5), slice(5, 9)):
                mask = Causal() & Segments(real[:, part], jnp.pad(real, ((0, 0), (0, 3))))
                y, cache = model.apply(params, tokens[:, part], positions=positions[:, part], mask=mask, cache=cache)
                found.append(y)
            return jnp.concatenate(found, axis=1), cache

        found[name], cache = cached(params)
        assert cache.v is None and cache.k.shape == (2, 2, 1, 12, 16) and int(cache.length) == 9
    whole, _ = model.apply(params, tokens, positions=positions, mask=Causal() & Segments(real))
    live = np.asarray(real, bool)
    for y in found.values():
        np.testing.assert_allclose(y[live], whole[live], atol=1e-5)


def test_plain_form_is_the_formula():
    """A numpy loop over heads, from equations 9-19 of arXiv:2405.04434, one row, float64."""
    from jaxrl.nets.latent_attention import LatentAttention

    c, heads, t = LatentConfig(kv_rank=5, nope=3, rope=4, value=2, q_rank=6), 2, 4
    module = LatentAttention(heads, c)
    x = jax.random.normal(jax.random.key(0), (1, t, 8))
    angle = np.outer(np.arange(t), [1.0, 0.1])
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    params = module.init(jax.random.key(1), x, cos, sin, Causal())["params"]
    params = jax.tree.map(lambda p: p + 0.5 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    got, _ = module.apply({"params": params}, x, cos, sin, Causal())

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    h = np.asarray(x[0], np.float64)
    norm = lambda a, scale: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * scale

    def turned(a):  # neighbours are pairs
        z = (a[:, 0::2] + 1j * a[:, 1::2]) * np.exp(1j * angle)
        return np.stack([z.real, z.imag], -1).reshape(a.shape)

    down = h @ p["kv_down"]["kernel"]
    latent, shared = norm(down[:, :5], p["kv_down_norm"]["scale"]), turned(down[:, 5:])
    q = norm(h @ p["q_down"]["kernel"], p["q_down_norm"]["scale"]) @ p["q_up"]["kernel"]
    kv, out = latent @ p["kv_up"]["kernel"], []
    for i in range(heads):
        own_q, own = q[:, 7 * i : 7 * i + 7], kv[:, 5 * i : 5 * i + 5]
        scores = (own_q[:, :3] @ own[:, :3].T + turned(own_q[:, 3:]) @ shared.T) / np.sqrt(7)
        scores = np.where(np.tril(np.ones((t, t))) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out.append(weights / weights.sum(1, keepdims=True) @ own[:, 3:])
    np.testing.assert_allclose(got[0], np.concatenate(out, 1) @ p["o"]["kernel"], atol=1e-5)


def test_a_token_takes_576_numbers_of_deepseeks_cache():
    config = presets.deepseek_v3()
    cache = jax.eval_shape(lambda: language_model(config).init_cache(1, 1))
    numbers = sum(x.size for x in jax.tree.leaves((cache.k, cache.v))) // config.layers
    assert numbers == config.latent.cached == 576
    assert 2 * config.heads * 128 == 32_768  # of plain heads of 128


def test_yarn_multiplies_deepseeks_scores():
    assert score_factor(None) == score_factor(Yarn(40.0, 4096)) == 1.0
    np.testing.assert_allclose(score_factor(presets.deepseek_v3().rope_scaling), (0.1 * np.log(40) + 1) ** 2)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_the_sampler_draws_what_the_trainer_scores(cache_dtype):
    model, params = network(dataclasses.replace(CONFIG, cache_dtype=cache_dtype))
    prompts = Prompts(jnp.array([[0, 0, 3, 4], [5, 6, 7, 8]]), jnp.array([2, 4]))
    options = {"sampling": Sampling(max_tokens=6), "eos_id": 31, "pad_id": 0}
    own = jax.jit(lambda key: rollout(model, params, prompts, key, samples=2, **options))(jax.random.key(0))
    filled = rollout_in_slots(model, params, prompts, jax.random.key(1), slots=2, samples=2, **options)
    for out in (own, filled):
        scored = completion_log_probs(model, params, out)[0]
        mask = np.asarray(out.mask, bool)
        error = np.abs(np.asarray(out.log_probs - scored))[mask].max()
        assert error < (2e-5 if cache_dtype is None else 0.1), error


@pytest.mark.parametrize("spec", ["tensor=2,fsdp=2", "context=2,tensor=2"])
def test_on_a_mesh_it_is_that_of_one_device(spec):
    model, params = network(CONFIG)
    mesh = parallel.make_mesh(spec, devices=jax.devices()[:4])
    spread = parallel.model_on(CONFIG, mesh)
    laid = jax.device_put(params, parallel.state_shardings(params, mesh))
    assert laid["layers"]["attention"]["kv_up"]["kernel"].sharding.spec[2] == "tensor"
    tokens = jax.random.randint(jax.random.key(1), (4, 11), 0, 32)
    loss = lambda model: lambda params: jnp.sum(jnp.sin(model.apply(params, tokens)[0]))
    got, want = (jax.jit(jax.value_and_grad(loss(m)))(p) for m, p in ((spread, laid), (model, params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * jnp.abs(b).max()), got, want)

    def decoded(model, params):
        cache = model.init_cache(4, 12)
        y, cache = model.apply(params, tokens[:, :10], cache=cache)
        return model.apply(params, tokens[:, 10:], cache=cache)[0]

    np.testing.assert_allclose(jax.jit(decoded, static_argnums=0)(spread, laid), decoded(model, params), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 2}, "expected kv_heads = heads = 4"),
        ({"qk_norm": True}, "neither window nor qk_norm"),
        ({"latent": dataclasses.replace(LATENT, rope=3)}, "latent.rope is 3"),
        ({"qkv_bias": True}, "its matrices have none"),
        ({"latent": None, "rope_scaling": Yarn(4.0, 16, mscale_all_dim=1.0)}, "expected 0 without latent"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prefixes_are_refused(kind):
    """Latents are no keys: a prefix would be without effect."""
    model, params = network(CONFIG)
    config = {"prefix": adapters.PrefixConfig, "prompt": adapters.PromptConfig}[kind](length=2)
    adapter = {"prefix": adapters.prefix, "prompt": adapters.prompt}[kind](config)
    with pytest.raises(ValueError, match="no latent, linear or first dense ones"):
        tree = adapter.init(jax.random.key(0), model, params)
        adapter.graft(params, adapter.ready(model, params, tree))
