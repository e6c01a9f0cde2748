"""Linear and sparse attention as settings of the Transformer: forms, caches, masks, parity, laws, and the loops."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl import loop
from jaxrl.kernels.attention import Causal, Chunked, Full, Prefix, Segments, Strided, Window
from jaxrl.kernels.linear_attention import linear_attention
from jaxrl.nets import presets
from jaxrl.nets.attention import rectified
from jaxrl.nets.documents import documents
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.linear_attention import (
    LinearAttention,
    LinearConfig,
    log_decays,
    positive_features,
    random_projection,
    redraw,
    relu_features,
)
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.transformer import TransformerConfig, router_statistics
from jaxrl.posttrain import grpo, sft, update
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.posttrain.slots import rollout_in_slots
from jaxrl.types import Prompts, TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
GOLDEN = Path(__file__).parents[1] / "golden" / "linear.npz"

DECODER = {"vocab_size": 16, "width": 16, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 24, "max_length": 32}
LIGHTNING = dataclasses.replace(presets.LIGHTNING, kv_heads=4)
RETENTION = LinearConfig("identity", normalise=False, norm="heads", decay="retention", gate="silu")
NORM = LinearConfig("elu+1", normalise=False, norm="all")
FORMS = {
    "linear": {"linear": LinearConfig()},
    "performer": {"linear": LinearConfig("performer", random=8)},
    "performer_relu": {"linear": LinearConfig("performer_relu", random=8, kv_heads=4), "positions": "learned"},
    "retention": {"linear": RETENTION},
    "lightning": {"linear": LIGHTNING, "linear_layers": (0, 2), "residual": 1.5, "embed_norm": True,
                  "norm_place": "post"},
    "t1": {"linear": dataclasses.replace(NORM, features="elu"), "linear_layers": (2, 3), "pattern": Chunked(4),
           "rectified": True},
    "t2": {"linear": NORM, "linear_layers": (2, 3), "pattern": Chunked(4)},
    "sparse": {"pattern": Strided(3)},
}  # fmt: skip


def forms(*quick):
    """All of them, of which these alone are not slow."""
    return [form if form in quick else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]


BY_COLUMN = ("t1", "t2")  # blocks begin where rows do, not where documents do


def draw(*shape, seed=0, std=1.0):
    return np.random.default_rng([seed, *shape]).normal(0, std, shape).astype(np.float32)


@functools.cache
def network(form, **changes):
    """(config, model, params), kernels spread out."""
    config = TransformerConfig(**(DECODER | FORMS[form] | changes))
    model = language_model(config)

    def leaf(path, x):
        name = path[-1].key
        std = 1.0 if name == "projection" else 0.3
        return jnp.asarray((name == "scale") + draw(*x.shape, seed=len(jax.tree_util.keystr(path)), std=std), x.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return config, model, jax.tree.map_with_path(leaf, shapes)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 10)), jnp.int32)
REAL = jnp.array([[1] * 10, [0] * 4 + [1] * 6])
POSITIONS = jnp.maximum(jnp.cumsum(REAL, axis=1) - 1, 0)


@pytest.mark.parametrize("form", forms("linear", "lightning"))
def test_all_forms_are_equal(form):
    """Whole, token by token, through a cache in pieces; padded on the left; a packed document as if it stood alone."""
    config, model, params = network(form)
    recurrent = config.linear and dataclasses.replace(config.linear, implementation="recurrent")
    by_token = language_model(dataclasses.replace(config, linear=recurrent))

    @jit
    def run(params):
        mask = Causal() & Segments(REAL)
        found = {"whole": model.apply(params, TOKENS, positions=POSITIONS, mask=mask)[0]}
        if recurrent:
            found["recurrent"] = by_token.apply(params, TOKENS, positions=POSITIONS, mask=mask)[0]
        cache, pieces, columns = model.init_cache(2, 12), [], jnp.pad(REAL, ((0, 0), (0, 2)))
        for part in (slice(0, 4), slice(4, 9), slice(9, 10)):
            mask = Causal() & Segments(columns, columns)
            y, cache = model.apply(params, TOKENS[:, part], positions=POSITIONS[:, part], mask=mask, cache=cache)
            pieces.append(y)
        found["cached"] = jnp.concatenate(pieces, axis=1)
        ids, positions = jnp.array([[3] * 4 + [5] * 6]), jnp.array([[*range(4), *range(6)]])
        packed = model.apply(params, TOKENS[1:], positions=positions, mask=Causal() & Segments(ids))[0]
        return found, packed, model.apply(params, TOKENS[1:, 4:])[0]

    found, packed, alone = run(params)
    for name in found:
        np.testing.assert_allclose(found[name], found["whole"], atol=3e-5, err_msg=name)
    if form not in BY_COLUMN:
        np.testing.assert_allclose(packed[:, 4:], alone, atol=3e-5)
        np.testing.assert_allclose(found["whole"][1, 4:], alone[0], atol=3e-5)


def test_the_layer_is_its_formula():
    """A loop over heads and pairs in float64: decay, norm by head, gate; and weights that sum to one."""
    x, t, size = draw(1, 5, 8).astype(np.float64), 5, 4
    for linear in (RETENTION, LinearConfig()):
        module = LinearAttention(4, 2, size, linear=linear)
        params = module.init(jax.random.key(0), jnp.asarray(x, jnp.float32), None, None, Causal())["params"]
        params = jax.tree.map_with_path(lambda path, p: draw(*p.shape, seed=len(path), std=0.5), params)
        got = module.apply({"params": params}, jnp.asarray(x, jnp.float32), None, None, Causal())[0]
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        q, k, v = (x[0] @ p[name]["kernel"] for name in "qkv")
        heads = []
        for h in range(4):
            own, shared = slice(size * h, size * (h + 1)), slice(size * (h // 2), size * (h // 2 + 1))
            phi = (lambda a: a) if linear is RETENTION else (lambda a: np.where(a > 0, a + 1, np.exp(a)))
            decay, out = (1 - 2.0 ** (-5 - h) if linear is RETENTION else 1.0), []
            for i in range(t):
                weights = [phi(q[i, own]) @ phi(k[j, shared]) * decay ** (i - j) for j in range(i + 1)]
                o = sum(w * v[j, shared] for j, w in enumerate(weights))
                out.append(o if linear is RETENTION else o / (sum(weights) + 1e-6))
            heads.append(np.array(out))
        if linear is RETENTION:
            gate = x[0] @ p["gate"]["kernel"]
            normed = [o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * p["out_norm"]["scale"] for o in heads]
            heads = [np.concatenate(normed, 1) * gate / (1 + np.exp(-gate))]
        np.testing.assert_allclose(got[0], np.concatenate(heads, 1) @ p["o"]["kernel"], atol=1e-5)


def test_without_causal_a_token_sees_its_whole_document():
    module = LinearAttention(4, 2, 4, linear=LinearConfig())
    x, ids = jnp.asarray(draw(2, 9, 8)), jnp.array([[0] * 4 + [1] * 5])
    variables = module.init(jax.random.key(0), x, None, None, Full())
    apply = lambda x, mask: module.apply(variables, x, None, None, mask)[0]
    alone = jnp.concatenate([apply(x[:, :4], Full()), apply(x[:, 4:], Full())], axis=1)
    np.testing.assert_allclose(apply(x, Full() & Segments(ids)), alone, atol=1e-6)


def test_performers_kernels_are_those_of_its_package():
    with np.load(GOLDEN) as arrays:
        stored = {k.removeprefix("performer/"): jnp.asarray(arrays[k]) for k in arrays if k.startswith("performer/")}
    q, k, v, w = (stored[name] for name in "qkvw")
    mapped = {
        "softmax": (positive_features(q, w, largest=True), positive_features(k, w)),
        "relu": (relu_features(q, w), relu_features(k, w)),
    }
    for name, (a, b) in mapped.items():
        for causal in (True, False):
            got = linear_attention(a, b, v, normalise=True, eps=0.0, causal=causal)
            np.testing.assert_allclose(got, stored[name + "_causal" * causal], atol=2e-5)


def test_the_positive_estimator_is_unbiased_and_its_variance_is_the_formula():
    """E phi(q) . phi(k) = SM and, of one feature, Var = SM^2 (exp(|q' + k'|^2) - 1), SM = exp(q . k / sqrt(Dh))."""
    q, k = draw(1, 8, seed=1), draw(1, 8, seed=2)
    both = lambda: (q + k) * 8**-0.25
    scale = np.sqrt(0.3 / (both() ** 2).sum())
    q, k = q * scale, k * scale
    w = random_projection(jax.random.key(0), 20_000, 8, orthogonal=False)
    each = np.asarray(positive_features(q, w) * positive_features(k, w), np.float64)[0] * 20_000
    kernel = np.exp((q * k).sum() / np.sqrt(8))
    variance = kernel**2 * (np.exp((both() ** 2).sum()) - 1)
    assert abs(each.mean() - kernel) < 4 * np.sqrt(variance / 20_000)
    np.testing.assert_allclose(each.var(), variance, rtol=0.1)


def error(orthogonal, features, size=8):
    """Mean squared relative error of phi(q) . phi(q), |q'|^2 = 0.3, over 16 directions of q and 1000 draws."""
    q = jnp.asarray(draw(16, size))
    q = q / jnp.linalg.norm(q, axis=1, keepdims=True) * 0.3**0.5 * size**0.25

    def one(key):
        w = random_projection(key, features, size, orthogonal=orthogonal)
        return jnp.sum(jnp.square(positive_features(q, w)), axis=1) / jnp.exp(0.3) - 1

    return float(jnp.square(jax.vmap(one)(jax.random.split(jax.random.key(1), 1000))).mean())


