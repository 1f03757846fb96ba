"""Methods against a baseline, each at its own best batch size and LR: better, worse or alike.

Batch size and LR are chosen by the score that selects, on held-out rows; where a test was scored,
the methods are compared on it as well, at those same choices.

What varies. For a loss, seeds. For an accuracy whose answers were stored, seeds and questions
(`analyse.crossed`), questions of one source together. Where what was chosen was trained again with
seeds that did not choose it ("fresh"), those alone are compared; otherwise choice and estimate
share their seeds, and it is said by how much that may flatter. The choice itself is taken as given:
intervals are for the two chosen points.

When nothing is concluded. What makes a number meaningless (one seed, one LR, one batch size, trials
that are missing, a method that always diverged, other data) leaves the difference null, and
`undecided` says what to run. What only makes it uncertain keeps the difference with its interval. A
difference is called one if it survives Holm's adjustment *and* reaches the detectable effect, the
true difference that this very comparison finds with 80% power: estimates that are significant but
smaller are mostly exaggerated (Gelman and Carlin 2014, "Beyond power calculations"). The method
that had more (batch size, LR) points to choose from is not called better where that may be why:
where what its surplus is expected to have gained it (`selection_bias.expected_best`) would undo the
verdict. Where the seeds that chose are those that are compared, no method is called better by a
difference (the estimate, not its whole interval) that is at most what choosing it is expected to
have flattered it; with fewer than three comparable points to choose from, or under a metric that
did not select, that is not known, and no verdict is held back for it. And no method is called
better than one whose best batch size or LR lies at the edge of those tried, nor equal to it: that
one's own best is not known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from loratune.analyse.cells import Cell, make_cells
from loratune.analyse.crossed import (
    FEW_ANSWERS,
    crossed_difference,
    crossed_zero_set,
    not_too_certain,
)
from loratune.analyse.curves import (
    Crossover,
    Curve,
    Point,
    common_points,
    crossovers,
    is_search,
    make_curves,
    tested_tasks,
    why_no_score,
)
from loratune.analyse.intervals import NO_SPREAD, Estimate, holm, paired_t, welch_t
from loratune.analyse.scores import VALIDATION, Metric
from loratune.analyse.selection_bias import (
    expected_best,
    expected_maximum,
    noise_near_the_best,
)
from loratune.analyse.tables import as_document
from loratune.errors import AnalysisError
from loratune.planning.crossed_model import FEWEST_SEEDS as FEWEST_SEEDS_WITH_QUESTIONS
from loratune.planning.crossed_model import FloatArray
from loratune.planning.power import detectable_effect
from loratune.records import DataSummary, TrialResult, Verdicts

BASELINE = "lora"
LEVEL = 0.05
# With fewer the t quantile is so wide (12.7 at 2 seeds, 4.3 at 3) that little can be shown.
FEWEST_SEEDS = 5
LOSS_MARGIN = 0.005  # relative, as the recommendation's
ACCURACY_MARGIN = 0.01  # one point
# How many more points one method may have been tuned over before it is asked whether that is why.
# A quarter more moves the expected maximum of 20 by 0.07 standard deviations (assumption).
BUDGET_TOLERANCE = 1.25

Equivalence = Literal["equivalent", "not shown", "undecided"]
Verdict = Literal["better", "worse", "equivalent", "undecided"]
_UNTRIED = ("planned", "running", "failed", "out_of_memory")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method against the baseline under one metric, in one setting.

    `difference` is method - baseline, in the metric's unit, with its 95% interval, over `num_seeds`
    seeds of each (`seeds`: "fresh" ones that did not choose, or those that "chose", also; `paired`
    where they are the same ones) and `num_questions` questions, None where only seeds vary.
    `procedure` names the interval's method, `standard_error` and `df` its parts. `p_value` is
    two-sided, `p_holm` adjusted over the methods compared with this baseline in this setting under
    this metric. `detectable` is the true difference that this comparison finds with 80% power.
    `equivalence_p` is TOST's against plus or minus `equivalence_margin` (same unit);
    `equivalence` is "equivalent" where it is below 5%. `verdict` is "better" or "worse" where
    `p_holm` is below 5% and the difference reaches `detectable`, else "equivalent" if so, else
    "undecided", with the reasons and what to run in `undecided`; where the difference is null, they
    say why there is none. `crossovers` are along the whole curves, not at the best.
    `unequal` says what else differs than the method: a rank or an alpha/r of its own, another
    number of tuning points (two searches of one study have the same allowance), trials left out
    since they saw other rows or another base model. `at_edge` says
    whose best point is at the edge of what was tried, and so may not be its best. `*_tried` counts
    (batch size, LR) points. `*_selection_gap` is how much better the score looks where it was
    chosen than where it was not (fresh seeds; for an accuracy chosen by held-out accuracy, held-out
    less test). `*_flattery`, where no seeds are fresh, is at most how much choosing the best of its
    points by their seeds' luck adds to the score (all of them equally good, and as noisy as those
    near the best); None where that is not known.
    """

    setting: str
    method: str
    baseline: str
    metric: str
    higher_is_better: bool
    method_batch_size: int | None
    method_learning_rate: float | None
    method_score: float | None
    method_tried: int
    method_selection_gap: float | None
    method_flattery: float | None
    baseline_batch_size: int | None
    baseline_learning_rate: float | None
    baseline_score: float | None
    baseline_tried: int
    baseline_selection_gap: float | None
    baseline_flattery: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    standard_error: float | None
    df: float | None
    num_seeds: int
    seeds: Literal["fresh", "chose"]
    paired: bool
    num_questions: int | None
    what_varied: str
    procedure: str | None
    p_value: float | None
    p_holm: float | None
    detectable: float | None
    equivalence: Equivalence
    equivalence_margin: float | None
    equivalence_p: float | None
    verdict: Verdict
    crossovers: tuple[Crossover, ...]
    unequal: tuple[str, ...]
    at_edge: tuple[str, ...]
    undecided: tuple[str, ...]
    select_on: str


