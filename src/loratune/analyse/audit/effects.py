"""The smallest differences that n questions, or k seeds, can tell from none.

All at 80% power and a two-sided 5% level: (z_97.5 + z_80) standard errors, t in the place of z
where the standard error is from seeds.
"""

# scipy comes without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math

from scipy.special import ndtri

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


_Z = float(ndtri(1 - LEVEL / 2) + ndtri(POWER))
