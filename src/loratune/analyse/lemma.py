"""Lemma 4.1 by simulation, and the plug-in law that says what it is about.

The lemma: x ~ N(0, I_r), y = +-1 independent of x, x~ = U x with orthonormal U, quadratic loss at
w = 0. Row i's gradient is then -y_i x~_i, whose length U does not change, and

    E[B_simple] = r N / (r - 2),  r > 2;  the median is r N / median(chi2_r),

with B_simple = tr(S) / |gbar|^2 as it is estimated from the same N rows: N |gbar|^2 is chi-square
with r degrees of freedom, and tr(S), independent of it, has mean r. 1 / chi2_r has a finite
variance for r > 4 only: below, a simulated mean does not settle however many replicates there are.

What it shows and what not: labels are independent of the inputs, so the true gradient is 0 and the
true noise scale infinite. What grows with N is the plug-in estimate, which is about
1 / (1 / B_true + 1 / N) in general: N where B_true is infinite, B_true where N is large.
"""

# numpy and scipy come without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtri

from loratune.analyse.intervals import mean_with_interval
from loratune.analyse.tables import as_document
from loratune.errors import AnalysisError

DEFAULT_REPLICATES = 2000
# About a minute of normal draws on one core.
MOST_DRAWS = 5_000_000_000
_DRAWS_AT_A_TIME = 4_000_000
# One replicate lies in memory as a whole: half a GiB.
_MOST_AT_A_TIME = 64_000_000
# tr(S) is r, found as the difference of numbers of N r / B: its relative error is 1e-16 N / B.
_LEAST_NOISE_SCALE = 1e-9
# Below, the 95% interval of a median by order statistics does not exist.
_FEWEST_REPLICATES = 10


@dataclass(frozen=True, slots=True)
class PluginCheck:
    """The plug-in estimate where the true noise scale is finite: its median and what the law says.

    The law is for the ratio of expectations, not for the median; they agree for large `rank`.
    """

    true_noise_scale: float
    median: float
    median_low: float
    median_high: float
    formula: float


