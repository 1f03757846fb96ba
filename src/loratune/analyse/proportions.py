"""Two adapters on the same questions, and one adapter's accuracy: what questions alone can say.

These speak of the adapters that were trained, not of the methods that trained them: seeds don't
vary in them. `analyse.crossed` is for methods.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from dataclasses import dataclass

from loratune.errors import AnalysisError


@dataclass(frozen=True, slots=True)
class McNemar:
    """Two-sided p-values: `exact` holds its level always, `mid_p` nearly always and is sharper."""

    exact: float
    mid_p: float


def mcnemar(first_only: int, second_only: int) -> McNemar:
    """Do two adapters answer the same questions equally well? (McNemar 1947.)

    Args:
        first_only: questions that only the first answered right.
        second_only: questions that only the second did.

    Under equality the smaller count is binomial(n, 1/2). mid-p (Lancaster 1961; recommended by
    Fagerland et al. 2013) counts what was observed half. 60 against 40: .0569 and .0460.

    Raises:
        AnalysisError: a negative count.
    """
    if min(first_only, second_only) < 0:
        raise AnalysisError(f"counts {first_only} and {second_only}; give numbers of questions")
    from scipy.stats import binom  # half a second to import, which most commands need not pay

    num, fewer = first_only + second_only, min(first_only, second_only)
    exact = min(1.0, 2.0 * float(binom.cdf(fewer, num, 0.5)))
    mid_p = 2.0 * (float(binom.cdf(fewer, num, 0.5)) - 0.5 * float(binom.pmf(fewer, num, 0.5)))
    return McNemar(exact, min(1.0, mid_p))


def wilson(correct: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) for one adapter's accuracy over other questions like these.

    Raises:
        AnalysisError: `correct` is not between 0 and `total`, or there are no questions.
    """
    if not 0 <= correct <= total or total == 0:
        raise AnalysisError(f"{correct} right of {total} questions; expected 0 <= right <= total")
    from scipy.stats import binomtest  # as above

    found = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)
