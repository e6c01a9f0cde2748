"""FVSBN, NADE, MADE and PixelCNN: exact normalisation, who depends on whom, loops in numpy, samples and losses."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.nets.densities import bernoulli
from jaxrl.nets.densities.fvsbn import fvsbn
from jaxrl.nets.densities.made import SIZES as MADES
from jaxrl.nets.densities.made import MADEConfig, draw_degrees, made, masks
from jaxrl.nets.densities.nade import SIZES as NADES
from jaxrl.nets.densities.nade import NADEConfig, draw_observed, eonade, masked_loss, nade
from jaxrl.nets.densities.pixelcnn import PixelCNNConfig, conv_by_products, pixelcnn

N = 8
DENSITIES = {
    "fvsbn": fvsbn(N),
    "nade": nade(NADEConfig(N, (5,))),
    "eonade": eonade(NADEConfig(N, (12, 12))),
    "made": made(MADEConfig(N, (9, 7), direct=True)),
    "made 0": made(MADEConfig(N, (16,))),
    "pixelcnn": pixelcnn(PixelCNNConfig(2, 4, channels=4, layers=3)),
}
ORDER = np.array([3, 0, 7, 5, 1, 2, 6, 4])
"""The entries as they come: 3, then 0, ..."""


def all_inputs(n):
    return jnp.asarray(list(itertools.product([0.0, 1.0], repeat=n)))


def random_params(density, seed=0):
    """Far from the initial values, biases too."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(density.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0, 0.6, x.shape), x.dtype) for x in leaves])


def given(name):
    """The same order in the words of each density, where it takes one."""
    if name in ("nade", "eonade"):
        return {"order": jnp.asarray(ORDER)}
    if name.startswith("made"):
        config = MADEConfig(N, (9, 7), direct=True) if name == "made" else MADEConfig(N, (16,))
        return {"degrees": draw_degrees(config, jax.random.key(5), order=jnp.asarray(ORDER))}
    return None


def support(density, params, n=N, **more):
    """The largest derivative of logit i (row) by entry j (column), at some inputs."""
    at = jnp.asarray(np.random.default_rng(1).random((8, n)), jnp.float32)
    of_one = jax.jacobian(lambda x: density.logits(params, x, **more))
    return np.abs(jax.jit(jax.vmap(of_one))(at)).max(0)


def orders(name):
    return [more for more in ({}, given(name)) if more is not None]


@pytest.mark.parametrize("name", DENSITIES)
def test_probabilities_of_all_inputs_sum_to_one_and_samples_follow_them(name):
    """Exactly; and 4,000 samples by a chi-square test over all inputs."""
    density = DENSITIES[name]
    params, x = random_params(density), all_inputs(N)
    for more in orders(name):
        log_probs, samples = jax.jit(
            lambda params, key: (density.log_prob(params, x, **more), density.sample(params, key, 4000, **more))
        )(params, jax.random.key(3))
        expected = 4000 * np.exp(np.asarray(log_probs, np.float64))
        np.testing.assert_allclose(expected.sum(), 4000, rtol=1e-5)
        assert expected.max() > 3 * 4000 / len(x)  # far from uniform
        seen = np.bincount(np.asarray(samples @ 2.0 ** np.arange(N - 1, -1, -1), int), minlength=2**N)
        rare = expected < 5
        chi = ((seen - expected) ** 2 / expected)[~rare].sum()
        chi += (seen[rare].sum() - expected[rare].sum()) ** 2 / max(expected[rare].sum(), 1e-9)
        freedom = (~rare).sum()
        assert chi < freedom + 5 * np.sqrt(2 * freedom), (chi, freedom)


@pytest.mark.parametrize("name", DENSITIES)
def test_entries_depend_on_those_before_and_no_other(name):
    """Exactly zero elsewhere. In MADE an entry may miss some of those before it, but none of direct connections."""
    density = DENSITIES[name]
    params = random_params(density)
    for order, more in zip((np.arange(N), ORDER), orders(name), strict=False):
        found = support(density, params, **more)[order][:, order]
        before = np.tril(np.ones((N, N), bool), -1)
        np.testing.assert_array_equal(found[~before], 0.0)
        if name != "made 0":
            assert (found[before] > 0).all()


