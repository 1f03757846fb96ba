"""Which of several noisy means may be the best, and which are surely close to it.

Multiple comparisons with the best: simultaneous 95% bounds for every mu_i - max over j != i of
mu_j. One procedure answers both questions: "not excluded as the best" where the upper end is above
0, "within a margin of the best" where the lower end is above -margin. It has two stages:

1. At 98%, a batch size that is worse than another by more than the margin, as told by the seeds of
   these two alone (a t interval of their differences, Bonferroni over the comparisons), is set
   aside. This holds whatever the variances are.
2. At 97%, Hsu's comparisons with the best (Hsu 1984, Annals of Statistics 12; "Multiple
   Comparisons" 1996, chapter 4) among the others, with one pooled variance. From three seeds on no
   two are told apart that their own seeds do not tell apart as well, at 98% for these two alone.

Model: score = mean of the batch size + effect of the seed + error, errors independent and normal.
Where the errors have one variance among the batch sizes of stage 2, both hold with 95% by
Bonferroni. Where they have not, a few noisy ones hide among many quiet ones from the pooled
variance; then the two's own seeds are what is left, which is no proof over all pairs together. In
the worst simulation (`benchmarks/decisions.py range`) 4.8% of answers were wrong with 9 batch
sizes, 5.6% with 16. With two seeds a pair's own t would tell nothing at all (15.9 standard errors)
and is not asked; where the best is the noisy one 18% of answers were wrong with 9, 23% with 16.

Without stage 1 the noise of batch sizes far off, often a hundred times that of the best ones,
decided what could be told of these. Where few seeds set nothing aside it still does.
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
from scipy.special import chdtri, ndtr, stdtrit

# Of the 5%, what stage 1 may use up.
SET_ASIDE = 0.02
# How often a pair's own t may be wrong in stage 2, and the fewest seeds with which it is asked:
# chosen by simulation, so that about 5% of the answers are wrong at worst.
OWN_LEVEL = 0.02
FEWEST_SEEDS_OF_OWN = 3


@dataclass(frozen=True, slots=True)
class AgainstBest:
    """Simultaneous 95% bounds of mu_i - max of the others', scores being better when higher.

    `lower` is at most 0: the mean is at most -lower worse than the best. `upper` is at least 0:
    where it is 0 the mean is not the best. `sigma` is the pooled error's standard deviation of
    stage 2, with `df` degrees of freedom; both are None where stage 1 leaves one mean alone.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    sigma: float | None
    df: int | None


def against_best(scores: Sequence[Sequence[float]], *, tolerated: float = 0.0) -> AgainstBest:
    """Compare J means over the same S seeds: `scores[j][s]`, higher is better; J, S >= 2.

    The pooled variance is the mean square of the two-way residuals, (J - 1)(S - 1) degrees of
    freedom for the J of stage 2: the seeds are blocks, so that a seed that is lucky everywhere is
    no noise.

    Args:
        scores: of each batch size, by seed.
        tolerated: the margin, in units of the scores.
    """
    table = np.asarray(scores, dtype=np.float64)
    num_means, num_seeds = table.shape
    means = table.mean(axis=1)
    ahead = means[:, None] - means[None, :]
    # A mean and itself have no allowance: it is no rival of its own.
    allowance = np.zeros((num_means, num_means))
    kept = np.arange(num_means)
    set_aside = 0.0
    own_error = np.sqrt((table[:, None, :] - table[None, :, :]).var(axis=2, ddof=1) / num_seeds)
    # Of two means the pooled variance is their own.
    if num_means > 2:
        set_aside = SET_ASIDE
        critical = float(stdtrit(num_seeds - 1, 1 - set_aside / (num_means - 1)))
        allowance = critical * own_error
        kept = np.flatnonzero((ahead + allowance).min(axis=1) >= -tolerated)
    sigma, df = None, None
    if len(kept) > 1:
        left = table[kept]
        residuals = left - left.mean(axis=1)[:, None] - left.mean(axis=0)[None, :] + left.mean()
        df = (len(kept) - 1) * (num_seeds - 1)
        sigma = math.sqrt(float((residuals**2).sum()) / df)
        # Over all J: those that luck would make the best are not the ones that are set aside.
        critical = dunnett_critical(num_means - 1, df=df, confidence=0.95 + set_aside)
        among = critical * sigma * math.sqrt(2 / num_seeds) * np.ones((len(kept), len(kept)))
        if num_means > 2 and num_seeds >= FEWEST_SEEDS_OF_OWN:
            own_critical = float(stdtrit(num_seeds - 1, 1 - OWN_LEVEL))
            among = np.maximum(among, own_critical * own_error[np.ix_(kept, kept)])
        allowance[np.ix_(kept, kept)] = among
    best = float(means.max())
    others = ~np.eye(num_means, dtype=np.bool_)
    upper = np.maximum(np.min(ahead + allowance, axis=1, where=others, initial=math.inf), 0.0)
    # Exactly equal means without any noise have 0 everywhere.
    candidates = (upper > 0.0) if (upper > 0.0).any() else means == best
    rivals = others & candidates[None, :]
    lower = np.min(ahead - allowance, axis=1, where=rivals, initial=0.0)
    return AgainstBest(tuple(lower.tolist()), tuple(upper.tolist()), sigma, df)


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
