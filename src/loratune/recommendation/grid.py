"""The answer to "which batch size and learning rate?", from the trials of a grid or a search.

A search's answer is that of `searched`; what follows is said of grids.

Nothing is modelled between or beyond the batch sizes that were tried. What cannot be decided is
said in `undecided`, and the numbers beside it are null. Seeds are the only noise that is counted:
the validation rows are the same for all, and another sample of them could order two close batch
sizes the other way. Each cell's LR was chosen on the same seeds (see `analyse.cells`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.analyse.cells import Cell
from loratune.analyse.curves import Curve, Point, is_search, make_curves, why_no_score
from loratune.analyse.intervals import NO_SPREAD
from loratune.analyse.scores import trial_score
from loratune.analyse.tables import as_document
from loratune.errors import AnalysisError
from loratune.recommendation.adaptive import DEFAULT_MARGIN
from loratune.recommendation.best import FEWEST_SEEDS_OF_OWN, against_best
from loratune.recommendation.searched import Searched, answer_of_search, answered
from loratune.records import TrialResult

BASELINE = "lora"


@dataclass(frozen=True, slots=True)
class ScoreAtBatchSize:
    """What was measured at one batch size: the mean over seeds at the best LR, its 95% interval.

    `rows_per_second` is over all finished trials of the cell.
    """

    batch_size: int
    learning_rate: float | None
    lr_at_edge: bool | None
    score: float | None
    score_low: float | None
    score_high: float | None
    num_seeds: int
    diverged_learning_rates: tuple[float, ...]
    rows_per_second: float | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the answer stands on. `notes` are plain sentences that belong beside the numbers.

    `num_shared_seeds`, `sigma` (standard deviation of a trial's score once its seed's and its batch
    size's means are taken out) and `df` are those of the comparison; None where none was made, the
    last two also where all batch sizes but one were far worse (`best.against_best`).
    """

    score_metric: str
    higher_is_better: bool
    select_on: str
    num_trials: int
    num_finished: int
    num_diverged: int
    num_shared_seeds: int | None
    sigma: float | None
    df: int | None
    what_varied: str
    scores: tuple[ScoreAtBatchSize, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoreAtLearningRate:
    """What the target scored at one batch size and LR, the mean over its seeds.

    `verdict` is that of `analyse.cells.TriedRate`.
    """

    batch_size: int
    learning_rate: float
    score: float | None
    num_seeds: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The batch size and LR for one method in one setting, or why they cannot be told.

    `batch_size_low` and `batch_size_high` bound the batch sizes tried that cannot be excluded as
    the best; `acceptable_batch_sizes` are those whose expected score is within `margin` (relative)
    of the best's. Both hold together with 95% confidence where a seed moves all batch sizes equally
    much. Where it does not, in simulations with 94% at least from three seeds on, and with two with
    76% at least, which a note says (`recommendation.best`). `fastest_acceptable_batch_size` has the
    most measured rows per second of them. `cost_fraction` is tokens trained over tokens of the
    full sweep; a grid is the full sweep, so it is below 1 only while trials are unfinished or
    where they diverged early. None where no trial has run, and for an adaptive search, which has no
    grid. `expected_regret` (a fraction of the loss) is an adaptive search's; its batch sizes hold
    with 95% posterior probability each. Where a proxy was searched (`recommendation.proxy`),
    `confirmed` are the target's scores, `extrapolated_over` says what differs, and the cost is in
    FLOPs, over those of the fixed sweep on the target; the batch sizes' 95% are then those of the
    model `proxy`.
    """

    setting: str
    method: str
    model: str
    rank: int
    num_train_rows: int
    margin: float
    batch_size: int | None
    batch_size_low: int | None
    batch_size_high: int | None
    learning_rate: float | None
    acceptable_batch_sizes: tuple[int, ...] | None
    fastest_acceptable_batch_size: int | None
    rows_per_microbatch: int | None
    gradient_accumulation_steps: int | None
    evidence: Evidence
    extrapolated_over: tuple[str, ...]
    cost_fraction: float | None
    undecided: tuple[str, ...]
    expected_regret: float | None = None
    confirmed: tuple[ScoreAtLearningRate, ...] = ()
    proxy: str | None = None

    def to_json(self) -> dict[str, object]:
        """The answer as plain values under the names that others rely on; tuples are lists."""
        return as_document(self)


def recommendations(
    results: Sequence[TrialResult],
    *,
    method: str | None = None,
    margin: float = DEFAULT_MARGIN,
) -> tuple[Recommendation, ...]:
    """One recommendation for every setting of one method, in the study's order.

    `method` left out is lora where the study has it (whether another method is better is
    `compare`'s question), else the study's first.

    Raises:
        AnalysisError: no results, a margin below 0, or nothing that matches; the message lists
            what there is.
    """
    if not results:
        raise AnalysisError("no trials; run the study first")
    if margin < 0 or not math.isfinite(margin):
        raise AnalysisError(f"margin={margin}; give a fraction of 0 or more, such as 0.005")
    curves = make_curves(answered(results))
    methods = list(dict.fromkeys(curve.setting.value("method") for curve in curves))
    default = BASELINE if BASELINE in methods else methods[0]
    chosen = default if method is None else method
    curves = [curve for curve in curves if curve.setting.value("method") == chosen]
    if not curves:
        raise AnalysisError(f"no trials with method {chosen!r}; there are {', '.join(methods)}")
    return tuple(
        recommend_from_curve(
            curve, margin=margin, other_methods=[name for name in methods if name != chosen]
        )
        for curve in curves
    )


def recommend_from_curve(
    curve: Curve, *, margin: float = DEFAULT_MARGIN, other_methods: Sequence[str] = ()
) -> Recommendation:
    """The recommendation that one curve allows."""
    if is_search(curve):
        found = answer_of_search(curve, margin=margin)
        return _recommend_from_search(curve, found, margin=margin, other_methods=other_methods)
    cells = {cell.trial.batch_size: cell for cell in curve.cells}
    scored = [point for point in curve.points if point.score is not None]
    best = curve.best
    shared = _shared_seeds(curve)
    undecided = list[str]()
    if best is None:
        undecided.append(why_no_score(curve))
    elif len(scored) < 2:
        undecided.append(
            f"only batch size {best.batch_size} has a score, and it takes two to say which is "
            "better; finish the study, or add batch sizes"
        )
    elif len(shared) < 2:
        undecided.append(
            f"{_seed_count(len(shared))} common to all batch sizes: how much of the difference "
            "between them is luck cannot be told; write seeds: 3 (2 at least) in the study and run "
            "it again"
        )
    undecided += _not_yet_tried(curve)
    low = high = None
    acceptable = list[int]()
    comparison = None
    if best is not None and best.score is not None and not undecided:
        sign = 1.0 if curve.metric.higher_is_better else -1.0
        tolerated = margin * abs(best.score)
        comparison = against_best(
            [[sign * dict(point.seed_scores)[seed] for seed in shared] for point in scored],
            tolerated=tolerated,
        )
        if all(_has_no_spread(point) for point in scored):
            undecided.append(
                f"the {len(shared)} seeds change no score: how much other seeds would is not known;"
                " see that the seed shuffles the rows and draws the initialisation, and run again"
            )
        sizes = [point.batch_size for point in scored]
        possible = [
            size
            for size, upper in zip(sizes, comparison.upper, strict=True)
            if upper > 0.0 or size == best.batch_size
        ]
        acceptable = [
            size for size, lower in zip(sizes, comparison.lower, strict=True) if -lower <= tolerated
        ]
        low, high = min(possible), max(possible)
        if not acceptable and len(possible) == len(sizes):
            undecided.append(
                f"the seeds differ too much (standard deviation {comparison.sigma:.3g}): no batch "
                f"size can be excluded as the best, and none be shown to be within "
                f"{100 * margin:g}% of it; run more seeds"
            )
    speeds = {size: _rows_per_second(cell) for size, cell in cells.items()}
    notes = _notes(curve, acceptable, comparison is not None, margin, other_methods)
    decided = best is not None and not undecided
    batch_size = best.batch_size if best is not None and decided else None
    microbatch = None if batch_size is None else _rows_per_microbatch(curve, batch_size)
    first = curve.cells[0]
    return Recommendation(
        setting=curve.label,
        method=first.method,
        model=first.trial.model,
        rank=first.trial.rank,
        num_train_rows=first.trial.num_train_rows,
        margin=margin,
        batch_size=batch_size,
        batch_size_low=low if decided else None,
        batch_size_high=high if decided else None,
        learning_rate=best.learning_rate if best is not None and decided else None,
        acceptable_batch_sizes=tuple(acceptable) if decided else None,
        fastest_acceptable_batch_size=_fastest(acceptable, speeds) if decided else None,
        rows_per_microbatch=microbatch,
        gradient_accumulation_steps=(
            None if batch_size is None or microbatch is None else math.ceil(batch_size / microbatch)
        ),
        evidence=_evidence(
            curve,
            speeds,
            notes,
            num_shared_seeds=len(shared) if comparison else None,
            sigma=comparison.sigma if comparison else None,
            df=comparison.df if comparison else None,
        ),
        extrapolated_over=(),
        cost_fraction=_cost_fraction(curve),
        undecided=tuple(undecided),
    )


def _recommend_from_search(
    curve: Curve, found: Searched, *, margin: float, other_methods: Sequence[str]
) -> Recommendation:
    """The recommendation of an adaptive search; its surface stands in the place of the means."""
    first = curve.cells[0]
    speeds = {cell.trial.batch_size: _rows_per_second(cell) for cell in curve.cells}
    answer = None if found.undecided else found.answer
    batch_size = None if answer is None else answer.batch_size
    microbatch = None if batch_size is None else _rows_per_microbatch(curve, batch_size)
    return Recommendation(
        setting=curve.label,
        method=first.method,
        model=first.trial.model,
        rank=first.trial.rank,
        num_train_rows=first.trial.num_train_rows,
        margin=margin,
        batch_size=batch_size,
        batch_size_low=None if answer is None else min(answer.possible_batch_sizes),
        batch_size_high=None if answer is None else max(answer.possible_batch_sizes),
        learning_rate=None if answer is None else answer.learning_rate,
        acceptable_batch_sizes=None if answer is None else answer.acceptable_batch_sizes,
        fastest_acceptable_batch_size=(
            None if answer is None else _fastest(answer.acceptable_batch_sizes, speeds)
        ),
        rows_per_microbatch=microbatch,
        gradient_accumulation_steps=(
            None if batch_size is None or microbatch is None else math.ceil(batch_size / microbatch)
        ),
        evidence=_evidence(
            curve,
            speeds,
            (*found.notes, *_about_methods(curve, other_methods)),
            num_shared_seeds=None,
            sigma=None,
            df=None,
        ),
        extrapolated_over=(),
        cost_fraction=None,
        undecided=found.undecided,
        expected_regret=None if answer is None else answer.expected_regret,
    )


def _not_yet_tried(curve: Curve) -> list[str]:
    """Why the best of what was tried may not be the best of the study, and what to run.

    Trials that confirm choose nothing, so that none of them is waited for.
    """
    if curve.best is None:
        return []
    tried = [rate for cell in curve.cells for rate in cell.rates]
    reasons = list[str]()
    # Of an LR that diverged or was screened enough is known; more trials would not choose it.
    statuses = [
        result.status
        for rate in tried
        if rate.verdict == "incomplete"
        for result in rate.trials
        if trial_score(result, curve.metric) is None
    ]
    if statuses:
        counted = ", ".join(f"{statuses.count(one)} {one}" for one in sorted(set(statuses)))
        reasons.append(
            f"trials without a score ({counted}) may hold the best; run the same command again, "
            "which goes on where it stopped and tries failed ones anew, or take their batch sizes "
            "or learning rates out of the study"
        )
    scored = {rate.learning_rate for rate in tried if rate.verdict in ("eligible", "screened")}
    if len(scored) == 1:
        (alone,) = scored
        more = _rates_beyond(curve) or _rates_beside(
            alone, sorted({rate.learning_rate for rate in tried})
        )
        reasons.append(
            f"learning rate {alone:g} alone has a score: which batch size is best where each "
            f"has its own best learning rate cannot be told; add {more} to the study file and run "
            "it again"
        )
    return reasons


def _shared_seeds(curve: Curve) -> list[int]:
    sets = [{seed for seed, _ in one.seed_scores} for one in curve.points if one.score is not None]
    return sorted(set[int].intersection(*sets)) if sets else []


def _has_no_spread(point: Point) -> bool:
    scores = [score for _, score in point.seed_scores]
    return max(scores) - min(scores) <= NO_SPREAD * max(map(abs, scores))


def _seed_count(num: int) -> str:
    return "no seed is" if num == 0 else "only one seed is" if num == 1 else f"{num} seeds are"


def _notes(
    curve: Curve,
    acceptable: Sequence[int],
    compared: bool,
    margin: float,
    other_methods: Sequence[str],
) -> tuple[str, ...]:
    notes = list[str]()
    best = curve.best
    name = curve.metric.name.replace("_", " ")
    if best is not None and best.score is not None and best.learning_rate is not None:
        extreme = "highest" if curve.metric.higher_is_better else "lowest"
        seeds = "1 seed" if best.num_seeds == 1 else f"mean of {best.num_seeds} seeds"
        notes.append(
            f"{extreme} {name}: {best.score:.4g} ({seeds}) at batch size {best.batch_size} and "
            f"learning rate {best.learning_rate:g}"
        )
        notes += _edge_notes(curve, best)
        if compared and not acceptable:
            notes.append(
                f"no batch size can be shown to be within {100 * margin:g}% of the best; "
                "run more seeds"
            )
        num_scored = sum(point.score is not None for point in curve.points)
        if compared and num_scored > 2 and len(_shared_seeds(curve)) < FEWEST_SEEDS_OF_OWN:
            notes.append(
                "two seeds do not tell whether one batch size is noisier than the others: where "
                "one is, the range and what is acceptable are less sure than 95%; run "
                f"{FEWEST_SEEDS_OF_OWN} seeds"
            )
    at_edge = [p.batch_size for p in curve.points if p.lr_at_edge and p is not best]
    if at_edge:
        notes.append(
            f"at {_sizes(at_edge)} too the best learning rate is at the edge of those tried: "
            "better scores may lie beyond it"
            if best is not None and best.lr_at_edge
            else f"at {_sizes(at_edge)} the best learning rate is at the edge of those tried: "
            "better scores may lie beyond it"
        )
    without = [point.batch_size for point in curve.points if point.score is None]
    if without:
        notes.append(f"left out for want of a score: {_sizes(without)}")
    incomplete = [point.batch_size for point in curve.points if point.incomplete]
    if incomplete:
        notes.append(
            f"at {_sizes(incomplete)} some trials have no score yet; the answer may change"
        )
    diverged = sorted({rate for point in curve.points for rate in point.diverged_rates})
    if diverged:
        notes.append(
            f"learning rate {_enumerated([f'{rate:g}' for rate in diverged])} diverged at some "
            "batch size and was not eligible there"
        )
    if curve.cells[0].select_on == "test":
        notes.append(
            "SELECTED ON THE TEST SET (select_on: test): the score is too good, "
            "and the answer is for reproduction only"
        )
    notes += _about_methods(curve, other_methods)
    if more := _worth_adding(curve):
        notes.append(
            f"what to run next: add {_enumerated(more)} to the study file and run it again; "
            "trials that are done are not repeated"
        )
    return tuple(notes)


def _about_methods(curve: Curve, other_methods: Sequence[str]) -> list[str]:
    if not other_methods:
        return []
    return [
        f"this is the answer for {curve.cells[0].method}; the study also has "
        f"{_enumerated(list(other_methods))}: `loratune compare` compares them, --method gives "
        "the answer for another"
    ]


def _edge_notes(curve: Curve, best: Point) -> list[str]:
    """Where the best lies at the end of what was tried, so that better may lie beyond."""
    notes = list[str]()
    sizes = [point.batch_size for point in curve.points if point.score is not None]
    if len(sizes) > 1 and best.batch_size in (sizes[0], sizes[-1]):
        smallest = best.batch_size == sizes[0]
        end, beyond = ("smallest", "smaller") if smallest else ("largest", "larger")
        notes.append(
            f"batch size {best.batch_size} is the {end} that has a score; "
            f"a {beyond} one may be better"
        )
    rates = _rates(curve, best)
    if best.lr_at_edge and len(rates) == 1:
        notes.append(f"only one learning rate was tried at batch size {best.batch_size}")
    elif best.lr_at_edge:
        lowest = best.learning_rate == rates[0]
        end, beyond = ("lowest", "lower") if lowest else ("highest", "higher")
        notes.append(
            f"learning rate {best.learning_rate:g} is the {end} tried at batch size "
            f"{best.batch_size}; a {beyond} one may be better"
        )
    return notes


def _worth_adding(curve: Curve) -> list[str]:
    """The next batch size and LRs beyond every edge at which a best one lies, in words.

    A batch size beyond which others were tried (and have no score) is no edge of the study.
    """
    best = curve.best
    if best is None:
        return []
    more = list[str]()
    tried = [point.batch_size for point in curve.points]
    trial = curve.cells[0].trial
    largest = trial.num_train_rows if trial.protocol == "fixed_samples" else math.inf
    if len(tried) > 1 and best.batch_size == tried[0] > 1:
        more.append(f"batch size {tried[0] // 2}")
    if len(tried) > 1 and best.batch_size == tried[-1] and 2 * tried[-1] <= largest:
        more.append(f"batch size {2 * tried[-1]}")
    if beyond := _rates_beyond(curve):
        more.append(beyond)
    return more


def _rates_beyond(curve: Curve) -> str:
    """The next LRs beyond every edge at which a batch size's best one lies; "" without any."""
    beyond = set[float]()
    for point in curve.points:
        if point.lr_at_edge:
            rates = _rates(curve, point)
            if point.learning_rate == rates[0]:
                beyond.add(_next_rate(rates[0], rates[1:2], up=False))
            if point.learning_rate == rates[-1]:
                beyond.add(_next_rate(rates[-1], rates[-2:-1], up=True))
    return _named_rates(sorted(beyond)) if beyond else ""


def _rates_beside(rate: float, tried: Sequence[float]) -> str:
    """Between one LR and its neighbours of the ascending ones tried, to two digits."""
    place = tried.index(rate)
    beside = (*tried[max(place - 1, 0) : place], *tried[place + 1 : place + 2])
    return _named_rates([float(f"{math.sqrt(rate * other):.2g}") for other in beside])


def _named_rates(rates: Sequence[float]) -> str:
    plural = "s" if len(rates) > 1 else ""
    return f"learning rate{plural} {_enumerated([f'{rate:g}' for rate in rates])}"


def _rates(curve: Curve, point: Point) -> list[float]:
    (cell,) = [one for one in curve.cells if one.trial.batch_size == point.batch_size]
    return [rate.learning_rate for rate in cell.rates]


def _next_rate(edge: float, neighbour: Sequence[float], *, up: bool) -> float:
    """One step of the grid beyond its edge, at 1, 2, 3 or 5 times a power of ten; 3 times alone."""
    step = max(edge, *neighbour) / min(edge, *neighbour) if neighbour else 3.0
    target = math.log(edge * step if up else edge / step)
    exponent = math.floor(target / math.log(10))
    round_ones = [
        float(f"{digit}e{exponent + shift}") for shift in (0, 1) for digit in (1, 2, 3, 5)
    ]
    further = [rate for rate in round_ones if (rate > edge if up else rate < edge)]
    return min(further, key=lambda rate: abs(math.log(rate) - target))


def _sizes(sizes: Sequence[int]) -> str:
    return f"batch size{'s' if len(sizes) > 1 else ''} {_enumerated(sizes)}"


def _enumerated(values: Sequence[object]) -> str:
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def _rows_per_second(cell: Cell) -> float | None:
    done = [
        (result.trial.num_samples, result.outcome.seconds)
        for result in cell.results
        if result.status == "done" and result.outcome is not None
    ]
    seconds = math.fsum(one for _, one in done)
    return sum(samples for samples, _ in done) / seconds if seconds > 0 else None


def _fastest(sizes: Sequence[int], speeds: dict[int, float | None]) -> int | None:
    known = [(speed, -size) for size in sizes if (speed := speeds[size]) is not None]
    return -max(known)[1] if known else None


def _rows_per_microbatch(curve: Curve, batch_size: int) -> int | None:
    """The largest part of the batch that a trial of the curve held at once and that divides it.

    A trainer takes equal micro-batches: only a divisor times the accumulation steps is the batch.
    """
    seen = [
        (cell.trial.batch_size == batch_size, rows)
        for cell in curve.cells
        for result in cell.results
        if result.outcome is not None and (rows := result.outcome.rows_per_microbatch) is not None
    ]
    own = [rows for is_own, rows in seen if is_own]
    fitting = own or [rows for _, rows in seen]
    if not fitting:
        return None
    return max(rows for rows in range(1, max(fitting) + 1) if batch_size % rows == 0)


def _cost_fraction(curve: Curve) -> float | None:
    """Tokens trained over those of the full sweep; a trial not finished is worth its like's."""
    spent = total = 0.0
    results = [result for cell in curve.cells for result in cell.results]
    per_sample = [
        one.outcome.num_tokens / one.trial.num_samples
        for one in results
        if one.status == "done" and one.outcome is not None
    ]
    if not per_sample:
        return None
    usual = math.fsum(per_sample) / len(per_sample)
    for one in results:
        ran = one.outcome.num_tokens if one.outcome is not None else 0
        done = one.status == "done"
        spent += ran
        total += ran if done else max(float(ran), usual * one.trial.num_samples)
    return spent / total if total > 0 else None


def _evidence(
    curve: Curve,
    speeds: dict[int, float | None],
    notes: tuple[str, ...],
    *,
    num_shared_seeds: int | None,
    sigma: float | None,
    df: int | None,
) -> Evidence:
    results = [result for cell in curve.cells for result in cell.results]
    return Evidence(
        score_metric=curve.metric.name,
        higher_is_better=curve.metric.higher_is_better,
        select_on=curve.cells[0].select_on,
        num_trials=len(results),
        num_finished=sum(one.outcome is not None for one in results),
        num_diverged=sum(one.status == "diverged" for one in results),
        num_shared_seeds=num_shared_seeds,
        sigma=sigma,
        df=df,
        what_varied="seeds",
        scores=tuple(
            ScoreAtBatchSize(
                batch_size=point.batch_size,
                learning_rate=point.learning_rate,
                lr_at_edge=point.lr_at_edge,
                score=point.score,
                score_low=point.low,
                score_high=point.high,
                num_seeds=point.num_seeds,
                diverged_learning_rates=point.diverged_rates,
                rows_per_second=speeds[point.batch_size],
            )
            for point in curve.points
        ),
        notes=notes,
    )
