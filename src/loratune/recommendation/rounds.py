"""What to train next, once a cell or a curve has all that was planned for it. Pure, no torch.

A grid cannot know beforehand where its best LRs will lie. Two things can be asked for afterwards,
cell by cell: LRs beyond an end of the grid where the best one lies on it, and further seeds at the
best LR and its two neighbours, the only ones whose noise decides anything. When every cell of a
curve is through, the best of them gets fresh seeds, which choose nothing. An adaptive search asks
for all cells of a curve together.

All of it is a function of the scores alone, so that a sweep that was stopped asks for the same.
"""

import math
from collections.abc import Sequence

from loratune.analyse.cells import Cell, TriedRate, best_rate
from loratune.planning.search_space import SearchPoint, most_trials, space_of
from loratune.recommendation.adaptive import (
    DEFAULT_MARGIN,
    TRIALS_PER_ROUND,
    Observed,
    next_points,
)
from loratune.study.schema import LearningRate, Seeds, Study

# An LR and a seed of a cell.
Point = tuple[float, int]


def refinement(cell: Cell, *, rates: LearningRate, seeds: Seeds) -> tuple[Point, ...]:
    """The points that the cell lacks; none where its best LR is inside and has all its seeds.

    The best is that among the LRs with all seeds, or, where no LR has them yet, in the mean over
    the grid's. LRs are added one at a time on one side, in the step that the grid has there. An LR
    at which a seed diverged bounds the search, and gets no further seeds.

    Args:
        cell: all its trials that were planned so far, each with an outcome or failed.
        rates: the study's, for how far the grid may grow.
        seeds: the study's.
    """
    best = _best(cell, seeds)
    tried = [rate.learning_rate for rate in cell.rates]
    assert rates.values is not None
    lower = rates.extend - sum(rate < min(rates.values) for rate in tried)
    upper = rates.extend - sum(rate > max(rates.values) for rate in tried)
    if best is None:
        # Where the lowest LR diverges in all cases, there may be a lower one that does not.
        all_diverged = all(rate.verdict == "diverged" for rate in cell.rates)
        missing = _beyond(tried) if all_diverged and lower > 0 else None
        return () if missing is None else tuple((missing, seed) for seed in seeds.grid)
    index = tried.index(best.learning_rate)
    for at_end, left, outward in (
        (index == 0, lower, tried),
        (index == len(tried) - 1, upper, tried[::-1]),
    ):
        if at_end and left > 0 and (missing := _beyond(outward)) is not None:
            return tuple((missing, seed) for seed in seeds.grid)
    around = cell.rates[max(0, index - 1) : index + 2]
    return tuple(
        (rate.learning_rate, seed)
        for rate in around
        if rate.verdict != "diverged"
        for seed in sorted({*seeds.grid, *seeds.further} - {one.trial.seed for one in rate.trials})
    )


def confirmation(cells: Sequence[Cell], *, seeds: Seeds) -> tuple[Cell, tuple[Point, ...]] | None:
    """The best cell of a curve and the fresh points at its LR; None where there is none to confirm.

    Args:
        cells: all cells of the curve, settled: they differ in the batch size alone. One that is
            a search's answer is the best.
        seeds: the study's.
    """
    best: Cell | None = None
    for cell in cells:
        if cell.score is not None and (
            best is None
            or best.score is None
            or (cell.is_answer, cell.metric.better(cell.score.value, best.score.value))
            > (best.is_answer, False)
        ):
            best = cell
    if best is None or best.best is None or not seeds.fresh:
        return None
    return best, tuple((best.best.learning_rate, seed) for seed in seeds.fresh)


def next_points_of(study: Study, observations: Sequence[Observed]) -> tuple[SearchPoint, ...]:
    """What an adaptive study trains next on a curve, given all that was tried there."""
    rates = study.learning_rate
    return next_points(
        observations,
        space_of(study),
        margin=rates.margin or DEFAULT_MARGIN,
        max_trials=most_trials(study),
        trials_per_round=rates.trials_per_round or TRIALS_PER_ROUND,
    )


def _best(cell: Cell, seeds: Seeds) -> TriedRate | None:
    """The cell's own best, or, before any LR has further seeds, the best over the grid's seeds.

    Where further seeds were added and no LR has all of them with a score, there is none.
    """
    if cell.best is not None or any(seed in seeds.further for seed in cell.seeds):
        return cell.best
    return best_rate(cell.rates, cell.metric)


def _beyond(outward: Sequence[float]) -> float | None:
    """The LR beyond the first of them, as far from it as the second is, in two digits.

    None where there is one LR alone, and so no step.
    """
    if len(outward) < 2:
        return None
    ratio = outward[0] / outward[1]
    beyond = float(f"{outward[0] * ratio:.2g}")
    return beyond if beyond > 0 and math.isfinite(beyond) else None
