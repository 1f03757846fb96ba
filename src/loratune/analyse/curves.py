"""Curves: a method's cells over batch size, all else equal, and what can be read off them.

A curve's points carry the score of each seed, so that two curves can be compared seed by seed.
Intervals are over seeds; the questions of a test and the validation rows are the same throughout
and their own noise is not in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from loratune.analyse.cells import Cell
from loratune.analyse.intervals import (
    CONFIDENCE,
    NO_SPREAD,
    Estimate,
    ZeroSet,
    holm,
    mean_with_interval,
    paired_t,
    zero_set,
)
from loratune.analyse.scores import Metric, accuracy_metric, test_tasks, trial_score
from loratune.analyse.selection_bias import selection_bias
from loratune.records import Trial, TrialResult

# What a trial's batch size decides, and so differs along a curve. Warm-up is matched by rank
# (`_warmups`), beta2 by its rule; the data fingerprint and N say which rows, not `rows`.
_ALONG_CURVE = frozenset(
    {
        "trial_id", "provisional", "learning_rate", "seed", "rows", "batch_size", "num_updates",
        "last_batch_size", "num_samples", "warmup_steps", "beta2",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """What the cells of a curve share, in the words of a reader; `label` says what is special.

    `axes` maps every axis (method, model, rank, ...) to this curve's value as text.
    """

    label: str
    axes: tuple[tuple[str, str], ...]

    def value(self, axis: str) -> str:
        """This curve's value on one axis."""
        return dict(self.axes)[axis]


@dataclass(frozen=True, slots=True)
class Point:
    """A curve at one batch size. `score` is None where the cell has none.

    `seed_scores` maps seeds to the score at the chosen LR; `fresh_scores` those seeds that had no
    part in choosing it. `incomplete`: some trial of the cell has neither a score nor diverged, so
    that the choice of LR may still change.
    """

    batch_size: int
    score: float | None
    low: float | None
    high: float | None
    seed_scores: tuple[tuple[int, float], ...]
    learning_rate: float | None
    lr_at_edge: bool | None
    diverged_rates: tuple[float, ...]
    incomplete: bool
    fresh_scores: tuple[tuple[int, float], ...] = ()

    @property
    def num_seeds(self) -> int:
        """How many seeds the score is a mean of."""
        return len(self.seed_scores)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in ascending batch size. `shift` was added to every score (0 for a raw curve)."""

    setting: Setting
    study: str
    metric: Metric
    points: tuple[Point, ...]
    cells: tuple[Cell, ...]
    shift: float = 0.0

    @property
    def label(self) -> str:
        """What tells this curve from the others of its set."""
        return self.setting.label

    @property
    def best(self) -> Point | None:
        """The point with the best score, of equal ones the smallest batch size; a search's answer.

        A search's answer is what its surface says (`recommendation.searched.answered`), not the
        lowest of its means, of which many are one lucky trial's.
        """
        for point, cell in zip(self.points, self.cells, strict=True):
            if cell.is_answer:
                return point if point.score is not None else None
        best: Point | None = None
        for point in self.points:
            if point.score is None:
                continue
            if best is None or best.score is None or self.metric.better(point.score, best.score):
                best = point
        return best


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where two curves change places. `better_below` is the better one at smaller batch sizes.

    `low` and `high` bound the batch sizes around the crossing at which the difference is not
    distinguishable from 0 (5% two-sided test, paired over `num_seeds` shared seeds, and over the
    questions where their verdicts are known, on the interpolated curves). None where they reach
    the end of the batch sizes that both have, and both None with one shared seed. `shown`: both
    ends are there, and at batch sizes tried below and above them one curve and the other is the
    better one with 95% confidence, whatever the number of batch sizes (`_signs`); otherwise the
    sign of the difference changes, and that is not told from noise: who is better below and above
    is then what the means say, no more.
    """

    batch_size: float
    low: float | None
    high: float | None
    better_below: str
    better_above: str
    num_seeds: int
    shown: bool