def test_pixelcnn_has_no_blind_spot():
    """A pixel of a larger image depends on every one before it in raster order, to the right and above too."""
    density = pixelcnn(PixelCNNConfig(4, 5, channels=4, layers=5))
    params = random_params(density)
    np.testing.assert_array_equal(support(density, params, 20) > 0, np.tril(np.ones((20, 20), bool), -1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_likelihood(logits, x):
    p = sigmoid(logits)
    return (x * np.log(p) + (1 - x) * np.log(1 - p)).sum(-1)


def example(density):
    x = (np.random.default_rng(0).random((5, N)) < 0.5).astype(np.float64)
    params = random_params(density)
    return x, params, jax.tree.map(lambda p: np.asarray(p, np.float64), params)


def test_fvsbn_is_a_regression_on_what_came_before():
    density = DENSITIES["fvsbn"]
    x, params, w = example(density)
    a, b = w["output"]["kernel"], w["output"]["bias"]
    logits = np.array([[b[i] + sum(row[j] * a[j, i] for j in range(i)) for i in range(N)] for row in x])
    np.testing.assert_allclose(density.log_prob(params, jnp.asarray(x)), log_likelihood(logits, x), rtol=1e-5)
    assert density.log_prob(params, jnp.asarray(x[0], jnp.float32)).shape == ()


@pytest.mark.parametrize("order", [np.arange(N), ORDER])
def test_nade_equals_its_definition_without_the_recursion(order):
    """h_i = s(c + W of all that came before): O(n^2 H), with gradients by finite differences."""
    density = DENSITIES["nade"]
    x, params, w = example(density)

    def oracle(w):
        total = np.zeros(len(x))
        for place, i in enumerate(order):
            before = order[:place]
            h = sigmoid(w["input"]["bias"] + x[:, before] @ w["input"]["kernel"][before])
            total += log_likelihood((h @ w["output"]["kernel"][i] + w["output"]["bias"][i])[:, None], x[:, [i]])
        return total

    log_prob = partial(density.log_prob, x=jnp.asarray(x, jnp.float32), order=jnp.asarray(order))
    np.testing.assert_allclose(jax.jit(log_prob)(params), oracle(w), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: log_prob(params).sum()))(params)
    for layer, name, at in (("input", "kernel", (3, 2)), ("input", "bias", (1,)), ("output", "kernel", (7, 4))):
        ends = []
        for step in (1e-5, -1e-5):
            moved = jax.tree.map(np.copy, w)
            moved[layer][name][at] += step
            ends.append(oracle(moved).sum())
        np.testing.assert_allclose(gradient[layer][name][at], (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def test_nade_works_on_one_hidden_layer_at_a_time():
    """One scan over n entries whose arrays are [rows, H] at most: O(n H), for densities and for samples."""
    density = nade(NADEConfig(16, (5,)))
    params = density.init(jax.random.key(0))
    for traced in (
        jax.make_jaxpr(density.log_prob)(params, jnp.zeros((3, 16))),
        jax.make_jaxpr(lambda p, key: density.sample(p, key, 3))(params, jax.random.key(0)),
    ):
        (scan,) = [e for e in traced.eqns if e.primitive.name == "scan"]
        assert scan.params["length"] == 16
        inner = scan.params["jaxpr"].jaxpr
        assert max(v.aval.size for e in inner.eqns for v in e.outvars) == 3 * 5


@pytest.mark.parametrize("name", ["made", "made 0"])
def test_made_equals_sums_over_the_connections_that_its_masks_leave(name):
    density = DENSITIES[name]
    x, params, w = example(density)
    degrees = [np.asarray(d) for d in given(name)["degrees"]]
    np.testing.assert_array_equal(np.argsort(degrees[0]), ORDER)
    assert all(d.min() >= before.min() and d.max() <= N - 1 for before, d in zip(degrees, degrees[1:], strict=False))
    logits = np.zeros_like(x)
    for r, row in enumerate(x):
        h = row
        for layer in range(len(degrees) - 1):
            now = [
                w[f"layer_{layer}"]["bias"][k]
                + sum(
                    h[j] * w[f"layer_{layer}"]["kernel"][j, k]
                    for j in range(len(h))
                    if degrees[layer + 1][k] >= degrees[layer][j]
                )
                for k in range(len(degrees[layer + 1]))
            ]
            h = np.maximum(now, 0)
        for d in range(N):
            logits[r, d] = w["output"]["bias"][d]
            logits[r, d] += sum(
                h[k] * w["output"]["kernel"][k, d] for k in range(len(h)) if degrees[0][d] > degrees[-1][k]
            )
            if "direct" in w:
                logits[r, d] += sum(
                    row[j] * w["direct"]["kernel"][j, d] for j in range(N) if degrees[0][d] > degrees[0][j]
                )
    got = density.logits(params, jnp.asarray(x, jnp.float32), **given(name))
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)


def test_masks_are_arrays_of_a_program():
    """Orders and degrees are drawn inside jit; one compiled program serves them all, and gradients differ."""
    config = MADEConfig(N, (9,), order_agnostic=True)
    density = made(config)
    params, x = random_params(density), jnp.ones((4, N))
    traces = []

    @jax.jit
    def loss(params, key):
        traces.append(None)
        return density.loss(params, x, key).mean()

    values = [float(jax.grad(loss)(params, jax.random.key(i))["output"]["bias"][0]) for i in range(3)]
    assert len(traces) == 1 and len(set(values)) == 3
    order = jax.random.permutation(jax.random.split(jax.random.key(1))[0], N)
    degrees = draw_degrees(config, jax.random.split(jax.random.key(1))[1], order=order)
    np.testing.assert_allclose(loss(params, jax.random.key(1)), -density.log_prob(params, x, degrees=degrees).mean())
    assert [m.shape for m in masks(degrees)] == [(N, 9), (9, N), (N, N)]


def test_order_agnostic_loss_is_the_mean_over_orders():
    """Exactly, by all orders and places of three entries."""
    n, density = 3, eonade(NADEConfig(3, (6,)))
    params, x = random_params(density), all_inputs(3)
    every = jnp.asarray(list(itertools.permutations(range(n))))
    log_probs, scores = jax.jit(
        jax.vmap(lambda o: (density.log_prob(params, x, order=o), density.logits(params, x, order=o)))
    )(every)
    want = -np.asarray(log_probs).mean(0)

    losses = []
    for order in np.asarray(every):
        for d in range(n):
            observed, logits = np.zeros(n), np.zeros((len(x), n))
            observed[order[:d]] = 1
            for entry in order[d:]:  # its logit where exactly these are observed: that of an order with it next
                same = [k for k, o in enumerate(np.asarray(every)) if set(o[:d]) == set(order[:d]) and o[d] == entry]
                logits[:, entry] = scores[same[0], :, entry]
            at = np.broadcast_to(observed, x.shape)
            losses.append(masked_loss(*(jnp.asarray(a, jnp.float32) for a in (logits, x, at))))
    np.testing.assert_allclose(np.mean(losses, axis=0), want, rtol=1e-5)

    many = jax.jit(jax.vmap(lambda key: density.loss(params, x, key)))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(many.mean(0), want, atol=5 * float(many.std(0).max()) / np.sqrt(4000))
    observed = np.asarray(draw_observed(jax.random.key(0), (6000, n)))
    assert set(observed.sum(1)) == {0, 1, 2}
    np.testing.assert_allclose(observed.mean(0), 1 / 3, atol=0.03)


def test_a_density_of_one_entry_and_of_other_sizes():
    one = pixelcnn(PixelCNNConfig(1, 1, channels=2, layers=1))
    for density in (fvsbn(1), nade(NADEConfig(1, (3,))), eonade(NADEConfig(1, (3,))), made(MADEConfig(1, (3,))), one):
        log_probs = jax.jit(density.log_prob)(random_params(density), all_inputs(1))
        np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, atol=1e-6)
    empty = DENSITIES["nade"]
    assert empty.log_prob(random_params(empty), jnp.zeros((0, N))).shape == (0,)


def test_parameters_of_published_sizes():
    """Weights and biases of the papers' networks on 784 pixels."""
    count = lambda density: sum(x.size for x in jax.tree.leaves(jax.eval_shape(density.init, jax.random.key(0))))
    assert count(nade(NADES["mnist"])) == 2 * 784 * 500 + 500 + 784
    assert count(eonade(NADES["mnist_2"])) == 2 * 784 * 500 + 500 * 500 + 500 * 784 + 2 * 500 + 784
    assert count(made(MADES["mnist_2"])) == 784 * 500 + 500 * 500 + 500 * 784 + 2 * 500 + 784
    assert count(fvsbn(64)) == 64 * 64 + 64


LEARNT = {
    "made": (DENSITIES["made"], 0.03),
    "eonade": (DENSITIES["eonade"], 0.03),
    "pixelcnn": (pixelcnn(PixelCNNConfig(2, 4, channels=8, layers=3)), 0.01),
}


@pytest.mark.parametrize("name", LEARNT)
def test_losses_are_learnt(name):
    """Two opposite patterns: from a random start to less than a third of n log 2."""
    density, optimizer = LEARNT[name][0], optax.adam(LEARNT[name][1])
    pattern = jnp.asarray([0, 1, 1, 0, 1, 0, 0, 1.0])
    x = jnp.stack([pattern, 1 - pattern] * 4)

    def step(state, key):
        gradient = jax.grad(lambda params: density.loss(params, x, key).mean())(state[0])
        updates, moments = optimizer.update(gradient, state[1])
        return (optax.apply_updates(state[0], updates), moments), None

    @jax.jit
    def run(keys):
        params = density.init(jax.random.key(1))
        params = jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]
        return -density.log_prob(params, x).mean()

    assert run(jax.random.split(jax.random.key(0), 150)) < N * np.log(2) / 3


BAD = {
    "made": (lambda: MADEConfig(0), "size is 0"),
    "hidden": (lambda: MADEConfig(4, (3, 0)), r"hidden \(3, 0\)"),
    "nade": (lambda: nade(NADEConfig(4, (3, 3))), "expected one layer: use eonade"),
    "kernel": (lambda: PixelCNNConfig(4, 4, kernel=4), "kernel is 4, expected an odd number"),
    "layers": (lambda: PixelCNNConfig(4, 4, layers=0), "layers is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bernoulli_is_finite_where_it_is_certain():
    np.testing.assert_allclose(
        bernoulli(jnp.asarray([200.0, -200.0, 200.0]), jnp.asarray([1.0, 0.0, 0.0])), [0, 0, -200]
    )


def test_the_product_with_neighbours_is_a_convolution():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 5, 3), (2, 3, 3, 6)))
    padding = ((1, 0), (1, 1))
    want = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(conv_by_products(x, kernel, (1, 1), padding), want, atol=1e-5)
