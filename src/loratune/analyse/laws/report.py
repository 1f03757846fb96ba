"""The laws that the cells of a study support, and what they do not and why.

Best LR against batch size for each curve; loss over batch size and steps for each set of cells that
differ in nothing else; the best batch size against N, rank and model for each set of curves that
differ in that alone. Every part that cannot be concluded says why, and what to run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from loratune.analyse.cells import Cell, make_cells
from loratune.analyse.curves import Curve, make_curves
from loratune.analyse.laws.between import rate_between
from loratune.analyse.laws.learning_rate import (
    FEWEST_BATCH_SIZES,
    LearningRateFit,
    fit_learning_rate,
)
from loratune.analyse.laws.loss import (
    FEWEST_POINTS,
    LossLaw,
    LossPoint,
    Optimum,
    fit_loss,
    fit_optimum,
    lack_of_fit,
)
from loratune.analyse.laws.optimum import PowerLaw, SeedOptima, fit_power_law, vertex
from loratune.analyse.laws.sizes import parameters_of_name
from loratune.analyse.tables import as_document
from loratune.errors import AnalysisError
from loratune.records import TrialResult

Axis = Literal["rows", "rank", "model"]
AXES: tuple[Axis, ...] = ("rows", "rank", "model")
_SPOKEN = {"rows": "training rows", "rank": "rank", "model": "parameters of the model"}
# Beside the axis itself, what follows from it and must not keep two curves apart.
_FOLLOWS: dict[Axis, frozenset[str]] = {
    "rows": frozenset({"rows", "data", "other"}),
    "rank": frozenset({"rank", "alpha", "other"}),
    "model": frozenset({"model", "data", "other"}),
}
# Above a factor of two between neighbouring batch sizes no shift of less than two can be seen.
_COARSE = math.log2(2.0) + 1e-9
# A loss of one seed is that seed's luck as much as the batch size's.
_FEWEST_SEEDS = 2
# Of optima of the true form so many are not stated: to refuse is the lesser mistake.
_LACK_OF_FIT_LEVEL = 0.1
_ONE_DATA_SET = "a study of its own for each data set, in a folder of its own"


@dataclass(frozen=True, slots=True)
class LearningRateFinding:
    """Best LR against batch size for one method in one setting.

    `learning_rates` are those the fit used: the lowest point of a parabola in log LR through the
    best LR and its neighbours, on the seeds that all three have. `left_out` are batch sizes whose
    best LR is at the edge of those tried or has a neighbour without a score. `fit` is None where
    `undecided` says why.
    """

    setting: str
    method: str
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    left_out: tuple[int, ...]
    fit: LearningRateFit | None
    undecided: tuple[str, ...]
    run_next: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LossFinding:
    """Loss over batch size and steps for one method in one setting.

    `samples` are the numbers of samples of the losses that were used; `left_out` the batch sizes
    of those that were not: no best LR, one at the edge of those tried, or fewer than two seeds.
    Where AICc chose the three terms, `lack_of_fit` is p of the F test that they leave no more than
    the seeds explain, `tried_best` the best batch size tried at the most samples (None where fewer
    than two were), and `optimum` that of the form there: given only where it lies among the batch
    sizes tried, the best of these is at neither end, and p is 10% or more. `assumed` is what its
    interval rests on.
    """

    setting: str
    method: str
    samples: tuple[int, ...]
    left_out: tuple[int, ...]
    fit: LossLaw | None
    optimum: Optimum | None
    tried_best: int | None
    lack_of_fit: float | None
    assumed: tuple[str, ...]
    undecided: tuple[str, ...]
    run_next: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BestBatchSize:
    """One curve's best batch size at one value of an axis.

    `batch_size` is 2 to the mean over seeds of log2 of each seed's best (lowest point of a parabola
    in log2 batch size), None where some seed's best is the `at_edge` (smallest or largest) of the
    batch sizes tried. `tried_best` is the best of those tried in the mean over seeds.
    """

    value: str
    x: float | None
    batch_size: float | None
    tried_best: int | None
    at_edge: Literal["smallest", "largest"] | None
    num_seeds: int


@dataclass(frozen=True, slots=True)
class OptimumFinding:
    """The best batch size against one axis, for one method, all else equal.

    `assumed` says where x is a guess (a model's size read from its name).
    """

    axis: Axis
    setting: str
    method: str
    values: tuple[BestBatchSize, ...]
    fit: PowerLaw | None
    assumed: tuple[str, ...]
    undecided: tuple[str, ...]
    run_next: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Laws:
    """All that a results folder says about laws. `not_varied` are axes that the study holds fixed.

    `metric` and `select_on` say what chose the LRs; the loss laws are always of validation loss.
    """

    metric: str
    select_on: str
    learning_rate: tuple[LearningRateFinding, ...]
    loss: tuple[LossFinding, ...]
    optimal_batch_size: tuple[OptimumFinding, ...]
    not_varied: tuple[Axis, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as plain values; tuples are lists."""
        return as_document(self)


def find_laws(
    results: Sequence[TrialResult], *, model_parameters: Mapping[str, float] | None = None
) -> Laws:
    """The laws of a study's results.

    Args:
        results: the trials of one study.
        model_parameters: number of parameters by model, where known; else it is read from names.

    Raises:
        AnalysisError: no results.
    """
    if not results:
        raise AnalysisError("no trials; run the study first")
    cells = make_cells(results)
    curves = make_curves(cells)
    optima = tuple(
        _optimum(axis, group, model_parameters or {})
        for axis in AXES
        for group in _grouped(curves, lambda curve, axis=axis: _setting(curve, _FOLLOWS[axis]))
        if len({curve.setting.value(axis) for curve in group}) > 1
    )
    varied = {one.axis for one in optima}
    together = frozenset({"rows", "data", "protocol", "other"})
    return Laws(
        metric=cells[0].metric.name,
        select_on=cells[0].select_on,
        learning_rate=tuple(_learning_rate(curve) for curve in curves),
        loss=tuple(
            _loss(group) for group in _grouped(curves, lambda curve: _setting(curve, together))
        ),
        optimal_batch_size=optima,
        not_varied=tuple(axis for axis in AXES if axis not in varied),
    )


def _setting(curve: Curve, without: frozenset[str]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, value) for axis, value in curve.setting.axes if axis not in without)


