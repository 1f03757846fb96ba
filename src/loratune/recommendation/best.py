"""Which of several noisy means may be the best, and which are surely close to it.

Hsu's multiple comparisons with the best (Hsu 1984, Annals of Statistics 12; "Multiple Comparisons"
1996, chapter 4): simultaneous 95% intervals for every mu_i - max over j != i of mu_j. One procedure
answers both questions: "not excluded as the best" where the upper end is above 0, "within a margin
of the best" where the lower end is above -margin. Model: score = mean of the batch size + effect of
the seed + error, errors independent, normal, of one variance for all batch sizes. That variance is
an assumption; where the noise grows with the loss, it is overstated near the best.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr


@dataclass(frozen=True, slots=True)
class AgainstBest:
    """Simultaneous 95% bounds of mu_i - max of the others', scores being better when higher.

    `lower` is at most 0: the mean is at most -lower worse than the best. `upper` is at least 0:
    where it is 0 the mean is not the best. `sigma` is the pooled error's standard deviation, with
    `df` degrees of freedom; `critical` the one-sided Dunnett value.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    sigma: float
    df: int
    critical: float


def against_best(scores: Sequence[Sequence[float]]) -> AgainstBest:
    """Compare J means over the same S seeds: `scores[j][s]`, higher is better; J, S >= 2.

    The error variance is the mean square of the two-way residuals, (J - 1)(S - 1) degrees of
    freedom: the seeds are blocks, so that a seed that is lucky everywhere is no noise.
    """
    table = np.asarray(scores, dtype=np.float64)
    num_means, num_seeds = table.shape
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0)[None, :] + table.mean()
    df = (num_means - 1) * (num_seeds - 1)
    sigma = math.sqrt(float((residuals**2).sum()) / df)
    critical = dunnett_critical(num_means - 1, df=df)
    allowance = critical * sigma * math.sqrt(2 / num_seeds)
    others = [float(np.delete(means, index).max()) for index in range(num_means)]
    upper = [max(0.0, float(means[i]) - others[i] + allowance) for i in range(num_means)]
    candidates = [index for index in range(num_means) if upper[index] > 0.0]
    if not candidates:  # exactly equal means without any noise
        candidates = [index for index in range(num_means) if means[index] == means.max()]
    lower = list[float]()
    for index in range(num_means):
        rivals = [float(means[j]) for j in candidates if j != index]
        gap = float(means[index]) - max(rivals) - allowance if rivals else 0.0
        lower.append(min(0.0, gap))
    return AgainstBest(tuple(lower), tuple(upper), sigma, df, critical)


@cache
def dunnett_critical(num_comparisons: int, *, df: int, confidence: float = 0.95) -> float:
    """The one-sided Dunnett value d: P(max of k t's with correlation 1/2 <= d) = confidence.

    T_i = (Z_i - Z_0) / (sqrt(2) s), s^2 ~ chi2(df) / df, so that given Z_0 = z and s the k events
    are independent: P = E[Phi(z + sqrt(2) d s)^k]. z by Gauss-Hermite, s by its quantiles.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    upper_tails = (np.arange(4000) + 0.5) / 4000
    s = np.sqrt(chdtri(df, upper_tails) / df)

    def excess(d: float) -> float:
        inner = ndtr(nodes[:, None] + math.sqrt(2.0) * d * s[None, :]) ** num_comparisons
        return float((weights[:, None] * inner).sum() / len(s)) - confidence

    root: Any = brentq(excess, 0.0, 200.0)
    return float(root)
