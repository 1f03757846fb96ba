"""Methods against a baseline, each at its own best batch size and LR, seed by seed.

Batch size and LR are chosen by the score that selects; where a test was scored, the difference on
the test is compared as well, at those same choices. Only seeds vary here: the interval says what
other seeds would do with the same rows and questions.

Where both methods' best points were confirmed with fresh seeds, which chose nothing, those alone
are compared. Otherwise the seeds that chose are: both methods are then the best of their grids on
these very seeds, and so a little flattered, alike only where their grids are alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loratune.analyse.cells import make_cells
from loratune.analyse.curves import Crossover, Curve, Point, crossovers, make_curves, tested_tasks
from loratune.analyse.intervals import equivalence_p, holm, mean_with_interval, two_sided_p
from loratune.analyse.tables import as_document
from loratune.errors import AnalysisError
from loratune.records import TrialResult

BASELINE = "lora"
LEVEL = 0.05
# With fewer the t quantile is so wide (12.7 at 2 seeds, 4.3 at 3) that little can be shown.
FEWEST_SEEDS = 5
LOSS_MARGIN = 0.005  # relative, as the recommendation's
ACCURACY_MARGIN = 0.01  # one point; what three seeds and 1,319 questions cannot resolve anyway

Equivalence = Literal["equivalent", "not shown", "undecided"]
Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method against the baseline under one metric, in one setting.

    `difference` is method - baseline, in the metric's unit, over `num_seeds` shared seeds, with its
    95% interval. `fresh`: these seeds chose nothing; scores are then the means over them. `p_value`
    from the paired t test, `p_holm` adjusted over the methods compared with
    this baseline in this setting under this metric. `equivalence_p` is TOST's against plus or minus
    `equivalence_margin` (same unit); `equivalence` is "equivalent" where it is below 5%. `verdict`
    is "better" or "worse" where `p_holm` is below 5%, else "equivalent" if so, else "undecided",
    with the reasons in `undecided`. `crossovers` are along the whole curves, not at the best.
    `unequal` says what else differs than the method: a rank, or an alpha/r, of its own. `at_edge`
    says whose best point is at the edge of what was tried, and so may not be its best.
    """

    setting: str
    method: str
    baseline: str
    metric: str
    higher_is_better: bool
    method_batch_size: int | None
    method_learning_rate: float | None
    method_score: float | None
    baseline_batch_size: int | None
    baseline_learning_rate: float | None
    baseline_score: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    num_seeds: int
    fresh: bool
    what_varied: str
    p_value: float | None
    p_holm: float | None
    equivalence: Equivalence
    equivalence_margin: float | None
    equivalence_p: float | None
    verdict: Verdict
    crossovers: tuple[Crossover, ...]
    unequal: tuple[str, ...]
    at_edge: tuple[str, ...]
    undecided: tuple[str, ...]
    select_on: str


def compare(
    results: Sequence[TrialResult], *, baseline: str = BASELINE, margin: float | None = None
) -> tuple[Comparison, ...]:
    """Every method against the baseline, in every setting that has both, under every metric.

    `margin` is the equivalence margin in the metric's own unit; left out, 0.5% of the baseline's
    loss and 0.01 of accuracy.

    Raises:
        AnalysisError: no results, a margin that is not above 0, or a study without the baseline or
            without anything to compare with it.
    """
    if not results:
        raise AnalysisError("no trials; run the study first")
    if margin is not None and not 0 < margin < math.inf:
        raise AnalysisError(f"margin={margin}; give a positive number in the metric's unit")
    cells = make_cells(results)
    selecting = make_curves(cells)
    methods = list(dict.fromkeys(curve.setting.value("method") for curve in selecting))
    if baseline not in methods:
        raise AnalysisError(f"no trials of {baseline!r}; the study has {', '.join(methods)}")
    if len(methods) == 1:
        raise AnalysisError(f"the study has {baseline} alone; add a method to compare with it")
    found = list[Comparison]()
    for task in (None, *_further_tasks(selecting, tested_tasks(cells))):
        scored = selecting if task is None else make_curves(cells, task=task)
        for against, others in _groups(list(zip(selecting, scored, strict=True)), baseline):
            found.extend(_adjusted([_compare(one, against, margin) for one in others]))
    if not found:
        raise AnalysisError(f"no setting of the study has both {baseline} and another method")
    return tuple(found)


def comparisons_document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """{"comparisons": [...]}: one object per comparison, keys as in `Comparison`."""
    return {"comparisons": [as_document(one) for one in comparisons]}