@dataclass(frozen=True, slots=True)
class SelectionGap:
    """What choosing the LR of one cell without the test costs, and what choosing on it pretends.

    `test_at_chosen` is the mean test accuracy at the chosen LR, `test_at_best` that at the LR which
    the test itself likes best; `gap` is their difference, never negative. Under `select_on: test`
    the two are one and `gap` is 0 by construction; `optimism` then says how much of the score goes
    when each seed is scored at the LR which the other seeds chose (same questions: only the part
    of the optimism that comes from seeds), and `optimism_bound` what K equally good LRs would gain
    on n questions alone: E[max of K] sqrt(p (1 - p) (1 - rho) / n), rho = 0.5 (assumption).
    """

    setting: Setting
    batch_size: int
    task: str
    chosen_learning_rate: float
    best_learning_rate: float
    test_at_chosen: float
    test_at_best: float
    gap: float
    num_rates: int
    num_seeds: int
    optimism: float | None
    optimism_bound: float | None


def make_curves(cells: Sequence[Cell], *, task: str | None = None) -> tuple[Curve, ...]:
    """The curves of the cells, in the order of their first cells; labels tell them apart.

    With `task`, scores are the accuracies of that test task at each cell's chosen LR (over the
    seeds that were tested); without, the scores that selected.
    """
    warmups = _warmups(cells)
    grouped = dict[tuple[object, ...], list[Cell]]()
    for cell in cells:
        # 0 without a warm-up, k with the k-th shortest one
        steps = cell.trial.warmup_steps
        nth = 1 + sorted(warmups[_alike_but_for_warmup(cell)]).index(steps) if steps else 0
        grouped.setdefault((cell.study, *_curve_key(cell.trial), nth), []).append(cell)
    groups = [sorted(group, key=lambda cell: cell.trial.batch_size) for group in grouped.values()]
    settings = _settings(groups)
    metric = None if task is None else accuracy_metric(task)
    return tuple(
        Curve(
            setting=setting,
            study=group[0].study,
            metric=metric or group[0].metric,
            points=tuple(_point(cell, metric or cell.metric) for cell in group),
            cells=tuple(group),
        )
        for group, setting in zip(groups, settings, strict=True)
    )


def is_search(curve: Curve) -> bool:
    """Whether an adaptive search chose the curve's trials."""
    return any(result.purpose == "adaptive" for cell in curve.cells for result in cell.results)


