"""An embedding is a one-hot vector times a matrix: values, and gradients that add up over repeated ids."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("shape", [(4,), (2, 5), (0,), (1,)])
def test_lookup_and_product_agree(shape):
    ids = jax.random.randint(jax.random.key(0), shape, 0, 6)
    weights = jax.random.normal(jax.random.key(1), (*shape, 3))
    embed = nn.Embed(6, 3)
    params = embed.init(jax.random.key(2), ids)
    table = params["params"]["embedding"]
    product = lambda table: jax.nn.one_hot(ids, 6) @ table
    np.testing.assert_array_equal(embed.apply(params, ids), product(table))
    looked_up = jax.grad(lambda p: jnp.sum(weights * embed.apply(p, ids)))(params)["params"]["embedding"]
    multiplied = jax.grad(lambda table: jnp.sum(weights * product(table)))(table)
    expected = np.zeros((6, 3))
    np.add.at(expected, np.asarray(ids).reshape(-1), np.asarray(weights).reshape(-1, 3))
    np.testing.assert_allclose(looked_up, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(multiplied, expected, rtol=1e-6, atol=1e-7)


def test_repeated_ids_accumulate():
    ids = jnp.array([2, 2, 2, 0])
    gradient = jax.grad(lambda table: table[ids].sum())(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, [[1, 1], [0, 0], [3, 3], [0, 0]])