def _further_tasks(curves: Sequence[Curve], tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if any(curve.metric.task != task for curve in curves)]


Pair = tuple[Curve, Curve]


def _groups(pairs: Sequence[Pair], baseline: str) -> list[tuple[Pair, list[Pair]]]:
    """Every curve of the baseline (that selects, that scores), and what is compared with it.

    All that the study crosses is alike on both sides. Only a method's own rank or alpha may keep it
    from being so: then it is compared at the same rank, and where it shares no rank either, at its
    own; `unequal` says what is not alike.
    """
    settings = dict[tuple[str, ...], list[Pair]]()
    for pair in pairs:
        settings.setdefault(_values(pair, _crossed_axes(pair)), []).append(pair)
    found = list[tuple[Pair, list[Pair]]]()
    for setting in settings.values():
        by_method = dict[str, list[Pair]]()
        for pair in setting:
            by_method.setdefault(pair[0].setting.value("method"), []).append(pair)
        against = by_method.pop(baseline, [])
        for one in against:
            others = [
                other
                for of_method in by_method.values()
                for shared in [_shared_axes(of_method, against)]
                for other in of_method
                if _values(other, shared) == _values(one, shared)
            ]
            if others:
                found.append((one, others))
    return found


def _crossed_axes(pair: Pair) -> list[str]:
    own = ("method", "other", "rank", "alpha")
    return [axis for axis, _ in pair[0].setting.axes if axis not in own]


def _shared_axes(method: Sequence[Pair], baseline: Sequence[Pair]) -> tuple[str, ...]:
    """Rank and alpha, or rank alone, or nothing: as much as a method has in common."""
    for axes in (("rank", "alpha"), ("rank",)):
        if {_values(one, axes) for one in method} & {_values(one, axes) for one in baseline}:
            return axes
    return ()