def _grouped(
    curves: Sequence[Curve], key: Callable[[Curve], tuple[tuple[str, str], ...]]
) -> list[list[Curve]]:
    groups = dict[tuple[tuple[str, str], ...], list[Curve]]()
    for curve in curves:
        groups.setdefault(key(curve), []).append(curve)
    return list(groups.values())


# Best LR against batch size -----------------------------------------------------------------------


def _learning_rate(curve: Curve) -> LearningRateFinding:
    sizes, rates, left_out = list[int](), list[float](), list[int]()
    edges = list[Cell]()
    for cell in curve.cells:
        found = rate_between(cell)
        if found is None:
            left_out.append(cell.trial.batch_size)
            if cell.best is not None:
                edges.append(cell)
        else:
            sizes.append(cell.trial.batch_size)
            rates.append(found)
    undecided, run_next, fit = list[str](), list[str](), None
    if edges:
        run_next.append(
            "learning rates beyond the edge, or the trials that are missing beside the best one, "
            f"at {_listed([cell.trial.batch_size for cell in edges])}"
        )
    if len(sizes) < FEWEST_BATCH_SIZES:
        undecided.append(
            f"{len(sizes)} batch sizes have a best learning rate between two others that were "
            f"scored; it takes {FEWEST_BATCH_SIZES} to tell the forms apart"
        )
        if len(curve.cells) < FEWEST_BATCH_SIZES:
            run_next.append(f"{FEWEST_BATCH_SIZES} batch sizes or more, each with three rates")
    else:
        fit = fit_learning_rate(sizes, rates)
        if not fit.holds_out:
            undecided.append(
                f"{fit.chosen} fits best, but fitted without batch size {sizes[-1]} it misses the "
                "rate there by more than a factor of two: not to be used beyond those tried"
            )
    return LearningRateFinding(
        setting=curve.label,
        method=curve.setting.value("method"),
        batch_sizes=tuple(sizes),
        learning_rates=tuple(rates),
        left_out=tuple(left_out),
        fit=fit,
        undecided=tuple(undecided),
        run_next=tuple(run_next),
    )


