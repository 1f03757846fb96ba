"""Power and its inverses, against scipy, statsmodels, published figures and simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from decisions import POWER_CASES
from loratune.planning.power import (
    DifferenceNoise,
    called_effect,
    detectable_effect,
    detectable_multiples,
    miller_sample_size,
    paired_detectable_effect,
    power,
    questions_for_discordance,
    questions_to_detect,
    seeds_to_detect,
    study_detectable_effect,
    unpaired_detectable_effect,
)
from null_test import realised_power

NOISE = DifferenceNoise(2 * 0.005**2, 0.06, 0.08, "simulated")


def test_miller_needs_969_questions_for_three_points():
    assert miller_sample_size(0.03, question_variance=1 / 9) == 969
    asked_once = miller_sample_size(0.03, question_variance=1 / 9, variance_a=0.1, variance_b=0.1)
    often = miller_sample_size(
        0.03, question_variance=1 / 9, variance_a=0.1, variance_b=0.1, samples_a=10, samples_b=10
    )
    assert 969 < often < asked_once


def test_gsm8k_detects_5_3_points_unpaired_and_2_9_to_3_8_paired():
    assert 100 * unpaired_detectable_effect(0.6, num_questions=1319) == pytest.approx(5.3, abs=0.05)
    # Paired: answers of two adapters with correlations of .7 and .5.
    for correlation, points in ((0.7, 2.9), (0.5, 3.8)):
        discordance = 2 * 0.24 * (1 - correlation)
        found = paired_detectable_effect(discordance, num_questions=1319)
        assert 100 * found == pytest.approx(points, abs=0.05)


@pytest.mark.parametrize(("discordance", "known"), [(0.05, 3.9), (0.1, 7.8), (0.2, 15.7)])
def test_one_point_needs_thousands_of_questions(discordance, known):
    needed = questions_for_discordance(0.01, discordance=discordance)
    assert needed / 1000 == pytest.approx(known, abs=0.05)
    assert paired_detectable_effect(discordance, num_questions=round(needed)) == pytest.approx(
        0.01, rel=1e-3
    )


@pytest.mark.parametrize("df", [2.0, 4.0, 30.0, 5000.0])
def test_the_power_of_t_is_that_of_statsmodels(df):
    for effect in (0.5, 2.0, 4.0):
        # statsmodels' effect is in standard deviations: times sqrt(nobs) it is in standard errors.
        known = TTestPower().power(effect / math.sqrt(df + 1), nobs=df + 1, alpha=0.05, df=df)
        assert power(effect, standard_error=1.0, df=df) == pytest.approx(known, abs=2e-4)
    assert power(0.0, standard_error=1.0, df=df) == pytest.approx(0.05, abs=1e-4)


def test_detectable_and_called_effects_have_the_power_that_they_state():
    for df in (2.0, 9.0, math.inf):
        detectable = detectable_effect(3.0, df=df)
        assert power(detectable, standard_error=3.0, df=df) == pytest.approx(0.8, abs=1e-6)
    many = np.array([1.7, 4.3, 33.0, 5000.0])
    assert detectable_multiples(many) == pytest.approx(
        [detectable_effect(1.0, df=df) for df in many],
        rel=5e-3,  # straight between its knots
    )
    called, detectable = called_effect(1.0, df=9.0), detectable_effect(1.0, df=9.0)
    assert stats.nct.sf(detectable, 9.0, called) == pytest.approx(0.8, abs=1e-4)


def test_too_few_seeds_detect_nothing():
    assert study_detectable_effect(NOISE, num_seeds=2, num_questions=1319) is None
    assert study_detectable_effect(NOISE, num_seeds=1, num_questions=None) is None
    assert questions_to_detect(0.01, NOISE, num_seeds=2) is None


def test_what_is_needed_is_enough_and_one_less_is_not():
    seeds = seeds_to_detect(0.02, NOISE, num_questions=4000)
    assert seeds is not None
    assert study_detectable_effect(NOISE, num_seeds=seeds, num_questions=4000) <= 0.02  # type: ignore[operator]
    assert study_detectable_effect(NOISE, num_seeds=seeds - 1, num_questions=4000) > 0.02  # type: ignore[operator]
    questions = questions_to_detect(0.01, NOISE, num_seeds=12)
    assert questions is not None
    assert study_detectable_effect(NOISE, num_seeds=12, num_questions=questions) <= 0.01  # type: ignore[operator]
    assert study_detectable_effect(NOISE, num_seeds=12, num_questions=questions - 1) > 0.01  # type: ignore[operator]


def test_what_seeds_or_questions_alone_cannot_do_is_said_to_be_impossible():
    assert seeds_to_detect(0.01, NOISE, num_questions=1319) is None
    restless = DifferenceNoise(0.05**2, 0.06, 0.08, "simulated")
    assert questions_to_detect(0.01, restless, num_seeds=5) is None


def test_a_loss_is_a_t_test_over_seeds():
    found = study_detectable_effect(NOISE, num_seeds=5, num_questions=None)
    assert found is not None
    error = math.sqrt(NOISE.seed_variance / 5)
    assert power(found, standard_error=error, df=4.0) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_the_stated_power_is_realised(num_seeds):
    n = 1000
    found = realised_power(NOISE, num_seeds=num_seeds, num_questions=300, num_simulations=n, seed=5)
    # 3 points are asked for; three standard errors of n simulations are added.
    slack = 0.03 + 3 * math.sqrt(0.8 * 0.2 / n)
    assert found.found == pytest.approx(0.8, abs=slack)
    assert found.called == pytest.approx(0.8, abs=slack)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "noise"), POWER_CASES)
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_the_stated_power_is_realised_within_three_points_at_full_size(name, noise, num_seeds):
    found = realised_power(
        noise, num_seeds=num_seeds, num_questions=500, num_simulations=10_000, seed=6
    )
    assert found.found == pytest.approx(0.8, abs=0.03), name
    assert found.called == pytest.approx(0.8, abs=0.03), name
