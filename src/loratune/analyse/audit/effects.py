"""The smallest differences that n questions, or k seeds, can tell from none.

All at 80% power and a two-sided 5% level: (z_97.5 + z_80) standard errors, t in the place of z
where the standard error is from seeds.
"""

# numpy and scipy come without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math

import numpy as np
from scipy.special import ndtr, ndtri

from loratune.analyse.intervals import t_quantile

POWER = 0.8
LEVEL = 0.05
# Two adapters of one base differ on about a fifth of the questions; an assumption where the answers
# to each question are not at hand.
DISCORDANCE = 0.2
# Correlation of the errors of two configurations on the same questions; an assumption as well.
CORRELATION = 0.5


def detectable_unpaired(accuracy: float, total: int) -> float:
    """(z_97.5 + z_80) sqrt(2 p (1 - p) / n): two accuracies on different questions."""
    return _Z * math.sqrt(2 * accuracy * (1 - accuracy) / total)


def detectable_paired(total: int, *, seed_variance: float = 0.0) -> float:
    """(z_97.5 + z_80) sqrt(d / n + v): the same questions, of which a share d is answered unlike.

    `seed_variance` v is the variance of the difference that comes from seeds, 0 with one seed each.
    """
    return _Z * math.sqrt(DISCORDANCE / total + seed_variance)


def detectable_by_seeds(seed_variance: float, *, df: int) -> float:
    """(t_97.5 + t_80) sqrt(v), v the variance of the difference of two means over seeds."""
    quantiles = t_quantile(1 - LEVEL / 2, df=df) + t_quantile(POWER, df=df)
    return quantiles * math.sqrt(seed_variance)


def expected_maximum(count: int) -> float:
    """E[max] of `count` standard normal numbers: integral over x > 0 of 1 - Phi(x)^k - Phi(-x)^k.

    By the trapezoid rule in steps of 0.001 to 10, which is exact to seven digits.
    """
    x = np.linspace(0.0, 10.0, 10_001)
    tails = 1.0 - ndtr(x) ** count - ndtr(-x) ** count
    return float(np.trapezoid(tails, x))


def selection_bias(count: int, *, accuracy: float, total: int) -> float:
    """How much the best of `count` equally good configurations gains from being chosen on the test.

    E[max of K] sqrt(p (1 - p) (1 - rho) / n), rho = 0.5 assumed, no noise from seeds.
    """
    spread = accuracy * (1 - accuracy) * (1 - CORRELATION) / total
    return expected_maximum(count) * math.sqrt(spread)


_Z = float(ndtri(1 - LEVEL / 2) + ndtri(POWER))
