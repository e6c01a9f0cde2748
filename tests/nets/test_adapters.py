"""LoRA and its variants, bottlenecks, merging: against loops in float64, and against the dense merged form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal
from jaxrl.nets import adapters
from jaxrl.nets.adapters.adapted import get, put
from jaxrl.nets.adapters.low_rank import column_norms
from jaxrl.nets.attention import Attention
from jaxrl.nets.language_model import logits
from jaxrl.nets.rope import rotation
from tests.nets import adapter_cases as cases
from tests.oracles import adapters as oracle

CONFIGS = {
    "lora": adapters.LoRAConfig(rank=3, alpha=5),
    "attention": adapters.LoRAConfig(rank=2, alpha=7, targets=("q", "v")),
    "rslora": adapters.LoRAConfig(rank=3, alpha=5, scaling="rank_stabilised"),
    "dora": adapters.LoRAConfig(rank=3, alpha=5, magnitude=True),
}


def made(name, **changes):
    """(model, base, adapter, params at the start, params with noise)."""
    _, model, base = cases.network(**changes)
    adapter = adapters.lora(CONFIGS[name])
    start = jax.jit(lambda base: adapter.init(jax.random.key(1), model, base))(base)
    return model, base, adapter, start, cases.stirred(start)


@pytest.mark.parametrize("name", CONFIGS)
def test_at_the_start_the_model_is_the_base(name):
    model, base, adapter, start, _ = made(name, qkv_bias=True, qk_norm=True)
    got = cases.forward(model, adapter)(base, start, cases.tokens())
    expected = jax.jit(model.apply)(base, cases.tokens())[0]
    if name == "dora":  # m / n, two norms computed in two programs
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_kernels_are_the_papers(name):
    config = CONFIGS[name]
    model, base, adapter, _, params = made(name)
    merged = adapters.merge(base, params, adapter).params
    for path in ("layers/attention/q", "layers/attention/v", "layers/ffn/down"):
        if path.rpartition("/")[2] not in config.targets:
            assert merged["layers"]["ffn"]["down"] is base["layers"]["ffn"]["down"]
            continue
        for n in range(2):
            part = {k: cases.layer(params, f"{path}/{k}", n) for k in ("a", "b")}
            magnitude = cases.layer(params, f"{path}/m", n) if config.magnitude else None
            stabilised = config.scaling == "rank_stabilised"
            sizes = {"rank": config.rank, "alpha": config.alpha, "stabilised": stabilised, "magnitude": magnitude}
            expected = oracle.lora_kernel(cases.layer(base, f"{path}/kernel", n), *part.values(), **sizes)
            np.testing.assert_allclose(cases.layer(merged, f"{path}/kernel", n), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_beside_the_base_is_as_merged(name):
    model, base, adapter, start, params = made(name)
    merged = adapters.merge(base, params, adapter).params
    got = cases.forward(model, adapter)(base, params, cases.tokens())
    expected = jax.jit(model.apply)(merged, cases.tokens())[0]
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
    away = cases.forward(model, adapter)(base, start, cases.tokens())
    assert np.abs(got - away).max() > 0.1


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_gradient_is_that_of_the_dense_form(name):
    model, base, adapter, _, params = made(name)
    ids = cases.tokens()

    def loss(hidden, base):
        return -jax.nn.log_softmax(logits(hidden, model.unembedding(base)))[:, :, 3].mean()

    def beside(params):
        return loss(adapters.adapt(model, base, adapter).apply(params, ids)[0], base)

    def dense(params):
        merged = base
        for path, part in adapter.ready(model, base, params).items():
            kernel = get(base, f"{path}/kernel") + part["down"] @ part["up"]
            if name == "dora":  # section 4.3: the norms are constants
                norms = jax.lax.stop_gradient(jnp.linalg.norm(kernel, axis=1))
                kernel = kernel * (get(params, f"{path}/m") / norms)[:, None]
            merged = put(merged, {f"{path}/kernel": kernel})
        return loss(model.apply(merged, ids)[0], base)

    got, expected = jax.jit(jax.grad(beside))(params), jax.jit(jax.grad(dense))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-4), got, expected)
    assert min(np.abs(g).max() for g in jax.tree.leaves(got)) > 1e-5


def test_norms_of_columns_without_the_sum():
    draw = np.random.default_rng(0)
    w, a, b = draw.normal(size=(2, 7, 5)), draw.normal(size=(2, 7, 3)), draw.normal(size=(2, 3, 5))
    got = column_norms(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, np.linalg.norm(w + a @ b, axis=1), rtol=1e-5)


def test_magnitudes_of_wide_layers_are_the_norms():
    """At a width where the CPU's compiler made NaN of norms with a B = 0 that it knew from the same program."""
    draw = np.random.default_rng(0)
    base = {"layers": {"gate": {"kernel": jnp.asarray(draw.normal(size=(2, 576, 1536)), jnp.float32)}}}
    adapter = adapters.lora(adapters.LoRAConfig(rank=16, targets=("gate",), magnitude=True))

    @jax.jit
    def one_program(base):
        params = adapter.init(jax.random.key(1), None, base)
        return params["layers"]["gate"]["m"], adapter.ready(None, base, params)["layers/gate"]["gain"]

    magnitudes, gain = one_program(base)
    expected = np.linalg.norm(np.asarray(base["layers"]["gate"]["kernel"], np.float64), axis=1)
    np.testing.assert_allclose(magnitudes, expected, rtol=1e-5)
    np.testing.assert_allclose(gain, 1.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_unmerging_restores_the_base(name, dtype):
    model, base, adapter, _, params = made(name)
    base = jax.tree.map(lambda x: x.astype(dtype), base)
    merged = adapters.merge(base, params, adapter)
    assert all(x.dtype == dtype for x in jax.tree.leaves(merged.params))
    rounded = adapters.unmerge(merged)
    step = float(jnp.finfo(dtype).eps)
    for path in merged.parts:
        kernel = lambda tree: np.asarray(get(tree, f"{path}/kernel"), np.float32)
        most = np.abs(kernel(base)).max() + np.abs(kernel(merged.params)).max()
        gain = merged.parts[path]["gain"]
        most = most * (1.0 if gain is None else float(1 + 1 / np.abs(gain).min()))
        np.testing.assert_allclose(kernel(rounded), kernel(base), atol=2 * step * most)
    restored = adapters.unmerge(merged, adapters.residual(base, merged))
    jax.tree.map(np.testing.assert_array_equal, restored, base)
    inside = jax.jit(adapters.unmerge)(merged, jax.jit(adapters.residual)(base, merged))
    jax.tree.map(np.testing.assert_array_equal, inside, base)
    assert any(np.abs(np.asarray(x, np.int64)).max() > 0 for x in adapters.residual(base, merged).values())


def test_decoding_reads_the_same_model():
    """Cached pieces equal the whole; the low-rank parts are computed at the first piece and travel with the cache."""
    model, base, adapter, _, params = made("dora")
    adapted, ids = adapters.adapt(model, base, adapter), cases.tokens()
    whole = cases.forward(model, adapter)(base, params, ids)
    cache, pieces = adapted.init_cache(2, 10), []
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        hidden, cache = adapted.apply(params, part, cache=cache)
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-5)
    held = cache.ready["layers/attention/q"]["gain"]
    np.testing.assert_allclose(held, adapter.ready(model, base, params)["layers/attention/q"]["gain"], rtol=1e-6)
    assert int(cache.length) == 10