Sources = Mapping[tuple[str, str], Sequence[int]]
MakeCells = Callable[[Sequence[TrialResult]], tuple[Cell, ...]]


def compare(
    results: Sequence[TrialResult],
    *,
    verdicts: Sequence[Verdicts] = (),
    sources: Sources | None = None,
    baseline: str = BASELINE,
    margin: float | None = None,
    cells_of: MakeCells = make_cells,
) -> tuple[Comparison, ...]:
    """Every method against the baseline, in every setting that has both, under every metric.

    Args:
        results: the trials of a study, or of several.
        verdicts: which questions were answered right, for the trials of `trials_to_compare`.
            Without them an accuracy is not decided: its questions' noise would be unknown.
        sources: for (data fingerprint, task) each question's source by question index; questions
            of one source are a unit. Left out, every question is its own.
        baseline: the method that the others are compared with.
        margin: the equivalence margin in the metric's own unit; left out, 0.5% of the baseline's
            loss and 0.01 of accuracy.
        cells_of: what is chosen in each cell; `recommendation.searched.answered` knows searches.

    Raises:
        AnalysisError: no results, a margin that is not above 0, or a study without the baseline or
            without anything to compare with it.
    """
    if not results:
        raise AnalysisError("no trials; run the study first")
    if margin is not None and not 0 < margin < math.inf:
        raise AnalysisError(f"margin={margin}; give a positive number in the metric's unit")
    cells = cells_of(results)
    selecting = make_curves(cells)
    methods = list(dict.fromkeys(curve.setting.value("method") for curve in selecting))
    if baseline not in methods:
        raise AnalysisError(f"no trials of {baseline!r}; the study has {', '.join(methods)}")
    if len(methods) == 1:
        raise AnalysisError(f"the study has {baseline} alone; add a method to compare with it")
    answers = Answers.of(verdicts, sources)
    found = list[Comparison]()
    for task in (None, *_further_tasks(selecting, tested_tasks(cells))):
        scored = selecting if task is None else make_curves(cells, task=task)
        for against, others in _groups(list(zip(selecting, scored, strict=True)), baseline):
            found.extend(
                _adjusted([_compare(one, against, margin, answers, left) for one, left in others])
            )
    if not found:
        raise AnalysisError(f"no setting of the study has both {baseline} and another method")
    return tuple(found)


def trials_to_compare(
    results: Sequence[TrialResult], *, cells_of: MakeCells = make_cells
) -> tuple[str, ...]:
    """The ids of the trials whose answers `compare` looks at: every cell's, at its chosen LR."""
    return tuple(
        result.trial.trial_id
        for cell in cells_of(results)
        if cell.best is not None
        for result in (*cell.best.trials, *cell.best.further)
        if result.scores
    )


def question_sources(summaries: Mapping[str, DataSummary]) -> Sources:
    """The sources of held-out rows that share one, from the summaries by data fingerprint."""
    return {
        (fingerprint, VALIDATION): summary.validation_sources
        for fingerprint, summary in summaries.items()
        if summary.validation_sources
    }


def comparisons_document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """{"comparisons": [...]}: one object per comparison, keys as in `Comparison`."""
    return {"comparisons": [as_document(one) for one in comparisons]}


def _further_tasks(curves: Sequence[Curve], tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if any(curve.metric.task != task for curve in curves)]


def _column(verdicts: Verdicts) -> str:
    """The task's name as `scores.task_column` has it."""
    return VALIDATION if verdicts.split == "validation" else verdicts.task


# The curve by the score that selects, and by the one that is compared.
Pair = tuple[Curve, Curve]


