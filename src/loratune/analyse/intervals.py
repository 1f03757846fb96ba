"""An estimate with its interval and tests, Student's t over seeds, Holm's step-down, zero sets.

Everything here takes plain numbers and knows nothing of trials. What varies in the numbers (seeds,
questions) is the caller's business. Normal errors are assumed throughout; with 2 or 3 seeds that
cannot be checked, only stated.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
# A relative standard error that is rounding, not scatter.
NO_SPREAD = 1e-9
# Disjoint intervals of [0, 1], ascending.
ZeroSet = tuple[tuple[float, float], ...]


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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its standard error and 95% interval, `value` +- `critical` standard errors.

    `df` are the degrees of freedom of its t (for a bootstrap those of the same formula, for power
    alone). `absolute_ts` are a bootstrap's |t|, ascending, in the place of Student's; empty where
    there are none. `procedure` says in words where the interval comes from.
    """

    value: float
    standard_error: float
    df: float
    critical: float
    procedure: str
    absolute_ts: tuple[float, ...] = ()

    @property
    def low(self) -> float:
        """The lower end of the 95% interval."""
        return self.value - self.critical * self.standard_error

    @property
    def high(self) -> float:
        """The upper end of the 95% interval."""
        return self.value + self.critical * self.standard_error

    @property
    def p_value(self) -> float:
        """P of an estimate at least this far from 0 if the true value were 0 (two-sided)."""
        return min(1.0, 2.0 * self._tail(-abs(self.value)))

    def equivalence_p(self, margin: float) -> float:
        """TOST: P under |true value| >= margin, the larger of the two one-sided tests' p.

        Schuirmann 1987. At the 5% level it agrees with the 90% interval lying inside +-margin.
        """
        return max(self._tail(self.value - margin), self._tail(-self.value - margin))

    def _tail(self, distance: float) -> float:
        """P(t <= distance / standard error), one-sided; bootstrap ts are taken as symmetric."""
        if self.standard_error == 0.0:
            return 0.0 if distance < 0.0 else 1.0
        t = distance / self.standard_error
        if not self.absolute_ts:
            return float(stdtr(self.df, t))
        beyond = len(self.absolute_ts) - bisect_left(self.absolute_ts, abs(t))
        tail = (1 + beyond) / (1 + len(self.absolute_ts)) / 2
        return tail if t <= 0.0 else 1.0 - tail


def t_estimate(
    value: float,
    *,
    standard_error: float,
    df: float,
    procedure: str,
    absolute_ts: Iterable[float] = (),
) -> Estimate:
    """The estimate with Student's quantile, or that of the bootstrap's |t| where they are given."""
    ts = tuple(map(float, absolute_ts))
    critical = t_quantile((1 + CONFIDENCE) / 2, df=df)
    if ts:  # what a |t| must exceed for fewer than 5% of them and its own to reach it
        critical = ts[min(len(ts) - 1, math.floor(CONFIDENCE * (1 + len(ts))))]
    return Estimate(value, standard_error, df, critical, procedure, ts)


def paired_t(differences: Sequence[float]) -> Estimate:
    """The mean of at least two independent normal differences, one a seed (paired t test)."""
    return t_estimate(
        math.fsum(differences) / len(differences),
        standard_error=standard_error(differences),
        df=len(differences) - 1.0,
        procedure="paired t over seeds",
    )


def welch_t(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `first` - mean of `second`, two values each at least, nothing paired (Welch 1947)."""
    one, two = standard_error(first) ** 2, standard_error(second) ** 2
    spread = one**2 / (len(first) - 1) + two**2 / (len(second) - 1)
    fewest = min(len(first), len(second)) - 1.0
    return t_estimate(
        math.fsum(first) / len(first) - math.fsum(second) / len(second),
        standard_error=math.sqrt(one + two),
        df=(one + two) ** 2 / spread if spread > 0.0 else fewest,
        procedure="Welch t over seeds",
    )


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment (1979), in the order given; each at most 1, monotone in rank.

    statsmodels has it too, and collects all garbage at each call: 0.2 s for three numbers.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = running
    return tuple(adjusted)


def zero_set(left: Sequence[float], right: Sequence[float]) -> ZeroSet:
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
