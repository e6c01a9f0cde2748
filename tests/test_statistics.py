import numpy as np
import pytest

from jaxrl.statistics import bootstrap, interquartile_mean


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    assert interquartile_mean(np.array([100.0, 2, 3, -50])) == 2.5
    assert interquartile_mean(np.array([9.0, 1, 2, 3, 4, 5, 6, -7])) == np.mean([2, 3, 4, 5])
    assert interquartile_mean(np.array([3.0])) == 3


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
def test_runs_at_the_border_count_in_part(n):
    """Each run split into four equal ones, so that 4 divides their number."""
    scores = np.random.default_rng(n).normal(size=(n, 2))
    split = np.sort(np.repeat(scores, 4, axis=0), axis=0)
    np.testing.assert_allclose(interquartile_mean(scores), split[n : 3 * n].mean(axis=0))


def test_bootstrap_interval_of_a_mean_has_its_standard_error():
    scores = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(scores, lambda x: x.mean(axis=0))
    error = scores.std() / 20
    np.testing.assert_allclose([low, high], scores.mean() + np.array([-1.96, 1.96]) * error, atol=0.15 * error)
    assert low < scores.mean() < high and (low, high) == bootstrap(scores, lambda x: x.mean(axis=0))


def test_one_run_has_no_width():
    assert bootstrap(np.array([3.0])) == (3.0, 3.0)