def test_orthogonal_directions_estimate_better_and_are_orthogonal():
    """By theorem 2 of arXiv:2009.14794: (1 - 1 / m) 2 / (d + 2) (1 - exp(-(|q'|^2 + |k'|^2) / 2) / SM)^2, at least."""
    independent = lambda m: (np.exp(4 * 0.3) - 1) / m
    gain = 7 / 8 * 2 / 10 * (1 - np.exp(-0.6)) ** 2
    np.testing.assert_allclose(error(False, 8), independent(8), rtol=0.08)
    np.testing.assert_allclose(error(False, 32), independent(32), rtol=0.08)
    assert error(True, 8) < independent(8) - gain
    w = np.asarray(random_projection(jax.random.key(2), 11, 4, row_norms="sqrt"))
    np.testing.assert_allclose(w[:4] @ w[:4].T, 4 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w, axis=1), 2.0, rtol=1e-5)
    many = jax.vmap(lambda key: random_projection(key, 4, 4))(jax.random.split(jax.random.key(3), 2000))
    np.testing.assert_allclose(many.mean(0), 0.0, atol=0.12)  # no direction is preferred
    np.testing.assert_allclose(jnp.square(many).mean(), 1.0, rtol=0.05)


def test_projections_are_constants_until_they_are_drawn_anew():
    config, model, params = network("performer")
    last = TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % 16)

    @jit
    def run(params):
        grads = jax.grad(lambda p: jnp.square(model.apply(p, TOKENS)[0][..., 0]).sum())(params)
        return grads, [model.apply(params, x)[0][:, :-1] for x in (TOKENS, last)]

    grads, (before, after) = run(params)
    np.testing.assert_array_equal(before, after)  # to the bit: no key's scale depends on later ones
    assert not np.any(grads["linear_layers"]["attention"]["projection"])
    assert np.any(grads["linear_layers"]["attention"]["q"]["kernel"])
    new = redraw(config.linear, params, jax.random.key(5))
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), params, new)
    assert [path[-1].key for path, x in jax.tree.leaves_with_path(moved) if x] == ["projection"]
    drawn = new["linear_layers"]["attention"]["projection"]
    assert drawn.shape == (4, 8, 4) and len(np.unique(np.round(drawn, 4))) > 100


