"""The trust region: Fisher products against the dense matrix, the bound, monotone improvement with exact returns."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import envs
from jaxrl.agents import trpo
from jaxrl.distributions import Categorical, Gaussian

S, A, DISCOUNT = 6, 3, 0.9


def random_mdp(seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(S, 0.3), size=(S, A)), rng.normal(size=(S, A))


def exact(logits, transition, reward):
    """Return from a uniform start, visits d(s) (summing to one) and advantages of a policy, in float64."""
    pi = np.exp(logits - logits.max(-1, keepdims=True))
    pi /= pi.sum(-1, keepdims=True)
    p, r = np.einsum("sa,sat->st", pi, transition), (pi * reward).sum(-1)
    v = np.linalg.solve(np.eye(S) - DISCOUNT * p, r)
    q = reward + DISCOUNT * transition @ v
    visits = np.linalg.solve(np.eye(S) - DISCOUNT * p.T, np.full(S, 1 / S)) * (1 - DISCOUNT)
    return v.mean(), visits, q - v[:, None], q.max(-1)


def test_the_return_never_falls_on_a_finite_mdp():
    transition, reward = random_mdp()
    logits, history = jnp.zeros((S, A)), []

    @jax.jit
    def step(logits, visits, advantages):
        surrogate = lambda policy: jnp.sum(visits[:, None] * jax.nn.softmax(policy.logits) * advantages)
        return trpo.trust_region_step(Categorical, surrogate, logits, max_kl=0.01, damping=1e-3, weights=visits)

    for _ in range(60):
        value, visits, advantages, _ = exact(np.asarray(logits, np.float64), transition, reward)
        history.append(value)
        before = logits
        logits, done = step(logits, jnp.asarray(visits, jnp.float32), jnp.asarray(advantages, jnp.float32))
        if len(history) == 1:  # the quadratic model of the KL is good for a small step: the first length fits
            assert done.backtracks <= 1 and done.kl > 0.006
        p, q = jax.nn.softmax(before), jax.nn.softmax(logits)
        kl = float(np.sum(visits * np.asarray(jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1))))
        assert kl <= 0.01 * (1 + 1e-3) and abs(kl - float(done.kl)) < 1e-5
    values = np.array(history)
    assert (np.diff(values) >= -1e-5).all() and values[-1] > values[0] + 0.5
    best = np.zeros(S)
    for _ in range(500):
        best = (reward + DISCOUNT * transition @ best).max(-1)
    assert values[-1] > best.mean() - 0.05


def dense_fisher(policy, theta):
    """Hessian of the mean KL from the policy at theta, by the definition."""
    old = policy(theta)
    return jax.hessian(lambda t: old.kl(policy(t)).mean())(theta)


def test_fisher_products_equal_the_dense_matrix():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    mask = jnp.array([[True, True, False, True]] * 5)
    policies = {
        "categorical": lambda w: Categorical(jnp.tanh(x @ w[:12].reshape(3, 4))),
        "masked": lambda w: Categorical(jnp.tanh(x @ w[:12].reshape(3, 4))).masked(mask),
        "gaussian": lambda w: Gaussian(jnp.tanh(x @ w[:6].reshape(3, 2)), jnp.broadcast_to(w[6:8], (5, 2))),
    }
    theta = 0.5 * jax.random.normal(jax.random.key(1), (12,))
    v = jax.random.normal(jax.random.key(2), (12,))
    for name, policy in policies.items():
        product, expected = jax.jit(
            lambda theta, policy=policy: (trpo.fisher_product(policy, theta)(v), dense_fisher(policy, theta) @ v)
        )(theta)
        np.testing.assert_allclose(product, expected, rtol=1e-3, atol=1e-5, err_msg=name)
        assert float(v @ product) > 0


def test_no_step_without_a_gradient_or_an_improvement():
    theta = jnp.array([[0.3, -0.2]])
    flat = lambda policy: jnp.float32(0.0)
    stays, done = jax.jit(lambda t: trpo.trust_region_step(Categorical, flat, t, max_kl=0.01))(theta)
    assert (stays == theta).all() and not done.accepted and done.kl == 0.0
    # the surrogate's gradient points uphill, but every step it is measured at is downhill
    peak = lambda policy: -jnp.abs(policy.logits[0, 0] - 0.3) * 1e3 + policy.logits[0, 1] * 0.0
    stays, done = jax.jit(lambda t: trpo.trust_region_step(Categorical, peak, t, max_kl=0.01))(theta)
    assert (stays == theta).all() and not done.accepted and done.backtracks == 10


def test_the_bound_holds_in_training():
    config = trpo.TRPOConfig(envs=4, steps=32, hidden=(8,), value_epochs=1, value_minibatches=1)
    agent = trpo.make(config, envs.make("CartPole-v1"))
    _, rows = jax.jit(lambda key: jax.lax.scan(lambda s, _: agent.step(s), agent.init(key), length=15))(
        jax.random.key(0)
    )
    assert (rows["policy/kl"] <= config.max_kl).all()
    assert rows["policy/accepted"].mean() > 0.8 and (rows["policy/gain"][rows["policy/accepted"] == 1] > 0).all()
