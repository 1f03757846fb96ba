"""How much the best of several looks better than it is, and what the best of a budget is worth.

Pure formulas, for numbers without units. Choosing the best of K equally good configurations by a
noisy score and reporting that same score flatters it by E[max of K standard normals] times the
noise; what is reported on other questions and fresh seeds is not flattered.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUnknownLambdaType=false

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import chdtri, ndtr

from loratune.errors import AnalysisError
from loratune.planning.crossed_model import FloatArray


@cache
def expected_maximum(num: int) -> float:
    """E[max of K = `num` standard normals] = integral over x > 0 of 1 - Phi(x)^K - Phi(-x)^K.

    E[M] = int_0^inf P(M > x) dx - int_-inf^0 P(M <= x) dx, both folded onto x > 0. K = 5: 1.163;
    40: 2.161 (Harter 1961 tabulates them).

    Raises:
        AnalysisError: `num` is below 1.
    """
    if num < 1:
        raise AnalysisError(f"num={num}; the best of how many? Give at least 1")

    def exceeded(x: float) -> float:
        return float(1.0 - ndtr(x) ** num - ndtr(-x) ** num)

    from scipy.integrate import quad  # a sixth of a second to import

    value, _ = quad(exceeded, 0.0, 40.0, limit=200)
    return float(value)


def noise_near_the_best(scores: FloatArray, *, higher_is_better: bool) -> float | None:
    """The standard deviation over seeds of the score of a configuration that may be the best.

    A learning rate that is too high scatters a hundredfold, and no luck makes it the best. So of
    the better half alone, and there by the median: once each seed's median and each configuration's
    mean are taken out, the middle one's sum of squares over median(chi2_(S-1)), times h / (h - 1)
    for the h that gave the seeds' medians. On normal scores its mean is within about 20% of the
    true one (two seeds: 18% too high with 3 or 4 configurations, 18% too low with 5 or 6), and
    within 10% with more seeds or configurations.

    Args:
        scores: [K, S], K configurations with the same S seeds.
        higher_is_better: which half is the better one.

    Returns:
        None with fewer than 3 configurations, of which the better half is one, or 2 seeds.
    """
    num, num_seeds = scores.shape
    if num < 3 or num_seeds < 2:
        return None
    order = np.argsort(scores.mean(axis=1), kind="stable")
    half = scores[order[::-1] if higher_is_better else order][: (num + 1) // 2]
    # The means go first: what one seed did to one configuration stays in that one's row.
    rest = half - half.mean(axis=1, keepdims=True)
    rest = rest - np.median(rest, axis=0)
    middle = float(np.median((rest**2).sum(axis=1)))
    variance = middle / float(chdtri(num_seeds - 1, 0.5)) * len(half) / (len(half) - 1)
    return math.sqrt(variance)


def selection_bias(
    num: int,
    *,
    accuracy: float,
    num_questions: int,
    correlation: float = 0.0,
    seed_sd: float = 0.0,
) -> float:
    """What the best of `num` equal configurations gains by luck on the questions that chose it.

    E[max of K] sqrt(p (1 - p) (1 - rho) / n + tau^2): rho is the correlation of two configurations'
    answers to one question, tau (`seed_sd`) how much training alone moves the accuracy. A fraction.
    """
    noise = accuracy * (1 - accuracy) * (1 - correlation) / num_questions + seed_sd**2
    return expected_maximum(num) * math.sqrt(noise)


def expected_best(
    values: Sequence[float], *, num_draws: int, higher_is_better: bool = True, biased: bool = False
) -> float:
    """The expected best score of a search that had tried `num_draws` of these configurations.

    Unbiased (Tang et al. 2020, "Showing your work doesn't always work"): the mean over all subsets,
    sum_k x_(k) (C(k, n) - C(k-1, n)) / C(N, n). `biased` (Dodge et al. 2019, "Show your work"): the
    draws are made with replacement, sum_k x_(k) ((k/N)^n - ((k-1)/N)^n), too low. x_(k) ascends
    towards the better ones.

    Raises:
        AnalysisError: `num_draws` is not between 1 and the number of values.
    """
    total, n = len(values), num_draws
    if not 1 <= n <= total:
        raise AnalysisError(
            f"num_draws={n} of {total} configurations; give a number from 1 to {total}"
        )
    ascending = sorted(values, reverse=not higher_is_better)
    if biased:
        weights = [(k / total) ** n - ((k - 1) / total) ** n for k in range(1, total + 1)]
    else:
        subsets = math.comb(total, n)
        weights = [(math.comb(k, n) - math.comb(k - 1, n)) / subsets for k in range(1, total + 1)]
    return math.fsum(x * weight for x, weight in zip(ascending, weights, strict=True))
