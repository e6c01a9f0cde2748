"""Gradients that add up, the guard against non-finite updates, batches and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.losses import reduce
from jaxrl.posttrain import update


def masked_regression(params, batch):
    """A loss whose weight differs from row to row."""
    error = jnp.square(batch["x"] @ params["w"] - batch["y"])
    return reduce.tokens(error, batch["mask"]), {"error": reduce.tokens(error, batch["mask"])}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5, 3)), rng.normal(size=(8, 5))
    mask = np.arange(5) < rng.integers(0, 6, size=(8, 1))
    mask[4:6] = False  # a whole part without a token
    return jax.tree.map(jnp.asarray, {"x": x, "y": y, "mask": mask.astype(np.float32)})


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_give_the_whole_batch(micro_batches, batch):
    params = {"w": jnp.asarray([0.3, -1.0, 2.0])}
    whole = update.value_and_grad(masked_regression, params, batch)
    parts = update.value_and_grad(masked_regression, params, batch, micro_batches=micro_batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), whole, parts)
    error = np.square(np.asarray(batch["x"]) @ np.asarray(params["w"]) - np.asarray(batch["y"]))
    np.testing.assert_allclose(whole[0], error[np.asarray(batch["mask"]) > 0].mean(), rtol=1e-6)


def test_micro_batches_must_divide(batch):
    with pytest.raises(ValueError, match="micro_batches is 3 and the batch has 8 rows"):
        update.value_and_grad(masked_regression, {"w": jnp.zeros(3)}, batch, micro_batches=3)


def test_batch_without_a_token_moves_nothing(batch):
    empty = {**batch, "mask": jnp.zeros_like(batch["mask"])}
    value, _, gradient = update.value_and_grad(masked_regression, {"w": jnp.ones(3)}, empty)
    assert value == 0 and not gradient["w"].any()


@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_non_finite_update_is_skipped_and_counted(fault):
    optimizer = optax.adam(0.1)
    state = update.init_state({"w": jnp.ones(2)}, optimizer, jax.random.key(0))
    bad = {"w": jnp.asarray([jnp.nan if fault == "gradient" else 1.0, 1.0])}
    loss = jnp.float32(jnp.inf if fault == "loss" else 1.0)
    after, metrics = update.apply_gradients(state, bad, loss, optimizer, max_grad_norm=1.0)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert after.skipped == after.skipped_in_a_row == metrics["train/skipped"] == 1
    good = {"w": jnp.ones(2)}
    after, _ = update.apply_gradients(after, good, jnp.float32(1.0), optimizer, max_grad_norm=1.0)
    assert after.skipped == 1 and after.skipped_in_a_row == 0 and (after.params["w"] < 1).all()


@pytest.mark.parametrize(("limit", "expected"), [(1.0, [0.4, 0.2]), (0.0, [-2.0, -3.0]), (10.0, [-2.0, -3.0])])
def test_gradient_clip_is_by_global_norm(limit, expected):
    """A gradient (3, 4) of norm 5 is scaled to (0.6, 0.8) by limit 1, and left alone by 0 or 10."""
    state = update.init_state({"w": jnp.ones(2)}, optax.sgd(1.0), jax.random.key(0))
    gradient = {"w": jnp.asarray([3.0, 4.0])}
    after, metrics = update.apply_gradients(state, gradient, jnp.float32(0), optax.sgd(1.0), max_grad_norm=limit)
    np.testing.assert_allclose(after.params["w"], expected, rtol=1e-6)
    assert metrics["train/grad_norm"] == 5


def test_epochs_see_every_example_once():
    key = jax.random.key(7)
    draw = jax.jit(lambda step: update.epoch_batch(key, step, batch=3, examples=10))
    epochs = np.asarray([[draw(3 * epoch + i) for i in range(3)] for epoch in range(4)]).reshape(4, 9)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 9 and epoch.max() < 10
    assert len({epoch.tobytes() for epoch in epochs}) == 4


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="a batch of 11 was asked from 10 examples"):
        update.epoch_batch(jax.random.key(0), jnp.int32(0), batch=11, examples=10)


def test_schedules():
    rate = lambda step, **options: float(
        update.learning_rate(update.OptimizerConfig(learning_rate=2.0, **options))(step)
    )
    assert rate(1000) == 2.0
    assert rate(5, warmup_steps=10) == 1.0 and rate(10, warmup_steps=10) == 2.0
    linear = {"warmup_steps": 10, "decay": "linear", "decay_steps": 30, "final_fraction": 0.5}
    assert rate(20, **linear) == 1.5 and rate(99, **linear) == 1.0
    cosine = {"decay": "cosine", "decay_steps": 20}
    np.testing.assert_allclose([rate(0, **cosine), rate(10, **cosine), rate(20, **cosine)], [2.0, 1.0, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match="expected constant, linear, cosine or multi_step"):
        rate(0, decay="exponential")
    with pytest.raises(ValueError, match="a decay needs decay_steps larger than warmup_steps"):
        rate(0, decay="linear", warmup_steps=5)


def test_weight_decay_spares_vectors():
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1.0, weight_decay=0.5))
    stacked = {"norm": {"scale": jnp.ones((3, 2))}, "q": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2), "layers": stacked}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    layers = updates["layers"]
    assert (updates["matrix"] == -0.5).all() and (layers["q"]["kernel"] == -0.5).all()
    assert not any(leaf.any() for leaf in (updates["vector"], layers["q"]["bias"], layers["norm"]["scale"]))
