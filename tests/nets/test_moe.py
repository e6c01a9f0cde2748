"""Mixture of experts: gatings and losses against their papers, the layer against torch, its way of balancing."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.nets import moe
from jaxrl.nets.layers import FeedForward
from jaxrl.nets.moe import GATINGS, MoE, MoEConfig
from jaxrl.posttrain import update

path = pathlib.Path(__file__).parents[1] / "oracles" / "moe.py"
spec = importlib.util.spec_from_file_location("moe_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
replace = dataclasses.replace
route = jit(moe.route, static_argnums=0)

SMALL = {
    "switch": {"experts": 5, "ffn": 6},
    "gshard": {"experts": 6, "ffn": 6},
    "mixtral": {"experts": 6, "ffn": 6},
    "qwen_moe": {"experts": 6, "top_k": 3, "ffn": 6, "shared": 10},
    "qwen3_moe": {"experts": 6, "top_k": 3, "ffn": 6},
    "deepseek_v2": {"experts": 12, "top_k": 4, "ffn": 6, "shared": 12, "groups": 4, "top_groups": 2},
    "deepseek_v2_lite": {"experts": 6, "top_k": 3, "ffn": 6, "shared": 12},
    "deepseek_v3": {"experts": 12, "top_k": 4, "ffn": 6, "shared": 6, "groups": 4, "top_groups": 2},
}


def small(name, **changes):
    return replace(GATINGS[name], **(SMALL[name] | changes))


def draw(*shape, seed=0, std=1.0):
    return np.random.default_rng([seed, *shape]).normal(0, std, shape).astype(np.float32)


def gates_of(config, row, bias):
    """The oracle's gates of the logits [T, E] of a row."""
    c = config
    return {
        "switch": lambda: oracle.switch(row, c.capacity_factor)[0],
        "gshard": lambda: oracle.gshard(row, c.capacity_factor)[0],
        "mixtral": lambda: oracle.mixtral(row, c.top_k),
        "qwen_moe": lambda: oracle.qwen_moe(row, c.top_k),
        "qwen3_moe": lambda: oracle.mixtral(row, c.top_k),  # the same, written differently
        "deepseek_v2": lambda: oracle.deepseek_v2(row, c.top_k, c.groups, c.top_groups, c.scale),
        "deepseek_v2_lite": lambda: oracle.qwen_moe(row, c.top_k),
        "deepseek_v3": lambda: oracle.deepseek_v3(row, bias, c.top_k, c.groups, c.top_groups, c.scale),
    }


def as_gates(routed):
    """{expert: weight} of each token, from arrays."""
    kept = np.ones(routed.ids.shape, bool) if routed.kept is None else routed.kept
    return [
        [{int(e): w for e, w, k in zip(*token, strict=True) if k} for token in zip(*row, strict=True)]
        for row in zip(*(np.asarray(a) for a in (routed.ids, routed.weights, kept)), strict=True)
    ]


