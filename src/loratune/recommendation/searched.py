"""The answer of an adaptive search, read off the surface of all trials of a curve. No torch.

The surface spans the batch sizes and the LRs that were tried, so that the expected regret is
against these; what lies beyond the lowest and the highest LR is not judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.analyse.cells import Cell, answered_at, make_cells
from loratune.analyse.curves import Curve, is_search, make_curves
from loratune.planning.search_space import Space
from loratune.recommendation.adaptive import (
    DEFAULT_MARGIN,
    Observed,
    SearchAnswer,
    fit_surface,
    search_answer,
)
from loratune.recommendation.early_stopping import expected_loss
from loratune.records import FINAL_STATUSES, TrialResult


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search says of one curve; `answer` is None where `undecided` says why alone."""

    answer: SearchAnswer | None
    undecided: tuple[str, ...]
    notes: tuple[str, ...]


def observed(results: Sequence[TrialResult]) -> tuple[Observed, ...]:
    """The trials that have been tried, as the search takes them.

    One that failed or ran out of memory has no loss and did not diverge. One that ended with an
    infinite loss has diverged. One that was stopped has the loss that `early_stopping` expects of
    it, for which the results need their losses.
    """
    found = list[Observed]()
    for result in results:
        outcome = result.outcome
        if outcome is None or result.purpose == "confirm":
            continue
        stopped = outcome.status == "stopped"
        loss = outcome.validation_loss if outcome.status == "done" else None
        if stopped:
            loss = expected_loss(result, results)
        if loss is not None and not 0.0 < loss < float("inf"):
            loss = None
        found.append(
            Observed(
                batch_size=result.trial.batch_size,
                learning_rate=result.trial.learning_rate,
                seed=result.trial.seed,
                loss=loss,
                useless=loss is None if stopped else outcome.status not in ("done", "diverged"),
                stopped=stopped,
            )
        )
    return tuple(found)


def answer_of_search(curve: Curve, *, margin: float) -> Searched:
    """The answer with its expected regret, or why there is none."""
    results = [result for cell in curve.cells for result in cell.results]
    left = sum(result.status not in FINAL_STATUSES for result in results)
    trials, answer = _read_off(results, margin=margin)
    if answer is None:
        return Searched(None, (_why_none(trials, left),), ())
    undecided = list[str]()
    if answer.expected_regret > margin:
        undecided.append(
            f"after {len(trials)} trials the best found, batch size {answer.batch_size} at "
            f"learning rate {answer.learning_rate:g}, is still expected to be "
            f"{100 * answer.expected_regret:.2g}% worse than the best there is, more than "
            f"{100 * margin:g}%; raise max_trials under learning_rate and run it again"
        )
    return Searched(answer, tuple(undecided), tuple(_notes(answer, trials, left)))


def answer_point(results: Sequence[TrialResult]) -> tuple[int, float] | None:
    """Batch size and LR of the answer, decided or not; None where there is none.

    Args:
        results: all of one curve's search, in any order.
    """
    _, answer = _read_off(results, margin=DEFAULT_MARGIN)
    return None if answer is None else (answer.batch_size, answer.learning_rate)


def _read_off(
    results: Sequence[TrialResult], *, margin: float
) -> tuple[tuple[Observed, ...], SearchAnswer | None]:
    """One curve's trials as the search takes them, and the answer of their surface."""
    # In one order, whatever that of the results: rounding moves no answer.
    results = sorted(
        results, key=lambda one: (one.trial.batch_size, one.trial.learning_rate, one.trial.seed)
    )
    trials = observed(results)
    surface = fit_surface(trials, _tried(results))
    return trials, None if surface is None else search_answer(surface, margin=margin)


def answered(results: Sequence[TrialResult]) -> tuple[Cell, ...]:
    """`make_cells`, with the answer of every adaptive search in the cell in which it lies.

    So that what is confirmed, compared, kept and shown is what is recommended.
    """
    cells = {id(cell): cell for cell in make_cells(results)}
    for curve in make_curves(tuple(cells.values())):
        if not is_search(curve):
            continue
        point = answer_point([result for cell in curve.cells for result in cell.results])
        for cell in curve.cells:
            if point is not None and cell.trial.batch_size == point[0]:
                cells[id(cell)] = answered_at(cell, point[1])
    return tuple(cells.values())


def _tried(results: Sequence[TrialResult]) -> Space:
    """Every batch size with every LR of the curve; no seed is left, nothing is proposed here."""
    sizes = sorted({result.trial.batch_size for result in results})
    rates = sorted({result.trial.learning_rate for result in results})
    points = tuple((size, rate) for size in sizes for rate in rates)
    return Space(points, ((),) * len(points))


def _why_none(trials: Sequence[Observed], left: int) -> str:
    if left:
        return f"{left} trials of the search have no outcome; finish the study with `loratune run`"
    lowest = min(one.learning_rate for one in trials)
    return (
        "nearly every trial diverged, and none is left that could be the answer; try learning "
        f"rates below the lowest one, {lowest:g}"
    )


def _notes(answer: SearchAnswer, trials: Sequence[Observed], left: int) -> list[str]:
    seeds = "1 seed" if answer.num_seeds == 1 else f"{answer.num_seeds} seeds"
    notes = [
        f"expected validation loss there: {answer.expected_loss:.4g} (95% interval "
        f"{answer.loss_low:.4g} to {answer.loss_high:.4g}; {seeds}, and the trials around it); "
        f"expected regret {100 * answer.expected_regret:.2g}% of the loss, from a Gaussian process "
        f"through {len(trials)} trials"
    ]
    rates = sorted({one.learning_rate for one in trials})
    if answer.learning_rate in (rates[0], rates[-1]):
        end = ("lowest", "lower") if answer.learning_rate == rates[0] else ("highest", "higher")
        notes.append(_at_end(f"learning rate {answer.learning_rate:g}", *end))
    sizes = sorted({one.batch_size for one in trials})
    if len(sizes) > 1 and answer.batch_size in (sizes[0], sizes[-1]):
        end = ("smallest", "smaller") if answer.batch_size == sizes[0] else ("largest", "larger")
        notes.append(_at_end(f"batch size {answer.batch_size}", *end))
    if left:
        notes.append(f"{left} trials have no outcome yet; the answer may change")
    diverged = sum(one.loss is None and not one.useless for one in trials)
    stopped = sum(one.stopped for one in trials)
    if stopped:
        notes.append(
            f"{stopped} of the trials were stopped half-way, far above the best ones there; what "
            "they would have reached is estimated, and a batch size whose best trial was stopped "
            "has no score"
        )
    if diverged:
        notes.append(f"{diverged} of the trials diverged; the search kept away from there")
    return notes


def _at_end(what: str, end: str, beyond: str) -> str:
    return f"{what} is the {end} that was tried; a {beyond} one may be better"
