"""Loss over batch size and steps, in three terms, and the batch size that is best at a budget.

L = floor + A / M^a + C / K^c with M the batch size, K the updates, D = M K the samples
(Schaipp 2026; `floor` stands for E + A_N / N^a, which is one number while the model is the same).
At D samples the loss is lowest at M* = (a A / (c C))^(1/(a+c)) D^(c/(a+c)).

Forms with fewer terms are fitted beside it (no batch term: smaller is always better at a budget;
no step term: larger is; floor alone) and AICc chooses. With one number of samples D throughout, M*
is known at that D only. Fitted by least squares of the loss with one variance; coefficients are
never negative.
"""

# numpy and scipy come without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.special import fdtrc

from loratune.analyse.intervals import CONFIDENCE, NO_SPREAD, t_quantile
from loratune.analyse.laws.fitting import Array, aicc, find_root
from loratune.errors import AnalysisError

Form = Literal["floor", "steps", "batch", "three_terms"]
# AICc of five parameters and a variance exists from eight points on.
FEWEST_POINTS = 8
_NUM_PARAMETERS: dict[Form, int] = {"floor": 1, "steps": 3, "batch": 3, "three_terms": 5}
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = 0.05, 3.0
_GRID = np.geomspace(_LOWEST_EXPONENT, _HIGHEST_EXPONENT, 12)
# The profile of M* is followed this many doublings to each side.
_DOUBLINGS = 12


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One measured loss: `batch_size` sequences an update, `num_updates` updates."""

    batch_size: int
    num_updates: int
    loss: float


@dataclass(frozen=True, slots=True)
class FormCriterion:
    """A form's AICc less the lowest; None where it has too many parameters for the points."""

    form: Form
    aicc_difference: float | None


