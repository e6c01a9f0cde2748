"""The product of small layers: every derivative is the plain one's, its gradient multiplies what lies in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.layers import small_dot


def factors(n, features, out):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(n, features), (features, out), (n, out)]]


@pytest.mark.parametrize("features, out", [(5, 3), (3, 5), (4, 4), (6, 1)])
@pytest.mark.parametrize("jit", [False, True])
def test_derivatives_of_every_kind_are_those_of_the_plain_product(features, out, jit):
    rows, kernel, weights = factors(7, features, out)
    tangent = jax.tree.map(jnp.cos, (rows, kernel))

    def kinds(dot):
        f = lambda rows, kernel: jnp.sum(jnp.tanh(dot(rows, kernel)) * weights)
        gradient = jax.grad(f, argnums=(0, 1))
        return {
            "value": f(rows, kernel),
            "reverse": gradient(rows, kernel),
            "forward": jax.jvp(f, (rows, kernel), tangent),
            "forward over reverse": jax.jvp(gradient, (rows, kernel), tangent),
            "reverse over forward": jax.grad(lambda *x: jax.jvp(f, x, tangent)[1], argnums=(0, 1))(rows, kernel),
            "checkpoint": jax.grad(jax.checkpoint(f), argnums=(0, 1))(rows, kernel),
            "batch": jax.vmap(gradient)(jnp.stack([rows, -rows]), jnp.stack([kernel, 2 * kernel])),
        }

    own, plain = ((jax.jit(kinds, static_argnums=0) if jit else kinds)(dot) for dot in (small_dot, jnp.dot))
    for name in plain:
        for x, y in zip(jax.tree.leaves(own[name]), jax.tree.leaves(plain[name]), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("platform, expected", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_cpus_lay_the_cotangent_out(platform, expected):
    rows, kernel, weights = factors(8, 4, 2)
    gradient = jax.jit(jax.grad(lambda kernel: jnp.sum(small_dot(rows, kernel) * weights)))
    text = gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == expected