# Loss over batch size and steps -------------------------------------------------------------------


def _loss(group: Sequence[Curve]) -> LossFinding:
    mixed = _mixed_data("rows", group)
    cells = [] if mixed else [cell for curve in group for cell in curve.cells]
    points, used, left_out = list[LossPoint](), list[Cell](), list[Cell]()
    seeds = list[list[float]]()
    for cell in cells:
        losses = _losses(cell)
        # An LR at the edge of those tried is not the best one, nor is its loss the lowest. After an
        # adaptive search there is no edge, but no search for the best LR of each batch size either.
        if cell.lr_at_edge is False and len(losses) >= _FEWEST_SEEDS:
            mean = math.fsum(losses) / len(losses)
            points.append(LossPoint(cell.trial.batch_size, cell.trial.num_updates, mean))
            used.append(cell)
            seeds.append(losses)
        else:
            left_out.append(cell)
    samples = sorted({cell.trial.num_samples for cell in used})
    missing = _missing(left_out)
    undecided, run_next = list(mixed), [run for _, run in missing]
    if mixed:
        run_next.append(_ONE_DATA_SET)
    fit, optimum, tried_best, unexplained = None, None, None, None
    try:
        fit = None if mixed else fit_loss(points)
    except AnalysisError as error:
        undecided += [str(error), *(reason for reason, _ in missing)]
        if len(cells) < FEWEST_POINTS or len({cell.trial.batch_size for cell in cells}) < 3:
            run_next.append("more batch sizes, at two or more numbers of training rows")
    if fit is not None and fit.chosen == "three_terms":
        judged = judge_optimum(
            fit, points, seeds=seeds, samples=[cell.trial.num_samples for cell in used]
        )
        tried_best, unexplained = judged.tried_best, judged.lack_of_fit
        if judged.refused is None:
            optimum = judged.optimum
        else:
            undecided.append(judged.refused[0])
            run_next.append(judged.refused[1])
    elif fit is not None:
        undecided.append(
            f"AICc chooses the form {fit.chosen!r}: these losses do not show a best batch size "
            "inside the range"
        )
    if len(samples) == 1 and fit is not None:
        undecided.append(
            f"every trial saw {samples[0]:,} samples: how the best batch size moves with them "
            "cannot be told"
        )
        run_next.append("the same batch sizes at another number of training rows, or fixed_steps")
    return LossFinding(
        setting=group[0].label if len(group) == 1 else _shared_label(group),
        method=group[0].setting.value("method"),
        samples=tuple(samples),
        left_out=_sizes(left_out),
        fit=fit,
        optimum=optimum,
        tried_best=tried_best,
        lack_of_fit=unexplained,
        assumed=()
        if optimum is None
        else (
            "the interval of the best batch size holds only if the three terms are the true form "
            "of the loss, which no fit can show; that seeds explain what they leave speaks against "
            "large errors alone",
        ),
        undecided=tuple(undecided),
        run_next=tuple(run_next),
    )


@dataclass(frozen=True, slots=True)
class JudgedOptimum:
    """The three terms' optimum at the most samples, and what speaks for it beside the form.

    `refused` is why it is not to be stated, and what to run; None where it is. The others are those
    of `LossFinding`.
    """

    optimum: Optimum | None
    tried_best: int | None
    lack_of_fit: float | None
    refused: tuple[str, str] | None