def test_norm_attention_has_unit_size_at_every_position():
    module = LinearAttention(4, 4, 4, linear=NORM)
    x = jnp.asarray(draw(1, 40, 16))
    params = module.init(jax.random.key(0), x, None, None, Causal())["params"]
    params = params | {"o": {"kernel": jnp.eye(16)}, "v": {"kernel": 50 * params["v"]["kernel"]}}
    y = module.apply({"params": params}, x, None, None, Causal())[0]
    np.testing.assert_allclose(jnp.sqrt(jnp.square(y).mean(-1)), 1.0, atol=1e-3)


def test_gradients_of_scaled_weights_are_unbounded_and_those_of_softmax_are_not():
    """P = s / sum s: scores times c leave P and divide dP / ds by c (arXiv:2210.10340, section 3.1)."""
    eye = jnp.eye(6)[None, :, None]

    def shares(s):
        q = jnp.broadcast_to(s, (1, 6, 1, 6))
        return linear_attention(q, eye, eye, normalise=True, eps=0.0, causal=False)[0, 0, 0]

    s = jnp.asarray(np.abs(draw(6)) + 0.1)
    slopes = {c: jax.jacobian(shares)(c * s) for c in (1.0, 0.01)}
    np.testing.assert_allclose(shares(0.01 * s), shares(s), rtol=1e-5)
    np.testing.assert_allclose(slopes[0.01], 100 * slopes[1.0], rtol=1e-4)
    assert np.abs(slopes[0.01]).max() > 0.25
    assert np.abs(jax.jacobian(jax.nn.softmax)(0.01 * s)).max() <= 0.25