def assert_same_gates(got, want):
    assert [set(gates) for gates in got] == [set(gates) for gates in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose([a[e] for e in sorted(a)], [b[e] for e in sorted(b)], rtol=1e-5)


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("name", SMALL)
def test_gatings_are_those_of_their_papers(name, length):
    config = small(name)
    logits, bias = draw(3, length, config.experts, std=1.5), draw(config.experts, seed=1, std=0.3)
    routed = route(config, logits, bias if config.bias else None)
    assert routed.ids.dtype == jnp.int32 and routed.weights.dtype == jnp.float32
    for got, row in zip(as_gates(routed), logits, strict=True):
        assert_same_gates(got, gates_of(config, row.astype(np.float64), bias)[name]())


def test_over_capacity_first_choices_go_before_second_ones():
    """Skewed, so that much is dropped; GShard's second experts with its random draws."""
    config = small("gshard", capacity_factor=0.8)
    logits, key = draw(2, 24, 6) + np.linspace(2, 0, 6, dtype=np.float32), jax.random.key(3)
    uniform = np.asarray(jax.random.uniform(jax.random.clone(key), (2, 24)))
    routed = route(config, logits, key=key)
    for got, row, u in zip(as_gates(routed), logits, uniform, strict=True):
        want, loss = oracle.gshard(row.astype(np.float64), 0.8, u)
        assert_same_gates(got, want)
        assert 8 < sum(map(len, got)) < 40  # else nothing is tested
    ours = moe.auxiliary_losses(config, jnp.asarray(logits[1:]), routed.ids[1:])["balance"]
    np.testing.assert_allclose(ours / 24 / 6**2, loss, rtol=1e-5)


@pytest.mark.parametrize(("name", "capacity_factor"), [("gshard", 0.8), ("switch", 0.7)])
def test_padding_takes_no_room_and_adds_none(name, capacity_factor):
    """Tokens anywhere in a row go where they go without what stands between them."""
    config = small(name, capacity_factor=capacity_factor)
    logits, real = draw(3, 24, config.experts, std=1.5), np.random.default_rng(0).random((3, 24)) < 0.6
    real[2] = False
    for got, row, own in zip(as_gates(route(config, logits, real=real)), logits, real, strict=True):
        assert not any(gates for gates, is_real in zip(got, own, strict=True) if not is_real)
        tokens = [gates for gates, is_real in zip(got, own, strict=True) if is_real]
        if own.any():
            assert_same_gates(tokens, gates_of(config, row[own].astype(np.float64), None)[name]())
            assert sum(map(len, tokens)) < config.top_k * own.sum()  # else nothing is tested


def test_rooms_are_whole_numbers_where_the_factor_makes_them_so():
    """ceil(c k N / E) of every N, c k N first: 1.1 * 10 / 11 is 1 and not a bit more."""
    config = MoEConfig(11, 1, 1, capacity_factor=1.1)
    routed = route(config, jnp.zeros((1, 40, 11)), real=jnp.arange(40)[None] < 10)
    assert int(routed.kept.sum()) == 1


def test_switch_loss_is_that_of_its_paper():
    config, logits = small("switch", capacity_factor=0.7), draw(1, 40, 5, std=2.0)
    routed = route(config, logits)
    gates, loss = oracle.switch(logits[0].astype(np.float64), 0.7)
    assert_same_gates(as_gates(routed)[0], gates)
    assert 8 < sum(map(len, gates)) < 32  # else nothing is tested
    ours = moe.auxiliary_losses(config, jnp.asarray(logits), routed.ids)["balance"] / 40
    np.testing.assert_allclose(ours, loss, rtol=1e-5)


def test_noisy_top_k_is_that_of_its_paper():
    config = MoEConfig(6, 2, 1, normalise=True, noisy=True)
    logits, spread, key = draw(2, 9, 6), draw(2, 9, 6, seed=1), jax.random.key(0)
    noise = np.asarray(jax.random.normal(jax.random.clone(key), logits.shape), np.float64)
    routed = route(config, moe.noised(logits, spread, key))
    changed = False
    for got, *row in zip(as_gates(routed), logits, spread, noise, strict=True):
        assert_same_gates(got, oracle.noisy_top_k(*row, 2))
        changed |= [set(gates) for gates in got] != [set(gates) for gates in oracle.mixtral(row[0], 2)]
    assert changed


def test_noise_of_the_layer_begins_as_log_2_and_is_learnt():
    """softplus(0) with the matrix of zeros that is drawn; a gradient reaches the matrix, in training alone."""
    module, params, x = layer(MoEConfig(4, 2, 6, gated=False, activation="relu", normalise=True, noisy=True))
    assert not np.any(jit(module.init)(jax.random.key(0), x)["params"]["router_noise"]["kernel"])
    of = lambda p, rngs: jnp.sum(jnp.sin(module.apply({"params": p}, x, rngs=rngs)))
    learnt, scored = (jit(jax.grad(of))(params, rngs) for rngs in ({"router": jax.random.key(0)}, {}))
    assert np.any(learnt["router_noise"]["kernel"]) and not np.any(scored["router_noise"]["kernel"])


def test_capacity_of_evaluation():
    """With a key the one of training, without one the other."""
    config, logits = small("switch", capacity_factor=0.5, eval_capacity_factor=2.0), draw(2, 24, 5, std=1.5)
    assert config.draws and config.drops
    for key, factor in ((jax.random.key(0), 0.5), (None, 2.0)):
        for got, row in zip(as_gates(route(config, logits, key=key)), logits, strict=True):
            assert_same_gates(got, oracle.switch(row.astype(np.float64), factor)[0])


def test_even_choices_or_even_probabilities_cost_one_per_token():
    config = MoEConfig(4, 2, 1)
    ids = jnp.array([[[0, 1], [2, 3]]])
    losses = moe.auxiliary_losses(config, jnp.asarray(draw(1, 2, 4)), ids)
    np.testing.assert_allclose([losses["balance"], losses["sequence"]], 2.0, rtol=1e-6)
    losses = moe.auxiliary_losses(config, jnp.zeros((1, 2, 4)), jnp.array([[[0, 1], [0, 1]]]))
    np.testing.assert_allclose([losses["balance"], losses["sequence"]], 2.0, rtol=1e-6)


LIVE = {"all": lambda b, t: (b >= 0) & (t >= 0), "some": lambda b, t: t < 3 + 4 * b, "none": lambda b, t: b < 0}


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("name", ["mixtral", "gshard", "deepseek_v3"])
def test_auxiliary_losses_and_their_gradients(name, live):
    """Values by the oracle; gradients by its finite differences, counts held."""
    config = small(name)
    logits = draw(3, 7, config.experts, std=1.5)
    live = LIVE[live](*np.ogrid[:3, :7])
    ids = np.asarray(route(config, logits).ids)
    of = functools.partial(moe.auxiliary_losses, config)
    got, gradients = jit(lambda x: (of(x, ids, live), jax.jacobian(lambda x: of(x, ids, live))(x)))(logits)
    counted = config.top_k if config.bias else None
    want = functools.partial(oracle.losses, ids=ids, live=live, score=config.score, choices=config.aux_choices,
                             top_k_for_sequence=counted)  # fmt: skip
    step, logits = draw(*logits.shape, seed=5), logits.astype(np.float64)
    values, ends = want(logits), [want(logits + e * step) for e in (1e-6, -1e-6)]
    for loss in ("balance", "sequence", "z"):
        np.testing.assert_allclose(got[loss], values[loss], rtol=1e-5, atol=1e-6)
        slope = (ends[0][loss] - ends[1][loss]) / 2e-6
        np.testing.assert_allclose(np.sum(gradients[loss] * step), slope, rtol=1e-3, atol=1e-4)


# the layer


@functools.cache
def layer(config, dtype="float32", b=2, t=9, d=8):
    """(module, params, x) with parameters that spread."""
    module = MoE(config, dtype=dtype)
    x = jnp.asarray(draw(b, t, d))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    params = [jnp.asarray(draw(*s.shape, seed=i, std=0.5), s.dtype) for i, s in enumerate(leaves)]
    return module, jax.tree.unflatten(structure, params), x


def expected(config, params, x):
    """The layer by the oracle, in float64."""
    name = next(name for name, sizes in SMALL.items() if small(name) == config)
    params, rows = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    out = []
    for row in rows:
        gates = gates_of(config, row @ params["router"]["kernel"], params.get("bias"))[name]()
        form = (oracle.swiglu, ("gate", "up", "down")) if config.gated else (oracle.relu, ("up", "down"))
        y = oracle.layer(row, gates, [params[name] for name in form[1]], form[0])
        if config.shared:
            always = oracle.swiglu(row, *(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
            y = y + always * (oracle.sigmoid(row @ params["shared_gate"]["kernel"]) if config.shared_gate else 1)
        out.append(y)
    return np.stack(out)


@pytest.mark.parametrize("name", SMALL)
def test_the_layer_is_the_weighted_sum_of_its_experts(name):
    module, params, x = layer(small(name))
    got = jit(lambda p, x: module.apply({"params": p}, x))(params, x)
    np.testing.assert_allclose(got, expected(module.config, params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_layers_and_their_gradients_are_those_of_torch(name):
    """transformers' blocks, by tests/golden/make_moe.py; its balance loss, where it has one, is k times ours."""
    if "deepseek" in name:
        config = small(name, shared=12, aux_coef=0.0, sequence_coef=0.0)
    else:
        config = small(name, aux_coef=0.3 * small(name).top_k)
    assert_same_layer(name, config)


def test_switch_layers_and_their_gradients_are_those_of_transformers():
    """Which drops what finds no room, three tokens of a row for each expert, and balances rows one by one."""
    y = assert_same_layer("switch", small("switch", aux_coef=0.0, sequence_coef=0.3, z_coef=0.1))
    assert 0 < np.sum(np.all(y == 0, axis=-1)) < 9


def assert_same_layer(name, config):
    """The layer and its gradients against a case of moe.npz; returns y [B, T, D]."""
    with np.load(pathlib.Path(__file__).parents[1] / "golden" / "moe.npz") as arrays:
        case = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
    params = {}
    for key in (key for key in case if key.startswith("param/")):
        *nodes, last = key.split("/")[1:]
        array = jnp.asarray(case[key], jnp.float32)
        functools.reduce(lambda tree, node: tree.setdefault(node, {}), nodes, params)[last] = array

    @jit
    def run(params, x):
        y, vjp = jax.vjp(lambda p, x: MoE(config).apply({"params": p}, x), params, x)
        return y, *vjp(jnp.cos(x))

    y, gradient, dx = run(params, case["x"])
    np.testing.assert_allclose(y, case["y"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dx, case["dx"], atol=1e-4)
    gradient.pop("bias", None)  # which has none there
    for path, got in jax.tree.leaves_with_path(gradient):
        want = case["grad/" + jax.tree_util.keystr(path, simple=True, separator="/")]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=str(path))
    return np.asarray(y)


def test_bfloat16_errs_no_more_than_twice_plain_bfloat16():
    """Against experts computed one by one in bfloat16, weighted sum in float32, under the same float32 gates."""
    config = small("mixtral")
    module, params, x = layer(config, "bfloat16", t=33)
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), (params, x))
    got = jit(lambda p, x: module.apply({"params": p}, x))(params, x)
    assert got.dtype == jnp.bfloat16
    want, half = expected(config, params, x), lambda a: jnp.asarray(a, jnp.bfloat16)

    @jit
    def one_by_one(params, x):
        routed = moe.route(config, jnp.dot(x, params["router"]["kernel"], precision="highest"))
        every = [
            jnp.dot(jax.nn.silu(half(x) @ half(g)) * (half(x) @ half(u)), half(d)).astype(jnp.float32)
            for g, u, d in zip(params["gate"], params["up"], params["down"], strict=True)
        ]
        weights = jnp.sum(jax.nn.one_hot(routed.ids, config.experts) * routed.weights[..., None], axis=-2)
        return sum(weights[..., e, None] * y for e, y in enumerate(every)).astype(jnp.bfloat16)

    plain = one_by_one(params, x)
    error = lambda y: np.sqrt(np.mean(np.square(np.asarray(y, np.float64) - want)))
    assert error(got) <= 2 * error(plain)


def test_one_expert_is_a_dense_layer():
    module, params, x = layer(MoEConfig(1, 1, 6))
    dense = {name: {"kernel": params[name][0]} for name in ("gate", "up", "down")}
    run = jit(lambda p, dense: (module.apply({"params": p}, x), FeedForward(6).apply({"params": dense}, x)))
    np.testing.assert_allclose(*run(params, dense), rtol=1e-5, atol=1e-6)


def test_the_order_of_tokens_and_experts_does_not_matter():
    module, params, x = layer(small("mixtral"), b=1, t=20)
    run = jit(lambda p, x: module.apply({"params": p}, x))
    tokens, names = np.random.default_rng(0).permutation(20), np.random.default_rng(1).permutation(6)
    renamed = {name: params[name][names] for name in ("gate", "up", "down")}
    renamed["router"] = {"kernel": params["router"]["kernel"][:, names]}
    y = run(params, x)
    np.testing.assert_allclose(run(params, x[:, tokens]), y[:, tokens], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(renamed, x), y, rtol=1e-5, atol=1e-6)


def test_what_finds_no_room_passes_by():
    """All tokens want expert 0, which takes two: the others get nothing, and no gradient."""
    config = MoEConfig(4, 1, 6, capacity_factor=1.0)
    module, params, x = layer(config, b=1, t=8)
    params = params | {"router": {"kernel": jnp.zeros((8, 4))}}

    @jit
    def run(params, x):
        y, vjp = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        return y, *vjp(jnp.ones_like(y))

    y, dp, dx = run(params, x)
    assert (np.abs(np.asarray(y[0])).max(-1) > 0).tolist() == [True] * 2 + [False] * 6
    assert not np.any(dx[0, 2:]) and not np.any(dp["gate"][1:]) and np.any(dp["gate"][0])


def test_random_draws_only_with_a_key():
    """Jitter: another stream, another result; without one always the same."""
    module, params, x = layer(small("switch", jitter=0.5), t=30)
    run = jit(lambda rngs: module.apply({"params": params}, x, rngs=rngs))
    ys = [run({}), run({}), *(run({"router": jax.random.key(seed)}) for seed in (0, 0, 1))]
    same = [bool(jnp.array_equal(a, b)) for a, b in zip(ys, ys[1:], strict=False)]
    assert same == [True, False, True, False]


def test_statistics():
    config = MoEConfig(4, 2, 1, capacity_factor=1.0)
    logits = jnp.log(jnp.array([[[8, 4, 2, 2.0]] * 3 + [[2, 2, 4, 8]]]) / 16)
    statistics = jit(lambda logits, live: moe.statistics(config, logits, moe.route(config, logits), live))
    got = statistics(logits, None)
    np.testing.assert_allclose(got.load, np.array([3, 3, 1, 1]) / 8)
    np.testing.assert_allclose([got.max_violation, got.mean_violation], 0.5)
    np.testing.assert_allclose(got.entropy, 1.75 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(got.dropped, 2 / 8)
    one = statistics(logits, jnp.arange(4)[None] == 3)
    np.testing.assert_allclose(one.load, np.array([0, 0, 1, 1]) / 2)
    np.testing.assert_allclose([one.dropped, one.entropy], [0, 1.75 * np.log(2)], rtol=1e-6)
    assert not any(np.any(x) for x in statistics(logits, jnp.zeros((1, 4), bool)))


# balance


def test_auxiliary_gradients_join_where_the_layer_has_one():
    """The gradient is that of loss + coefficients times losses over the tokens that the loss reads."""
    config = small("deepseek_v3", aux_coef=0.3, z_coef=0.1, sequence_coef=0.2)
    module, params, x = layer(config)
    plain = MoE(replace(config, aux_coef=0.0, z_coef=0.0, sequence_coef=0.0, bias=False))
    live = jnp.arange(9)[None] < jnp.array([[9], [5]])
    loss = lambda y: jnp.sum(jnp.sin(y) * live[..., None])

    def written_out(params, x):
        logits = jnp.dot(x, params["router"]["kernel"], precision="highest")
        losses = moe.auxiliary_losses(config, logits, moe.route(config, logits, params["bias"]).ids, live)
        return 0.3 * losses["balance"] + 0.2 * losses["sequence"] + 0.1 * losses["z"]

    zero = params | {"bias": jnp.zeros(12)}
    got, dx = jit(jax.grad(lambda p, x: loss(module.apply({"params": p}, x)), (0, 1)))(zero, x)
    base, of_x = jit(jax.grad(lambda p, x: loss(plain.apply({"params": p}, x)), (0, 1)))(
        {name: p for name, p in params.items() if name != "bias"}, x
    )
    more, more_x = jit(jax.grad(written_out, (0, 1)))(zero, x)
    want = base["router"]["kernel"] + more["router"]["kernel"]
    np.testing.assert_allclose(got["router"]["kernel"], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, of_x + more_x, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(more["router"]["kernel"]).max()) > 0.1
    for name in ("gate", "up", "down"):
        np.testing.assert_allclose(got[name], base[name], rtol=1e-5, atol=1e-6)
    assert not np.any(dx[1, 5:])


def test_the_gradient_of_the_bias_is_load():
    config = small("deepseek_v3")
    module, params, x = layer(config)
    live = jnp.arange(9)[None] < jnp.array([[9], [5]])
    run = jit(jax.grad(lambda p, live: jnp.sum(module.apply({"params": p}, x) * live[..., None])))
    logits = jnp.dot(x, params["router"]["kernel"], precision="highest")
    ids = np.asarray(route(config, logits, params["bias"]).ids)
    counts = np.bincount(ids[np.asarray(live)].ravel(), minlength=12)
    np.testing.assert_allclose(run(params, live)["bias"] * 2.0**80, counts - counts.mean(), rtol=1e-5)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(run(params, jnp.zeros_like(live))))


def test_the_optimizer_moves_the_bias_by_its_own_rate_and_no_norm_knows_of_it():
    params = {"layers": {"moe": {"bias": jnp.zeros((2, 3)), "gate": jnp.ones((2, 3, 4, 4))}}}
    load = jnp.array([[5.0, -3, -2], [0, 1, -1]]) * moe.FAINT
    gradient = {"layers": {"moe": {"bias": load, "gate": jnp.full((2, 3, 4, 4), 1e-6)}}}
    assert optax.tree.norm(gradient) == optax.tree.norm(gradient["layers"]["moe"]["gate"])
    for state in ("float32", "bfloat16", "int8"):
        optimizer = update.make_optimizer(
            update.OptimizerConfig(weight_decay=0.1, learning_rate=0.5, router_bias_rate=0.01, state=state)
        )
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        got = updates["layers"]["moe"]
        np.testing.assert_allclose(got["bias"], [[-0.01, 0.01, 0.01], [0, -0.01, 0.01]])
        assert np.all(np.asarray(got["gate"]) < -0.04)


def test_the_bias_evens_out_a_skewed_router():
    """16 experts, 2 of them for each of 4,096 tokens, sigmoid scores with offsets; 400 updates of 1e-3."""
    config = MoEConfig(16, 2, 1, score="sigmoid", normalise=True, bias=True)
    logits = jnp.asarray(draw(1, 4096, 16)) + jnp.linspace(-1, 1, 16)[None, None]

    @jax.jit
    def run(bias):
        def step(bias, _):
            found = moe.statistics(config, logits, moe.route(config, logits, bias))
            return bias - 1e-3 * jnp.sign(found.load - 1 / 16), found.max_violation

        return jax.lax.scan(step, bias, length=401)[1]

    violation = np.asarray(run(jnp.zeros(16)))
    assert violation[0] > 1 and violation[0] > violation[100] > violation[400] and violation[400] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "experts is 0, top_k 4, ffn 6 and groups 4: expected at least 1"),
        ({"groups": 5}, "12 experts in 5 groups"),
        ({"group_score": 4}, "scored by their best 4"),
        ({"top_groups": 1}, "top_k 4 of 12 experts, in 1 of 4 groups"),
        ({"top_groups": 5}, "in 5 of 4 groups"),
        ({"score": "relu"}, "score is 'relu', expected 'softmax' or 'sigmoid'"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, expected a number above 0"),
        ({"eval_capacity_factor": 2.0}, "eval_capacity_factor is 2.0 without a capacity_factor"),
        ({"capacity_factor": 1.0, "eval_capacity_factor": -1.0}, "eval_capacity_factor is -1.0, expected a number"),
        ({"activation": "tanh"}, "activation is 'tanh', expected one of 'silu', 'gelu'"),
        ({"capacity_factor": float("inf")}, "capacity_factor is inf, expected a number above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor is nan, expected a number above 0"),
        ({"random_second": True}, "expected top_k=2 and normalise=True"),
        ({"aux_choices": 5}, "aux_choices is 5, expected 1 to top_k 4"),
        ({"shared": 0, "shared_gate": True}, "shared_gate without a shared expert"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"first_dense": -1}, "first_dense -1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        small("deepseek_v3", **change)
