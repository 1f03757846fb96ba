import math

import numpy as np
import pytest

from loratune.analyse.laws.steps import fit_steps_to_target
from loratune.errors import AnalysisError

SIZES = [2**k for k in range(6, 15)]


def test_the_published_steps_give_the_published_numbers():
    steps = [46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600]
    law = fit_steps_to_target(SIZES, steps)
    assert law.least_steps == pytest.approx(1293.827, rel=1e-3)
    assert law.samples_at_small_batches == pytest.approx(2834258, rel=1e-3)
    assert law.critical_batch_size == pytest.approx(745.32, rel=1e-3)
    assert law.critical_low is not None
    assert law.critical_high is not None
    assert law.critical_low < 745.32 < law.critical_high


def test_at_the_critical_batch_size_there_are_a_fifth_more_steps_than_by_perfect_halving():
    law = fit_steps_to_target(SIZES, [1000 + 5e5 / size for size in SIZES])
    perfect = law.steps(256) * 256 / law.critical_batch_size
    assert law.steps(law.critical_batch_size) == pytest.approx(1.2 * perfect)


def test_intervals_of_the_critical_batch_size_cover_it():
    draw = np.random.default_rng(0)
    true = 1.2 * 256 + 0.2 * 2834258 / 1294
    hits = 0
    for _ in range(400):
        steps = [(1294 + 2834258 / size) * math.exp(draw.normal(0, 0.06)) for size in SIZES]
        law = fit_steps_to_target(SIZES, steps)
        hits += (law.critical_low or 0) <= true <= (law.critical_high or math.inf)
    assert 0.92 <= hits / 400 <= 0.98  # about three standard errors of 1.1 points


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([1e6 / size for size in SIZES], "no bend"),
        ([500.0] * 9, "no bend"),
        ([1.0] * 8 + [0.0], "positive"),
    ],
)
def test_steps_without_a_bend_are_refused(steps, said):
    with pytest.raises(AnalysisError, match=said):
        fit_steps_to_target(SIZES, steps)


def test_three_batch_sizes_are_too_few():
    with pytest.raises(AnalysisError, match="at least 4"):
        fit_steps_to_target([1, 2, 4], [4, 3, 2])