def test_rectified_attention_is_its_formula():
    q, k, v = draw(1, 7, 4, 8), draw(1, 7, 2, 8, seed=1), draw(1, 7, 2, 8, seed=2)
    got = rectified(*map(jnp.asarray, (q, k, v)), mask=Causal() & Chunked(3))
    for h in range(4):
        for i in range(7):
            keys = range(i - i % 3, i + 1)
            want = sum(max(q[0, i, h] @ k[0, j, h // 2] / np.sqrt(8), 0) * v[0, j, h // 2] for j in keys)
            np.testing.assert_allclose(got[0, i, h], want, atol=1e-5)


def test_a_pattern_is_laid_over_the_mask():
    _, model, params = network("sparse")
    plain = language_model(TransformerConfig(**DECODER))
    want = jit(lambda p: plain.apply(p, TOKENS, mask=Causal() & Strided(3))[0])(params)
    np.testing.assert_allclose(jit(lambda p: model.apply(p, TOKENS)[0])(params), want, atol=1e-6)
    first = language_model(TransformerConfig(**DECODER, pattern=Chunked(1), window_layers=(0, 1, 2, 3)))
    some = language_model(TransformerConfig(**DECODER, pattern=Chunked(1), window_layers=(1, 2, 3)))
    other = TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % 16)
    seen = lambda m: jit(lambda p: jnp.abs(m.apply(p, TOKENS)[0] - m.apply(p, other)[0])[:, -1].max())(params)
    assert seen(first) == 0.0 < seen(some)


def test_masks_that_a_state_cannot_follow():
    for mask, name in ((Causal() & Window(3), "Window"), (Causal() | Prefix(jnp.array([2])), "Or")):
        with pytest.raises(ValueError, match=f"cannot follow the mask {name}"):
            documents(mask, 2, 10)
    _, model, params = network("linear")
    with pytest.raises(ValueError, match="a cache got a mask without Causal"):
        model.apply(params, TOKENS, mask=Full(), cache=model.init_cache(2, 12))
    with pytest.raises(ValueError, match=r"Segments: q_ids has shape \(2, 7\)"):
        model.apply(params, TOKENS, mask=Causal() & Segments(REAL[:, :7]))
    causal, starts = documents(Causal() & Segments(jnp.array([[7, 7, 2, 2]])), 1, 2, 2)
    assert causal and starts.tolist() == [[True, False]]


@pytest.mark.parametrize("form", forms("lightning"))
def test_the_sampler_draws_what_the_trainer_scores(form):
    _, model, params = network(form)
    prompts = Prompts(TOKENS[:, :4], jnp.array([2, 4]))
    options = {"sampling": Sampling(max_tokens=5), "eos_id": 15, "pad_id": 0, "samples": 2}

    @jit
    def run(params, key):
        out = rollout(model, params, prompts, key, **options)
        return out, completion_log_probs(model, params, out)[0]

    out, scored = run(params, jax.random.key(0))
    np.testing.assert_allclose(np.where(out.mask, out.log_probs - scored, 0.0), 0.0, atol=3e-5)
    if form == "sparse":
        return
    with pytest.raises(ValueError, match="decode with rollout"):
        rollout_in_slots(model, params, prompts, jax.random.key(1), slots=2, **options)


def test_a_state_does_not_grow():
    for form in ("linear", "performer"):
        _, model, _ = network(form)
        shapes = [jax.eval_shape(lambda n=n, m=model: m.init_cache(2, n)) for n in (1, 32)]
        assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
        assert shapes[0].columns is None and shapes[0].k.states.dtype == jnp.float32
    _, model, params = network("lightning", cache_dtype="int8", dtype="bfloat16")
    step = lambda p, c: model.apply(p, TOKENS[:, :1], cache=c)
    cache = jax.eval_shape(lambda: model.init_cache(2, 8))
    hidden, after = jax.eval_shape(step, params, cache)
    assert hidden.dtype == jnp.bfloat16 and jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
        lambda x: x.dtype, cache
    )


@pytest.mark.parametrize("form", forms("performer"))
def test_sft_trains_every_form(form):
    _, model, params = network(form)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    recipe = sft.make(sft.SFTConfig(batch=2), model, optimizer)
    data = TokenBatch(TOKENS, jnp.ones((2, 10)))
    state = recipe.init(jax.random.key(0), params)
    state, metrics = jit(lambda state: jax.lax.scan(lambda s, _: recipe.step(s, data), state, length=12))(state)
    assert metrics["train/loss"][-1] < 0.7 * metrics["train/loss"][0] and int(state.skipped) == 0
    held = lambda p: [x for path, x in jax.tree.leaves_with_path(p) if path[-1].key == "projection"]
    jax.tree.map(np.testing.assert_array_equal, held(state.params), held(params))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_grpo_trains_every_form(form):
    """Sampler and trainer agree on policy, and the reward (even tokens) rises."""
    _, model, params = network(form)
    problems = grpo.Problems(Prompts(TOKENS[:, :4], jnp.array([2, 4])), jnp.zeros(2))
    config = grpo.GRPOConfig(prompts=2, group=8, kl_coef=0.0, sampling=Sampling(max_tokens=6))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    recipe = grpo.make(config, model, optimizer, eos_id=1, pad_id=0)
    even = lambda rollout, _: ((rollout.completions % 2 == 0) * rollout.mask).sum(1) / rollout.lengths
    step = grpo.fused(recipe, even, config)
    (result,) = loop.run(step, recipe.init(jax.random.key(0), params), problems, steps=20, chunk=20)
    np.testing.assert_allclose(result.metrics[0]["policy/ratio_mean"], 1.0, atol=1e-4)
    assert result.metrics[-1]["reward/mean"] > result.metrics[0]["reward/mean"] + 0.1


def equations(jaxpr):
    inner = [v for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values())) if hasattr(v, "jaxpr")]
    return len(jaxpr.eqns) + sum(equations(getattr(v, "jaxpr", v)) for v in inner)


