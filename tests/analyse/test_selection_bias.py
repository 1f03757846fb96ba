import itertools
import math

import numpy as np
import pytest
from opda.nonparametric import EmpiricalDistribution

from loratune.analyse.selection_bias import (
    expected_best,
    expected_maximum,
    noise_near_the_best,
    selection_bias,
)
from loratune.errors import AnalysisError


@pytest.mark.parametrize(
    ("num", "known"),
    [(1, 0.0), (2, 0.5642), (5, 1.163), (8, 1.424), (10, 1.539), (40, 2.161), (1000, 3.2414)],
)
def test_the_expected_maximum_is_the_tabulated_one(num, known):
    assert expected_maximum(num) == pytest.approx(known, abs=5e-4)  # the table's last digit


def test_the_expected_maximum_is_that_of_a_simulation():
    drawn = np.random.default_rng(1).standard_normal((20_000, 13)).max(axis=1)
    error = drawn.std() / math.sqrt(len(drawn))
    assert expected_maximum(13) == pytest.approx(drawn.mean(), abs=4 * error)


def test_choosing_and_scoring_on_gsm8k_flatters_40_configurations_over_5_by_0_97_points():
    def bias(num):
        return selection_bias(num, accuracy=0.5, num_questions=1319, correlation=0.5)

    assert 100 * (bias(40) - bias(5)) == pytest.approx(0.97, abs=0.005)
    assert bias(8) == pytest.approx(1.424 * 0.00973, rel=1e-2)
    with_seeds = selection_bias(8, accuracy=0.6, num_questions=1319, seed_sd=0.01)
    noise = math.sqrt(0.24 / 1319 + 1e-4)
    assert with_seeds == pytest.approx(expected_maximum(8) * noise)


def test_the_expected_best_of_two_of_four_is_ten_thirds():
    assert expected_best([3, 1, 4, 2], num_draws=2) == pytest.approx(10 / 3)
    assert expected_best([3, 1, 4, 2], num_draws=2, biased=True) == pytest.approx(3.125)
    assert expected_best([3, 1, 4, 2], num_draws=2, higher_is_better=False) == pytest.approx(5 / 3)


@pytest.mark.parametrize("num_draws", [1, 2, 4, 7])
@pytest.mark.parametrize("higher", [True, False])
def test_the_expected_best_is_the_mean_over_all_subsets_and_opda_agrees_on_the_biased_one(
    num_draws, higher
):
    values = list(np.random.default_rng(num_draws).normal(size=7))
    best = max if higher else min
    over_subsets = [best(some) for some in itertools.combinations(values, num_draws)]
    assert expected_best(values, num_draws=num_draws, higher_is_better=higher) == pytest.approx(
        np.mean(over_subsets)
    )
    curve = EmpiricalDistribution(values).average_tuning_curve(num_draws, minimize=not higher)
    assert expected_best(
        values, num_draws=num_draws, higher_is_better=higher, biased=True
    ) == pytest.approx(float(curve))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("num", [3, 4, 5, 6, 9, 27])
def test_the_noise_near_the_best_is_the_true_one_within_a_fifth(num, num_seeds):
    draw = np.random.default_rng([num, num_seeds])
    found = [
        noise_near_the_best(
            # Seeds that are lucky for all are no noise between configurations.
            0.1 * draw.normal(size=(num, num_seeds)) + 10 * draw.normal(size=num_seeds),
            higher_is_better=True,
        )
        for _ in range(2000)
    ]
    # 2,000 means have a standard error of 2% at most.
    within = 0.2 if num_seeds == 2 and num < 7 else 0.12
    assert np.mean([one or 0.0 for one in found]) == pytest.approx(0.1, rel=within)


@pytest.mark.parametrize("higher", [True, False])
def test_what_scatters_far_from_the_best_is_no_noise_near_it(higher):
    draw = np.random.default_rng(4)
    scores = draw.normal(size=(12, 3)) - 3.0 * (np.arange(12) >= 6)[:, None]
    scores = scores if higher else -scores
    known = noise_near_the_best(scores, higher_is_better=higher)
    blown = np.where(np.arange(12)[:, None] < 6, scores, 100 * scores)
    assert noise_near_the_best(blown, higher_is_better=higher) == known
    # Nor is one that lost a seed and is among the better half in spite of it.
    lost = scores.copy()
    lost[2, 1] += 6.0 if higher else -6.0
    spread = noise_near_the_best(lost, higher_is_better=higher)
    assert spread == pytest.approx(known, rel=0.25)


def test_the_noise_of_two_points_or_of_one_seed_is_not_known():
    assert noise_near_the_best(np.ones((2, 3)), higher_is_better=True) is None
    assert noise_near_the_best(np.ones((9, 1)), higher_is_better=True) is None


def test_impossible_counts_are_said():
    with pytest.raises(AnalysisError, match="give a number from 1 to 3"):
        expected_best([1, 2, 3], num_draws=4)
    with pytest.raises(AnalysisError, match="at least 1"):
        expected_maximum(0)
