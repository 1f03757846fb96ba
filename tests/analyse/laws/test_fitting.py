import math

import numpy as np
import pytest
import statsmodels.api as sm

from loratune.analyse.laws.fitting import aicc, find_root, fit_offset, fit_shape


def test_a_curve_linear_in_its_parameter_is_ordinary_regression():
    # For y = offset + phi x profile and t interval are the same thing; statsmodels is the oracle.
    draw = np.random.default_rng(0)
    x = np.arange(9.0)
    y = 1.0 + 0.3 * x + draw.normal(0, 0.2, 9)
    fit = fit_shape(y.tolist(), lambda phi: phi * x, low=-3, high=3)
    oracle = sm.OLS(y, sm.add_constant(x)).fit()
    assert (fit.offset, fit.phi) == pytest.approx(tuple(oracle.params), abs=1e-7)
    assert fit.rss == pytest.approx(oracle.ssr)
    low, high = oracle.conf_int()[1]
    # brentq stops within 1e-10 of phi, and the minimum itself within about 1e-8.
    assert (fit.phi_low, fit.phi_high) == pytest.approx((low, high), abs=1e-6)


def test_aicc_is_statsmodels_up_to_the_constant_that_fits_of_the_same_points_share():
    draw = np.random.default_rng(1)
    x = np.arange(8.0)
    y = 0.5 * x + draw.normal(0, 0.3, 8)
    one = sm.OLS(y, np.ones(8)).fit()
    two = sm.OLS(y, sm.add_constant(x)).fit()

    def corrected(fit, k):
        return -2 * fit.llf + 2 * k + 2 * k * (k + 1) / (8 - k - 1)

    ours = [aicc(fit.ssr, num_points=8, num_parameters=k) for fit, k in ((one, 1), (two, 2))]
    assert None not in ours
    assert ours[1] - ours[0] == pytest.approx(corrected(two, 3) - corrected(one, 2))  # type: ignore[operator]


def test_aicc_does_not_exist_with_too_few_points():
    assert aicc(1.0, num_points=4, num_parameters=2) is None
    assert aicc(1.0, num_points=5, num_parameters=2) is not None


def test_a_parameter_at_the_end_of_the_search_is_not_bounded():
    # 1 / (1 + e^(phi - x)) is flat for every phi far below x: the data say only "small".
    x = np.arange(5.0)
    fit = fit_shape([0.0] * 5, lambda phi: -np.log1p(np.exp(phi - x)), low=-30, high=30)
    assert fit.phi is None
    assert fit.phi_low is None


def test_one_degree_of_freedom_less_than_none_gives_no_interval():
    fit = fit_shape([0.0, 1.0], lambda phi: phi * np.array([0.0, 1.0]), low=-3, high=3)
    assert fit.df == 0
    assert fit.residual == 0.0
    assert (fit.phi_low, fit.phi_high) == (None, None)


def test_an_offset_alone_is_the_mean_of_what_the_curve_leaves():
    fit = fit_offset([1.0, 2.0, 6.0], [0.0, 1.0, 2.0])
    assert fit.offset == pytest.approx(2.0)
    assert fit.rss == pytest.approx(1 + 1 + 4)
    assert fit.phi is None


def test_a_root_is_found():
    assert find_root(lambda x: x * x - 2, 0, 2) == pytest.approx(math.sqrt(2))