@dataclass(frozen=True, slots=True)
class LemmaCheck:
    """Simulated and stated mean and median of B_simple, over `replicates` draws of N rows.

    Intervals are 95%: of the mean by Student's t, of the median by order statistics. `mean` is None
    for rank 1 and 2, where there is none; its interval is None up to rank 4, where it is not to be
    trusted. `remarks` say so in words.
    """

    rank: int
    samples: int
    replicates: int
    seed: int
    mean: float | None
    mean_low: float | None
    mean_high: float | None
    median: float
    median_low: float
    median_high: float
    formula_mean: float | None
    formula_median: float
    plugin: PluginCheck | None
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as plain values; tuples are lists."""
        return as_document(self)


def formula_mean(rank: int, samples: int) -> float | None:
    """r N / (r - 2); None for r <= 2, where the mean is infinite."""
    return rank * samples / (rank - 2) if rank > 2 else None


def formula_median(rank: int, samples: int) -> float:
    """r N / median(chi2_r)."""
    return rank * samples / float(chdtri(rank, 0.5))


def plugin_noise_scale(true_noise_scale: float, samples: int) -> float:
    """1 / (1 / B_true + 1 / N): what the plug-in estimate is about; B_true may be infinite.

    From E|gbar|^2 = |G|^2 + tr(S) / N.

    Raises:
        AnalysisError: a noise scale that is not above 0, or no samples.
    """
    if not true_noise_scale > 0:
        raise AnalysisError(f"true_noise_scale={true_noise_scale}; give a number above 0")
    if samples < 1:
        raise AnalysisError(f"samples={samples}; give 1 or more")
    return 1 / (1 / true_noise_scale + 1 / samples)


def check_lemma(
    *,
    rank: int,
    samples: int,
    replicates: int = DEFAULT_REPLICATES,
    seed: int = 0,
    true_noise_scale: float | None = None,
) -> LemmaCheck:
    """Draws `samples` rows, `replicates` times over, and holds the estimates against the lemma.

    With `true_noise_scale` the plug-in law is checked as well: gradients with a true mean G such
    that tr(S) / |G|^2 is that number.

    Raises:
        AnalysisError: a rank below 1, fewer than 2 samples or 10 replicates, a seed below 0, more
            than 5e9 draws in all, or a noise scale that is not a number of at least 1e-9.
    """
    _check(rank, samples, replicates, seed)
    generator = np.random.default_rng(seed)
    values = simulate_noise_scale(rank, samples, replicates, generator)
    remarks = list[str]()
    mean = mean_low = mean_high = None
    if rank <= 2:
        remarks.append(
            f"rank {rank}: B_simple has no mean (r > 2 is needed); the median is all there is"
        )
    else:
        estimate = mean_with_interval(values.tolist())
        mean = estimate.value
        if rank <= 4:
            remarks.append(
                f"rank {rank}: the variance of B_simple is infinite (r > 4 is needed); the "
                "simulated mean does not settle and is not to be trusted, the median is"
            )
        else:
            mean_low, mean_high = estimate.low, estimate.high
    remarks.append(
        "labels are independent of the inputs here: the true gradient is 0 and the true noise "
        "scale infinite; what grows with N is the plug-in estimate, 1 / (1 / B_true + 1 / N)"
    )
    median, median_low, median_high = _median(values)
    return LemmaCheck(
        rank=rank,
        samples=samples,
        replicates=replicates,
        seed=seed,
        mean=mean,
        mean_low=mean_low,
        mean_high=mean_high,
        median=median,
        median_low=median_low,
        median_high=median_high,
        formula_mean=formula_mean(rank, samples),
        formula_median=formula_median(rank, samples),
        plugin=_plugin(rank, samples, replicates, true_noise_scale, generator),
        remarks=tuple(remarks),
    )


def simulate_noise_scale(
    rank: int,
    samples: int,
    replicates: int,
    generator: np.random.Generator,
    *,
    true_noise_scale: float = math.inf,
) -> np.ndarray:
    """`replicates` plug-in estimates tr(S) / |gbar|^2, each from `samples` rows drawn one by one.

    With an infinite noise scale a row is the lemma's: x from N(0, I_r), y = +-1, gradient -y x.
    With a finite one it is G + x, |G|^2 = r / B_true, along the first coordinate (the distribution
    does not depend on the direction). tr(S) is the n - 1 estimate.
    """
    found = np.empty(replicates)
    at_a_time = max(1, _DRAWS_AT_A_TIME // (rank * samples))
    for start in range(0, replicates, at_a_time):
        count = min(at_a_time, replicates - start)
        gradients = generator.standard_normal((count, samples, rank))
        if math.isinf(true_noise_scale):
            labels = generator.integers(0, 2, size=(count, samples, 1)) * 2 - 1
            gradients *= -labels
        else:
            gradients[:, :, 0] += math.sqrt(rank / true_noise_scale)
        mean = gradients.mean(axis=1)
        squared = np.einsum("csr,csr->c", gradients, gradients)
        of_mean = np.einsum("cr,cr->c", mean, mean)
        trace = (squared - samples * of_mean) / (samples - 1)
        found[start : start + count] = trace / of_mean
    return found


def _plugin(
    rank: int,
    samples: int,
    replicates: int,
    true_noise_scale: float | None,
    generator: np.random.Generator,
) -> PluginCheck | None:
    if true_noise_scale is None:
        return None
    formula = plugin_noise_scale(true_noise_scale, samples)
    if math.isinf(true_noise_scale):
        raise AnalysisError(
            "true_noise_scale=inf is the lemma itself; leave it out, or give a finite number"
        )
    if true_noise_scale < _LEAST_NOISE_SCALE:
        raise AnalysisError(
            f"true_noise_scale={true_noise_scale:g}; below {_LEAST_NOISE_SCALE:g} the noise is "
            "lost in the rounding of so large a mean gradient; give a larger one"
        )
    values = simulate_noise_scale(
        rank, samples, replicates, generator, true_noise_scale=true_noise_scale
    )
    return PluginCheck(true_noise_scale, *_median(values), formula)


def _median(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and the order statistics that bound it with 95%."""
    from scipy.stats import binom  # a second to import, which other commands need not pay

    ordered = np.sort(values)
    count = len(ordered)
    # The number of values below the median is binomial(n, 1/2).
    below = max(int(binom.ppf(0.025, count, 0.5)) - 1, 0)
    return float(np.median(ordered)), float(ordered[below]), float(ordered[count - 1 - below])


def _check(rank: int, samples: int, replicates: int, seed: int) -> None:
    if rank < 1:
        raise AnalysisError(f"rank={rank}; give 1 or more")
    if samples < 2:
        raise AnalysisError(f"samples={samples}; a covariance needs 2 or more")
    if replicates < _FEWEST_REPLICATES:
        raise AnalysisError(f"replicates={replicates}; give {_FEWEST_REPLICATES} or more")
    if seed < 0:
        raise AnalysisError(f"seed={seed}; give 0 or more")
    if rank * samples > _MOST_AT_A_TIME:
        raise AnalysisError(
            f"rank {rank} x samples {samples:,} is more than {_MOST_AT_A_TIME:,} numbers; "
            "choose fewer samples or a lower rank"
        )
    if rank * samples * replicates > MOST_DRAWS:
        most = MOST_DRAWS // (rank * samples)
        raise AnalysisError(
            f"rank {rank} x samples {samples:,} x replicates {replicates:,} are "
            f"{rank * samples * replicates:.1e} draws, more than {MOST_DRAWS:.0e}; "
            f"choose at most {most:,} replicates"
        )
