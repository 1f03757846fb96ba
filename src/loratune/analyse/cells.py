"""Cells: all trials that differ only in LR and seed, and the LR that is best among them.

The best LR is the best in the mean over its seeds. An LR at which any seed diverged is not
eligible, and shown. Neither is one that lacks a score for any seed of the cell: a mean over fewer
seeds would be compared with one over more. It lacks one because it failed or is still to come
("incomplete"), or because the study gives further seeds to the LRs around the best alone, and this
is not one of them ("screened").
The interval is over seeds alone, and the same seeds chose the LR, so that the score is a little
better than a fresh seed's would be; `curves.selection_gaps` measures that where it can be measured,
and trials that confirm, which choose nothing, are free of it.
"""

# pandas comes without complete types: what it returns is unknown to pyright.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from loratune.analyse.intervals import Mean, mean_with_interval
from loratune.analyse.scores import (
    Metric,
    diverged,
    method_label,
    selection_metric,
    trial_score,
)
from loratune.analyse.tables import TASK_COLUMNS, Value, make_frame, results_columns, trial_row
from loratune.planning.bar import half_way_loss
from loratune.records import Trial, TrialResult
from loratune.study.identity import cell_key

# Columns of a trial that differ within a cell: trials that confirm lie in the searched ones' cells.
_WITHIN_CELL = frozenset({"learning_rate", "seed", "purpose"})


