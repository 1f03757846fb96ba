"""Least squares of an offset and at most one shape parameter, and AICc.

y_i = offset + curve_i(phi) + noise, noise normal with one variance. For a given phi the offset is a
mean, so that what is left to search is one number. The interval of phi is a profile: all phi whose
residual sum of squares stays below rss (1 + t^2 / df), t at 97.5% with df = n - 2 (exact where the
curve is linear in phi; elsewhere its coverage is tested on simulated data).
"""

# numpy and scipy come without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from loratune.analyse.intervals import CONFIDENCE, t_quantile

Array = NDArray[np.float64]

# Residuals below this are rounding: a law that fits exactly is not infinitely better than another.
_ROUNDING = 1e-9
_GRID = 200


@dataclass(frozen=True, slots=True)
class OffsetFit:
    """A fit of `offset` and, where the curve has one, of `phi`.

    `phi` is None for a curve without a parameter, and where the best one lies at the end of the
    range searched: it is not bounded by the data. `phi_low` and `phi_high` are its 95% profile
    interval; each is None where it is open at that end or where no degree of freedom is left.
    `rss` is the residual sum of squares, `df` the points less the parameters.
    """

    offset: float
    phi: float | None
    phi_low: float | None
    phi_high: float | None
    rss: float
    num_points: int
    num_parameters: int
    fitted: tuple[float, ...]

    @property
    def df(self) -> int:
        """Degrees of freedom of the residuals."""
        return self.num_points - self.num_parameters

    @property
    def aicc(self) -> float | None:
        """The corrected Akaike criterion; None with too few points for it."""
        return aicc(self.rss, num_points=self.num_points, num_parameters=self.num_parameters)

    @property
    def residual(self) -> float:
        """The standard deviation of the residuals, in units of y; 0 with no degree of freedom."""
        return math.sqrt(self.rss / self.df) if self.df > 0 else 0.0


def aicc(rss: float, *, num_points: int, num_parameters: int) -> float | None:
    """n log(rss / n) + 2k + 2k (k + 1) / (n - k - 1), k the parameters and the variance.

    Hurvich and Tsai 1989, without the constant that all fits of the same points share. None where
    n <= k + 1.
    """
    k = num_parameters + 1
    if num_points <= k + 1:
        return None
    mean_square = max(rss / num_points, _ROUNDING**2)
    correction = 2 * k * (k + 1) / (num_points - k - 1)
    return num_points * math.log(mean_square) + 2 * k + correction


def fit_offset(values: Sequence[float], curve: Sequence[float]) -> OffsetFit:
    """y = offset + curve, the curve given."""
    y, shape = np.asarray(values, dtype=float), np.asarray(curve, dtype=float)
    offset = float(np.mean(y - shape))
    rss = float(np.sum((y - shape - offset) ** 2))
    fitted = tuple((shape + offset).tolist())
    return OffsetFit(offset, None, None, None, rss, len(y), 1, fitted)


def fit_shape(
    values: Sequence[float], curve: Callable[[float], Array], *, low: float, high: float
) -> OffsetFit:
    """y = offset + curve(phi), phi searched in [low, high].

    The sum of squares may have several minima: it is first looked at on a grid of 200 values, then
    refined in the best one's neighbourhood.
    """
    y = np.asarray(values, dtype=float)

    def rss_at(phi: float) -> float:
        rest = y - curve(phi)
        return float(np.sum((rest - rest.mean()) ** 2))

    grid = np.linspace(low, high, _GRID)
    on_grid = [rss_at(float(phi)) for phi in grid]
    index = int(np.argmin(on_grid))
    left, right = grid[max(index - 1, 0)], grid[min(index + 1, _GRID - 1)]
    found: Any = minimize_scalar(
        rss_at, bounds=(left, right), method="bounded", options={"xatol": 1e-10}
    )
    phi = float(found.x) if found.fun <= on_grid[index] else float(grid[index])
    rss = rss_at(phi)
    bounded = grid[1] < phi < grid[-2]
    phi_low = phi_high = None
    df = len(y) - 2
    if df > 0:
        limit = max(rss, len(y) * _ROUNDING**2) * (1 + _t(df) ** 2 / df)
        phi_low = _crossing(rss_at, limit, phi, [float(one) for one in grid[::-1] if one < phi])
        phi_high = _crossing(rss_at, limit, phi, [float(one) for one in grid if one > phi])
    shape = curve(phi)
    offset = float(np.mean(y - shape))
    fitted = tuple((shape + offset).tolist())
    return OffsetFit(offset, phi if bounded else None, phi_low, phi_high, rss, len(y), 2, fitted)


def find_root(
    function: Callable[[float], float], start: float, end: float, *, precision: float = 1e-10
) -> float:
    """Where the function is 0 between two points at which its signs differ (Brent's method)."""
    return float(brentq(function, start, end, xtol=precision))  # pyright: ignore[reportArgumentType]


def _t(df: int) -> float:
    return t_quantile((1 + CONFIDENCE) / 2, df=df)


def _crossing(
    rss_at: Callable[[float], float], limit: float, start: float, outwards: Sequence[float]
) -> float | None:
    """Where the profile first rises above the limit, going outwards from the best phi."""
    inside = start
    for phi in outwards:
        if rss_at(phi) > limit:
            return find_root(lambda one: rss_at(one) - limit, inside, phi)
        inside = phi
    return None
