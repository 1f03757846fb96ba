"""The noise scale against known answers, and the coverage of its intervals by simulation."""

from itertools import pairwise

import numpy as np
import pytest

from loratune.analyse.noise_scale import (
    GradientSums,
    from_two_batch_sizes,
    gradient_sums,
    noise_scale,
    squared_norm_variance,
    trace_variance,
)
from loratune.errors import AnalysisError


def drawn_probes(
    draw: np.random.Generator, *, num: int, rows: int, mean: np.ndarray
) -> list[GradientSums]:
    return [gradient_sums(draw.normal(mean, 1.0, (rows, len(mean)))) for _ in range(num)]


def mean_of(noise: float, *, size: int = 20) -> np.ndarray:
    """G with B_simple = noise at S = I."""
    return np.full(size, np.sqrt(1 / noise))


def test_sums_give_the_trace_of_the_sample_covariance():
    rows = np.random.default_rng(0).normal(1.0, 2.0, (9, 5))
    sums = gradient_sums(rows)
    trace = np.trace(np.cov(rows, rowvar=False))
    assert sums.trace == pytest.approx(trace, rel=1e-12)
    square = float((rows.mean(axis=0) ** 2).sum())
    assert sums.squared_norm == pytest.approx(square - trace / 9, rel=1e-12)


def test_two_batch_sizes_of_1_and_n_are_the_same_estimate():
    sums = gradient_sums(np.random.default_rng(1).normal(0.3, 1.0, (12, 7)))
    found = from_two_batch_sizes(
        small=1, small_square=sums.sum_squares / 12, large=12, large_square=sums.mean_square
    )
    assert found == pytest.approx((sums.trace, sums.squared_norm), rel=1e-12)


@pytest.mark.parametrize(("rows", "expected"), [(50, 45), (200, 143), (1000, 333)])
def test_plugin_medians_follow_the_law_of_two_inverses(rows: int, expected: float):
    draw = np.random.default_rng(2)
    mean = mean_of(500, size=50)
    found = [one.plugin for one in drawn_probes(draw, num=200, rows=rows, mean=mean)]
    # The standard error of such a median is below 2.5% (measured over seeds).
    assert np.median(found) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("rank", "median"), [(3, 1268.0), (64, 1010.5)])
def test_plugin_medians_of_pure_noise_are_those_of_the_lemma(rank: int, median: float):
    draw = np.random.default_rng(3)
    # Only |gbar|^2 matters: chi2_r / N; tr(S) is r up to 1 / sqrt(N r).
    trace = rank
    found = trace / (draw.chisquare(rank, 40_000) / 1000)
    assert np.median(found) == pytest.approx(median, rel=0.02)
    few = [one.plugin for one in drawn_probes(draw, num=300, rows=1000, mean=np.zeros(rank))]
    assert np.median(few) == pytest.approx(median, rel=0.15)


def test_variances_are_those_of_many_draws():
    draw = np.random.default_rng(4)
    deviations = np.array([0.5, 1.0, 2.0, 3.0])
    mean = np.array([0.5, 0.2, 0.1, 0.4])
    sums = [gradient_sums(draw.normal(mean, deviations, (8, 4))) for _ in range(20_000)]
    square = float((deviations**4).sum())
    gsg = float((mean**2 * deviations**2).sum())
    # The relative error of a variance from 20,000 draws is about 1.5 to 2% (heavy right tails).
    assert np.var([one.trace for one in sums]) == pytest.approx(
        trace_variance(trace_of_square=square, num_examples=8), rel=0.08
    )
    assert np.var([one.squared_norm for one in sums]) == pytest.approx(
        squared_norm_variance(gsg=gsg, trace_of_square=square, num_examples=8), rel=0.08
    )


@pytest.mark.parametrize("interval", ["fieller", "delta"])
def test_intervals_cover_the_truth_about_95_times_of_100(interval):
    draw = np.random.default_rng(5)
    covered, num = 0, 1000
    for _ in range(num):
        found = noise_scale(
            drawn_probes(draw, num=30, rows=32, mean=mean_of(10)), interval=interval
        )
        assert found.verdict == "estimate"
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 20 * 10 / 20 <= found.high
    # Three standard errors of 0.7 points each.
    assert 0.93 <= covered / num <= 0.972


def test_no_mean_gradient_is_never_a_number():
    draw = np.random.default_rng(6)
    verdicts = [
        noise_scale(drawn_probes(draw, num=30, rows=32, mean=np.zeros(20))).verdict
        for _ in range(400)
    ]
    # A two-sided interval of 95% lies above 0 in 2.5% of cases; the standard error is 0.8 points.
    assert verdicts.count("estimate") / 400 < 0.05
    assert verdicts.count("undetermined") / 400 > 0.7


def test_a_weak_mean_gradient_is_at_least_something():
    draw = np.random.default_rng(7)
    found = [
        noise_scale(drawn_probes(draw, num=8, rows=16, mean=mean_of(600, size=50)))
        for _ in range(200)
    ]
    bounds = [one.low for one in found if one.verdict == "at least" and one.low is not None]
    assert len(bounds) > 20
    assert all(one.high is None for one in found if one.verdict == "at least")
    # One-sided at 97.5%, but only of those that are called: their share may be larger.
    assert np.mean([bound <= 600 for bound in bounds]) > 0.9


def test_every_example_twice_is_the_same_answer_with_clusters_and_a_wrong_one_without():
    rows = np.random.default_rng(8).normal(0.1, 1.0, (16, 6))
    once = gradient_sums(rows)
    twice = np.concatenate([rows, rows])
    clustered = gradient_sums(twice, clusters=[*range(16), *range(16)])
    assert clustered.trace == pytest.approx(once.trace, rel=1e-12)
    assert clustered.squared_norm == pytest.approx(once.squared_norm, rel=1e-9)
    assert gradient_sums(twice).squared_norm > once.squared_norm + 0.4 * once.trace / 16


def test_what_cannot_be_concluded_is_said():
    one = gradient_sums(np.random.default_rng(9).normal(1.0, 1.0, (8, 3)))
    nothing = GradientSums(num_examples=4, sum_squares=0.0, mean_square=0.0)
    broken = GradientSums(num_examples=4, sum_squares=float("nan"), mean_square=1.0)
    for probes, told in (
        ([one], "one probe alone"),
        ([nothing, nothing], "all gradients are 0"),
        ([one, broken], "not finite"),
    ):
        found = noise_scale(probes)
        assert (found.verdict, found.value, found.low) == ("undetermined", None, None)
        assert found.reason is not None
        assert told in found.reason
    with pytest.raises(AnalysisError, match="no probes"):
        noise_scale([])
    with pytest.raises(AnalysisError, match="at least 2 different rows"):
        GradientSums(num_examples=1, sum_squares=1.0, mean_square=1.0)
    for small, large in pairwise((0, 4, 4)):
        with pytest.raises(AnalysisError, match="1 <= small < large"):
            from_two_batch_sizes(small=small, small_square=1, large=large, large_square=1)