def judge_optimum(
    fit: LossLaw,
    points: Sequence[LossPoint],
    *,
    seeds: Sequence[Sequence[float]],
    samples: Sequence[int],
) -> JudgedOptimum:
    """The optimum of a fit that chose three terms, and whether to state it.

    Args:
        fit: of these points, by `fit_loss`.
        seeds: the losses of which each point's is the mean.
        samples: the number of samples of each point.
    """
    most = max(samples)
    at_most = {
        point.batch_size: point.loss
        for point, num_samples in zip(points, samples, strict=True)
        if num_samples == most
    }
    tried_best = min(at_most, key=lambda size: at_most[size]) if len(at_most) > 1 else None
    optimum = fit_optimum(points, samples=most)
    unexplained = lack_of_fit(fit, seeds=seeds)
    refused = _refused(
        optimum,
        tried=sorted({point.batch_size for point in points}),
        at_most=sorted(at_most),
        tried_best=tried_best,
        unexplained=unexplained,
    )
    return JudgedOptimum(optimum, tried_best, unexplained, refused)


def _losses(cell: Cell) -> list[float]:
    """The validation losses at the cell's best LR, one for each seed."""
    return [
        one.outcome.validation_loss
        for one in (cell.best.trials if cell.best is not None else ())
        if one.outcome is not None and one.outcome.validation_loss is not None
    ]


def _missing(left_out: Sequence[Cell]) -> list[tuple[str, str]]:
    """Why the losses of these cells do not count, and what to run, cause by cause."""
    diverged = [cell for cell in left_out if len(cell.diverged_rates) == len(cell.rates)]
    unfinished = [cell for cell in left_out if cell.best is None and cell not in diverged]
    edges = [cell for cell in left_out if cell.lr_at_edge]
    searched = [cell for cell in left_out if cell.best is not None and cell.lr_at_edge is None]
    alone = [cell for cell in left_out if cell.lr_at_edge is False or len(_losses(cell)) == 1]
    causes = [
        (diverged, "every learning rate diverged", "learning rates below the lowest one"),
        (unfinished, "no learning rate has all its seeds", "the study's unfinished trials"),
        (
            edges,
            "the best learning rate is at the edge of those tried, so that the loss there is not "
            "the lowest",
            "learning rates beyond the edge",
        ),
        (
            searched,
            "an adaptive search chose the learning rates, which does not look for the best one of "
            "each batch size",
            "a grid of learning rates",
        ),
        (
            alone,
            "there are fewer than two seeds, so that luck cannot be told from batch size",
            "two seeds or more",
        ),
    ]
    return [
        (f"at {at}: {reason}", f"{run} at {at}")
        for cells, reason, run in causes
        if cells and (at := _listed(_sizes(cells)))
    ]


def _sizes(cells: Sequence[Cell]) -> tuple[int, ...]:
    return tuple(sorted({cell.trial.batch_size for cell in cells}))


