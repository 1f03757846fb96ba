"""The gradient noise scale from sums over single examples' gradients, and how sure it is.

For n per-example gradients g_i at fixed parameters, with mean gbar, true mean G and covariance S
(McCandlish et al. 2018, arXiv 1812.06162, appendix A):

    tr(S) = sum |g_i - gbar|^2 / (n - 1) = (sum |g_i|^2 - n |gbar|^2) / (n - 1)
    G2 = |gbar|^2 - tr(S) / n                 an unbiased estimate of |G|^2
    B_simple = tr(S) / |G|^2                  a ratio of averages, never an average of ratios

Over K probes the averages of tr(S) and of G2 are formed and divided. The interval is Fieller's, of
the inverse |G|^2 / tr(S): its denominator is well away from 0, so that it is one piece even where
|G|^2 may be 0. Then there is no upper end: the answer is "at least", or "undetermined".

Examples must be independent: what repeats is one example (see `gradient_sums`). Nothing here knows
what a gradient is of. Everything that is estimated from probes at different weights is an average
over those weights.
"""

# numpy is only partly typed.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from loratune.analyse.intervals import CONFIDENCE, t_quantile
from loratune.errors import AnalysisError

Verdict = Literal["estimate", "at least", "undetermined"]
# How many standard errors the average of G2 must lie above 0 for a bound to be worth stating. Where
# it does not, the bound says how much was looked at and nothing of the gradients.
SIGNS_OF_A_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class GradientSums:
    """One probe: n examples, the sum of |g_i|^2, and |gbar|^2.

    Raises:
        AnalysisError: fewer than two examples, which have no variance.
    """

    num_examples: int
    sum_squares: float
    mean_square: float

    def __post_init__(self) -> None:
        if self.num_examples < 2:
            raise AnalysisError(
                f"num_examples={self.num_examples}: a variance needs at least 2 different rows; "
                "pool the rows of several batches at the same weights"
            )

    @property
    def trace(self) -> float:
        """tr(S), unbiased."""
        n = self.num_examples
        return (self.sum_squares - n * self.mean_square) / (n - 1)

    @property
    def squared_norm(self) -> float:
        """G2, an unbiased estimate of |G|^2; may be negative."""
        return self.mean_square - self.trace / self.num_examples

    @property
    def plugin(self) -> float:
        """tr(S) / |gbar|^2: about 1 / (1 / B + 1 / n), so never much above n."""
        return self.trace / self.mean_square if self.mean_square else math.inf


def gradient_sums(
    gradients_ND: ArrayLike, *, clusters: Sequence[object] | None = None
) -> GradientSums:
    """The sums of N gradients of D numbers; rows with equal entries of `clusters` are one example.

    C clusters become C examples u_c = (C / N) times the sum of their rows, whose mean is that of
    all rows. Every row twice is then no different from every row once; without clusters, tr(S) / n
    would come out too small and G2 too large.

    Raises:
        AnalysisError: fewer than two examples, or not an entry of `clusters` for each row.
    """
    rows_ND = np.asarray(gradients_ND, dtype=np.float64)
    if clusters is not None:
        if len(clusters) != len(rows_ND):
            raise AnalysisError(
                f"{len(clusters)} entries of clusters for {len(rows_ND)} gradients; give one each"
            )
        numbers = {value: index for index, value in enumerate(dict.fromkeys(clusters))}
        sums_CD = np.zeros((len(numbers), rows_ND.shape[1]))
        np.add.at(sums_CD, [numbers[value] for value in clusters], rows_ND)
        rows_ND = sums_CD * (len(numbers) / len(rows_ND))
    return GradientSums(
        num_examples=len(rows_ND),
        sum_squares=float(np.square(rows_ND).sum()),
        mean_square=float(np.square(rows_ND.mean(axis=0)).sum()),
    )


def from_two_batch_sizes(
    *, small: int, small_square: float, large: int, large_square: float
) -> tuple[float, float]:
    """(tr(S), G2) from the squared norms of mean gradients over two batch sizes.

    G2 = (Bb |g_Bb|^2 - Bs |g_Bs|^2) / (Bb - Bs); tr(S) = (|g_Bs|^2 - |g_Bb|^2) / (1/Bs - 1/Bb).
    With Bs = 1 (the mean of |g_i|^2) and Bb = n it is what `GradientSums` gives.

    Raises:
        AnalysisError: not 1 <= small < large.
    """
    if not 1 <= small < large:
        raise AnalysisError(f"small={small}, large={large}; give 1 <= small < large")
    squared_norm = (large * large_square - small * small_square) / (large - small)
    return (small_square - large_square) / (1 / small - 1 / large), squared_norm