@dataclass(frozen=True, slots=True)
class TriedRate:
    """One LR of a cell. `seed_scores` follow the cell's seeds, None where there is no score.

    `mean` is over the scores there are, None where none is finite; it is shown, but only an
    eligible LR's is compared. `further` are its trials with seeds that did not choose.
    """

    learning_rate: float
    trials: tuple[TrialResult, ...]
    seed_scores: tuple[float | None, ...]
    mean: float | None
    verdict: Literal["eligible", "diverged", "incomplete", "screened"]
    further: tuple[TrialResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """All trials that differ only in LR and seed. `trial` is one of them, for what they share.

    `seeds` are those that choose the LR; see the module.

    `best` and `score` are None where no LR is eligible, `lr_at_edge` too, and where an adaptive
    search chose the LRs: they are no grid that could have an edge. `lr_at_edge`: the best
    LR is the lowest or the highest that was tried; an LR that diverged or was stopped early was
    tried, one that is planned or failed was not. `confirmations` are trials of fresh seeds at the
    LR that was chosen; they are in nothing else. `is_answer`: an adaptive search's answer lies in
    this cell (`answered_at`), and `best` is its LR, whatever the means are.
    """

    trial: Trial
    study: str
    select_on: Literal["validation_loss", "validation_accuracy", "test"]
    method: str
    metric: Metric
    seeds: tuple[int, ...]
    rates: tuple[TriedRate, ...]
    best: TriedRate | None
    lr_at_edge: bool | None
    score: Mean | None
    is_answer: bool = False

    @property
    def diverged_rates(self) -> tuple[float, ...]:
        """The LRs at which a seed diverged, ascending."""
        return self._rates_of("diverged")

    @property
    def incomplete_rates(self) -> tuple[float, ...]:
        """The LRs that lack a score for some seed, ascending."""
        return self._rates_of("incomplete")

    @property
    def results(self) -> tuple[TrialResult, ...]:
        """Every trial of the cell, by LR, then seed; those that confirm come last."""
        return tuple(result for rate in self.rates for result in (*rate.trials, *rate.further))

    @property
    def confirmations(self) -> tuple[TrialResult, ...]:
        """The trials that choose nothing."""
        return tuple(result for rate in self.rates for result in rate.further)

    def _rates_of(self, verdict: str) -> tuple[float, ...]:
        return tuple(rate.learning_rate for rate in self.rates if rate.verdict == verdict)


def make_cells(results: Sequence[TrialResult]) -> tuple[Cell, ...]:
    """The cells of the results, in the order in which their first trials come.

    Each study in the results has its own cells and its own metric.
    """
    by_study = dict[str, list[TrialResult]]()
    for result in results:
        by_study.setdefault(result.study, []).append(result)
    cells = list[Cell]()
    for of_study in by_study.values():
        metric = selection_metric(of_study)
        grouped = dict[tuple[object, ...], list[TrialResult]]()
        for result in of_study:
            grouped.setdefault(cell_key(result.trial), []).append(result)
        cells.extend(_cell(of_cell, metric) for of_cell in grouped.values())
    return tuple(cells)


def best_rate(rates: Sequence[TriedRate], metric: Metric) -> TriedRate | None:
    """The eligible LR with the best mean; of equal ones the lowest."""
    best: TriedRate | None = None
    for rate in rates:
        if rate.verdict != "eligible" or rate.mean is None:
            continue
        if best is None or best.mean is None or metric.better(rate.mean, best.mean):
            best = rate
    return best


def answered_at(cell: Cell, learning_rate: float) -> Cell:
    """The cell with the answer of its curve's search: the best LR is the one that the search names.

    Unchanged where nothing was trained at that LR.
    """
    for rate in cell.rates:
        if rate.learning_rate == learning_rate and (scores := _finite(rate.seed_scores)):
            return replace(cell, best=rate, score=mean_with_interval(scores), is_answer=True)
    return cell


def cells_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per cell: the trial columns without LR, seed and purpose, then what was chosen.

    The trial columns are those of the trials at the best LR: ids joined by "+", losses and
    accuracies the means over seeds, counts, seconds and tokens the sums, memory the largest,
    `num_updates` that of one trial. Where nothing is eligible they are null. `status` is "done"
    where an LR was chosen, else "diverged" if every LR did, else "incomplete".
    `diverged_learning_rates` and `incomplete_learning_rates` list the LRs that were not eligible,
    joined by ";", null where there is none.
    """
    within = results_columns(result for cell in cells for result in cell.results)
    columns = {name: kind for name, kind in within.items() if name not in _WITHIN_CELL}
    columns |= {
        "best_learning_rate": "float",
        "lr_at_edge": "bool",
        "score": "float",
        "score_metric": "text",
        "higher_is_better": "bool",
        "score_low": "float",
        "score_high": "float",
        "num_seeds": "int",
        "diverged_learning_rates": "text",
        "incomplete_learning_rates": "text",
    }
    return make_frame(columns, [_row(cell, columns) for cell in cells])


def _cell(of_cell: Sequence[TrialResult], metric: Metric) -> Cell:
    results = [result for result in of_cell if result.purpose != "confirm"]
    # A seed that was only tried where it was stopped half-way is lacking nowhere else.
    seeds = tuple(sorted({one.trial.seed for one in results if one.status != "stopped"}))
    by_rate = dict[float, list[TrialResult]]()
    for result in results:
        by_rate.setdefault(result.trial.learning_rate, []).append(result)
    fresh = dict[float, list[TrialResult]]()
    for result in of_cell:
        if result.purpose == "confirm":
            fresh.setdefault(result.trial.learning_rate, []).append(result)
    rates = tuple(
        _tried(rate, by_rate[rate], fresh.get(rate, ()), seeds, metric) for rate in sorted(by_rate)
    )
    best = best_rate(rates, metric)
    if best is not None and _was_behind_a_stopped_one(best, results):
        best = None
    first = of_cell[0]
    return Cell(
        trial=first.trial,
        study=first.study,
        select_on=first.select_on,
        method=method_label(first),
        metric=metric,
        seeds=seeds,
        rates=rates,
        best=best,
        lr_at_edge=None if best is None or first.purpose == "adaptive" else _at_edge(best, rates),
        score=None if best is None else mean_with_interval(_finite(best.seed_scores)),
    )


def _was_behind_a_stopped_one(best: TriedRate, results: Sequence[TrialResult]) -> bool:
    """Whether a trial that was stopped half-way was ahead of all that ended at the best LR.

    Then what is best here is not known: it was nowhere near the best of the whole search.
    """
    stopped, ended = (
        [loss for one in some if (loss := half_way_loss(one)) is not None]
        for some in ([one for one in results if one.status == "stopped"], best.trials)
    )
    return bool(stopped and ended) and min(stopped) < min(ended)


def _tried(
    rate: float,
    results: Sequence[TrialResult],
    fresh: Sequence[TrialResult],
    seeds: Sequence[int],
    metric: Metric,
) -> TriedRate:
    by_seed = {result.trial.seed: result for result in results}
    scores = tuple(
        trial_score(by_seed[seed], metric) if seed in by_seed else None for seed in seeds
    )
    finite = _finite(scores)
    verdict: Literal["eligible", "diverged", "incomplete", "screened"] = "eligible"
    if any(diverged(result, metric) for result in results):
        verdict = "diverged"
    elif len(finite) < len(results):
        verdict = "incomplete"
    elif len(finite) < len(seeds):
        verdict = "screened"
    return TriedRate(
        learning_rate=rate,
        # One that was stopped may have a seed that is none of the cell's.
        trials=tuple(by_seed[seed] for seed in sorted(by_seed)),
        seed_scores=scores,
        mean=math.fsum(finite) / len(finite) if finite else None,
        verdict=verdict,
        further=tuple(sorted(fresh, key=lambda result: result.trial.seed)),
    )


def _at_edge(best: TriedRate, rates: Sequence[TriedRate]) -> bool:
    tried = [rate.learning_rate for rate in rates if _was_tried(rate)]
    return best.learning_rate in (tried[0], tried[-1])


def _was_tried(rate: TriedRate) -> bool:
    seen = any(score is not None for score in rate.seed_scores)
    return seen or any(result.status in ("diverged", "stopped") for result in rate.trials)


def _finite(scores: Sequence[float | None]) -> list[float]:
    return [score for score in scores if score is not None and math.isfinite(score)]


def _row(cell: Cell, columns: dict[str, str]) -> dict[str, Value]:
    shared = trial_row(cell.results[0])
    chosen = [trial_row(result) for result in cell.best.trials] if cell.best else []
    row = dict[str, Value]()
    for name in columns:
        values = [one[name] for one in chosen if one.get(name) is not None]
        if name in ("trial_id", "error"):
            row[name] = "+".join(map(str, values)) or None
        elif name in ("train_loss", "validation_loss") or name.endswith("_accuracy"):
            numbers = [float(value) for value in values if isinstance(value, int | float)]
            row[name] = math.fsum(numbers) / len(numbers) if numbers else None
        elif name in ("seconds", "tokens") or _is_count(name):
            numbers = [value for value in values if isinstance(value, int | float)]
            row[name] = sum(numbers) if numbers else None
        elif name == "peak_memory_bytes":
            row[name] = max((int(str(value)) for value in values), default=None)
        elif name in ("num_updates", "engine"):
            row[name] = values[0] if values else None
        else:
            row[name] = shared.get(name)
    return row | {
        "status": _status(cell),
        "best_learning_rate": cell.best.learning_rate if cell.best else None,
        "lr_at_edge": cell.lr_at_edge,
        "score": cell.score.value if cell.score else None,
        "score_metric": cell.metric.name,
        "higher_is_better": cell.metric.higher_is_better,
        "score_low": cell.score.low if cell.score else None,
        "score_high": cell.score.high if cell.score else None,
        "num_seeds": cell.score.num_values if cell.score else None,
        "diverged_learning_rates": _joined(cell.diverged_rates),
        "incomplete_learning_rates": _joined(cell.incomplete_rates),
    }


def _is_count(name: str) -> bool:
    return any(name.endswith(f"_{part}") for part in TASK_COLUMNS if part != "accuracy")


def _status(cell: Cell) -> str:
    if cell.best is not None:
        return "done"
    return "diverged" if all(rate.verdict == "diverged" for rate in cell.rates) else "incomplete"


def _joined(rates: Sequence[float]) -> str | None:
    return ";".join(repr(rate) for rate in rates) or None
