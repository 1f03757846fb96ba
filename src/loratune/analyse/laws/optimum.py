"""Whether the best batch size depends on N, the rank or the model's size.

Each seed gives a best batch size of its own at each value x of the axis; log2 of it is regressed on
log2 x by ordinary least squares (statsmodels), so B_opt ~ x^exponent. What is judged is the log2
ratio R of the best batch sizes at the largest and the smallest x, exponent * log2(range of x):

- "does not depend": the 90% interval of R lies within +-1 (two one-sided t tests at 5%, as TOST),
  so less than a factor of two over the range that was studied, and no further;
- "grows" or "falls": the 95% interval of R excludes 0, and the first does not hold;
- "undecided": neither; the interval is too wide. A difference that was not found is not "none".

Seeds are the noise that is counted. With three values of x or more their scatter around the line is
in it as well. The rounding of LRs to their grid moves all seeds alike and is not: it can shift a
best batch size by a part of a doubling, which is why the margin is a whole one.
"""

# statsmodels and numpy come without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratune.analyse.laws.fitting import aicc
from loratune.errors import AnalysisError

Dependence = Literal["does not depend", "grows", "falls", "undecided"]
MARGIN = 1.0
FEWEST_DF = 2


@dataclass(frozen=True, slots=True)
class SeedOptima:
    """The best batch size of each seed at one value x of the axis, as log2, from `best_by_seed`."""

    x: float
    log2_best: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """B_opt = coefficient x^exponent, and the verdict. Intervals are 95% but for the last two.

    `ratio_low90` and `ratio_high90` bound the log2 ratio at 90%, which is what equivalence is
    judged by. `aicc_constant` is the AICc of a constant less that of the power law: below 0 the
    constant is the better description. `left_out_log2` is prediction less truth, in doublings, at
    the largest x when it is left out; None with two values of x.
    """

    coefficient: float
    exponent: float
    exponent_low: float
    exponent_high: float
    log2_ratio: float
    ratio_low: float
    ratio_high: float
    ratio_low90: float
    ratio_high90: float
    num_points: int
    df: int
    aicc_constant: float | None
    left_out_log2: float | None
    dependence: Dependence


def vertex(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Where the parabola through the lowest y and its neighbours is lowest; None at an edge.

    Between the points halfway to the neighbours for equal steps of x.
    """
    index = min(range(len(ys)), key=lambda one: ys[one])
    if index in (0, len(ys) - 1):
        return None
    left, middle, right = xs[index - 1 : index + 2]
    below, lowest, above = ys[index - 1 : index + 2]
    down, up = (lowest - below) / (middle - left), (above - lowest) / (right - middle)
    if up == down:
        return middle
    # The parabola's slope is `down` in the middle of the left interval, `up` in that of the right.
    start, end = (left + middle) / 2, (middle + right) / 2
    return start - down * (end - start) / (up - down)


def fit_power_law(optima: Sequence[SeedOptima], *, margin: float = MARGIN) -> PowerLaw:
    """The exponent with its interval, and whether B_opt depends on x.

    Args:
        optima: one for each value of x, with the best batch sizes of its seeds.
        margin: what counts as no dependence, in doublings over the range of x.

    Raises:
        AnalysisError: fewer than two values of x, an x that is not above 0, too few seeds, or
            best batch sizes that do not vary at all between seeds.
    """
    if len({one.x for one in optima}) < 2 or len({one.x for one in optima}) < len(optima):
        raise AnalysisError("a power law needs two different values or more, each given once")
    if not all(0 < one.x < math.inf for one in optima):
        raise AnalysisError("every value of the axis must be above 0")
    x = np.log2([one.x for one in optima for _ in one.log2_best])
    y = np.asarray([value for one in optima for value in one.log2_best])
    df = len(y) - 2
    if df < FEWEST_DF:
        raise AnalysisError(
            f"{len(y)} best batch sizes in all; at least {FEWEST_DF + 2} are needed, "
            "so two seeds at two values"
        )
    # Its import takes longer than all the rest of an analysis, and every command would pay it.
    import statsmodels.api as sm

    fitted = sm.OLS(y, sm.add_constant(x)).fit()
    rss = float(fitted.ssr)
    if rss < 1e-18:
        raise AnalysisError(
            "the best batch sizes do not vary at all between seeds: "
            "how sure they are cannot be told from them; use a finer score, or more batch sizes"
        )
    span = float(x.max() - x.min())
    slope = float(fitted.params[1])
    low, high = (float(one) for one in fitted.conf_int(alpha=0.05)[1])
    low90, high90 = (float(one) * span for one in fitted.conf_int(alpha=0.10)[1])
    around = float(np.sum((y - y.mean()) ** 2))
    constant = aicc(around, num_points=len(y), num_parameters=1)
    power = aicc(rss, num_points=len(y), num_parameters=2)
    dependence: Dependence = "undecided"
    if -margin < low90 and high90 < margin:
        dependence = "does not depend"
    elif low > 0:
        dependence = "grows"
    elif high < 0:
        dependence = "falls"
    return PowerLaw(
        coefficient=2.0 ** float(fitted.params[0]),
        exponent=slope,
        exponent_low=low,
        exponent_high=high,
        log2_ratio=slope * span,
        ratio_low=low * span,
        ratio_high=high * span,
        ratio_low90=low90,
        ratio_high90=high90,
        num_points=len(y),
        df=df,
        aicc_constant=None if constant is None or power is None else constant - power,
        left_out_log2=_left_out(x, y),
        dependence=dependence,
    )


def _left_out(x: np.ndarray, y: np.ndarray) -> float | None:
    out = x == x.max()
    if len(set(x[~out].tolist())) < 2:
        return None
    slope, offset = np.polyfit(x[~out], y[~out], 1)
    return float(np.mean(slope * x[out] + offset - y[out]))