def test_bottleneck_is_houlsbys():
    """Against the layer written out: h + gelu(h D + b) U + c after attention and after the feed-forward."""
    config, model, base = cases.network(layers=1)
    adapter = adapters.bottleneck(adapters.BottleneckConfig(width=5))
    start = adapter.init(jax.random.key(0), model, base)
    ids = cases.tokens()
    run = cases.forward(model, adapter)
    np.testing.assert_array_equal(run(base, start, ids), jax.jit(model.apply)(base, ids)[0])

    params = cases.stirred(start)
    one, own = jax.tree.map(lambda x: x[0], (base["layers"], params["layers"]))
    norm = lambda x, scale: x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps) * scale[None, None]

    def change(h, p):
        inner = jax.nn.gelu(h @ p["down"] + p["down_bias"][None, None])
        return h + inner @ p["up"] + p["up_bias"][None, None]

    def written_out(ids):
        x = base["embed"]["embedding"][ids]
        positions = jnp.broadcast_to(jnp.arange(10)[None], ids.shape)
        turned = rotation(positions, config.head_size, base=config.rope_base, scaling=None)
        normed = norm(x, one["attention_norm"]["scale"])
        y, _ = Attention(4, 2, 4).apply({"params": one["attention"]}, normed, *turned, Causal())
        x = x + change(y, own["attention"]["o"])
        z, kernel = norm(x, one["ffn_norm"]["scale"]), {name: one["ffn"][name]["kernel"] for name in one["ffn"]}
        z = (jax.nn.silu(z @ kernel["gate"]) * (z @ kernel["up"])) @ kernel["down"]
        return norm(x + change(z, own["ffn"]["down"]), base["norm"]["scale"])

    np.testing.assert_allclose(run(base, params, ids), written_out(ids), atol=2e-5)
    with pytest.raises(ValueError, match="no low-rank part"):
        adapters.merge(base, params, adapter)


