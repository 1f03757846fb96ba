import numpy as np
import pytest
from scipy import stats

from loratune.recommendation.best import against_best, dunnett_critical


def test_one_comparison_needs_students_t():
    for df in (2, 5, 30):
        assert dunnett_critical(1, df=df) == pytest.approx(stats.t.ppf(0.95, df), rel=2e-3)


def test_the_critical_values_are_dunnetts_published_ones():
    # Dunnett 1955, table 1a (one-sided, 5%).
    published = {(2, 10): 2.15, (4, 20): 2.30, (3, 12): 2.29, (9, 20): 2.60}
    for (num, df), value in published.items():
        assert dunnett_critical(num, df=df) == pytest.approx(value, abs=0.011)


def test_the_bounds_hold_together_95_times_in_100():
    draw = np.random.default_rng(2)
    excluded_best = 0
    too_small = 0
    means = np.array([0.0, -0.2, -1.0, -1.0, -3.0])
    for _ in range(2000):
        scores = means[:, None] + draw.normal(size=(5, 3)) * 0.5 + draw.normal(size=(1, 3)) * 5
        bounds = against_best(scores.tolist())
        true = means - np.array([np.delete(means, i).max() for i in range(5)])
        excluded_best += bounds.upper[0] == 0.0
        too_small += any(
            lower > min(0.0, value) + 1e-12 for lower, value in zip(bounds.lower, true, strict=True)
        )
    assert excluded_best <= 0.05 * 2000
    assert too_small <= 0.06 * 2000


def test_a_seed_that_is_lucky_everywhere_is_no_noise():
    base = np.array([[1.0], [2.0], [3.0]])
    bounds = against_best((base + np.array([[0.0, 10.0, -7.0]])).tolist())
    assert bounds.sigma == pytest.approx(0.0, abs=1e-12)
    assert bounds.df == 4
    assert bounds.lower[2] == 0.0
    assert bounds.upper[0] == 0.0