def test_the_program_does_not_grow_with_depth():
    alternating = lambda n: {"linear": LIGHTNING, "linear_layers": tuple(i for i in range(n) if i % 4 != 3)}
    sizes = set()
    for layers in (8, 32):
        model = language_model(TransformerConfig(**(DECODER | {"layers": layers} | alternating(layers))))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        program = lambda p, m=model: m.apply(p, TOKENS, cache=m.init_cache(2, 12))[0].sum()
        sizes.add(equations(jax.make_jaxpr(jax.grad(program))(shapes).jaxpr))
    assert len(sizes) == 1


def test_stacks_by_kind():
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    shapes = jax.eval_shape(language_model(presets.minimax_text_01()).init, jax.random.key(0))
    assert count(shapes) == 456_089_655_296  # of transformers' class
    assert shapes["periods"]["linear_layers"]["attention"]["gate"]["kernel"].shape == (10, 7, 6144, 8192)
    assert shapes["periods"]["layers"]["attention"]["k"]["kernel"].shape == (10, 1, 6144, 1024)
    shapes = jax.eval_shape(language_model(presets.transnormer(32, 64, 6, "t1")).init, jax.random.key(0))
    assert shapes["layers"]["attention"]["out_norm"]["scale"].shape == (3, 64)
    assert shapes["linear_layers"]["attention"]["out_norm"]["scale"].shape == (3, 64)
    odd = TransformerConfig(**DECODER, linear=NORM, linear_layers=(0, 3))
    assert set(jax.eval_shape(language_model(odd).init, jax.random.key(0))) >= {"linear_layers", "layers"}
    assert "run_2_linear_layers" in jax.eval_shape(language_model(odd).init, jax.random.key(0))
    mixed = TransformerConfig(**DECODER, **FORMS["lightning"], experts=MoEConfig(4, 2, 8))
    shapes = jax.eval_shape(language_model(mixed).init, jax.random.key(0))
    load = jax.eval_shape(lambda params: router_statistics(mixed, params, TOKENS), shapes)
    assert load.load.shape == (4, 4) and load.entropy.shape == (4,)