@dataclass(frozen=True, slots=True)
class LossLaw:
    """The three terms, fitted: floor, A, a, C, c; and what AICc says of the `forms`.

    A term that the chosen form lacks has scale 0 and exponent None; all numbers are the chosen's.
    `left_out_error` is prediction less truth, in loss, at the largest batch size when the chosen
    form is fitted without it.
    """

    chosen: Form
    floor: float
    batch_scale: float
    batch_exponent: float | None
    steps_scale: float
    steps_exponent: float | None
    residual: float
    forms: tuple[FormCriterion, ...]
    left_out_error: float | None
    num_points: int


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best batch size at a number of samples, with its 95% profile interval.

    An end is None where the profile does not rise within 12 doublings.
    """

    samples: float
    batch_size: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class _Fit:
    rss: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]


def optimal_batch_size(
    samples: float,
    *,
    batch_scale: float,
    batch_exponent: float,
    steps_scale: float,
    steps_exponent: float,
) -> float:
    """M* = (b B / (c C))^(1/(b+c)) D^(c/(b+c)), the interior optimum at D = `samples`.

    Raises:
        AnalysisError: a number that is not above 0: there is no interior optimum then.
    """
    given = (samples, batch_scale, batch_exponent, steps_scale, steps_exponent)
    if not all(0 < one < math.inf for one in given):
        raise AnalysisError("an interior optimum needs all five numbers above 0")
    total = batch_exponent + steps_exponent
    ratio = batch_exponent * batch_scale / (steps_exponent * steps_scale)
    return ratio ** (1 / total) * samples ** (steps_exponent / total)


def fit_loss(points: Sequence[LossPoint]) -> LossLaw:
    """All forms, the chosen one's numbers, and how it does on the largest batch size left out.

    Raises:
        AnalysisError: fewer than eight points or three batch sizes, or a loss that is not above 0.
    """
    _check(points)
    sizes, updates, losses = _arrays(points)
    forms: tuple[Form, ...] = ("floor", "steps", "batch", "three_terms")
    fits: dict[Form, _Fit] = {form: _fit(form, sizes, updates, losses) for form in forms}
    criteria = dict[Form, float]()
    for form, fit in fits.items():
        value = aicc(fit.rss, num_points=len(points), num_parameters=_NUM_PARAMETERS[form])
        if value is not None:
            criteria[form] = value
    chosen = min(criteria, key=lambda form: round(criteria[form], 6))
    fit = fits[chosen]
    df = len(points) - _NUM_PARAMETERS[chosen]
    values = dict(zip(_columns(chosen), fit.coefficients, strict=True))
    exponents = dict(zip(_columns(chosen)[1:], fit.exponents, strict=True))
    return LossLaw(
        chosen=chosen,
        floor=values["floor"],
        batch_scale=values.get("batch", 0.0),
        batch_exponent=exponents.get("batch"),
        steps_scale=values.get("steps", 0.0),
        steps_exponent=exponents.get("steps"),
        residual=math.sqrt(fit.rss / df),
        forms=tuple(
            FormCriterion(form, criteria[form] - criteria[chosen] if form in criteria else None)
            for form in forms
        ),
        left_out_error=_left_out(chosen, sizes, updates, losses),
        num_points=len(points),
    )


def fit_optimum(points: Sequence[LossPoint], *, samples: float) -> Optimum | None:
    """M* of the three-term form at `samples`, with its interval; None where it is no batch size.

    The profile: for a given M* the batch term's scale follows from the others, A = (c C / a)
    M*^(a+c) D^-c, and the rest is fitted; the interval holds all M* whose sum of squares stays
    below rss (1 + t^2 / df), df = n - 5. Where a term vanishes, or M* is below 1 or above
    `samples`, the losses have no minimum inside.

    Raises:
        AnalysisError: as `fit_loss`, or samples that are not above 0.
    """
    _check(points)
    if not 0 < samples < math.inf:
        raise AnalysisError(f"samples={samples}; give a positive number")
    sizes, updates, losses = _arrays(points)
    fit = _fit("three_terms", sizes, updates, losses)
    _, batch, steps = fit.coefficients
    if batch <= 0 or steps <= 0:
        return None
    a, c = fit.exponents
    best = optimal_batch_size(
        samples, batch_scale=batch, batch_exponent=a, steps_scale=steps, steps_exponent=c
    )
    if not 1 <= best <= samples:
        return None
    df = len(points) - 5
    limit = fit.rss * (1 + t_quantile((1 + CONFIDENCE) / 2, df=df) ** 2 / df)
    ends = list[float | None]()
    for direction in (-1, 1):
        ends.append(_profile_end(sizes, updates, losses, samples, fit, best, direction, limit))
    return Optimum(samples=samples, batch_size=best, low=ends[0], high=ends[1])


def lack_of_fit(law: LossLaw, *, seeds: Sequence[Sequence[float]]) -> float | None:
    """p of the F test that the chosen form leaves no more than the seeds explain.

    F = the residuals' mean square, n - parameters degrees of freedom, over that of the mean of a
    point's seeds: one variance, pooled over the points' own means. A seed that is lucky at every
    point counts as noise here and is no residual: the test then refuses less. It does not know that
    AICc chose the form, nor how a best LR was chosen.

    Args:
        law: of the points whose losses are the means of these seeds.
        seeds: the losses of each point, in any order.

    Returns:
        None where the seeds differ by no more than rounding, or no point has two.
    """
    df_residual = law.num_points - _NUM_PARAMETERS[law.chosen]
    df_seeds = sum(len(losses) - 1 for losses in seeds)
    scatter = math.fsum(float(np.var(losses)) * len(losses) for losses in seeds)
    largest = max(abs(loss) for losses in seeds for loss in losses)
    if df_seeds == 0 or scatter <= df_seeds * (NO_SPREAD * largest) ** 2:
        return None
    of_a_mean = scatter / df_seeds * math.fsum(1 / len(losses) for losses in seeds) / len(seeds)
    return float(fdtrc(df_residual, df_seeds, law.residual**2 / of_a_mean))


def _profile_end(
    sizes: Array,
    updates: Array,
    losses: Array,
    samples: float,
    fit: _Fit,
    best: float,
    direction: int,
    limit: float,
) -> float | None:
    """The M* at which the profile crosses the limit, from the best one to one side."""
    warm = [fit.exponents]
    # What was found stays: a search that starts elsewhere may end elsewhere.
    known = {math.log2(best): fit.rss}

    def rss_at(log2_best: float) -> float:
        if log2_best in known:
            return known[log2_best]

        def rss(exponents: Array) -> tuple[float, Array]:
            a, c = exponents
            # In units of the best: powers of samples and M* cancel before they overflow.
            tied = (c / a) * (2.0**log2_best / sizes) ** a * (2.0**log2_best / samples) ** c
            return _solve([np.ones_like(sizes), tied + updates**-c], losses)

        found = _minimise(rss, [*warm, fit.exponents])
        warm[0] = found.exponents
        known[log2_best] = found.rss
        return found.rss

    start = math.log2(best)
    inside, step = start, 0.125
    while abs(inside - start) < _DOUBLINGS:
        outside = inside + direction * step
        if rss_at(outside) > limit:
            root = find_root(lambda one: rss_at(one) - limit, inside, outside, precision=1e-5)
            return float(2.0**root)
        inside, step = outside, step * 1.5
    return None


def _check(points: Sequence[LossPoint]) -> None:
    num_sizes = len({point.batch_size for point in points})
    if len(points) < FEWEST_POINTS or num_sizes < 3:
        raise AnalysisError(
            f"{len(points)} losses at {num_sizes} batch sizes; three terms need at least "
            f"{FEWEST_POINTS} losses at 3 batch sizes"
        )
    for point in points:
        if not (0 < point.loss < math.inf and point.batch_size > 0 and point.num_updates > 0):
            raise AnalysisError(f"{point}: loss, batch size and updates must be above 0")


def _arrays(points: Sequence[LossPoint]) -> tuple[Array, Array, Array]:
    return (
        np.asarray([point.batch_size for point in points], dtype=float),
        np.asarray([point.num_updates for point in points], dtype=float),
        np.asarray([point.loss for point in points], dtype=float),
    )


def _columns(form: Form) -> tuple[str, ...]:
    return {
        "floor": ("floor",),
        "steps": ("floor", "steps"),
        "batch": ("floor", "batch"),
        "three_terms": ("floor", "batch", "steps"),
    }[form]


def _fit(form: Form, sizes: Array, updates: Array, losses: Array) -> _Fit:
    bases = {"batch": sizes, "steps": updates}
    names = _columns(form)[1:]

    def rss(exponents: Array) -> tuple[float, Array]:
        terms = [bases[name] ** -e for name, e in zip(names, exponents, strict=True)]
        return _solve([np.ones_like(losses), *terms], losses)

    if not names:
        value, coefficients = rss(np.empty(0))
        return _Fit(value, tuple(coefficients.tolist()), ())
    grid = np.stack(np.meshgrid(*[_GRID] * len(names)), axis=-1).reshape(-1, len(names))
    order = np.argsort([rss(one)[0] for one in grid])
    return _minimise(rss, [tuple(grid[index].tolist()) for index in order[:3]])


def _minimise(
    rss: Callable[[Array], tuple[float, Array]], starts: Sequence[tuple[float, ...]]
) -> _Fit:
    """The lowest of the local minima over the exponents, from each start."""
    bounds = [(_LOWEST_EXPONENT, _HIGHEST_EXPONENT)] * len(starts[0])
    best: _Fit | None = None

    def value_at(exponents: Array) -> float:
        return rss(exponents)[0]

    for start in dict.fromkeys(starts):
        found = minimize(
            value_at,
            np.asarray(start),
            method="Nelder-Mead",
            bounds=bounds,
            options={"xatol": 1e-6, "fatol": 1e-14, "maxiter": 1000},
        )
        value, coefficients = rss(found.x)
        if best is None or value < best.rss:
            best = _Fit(value, tuple(coefficients.tolist()), tuple(found.x.tolist()))
    assert best is not None
    return best


def _solve(columns: Sequence[Array], losses: Array) -> tuple[float, Array]:
    """Least squares with coefficients of 0 or more; columns are scaled to equal lengths first."""
    design = np.stack(columns, axis=1)
    lengths = np.linalg.norm(design, axis=0)
    coefficients, residual = nnls(design / lengths, losses)
    return float(residual) ** 2, np.asarray(coefficients) / lengths


def _left_out(form: Form, sizes: Array, updates: Array, losses: Array) -> float | None:
    """Prediction less truth, the mean over the points of the largest batch size."""
    out = sizes == sizes.max()
    if np.sum(~out) < _NUM_PARAMETERS[form] + 1:
        return None
    fit = _fit(form, sizes[~out], updates[~out], losses[~out])
    predicted = np.full(int(np.sum(out)), fit.coefficients[0])
    bases = {"batch": sizes[out], "steps": updates[out]}
    names = _columns(form)[1:]
    for name, scale, exponent in zip(names, fit.coefficients[1:], fit.exponents, strict=True):
        predicted = predicted + scale * bases[name] ** -exponent
    return float(np.mean(predicted - losses[out]))
