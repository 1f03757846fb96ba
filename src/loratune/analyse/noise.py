"""How noisy a study's comparisons are, measured from its results: what `plan --like` plans with."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from loratune.analyse.cells import make_cells
from loratune.analyse.compare import Answers, MakeCells, Sources
from loratune.analyse.crossed import Components, crossed_components
from loratune.analyse.curves import Curve, Point, make_curves, tested_tasks
from loratune.analyse.scores import LOSS, accuracy_metric
from loratune.planning.crossed_model import FloatArray
from loratune.planning.power import ASSUMED_DISCORDANCE, DifferenceNoise
from loratune.records import TrialResult, Verdicts


def measured_noise(
    results: Sequence[TrialResult],
    verdicts: Sequence[Verdicts] = (),
    *,
    sources: Sources | None = None,
    cells_of: MakeCells = make_cells,
) -> dict[str, DifferenceNoise]:
    """The variance components of a difference between two methods, by metric name.

    Each method stands at its own best point of each setting, over all its seeds there. The
    components are those of paired differences, averaged over the pairs of methods that share at
    least two seeds (and questions). With one method alone its seeds' and residual variance count
    twice, and the questions' part is what the assumed discordance leaves. A metric that nothing is
    known of is absent. Questions that share a source (`compare.question_sources`) count as a unit;
    the planned study is taken to have as many of each. `cells_of` as in `compare.compare`.
    """
    cells = cells_of(results)
    selecting = make_curves(cells)
    found = dict[str, DifferenceNoise]()
    if selecting and selecting[0].metric == LOSS:
        loss = _loss_noise([(curve, curve.best) for curve in selecting])
        if loss is not None:
            found[LOSS.name] = loss
    answers = Answers.of(verdicts, sources)
    chosen_by = [curve.metric.task for curve in selecting if curve.metric.task is not None]
    for task in dict.fromkeys([*chosen_by, *tested_tasks(cells)]):
        accuracy = _accuracy_noise(selecting, task, answers)
        if accuracy is not None:
            found[accuracy_metric(task).name] = accuracy
    return found


def _loss_noise(bests: Sequence[tuple[Curve, Point | None]]) -> DifferenceNoise | None:
    seeds = [
        (curve, dict((*point.seed_scores, *point.fresh_scores)))
        for curve, point in bests
        if point is not None
    ]
    paired = list[float]()
    for (one, first), (two, second) in combinations(seeds, 2):
        shared = sorted(first.keys() & second.keys())
        if _comparable(one, two) and len(shared) > 1:
            paired.append(float(np.var([first[s] - second[s] for s in shared], ddof=1)))
    if paired:
        return DifferenceNoise(_mean(paired), 0.0, 0.0, f"measured on {_pairs(len(paired))}")
    single = [float(np.var(list(own.values()), ddof=1)) for _, own in seeds if len(own) > 1]
    if not single:
        return None
    return DifferenceNoise(2 * _mean(single), 0.0, 0.0, "measured on one method's seeds, twice")


def _accuracy_noise(curves: Sequence[Curve], task: str, answers: Answers) -> DifferenceNoise | None:
    chosen = [(curve, _trials(curve)) for curve in curves]
    paired = list[Components]()
    for (one, first), (two, second) in combinations(chosen, 2):
        shared = sorted(first.keys() & second.keys())
        if not _comparable(one, two) or len(shared) < 2:
            continue
        tables = [answers.table([own[s] for s in shared], task) for own in (first, second)]
        if tables[0] is not None and tables[1] is not None and tables[0].shape == tables[1].shape:
            paired.append(_components(tables[0] - tables[1], answers, first[shared[0]], task))
    if paired:
        return DifferenceNoise(
            _mean([one.seeds for one in paired]),
            _mean([one.questions for one in paired]),
            _mean([one.residual for one in paired]),
            f"measured on {_pairs(len(paired))}",
        )
    single = list[Components]()
    for _, own in chosen:
        table = answers.table([own[seed] for seed in sorted(own)], task) if len(own) > 1 else None
        if table is not None:
            single.append(_components(table, answers, own[min(own)], task))
    if not single:
        return None
    residual = 2 * _mean([one.residual for one in single])
    return DifferenceNoise(
        2 * _mean([one.seeds for one in single]),
        max(0.0, ASSUMED_DISCORDANCE - residual),
        residual,
        f"measured on one method's seeds, twice; assumed: {100 * ASSUMED_DISCORDANCE:g}% of "
        "answers differ between two methods",
    )


def _components(table: FloatArray, answers: Answers, trial: TrialResult, task: str) -> Components:
    sources = answers.sources_of(trial, task)
    several = sources is not None and len(set(sources)) > 1
    return crossed_components(table, sources=sources if several else None)


def _trials(curve: Curve) -> dict[int, TrialResult]:
    """Seed -> trial with scores at the curve's best point."""
    best = curve.best
    cell = next(
        (one for one in curve.cells if best and one.trial.batch_size == best.batch_size), None
    )
    if cell is None or cell.best is None:
        return {}
    trials = (*cell.best.trials, *cell.best.further)
    return {one.trial.seed: one for one in trials if one.scores}


def _comparable(one: Curve, two: Curve) -> bool:
    """Two methods in one setting; an alpha of their own does not matter for the noise."""
    own = ("method", "alpha", "other")
    return one.setting.value("method") != two.setting.value("method") and all(
        value == two.setting.value(axis) for axis, value in one.setting.axes if axis not in own
    )


def _pairs(num: int) -> str:
    return "1 pair of methods" if num == 1 else f"{num} pairs of methods"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