def test_decays():
    np.testing.assert_allclose(jnp.exp(log_decays("retention", 3, 0, 1)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
    got = [float(log_decays("lightning", 4, layer, 5)[1]) for layer in (0, 4)]
    np.testing.assert_allclose(got, [-(2**-4) * (1 + 1e-5), -(2**-4) * (1e-5 + 1e-5 / 4)], rtol=2e-2)


def test_configs_survive_json():
    config = TransformerConfig(**DECODER, **FORMS["lightning"])
    assert configuration.from_json(TransformerConfig, configuration.to_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_layers": (0,)}, "together with a linear"),
        ({"linear": NORM, "linear_layers": (4,)}, r"linear_layers \(4,\) names layers outside 0..3"),
        ({"linear": LIGHTNING, "causal": False}, "without causal"),
        ({"linear": dataclasses.replace(NORM, kv_heads=3)}, "4 heads cannot share 3 linear.kv_heads"),
        ({"linear": NORM, "linear_layers": (0,), "share_layers": True}, "are all alike"),
        ({"linear": NORM, "latent": LatentConfig(12, 6, 4, 5), "kv_heads": 4}, "give linear.rotary=False"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(DECODER | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "tanh"}, "linear.features is 'tanh'"),
        ({"features": "silu"}, "sums of weights of either sign may vanish"),
        ({"decay": "half"}, "linear.decay is 'half'"),
        ({"random": 0}, "expected at least one feature"),
    ],
)
def test_bad_linear_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LinearConfig(**changes)
