"""A Markov language against counts and against its own entropy."""

import jax
import numpy as np
import pytest

from jaxrl.data import markov


@pytest.mark.parametrize("order", [1, 2])
def test_rows_follow_the_chain(order):
    table = markov.chain(jax.random.key(0), symbols=3, order=order)
    tokens = np.asarray(markov.sample(jax.random.key(1), table, rows=4000, length=6))
    assert tokens.shape == (4000, 6) and tokens.min() == 0 and tokens.max() == 2
    counts = np.zeros((3,) * (order + 1))
    for i in range(6 - order):
        np.add.at(counts, tuple(tokens[:, i : i + order + 1].T), 1)
    np.testing.assert_allclose(counts / counts.sum(), markov.stationary(table)[..., None] * table, atol=0.02)
    start = np.zeros((3,) * order)
    np.add.at(start, tuple(tokens[:, :order].T), 1)
    np.testing.assert_allclose(start / 4000, markov.stationary(table), atol=0.03)


def test_log_probs_sum_to_one_and_tend_to_the_entropy():
    table = markov.chain(jax.random.key(0), symbols=3, order=2)
    rows = np.stack(np.unravel_index(np.arange(3**4), (3,) * 4), axis=1)
    p = np.exp(np.asarray(markov.log_probs(table, rows)).sum(1))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    moves = np.asarray(table, np.float64)
    begin = np.asarray(markov.stationary(table), np.float64)
    want = [begin[a, b] * moves[a, b, c] * moves[b, c, d] for a, b, c, d in rows]
    np.testing.assert_allclose(p, want, rtol=1e-4)
    np.testing.assert_allclose(np.einsum("ab,abc->bc", begin, moves), begin, atol=1e-6)
    tokens = markov.sample(jax.random.key(1), table, rows=2000, length=20)
    later = -float(np.asarray(markov.log_probs(table, tokens))[:, 2:].mean())
    assert abs(later - markov.entropy_rate(table)) < 0.02
    short = markov.log_probs(markov.chain(jax.random.key(0), symbols=3, order=1), rows[:, :1])
    np.testing.assert_allclose(np.exp(short[:, 0]).reshape(3, -1)[:, 0].sum(), 1, rtol=1e-5)
