from typing import Any

import pytest
from statsmodels.stats.contingency_tables import mcnemar as of_statsmodels

from loratune.analyse.proportions import mcnemar, wilson
from loratune.errors import AnalysisError


def test_sixty_against_forty_is_the_textbook_example():
    found = mcnemar(60, 40)
    assert found.exact == pytest.approx(0.05689, abs=5e-6)
    assert found.mid_p == pytest.approx(0.04604, abs=5e-6)
    assert mcnemar(40, 60) == found


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (3, 9), (120, 90)])
def test_the_exact_p_is_that_of_statsmodels(first, second):
    table = [[10, first], [second, 10]]
    known: Any = of_statsmodels(table, exact=True)
    assert mcnemar(first, second).exact == pytest.approx(known.pvalue)
    assert mcnemar(first, second).mid_p <= mcnemar(first, second).exact


def test_the_difference_of_sixty_against_forty_on_gsm8k_is_1_516_points():
    # The paired standard error of a difference (b - c) / n is sqrt(b + c - (b - c)^2 / n) / n.
    n, b, c = 1319, 60, 40
    assert 100 * (b - c) / n == pytest.approx(1.516, abs=5e-4)
    assert 100 * (b + c - (b - c) ** 2 / n) ** 0.5 / n == pytest.approx(0.757, abs=5e-4)


def test_wilson_of_gsm8k_is_the_known_interval():
    assert wilson(791, 1319) == pytest.approx((0.5730, 0.6258), abs=5e-5)
    assert wilson(0, 10)[0] == 0.0


def test_impossible_counts_are_said():
    with pytest.raises(AnalysisError, match="11 right of 10"):
        wilson(11, 10)
    with pytest.raises(AnalysisError, match="numbers of questions"):
        mcnemar(-1, 3)
