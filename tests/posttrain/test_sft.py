"""Supervised steps: the loss against numpy, padding that is EOS, and one step on eight devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch

EOS = 1


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 13, size=(16, 7))
    lengths = rng.integers(3, 8, size=16)
    mask = (np.arange(7) < lengths[:, None]) & (np.arange(7) >= 2)
    tokens[np.arange(16), lengths - 1] = EOS
    tokens[np.arange(7) >= lengths[:, None]] = EOS  # padding and EOS share an id
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32))


def test_loss_is_the_mean_over_masked_tokens(model, params, data):
    value, metrics = jax.jit(lambda params, data: sft.loss(model, params, data))(params, data)
    hidden = jax.jit(model.apply)(params, data.tokens)[0]
    logits = np.asarray(hidden @ model.unembedding(params), np.float64)
    total = count = 0.0
    for row in range(16):
        for column in range(1, 7):
            if data.loss_mask[row, column]:
                before = logits[row, column - 1] - logits[row, column - 1].max()
                total -= before[data.tokens[row, column]] - np.log(np.exp(before).sum())
                count += 1
    np.testing.assert_allclose([value.total, value.weight], [total, count], rtol=1e-5)
    assert 0 < metrics["train/target_probability"].mean < 1


def test_the_end_is_trained_though_padding_shares_its_id(model, params, data):
    """What the last EOS of a row costs is in the loss; what the padding behind it costs is not."""
    value = lambda batch: jax.jit(lambda params, batch: sft.loss(model, params, batch)[0].total)(params, batch)
    whole, ends = value(data), np.asarray(data.loss_mask).cumsum(1).argmax(1)
    row = int(ends.argmin())  # a row with padding
    assert data.tokens[row, ends[row]] == EOS and ends[row] < 6
    without_end = data.replace(tokens=data.tokens.at[row, ends[row]].set(5))
    assert abs(value(without_end) - whole) > 1e-3
    other_padding = data.replace(tokens=data.tokens.at[row, ends[row] + 1 :].set(5))
    np.testing.assert_allclose(value(other_padding), whole, rtol=1e-6)


def test_micro_batches_and_devices_change_nothing(model, params, data):
    outcomes = []
    mesh = parallel.make_mesh("data=4,fsdp=2")
    for config, options in (
        (sft.SFTConfig(batch=8), {}),
        (sft.SFTConfig(batch=8, micro_batches=4), {}),
        (sft.SFTConfig(batch=8), {"constrain": partial(parallel.shard_batch, mesh=mesh)}),
    ):
        recipe = sft.make(config, model, optax.sgd(0.5), **options)
        state = recipe.init(jax.random.key(0), params)
        if options:
            state = jax.device_put(state, parallel.state_shardings(state, mesh))
        (result,) = loop.run(recipe.step, state, data, steps=4, chunk=4)
        outcomes.append((jax.device_get(result.state.params), result.metrics))
    for params_after, metrics in outcomes[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params_after, outcomes[0][0])
        for row, expected in zip(metrics, outcomes[0][1], strict=True):
            np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-5)
    losses = [row["train/loss"] for row in outcomes[0][1]]
    assert losses[-1] < losses[0]
