"""Steps to a target loss against the batch size, and the critical batch size (Zhang et al. 2025).

log S = log(a + b / B): halving of steps per doubling of the batch at small batches, `a` steps at
least. The critical batch size is where S is 20% above what perfect halving from `reference` (256)
would give: S(B) B = 1.2 S(ref) ref, so B = 1.2 ref + 0.2 b / a: a function of the ratio b / a
alone, whose profile interval becomes its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratune.analyse.laws.fitting import fit_shape
from loratune.errors import AnalysisError

OVERHEAD = 0.2
FEWEST_POINTS = 4


@dataclass(frozen=True, slots=True)
class StepsLaw:
    """S = least_steps + samples_at_small_batches / B, with the critical batch size.

    The interval of the critical batch size is a 95% profile; an end is None where it is open.
    """

    least_steps: float
    samples_at_small_batches: float
    critical_batch_size: float
    critical_low: float | None
    critical_high: float | None
    residual_factor: float
    num_points: int

    def steps(self, batch_size: float) -> float:
        """Steps to the target at a batch size."""
        return self.least_steps + self.samples_at_small_batches / batch_size


def fit_steps_to_target(
    batch_sizes: Sequence[float],
    steps: Sequence[float],
    *,
    reference: float = 256,
    overhead: float = OVERHEAD,
) -> StepsLaw:
    """The two numbers of the law, by least squares of log S.

    Raises:
        AnalysisError: fewer than four points, a number that is not above 0, or steps that show
            no bend, so that one of the two numbers is not bounded by the data.
    """
    if len(batch_sizes) != len(steps) or len(set(batch_sizes)) < FEWEST_POINTS:
        raise AnalysisError(
            f"{len(batch_sizes)} batch sizes and {len(steps)} numbers of steps; give one of each "
            f"for at least {FEWEST_POINTS} batch sizes"
        )
    if not all(0 < one < math.inf for one in (*batch_sizes, *steps)):
        raise AnalysisError("batch sizes and steps must be positive numbers")
    sizes = np.asarray(batch_sizes, dtype=float)
    fit = fit_shape(
        np.log(np.asarray(steps, dtype=float)).tolist(),
        lambda phi: np.log1p(math.exp(phi) / sizes),
        low=math.log(float(sizes.min()) * 1e-3),
        high=math.log(float(sizes.max()) * 1e3),
    )
    if fit.phi is None:
        raise AnalysisError(
            "the steps show no bend: they fall as 1/B throughout, or not at all; "
            "add batch sizes on the side that is missing"
        )

    def critical(phi: float) -> float:
        return (1 + overhead) * reference + overhead * math.exp(phi)

    least = math.exp(fit.offset)
    return StepsLaw(
        least_steps=least,
        samples_at_small_batches=least * math.exp(fit.phi),
        critical_batch_size=critical(fit.phi),
        critical_low=None if fit.phi_low is None else critical(fit.phi_low),
        critical_high=None if fit.phi_high is None else critical(fit.phi_high),
        residual_factor=math.exp(fit.residual),
        num_points=fit.num_points,
    )