def _groups(
    pairs: Sequence[Pair], baseline: str
) -> list[tuple[Pair, list[tuple[Pair, Sequence[Pair]]]]]:
    """Every curve of the baseline (that selects, that scores), and what is compared with it.

    Each with the method's curves that are left out, since they saw other rows or another base.

    All that the study crosses is alike on both sides. Only a method's own rank or alpha may keep it
    from being so: then it is compared at the same rank, and where it shares no rank either, at its
    own; `unequal` says what is not alike.
    """
    settings = dict[tuple[str, ...], list[Pair]]()
    for pair in pairs:
        key = (*_values(pair, _crossed_axes(pair)), *_optimizer(pair))
        settings.setdefault(key, []).append(pair)
    found = list[tuple[Pair, list[tuple[Pair, Sequence[Pair]]]]]()
    for setting in settings.values():
        by_method = dict[str, list[Pair]]()
        for pair in setting:
            by_method.setdefault(pair[0].setting.value("method"), []).append(pair)
        against = by_method.pop(baseline, [])
        for one in against:
            others = list[tuple[Pair, Sequence[Pair]]]()
            for of_method in by_method.values():
                shared = _shared_axes(of_method, against)
                alike = [
                    other for other in of_method if _values(other, shared) == _values(one, shared)
                ]
                # Other rows or other weights are no setting but a mistake, and said to be one
                # where there is nothing better to compare with.
                same = [other for other in alike if not _mixed(other, one)]
                left = [other for other in alike if _mixed(other, one)]
                others += [(other, left) for other in same] or [(other, ()) for other in left]
            if others:
                found.append((one, others))
    return found


def _crossed_axes(pair: Pair) -> list[str]:
    own = ("method", "other", "rank", "alpha", "data", "rows")
    return [axis for axis, _ in pair[0].setting.axes if axis not in own]


def _optimizer(pair: Pair) -> tuple[str, ...]:
    """What the study may cross besides its axes, as text."""
    one = pair[0].cells[0].trial
    values = (one.rows, one.optimizer, one.beta1, one.eps, one.weight_decay, one.max_grad_norm)
    return tuple(map(str, values))


def _mixed(method: Pair, baseline: Pair) -> tuple[str, ...]:
    """Whether two curves were trained on other rows or another base under the same name."""
    one, two = method[0].cells[0].trial, baseline[0].cells[0].trial
    said = list[str]()
    if one.data_fingerprint != two.data_fingerprint:
        said.append(f"data ({one.data_fingerprint} and {two.data_fingerprint})")
    if one.model_fingerprint != two.model_fingerprint:
        said.append(f"base models ({one.model_fingerprint} and {two.model_fingerprint})")
    return tuple(said)


def _left_out(other: Pair, baseline: Pair, name: str) -> str:
    sizes = ", ".join(str(cell.trial.batch_size) for cell in other[0].cells)
    return (
        f"{name}'s trials at batch size {sizes} are left out: they were trained on different "
        f"{' and '.join(_mixed(other, baseline))}"
    )


def _shared_axes(method: Sequence[Pair], baseline: Sequence[Pair]) -> tuple[str, ...]:
    """Rank and alpha, or rank alone, or nothing: as much as a method has in common."""
    for axes in (("rank", "alpha"), ("rank",)):
        if {_values(one, axes) for one in method} & {_values(one, axes) for one in baseline}:
            return axes
    return ()


