from typing import Any

import numpy as np
import pytest
from scipy import stats

from loratune.analyse.laws.optimum import SeedOptima, fit_power_law, vertex
from loratune.errors import AnalysisError


def optima(exponent: float, noise: float, *, seed: int, xs=(25, 50, 100, 200), seeds=3):
    draw = np.random.default_rng(seed)
    return [
        SeedOptima(x, tuple((3 + exponent * np.log2(x) + draw.normal(0, noise, seeds)).tolist()))
        for x in xs
    ]


def test_the_exponent_and_its_interval_are_those_of_a_regression():
    made = optima(0.5, 0.3, seed=0)
    fit = fit_power_law(made)
    x = np.log2([one.x for one in made for _ in range(3)])
    y = np.concatenate([one.log2_best for one in made])
    oracle: Any = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 10) * oracle.stderr
    assert fit.exponent == pytest.approx(oracle.slope)
    assert (fit.exponent_low, fit.exponent_high) == pytest.approx(
        (oracle.slope - half, oracle.slope + half)
    )
    assert fit.coefficient == pytest.approx(2**oracle.intercept)
    assert fit.log2_ratio == pytest.approx(3 * oracle.slope), "three doublings from 25 to 200"
    assert fit.df == 10


def test_the_three_verdicts():
    assert fit_power_law(optima(1.0, 0.2, seed=0)).dependence == "grows"
    assert fit_power_law(optima(-1.0, 0.2, seed=0)).dependence == "falls"
    flat = fit_power_law(optima(0.0, 0.2, seed=0))
    assert flat.dependence == "does not depend"
    assert -1 < flat.ratio_low90 < flat.ratio_high90 < 1
    assert fit_power_law(optima(0.0, 2.0, seed=0, seeds=2)).dependence == "undecided"


def test_a_small_dependence_that_is_sure_is_within_the_margin_and_said_so():
    # 0.3 doublings over the range, known to 0.05: real, and less than a factor of two.
    fit = fit_power_law(optima(0.1, 0.03, seed=0))
    assert fit.exponent_low > 0
    assert fit.dependence == "does not depend"
    assert fit_power_law(optima(0.1, 0.03, seed=0), margin=0.1).dependence == "grows"


def test_equivalence_is_claimed_wrongly_at_most_5_times_in_100():
    # At the edge of the margin, a ratio of exactly two over the range: the worst case of TOST.
    claims = [
        fit_power_law(optima(1 / 3, 0.3, seed=seed)).dependence == "does not depend"
        for seed in range(1000)
    ]
    assert np.mean(claims) <= 0.05 + 3 * 0.007
    # and it is not 0: the test bites at the edge
    assert np.mean(claims) >= 0.02


def test_intervals_of_the_exponent_cover_it_95_times_in_100():
    hits = 0
    for seed in range(1000):
        fit = fit_power_law(optima(0.5, 0.3, seed=seed))
        hits += fit.exponent_low <= 0.5 <= fit.exponent_high
    assert abs(hits / 1000 - 0.95) < 3 * 0.007


def test_the_largest_value_left_out_is_predicted_where_the_law_holds():
    assert fit_power_law(optima(0.5, 0.01, seed=0)).left_out_log2 == pytest.approx(0, abs=0.05)
    bent = [*optima(0.5, 0.01, seed=0)[:3], SeedOptima(200, (4.0, 4.0, 4.01))]
    off = fit_power_law(bent).left_out_log2
    assert off is not None
    assert off > 2
    assert fit_power_law(optima(0.5, 0.01, seed=0, xs=(1, 2))).left_out_log2 is None


def test_aicc_prefers_a_constant_where_nothing_changes():
    flat = fit_power_law(optima(0.0, 0.2, seed=2))
    steep = fit_power_law(optima(1.0, 0.2, seed=2))
    assert flat.aicc_constant is not None
    assert steep.aicc_constant is not None
    assert flat.aicc_constant < 0 < steep.aicc_constant


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([SeedOptima(1, (3.0, 3.1))], "two different values"),
        ([SeedOptima(1, (3.0, 3.1)), SeedOptima(1, (3.0, 3.2))], "two different values"),
        ([SeedOptima(0, (3.0, 3.1)), SeedOptima(1, (3.0, 3.2))], "above 0"),
        ([SeedOptima(1, (3.0,)), SeedOptima(2, (3.0,))], "two seeds at two values"),
        ([SeedOptima(1, (3.0, 3.0)), SeedOptima(2, (3.0, 3.0))], "do not vary"),
    ],
)
def test_what_cannot_be_concluded_is_refused(made, said):
    with pytest.raises(AnalysisError, match=said):
        fit_power_law(made)


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_intervals_cover_the_exponent_from_the_curves_on(noise):
    # From losses at twelve batch sizes: also the choice of each seed's lowest point is in it. With
    # the larger noise that point jumps between neighbours.
    draw = np.random.default_rng(0)
    xs = [float(k) for k in range(12)]
    hits = 0
    for _ in range(400):
        made = list[SeedOptima]()
        for rows in (1024, 4096, 16384):
            best = 4.3 + 0.5 * np.log2(rows / 4096)
            losses = [
                [0.01 * (x - best) ** 2 + draw.normal(0, noise) for x in xs] for _ in range(3)
            ]
            found = [vertex(xs, one) for one in losses]
            made.append(SeedOptima(rows, tuple(one for one in found if one is not None)))
        fit = fit_power_law(made)
        hits += fit.exponent_low <= 0.5 <= fit.exponent_high
    assert abs(hits / 400 - 0.95) < 3 * 0.011


def test_the_vertex_of_a_parabola_is_its_lowest_point():
    xs = [0.0, 1.0, 2.0, 4.0]
    assert vertex(xs, [(x - 1.7) ** 2 for x in xs]) == pytest.approx(1.7)
    # steps of unlike size
    assert vertex(xs, [(x - 2.2) ** 2 for x in xs]) == pytest.approx(2.2)
    assert vertex(xs, [0.0, 1.0, 2.0, 3.0]) is None
    assert vertex(xs, [3.0, 2.0, 1.0, 0.0]) is None
    assert vertex([0.0, 1.0, 2.0], [1.0, 0.0, 1.0]) == pytest.approx(1.0)