def _refused(
    optimum: Optimum | None,
    *,
    tried: Sequence[int],
    at_most: Sequence[int],
    tried_best: int | None,
    unexplained: float | None,
) -> tuple[str, str] | None:
    """Why an optimum of the three terms is not stated, and what to run; None where it is.

    Its interval knows the form and the noise, not whether the form is true. What is known without
    any form is where the loss rises again on both sides, and how far the form is off the means,
    against the seeds. The best batch size *tried* says little against it: on a grid by doublings it
    is half a doubling off, however exact the losses are.

    Args:
        tried: all batch sizes, ascending; `at_most`: those at the most samples.
        unexplained: p of the lack of fit.
    """
    if optimum is None:
        return (
            "the three terms have their lowest loss at no batch size",
            "batch sizes further apart",
        )
    if not tried[0] <= optimum.batch_size <= tried[-1]:
        return (
            f"the best batch size by the three terms, {optimum.batch_size:.3g}, lies outside "
            f"of those tried ({tried[0]} to {tried[-1]}): extrapolated, not measured",
            "batch sizes around it",
        )
    where = f"at {optimum.samples:,.0f} samples"
    if tried_best is None:
        return (
            f"{where} fewer than two batch sizes were tried: the best one there would be the "
            "form's alone",
            f"other batch sizes {where}",
        )
    by_form = f"by the three terms it is {optimum.batch_size:.3g}"
    # Below batch size 1 there is nothing to try.
    if tried_best in (at_most[0], at_most[-1]) and tried_best > 1:
        is_smallest = tried_best == at_most[0]
        end, beyond = ("smallest", "smaller") if is_smallest else ("largest", "larger")
        return (
            f"{where} the best batch size tried is the {end}, {tried_best}, and {by_form}: that "
            "the loss rises on both sides of it only the form says",
            f"a {beyond} batch size {where}",
        )
    place = at_most.index(tried_best)
    around = f"{at_most[max(place - 1, 0)]} and {at_most[place + 1]}"
    if unexplained is None:
        return (
            f"the seeds change no loss, so that nothing says how exact the three terms should be; "
            f"{where} the best batch size tried is {tried_best}, {by_form}",
            "seeds that shuffle the rows",
        )
    if unexplained < _LACK_OF_FIT_LEVEL:
        return (
            f"the three terms are further off these losses than seeds explain (F test, p = "
            f"{unexplained:.2g}), so that their interval says nothing; {where} the best batch "
            f"size tried is {tried_best}, {by_form}",
            f"batch sizes between {around} {where}",
        )
    return None


def _mixed_data(axis: Axis, group: Sequence[Curve]) -> list[str]:
    """Values of the axis that come with two data fingerprints: their losses are of unlike rows."""
    fingerprints = dict[str, dict[str, None]]()
    for curve in group:
        of_value = fingerprints.setdefault(curve.setting.value(axis), {})
        of_value[curve.setting.value("data")] = None
    return [
        f"at {_SPOKEN[axis]} {value} there are {len(found)} data fingerprints "
        f"({', '.join(found)}): their losses are of unlike rows and are not put together"
        for value, found in fingerprints.items()
        if len(found) > 1
    ]


def _shared_label(group: Sequence[Curve]) -> str:
    """The parts of the curves' labels that all of them have."""
    parts = [curve.label.split(", ") for curve in group]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts))


# The best batch size against an axis --------------------------------------------------------------


def _optimum(
    axis: Axis, group: Sequence[Curve], model_parameters: Mapping[str, float]
) -> OptimumFinding:
    if mixed := _mixed_data(axis, group):
        return OptimumFinding(
            axis=axis,
            setting=_shared_label(group),
            method=group[0].setting.value("method"),
            values=(),
            fit=None,
            assumed=(),
            undecided=tuple(mixed),
            run_next=(_ONE_DATA_SET,),
        )
    undecided, run_next, assumed = list[str](), list[str](), list[str]()
    found, optima = list[BestBatchSize](), list[SeedOptima]()
    coarse = set[float]()
    for curve in group:
        value = curve.setting.value(axis)
        x = _x(axis, value, model_parameters)
        if axis == "model" and x is not None and value not in model_parameters:
            assumed.append(f"{value} has {x:,.0f} parameters, by its name")
        one, log2_best = _best_batch_size(curve, value, x)
        found.append(one)
        if x is None:
            undecided.append(f"the size of {value} is not known; declare the model in the study")
        elif one.tried_best is None:
            undecided.append(f"at {_SPOKEN[axis]} {value} no batch size has a score")
            run_next.append(f"the study's unfinished trials at {_SPOKEN[axis]} {value}")
        elif not one.num_seeds:
            undecided.append(f"at {_SPOKEN[axis]} {value} no seed is common to all batch sizes")
            run_next.append("the same seeds at every batch size")
        elif one.at_edge is not None:
            beyond = "smaller" if one.at_edge == "smallest" else "larger"
            undecided.append(
                f"at {_SPOKEN[axis]} {value} the best batch size is the {one.at_edge} of those "
                "tried, for some seed at least"
            )
            run_next.append(f"a {beyond} batch size at {_SPOKEN[axis]} {value}")
        elif edges := _rate_edges(curve, one.tried_best):
            undecided.append(
                f"at {_SPOKEN[axis]} {value} the best learning rate of {_listed(edges)} is at the "
                "edge of those tried, so that another batch size may be the best"
            )
            run_next.append(f"learning rates beyond the edge at {_listed(edges)}")
        else:
            optima.append(SeedOptima(x, log2_best))
        coarse |= _steps_around(curve, one.tried_best)
    fit = None
    if not undecided:
        try:
            fit = fit_power_law(optima)
        except AnalysisError as error:
            undecided.append(str(error))
            run_next.append("more seeds (three at least)")
    if fit is not None and fit.dependence == "does not depend" and max(coarse) > _COARSE:
        undecided.append(
            f"batch sizes lie a factor of {2 ** max(coarse):g} apart: a shift of two would not be "
            "seen"
        )
        run_next.append("batch sizes by doubling around the best ones")
        fit = None
    if fit is not None and fit.dependence == "undecided":
        undecided.append(
            f"the ratio over the range is 2^{fit.log2_ratio:.2f}, 95% interval "
            f"2^{fit.ratio_low:.2f} to 2^{fit.ratio_high:.2f}: too wide to say either"
        )
        run_next.append("more seeds, or values of the axis further apart")
    return OptimumFinding(
        axis=axis,
        setting=_shared_label(group),
        method=group[0].setting.value("method"),
        values=tuple(found),
        fit=fit,
        assumed=tuple(assumed),
        undecided=tuple(undecided),
        run_next=tuple(dict.fromkeys(run_next)),
    )


