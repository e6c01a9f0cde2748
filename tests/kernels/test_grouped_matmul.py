import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels import experts as module
from jaxrl.kernels.experts import combine, dispatch, exchange, exchange_back, local_experts, sort_by_expert
from jaxrl.kernels.grouped_matmul import grouped_matmul

path = pathlib.Path(__file__).parents[1] / "oracles" / "grouped_matmul.py"
spec = importlib.util.spec_from_file_location("grouped_matmul_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
IMPLEMENTATIONS = ("tiles", "ragged_dot", "pallas_tpu")
SIZES = {  # M, K, N, group sizes
    "tiles_overhang": (150, 5, 7, (33, 0, 64, 1, 40)),  # the last 12 rows have no group
    "small_groups": (40, 3, 4, (1, 0, 9, 17, 2, 0, 8, 3)),
    "empty_ends": (70, 4, 3, (0, 0, 70, 0)),
    "one_group": (17, 1, 1, (17,)),
    "one_row": (1, 3, 2, (0, 1)),
    "no_group_has_rows": (9, 3, 2, (0, 0, 0)),
    "no_rows": (0, 3, 2, (0, 0)),
    "no_columns": (5, 0, 2, (2, 3)),
}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def value_and_vjp(x, w, sizes, dy, implementation, **options):
    @jit
    def run(x, w, sizes, dy):
        f = functools.partial(grouped_matmul, group_sizes=sizes, implementation=implementation, **options)
        y, vjp = jax.vjp(f, x, w)
        return y, *vjp(dy.astype(y.dtype))

    return run(x, w, np.asarray(sizes, np.int32), dy)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, name):
    m, k, n, sizes = SIZES[name]
    x, w, dy = draw(m, k), draw(len(sizes), k, n), draw(m, n, seed=1)
    got, want = value_and_vjp(x, w, sizes, dy, implementation), oracle.grouped_matmul(x, w, sizes, dy)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_oracle_gradients_by_finite_differences():
    m, k, n, sizes = SIZES["small_groups"]
    arrays, dy = [draw(m, k).astype(np.float64), draw(len(sizes), k, n).astype(np.float64)], draw(m, n, seed=1)
    _, *grads = oracle.grouped_matmul(*arrays, sizes, dy)
    for i, grad in enumerate(grads):
        step = np.random.default_rng(2).normal(size=grad.shape)
        ends = [
            np.sum(dy * oracle.grouped_matmul(*arrays[:i], arrays[i] + e * step, *arrays[i + 1 :], sizes, dy)[0])
            for e in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, np.sum(grad * step), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives_by_finite_differences(implementation):
    """Of h(x, w) = sum(cos(dx) + ...) where the gradients themselves come from the oracle."""
    m, k, n, sizes = SIZES["small_groups"]
    x, w, dy = draw(m, k), draw(len(sizes), k, n), draw(m, n, seed=1)
    weights = draw(m, k, seed=2), draw(len(sizes), k, n, seed=3)

    @jit
    def grads(x, w, dy):
        def h(x, w, dy):
            dx, dw = jax.vjp(lambda x, w: grouped_matmul(x, w, np.array(sizes), implementation=implementation), x, w)[
                1
            ](dy)
            return jnp.sum(jnp.sin(dx) * weights[0]) + jnp.sum(jnp.sin(dw) * weights[1])

        return jax.grad(h, (0, 1, 2))(x, w, dy)

    def exact(x, w, dy):
        _, dx, dw = oracle.grouped_matmul(x, w, sizes, dy)
        return np.sum(np.sin(dx) * weights[0]) + np.sum(np.sin(dw) * weights[1])

    arrays = [a.astype(np.float64) for a in (x, w, dy)]
    for i, grad in enumerate(grads(x, w, dy)):
        step = np.random.default_rng(i).normal(size=grad.shape)
        ends = [exact(*arrays[:i], arrays[i] + e * step, *arrays[i + 1 :]) for e in (1e-5, -1e-5)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, np.sum(grad * step), rtol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_after_the_last_group_are_not_read(implementation):
    m, k, n, sizes = SIZES["tiles_overhang"]
    x, w, dy = draw(m, k), draw(len(sizes), k, n), draw(m, n, seed=1)
    clean = value_and_vjp(x, w, sizes, dy, implementation)
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.inf
    for a, b in zip(value_and_vjp(x, w, sizes, dy, implementation), clean, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(clean[0][sum(sizes) :] == 0) and np.all(clean[1][sum(sizes) :] == 0)


def test_a_nan_stays_in_its_group():
    m, k, n, sizes = SIZES["tiles_overhang"]
    x, w, dy = draw(m, k), draw(len(sizes), k, n), draw(m, n, seed=1)
    x[33] = np.nan  # the first row of the third group, in reach of the first group's last tile
    y, dx, dw = value_and_vjp(x, w, sizes, dy, "tiles")
    assert np.isfinite(np.delete(y, 33, 0)).all() and np.isfinite(dx).all()
    assert np.isfinite(np.delete(dw, 2, 0)).all() and np.isnan(dw[2]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_are_cut_off_at_the_last_row(implementation):
    x, w, dy = draw(40, 3), draw(3, 3, 2), draw(40, 2, seed=1)
    got = value_and_vjp(x, w, (30, 20, 5), dy, implementation)
    for a, b in zip(got, oracle.grouped_matmul(x, w, (30, 10, 0), dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_errs_no_more_than_twice_plain_bfloat16(implementation):
    m, k, n, sizes = 200, 64, 16, (90, 0, 10, 100)
    bf16 = lambda a: jnp.asarray(a, jnp.bfloat16)  # noqa: E731
    x, w, dy = bf16(draw(m, k)), bf16(draw(len(sizes), k, n)), bf16(draw(m, n, seed=1))
    exact = oracle.grouped_matmul(x, w, sizes, dy)
    group = np.repeat(np.arange(len(sizes)), sizes)

    @jit
    def plain(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: jnp.einsum("mk,mkn->mn", x, w[group]), x, w)
        return y, *vjp(dy)

    error = lambda a, b: np.abs(np.asarray(a, np.float64) - b).max()  # noqa: E731
    for ours, theirs, want in zip(value_and_vjp(x, w, sizes, dy, implementation), plain(x, w, dy), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert 0 < error(ours, want) <= 2 * error(theirs, want)
    y, dx, dw = value_and_vjp(x, w, sizes, dy, implementation, dtype=jnp.float32)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(y, exact[0], rtol=1e-5, atol=1e-4)


def test_integers_are_summed_in_int32():
    x, w = np.full((3, 400), 127, np.int8), np.full((2, 400, 2), -127, np.int8)
    for implementation in IMPLEMENTATIONS:
        call = functools.partial(grouped_matmul, dtype=jnp.int32, implementation=implementation)
        y = jit(call)(x, w, np.array([1, 1]))
        np.testing.assert_array_equal(y, [[-127 * 127 * 400] * 2] * 2 + [[0, 0]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_composes_with_vmap_scan_and_remat(implementation):
    x, w = draw(3, 40, 4), draw(3, 2, 4, 4)
    sizes = np.array([[8, 30], [40, 0], [0, 1]], np.int32)

    def loss(x, w, sizes):
        return jnp.sum(jnp.sin(grouped_matmul(x, w, sizes, implementation=implementation)))

    grad = jit(jax.value_and_grad(loss, (0, 1)))
    one_by_one = [grad(*arrays) for arrays in zip(x, w, sizes, strict=True)]
    mapped = jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(x, w, sizes)
    for n, want in enumerate(one_by_one):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5), mapped, want)

    def summed(x, w):
        step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, 0.0, (x, w, sizes))[0]

    value, grads = jit(jax.value_and_grad(summed, (0, 1)))(x, w)
    np.testing.assert_allclose(value, sum(x for x, _ in one_by_one), rtol=1e-5)
    for a, b in zip(grads, mapped[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_same_bits_twice():
    m, k, n, sizes = SIZES["tiles_overhang"]
    arguments = draw(m, k), draw(len(sizes), k, n), sizes, draw(m, n, seed=1)
    for a, b in zip(value_and_vjp(*arguments, None), value_and_vjp(*arguments, None), strict=True):
        np.testing.assert_array_equal(a, b)


def test_none_chooses_by_platform():
    def both(x, w, sizes):
        return jax.grad(lambda x, w: jnp.sum(grouped_matmul(x, w, sizes)), (0, 1))(x, w)

    traced = jax.jit(both).trace(draw(8, 4), draw(2, 4, 4), np.array([3, 5], np.int32))
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    assert "while" in text["cpu"] and "ragged_dot" not in text["cpu"]
    for name in ("tpu", "cuda"):
        assert "while" not in text[name]
        assert text[name].count('"chlo.ragged_dot"') == {"tpu": 1, "cuda": 2}[name]
    assert text["tpu"].count("@tpu_custom_call") == 1


def test_bfloat16_matrices_are_not_all_turned_into_float32():
    arguments = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((64, 64, 64), jnp.bfloat16), jnp.ones(64, jnp.int32)
    compiled = jax.jit(functools.partial(grouped_matmul, implementation="tiles")).lower(*arguments).compile()
    assert "f32[64,64,64]" not in compiled.as_text()


EXPERTS = np.array([[3, 0], [1, 3], [8, 1], [3, -1], [0, 7]])  # 8 and -1 are no experts; 2, 4, 5 and 6 have no token


def test_sorting_is_stable_and_leaves_choices_of_none_for_the_end():
    routing = jax.jit(functools.partial(sort_by_expert, num_experts=8))(EXPERTS)
    assert routing.order.tolist() == [1, 8, 2, 5, 0, 3, 6, 9, 4, 7]
    assert routing.group_sizes.tolist() == [2, 2, 0, 3, 0, 0, 0, 1]
    np.testing.assert_array_equal(routing.order[routing.place.reshape(-1)], np.arange(10))
    assert {x.dtype for x in routing} == {jnp.dtype(jnp.int32)}
    empty = sort_by_expert(np.zeros((0, 2), np.int32), num_experts=3)
    assert empty.group_sizes.tolist() == [0, 0, 0] and dispatch(jnp.ones((0, 4)), empty).shape == (0, 4)
    assert combine(jnp.ones((0, 4)), empty).shape == (0, 4)


def test_dispatch_and_combine_are_their_formulas():
    routing = sort_by_expert(EXPERTS, num_experts=8)
    x, weights, drows, dy = draw(5, 3), draw(5, 2), draw(10, 3, seed=1), draw(5, 3, seed=2)

    @jit
    def run(x, weights, drows, dy):
        rows, to_rows = jax.vjp(lambda x: dispatch(x, routing), x)
        y, from_rows = jax.vjp(lambda rows, weights: combine(rows, routing, weights), rows, weights)
        return rows, y, to_rows(drows), from_rows(dy)

    rows, y, (dx,), (d_rows, d_weights) = run(x, weights, drows, dy)
    want_y, want_dx = np.zeros((5, 3)), np.zeros((5, 3))
    for row, choice in enumerate(np.asarray(routing.order)):
        t, j = divmod(int(choice), 2)
        np.testing.assert_array_equal(rows[row], x[t])
        want_dx[t] += drows[row]
        want_y[t] += weights[t, j] * rows[row]
        np.testing.assert_allclose(d_rows[row], weights[t, j] * dy[t], rtol=1e-6)
        np.testing.assert_allclose(d_weights[t, j], dy[t] @ np.asarray(rows[row]), rtol=1e-5)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(combine(rows, routing), 2 * x, rtol=1e-6)


def test_gradients_of_dispatch_and_combine_scatter_nothing():
    def loss(x, weights, routing):
        return jnp.sum(jnp.sin(combine(jnp.sin(dispatch(x, routing)), routing, weights)))

    routing = sort_by_expert(EXPERTS, num_experts=8)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(draw(5, 3), draw(5, 2), routing))
    assert "gather" in text and "scatter" not in text


def test_combine_sums_in_float32():
    routing = sort_by_expert(np.arange(64)[None], num_experts=64)
    rows = jnp.full((64, 1), 1.0, jnp.bfloat16).at[0].set(512.0)
    assert combine(rows, routing, dtype=jnp.float32)[0, 0] == 575
    assert combine(rows, routing)[0, 0] == jnp.bfloat16(575)
    assert combine(rows, routing, jnp.full((1, 64), 1 / 3)).dtype == jnp.bfloat16


T, K, D, F, E = 16, 2, 6, 5, 8


def layer_inputs():
    experts = np.random.default_rng(0).integers(-1, E + 1, (T, K))
    experts[:6] = 3  # one expert is crowded, and one device
    return draw(T, D), draw(T, K), draw(E, D, F), draw(E, F, D), experts.astype(np.int32)


def ffn(rows, sizes, w_in, w_out):
    return grouped_matmul(jnp.tanh(grouped_matmul(rows, w_in, sizes)), w_out, sizes)


def layer(x, weights, w_in, w_out, experts):
    routing = sort_by_expert(experts, num_experts=w_in.shape[0])
    return combine(ffn(dispatch(x, routing), routing.group_sizes, w_in, w_out), routing, weights)


def layer_of_replicated_tokens(x, weights, w_in, w_out, experts):
    local = local_experts(experts, num_local=w_in.shape[0], axis_name="expert")
    return jax.lax.psum(layer(x, weights, w_in, w_out, local), "expert")


def layer_of_gathered_tokens(x, weights, w_in, w_out, experts):
    x, weights, experts = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, weights, experts))
    local = local_experts(experts, num_local=w_in.shape[0], axis_name="expert")
    return jax.lax.psum_scatter(layer(x, weights, w_in, w_out, local), "expert", tiled=True)


def layer_of_exchanged_rows(x, weights, w_in, w_out, experts):
    routing = sort_by_expert(experts, num_experts=E)
    rows, plan = exchange(dispatch(x, routing), routing.group_sizes, axis_name="expert")
    rows = exchange_back(ffn(rows, plan.routing.group_sizes, w_in, w_out), plan, axis_name="expert")
    return combine(rows, routing, weights)


def value_and_gradients(f, arguments):
    @jit
    def run(x, weights, w_in, w_out, experts):
        loss = lambda *arrays: jnp.sum(jnp.sin(f(*arrays, experts)))
        return f(x, weights, w_in, w_out, experts), jax.grad(loss, (0, 1, 2, 3))(x, weights, w_in, w_out)

    return run(*arguments)


@functools.cache
def one_device():
    return value_and_gradients(layer, layer_inputs())


def test_the_layer_is_the_dense_sum_over_chosen_experts():
    x, weights, w_in, w_out, experts = layer_inputs()
    y, grads = one_device()
    np.testing.assert_allclose(y, oracle.expert_layer(x, experts, weights, w_in, w_out), rtol=1e-4, atol=1e-5)
    arrays = [a.astype(np.float64) for a in (x, weights, w_in, w_out)]
    for i, grad in enumerate(grads):
        step, ends = np.random.default_rng(i).normal(size=grad.shape), []
        for e in (1e-5, -1e-5):
            moved = [*arrays[:i], arrays[i] + e * step, *arrays[i + 1 :]]
            ends.append(np.sum(np.sin(oracle.expert_layer(moved[0], experts, *moved[1:]))))
        np.testing.assert_allclose(np.sum(grad * step), (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def test_the_layer_does_not_care_for_the_order_of_tokens_or_experts():
    x, weights, w_in, w_out, experts = layer_inputs()
    y, tokens, names = one_device()[0], np.random.default_rng(1).permutation(T), np.random.default_rng(2).permutation(E)
    run = jit(layer)
    moved = run(x[tokens], weights[tokens], w_in, w_out, experts[tokens])
    np.testing.assert_allclose(moved, y[tokens], rtol=1e-5, atol=1e-6)
    renamed = np.where((experts >= 0) & (experts < E), np.argsort(names)[np.clip(experts, 0, E - 1)], E)
    np.testing.assert_allclose(run(x, weights, w_in[names], w_out[names], renamed), y, rtol=1e-5, atol=1e-6)


SHARDED = {
    "replicated": (layer_of_replicated_tokens, jax.P()),
    "gathered": (layer_of_gathered_tokens, jax.P("expert")),
    "exchanged": (layer_of_exchanged_rows, jax.P("expert")),
}


@pytest.mark.parametrize(("devices", "check_vma"), [(2, True), (4, False), (8, True)])
@pytest.mark.parametrize("name", SHARDED)
def test_experts_on_many_devices_equal_one_device(name, devices, check_vma):
    f, tokens = SHARDED[name]
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=axis, devices=jax.devices()[:devices])
    specs = tokens, tokens, jax.P("expert"), jax.P("expert"), tokens
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=check_vma)
    got = value_and_gradients(sharded, layer_inputs())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, one_device())


def test_experts_spread_over_one_of_two_mesh_axes():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens = jax.P(("data", "expert"))
    specs = tokens, tokens, jax.P("expert"), jax.P("expert"), tokens
    got = value_and_gradients(
        jax.shard_map(layer_of_exchanged_rows, mesh=mesh, in_specs=specs, out_specs=tokens), layer_inputs()
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, one_device())


def test_the_ragged_exchange_asks_for_what_the_gathered_one_does(monkeypatch):
    """XLA:CPU cannot run `ragged_all_to_all`: its arguments are carried out here as its documentation reads."""
    n, rows, length = 4, 6, 24
    counts = np.array([[1, 2, 0, 3], [0, 0, 6, 0], [2, 0, 1, 1], [0, 0, 0, 0]], np.int32)
    operands = draw(n, rows, 2)
    asked = []

    def carried_out(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        asked.append((output, input_offsets, send_sizes, output_offsets, recv_sizes))
        return output

    def of_device(me):
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
            patch.setattr(jax.lax, "ragged_all_to_all", carried_out)
            patch.setattr(jax.lax, "axis_index", lambda name: me)
            module._swap("expert", length, jnp.asarray(operands[me]), jnp.asarray(counts))

    for me in range(n):
        of_device(me)
    outputs, starts, sizes, ends, received = (np.stack(x) for x in zip(*asked, strict=True))
    np.testing.assert_array_equal(received, sizes.T)
    want = oracle.ragged_all_to_all(operands, outputs, starts, sizes, ends)
    mesh = jax.make_mesh((n,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])
    swap = lambda rows: module._swap("expert", length, *module._varying("expert", rows, jnp.asarray(counts)))
    swapped = jit(jax.shard_map(swap, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert")))
    got = swapped(operands.reshape(-1, 2))
    np.testing.assert_array_equal(got.reshape(n, length, 2), np.stack(want))


X, W, G = jnp.ones((6, 4)), jnp.ones((3, 4, 2)), jnp.array([1, 2, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x \(4,\) and w \(3, 4, 2\), expected \[M, K\] and \[E, K, N\]"),
        ({"w": W[0]}, r"and w \(4, 2\), expected"),
        ({"x": X[:, :3]}, r"x \(6, 3\) and w \(3, 4, 2\), expected .* with the same K"),
        ({"x": X.astype(jnp.bfloat16)}, "x is bfloat16 and w is float32, expected the same dtype; cast one"),
        ({"w": W[:0], "group_sizes": G[:0]}, "w has E = 0 groups"),
        ({"group_sizes": G[:2]}, r"group_sizes are int32 \(2,\), expected integers \[E\] = \(3,\)"),
        ({"group_sizes": G / 1}, r"group_sizes are float32 \(3,\)"),
        ({"implementation": "gmm"}, "implementation='gmm', expected None or"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**({"x": X, "w": W, "group_sizes": G} | change))


def test_bad_input_of_the_helpers():
    routing = sort_by_expert(EXPERTS, num_experts=8)
    for call, message in [
        (lambda: sort_by_expert(EXPERTS[0], num_experts=8), r"int32 \(2,\), expected integers \[T, k\]"),
        (lambda: sort_by_expert(EXPERTS / 1, num_experts=8), "experts are float32"),
        (lambda: sort_by_expert(EXPERTS, num_experts=0), "num_experts = 0, expected at least 1"),
        (lambda: dispatch(X, routing), r"x has shape \(6, 4\), expected \[T, D\] with the routing's T = 5"),
        (lambda: combine(X, routing), r"rows have shape \(6, 4\), expected \[T k, D\] with T k = 5 \* 2"),
        (lambda: combine(jnp.ones((10, 4)), routing, X), r"weights have shape \(6, 4\), expected \[T, k\] = \(5, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: exchange(x[0], jnp.ones(4, jnp.int32), axis_name="expert"), r"expected \[R, D\]"),
        (
            lambda x: exchange(x, jnp.ones(3, jnp.int32), axis_name="expert"),
            "E = 3 experts, expected a multiple of the 2",
        ),
        (
            lambda x: exchange_back(x, exchange(x, jnp.ones(2, jnp.int32), axis_name="expert")[1], axis_name="expert"),
            r"\(3, 2\), expected \[n R, D\] with n R = 6",
        ),
    ],
)
def test_bad_input_of_the_exchange(call, message):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=message):
        sharded = jax.shard_map(call, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
        jax.eval_shape(sharded, jnp.ones((6, 2)))