def tested_tasks(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The test tasks with a score at any chosen LR."""
    return test_tasks(one for cell in cells if cell.best is not None for one in cell.best.trials)


def why_no_score(curve: Curve) -> str:
    """Why no batch size of the curve has a score, and what to run."""
    statuses = [result.status for cell in curve.cells for result in cell.results]
    if all(status in ("planned", "running") for status in statuses):
        return (
            "no trial has finished yet; run the same command again, which goes on where it stopped "
            "(where it had a --budget, with a longer one)"
        )
    if all(rate.verdict == "diverged" for cell in curve.cells for rate in cell.rates):
        lowest = min(rate.learning_rate for cell in curve.cells for rate in cell.rates)
        return (
            "every learning rate diverged at every batch size; "
            f"try rates below the lowest one, {lowest:g}"
        )
    counted = ", ".join(f"{statuses.count(one)} {one}" for one in sorted(set(statuses)))
    return (
        "no learning rate has a score with every seed at any batch size "
        f"({counted}); finish the study with `loratune run`"
    )


def varied_axes(curves: Sequence[Curve]) -> tuple[str, ...]:
    """The axes that tell the curves apart, in the order of importance; none for one curve."""
    return _needed_axes([dict(curve.setting.axes) for curve in curves])


def normalised(curves: Sequence[Curve], *, default: Curve) -> tuple[Curve, ...]:
    """Every curve shifted so that its best score equals the default's (the paper's Fig. 2)."""
    top = default.best
    return tuple(_shifted(curve, top) for curve in curves)


def crossovers(
    first: Curve,
    second: Curve,
    *,
    zero_sets: Sequence[ZeroSet] | None = None,
    differences: Sequence[Estimate] | None = None,
) -> tuple[Crossover, ...]:
    """Where the sign of first - second changes, by linear interpolation on log2(batch size).

    Only batch sizes at which both have a score are used. A difference of exactly 0 at a batch size
    is a crossing if the signs on its two sides differ, and none if the curves only touch.

    Args:
        first: one curve.
        second: the other.
        zero_sets: for each gap between two neighbouring common batch sizes the weights of the right
            one at which the difference may be 0; left out, by a t test over shared seeds.
        differences: first - second at every common batch size; given where `zero_sets` are.
    """
    pairs = common_points(first, second)
    xs = [math.log2(one.batch_size) for one, _ in pairs]
    gaps = [(one.score or 0.0) - (two.score or 0.0) for one, two in pairs]
    seeds = _shared_seeds(pairs)
    if zero_sets is None and len(seeds) > 1:
        by_seed = [
            [dict(one.seed_scores)[seed] - dict(two.seed_scores)[seed] for seed in seeds]
            for one, two in pairs
        ]
        zero_sets = [zero_set(left, right) for left, right in pairwise(by_seed)]
        differences = [paired_t(gaps_of_size) for gaps_of_size in by_seed]
    signs = [0] * len(xs) if differences is None else _signs(differences, pairs)
    signed = [index for index, gap in enumerate(gaps) if gap != 0.0]
    found = list[Crossover]()
    between = list[tuple[int, int] | None]()
    for left, right in pairwise(signed):
        if (gaps[left] > 0) == (gaps[right] > 0):
            continue
        if right == left + 1:
            weight = gaps[left] / (gaps[left] - gaps[right])
            where = xs[left] + weight * (xs[right] - xs[left])
        else:  # exactly equal at the batch sizes between: the middle of them
            where = (xs[left + 1] + xs[right - 1]) / 2
        low, high = (None, None) if zero_sets is None else _crossing_interval(where, xs, zero_sets)
        # Several changes of sign between the same two batch sizes are one crossing.
        ends = _shown_between(low, high, 1 if gaps[left] > 0 else -1, xs, signs)
        shown = ends is not None and ends not in between
        between.append(ends)
        first_below = (gaps[left] > 0) == first.metric.higher_is_better
        names = (first.label, second.label) if first_below else (second.label, first.label)
        found.append(Crossover(2.0**where, low, high, names[0], names[1], len(seeds), shown))
    return tuple(found)


def common_points(first: Curve, second: Curve) -> list[tuple[Point, Point]]:
    """The points of both curves at the batch sizes at which both have a score, ascending."""
    seconds = {point.batch_size: point for point in second.points if point.score is not None}
    return [
        (point, seconds[point.batch_size])
        for point in first.points
        if point.score is not None and point.batch_size in seconds
    ]


def selection_gaps(cells: Sequence[Cell], *, task: str) -> tuple[SelectionGap, ...]:
    """The gap of every cell in which two LRs or more were tested with every seed."""
    settings = {id(cell): curve.setting for curve in make_curves(cells) for cell in curve.cells}
    gaps = list[SelectionGap]()
    for cell in cells:
        metric = accuracy_metric(task)
        tested = {
            rate.learning_rate: scores
            for rate in cell.rates
            if rate.verdict == "eligible"
            and len(scores := _finite_scores(rate.trials, metric)) == len(cell.seeds)
        }
        if cell.best is None or cell.best.learning_rate not in tested or len(tested) < 2:
            continue
        means = {rate: _mean([s for _, s in scores]) for rate, scores in tested.items()}
        top = max(means, key=lambda rate: means[rate])
        chosen = cell.best.learning_rate
        on_test = cell.select_on == "test"
        gaps.append(
            SelectionGap(
                setting=settings[id(cell)],
                batch_size=cell.trial.batch_size,
                task=task,
                chosen_learning_rate=chosen,
                best_learning_rate=top if means[top] > means[chosen] else chosen,
                test_at_chosen=means[chosen],
                test_at_best=means[top],
                gap=means[top] - means[chosen],
                num_rates=len(tested),
                num_seeds=len(cell.seeds),
                optimism=_optimism(tested, means[top]) if on_test else None,
                optimism_bound=_bound(cell, task, means[top], len(tested)) if on_test else None,
            )
        )
    return tuple(gaps)


def _optimism(tested: dict[float, tuple[tuple[int, float], ...]], claimed: float) -> float | None:
    """`claimed` less the mean over seeds of the score at the LR which the other seeds chose."""
    seeds = [seed for seed, _ in next(iter(tested.values()))]
    if len(seeds) < 2:
        return None
    by_rate = {rate: dict(scores) for rate, scores in tested.items()}
    held_out = list[float]()
    for seed in seeds:
        others = {
            rate: _mean([scores[other] for other in seeds if other != seed])
            for rate, scores in by_rate.items()
        }
        held_out.append(by_rate[max(others, key=lambda rate: others[rate])][seed])
    return claimed - _mean(held_out)


def _bound(cell: Cell, task: str, accuracy: float, num_rates: int) -> float | None:
    totals = [
        score.total
        for result in cell.results
        for score in result.scores
        if score.split == "test" and score.task == task
    ]
    if not totals:
        return None
    return selection_bias(num_rates, accuracy=accuracy, num_questions=min(totals), correlation=0.5)


def _point(cell: Cell, metric: Metric) -> Point:
    scores = () if cell.best is None else _finite_scores(cell.best.trials, metric)
    mean = mean_with_interval([score for _, score in scores]) if scores else None
    return Point(
        batch_size=cell.trial.batch_size,
        score=mean.value if mean else None,
        low=mean.low if mean else None,
        high=mean.high if mean else None,
        seed_scores=scores,
        learning_rate=cell.best.learning_rate if cell.best else None,
        lr_at_edge=cell.lr_at_edge,
        diverged_rates=cell.diverged_rates,
        # A search's answer need not have every seed.
        incomplete=bool(cell.incomplete_rates)
        or (not cell.is_answer and 0 < len(scores) < len(cell.seeds)),
        fresh_scores=() if cell.best is None else _finite_scores(cell.best.further, metric),
    )


def _finite_scores(trials: Sequence[TrialResult], metric: Metric) -> tuple[tuple[int, float], ...]:
    found = [(result.trial.seed, trial_score(result, metric)) for result in trials]
    return tuple((seed, s) for seed, s in found if s is not None and math.isfinite(s))


def _shifted(curve: Curve, top: Point | None) -> Curve:
    best = curve.best
    if best is None or best.score is None or top is None or top.score is None:
        return curve
    shift = top.score - best.score
    points = [
        replace(
            point,
            score=None if point.score is None else point.score + shift,
            low=None if point.low is None else point.low + shift,
            high=None if point.high is None else point.high + shift,
            seed_scores=tuple((seed, score + shift) for seed, score in point.seed_scores),
            fresh_scores=tuple((seed, score + shift) for seed, score in point.fresh_scores),
        )
        for point in curve.points
    ]
    return replace(curve, points=tuple(points), shift=shift)


def _shared_seeds(pairs: Sequence[tuple[Point, Point]]) -> list[int]:
    """Seeds with a score at every batch size of both curves."""
    sets = [{seed for seed, _ in point.seed_scores} for pair in pairs for point in pair]
    return sorted(set[int].intersection(*sets)) if sets else []


def _crossing_interval(
    where: float, xs: Sequence[float], zero_sets: Sequence[ZeroSet]
) -> tuple[float | None, float | None]:
    """The connected piece, around `where`, of the x at which the difference may be 0."""
    pieces = list[tuple[float, float]]()
    for index in range(len(xs) - 1):
        width = xs[index + 1] - xs[index]
        for start, end in zero_sets[index]:
            low, high = xs[index] + start * width, xs[index] + end * width
            if pieces and math.isclose(pieces[-1][1], low, abs_tol=1e-12):
                pieces[-1] = (pieces[-1][0], high)
            else:
                pieces.append((low, high))
    for low, high in pieces:
        if low - 1e-9 <= where <= high + 1e-9:
            return (
                None if math.isclose(low, xs[0], abs_tol=1e-12) else 2.0**low,
                None if math.isclose(high, xs[-1], abs_tol=1e-12) else 2.0**high,
            )
    # Seeds that are not shared moved the means: the shared ones see no crossing here.
    return (None, None)


def _signs(differences: Sequence[Estimate], pairs: Sequence[tuple[Point, Point]]) -> list[int]:
    """At each batch size 1 or -1 where the difference is shown to be above or below 0, else 0.

    One-sided tests with Holm's adjustment over the batch sizes, for each sign apart: with 95%
    confidence no sign of that kind stands where the difference is 0 or has the other one. A
    crossing that is not there takes a wrong sign, so that it is shown in 5 of 100 cases at most.
    """
    tails = [0.5] * len(differences)  # No sign where the seeds change nothing.
    for index, (one, pair) in enumerate(zip(differences, pairs, strict=True)):
        largest = max(abs(point.score or 0.0) for point in pair)
        if one.standard_error > NO_SPREAD * largest:
            tails[index] = one.p_value / 2
    signs = [0] * len(differences)
    for sign in (1, -1):
        of_sign = [
            p if sign * one.value > 0 else 1.0 - p
            for p, one in zip(tails, differences, strict=True)
        ]
        for index, p in enumerate(holm(of_sign)):
            if p < 1 - CONFIDENCE:
                signs[index] = sign
    return signs


def _shown_between(
    low: float | None, high: float | None, sign: int, xs: Sequence[float], signs: Sequence[int]
) -> tuple[int, int] | None:
    """The tried batch sizes next to an interval at which `sign` and its opposite are shown.

    None where the interval is open, or the nearest signs on its two sides are not these.
    """
    if low is None or high is None:
        return None
    below = [i for i, x in enumerate(xs) if signs[i] and x <= math.log2(low)]
    above = [i for i, x in enumerate(xs) if signs[i] and x >= math.log2(high)]
    if not below or not above or signs[below[-1]] != sign or signs[above[0]] != -sign:
        return None
    return below[-1], above[0]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _curve_key(trial: Trial) -> tuple[object, ...]:
    key = tuple(getattr(trial, one.name) for one in fields(trial) if one.name not in _ALONG_CURVE)
    return (*key, trial.beta2 if trial.beta2_rule == "fixed" else None)


def _warmups(cells: Sequence[Cell]) -> dict[tuple[object, ...], set[int]]:
    """The warm-ups, in steps and above 0, of the cells that are alike but for it.

    A warm-up given as a ratio is another number of steps at every batch size; a trial knows only
    the steps. Two warm-ups, one in steps and one a ratio, may change order along the curve; their
    cells are then attributed wrongly (the cells themselves are right).
    """
    warmups = dict[tuple[object, ...], set[int]]()
    for cell in cells:
        if cell.trial.warmup_steps > 0:
            warmups.setdefault(_alike_but_for_warmup(cell), set()).add(cell.trial.warmup_steps)
    return warmups


def _alike_but_for_warmup(cell: Cell) -> tuple[object, ...]:
    return (cell.study, _curve_key(cell.trial), cell.trial.batch_size)


def _settings(groups: Sequence[Sequence[Cell]]) -> list[Setting]:
    axes = [_axes(group) for group in groups]
    needed = _needed_axes(axes)
    return [
        Setting(
            label=", ".join(_spoken(axis, one[axis]) for axis in needed) or one["method"],
            axes=tuple(one.items()),
        )
        for one in axes
    ]


def _axes(group: Sequence[Cell]) -> dict[str, str]:
    """Every axis of a study as text. What follows from others stands last, and is seldom needed."""
    trial = group[0].trial
    length = f"{trial.epochs:g} epochs" if trial.epochs is not None else f"{trial.steps} steps"
    return {
        "method": group[0].method,
        "model": trial.model,
        "rank": str(trial.rank),
        "rows": str(trial.num_train_rows),
        "schedule": trial.schedule + _warmup_text(group),
        "protocol": length.replace("1 epochs", "1 epoch") if trial.epochs == 1 else length,
        "alpha": f"{trial.alpha:g}",
        "beta2": f"{trial.beta2:g}" if trial.beta2_rule == "fixed" else trial.beta2_rule,
        "precision": trial.precision,
        "dropout": f"{trial.dropout:g}",
        "targets": "+".join(trial.targets),
        "data": trial.data_fingerprint,
        "study": group[0].study,
        "other": repr(_curve_key(trial)),
    }


def _warmup_text(group: Sequence[Cell]) -> str:
    steps = {cell.trial.warmup_steps for cell in group}
    if steps == {0}:
        return ""
    if len(steps) == 1 and len(group) > 1:
        return f" with {min(steps)} warm-up steps"
    longest = max((cell.trial for cell in group), key=lambda trial: trial.num_updates)
    return f" with {100 * longest.warmup_steps / longest.num_updates:.2g}% warm-up"


def _needed_axes(axes: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """Axes, in order, each of which tells apart curves that those before it do not."""
    needed = list[str]()
    for axis in axes[0] if axes else ():
        before = {tuple(one[name] for name in needed) for one in axes}
        after = {tuple(one[name] for name in (*needed, axis)) for one in axes}
        if len(after) > len(before):
            needed.append(axis)
    return tuple(needed)


def _spoken(axis: str, value: str) -> str:
    if axis in ("method", "protocol", "precision", "study"):
        return value
    if axis == "rows":
        return f"{int(value):,} rows"
    if axis == "schedule":
        return value
    if axis == "model":
        return value.rstrip("/").rsplit("/", maxsplit=1)[-1]
    return f"{axis} {value}"
