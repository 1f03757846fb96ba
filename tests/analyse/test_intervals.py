from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from loratune.analyse.intervals import holm, paired_t, t_estimate, welch_t

ONE = [0.501, 0.498, 0.5015, 0.503]
TWO = [0.502, 0.499, 0.4995, 0.500]


def test_paired_differences_agree_with_scipy():
    found = paired_t([x - y for x, y in zip(ONE, TWO, strict=True)])
    known = stats.ttest_rel(ONE, TWO)
    assert found.p_value == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))
    assert found.df == 3


def test_unpaired_ones_agree_with_scipys_welch():
    found = welch_t(ONE, TWO[:3])
    known: Any = stats.ttest_ind(ONE, TWO[:3], equal_var=False)
    assert found.p_value == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


def test_equivalence_agrees_with_statsmodels():
    found = paired_t([x - y for x, y in zip(ONE, TWO, strict=True)])
    for margin in (0.001, 0.01):
        known = ttost_paired(np.array(ONE), np.array(TWO), -margin, margin)[0]
        assert found.equivalence_p(margin) == pytest.approx(known)


def test_no_noise_at_all_decides_everything():
    same = paired_t([0.0, 0.0])
    assert (same.p_value, same.low, same.high, same.equivalence_p(0.1)) == (1.0, 0.0, 0.0, 0.0)
    apart = paired_t([1.0, 1.0])
    assert (apart.p_value, apart.equivalence_p(0.1)) == (0.0, 1.0)


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()
    p_values = [0.2, 0.9, 0.011, 0.6, 0.04, 0.04]
    adjusted: Any = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(tuple(adjusted))


def test_a_bootstraps_interval_and_p_say_the_same():
    ts = np.sort(np.abs(np.random.default_rng(2).standard_t(4, size=1999)))
    found = None
    for value in np.linspace(0.0, 6.0, 200):
        found = t_estimate(float(value), standard_error=1.0, df=4.0, procedure="b", absolute_ts=ts)
        assert (found.p_value < 0.05) == (found.low > 0.0)
    assert found is not None
    # The 95% point of |t| with 4 degrees of freedom, as near as 1,999 draws bring it.
    assert found.critical == pytest.approx(stats.t.ppf(0.975, 4), rel=0.1)