def _values(pair: Pair, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(pair[0].setting.value(axis) for axis in axes)


def _unequal(method: Curve, baseline: Curve) -> tuple[str, ...]:
    """What else differs than the method: rank, and the scale at equal learning rates."""
    one, two = method.cells[0].trial, baseline.cells[0].trial
    said = list[str]()
    if one.rank != two.rank:
        said.append(f"rank {one.rank} against {two.rank}")
    if one.alpha / one.rank != two.alpha / two.rank:
        said.append(f"alpha/r {one.alpha / one.rank:g} against {two.alpha / two.rank:g}")
    return tuple(said)


def _at_edge(pair: Pair, name: str) -> list[str]:
    """In words, whether a method's best point is at the edge of its batch sizes or LRs."""
    best = pair[0].best
    if best is None:
        return []
    said = list[str]()
    sizes = [point.batch_size for point in pair[0].points if point.score is not None]
    if len(sizes) == 1:
        said.append(f"{name} has a score at batch size {best.batch_size} only")
    elif best.batch_size in (sizes[0], sizes[-1]):
        end = "smallest" if best.batch_size == sizes[0] else "largest"
        said.append(f"{name}'s batch size {best.batch_size} is the {end} with a score")
    (cell,) = [one for one in pair[0].cells if one.trial.batch_size == best.batch_size]
    if len(cell.rates) == 1:
        said.append(f"{name} was tried at learning rate {best.learning_rate:g} only")
    elif best.lr_at_edge:
        said.append(f"{name}'s learning rate {best.learning_rate:g} is at the edge of those tried")
    return said


def _compare(method: Pair, baseline: Pair, margin: float | None) -> Comparison:
    """One method's best point against the baseline's."""
    metric = baseline[1].metric
    one, two = _chosen(method), _chosen(baseline)
    names = (method[0].setting.value("method"), baseline[0].setting.value("method"))
    seeds, fresh = _shared(one, two)
    scores = [_scores(point, fresh=fresh) for point in (one, two)]
    differences = [scores[0][seed] - scores[1][seed] for seed in seeds]
    mean = mean_with_interval(differences) if differences else None
    tolerated = margin
    if tolerated is None and two is not None and two.score is not None:
        tolerated = LOSS_MARGIN * abs(two.score) if metric.task is None else ACCURACY_MARGIN
    undecided = list[str]()
    for name, point in zip(names, (one, two), strict=True):
        if point is None or point.score is None:
            undecided.append(f"{name} has no batch size with a score")
    if not undecided and not seeds:
        undecided.append("the two share no seed at their best batch sizes")
    elif len(seeds) == 1:
        undecided.append(f"one seed cannot tell, run at least {FEWEST_SEEDS}")
    enough = len(seeds) > 1
    equal_p = (
        equivalence_p(differences, margin=tolerated) if enough and tolerated is not None else None
    )
    return Comparison(
        setting=_setting_text(baseline[0], names[1]),
        method=names[0],
        baseline=names[1],
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        method_batch_size=one.batch_size if one else None,
        method_learning_rate=one.learning_rate if one else None,
        method_score=_mean(scores[0]),
        baseline_batch_size=two.batch_size if two else None,
        baseline_learning_rate=two.learning_rate if two else None,
        baseline_score=_mean(scores[1]),
        difference=mean.value if mean else None,
        difference_low=mean.low if mean else None,
        difference_high=mean.high if mean else None,
        num_seeds=len(seeds),
        fresh=fresh,
        what_varied="seeds",
        p_value=two_sided_p(differences) if enough else None,
        p_holm=None,
        equivalence=_equivalence(equal_p),
        equivalence_margin=tolerated,
        equivalence_p=equal_p,
        verdict="undecided",
        crossovers=_named(crossovers(method[1], baseline[1]), method[1], baseline[1], names),
        unequal=_unequal(method[0], baseline[0]),
        at_edge=(*_at_edge(method, names[0]), *_at_edge(baseline, names[1])),
        undecided=tuple(undecided),
        select_on=baseline[0].cells[0].select_on,
    )


def _adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm over the methods with a p, then the verdicts."""
    tested = [one for one in comparisons if one.p_value is not None]
    adjusted = dict(zip(map(id, tested), holm([one.p_value or 0.0 for one in tested]), strict=True))
    finished = list[Comparison]()
    for one in comparisons:
        p = adjusted.get(id(one))
        verdict: Verdict = "undecided"
        reasons = list(one.undecided)
        if p is not None and p < LEVEL and one.difference is not None:
            verdict = "better" if (one.difference > 0) == one.higher_is_better else "worse"
        elif one.equivalence == "equivalent":
            verdict = "equivalent"
        elif p is not None:
            p_values = (
                f"Holm p = {p:.2g}",
                f"equivalence within {one.equivalence_margin:.3g}, p = {one.equivalence_p:.2g}",
            )
            reasons.append(
                f"{one.num_seeds} seeds cannot tell, run at least {FEWEST_SEEDS} "
                f"(a difference: {p_values[0]}; {p_values[1]})"
                if one.num_seeds < FEWEST_SEEDS
                else f"{one.num_seeds} seeds show neither a difference ({p_values[0]}) "
                f"nor {p_values[1].replace(', ', ' (')})"
            )
        finished.append(replace(one, p_holm=p, verdict=verdict, undecided=tuple(reasons)))
    return finished


def _equivalence(p: float | None) -> Equivalence:
    if p is None:
        return "undecided"
    return "equivalent" if p < LEVEL else "not shown"


def _chosen(pair: Pair) -> Point | None:
    """The scoring curve at the batch size that is best by the score that selects."""
    best = pair[0].best
    if best is None:
        return None
    return next(point for point in pair[1].points if point.batch_size == best.batch_size)


def _shared(one: Point | None, two: Point | None) -> tuple[list[int], bool]:
    """The seeds that both have: fresh ones if there are two or more, else those that chose."""
    fresh = _scores(one, fresh=True).keys() & _scores(two, fresh=True).keys()
    if len(fresh) > 1:
        return sorted(fresh), True
    return sorted(_scores(one, fresh=False).keys() & _scores(two, fresh=False).keys()), False


def _scores(point: Point | None, *, fresh: bool) -> dict[int, float]:
    if point is None:
        return {}
    return dict(point.fresh_scores if fresh else point.seed_scores)


def _mean(scores: dict[int, float]) -> float | None:
    return math.fsum(scores.values()) / len(scores) if scores else None


def _setting_text(curve: Curve, method: str) -> str:
    """What else varies in the study, as text: the curve's label without its method."""
    parts = [part for part in curve.label.split(", ") if part != method]
    return ", ".join(parts)


def _named(
    found: Sequence[Crossover], one: Curve, two: Curve, names: tuple[str, str]
) -> tuple[Crossover, ...]:
    """Crossovers with the methods' names in place of the curves' labels."""
    spoken = {one.label: names[0], two.label: names[1]}
    return tuple(
        replace(
            crossing,
            better_below=spoken[crossing.better_below],
            better_above=spoken[crossing.better_above],
        )
        for crossing in found
    )
