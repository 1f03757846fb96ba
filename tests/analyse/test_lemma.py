import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from loratune.analyse.lemma import (
    check_lemma,
    formula_mean,
    formula_median,
    plugin_noise_scale,
    simulate_noise_scale,
)
from loratune.errors import AnalysisError


def test_the_formulas_have_the_published_values():
    assert formula_mean(3, 1000) == pytest.approx(3000)
    assert formula_median(3, 1000) == pytest.approx(1268, abs=0.5)
    assert formula_mean(64, 1000) == pytest.approx(1032.3, abs=0.05)
    assert formula_median(64, 1000) == pytest.approx(1010.5, abs=0.05)
    assert formula_median(64, 1000) == pytest.approx(64_000 / stats.chi2.median(64))


def test_a_simulation_agrees_with_the_lemma_within_its_interval():
    found = check_lemma(rank=16, samples=200, replicates=4000, seed=1)
    assert found.formula_mean is not None
    assert found.mean_low is not None
    assert found.mean_high is not None
    # Intervals miss 5 times in 100: twice their width around the middle misses once in 10,000.
    assert found.mean == pytest.approx(
        found.formula_mean, abs=2 * (found.mean_high - found.mean_low) / 2
    )
    assert found.median == pytest.approx(
        found.formula_median, abs=found.median_high - found.median_low
    )


def test_the_drawn_estimates_have_the_lemmas_whole_distribution():
    # N |gbar|^2 is chi-square r and tr(S) r / chi-square r (n - 1): an F ratio, times N.
    values = simulate_noise_scale(8, 50, 4000, np.random.default_rng(0))
    exact = stats.f(8 * 49, 8)
    assert stats.kstest(values / 50, exact.cdf).pvalue > 0.001


def test_rows_gradients_labels_and_rotation_are_those_of_the_lemma():
    # The lemma from its own words: x~ = U x, quadratic loss (y - w x~)^2 / 2 at w = 0.
    draw = np.random.default_rng(0)
    rank, samples, width = 6, 40, 10
    values = np.empty(2000)
    rotation = np.linalg.qr(draw.normal(size=(width, rank)))[0]
    for index in range(len(values)):
        x = draw.normal(size=(samples, rank)) @ rotation.T
        y = draw.choice([-1.0, 1.0], size=samples)
        residual = y - x @ np.zeros(width)
        gradients = -residual[:, None] * x
        mean = gradients.mean(axis=0)
        values[index] = np.trace(np.cov(gradients, rowvar=False)) / (mean @ mean)
    ours = simulate_noise_scale(rank, samples, 2000, np.random.default_rng(1))
    compared: Any = stats.ks_2samp(values, ours)
    assert compared.pvalue > 0.001


@pytest.mark.parametrize(("samples", "median"), [(50, 45), (200, 143), (1000, 333)])
def test_the_plugin_law_holds_where_the_noise_scale_is_finite(samples, median):
    assert plugin_noise_scale(500, samples) == pytest.approx(median, abs=0.5)
    # Many dimensions: |gbar|^2 then varies little, and median and ratio of means agree.
    values = simulate_noise_scale(400, samples, 200, np.random.default_rng(0), true_noise_scale=500)
    # The median over 200 draws has a standard error of about 0.6%.
    assert float(np.median(values)) == pytest.approx(median, rel=0.03)


def test_the_plugin_law_has_both_limits():
    assert plugin_noise_scale(math.inf, 1000) == 1000, "the lemma: N by construction"
    assert plugin_noise_scale(500, 10**9) == pytest.approx(500)


def test_a_rank_without_a_mean_has_null_and_the_reason():
    found = check_lemma(rank=2, samples=30, replicates=100)
    assert found.mean is None
    assert found.formula_mean is None
    assert found.median == pytest.approx(found.formula_median, rel=0.5)
    assert "no mean" in found.remarks[0]


@pytest.mark.parametrize("rank", [3, 4])
def test_a_rank_with_an_infinite_variance_has_a_mean_that_is_not_trusted(rank):
    found = check_lemma(rank=rank, samples=30, replicates=100)
    assert found.mean is not None
    assert found.mean_low is None
    assert found.mean_high is None
    assert "not to be trusted" in found.remarks[0]
    assert check_lemma(rank=5, samples=30, replicates=100).mean_low is not None


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    def text(seed):
        found = check_lemma(rank=8, samples=20, replicates=50, seed=seed, true_noise_scale=100)
        return json.dumps(found.to_json(), allow_nan=False)

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_the_intervals_of_mean_and_median_cover_the_formulas():
    hits_mean = hits_median = 0
    for seed in range(300):
        found = check_lemma(rank=12, samples=10, replicates=200, seed=seed)
        assert found.mean_low is not None
        assert found.mean_high is not None
        assert found.formula_mean is not None
        hits_mean += found.mean_low <= found.formula_mean <= found.mean_high
        hits_median += found.median_low <= found.formula_median <= found.median_high
    # Standard error 1.3 points; the mean's is a t interval of skewed values, a little short.
    assert hits_mean / 300 >= 0.89
    assert hits_median / 300 >= 0.91


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "samples"), [(8, 1000), (64, 1000), (256, 2000)])
def test_the_lemma_at_full_size(rank, samples):
    found = check_lemma(rank=rank, samples=samples, replicates=8000 if rank < 100 else 2000)
    assert found.mean_low is not None
    assert found.mean_high is not None
    assert found.mean == pytest.approx(found.formula_mean, abs=found.mean_high - found.mean_low)
    assert found.median == pytest.approx(
        found.formula_median, abs=found.median_high - found.median_low
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"samples": 1}, "2 or more"),
        ({"replicates": 5}, "10 or more"),
        ({"seed": -1}, "seed=-1"),
        ({"rank": 10**5, "samples": 10**5}, "fewer samples"),
        ({"replicates": 10**9}, "at most"),
        ({"true_noise_scale": 0.0}, "above 0"),
        ({"true_noise_scale": math.nan}, "above 0"),
        ({"true_noise_scale": math.inf}, "the lemma itself"),
        ({"true_noise_scale": 1e-320}, "lost in the rounding"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(given, said):
    with pytest.raises(AnalysisError, match=said):
        check_lemma(**({"rank": 4, "samples": 10, "replicates": 10} | given))


def test_the_plugin_law_refuses_what_is_no_number_of_samples():
    with pytest.raises(AnalysisError, match="samples=0"):
        plugin_noise_scale(500, 0)