def _values(pair: Pair, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(pair[0].setting.value(axis) for axis in axes)


def _unequal(method: Curve, baseline: Curve, names: tuple[str, str]) -> tuple[str, ...]:
    """What else differs than the method: rank, the scale at equal learning rates, the budget."""
    one, two = method.cells[0].trial, baseline.cells[0].trial
    said = list[str]()
    if one.rank != two.rank:
        said.append(f"rank {one.rank} against {two.rank}")
    if one.alpha / one.rank != two.alpha / two.rank:
        said.append(f"alpha/r {one.alpha / one.rank:g} against {two.alpha / two.rank:g}")
    counts = (len(_tried(method)), len(_tried(baseline)))
    if counts[0] != counts[1] and min(counts) > 0 and not _same_allowance(method, baseline):
        more = 0 if counts[0] > counts[1] else 1
        best = _at_budget((method, baseline)[more], min(counts))
        said.append(
            f"{names[0]} was tuned over {_points(counts[0])}, {names[1]} over {counts[1]}"
            + (
                ""
                if best is None
                else f" (the best of {min(counts)} drawn from {names[more]}'s is expected at "
                f"{best:.4g})"
            )
        )
    return tuple(said)


def _same_allowance(method: Curve, baseline: Curve) -> bool:
    """Whether one study's search looked for both: each might take as many trials as it needed."""
    return is_search(method) and is_search(baseline) and method.study == baseline.study


def _points(num: int) -> str:
    return f"{num} (batch size, learning rate) {'point' if num == 1 else 'points'}"


def _tried(curve: Curve) -> list[tuple[int, float]]:
    """The (batch size, LR) points of which a trial has ended, well or not."""
    return [
        (cell.trial.batch_size, rate.learning_rate)
        for cell in curve.cells
        for rate in cell.rates
        if any(result.status not in _UNTRIED for result in rate.trials)
    ]


def _at_budget(curve: Curve, num_draws: int) -> float | None:
    """What a search of so many points is expected to have found of a longer one's; None: unknown.

    None too where fewer of its points have a score.
    """
    means = [rate.mean for cell in curve.cells for rate in cell.rates if rate.verdict == "eligible"]
    finite = [mean for mean in means if mean is not None]
    if not 1 <= num_draws <= len(finite):
        return None
    return expected_best(
        finite, num_draws=num_draws, higher_is_better=curve.metric.higher_is_better
    )


# A verdict that must not be given, and why.
Veto = tuple["Verdict", str]


def _budget(
    sides: tuple["_Side", "_Side"],
    metric: Metric,
    estimate: Estimate,
    *,
    fresh: bool,
    margin: float | None,
) -> list[Veto]:
    """Which verdicts the difference of the tuning budgets may explain.

    The longer search's score is made worse by what its surplus is expected to have gained it. With
    fresh seeds a verdict must keep its side then; with seeds that chose, which may have been lucky
    besides, so must the whole interval. Under a metric that did not choose, the gain is known in
    the one that chose alone: there the longer search must stay ahead, and the seeds be fresh.
    """
    curves = (sides[0].selecting, sides[1].selecting)
    counts = [len(_tried(curve)) for curve in curves]
    if max(counts) <= BUDGET_TOLERANCE * min(counts) or _same_allowance(*curves):
        return []
    more = 0 if counts[0] > counts[1] else 1
    longer, shorter = curves[more].best, curves[1 - more].best
    assert longer is not None
    assert longer.score is not None
    assert shorter is not None
    assert shorter.score is not None
    then = _at_budget(curves[more], min(counts))
    then = longer.score if then is None else then
    ahead: Verdict = "better" if more == 0 else "worse"
    explained = list[Verdict]()
    if metric == curves[more].metric:
        loss = then - longer.score if more == 0 else longer.score - then
        shifted = replace(estimate, value=estimate.value + loss)
        ends = (shifted.value,) if fresh else (shifted.low, shifted.high)
        if any((end > 0) != (estimate.value > 0) for end in ends):
            explained.append(ahead)
        if margin is None or shifted.equivalence_p(margin) >= LEVEL:
            explained.append("equivalent")
    else:
        if not fresh or not curves[more].metric.better(then, shorter.score):
            explained.append(ahead)
        explained.append("equivalent")
    name = sides[1 - more].name
    reason = (
        f"{sides[more].name} was tuned over {_points(max(counts))}, {name} over {min(counts)}, and "
        f"that may be why: {_what_lacks(curves[more], curves[1 - more], name)}"
    )
    return [(verdict, reason) for verdict in explained]


def _what_lacks(longer: Curve, shorter: Curve, name: str) -> str:
    """What to add to the study so that the shorter search has what the longer one had."""
    (sizes, rates), (own_sizes, own_rates) = (
        tuple(sorted(set(axis)) for axis in zip(*_tried(curve), strict=True))
        for curve in (longer, shorter)
    )
    parts = [
        f"{word} {', '.join(f'{value:g}' for value in missing)}"
        for word, missing in (
            ("batch_size", [size for size in sizes if size not in own_sizes]),
            ("learning_rate", [rate for rate in rates if rate not in own_rates]),
        )
        if missing
    ]
    what = " and ".join(parts) or "the points that it lacks"
    return (
        f"add {what} to the study file, so that {name} has them too, and run it again; trials that "
        "are done are not repeated"
    )


def _at_edge(pair: Pair, name: str) -> list[str]:
    """In words, whether a method's best point is at the edge of its batch sizes or LRs."""
    best = pair[0].best
    if best is None:
        return []
    said = list[str]()
    if len({size for size, _ in _tried(pair[0])}) == 1:
        said.append(f"{name} was tried at batch size {best.batch_size} only")
    elif end := _size_end(pair):
        said.append(f"{name}'s batch size {best.batch_size} is the {end} of those tried")
    (cell,) = [one for one in pair[0].cells if one.trial.batch_size == best.batch_size]
    if len(cell.rates) == 1:
        said.append(f"{name} was tried at learning rate {best.learning_rate:g} only")
    elif end := _rate_end(pair):
        said.append(f"{name}'s learning rate {best.learning_rate:g} is the {end} of those tried")
    return said


def _size_end(pair: Pair) -> Literal["smallest", "largest"] | None:
    """Where the best batch size lies among those tried; None too where none is possible beyond."""
    curve, best = pair[0], pair[0].best
    if best is None:
        return None
    size, sizes = best.batch_size, {size for size, _ in _tried(curve)}
    if size == min(sizes) > 1:
        return "smallest"
    if size == max(sizes) < curve.cells[0].trial.num_train_rows:
        return "largest"
    return None


def _rate_end(pair: Pair) -> Literal["lowest", "highest"] | None:
    """Where the best LR lies among those tried: in its cell, or, for a search, on its curve."""
    curve, best = pair[0], pair[0].best
    if best is None or best.learning_rate is None:
        return None
    if not is_search(curve) and not best.lr_at_edge:
        return None
    tried = [rate for size, rate in _tried(curve) if is_search(curve) or size == best.batch_size]
    if len(set(tried)) < 2 or best.learning_rate not in (min(tried), max(tried)):
        return None
    return "lowest" if best.learning_rate == min(tried) else "highest"


def _edge_vetoes(pair: Pair, name: str, loses: "Verdict") -> list[Veto]:
    """Why this method is neither the worse one nor an equal one: its best is at an end of some."""
    curve, best = pair[0], pair[0].best
    if best is None:
        return []
    unknown = f"{name}'s own best is not known: its best"
    reasons = list[str]()
    if end := _size_end(pair):
        size, rows = best.batch_size, curve.cells[0].trial.num_train_rows
        beyond, further = ("smaller", size // 2) if end == "smallest" else ("larger", 2 * size)
        there = ", or raise max_trials if it is there," if is_search(curve) else ""
        reasons.append(
            f"{unknown} batch size, {size}, is the {end} of those tried, and a {beyond} one may be "
            f"better; add {min(further, rows)} to batch_size in the study{there} and run it again"
        )
    if end := _rate_end(pair):
        beyond, bound = ("lower", "low") if end == "lowest" else ("higher", "high")
        change = (
            f"move {bound} under learning_rate" if is_search(curve) else "add one to learning_rate"
        )
        reasons.append(
            f"{unknown} learning rate, {best.learning_rate:g}, is the {end} of those tried, and a "
            f"{beyond} one may be better; {change} in the study and run it again"
        )
    verdicts: tuple[Verdict, ...] = (loses, "equivalent")
    return [(verdict, reason) for reason in reasons for verdict in verdicts]


@dataclass(frozen=True, slots=True)
class Answers:
    """Verdicts by (trial id, task column), and the questions' sources by (fingerprint, task)."""

    by_trial: Mapping[tuple[str, str], Verdicts]
    sources: Sources

    @classmethod
    def of(cls, verdicts: Sequence[Verdicts], sources: Sources | None = None) -> "Answers":
        """The answers by the names that tables have for tasks."""
        by_trial = {(one.trial_id, _column(one)): one for one in verdicts}
        return cls(by_trial, {} if sources is None else sources)

    def table(self, trials: Sequence[TrialResult], task: str) -> FloatArray | None:
        """[S, Q] of ones and zeros; None where an answer is unknown or questions differ."""
        found = [self.by_trial.get((one.trial.trial_id, task)) for one in trials]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found) or len({one.questions for one in known}) > 1:
            return None
        return np.array([one.correct for one in known], dtype=np.float64)

    def questions(self, trial: TrialResult, task: str) -> tuple[int, ...]:
        """What the trial was asked; its answers must be known."""
        return self.by_trial[trial.trial.trial_id, task].questions

    def sources_of(self, trial: TrialResult, task: str) -> list[int] | None:
        """Each asked question's source, or None where each is its own."""
        known = self.sources.get((trial.trial.data_fingerprint, task))
        asked = self.questions(trial, task)
        if known is None or not asked or max(asked) >= len(known):
            return None
        return [known[question] for question in asked]


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two methods at its own best point."""

    name: str
    selecting: Curve
    scoring: Curve
    best: Point | None

    @property
    def cell(self) -> Cell | None:
        """The cell of the best point."""
        if self.best is None:
            return None
        return next(
            cell for cell in self.selecting.cells if cell.trial.batch_size == self.best.batch_size
        )

    def scores(self, *, fresh: bool) -> dict[int, float]:
        """Seed -> score at the best point."""
        if self.best is None:
            return {}
        return dict(self.best.fresh_scores if fresh else self.best.seed_scores)

    def trials(self, seeds: Sequence[int]) -> list[TrialResult]:
        """The trials of these seeds at the best point."""
        if self.cell is None or self.cell.best is None:
            return []
        rate = self.cell.best
        by_seed = {one.trial.seed: one for one in (*rate.trials, *rate.further)}
        return [by_seed[seed] for seed in seeds]


def _compare(
    method: Pair,
    baseline: Pair,
    margin: float | None,
    answers: Answers,
    left_out: Sequence[Pair],
) -> tuple[Comparison, list[Veto]]:
    """One method's best point against the baseline's; Holm and the verdict are still to come.

    With it what its verdict must not be, for budgets, edges and luck.
    """
    metric = baseline[1].metric
    sides = (_side(method), _side(baseline))
    names = (sides[0].name, sides[1].name)
    two = sides[1].best
    tolerated = margin
    if tolerated is None and two is not None and two.score is not None:
        tolerated = LOSS_MARGIN * abs(two.score) if metric.task is None else ACCURACY_MARGIN
    fewest = 2 if metric.task is None or not answers.by_trial else FEWEST_SEEDS_WITH_QUESTIONS
    fresh = all(len(side.scores(fresh=True)) >= fewest for side in sides)
    own = [sorted(side.scores(fresh=fresh)) for side in sides]
    shared = sorted(set(own[0]) & set(own[1]))
    paired = len(shared) >= fewest
    seeds = (shared, shared) if paired else (own[0], own[1])
    blocked = [*_blocked(method, baseline, sides, metric)]
    if not blocked and min(map(len, seeds)) < fewest:
        blocked.append(_too_few(min(map(len, seeds)), fewest))
    estimate, num_questions, doubts = None, None, list[str]()
    if not blocked:
        estimate, num_questions, doubts = _estimate(sides, metric, answers, seeds, paired, fresh)
    equal_p = None if estimate is None or tolerated is None else estimate.equivalence_p(tolerated)
    vetoes = list[Veto]()
    if estimate is not None:
        vetoes += _budget(sides, metric, estimate, fresh=fresh, margin=tolerated)
        for loses, (pair, name) in zip(
            ("worse", "better"), zip((method, baseline), names, strict=True), strict=True
        ):
            vetoes += _edge_vetoes(pair, name, loses)
        if not fresh:
            vetoes += _luck_vetoes(sides, estimate)
    compared = Comparison(
        setting=_setting_text(baseline[0], names[1]),
        method=names[0],
        baseline=names[1],
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        **_told("method", sides[0], metric, seeds[0], fresh),
        **_told("baseline", sides[1], metric, seeds[1], fresh),
        difference=None if estimate is None else estimate.value,
        difference_low=None if estimate is None else estimate.low,
        difference_high=None if estimate is None else estimate.high,
        standard_error=None if estimate is None else estimate.standard_error,
        df=None if estimate is None else estimate.df,
        num_seeds=min(map(len, seeds)),
        seeds="fresh" if fresh else "chose",
        paired=paired,
        num_questions=num_questions,
        what_varied="seeds" if num_questions is None else "seeds and questions",
        procedure=None if estimate is None else estimate.procedure,
        p_value=None if estimate is None else estimate.p_value,
        p_holm=None,
        detectable=(
            None if estimate is None else detectable_effect(estimate.standard_error, df=estimate.df)
        ),
        equivalence=_equivalence(equal_p),
        equivalence_margin=tolerated,
        equivalence_p=equal_p,
        verdict="undecided",
        crossovers=() if estimate is None else _crossovers(method[1], baseline[1], names, answers),
        unequal=(
            *_unequal(method[0], baseline[0], names),
            *(_left_out(one, baseline, names[0]) for one in left_out),
        ),
        at_edge=(*_at_edge(method, names[0]), *_at_edge(baseline, names[1])),
        undecided=(*blocked, *doubts),
        select_on=baseline[0].cells[0].select_on,
    )
    return compared, vetoes


def _side(pair: Pair) -> _Side:
    best = pair[0].best
    scored = None
    if best is not None:
        scored = next(point for point in pair[1].points if point.batch_size == best.batch_size)
    return _Side(pair[0].setting.value("method"), pair[0], pair[1], scored)


def _blocked(method: Pair, baseline: Pair, sides: tuple[_Side, _Side], metric: Metric) -> list[str]:
    """What makes any difference meaningless, and what to run. Too few seeds come later."""
    reasons = [
        f"the two were trained on different {what}, so that nothing can be told of the methods; "
        "run both in one study"
        for what in _mixed(method, baseline)
    ]
    for side in sides:
        curve, point = side.selecting, side.best
        if curve.best is None:
            reasons.append(f"{side.name} has no batch size with a score: {why_no_score(curve)}")
            continue
        statuses = [
            result.status
            for cell in curve.cells
            for rate in cell.rates
            for result in rate.trials
            if result.status in _UNTRIED
        ]
        if statuses:
            counted = ", ".join(f"{statuses.count(one)} {one}" for one in sorted(set(statuses)))
            reasons.append(
                f"{side.name}'s own best is not known: trials are missing ({counted}); "
                "`loratune run` tries them, or take their batch sizes out of the study"
            )
        rates = {rate.learning_rate for cell in curve.cells for rate in cell.rates}
        if len(rates) == 1:
            reasons.append(
                f"{side.name}'s own best is not known: learning rate {min(rates):g} alone was "
                "tried; add lower and higher ones to the study"
            )
        if len(curve.cells) == 1:
            reasons.append(
                f"{side.name}'s own best is not known: batch size "
                f"{curve.cells[0].trial.batch_size} alone was tried; add smaller and larger ones "
                "to the study"
            )
        if point is None or point.score is None:
            reasons.append(
                f"{side.name} has no {metric.name.replace('_', ' ')} at its best batch size; "
                "`loratune run` scores what is missing"
            )
    return reasons


def _too_few(num: int, fewest: int) -> str:
    have = "no seed is" if num == 0 else "one seed is" if num == 1 else f"{num} seeds are"
    return (
        f"{have} too few to see how much seeds matter (it takes {fewest}), run at least "
        f"{FEWEST_SEEDS}: seeds: {FEWEST_SEEDS} in the study"
    )


def _estimate(
    sides: tuple[_Side, _Side],
    metric: Metric,
    answers: Answers,
    seeds: tuple[Sequence[int], Sequence[int]],
    paired: bool,
    fresh: bool,
) -> tuple[Estimate | None, int | None, list[str]]:
    """The difference; how many questions varied; and why it cannot decide, if so.

    None where the seeds' scatter is none at all: it would decide everything.
    """
    one, two = (
        [side.scores(fresh=fresh)[seed] for seed in of_side]
        for side, of_side in zip(sides, seeds, strict=True)
    )
    if metric.task is not None:
        trials = [side.trials(some) for side, some in zip(sides, seeds, strict=True)]
        tables = [answers.table(some, metric.task) for some in trials]
        first, second = tables
        asked = {
            answers.questions(some[0], metric.task)
            for some, table in zip(trials, tables, strict=True)
            if table is not None
        }
        if first is not None and second is not None and len(asked) == 1:
            if _seeds_change_nothing(first) and _seeds_change_nothing(second):
                return None, None, [_no_spread(f"{len(first)} seeds gave the same answers")]
            sources = answers.sources_of(trials[0][0], metric.task)
            try:
                found = _crossed(first, second, sources, paired=paired)
            except AnalysisError as error:  # One question, or one source of all.
                return None, None, [f"{error}; score a test with more questions"]
            return found, first.shape[1], []
    estimate = (
        paired_t([x - y for x, y in zip(one, two, strict=True)]) if paired else welch_t(one, two)
    )
    if metric.task is None:
        if estimate.standard_error <= NO_SPREAD * max(map(abs, (*one, *two))):
            count = min(len(one), len(two))
            reason = _no_spread(f"{count} seeds gave the same difference, {estimate.value:+.3g}")
            return None, None, [reason]
        return estimate, None, []
    return (
        estimate,
        None,
        [
            "which questions were answered right is not known for every seed, and so neither how "
            "much other questions would change; score the trials again with their answers kept"
        ],
    )


def _seeds_change_nothing(table: FloatArray) -> bool:
    """Whether all seeds answered alike, and not only because nearly all answers are of a kind."""
    right = float(table[0].sum())
    alike = bool((table == table[0]).all())
    return alike and min(right, table.shape[1] - right) >= FEW_ANSWERS


def _no_spread(what: str) -> str:
    return (
        f"all {what}: the seed changes nothing, so that it is not known how much other seeds "
        "would; see that the seed shuffles the rows and draws the initialisation, and run again"
    )


def _told(
    prefix: str, side: _Side, metric: Metric, seeds: Sequence[int], fresh: bool
) -> dict[str, Any]:
    """What a comparison says of one side."""
    point = side.best
    scores = side.scores(fresh=fresh)
    used = [scores[seed] for seed in seeds]
    mean = math.fsum(used) / len(used) if used else None
    return {
        f"{prefix}_batch_size": point.batch_size if point else None,
        f"{prefix}_learning_rate": point.learning_rate if point else None,
        f"{prefix}_score": mean if mean is not None else point.score if point else None,
        f"{prefix}_tried": len(_tried(side.selecting)),
        f"{prefix}_selection_gap": _selection_gap(side, metric),
        f"{prefix}_flattery": None if fresh else _flattery(side),
    }


def _selection_gap(side: _Side, metric: Metric) -> float | None:
    """How much better the score looks where it was chosen than where it was not; None: unknown."""
    point, chosen_by = side.best, side.selecting.metric
    if point is None or point.score is None:
        return None
    if metric == chosen_by:
        fresh = [score for _, score in point.fresh_scores]
        if not fresh:
            return None
        gap = point.score - math.fsum(fresh) / len(fresh)
        return gap if metric.higher_is_better else -gap
    best = side.selecting.best
    if chosen_by.task is None or best is None or best.score is None:
        return None  # a loss and an accuracy have no common scale
    fresh = [score for _, score in point.fresh_scores]
    return best.score - (math.fsum(fresh) / len(fresh) if fresh else point.score)


def _flattery(side: _Side) -> float | None:
    """E[max of K] sigma / sqrt(S): what choosing by the seeds' luck adds at most to the score.

    K eligible points, all taken to be equally good, S seeds that choose; sigma the noise of those
    near the best. Only for the score that selects.
    """
    curve = side.selecting
    if side.scoring is not curve:
        return None
    table = np.array(
        [
            [score for score in rate.seed_scores if score is not None]
            for cell in curve.cells
            for rate in cell.rates
            if rate.verdict == "eligible" and len(cell.seeds) == len(curve.cells[0].seeds)
        ]
    )
    if table.ndim != 2:
        return None
    noise = noise_near_the_best(table, higher_is_better=curve.metric.higher_is_better)
    if noise is None:
        return None
    num_points, num_seeds = table.shape
    return expected_maximum(num_points) * noise / math.sqrt(num_seeds)


def _luck_vetoes(sides: tuple[_Side, _Side], estimate: Estimate) -> list[Veto]:
    """Why the one ahead is not better, where the seeds that chose it may have put it ahead.

    Nothing is vetoed where that is not known: fewer than three comparable points, as where others
    diverged, or a metric that did not select.
    """
    first_ahead = (estimate.value > 0) == sides[0].scoring.metric.higher_is_better
    ahead = sides[0] if first_ahead else sides[1]
    most = _flattery(ahead)
    if most is None or most < abs(estimate.value):
        return []
    reason = (
        f"the seeds that are compared also chose {ahead.name}'s batch size and learning rate, "
        f"which may make its score look better by up to {most:.2g}, and the difference is "
        f"{abs(estimate.value):.2g}; train what was chosen with seeds that choose nothing: add "
        f"confirm: {FEWEST_SEEDS} to seeds in the study and run it again"
    )
    return [("better" if first_ahead else "worse", reason)]


def _crossovers(
    method: Curve, baseline: Curve, names: tuple[str, str], answers: Answers
) -> tuple[Crossover, ...]:
    """Along the seeds that chose; over questions too where their verdicts are known throughout."""
    zero_sets = differences = None
    pairs = common_points(method, baseline)
    task = method.metric.task
    seeds = [set(dict(one.seed_scores)) & set(dict(two.seed_scores)) for one, two in pairs]
    shared = sorted(set[int].intersection(*seeds)) if seeds else []
    if task is not None and len(shared) >= FEWEST_SEEDS_WITH_QUESTIONS:
        tables = [
            answers.table(_at(curve, point.batch_size, shared), task)
            for pair in pairs
            for curve, point in zip((method, baseline), pair, strict=True)
        ]
        known = [table for table in tables if table is not None]
        if len(known) == len(tables) and len({table.shape for table in known}) == 1:
            gaps = [one - two for one, two in zip(known[::2], known[1::2], strict=True)]
            sources = answers.sources_of(_at(method, pairs[0][0].batch_size, shared)[0], task)
            zero_sets = [
                crossed_zero_set(left, right, sources=sources) for left, right in pairwise(gaps)
            ]
            differences = [
                _crossed(one, two, sources, paired=True)
                for one, two in zip(known[::2], known[1::2], strict=True)
            ]
    found = crossovers(method, baseline, zero_sets=zero_sets, differences=differences)
    return _named(found, method, baseline, names)


def _crossed(
    first: FloatArray, second: FloatArray, sources: Sequence[int] | None, *, paired: bool
) -> Estimate:
    """The difference of two tables of answers, no more certain than few answers allow."""
    found = crossed_difference(first, second, paired=paired, sources=sources)
    return not_too_certain(found, first, second, sources=sources)


def _at(curve: Curve, batch_size: int, seeds: Sequence[int]) -> list[TrialResult]:
    """The trials of these seeds at a batch size's chosen LR."""
    cell = next(one for one in curve.cells if one.trial.batch_size == batch_size)
    by_seed = {one.trial.seed: one for one in cell.best.trials} if cell.best else {}
    return [by_seed[seed] for seed in seeds]


def _adjusted(comparisons: Sequence[tuple[Comparison, Sequence[Veto]]]) -> list[Comparison]:
    """Holm over the methods with a p, then the verdicts."""
    tested = [one for one, _ in comparisons if one.p_value is not None]
    adjusted = dict(zip(map(id, tested), holm([one.p_value or 0.0 for one in tested]), strict=True))
    return [_decided(one, adjusted.get(id(one)), vetoes) for one, vetoes in comparisons]


def _decided(one: Comparison, p: float | None, vetoes: Sequence[Veto]) -> Comparison:
    """The comparison with its verdict."""
    if p is None or one.difference is None or one.detectable is None or one.undecided:
        return replace(one, p_holm=p)
    reasons = list[str]()
    better = (one.difference > 0) == one.higher_is_better
    reaches = abs(one.difference) >= one.detectable
    verdict: Verdict = "undecided"
    if p < LEVEL and reaches:
        verdict = "better" if better else "worse"
    elif one.equivalence == "equivalent":
        verdict = "equivalent"
    elif p < LEVEL:
        reasons.append(
            f"the difference {one.difference:+.3g} (Holm p = {p:.2g}) is smaller than what this "
            f"comparison finds with 80% power, {one.detectable:.3g}: such estimates are mostly "
            "exaggerated; run more seeds" + (" and questions" if one.num_questions else "")
        )
    else:
        equal = f"equivalence within {one.equivalence_margin:.3g}"
        reasons.append(
            f"{one.num_seeds} seeds cannot tell, run at least {FEWEST_SEEDS} "
            f"(a difference: Holm p = {p:.2g}; {equal}, p = {one.equivalence_p:.2g})"
            if one.num_seeds < FEWEST_SEEDS
            else f"{_sample(one)} show neither a difference (Holm p = {p:.2g}) nor {equal} "
            f"(p = {one.equivalence_p:.2g}); less than {one.detectable:.3g} is not found reliably"
        )
    if vetoed := [reason for of_verdict, reason in vetoes if of_verdict == verdict]:
        reasons += vetoed
        verdict = "undecided"
    return replace(one, p_holm=p, verdict=verdict, undecided=tuple(reasons))


def _sample(one: Comparison) -> str:
    asked = "" if one.num_questions is None else f" and {one.num_questions:,} questions"
    return f"{one.num_seeds} seeds{asked}"


def _equivalence(p: float | None) -> Equivalence:
    if p is None:
        return "undecided"
    return "equivalent" if p < LEVEL else "not shown"


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
