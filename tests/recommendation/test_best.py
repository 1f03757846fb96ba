import math
from csv import DictReader
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from loratune.recommendation.best import against_best, dunnett_critical
from ranges import CASES, told

# What docs/choosing-a-batch-size.md states for 9 batch sizes and two seeds, where above 5%.
TWO_SEEDS = {
    "falling from 0.5% to 0.03%, a flat curve": 0.088,
    "five times at the best, rivals 0.55% worse": 0.118,
    "five times at the best, rivals 0.05% worse": 0.129,
    "ten times at the best, rivals 0.05% worse": 0.167,
    "twenty times at the best, rivals 0.05% worse": 0.184,
    "ten times at one rival, rivals 0.05% worse": 0.138,
    "ten times at the best and one rival, rivals 0.05% worse": 0.152,
    "uneven, most at the best, rivals 0.01% worse": 0.147,
}


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
    scores = (base + np.array([[0.0, 10.0, -7.0]])).tolist()
    # Where two units do not matter, none is set aside; then all three are compared.
    bounds = against_best(scores, tolerated=2.0 + 1e-9)
    assert bounds.sigma == pytest.approx(0.0, abs=1e-12)
    assert bounds.df == 4
    assert bounds.lower[2] == 0.0
    assert bounds.upper[0] == 0.0
    alone = against_best(scores)
    assert (alone.sigma, alone.df) == (None, None)
    assert alone.lower == pytest.approx((-2.0, -1.0, 0.0))
    assert alone.upper == pytest.approx((0.0, 0.0, 1.0))


@pytest.mark.parametrize("num_sizes", [4, 9])
@pytest.mark.parametrize("name", CASES)
def test_from_three_seeds_on_wrong_answers_stay_below_5_in_100_whatever_the_noise(
    name: str, num_sizes: int
):
    for num_seeds in (3, 6):
        found = told(
            CASES[name], num_sizes=num_sizes, num_seeds=num_seeds, num_simulations=300, seed=3
        )
        # 300 draws of exactly 5% exceed 22 in 3% of cases.
        assert found.wrong <= 22 / 300


@pytest.mark.parametrize("name", CASES)
def test_with_two_seeds_wrong_answers_are_no_more_than_the_docs_say(name: str):
    stated = TWO_SEEDS.get(name, 0.05)
    found = told(CASES[name], num_sizes=9, num_seeds=2, num_simulations=400, seed=3)
    assert found.wrong <= stated + 2 * math.sqrt(stated * (1 - stated) / 400)


@pytest.mark.parametrize(("model", "highest"), [("12m", 4), ("28m", 4)])
def test_batch_sizes_far_off_do_not_blur_what_six_seeds_say_of_the_best(model: str, highest: int):
    path = Path(__file__).parents[1] / "recorded" / f"demo-{model}.csv"
    losses = dict[tuple[int, float], list[float]]()
    with path.open(newline="") as file:
        for row in DictReader(file):
            point = int(row["batch_size"]), float(row["learning_rate"])
            losses.setdefault(point, []).append(float(row["validation_loss"] or "inf"))
    means = {point: np.mean(of) for point, of in losses.items()}
    sizes = sorted({size for size, _ in losses})
    best = [min((p for p in means if p[0] == size), key=means.__getitem__) for size in sizes]
    scores = -np.array([losses[point] for point in best])
    assert scores.shape == (9, 6)
    bounds = against_best(scores.tolist(), tolerated=0.005 * float(abs(scores.mean(1).max())))
    possible = [size for size, upper in zip(sizes, bounds.upper, strict=True) if upper > 0]
    assert max(possible) == highest