def _x(axis: Axis, value: str, model_parameters: Mapping[str, float]) -> float | None:
    if axis != "model":
        return float(value)
    return model_parameters.get(value) or parameters_of_name(value)


def _best_batch_size(
    curve: Curve, value: str, x: float | None
) -> tuple[BestBatchSize, tuple[float, ...]]:
    """The curve's best, and each seed's as log2 (empty where one seed's is at an edge)."""
    points = [point for point in curve.points if point.score is not None]
    best = curve.best
    sets = [{seed for seed, _ in point.seed_scores} for point in points]
    seeds = sorted(set[int].intersection(*sets)) if sets else []
    sign = -1.0 if curve.metric.higher_is_better else 1.0
    xs = [math.log2(point.batch_size) for point in points]
    curves = [[sign * dict(point.seed_scores)[seed] for point in points] for seed in seeds]
    inner = [found for scores in curves if (found := vertex(xs, scores)) is not None]
    at_edge: Literal["smallest", "largest"] | None = None
    if len(inner) < len(curves):
        at_edge = "smallest" if any(min(one) == one[0] for one in curves) else "largest"
    known = bool(inner) and at_edge is None
    return (
        BestBatchSize(
            value=value,
            x=x,
            batch_size=2 ** (math.fsum(inner) / len(inner)) if known else None,
            tried_best=best.batch_size if best is not None else None,
            at_edge=at_edge,
            num_seeds=len(seeds),
        ),
        tuple(inner) if known else (),
    )


def _rate_edges(curve: Curve, best: int) -> list[int]:
    """Of the best batch size and its neighbours those whose best LR is at an edge."""
    points = [point for point in curve.points if point.score is not None]
    index = next(i for i, point in enumerate(points) if point.batch_size == best)
    around = points[max(index - 1, 0) : index + 2]
    return [point.batch_size for point in around if point.lr_at_edge]


def _steps_around(curve: Curve, best: int | None) -> set[float]:
    """The steps in log2 batch size to the neighbours of the best one."""
    sizes = [point.batch_size for point in curve.points if point.score is not None]
    return {
        math.log2(right / left) for left, right in pairwise(sizes) if best in (left, right)
    } or {0.0}


def _listed(sizes: Sequence[int]) -> str:
    return f"batch size{'s' if len(sizes) > 1 else ''} {', '.join(map(str, sizes))}"
