"""The crossed model against textbook ANOVA, algebra, and coverage on simulated data."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from loratune.analyse.crossed import (
    crossed_components,
    crossed_difference,
    crossed_variance,
    crossed_zero_set,
    not_too_certain,
)
from loratune.errors import AnalysisError
from loratune.planning.power import DifferenceNoise
from null_test import COVERAGE_CASES, coverage, normal_tables


def tables(draw, n, seeds, questions, *, seed, question, residual):
    """[n, S, Q] of differences whose true mean is 0."""
    noise = DifferenceNoise(seed, question, residual, "simulated")
    return normal_tables(draw, n, num_seeds=seeds, num_questions=questions, noise=noise)


def mean_squares(table):
    """By statsmodels: of seeds, questions and residuals."""
    import pandas as pd

    seeds, questions = np.indices(table.shape)
    frame = pd.DataFrame({"y": table.ravel(), "s": seeds.ravel(), "q": questions.ravel()})
    anova = anova_lm(ols("y ~ C(s) + C(q)", frame).fit())
    return [float(anova.loc[name, "mean_sq"]) for name in ("C(s)", "C(q)", "Residual")]


def test_variance_and_components_are_those_of_a_two_way_anova():
    draw = np.random.default_rng(3)
    (table,) = tables(draw, 1, 5, 40, seed=0.05, question=0.3, residual=0.5)
    a, b, e = mean_squares(table)
    found = crossed_variance(table)
    assert float(found.variance) == pytest.approx((a + b - e) / table.size)
    # Satterthwaite's, with the seeds' mean square counted twice.
    known = (2 * a + b - e) ** 2 / ((2 * a) ** 2 / 4 + b**2 / 39 + e**2 / (4 * 39))
    assert float(found.df) == pytest.approx(known)
    parts = crossed_components(table)
    assert (parts.seeds, parts.questions, parts.residual) == pytest.approx(
        ((a - e) / 40, (b - e) / 5, e)
    )


def test_two_tables_of_seeds_that_are_not_shared_have_a_part_each():
    draw = np.random.default_rng(4)
    one = tables(draw, 1, 4, 30, seed=0.1, question=0.3, residual=0.5)[0]
    two = tables(draw, 1, 6, 30, seed=0.2, question=0.3, residual=0.5)[0]
    found = crossed_difference(one, two, paired=False)
    known = float(np.var(one.mean(0) - two.mean(0), ddof=1)) / 30
    for table in (one, two):
        a, _, e = mean_squares(table)
        known += (a - e) / table.size
    assert found.value == pytest.approx(one.mean() - two.mean())
    assert found.standard_error == pytest.approx(math.sqrt(known))


def test_questions_of_one_source_are_a_unit():
    draw = np.random.default_rng(5)
    first = (draw.random((4, 30)) < 0.6).astype(float)
    second = (draw.random((4, 30)) < 0.5).astype(float)
    single = crossed_difference(first, second, paired=True)
    # Every question asked three times tells nothing new.
    thrice = crossed_difference(
        np.repeat(first, 3, axis=1),
        np.repeat(second, 3, axis=1),
        paired=True,
        sources=np.repeat(np.arange(30), 3).tolist(),
    )
    assert thrice.value == pytest.approx(single.value)
    assert thrice.standard_error == pytest.approx(single.standard_error)
    # Unequal sources keep the mean over questions.
    uneven = crossed_difference(first, second, paired=True, sources=[0] * 10 + list(range(1, 21)))
    assert uneven.value == pytest.approx(single.value)


def test_too_few_seeds_or_one_source_are_refused():
    two = np.ones((2, 9))
    with pytest.raises(AnalysisError, match="2 seeds; it takes 3"):
        crossed_difference(two, two, paired=True)
    with pytest.raises(AnalysisError, match="share one source"):
        crossed_difference(np.eye(3), np.ones((3, 3)), paired=True, sources=[7, 7, 7])


def test_the_same_answers_give_the_same_bytes():
    answers = (np.random.default_rng(6).random((2, 12, 50)) < 0.5).astype(float)
    first = crossed_difference(answers[0], answers[1], paired=True)
    second = crossed_difference(answers[0].copy(), answers[1].copy(), paired=True)
    assert first.procedure == "two-way bootstrap"
    assert first == second


def test_the_bootstrap_agrees_with_the_model_where_all_is_normal():
    draw = np.random.default_rng(7)
    table = tables(draw, 1, 12, 400, seed=0.002, question=0.2, residual=0.3)[0]
    found = crossed_difference(table, np.zeros_like(table), paired=True)
    # 1,999 resamples place a 95% point to about 2%; the seeds' own scatter adds as much again.
    assert found.critical == pytest.approx(stats.t.ppf(0.975, found.df), rel=0.1)


def test_the_zero_set_is_where_the_test_does_not_reject():
    draw = np.random.default_rng(8)
    left = tables(draw, 1, 3, 200, seed=1e-4, question=0.05, residual=0.05)[0] - 0.2
    right = left + 0.5
    ((low, high),) = crossed_zero_set(left, right)
    for w, inside in ((low + 0.01, True), (high - 0.01, True), (low - 0.01, False)):
        found = crossed_difference(left + 0.5 * w, np.zeros_like(left), paired=True)
        assert (found.low <= 0.0 <= found.high) == inside


def test_the_zero_set_covers_the_crossing_where_questions_share_sources():
    # 40 sources of 6 questions; the mean goes from -0.05 to 0.05, so that it is 0 half-way.
    draw = np.random.default_rng(3)
    sources = np.repeat(np.arange(40), 6)
    covered = {"with sources": 0, "without": 0}
    for _ in range(300):
        left = draw.normal(0, 0.3, 40)[sources] + draw.normal(0, 0.02, (5, 1)) - 0.05
        left = left + draw.normal(0, 0.2, (5, 240))
        right = left + 0.1 + draw.normal(0, 0.02, (5, 1)) + draw.normal(0, 0.2, (5, 240))
        for name, given in (("with sources", sources.tolist()), ("without", None)):
            found = crossed_zero_set(left, right, sources=given)
            covered[name] += any(low <= 0.5 <= high for low, high in found)
    assert 0.91 < covered["with sources"] / 300 < 0.99  # three standard errors of 300
    assert covered["without"] / 300 < 0.75


@pytest.mark.parametrize("num_seeds", [3, 9, 10, 20])
@pytest.mark.parametrize("differing", [0, 1, 2, 4, 30])
def test_few_answers_that_differ_give_a_finite_interval_no_narrower_than_their_chance(
    num_seeds, differing
):
    first = np.ones((num_seeds, 200))
    second = first.copy()
    second[:, :differing] = 0.0  # The same in every seed: questions alone differ.
    plain = crossed_difference(first, second, paired=True)
    found = not_too_certain(plain, first, second)
    assert math.isfinite(found.critical)
    exact = stats.binomtest(differing, 200).proportion_ci(method="exact")
    if differing < 10:
        assert found.high == pytest.approx(exact.high) or found.high > exact.high
        assert found.low <= exact.low
        # Questions of which each stands six times tell no more than one of each.
        clustered = not_too_certain(
            plain,
            np.repeat(first, 6, axis=1),
            np.repeat(second, 6, axis=1),
            sources=np.repeat(np.arange(200), 6).tolist(),
        )
        assert clustered.high == pytest.approx(found.high)
    else:
        assert found == plain


def test_one_answer_of_one_seed_does_not_make_the_bootstraps_interval_infinite():
    first, second = np.ones((10, 200)), np.ones((10, 200))
    second[0, 0] = 0.0
    found = not_too_certain(crossed_difference(first, second, paired=True), first, second)
    assert (found.procedure, math.isfinite(found.low)) == ("crossed model, Satterthwaite", True)
    assert found.p_value > 0.05


@pytest.mark.parametrize("case", list(COVERAGE_CASES))
@pytest.mark.parametrize("num_seeds", [3, 5, 20])
def test_intervals_cover_what_they_say(case, num_seeds):
    n = 2000 if num_seeds < 10 else 200
    found = coverage(case, num_seeds=num_seeds, num_questions=60, num_simulations=n, seed=9)
    slack = 3 * math.sqrt(0.05 * 0.95 / n)  # three standard errors of n simulations
    assert found >= 0.93 - slack
    if case in ("questions dominate", "seeds dominate"):
        assert found <= 0.97 + slack


@pytest.mark.slow
@pytest.mark.parametrize("case", list(COVERAGE_CASES))
@pytest.mark.parametrize("num_seeds", [3, 5, 20])
def test_intervals_cover_what_they_say_at_full_size(case, num_seeds):
    n = 20_000 if num_seeds < 10 else 4_000
    found = coverage(case, num_seeds=num_seeds, num_questions=100, num_simulations=n, seed=10)
    assert found >= 0.93
    if case in ("questions dominate", "seeds dominate"):
        assert found <= 0.97
