"""The smallest differences that n questions, or k seeds, can tell from none.

All at 80% power and a two-sided 5% level: `planning.power.detectable_effect`, which `plan` and
`compare` use too, at a standard error that is put together here.
"""

import math
from collections.abc import Sequence

from loratune.planning.power import detectable_effect

# Two adapters of one base differ on about a fifth of the questions; an assumption where the answers
# to each question are not at hand.
DISCORDANCE = 0.2
# Correlation of the errors of two configurations on the same questions; an assumption as well.
CORRELATION = 0.5

# A variance and its degrees of freedom.
Part = tuple[float, float]


def detectable_unpaired(accuracy: float, total: int) -> float:
    """Of two accuracies on different questions; standard error sqrt(2 p (1 - p) / n)."""
    return detectable_effect(math.sqrt(2 * accuracy * (1 - accuracy) / total), df=math.inf)


def detectable_paired(total: int, *, seeds: Sequence[Part] = ()) -> float:
    """On the same questions, a share d answered unlike; standard error sqrt(d / n + v).

    Args:
        total: n, the number of questions.
        seeds: for each method with several seeds the variance of its mean over them, and its
            degrees of freedom; v is their sum. All together by Welch and Satterthwaite.
    """
    parts = ((DISCORDANCE / total, max(1.0, total - 1.0)), *seeds)
    whole = sum(part for part, _ in parts)
    df = whole**2 / sum(part**2 / df for part, df in parts)
    return detectable_effect(math.sqrt(whole), df=df)