def test_low_rank_beside_low_rank():
    """An adapter is no end: the adapted tree is a base again."""
    model, base, adapter, _, first = made("lora")
    second = cases.stirred(first, seed=2)
    ids = cases.tokens()
    once = adapter.graft(base, adapter.ready(model, base, first))
    twice = adapter.graft(once, adapter.ready(model, once, second))
    merged = adapters.merge(adapters.merge(base, first, adapter).params, second, adapter).params
    np.testing.assert_allclose(model.apply(twice, ids)[0], model.apply(merged, ids)[0], atol=2e-5)


def test_bfloat16_is_as_good_as_plain_bfloat16():
    """Both against float32: beside the base, bf16 errs at most twice as much as the merged kernels in bf16."""
    model, base, adapter, _, params = made("lora")
    half, ids = cases.network(dtype="bfloat16")[1], cases.tokens(8)
    exact = cases.forward(model, adapter)(base, params, ids)
    ours = cases.forward(half, adapter)(base, params, ids)
    plain = jax.jit(half.apply)(adapters.merge(base, params, adapter).params, ids)[0].astype(jnp.float32)
    error = lambda x: float(jnp.sqrt(jnp.square(x - exact).mean()))
    assert ours.dtype == jnp.bfloat16
    assert error(ours.astype(jnp.float32)) <= 2 * error(plain)


def test_of_the_base_shapes_are_enough():
    _, model, base = cases.network()
    shapes = jax.eval_shape(lambda: base)
    adapter = adapters.lora(CONFIGS["lora"])
    params = jax.jit(adapters.adapt(model, shapes, adapter).init)(jax.random.key(0))
    assert params["layers"]["ffn"]["down"]["a"].shape == (2, 24, 3)
    count = sum(x.size for x in jax.tree.leaves(params))
    sizes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    assert count == 2 * 3 * sum(a + b for a, b in sizes)
    bound = 24**-0.5
    a = np.asarray(params["layers"]["ffn"]["down"]["a"])
    assert np.abs(a).max() <= bound and np.abs(a).std() > 0.2 * bound


BAD = {
    "rank": (lambda: adapters.LoRAConfig(rank=0), "rank is 0"),
    "alpha": (lambda: adapters.LoRAConfig(alpha=0.0), "alpha 0.0"),
    "scaling": (lambda: adapters.LoRAConfig(scaling="more"), "scaling is 'more'"),
    "width": (lambda: adapters.BottleneckConfig(width=0), "width is 0"),
    "layer": (lambda: start(targets=("q", "x")), "targets are .*'x'.*expected some of the linear layers down, gate"),
    "unembed": (lambda: start(targets=("unembed",), tie_embeddings=False), "expected some of the linear layers"),
    "none": (lambda: start(targets=()), "targets are ()"),
    "other base": (lambda: other_base(), r"attention/q/kernel is a map of shape \(16, 16\), expected \(16, 32\)"),
}


def start(targets, **changes):
    _, model, base = cases.network(**changes)
    return adapters.lora(adapters.LoRAConfig(targets=targets)).init(jax.random.key(0), model, base)


def other_base():
    model, base, adapter, params, _ = made("lora")
    other = cases.network(head_dim=8)[1]
    return adapters.adapt(other, base, adapter).apply(params, cases.tokens())


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
