"""Student's t on a handful of seeds, Holm's step-down, Fieller's zero of a line.

Everything here takes plain numbers and knows nothing of trials. What varies in the numbers (seeds)
is the caller's business. Normal errors are assumed throughout; with 2 or 3 seeds that cannot be
checked, only stated.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its two-sided 95% t interval; the interval is None with fewer than 2 values."""

    value: float
    low: float | None
    high: float | None
    num_values: int


def t_quantile(probability: float, *, df: float) -> float:
    """The point below which Student's t with `df` degrees of freedom lies with `probability`."""
    return float(stdtrit(df, probability))


def mean_with_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Mean:
    """The mean of independent normal values and its t interval, mean +- t s / sqrt(n)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Mean(mean, None, None, len(values))
    half = t_quantile((1 + confidence) / 2, df=len(values) - 1) * standard_error(values)
    return Mean(mean, mean - half, mean + half, len(values))


def standard_error(values: Sequence[float]) -> float:
    """s / sqrt(n) with the n - 1 standard deviation; needs at least two values."""
    return float(np.std(np.asarray(values), ddof=1)) / math.sqrt(len(values))


def two_sided_p(values: Sequence[float]) -> float:
    """P of a mean at least this far from 0 if the true mean were 0 (one-sample t test)."""
    mean, error = math.fsum(values) / len(values), standard_error(values)
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2.0 * stdtr(len(values) - 1, -abs(mean) / error))


def equivalence_p(values: Sequence[float], *, margin: float) -> float:
    """TOST: P under |true mean| >= margin; the larger of the two one-sided t tests' p.

    Schuirmann 1987. At the 5% level it agrees with the 90% interval lying inside +-margin.
    """
    mean, error = math.fsum(values) / len(values), standard_error(values)
    if error == 0.0:
        return 0.0 if abs(mean) < margin else 1.0
    df = len(values) - 1
    below, above = (mean - margin) / error, (mean + margin) / error
    return float(max(stdtr(df, below), stdtr(df, -above)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment, in the order given; each at most 1 and monotone in rank."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = running
    return tuple(adjusted)


def zero_set(left: Sequence[float], right: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """The w in [0, 1] at which the mean of (1 - w) left + w right does not differ from 0.

    Fieller's idea: instead of an interval for the ratio where the line crosses zero, the set of w
    that a two-sided 5% t test over the paired values (one per seed) does not reject. The test's
    boundary mean(w)^2 = t^2 var(w) / n is a quadratic in w. Returns disjoint intervals, ascending.
    """
    a, b = np.asarray(left), np.asarray(right)
    num = len(a)
    factor = t_quantile((1 + CONFIDENCE) / 2, df=num - 1) ** 2 / num
    slope = b - a
    # f(w) = (mean a + w mean slope)^2 - factor (var a + 2 w cov + w^2 var slope) <= 0
    mean_a, mean_s = float(a.mean()), float(slope.mean())
    covariance = np.cov(a, slope, ddof=1)
    quadratic = mean_s**2 - factor * float(covariance[1, 1])
    linear = 2 * (mean_a * mean_s - factor * float(covariance[0, 1]))
    constant = mean_a**2 - factor * float(covariance[0, 0])
    cuts = [0.0, *sorted(w for w in _roots(quadratic, linear, constant) if 0.0 < w < 1.0), 1.0]
    kept = list[tuple[float, float]]()
    for start, end in pairwise(cuts):
        middle = (start + end) / 2
        if quadratic * middle**2 + linear * middle + constant <= 0.0:
            if kept and kept[-1][1] == start:
                kept[-1] = (kept[-1][0], end)
            else:
                kept.append((start, end))
    return tuple(kept)


def _roots(quadratic: float, linear: float, constant: float) -> tuple[float, ...]:
    """Real roots, by the form that does not cancel."""
    if quadratic == 0.0:
        return () if linear == 0.0 else (-constant / linear,)
    discriminant = linear**2 - 4 * quadratic * constant
    if discriminant < 0.0:
        return ()
    q = -(linear + math.copysign(math.sqrt(discriminant), linear)) / 2
    return (q / quadratic,) if q == 0.0 else (q / quadratic, constant / q)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `total` questions, as fractions; total >= 1."""
    found: Any = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
