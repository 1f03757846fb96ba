"""The best LR against the batch size: four forms, nested in the square-root rule.

sqrt        lr = s B^(1/2)
power       lr = s B^p
surge       lr = s / (0.5 (sqrt(Bn/B) + sqrt(B/Bn))), Li et al. 2024; peaks at Bn
saturation  lr = s / sqrt(1 + Bn/B): the square-root rule that levels off above Bn

sqrt is power at p = 1/2, and surge and saturation where Bn goes to infinity. All are fitted to
log lr by least squares, so that a residual is a factor. `s` is the LR at B = 1 for the first two
and the largest LR for the others. The best LRs come from a grid and carry its rounding; that error
is part of the residuals and is taken as independent between batch sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratune.analyse.laws.fitting import Array, OffsetFit, fit_offset, fit_shape
from loratune.errors import AnalysisError

LawName = Literal["sqrt", "power", "surge", "saturation"]
LAW_NAMES: tuple[LawName, ...] = ("sqrt", "power", "surge", "saturation")
FORMULAS = {
    "sqrt": "lr = s B^(1/2)",
    "power": "lr = s B^p",
    "surge": "lr = s / (0.5 (sqrt(Bn/B) + sqrt(B/Bn)))",
    "saturation": "lr = s / sqrt(1 + Bn/B)",
}
# AICc of two parameters and a variance exists from five points on.
FEWEST_BATCH_SIZES = 5
# Where surge was seen to fail by its authors' measurements.
TRUSTED_SURGE = 3.0
# A left-out LR that is predicted within a factor of two, the step of a usual grid.
LEFT_OUT_FACTOR = 2.0
# Differences of AICc below this are no evidence (Burnham and Anderson 2002).
CLOSE = 2.0
# How far beyond the batch sizes Bn is looked for, as factors below and above.
_BELOW, _ABOVE = 1e-3, 1e5


@dataclass(frozen=True, slots=True)
class LearningRateLaw:
    """One form, fitted. `scale` is s; `shape` is p for power, Bn for surge and saturation.

    `shape` is None for sqrt and where the data do not bound it; `shape_low` and `shape_high` are
    its 95% profile interval, None where open. `residual_factor` is the factor of one standard
    deviation of the residuals. `left_out_factor` is the prediction over the truth at the largest
    batch size when the fit is made without it. `trusted_up_to` is the batch size beyond which the
    form is known to fail (surge: 3 Bn), None where nothing is known.
    """

    name: LawName
    formula: str
    scale: float
    shape: float | None
    shape_low: float | None
    shape_high: float | None
    residual_factor: float
    aicc: float | None
    aicc_difference: float | None
    left_out_factor: float | None
    trusted_up_to: float | None


@dataclass(frozen=True, slots=True)
class LearningRateFit:
    """All four forms on the same points, and the one with the lowest AICc.

    `not_excluded` are the others within 2 of its AICc. `holds_out`: the chosen form, refitted
    without the largest batch size, predicts its LR within a factor of two.
    """

    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    laws: tuple[LearningRateLaw, ...]
    chosen: LawName
    not_excluded: tuple[LawName, ...]
    holds_out: bool

    def law(self, name: LawName) -> LearningRateLaw:
        """One of the four forms."""
        return next(one for one in self.laws if one.name == name)


def surge(batch_size: float, *, peak: float, noise_batch_size: float) -> float:
    """The surge form: `peak` at `noise_batch_size`, falling on both sides (Li et al. 2024)."""
    ratio = math.sqrt(noise_batch_size / batch_size)
    return peak / (0.5 * (ratio + 1 / ratio))


def predict(law: LearningRateLaw, batch_size: float) -> float:
    """The LR that a fitted form gives at a batch size.

    Raises:
        AnalysisError: the form's shape is not bounded by the data, or the batch size lies beyond
            what the form is trusted for.
    """
    if law.trusted_up_to is not None and batch_size > law.trusted_up_to:
        raise AnalysisError(
            f"batch_size={batch_size:g}: {law.name} is not to be trusted past "
            f"{law.trusted_up_to:.4g}; tune the learning rate there"
        )
    if law.name == "sqrt":
        return law.scale * math.sqrt(batch_size)
    if law.shape is None:
        raise AnalysisError(
            f"{law.name}: its shape is not bounded by the data; use sqrt, or add batch sizes"
        )
    if law.name == "power":
        return law.scale * batch_size**law.shape
    if law.name == "surge":
        return surge(batch_size, peak=law.scale, noise_batch_size=law.shape)
    return law.scale / math.sqrt(1 + law.shape / batch_size)


def fit_learning_rate(
    batch_sizes: Sequence[int], learning_rates: Sequence[float]
) -> LearningRateFit:
    """All four forms fitted to the best LR at each batch size.

    Raises:
        AnalysisError: fewer than five batch sizes, one twice, or a number that is not above 0.
    """
    if len(batch_sizes) != len(learning_rates):
        raise AnalysisError(
            f"{len(batch_sizes)} batch sizes and {len(learning_rates)} learning rates; "
            "give one of each for every point"
        )
    if not all(0 < one < math.inf for one in (*batch_sizes, *learning_rates)):
        raise AnalysisError("batch sizes and learning rates must be positive numbers")
    pairs = sorted(zip(batch_sizes, learning_rates, strict=True))
    sizes = [size for size, _ in pairs]
    if len(set(sizes)) < len(sizes):
        raise AnalysisError("a batch size is given twice; give its best learning rate once")
    if len(pairs) < FEWEST_BATCH_SIZES:
        raise AnalysisError(
            f"{len(pairs)} batch sizes; four forms need at least {FEWEST_BATCH_SIZES} to be told "
            "apart"
        )
    x = np.log(np.asarray(sizes, dtype=float))
    y = np.log(np.asarray([rate for _, rate in pairs], dtype=float))
    fits: dict[LawName, OffsetFit] = {name: _fit(name, x, y) for name in LAW_NAMES}
    criteria: dict[LawName, float] = {
        name: fit.aicc for name, fit in fits.items() if fit.aicc is not None
    }
    # Of equal ones the first, which has the fewest parameters.
    chosen = min(criteria, key=lambda name: round(criteria[name], 6))
    lowest = criteria[chosen]
    laws = tuple(_law(name, fits[name], x, y, lowest) for name in LAW_NAMES)
    left_out = next(law.left_out_factor for law in laws if law.name == chosen)
    return LearningRateFit(
        batch_sizes=tuple(sizes),
        learning_rates=tuple(rate for _, rate in pairs),
        laws=laws,
        chosen=chosen,
        not_excluded=tuple(
            name for name, value in criteria.items() if name != chosen and value - lowest < CLOSE
        ),
        holds_out=left_out is not None and 1 / LEFT_OUT_FACTOR <= left_out <= LEFT_OUT_FACTOR,
    )


def _curve(name: LawName, x: Array, phi: float) -> Array:
    """log lr less log s over x = log B; phi is p, or log Bn."""
    if name == "power":
        return phi * x
    half = (phi - x) / 2
    if name == "surge":
        return -np.log(np.cosh(half))
    return -0.5 * np.logaddexp(0.0, 2 * half)


def _fit(name: LawName, x: Array, y: Array) -> OffsetFit:
    if name == "sqrt":
        return fit_offset(y.tolist(), (0.5 * x).tolist())
    low, high = _range(name, x)
    return fit_shape(y.tolist(), lambda phi: _curve(name, x, phi), low=low, high=high)


def _range(name: LawName, x: Array) -> tuple[float, float]:
    if name == "power":
        return -4.0, 4.0
    return float(x.min()) + math.log(_BELOW), float(x.max()) + math.log(_ABOVE)


def _law(name: LawName, fit: OffsetFit, x: Array, y: Array, lowest: float) -> LearningRateLaw:
    def spoken(phi: float | None) -> float | None:
        return phi if phi is None or name == "power" else math.exp(phi)

    shape = spoken(fit.phi)
    return LearningRateLaw(
        name=name,
        formula=FORMULAS[name],
        scale=math.exp(fit.offset),
        shape=shape,
        shape_low=spoken(fit.phi_low),
        shape_high=spoken(fit.phi_high),
        residual_factor=math.exp(fit.residual),
        aicc=fit.aicc,
        aicc_difference=None if fit.aicc is None else fit.aicc - lowest,
        left_out_factor=_left_out(name, x, y),
        trusted_up_to=TRUSTED_SURGE * shape if name == "surge" and shape is not None else None,
    )


def _left_out(name: LawName, x: Array, y: Array) -> float | None:
    """The prediction over the truth at the largest batch size, fitted without it."""
    fit = _fit(name, x[:-1], y[:-1])
    if name == "sqrt":
        predicted = fit.offset + 0.5 * float(x[-1])
    else:
        # Where Bn is not bounded its form is the square-root rule; the end of the range stands in.
        low, high = _range(name, x[:-1])
        phi = fit.phi
        if phi is None:
            at_low = _rss(name, x[:-1], y[:-1], low) < _rss(name, x[:-1], y[:-1], high)
            phi = low if at_low else high
        rest = y[:-1] - _curve(name, x[:-1], phi)
        predicted = float(rest.mean()) + float(_curve(name, x[-1:], phi)[0])
    return math.exp(predicted - float(y[-1]))


def _rss(name: LawName, x: Array, y: Array, phi: float) -> float:
    rest = y - _curve(name, x, phi)
    return float(np.sum((rest - rest.mean()) ** 2))
