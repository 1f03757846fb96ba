"""How often the intervals of `laws` and `lemma` hold the truth, and which optima `laws` states.

On simulated numbers whose law is known. Only the fits and what judges them are asked: every loss is
that of the best learning rate of its batch size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loratune.analyse.laws.learning_rate import LawName, fit_learning_rate
from loratune.analyse.laws.loss import LossPoint, fit_loss, fit_optimum, optimal_batch_size
from loratune.analyse.laws.optimum import SeedOptima, fit_power_law
from loratune.analyse.laws.report import judge_optimum
from loratune.analyse.lemma import check_lemma

RATE_SIZES = [2**k for k in range(1, 10)]
RATE_SCATTER = 0.2
RATE_FORMS: dict[LawName, tuple[float, Callable[[float], float]]] = {
    "power": (0.2, lambda size: 1e-4 * size**0.2),
    "surge": (30.0, lambda size: 2e-3 / ((30 / size) ** 0.5 + (size / 30) ** 0.5)),
    "saturation": (30.0, lambda size: 1e-3 * (size / (size + 30)) ** 0.5),
}
# Three values of an axis over a factor of eight, three seeds: an exponent of 1/3 is a factor of 2.
AXIS = (1024.0, 2896.0, 8192.0)
NUM_SEEDS = 3
TWOFOLD = 1 / 3
LOSS_SIZES = [2**k for k in range(9)]


def rate_coverage(form: LawName, *, num_simulations: int, seed: int) -> float:
    """Of the 95% interval of the form's shape, from nine best learning rates."""
    shape, rate = RATE_FORMS[form]
    draw = np.random.default_rng(seed)
    held = 0
    for _ in range(num_simulations):
        rates = [rate(size) * math.exp(draw.normal(0, RATE_SCATTER)) for size in RATE_SIZES]
        law = fit_learning_rate(RATE_SIZES, rates).law(form)
        held += (law.shape_low or 0.0) <= shape <= (law.shape_high or math.inf)
    return held / num_simulations


@dataclass(frozen=True, slots=True)
class Dependence:
    """Shares: of exponents that their 95% interval holds, of "does not depend"."""

    held: float
    called_equal: float


def dependence(exponent: float, noise: float, *, num_simulations: int, seed: int) -> Dependence:
    """Of the best batch size on an axis; `noise` of each seed's best, in doublings."""
    draw = np.random.default_rng(seed)
    held = called_equal = 0
    for _ in range(num_simulations):
        optima = [
            SeedOptima(
                x, tuple((3 + exponent * math.log2(x) + draw.normal(0, noise, NUM_SEEDS)).tolist())
            )
            for x in AXIS
        ]
        fit = fit_power_law(optima)
        held += fit.exponent_low <= exponent <= fit.exponent_high
        called_equal += fit.dependence == "does not depend"
    return Dependence(held / num_simulations, called_equal / num_simulations)


@dataclass(frozen=True, slots=True)
class LossForm:
    """A loss of batch size and updates, seen at these numbers of samples; its best at the most."""

    loss: Callable[[int, int], float]
    samples: tuple[int, ...]
    best: float


def _lopsided(batch_size: int, _num_updates: int) -> float:
    off = math.log2(batch_size / 8)
    return 0.643 + (0.003 if off < 0 else 0.006) * off**2


LOSS_FORMS = {
    "the three terms": LossForm(
        lambda size, updates: 1 + 0.4 * size**-0.5 + 5 * updates**-0.65,
        (2048, 8192),
        optimal_batch_size(
            8192, batch_scale=0.4, batch_exponent=0.5, steps_scale=5.0, steps_exponent=0.65
        ),
    ),
    "another": LossForm(_lopsided, (4096,), 8.0),
}


def interval_coverage(noise: float, *, num_simulations: int, seed: int) -> float:
    """Of the 95% interval of M*, on losses of the three terms, one to a point."""
    form = LOSS_FORMS["the three terms"]
    draw = np.random.default_rng(seed)
    held = 0
    for _ in range(num_simulations):
        points = [
            LossPoint(size, updates, form.loss(size, updates) * (1 + noise * draw.normal()))
            for size, updates in _grid(form)
        ]
        found = fit_optimum(points, samples=form.samples[-1])
        held += found is not None and _holds(found.low, found.high, form.best)
    return held / num_simulations


@dataclass(frozen=True, slots=True)
class Stated:
    """Numbers of sweeps: AICc chose three terms, M* is stated, its interval holds the true one."""

    chosen: int
    stated: int
    held: int


def stated_optima(
    form: LossForm, noise: float, *, num_seeds: int, num_simulations: int, seed: int
) -> Stated:
    """Of sweeps over nine batch sizes with this relative noise of a loss."""
    draw = np.random.default_rng([num_seeds, seed])
    chosen = stated = held = 0
    for _ in range(num_simulations):
        grid = _grid(form)
        losses = [
            form.loss(size, updates) * (1 + noise * draw.normal(size=num_seeds))
            for size, updates in grid
        ]
        points = [
            LossPoint(size, updates, float(of.mean()))
            for (size, updates), of in zip(grid, losses, strict=True)
        ]
        fit = fit_loss(points)
        if fit.chosen != "three_terms":
            continue
        chosen += 1
        found = judge_optimum(
            fit,
            points,
            seeds=[of.tolist() for of in losses],
            samples=[total for total in form.samples for _ in LOSS_SIZES],
        )
        if found.refused is None and found.optimum is not None:
            stated += 1
            held += _holds(found.optimum.low, found.optimum.high, form.best)
    return Stated(chosen, stated, held)


def _grid(form: LossForm) -> list[tuple[int, int]]:
    return [(size, math.ceil(total / size)) for total in form.samples for size in LOSS_SIZES]


def _holds(low: float | None, high: float | None, value: float) -> bool:
    return (low or 0.0) <= value <= (high or math.inf)


def lemma_coverage(rank: int, *, num_simulations: int, seed: int) -> float:
    """Of `lemma`'s 95% interval of the mean, from 2,000 estimates of 50 rows each."""
    held = 0
    for index in range(num_simulations):
        found = check_lemma(rank=rank, samples=50, replicates=2000, seed=seed + index)
        assert found.mean_low is not None
        assert found.mean_high is not None
        assert found.formula_mean is not None
        held += found.mean_low <= found.formula_mean <= found.mean_high
    return held / num_simulations