def squared_norm_variance(*, gsg: float, trace_of_square: float, num_examples: int) -> float:
    """Var(G2) = 4 G'SG / n + 2 tr(S^2) / (n (n - 1)); exact for any distribution of g."""
    n = num_examples
    return 4 * gsg / n + 2 * trace_of_square / (n * (n - 1))


def trace_variance(*, trace_of_square: float, num_examples: int) -> float:
    """Var(tr(S)) = 2 tr(S^2) / (n - 1), for Gaussian gradients."""
    return 2 * trace_of_square / (num_examples - 1)


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """B_simple over K probes, with a 95% interval, or why there is none.

    "estimate": `value` in [`low`, `high`]. "at least": `low` alone, at 97.5% confidence.
    "undetermined": nothing, and `reason` says why. `trace` and `squared_norm` are the averages of
    tr(S) and G2 with their own t intervals (None with one probe).
    """

    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    reason: str | None
    num_probes: int
    mean_examples: float
    trace: float
    squared_norm: float
    squared_norm_low: float | None
    squared_norm_high: float | None


def noise_scale(
    probes: Sequence[GradientSums], *, interval: Literal["fieller", "delta"] = "fieller"
) -> NoiseScale:
    """B_simple of probes that are independent of each other.

    Args:
        probes: at least one.
        interval: fieller, or the delta method on log B, which takes tr(S) and G2 for normal and the
            error of G2 for small; where G2's own interval contains 0 both give Fieller's bound.

    Raises:
        AnalysisError: no probe.
    """
    if not probes:
        raise AnalysisError("no probes; train with the key noise_scale: {every: 10} in the study")
    num = len(probes)
    traces = np.array([one.trace for one in probes])
    squares = np.array([one.squared_norm for one in probes])
    trace, square = float(traces.mean()), float(squares.mean())
    mean_examples = sum(one.num_examples for one in probes) / num

    def answer(
        verdict: Verdict,
        *,
        value: float | None = None,
        low: float | None = None,
        high: float | None = None,
        reason: str | None = None,
        half: float | None = None,
    ) -> NoiseScale:
        return NoiseScale(
            verdict=verdict,
            value=value,
            low=low,
            high=high,
            reason=reason,
            num_probes=num,
            mean_examples=mean_examples,
            trace=trace,
            squared_norm=square,
            squared_norm_low=None if half is None else square - half,
            squared_norm_high=None if half is None else square + half,
        )

    if not (math.isfinite(trace) and math.isfinite(square)):
        return answer("undetermined", reason="gradients are not finite")
    if trace == 0.0 and square == 0.0:
        return answer("undetermined", reason="all gradients are 0")
    if num < 2:
        return answer("undetermined", reason="one probe alone has no interval; probe more often")
    # Covariance of the two averages.
    covariance = np.cov(squares, traces, ddof=1) / num
    var_square, var_trace = float(covariance[0, 0]), float(covariance[1, 1])
    cross = float(covariance[0, 1])
    t = t_quantile((1 + CONFIDENCE) / 2, df=num - 1)
    half = t * math.sqrt(var_square)
    # Fieller: the ratios phi = |G|^2 / tr(S) with (square - phi trace)^2 <= t^2 Var(the same).
    quadratic = trace**2 - t**2 * var_trace
    if trace <= 0 or quadratic <= 0:
        return answer(
            "undetermined", half=half, reason=f"tr(S) can't be told from 0 over {num} probes"
        )
    middle = trace * square - t**2 * cross
    constant = square**2 - t**2 * var_square
    root = math.sqrt(max(0.0, middle**2 - quadratic * constant))
    phi_low, phi_high = (middle - root) / quadratic, (middle + root) / quadratic
    if square - half <= 0 or phi_low <= 0:
        if square <= SIGNS_OF_A_GRADIENT * math.sqrt(var_square) or phi_high <= 0:
            return answer(
                "undetermined",
                half=half,
                reason="no mean gradient can be told from the noise; look at more examples",
            )
        return answer(
            "at least",
            low=1 / phi_high,
            half=half,
            reason="the interval of |G|^2 contains 0, so that there is no upper end",
        )
    value = trace / square
    if interval == "fieller":
        return answer("estimate", value=value, low=1 / phi_high, high=1 / phi_low, half=half)
    variance = var_square / square**2 + var_trace / trace**2 - 2 * cross / (square * trace)
    factor = math.exp(t * math.sqrt(max(0.0, variance)))
    return answer("estimate", value=value, low=value / factor, high=value * factor, half=half)
